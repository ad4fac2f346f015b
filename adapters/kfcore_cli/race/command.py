"""A race from its options to its table, picture and file of numbers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from kfcore_cli.errors import missing
from kfcore_cli.race import registry
from kfcore_cli.race.course import Run, Snapshot, deviation, run
from kfcore_cli.race.interfaces import Data, Method, Problem, Settings
from kfcore_cli.race.options import Options
from kfcore_cli.race.progress import Board
from kfcore_cli.race.record import write_record
from kfcore_cli.race.table import show_table


@dataclass
class Entry:
    """One contender: what it is and what became of it."""

    method: str
    title: str
    backend: str
    settings: Settings
    result: Run
    deviation: float | None = None
    """Largest relative deviation of its weights from those of the first backend after the agreed step."""
    final_deviation: float | None = None
    """The same after the last step, if that is one for both."""


def race(options: Options, console: Console) -> list[Entry]:
    """Run every method on every backend, print the table, and write ``race.png`` and ``race.json``."""
    if importlib.util.find_spec("matplotlib") is None:
        raise missing("the picture of a race", "matplotlib", "pip install 'kfcore[cli]'")
    problem: Problem = registry.load("problems", options.problem)
    methods: dict[str, Method] = {name: registry.load("methods", name) for name in options.methods}
    backends: dict[str, Any] = {name: registry.load("backends", name) for name in options.backends}
    data = problem.load()
    options.out.mkdir(parents=True, exist_ok=True)
    steps = problem.steps if options.steps is None and options.seconds is None else options.steps
    console.print(_headline(options, problem, data, steps), highlight=False)

    entries = []
    initial = problem.network.init(options.seed)
    with Board(console, [(method.title, name) for method in methods.values() for name in backends]) as board:
        for method_name, method in methods.items():
            reference = None
            for backend_name, backend in backends.items():
                settings = settings_of(options.problem, problem, method_name, method)
                rule = method.rule(settings)
                result = run(
                    lambda backend=backend, rule=rule: backend.contender(problem.network, initial, rule, options.dtype),
                    problem,
                    data,
                    options.seed,
                    seconds=options.seconds,
                    steps=steps,
                    watch=board.watch(method.title, backend_name),
                )
                entry = Entry(method_name, method.title, backend_name, settings, result)
                reference = reference or entry
                if entry is not reference:
                    entry.deviation = _between(result.compared, reference.result.compared)
                    entry.final_deviation = _between(result.final, reference.result.final)
                entries.append(entry)

    show_table(console, problem, entries)
    # matplotlib takes a while to load: not before the race is run
    from kfcore_cli.race.picture import draw

    draw(options.out / "race.png", problem, entries)
    write_record(options.out / "race.json", options, problem, steps, backends, entries)
    console.print(f"[dim]{options.out / 'race.png'}, {options.out / 'race.json'}[/]", highlight=False, soft_wrap=True)
    return entries


def settings_of(problem_name: str, problem: Problem, method_name: str, method: Method) -> Settings:
    """Hyper-parameters: the problem's own for the method, else the method's own for the problem, else its default."""
    return problem.settings.get(method_name) or method.settings.get(problem_name) or method.default


def _between(own: Snapshot | None, reference: Snapshot | None) -> float | None:
    if own is None or reference is None or own[0] != reference[0]:
        return None
    return deviation(own[1], reference[1])


def _headline(options: Options, problem: Problem, data: Data, steps: int | None) -> str:
    measured = "" if data.probe is None else f" (loss of {len(data.probe):,})"
    length = f"{steps:,} steps" if steps is not None else f"{options.seconds:g} s of training"
    return (
        f"[bold]{problem.title}[/]  {len(data.train_x):,} train{measured}, {len(data.test_x):,} test, minibatches of {problem.batch_size}\n"
        f"[dim]{length} each, {options.dtype}, seed {options.seed}; same start and minibatches for all[/]"
    )
