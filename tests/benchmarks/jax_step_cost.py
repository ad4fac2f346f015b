"""Cost of an optimizer step against plain SGD in JAX: the same net and data, compiled steps, arms interleaved in one process, one thread.

A block is ten whole steps (forward, backward, update), so that every block holds one refresh. Ratios are taken within a repetition.
The first step of an arm, which traces and compiles, is timed apart.

    python tests/benchmarks/jax_step_cost.py [--quick] [--out FILE.json]

XLA is told to use one thread; ``taskset -c 0`` in front of the command pins that to a core.
"""

from __future__ import annotations

import os

# XLA and the libraries under it read these once, when they are loaded
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"

import platform
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from interleaved import BLOCK, line, measure, options, state, write

import kfcore as kf
import kfcore_jax

BATCH = 128
METHODS = {"kfac": kf.KFAC(damping=1e-2, refresh_every=BLOCK)}


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    outputs = x @ params[-1]["kernel"] + params[-1]["bias"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, y))


def arm(width: int, method: kf.Method | None) -> tuple[Callable[[], None], float, Callable[[], tuple[int, int]]]:
    """A function that makes one step, the seconds of its first, and a function of the measured and reported bytes of the state."""
    rng = np.random.default_rng(0)
    sizes = (64, width, width, 10)
    params = [
        {"kernel": jnp.asarray(rng.normal(size=(n, m)) / n**0.5, jnp.float32), "bias": jnp.zeros(m, jnp.float32)}
        for n, m in pairwise(sizes)
    ]
    x, y = jnp.asarray(rng.normal(size=(BATCH, 64)), jnp.float32), jnp.asarray(rng.integers(0, 10, BATCH), jnp.int32)
    start = time.perf_counter()
    if method is None:
        optimizer = optax.sgd(1e-3, momentum=0.9)
    else:
        model = kfcore_jax.trace(loss_fn, params, x, y, loss=kf.CrossEntropy(), strict=True)
        optimizer = kfcore_jax.optimizer(method, model, learning_rate=1e-3, momentum=0.9)

    def update(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        if method is None:
            updates, state = optimizer.update(jax.grad(loss_fn)(params, x, y), state)
        else:
            _, grads, records = model.value_grad_and_records(params, x, y)
            updates, state = optimizer.update(grads, state, params, records=records)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(update, donate_argnums=(0, 1))
    now = [params, optimizer.init(params)]

    def step() -> None:
        now[:] = jax.block_until_ready(compiled(*now, x, y))

    def size() -> tuple[int, int]:
        measured = sum(leaf.nbytes for leaf in jax.tree.leaves(now[1]))
        return measured, measured if method is None else optimizer.report(now[0]).bytes

    step()
    return step, time.perf_counter() - start, size


def race(width: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Rows of :func:`interleaved.measure` with the first step's seconds and the bytes of every arm's state."""
    arms = {"sgd": arm(width, None)} | {name: arm(width, method) for name, method in METHODS.items()}
    # with the first step this makes a block, so that those timed begin at a refresh
    for step, _, _ in arms.values():
        for _ in range(BLOCK - 1):
            step()
    rows = measure({name: step for name, (step, _, _) in arms.items()}, repetitions)
    for name, (_, first, size) in arms.items():
        rows[name]["first_step_s"] = first
        rows[name]["state_bytes"], rows[name]["reported_bytes"] = size()
    return rows


def main() -> None:
    arguments = options(__doc__)
    result: dict[str, object] = {"jax": jax.__version__, "machine": platform.machine(), "kfcore": kf.__version__}
    # a program of its own first, so that starting XLA is on nobody's clock
    jax.block_until_ready(jax.jit(jnp.tanh)(jnp.zeros(3)))
    for width, repetitions in ((128, 40), (512, 12), (1024, 12)):
        rows = race(width, 5 if arguments.quick else repetitions)
        result[f"64-{width}-{width}-10"] = rows
        print(f"64-{width}-{width}-10, batch {BATCH}, float32, one thread, statistics every step, refresh every {BLOCK}")
        for name, row in rows.items():
            print(f"{line(name, row)}  first step {row['first_step_s']:.2f} s{state(row)}")
    write(arguments.out, result)


if __name__ == "__main__":
    main()
