"""Entry point of the ``kfcore`` command, which says what to install where its packages are missing."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command line; exit with code 2 and one line where typer or rich are not installed."""
    try:
        from kfcore_cli.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("kfcore", "kfcore_cli"):
            raise
        print(f"kfcore: the command line needs {package}, which is not installed: pip install 'kfcore[cli]'", file=sys.stderr)
        sys.exit(2)
    app()
