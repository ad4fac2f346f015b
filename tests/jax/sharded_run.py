"""Run by ``test_sharding.py`` in a process of its own, whose one CPU counts as four devices."""

import functools
import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import kfcore as kf
import kfcore_jax
from kfcore import patches

jax.config.update("jax_enable_x64", True)
patches.ROOM = 1  # patches are made in pieces, as those of large batches are
MESH = Mesh(np.array(jax.devices()), ("data",))
REPLICATED, SPLIT = PartitionSpec(), PartitionSpec("data")


def initial():
    rng = np.random.default_rng(0)
    dense = {"a": jnp.asarray(rng.normal(size=(4, 6)) / 2), "b": jnp.asarray(rng.normal(size=(6, 3)) / 2), "s": jnp.ones(3)}
    return dense | {"conv": {"kernel": jnp.asarray(rng.normal(size=(3, 2, 4)) / 2), "bias": jnp.zeros(4)}}


def network(params, x):
    conv = params["conv"]
    h = lax.conv_general_dilated(x, conv["kernel"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2)
    h = jnp.tanh(h + conv["bias"]).mean(1)
    return jnp.tanh(h @ params["a"]) @ params["b"] * params["s"]


def entropy(logits, y):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def loss(params, x, y):
    return entropy(network(params, x), y)


def data(step):
    rng = np.random.default_rng(step)
    return jnp.asarray(rng.normal(size=(32, 7, 4))), jnp.asarray(rng.integers(3, size=32))


MODEL = kfcore_jax.trace(loss, initial(), *data(0))
METHOD = kf.KFAC(damping=0.05, stats_every=2, refresh_every=3)


def make(**options):
    return kfcore_jax.optimizer(METHOD, MODEL, learning_rate=0.05, clip=1e-2, **options)


def modelled(**options):
    """A step by the quadratic model, whose collectives are in branches."""
    rule = kf.LevenbergMarquardt(0.5, every=2, search_every=3)
    return kfcore_jax.optimizer(kf.KFAC(damping=rule, refresh_every=3), MODEL, quadratic=kf.QuadraticModel(), **options)


def step(optimizer, average, params, state, x, y):
    _, grads, records = MODEL.value_grad_and_records(params, x, y)
    grads = average(grads)
    halves = {"predict": lambda p: network(p, x), "loss_fn": lambda z: entropy(z, y)}
    updates, state = optimizer.update(grads, state, params, records=records, **halves)
    return optax.apply_updates(params, updates), state


def run(function, optimizer, place):
    params = place(initial(), REPLICATED)
    state = place(optimizer.init(params), REPLICATED)
    for k in range(15):
        x, y = data(k)
        params, state = function(params, state, place(x, SPLIT), place(y, SPLIT))
    return np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(params)])


def main():
    def alone(optimizer):
        return run(jax.jit(functools.partial(step, optimizer, lambda grads: grads)), optimizer, lambda x, _: x)

    one, by_model = alone(make()), alone(modelled())

    def spread(tree, spec):
        return jax.device_put(tree, NamedSharding(MESH, spec))

    by_jit = run(jax.jit(functools.partial(step, make(), lambda grads: grads)), make(), spread)

    def mapped(optimizer, *, check):
        # with its checks on, shard_map sums the gradients of replicated parameters itself
        average = (lambda grads: jax.tree.map(lambda g: g / 4, grads)) if check else (lambda grads: jax.lax.pmean(grads, "data"))
        function = jax.shard_map(
            functools.partial(step, optimizer, average),
            mesh=MESH,
            in_specs=(REPLICATED, REPLICATED, SPLIT, SPLIT),
            out_specs=(REPLICATED, REPLICATED),
            check_vma=check,
        )
        return run(jax.jit(function), optimizer, spread)

    def gap(x, one=one):
        return float(np.abs(x - one).max() / np.abs(one).max())

    gaps = {
        "jit": gap(by_jit),
        "shard_map": gap(mapped(make(axis_name="data"), check=False)),
        "shard_map, checked": gap(mapped(make(axis_name="data"), check=True)),
        "quadratic model, checked": gap(mapped(modelled(axis_name="data"), check=True), by_model),
        "statistics not summed": gap(mapped(make(), check=False)),
    }
    print(json.dumps(gaps | {"devices": jax.device_count()}))


if __name__ == "__main__":
    main()
