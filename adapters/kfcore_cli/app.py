"""The commands, their options, and how errors of usage are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import kfcore
from kfcore_cli.errors import UsageError
from kfcore_cli.race import registry
from kfcore_cli.race.command import race as run_race
from kfcore_cli.race.options import Options
from kfcore_cli.spectrum.command import spectrum as show_spectrum

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _listed(kind: registry.Kind) -> str:
    return ", ".join(registry.names(kind))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kfcore {kfcore.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Curvature for every array framework."""


@app.command()
def race(
    problem: Annotated[str, typer.Option(help=f"What to train: {_listed('problems')}.")] = "digits",
    methods: Annotated[str, typer.Option(help=f"Optimizers, separated by commas: {_listed('methods')}.")] = "sgd,adam,kfac",
    backends: Annotated[str, typer.Option(help=f"Libraries, separated by commas: {_listed('backends')}.")] = "numpy",
    seconds: Annotated[float | None, typer.Option(help="Training time of every contender; instead of --steps.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of every contender; if neither is given, the problem's own number.")] = None,
    dtype: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the order of the minibatches.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for race.png and race.json.")] = Path("race"),
) -> None:
    """Train one network on real data with several optimizers and libraries, from the same weights and the same minibatches."""
    try:
        options = Options(
            problem=problem,
            methods=registry.split("methods", methods),
            backends=registry.split("backends", backends),
            seconds=seconds,
            steps=steps,
            dtype=dtype,
            seed=seed,
            out=out,
        )
        run_race(options, Console())
    except UsageError as error:
        typer.echo(f"kfcore race: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def spectrum(
    checkpoint: Annotated[Path, typer.Argument(help="A file written by `save` of any adapter.")],
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("spectrum.png"),
) -> None:
    """Show the spectra of the curvature factors in a checkpoint: how much each layer has seen, and how fast it decays."""
    try:
        show_spectrum(checkpoint, out, Console())
    except UsageError as error:
        typer.echo(f"kfcore spectrum: {error}", err=True)
        raise typer.Exit(2) from error
