"""A K-FAC step of this library and of kfac-jax, and the first step of both, against SGD: the same net and data, in one process.

kfac-jax 0.0.8 runs with JAX up to 0.9.1, so it needs an environment of its own:

    pip install 'kfac-jax==0.0.8' 'jax==0.9.1' 'jaxlib==0.9.1' optax && pip install --no-deps -e .
    python tests/benchmarks/against_kfac_jax.py [--quick]
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import pairwise

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import kfac_jax
import optax
from interleaved import BLOCK, line, measure, options, write

import kfcore as kf
import kfcore_jax

BATCH, RATE = 128, 1e-3


def initial(width: int) -> dict[str, dict[str, jax.Array]]:
    """A tanh network 64-n-n-10."""
    sizes, keys = (64, width, width, 10), jax.random.split(jax.random.key(0), 3)
    pairs = pairwise(sizes)
    return {
        f"l{i}": {"w": jax.random.normal(k, s) / s[0] ** 0.5, "b": jnp.zeros(s[1])}
        for i, (k, s) in enumerate(zip(keys, pairs, strict=True))
    }


def logits(params: dict[str, dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Outputs of the network."""
    h = jnp.tanh(x @ params["l0"]["w"] + params["l0"]["b"])
    h = jnp.tanh(h @ params["l1"]["w"] + params["l1"]["b"])
    return h @ params["l2"]["w"] + params["l2"]["b"]


def loss(params: dict[str, dict[str, jax.Array]], x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def registered(params: dict[str, dict[str, jax.Array]], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The same, with the loss named for kfac-jax."""
    x, y = batch
    z = logits(params, x)
    kfac_jax.register_softmax_cross_entropy_loss(z, y)
    return optax.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()


def sgd(width: int, x: jax.Array, y: jax.Array) -> Callable[[], None]:
    """The plain step."""
    optimizer, params = optax.sgd(RATE, momentum=0.9), initial(width)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    def run() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(step(params, state))

    return run


def ours(width: int, x: jax.Array, y: jax.Array) -> Callable[[], None]:
    """KFAC, empirical Fisher, factored damping."""
    params = initial(width)
    model = kfcore_jax.trace(loss, params, x, y)
    optimizer = kfcore_jax.optimizer(kf.KFAC(damping=1e-2, refresh_every=BLOCK), model, learning_rate=RATE, momentum=0.9)
    state = optimizer.init(params)

    def one(params, state):
        _, grads, records = model.value_grad_and_records(params, x, y)
        updates, state = optimizer.update(grads, state, params, records=records)
        return optax.apply_updates(params, updates), state

    step = jax.jit(one, donate_argnums=(0, 1))

    def run() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(step(params, state))

    return run


def theirs(width: int, x: jax.Array, y: jax.Array) -> Callable[[], None]:
    """kfac-jax with the same rules: fixed rate, momentum and damping, empirical Fisher, inverses every ten steps."""
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(registered),
        l2_reg=0.0,
        use_adaptive_learning_rate=False,
        use_adaptive_momentum=False,
        use_adaptive_damping=False,
        estimation_mode="fisher_empirical",
        inverse_update_period=BLOCK,
        num_burnin_steps=0,
        min_damping=1e-8,
        multi_device=False,
    )
    key, params = jax.random.PRNGKey(0), initial(width)
    state, count = optimizer.init(params, key, (x, y)), 0

    def run() -> None:
        nonlocal params, state, count
        params, state, _ = optimizer.step(
            params, state, key, batch=(x, y), global_step_int=count, learning_rate=RATE, momentum=0.9, damping=1e-2
        )
        count += 1
        jax.block_until_ready(params)

    return run


def main() -> None:
    arguments = options(__doc__)
    print(
        f"jax {jax.__version__}, kfac-jax {kfac_jax.__version__}, kfcore {kf.__version__}; medians of blocks of {BLOCK} steps, one thread"
    )
    result: dict[str, object] = {"jax": jax.__version__, "kfac-jax": kfac_jax.__version__, "kfcore": kf.__version__}
    for width, repetitions in ((128, 30), (1024, 10)):
        x = jax.random.normal(jax.random.key(1), (BATCH, 64))
        y = jax.random.randint(jax.random.key(2), (BATCH,), 0, 10)
        arms, first = {}, {}
        for make in (sgd, ours, theirs):
            start = time.perf_counter()
            arms[make.__name__] = make(width, x, y)
            arms[make.__name__]()
            first[make.__name__] = time.perf_counter() - start
            for _ in range(2 * BLOCK):
                arms[make.__name__]()
        rows = measure(arms, 5 if arguments.quick else repetitions)
        result[f"64-{width}-{width}-10"] = rows
        print(f"64-{width}-{width}-10, batch {BATCH}, float32")
        for name, row in rows.items():
            row["first_step_s"] = first[name]
            print(f"{line(name, row)}  set-up and first step {first[name]:.2f} s")
    write(arguments.out, result)


if __name__ == "__main__":
    main()
