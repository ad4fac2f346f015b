"""EKFAC in JAX: the scales are second moments of the gradients of single examples, as autodiff gives them one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import kfcore as kf
import kfcore_jax

N, T, D, C = 9, 3, 4, 3
LOSS = kf.CrossEntropy()
NUMBERS = ("NWC", "WIO", "NWC")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def dense(p, x):
    return x @ p["w"] + p["b"]


def linear(seed, inp, out, *lead):
    return {"w": normal(seed, *lead, inp, out) / np.sqrt(inp), "b": 0.1 * normal(seed + 1, *lead, out)}


def flat_mlp(p, x):
    """Positions merged with the examples, as libraries do."""
    h = jnp.tanh(dense(p["one"], x.reshape(-1, D)))
    return dense(p["two"], h).reshape(*x.shape[:2], C)


def frames(p, x):
    """A convolution over several frames an example, merged with the examples; the same kernel in each of two places."""
    n, t, *image = x.shape
    x = x.reshape(n * t, *image)
    for _ in range(2):
        x = jnp.tanh(lax.conv_general_dilated(x, p["conv"]["w"], (1,), "SAME", dimension_numbers=NUMBERS) + p["conv"]["b"])
    return dense(p["out"], x.mean(1).reshape(n, t, -1).mean(1))


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-3) * p["scale"] + p["shift"]


def transformer(p, t):
    x = p["embedding"][t] + p["position"]
    q, k, v = (dense(p[n], norm(p["norm"], x)) for n in "qkv")
    x = x + jax.nn.softmax(q @ k.mT / 2.0) @ v
    return norm(p["last"], jnp.tanh(x)) @ p["head"]


def tied(p, x):
    """One weight at two places that see other numbers of positions."""
    h = jnp.tanh(dense(p["one"], x))
    return dense(p["two"], jnp.tanh(dense(p["one"], h.mean(1))))


def recurrent(p, x):
    """A dense and a convolutional weight used again at every step of time."""

    def step(h, x):
        h = jnp.tanh(dense(p["one"], h) + x[..., None, :])
        h = jnp.tanh(lax.conv_general_dilated(h, p["conv"]["w"], (1,), "SAME", dimension_numbers=NUMBERS))
        return h, None

    h, _ = lax.scan(step, jnp.ones((len(x), 2, D)), jnp.swapaxes(x, 0, 1))
    return dense(p["two"], h.mean(1))


def stacked(p, x):
    """Layers of a scan, each with its own weights, which see several positions."""
    h, _ = lax.scan(lambda h, q: (h + jnp.tanh(dense(q, h)), None), x, p["one"])
    return dense(p["two"], h)


def affine(seed):
    return {"scale": 1.0 + 0.3 * normal(seed, D), "shift": 0.3 * normal(seed + 1, D)}


NETS = {
    flat_mlp: {"one": linear(0, D, D), "two": linear(2, D, C)},
    frames: {"conv": {"w": normal(0, 3, D, D) / 3, "b": normal(1, D)}, "out": linear(2, D, C)},
    transformer: {
        "embedding": normal(0, 5, D),
        "position": normal(1, T, D),
        "norm": affine(2),
        "last": affine(4),
        "head": normal(6, D, C),
        **{n: linear(7 + 2 * i, D, D) for i, n in enumerate("qkv")},
    },
    tied: {"one": linear(0, D, D), "two": linear(2, D, C)},
    recurrent: {"one": linear(0, D, D), "conv": {"w": normal(4, 3, D, D) / 3}, "two": linear(2, D, C)},
    stacked: {"one": linear(0, D, D, 2), "two": linear(2, D, C)},
}


def initial(net):
    return jax.tree.map(jnp.asarray, NETS[net])


def batch(net, n=N, seed=20):
    rng = np.random.default_rng(seed)
    x = rng.integers(5, size=(n, T)) if net is transformer else rng.normal(size=(n, T, 5, D) if net is frames else (n, T, D))
    shape = jax.eval_shape(net, NETS[net], jnp.asarray(x)).shape[:-1]
    return jnp.asarray(x), jnp.asarray(rng.integers(C, size=shape))


def loss_of(net):
    return lambda p, x, y: optax.losses.softmax_cross_entropy_with_integer_labels(net(p, x), y).mean()


def gap(x, y):
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


def example_gradients(net, fisher, params, x, y):
    """Of the terms of every single example, or of all its Fisher vectors, ``[K N, ...]``."""
    if fisher == "exact":
        vectors = jnp.stack(list(kf.fisher_vectors("exact", LOSS, net(params, x), None)))

        def pulled(x, vector):
            return jax.vjp(lambda p: net(p, x[None]), params)[1](vector[None])[0]

        every = jax.vmap(jax.vmap(pulled), (None, 0))(x, vectors)
        return jax.tree.map(lambda g: g.reshape(-1, *g.shape[2:]), every)

    def one(x, y):
        return jax.grad(lambda p: y.size * loss_of(net)(p, x[None], y[None]))(params)

    return jax.vmap(one)(x, y)


def scales(optimizer, state):
    blocks = optimizer.core.of_state(state).preconditioner.blocks
    return {n: state.curvature.blocks[n].scales.values[0] for n, block in blocks.items() if block.method.name == "ekfac"}


@pytest.mark.parametrize(
    ("net", "fisher", "group"),
    [
        (flat_mlp, "empirical", False),
        (frames, "exact", False),
        (transformer, "exact", True),
        (tied, "empirical", False),
        (recurrent, "empirical", False),
        (stacked, "exact", True),
    ],
)
def test_scales_are_those_of_the_gradients_of_single_examples(net, fisher, group):
    params, (x, y) = initial(net), batch(net)
    method = kf.EKFAC(damping=0.1, fisher=fisher, refresh_every=10)
    model = kfcore_jax.trace(loss_of(net), params, x, y)
    optimizer = kfcore_jax.optimizer(method, model, group=group)
    assert not any("taken to lie" in reason for reason in model.layout.reasons.values())

    @jax.jit
    def run(params, x, y):
        _, grads, records = model.value_grad_and_records(params, x, y)
        if fisher == "exact":
            records = model.fisher_records(net, method, LOSS, params, x)
        state = optimizer.init(params)
        for _ in range(2):  # the first finds the basis, the second measures in it
            _, state = optimizer.update(grads, state, params, records=records)
        every = example_gradients(net, fisher, params, x, y)
        layout, core = optimizer.core.bind(params)
        return state, jax.vmap(lambda g: core.model.matrices(layout.flat(g)))(every)

    state, every = run(params, x, y)
    found = scales(optimizer, state)
    assert found.keys() == optimizer.core.bind(params)[1].preconditioner.blocks.keys() == every.keys()
    for name, s in found.items():
        solver, g = state.curvature.blocks[name].solver, np.asarray(every[name])
        sides = zip((solver.output_basis, solver.input_basis), s.shape[-2:], strict=True)
        left, right = (np.eye(n) if basis is None else np.asarray(basis) for basis, n in sides)
        expected = ((left.mT @ g @ right) ** 2).sum(0) / y.size
        assert float(state.curvature.blocks[name].scales.weight.min()) == 1.0
        assert np.abs(s - expected).max() <= 1e-12 * expected.max(), name
        assert expected.max() > 1e-8


@pytest.mark.parametrize("kind", ["average", "gradient"])
def test_a_batch_in_parts_is_the_whole_batch(kind):
    """Unequal micro-batches, whose uses are of other examples, and parts along a mapped axis."""
    params, (x, y) = initial(tied), batch(tied, 8)
    model = kfcore_jax.trace(loss_of(tied), params, x, y)
    method = kf.EKFAC(damping=0.1, refresh_every=2, scales=kind)
    plain, mapped = (kfcore_jax.optimizer(method, model, axis_name=name) for name in (None, "parts"))

    def three(optimizer, evaluate, *, wrap=lambda step: step):
        def step(p, state):
            grads, records = evaluate(p)
            updates, state = optimizer.update(grads, state, p, records=records)
            return optax.apply_updates(p, updates), state

        step, p, state = jax.jit(wrap(step)), params, plain.init(params)
        for _ in range(3):
            p, state = step(p, state)
        return p, scales(plain, state)

    def pieces(p):
        grads = model.value_grad_and_records(p, x, y)[1]
        parts = [model.value_grad_and_records(p, x[s], y[s])[2] for s in (slice(0, 2), slice(2, 5), slice(5, 8))]
        return grads, kfcore_jax.accumulate([kfcore_jax.accumulate(parts[:2]), parts[2]])

    def part(p):
        k = lax.axis_index("parts")
        own = (lax.dynamic_slice_in_dim(v, 4 * k, 4) for v in (x, y))
        _, grads, records = model.value_grad_and_records(p, *own)
        return lax.pmean(grads, "parts"), records

    def over_parts(step):
        one = jax.vmap(lambda _, p, state: step(p, state), (0, None, None), axis_name="parts")
        return lambda p, state: jax.tree.map(lambda v: v[1], one(jnp.zeros(2), p, state))

    whole = three(plain, lambda p: model.value_grad_and_records(p, x, y)[1:])
    assert gap(whole[0], params) > 1e-3
    assert gap(three(mapped, part, wrap=over_parts), whole) < 1e-11
    if kind == "average":
        assert gap(three(plain, pieces), whole) < 1e-11


def test_uses_with_other_examples_are_refused():
    params = {"w": jnp.asarray(normal(0, D, C))}
    x, z = jnp.asarray(normal(1, 6, D)), jnp.asarray(normal(2, 4, D))
    loss = lambda p, x, z: ((x @ p["w"]) ** 2).mean() + ((z @ p["w"]) ** 2).mean()  # noqa: E731
    model = kfcore_jax.trace(loss, params, x, z, loss=kf.MSE())

    def update(method):
        _, grads, records = model.value_grad_and_records(params, x, z)
        optimizer = kfcore_jax.optimizer(method, model)
        return optimizer.update(grads, optimizer.init(params), params, records=records)

    for method in (kf.KFAC(), kf.EKFAC(scales="gradient")):
        jax.eval_shape(lambda method=method: update(method))
    with pytest.raises(ValueError, match=r"must have the same examples in .* got (6 and 6, 4 and 4|4 and 4, 6 and 6)"):
        jax.eval_shape(lambda: update(kf.EKFAC()))


def test_a_layer_whose_examples_are_lost_says_so():
    """Behind a reversal of merged axes nothing tells examples from positions."""
    params, (x, y) = initial(flat_mlp), batch(flat_mlp)
    mixed = lambda p, x: flat_mlp(p, jnp.swapaxes(jnp.swapaxes(x, 0, 1).reshape(-1, D).reshape(T, -1, D), 0, 1))  # noqa: E731
    model = kfcore_jax.trace(loss_of(mixed), params, x, y)
    assert "examples taken to lie along the first axis" in str(model.layout.reasons)
