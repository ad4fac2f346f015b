"""The layers that models are made of: which block every parameter gets, or why it has none; captured gradients are rebuilt."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import kfcore as kf
import kfcore_jax

N, S, D, V = 4, 3, 4, 7
LINEAR, BARE = kf.Linear(D, D, layout="io"), kf.Linear(D, D, None, layout="io")


def flax(make):
    """A module of Flax under the name ``net``, on inputs of this test."""

    def build(lib, x):
        linen = pytest.importorskip("flax.linen")
        module = make(linen)
        params = module.init(jax.random.key(0), x)["params"]
        return (lambda p, x: module.apply({"params": p["net"]}, x)), {"net": lib.moved(params)}

    return build


def arrays(net, **shapes):
    """A network written by hand."""
    return lambda lib, x: (net, {name: lib.normal(k, *shape) for k, (name, shape) in enumerate(shapes.items())})


def conv(axes, **options):
    """A convolution of Flax, and its layer."""
    made = kf.Conv(options.pop("ins", D), D, (3,) * axes, padding=1, layout="io", channels="last", **options)
    names = {"dilation": "kernel_dilation", "groups": "feature_group_count"}
    return flax(lambda nn: nn.Conv(D, (3,) * axes, padding=1, **{names[k]: v for k, v in options.items()})), {"net": made}


def transformed(lib, x):
    return arrays(lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "SAME"), w=(2, 2, D, D))(lib, x)


def grouped_query_attention(p, x):
    """Two heads of queries share one of keys and values; kernels have an axis for heads."""
    q = jnp.einsum("nsd,dgke->nsgke", x, p["q"])
    k, v = (jnp.einsum("nsd,dge->nsge", x, p[name]) for name in "kv")
    weights = jax.nn.softmax(jnp.einsum("nsgke,ntge->ngkst", q, k))
    return jnp.einsum("ngkst,ntge,gkeo->nso", weights, v, p["o"])


def equinox_lstm(lib, x):
    eqx = pytest.importorskip("equinox")
    params, static = eqx.partition(eqx.nn.LSTMCell(D, D, key=jax.random.key(0)), eqx.is_array)

    def net(p, x):
        def step(state, x):
            state = eqx.combine(p, static)(x, state)
            return state, state[0]

        return jax.vmap(lambda x: lax.scan(step, (jnp.zeros(D), jnp.zeros(D)), x)[1])(x)

    return net, lib.moved(params)


def attention(nn):
    return nn.MultiHeadDotProductAttention(2)


GATES = {f"net.cell.{a}{b}": LINEAR if a == "h" else BARE for a in "ih" for b in "ifgo"}
HEADS = {f"net.{name}": LINEAR for name in ("query", "key", "value", "out")}
LINES, IMAGES = (N, S, D), (N, 5, 5, D)
USED = {
    "linear": ((N, D), flax(lambda nn: nn.Dense(D)), {"net": LINEAR}, {}),
    "linear_on_sequences": (LINES, flax(lambda nn: nn.Dense(D)), {"net": LINEAR}, {}),
    "conv1d": ((N, 5, D), *conv(1), {}),
    "conv2d": (IMAGES, *conv(2), {}),
    "conv3d": ((N, 3, 3, 3, D), *conv(3), {}),
    "conv_dilation": (IMAGES, *conv(2, dilation=2), {}),
    "conv_groups": (IMAGES, *conv(2, groups=2), {}),
    "transposed_conv": (IMAGES, transformed, {"w": kf.Conv}, {}),
    "embedding": ("tokens", flax(lambda nn: nn.Embed(V, D)), {"net": kf.Embedding(V, D, padding=V)}, {}),
    "attention_as_framework_module": (LINES, flax(attention), HEADS, {}),
    "grouped_query_attention": (
        LINES,
        arrays(grouped_query_attention, q=(D, 2, 2, 3), k=(D, 2, 3), v=(D, 2, 3), o=(2, 2, 3, D)),
        {
            "q": kf.Linear(D, 12, None, layout="io"),
            **dict.fromkeys("kv", kf.Linear(D, 6, None, layout="io")),
            "o": kf.Linear(12, D, None, layout="io"),
        },
        {},
    ),
    "norm_layers": (LINES, flax(lambda nn: nn.LayerNorm()), {"net": kf.Norm(D)}, {}),
    "batch_norm_in_training": (
        LINES,
        arrays(lambda p, x: (x - x.mean((0, 1))) * (p["scale"] * lax.rsqrt(x.var((0, 1)))), scale=(D,)),
        {},
        {"scale": "with statistics of the whole batch"},
    ),
    "lstm": (LINES, flax(lambda nn: nn.RNN(nn.LSTMCell(D, param_dtype=float, dtype=float))), GATES, {}),
    "lstm_whose_kernels_are_joined": (
        LINES,
        flax(lambda nn: nn.RNN(nn.OptimizedLSTMCell(D, param_dtype=float, dtype=float))),
        {},
        dict.fromkeys(
            [f"net.cell.{a}{b}.kernel" for a in "ih" for b in "ifgo"] + [f"net.cell.h{b}.bias" for b in "ifgo"], "after concatenate"
        ),
    ),
    "lstm_of_equinox": (
        LINES,
        equinox_lstm,
        {"weight_ih": kf.Linear(D, 4 * D, None), "weight_hh": kf.Linear(D, 4 * D, None), "bias": kf.Norm(4 * D, bias=False)},
        {},
    ),
    "layer_called_twice": (LINES, arrays(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], w=(D, D)), {"w": BARE}, {}),
    "tied_embedding": (
        "tokens",
        arrays(lambda p, t: jnp.tanh(p["table"][t]) @ p["table"].T, table=(V, D)),
        {},
        {"table": "captured in a gather and in a product, but no curvature block covers both"},
    ),
    "tied_autoencoder": (
        LINES,
        arrays(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, w=(D, 2)),
        {},
        {"w": "different orientation"},
    ),
    "learned_positions": (LINES, arrays(lambda p, x: jnp.tanh(x + p["positions"]), positions=(S, D)), {"positions": kf.Norm}, {}),
    "positions_from_a_table": (
        LINES,
        arrays(lambda p, x: jnp.tanh(x + p["table"][jnp.arange(S)]), table=(V, D)),
        {},
        {"table": "add after gather of the same rows for every example"},
    ),
    "class_token": (
        LINES,
        arrays(lambda p, x: jnp.concatenate([jnp.broadcast_to(p["token"], (N, 1, D)), x], 1) ** 2, token=(D,)),
        {},
        {"token": "concatenate"},
    ),
    "layer_scale": (LINES, arrays(lambda p, x: x + p["scale"] * jnp.tanh(x), scale=(D,)), {"scale": kf.Norm(D, bias=False)}, {}),
    "weight_normalisation": (
        LINES,
        arrays(lambda p, x: x @ (p["v"] / jnp.linalg.norm(p["v"], axis=0)), v=(D, D)),
        {},
        {"v": "dot_general after"},
    ),
    "low_rank_adapter": (
        LINES,
        arrays(lambda p, x: x @ (p["a"] @ p["b"]) + (x @ p["c"]) @ p["d"], a=(D, 2), b=(2, D), c=(D, 2), d=(2, D)),
        {"c": kf.Linear(D, 2, None, layout="io"), "d": kf.Linear(2, D, None, layout="io")},
        {"a": "dot_general after dot_general", "b": "dot_general after dot_general"},
    ),
    "prelu": (LINES, flax(lambda nn: nn.PReLU()), {"net.negative_slope": kf.Norm(1, bias=False)}, {}),
}


@pytest.mark.parametrize("row", USED)
def test_blocks_and_reasons(lib, row):
    shape, build, layers, fallbacks = USED[row]
    x = jax.random.randint(jax.random.key(1), (N, S), 0, V) if shape == "tokens" else lib.normal(9, *shape)
    net, params = build(lib, x)
    model = kfcore_jax.trace(lambda p, x: jnp.mean(jnp.sin(net(p, x))), params, x)
    kinds = {name for name, layer in layers.items() if isinstance(layer, type)}
    assert {name: type(layer) if name in kinds else layer for name, layer in model.layers.items()} == layers
    report = kfcore_jax.optimizer(kf.KFAC(), model).report(params)
    assert {line.parameter for line in report.fallbacks()} == fallbacks.keys()
    for name, words in fallbacks.items():
        assert words in report[name].reason
    deviations = model.check_capture(params, x, rtol=1e-9) if layers else {}
    assert deviations.keys() >= layers.keys()


def test_a_layer_that_is_never_called_is_refused(lib):
    with pytest.raises(ValueError, match="ignores the parameter unused"):
        kfcore_jax.trace(lambda p, x: jnp.mean(x @ p["w"]), {"w": lib.normal(0, D, D), "unused": lib.normal(1, D)}, lib.normal(2, N, D))


def test_a_transformer_learns_and_only_its_positions_fall_back(lib):
    linen = pytest.importorskip("flax.linen")

    class Encoder(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(V, D, name="tokens")(tokens) + linen.Embed(S, D, name="positions")(jnp.arange(S))
            x = x + linen.MultiHeadDotProductAttention(2, name="attention")(linen.LayerNorm(name="first")(x))
            x = x + linen.Dense(D, name="down")(linen.gelu(linen.Dense(2 * D, name="up")(linen.LayerNorm(name="second")(x))))
            return linen.Dense(V, name="head")(linen.LayerNorm(name="last")(x))

    net, tokens = Encoder(), jnp.asarray(np.random.default_rng(0).integers(0, V, (16, S)))
    params = lib.moved(net.init(jax.random.key(0), tokens)["params"])

    def loss(p, t):
        return optax.losses.softmax_cross_entropy_with_integer_labels(net.apply({"params": p}, t), (3 * t + 1) % V).mean()

    model = kfcore_jax.trace(loss, params, tokens)
    optimizer = kfcore_jax.optimizer(kf.KFAC(damping=0.1, refresh_every=2), model, learning_rate=0.1)
    report = optimizer.report(params)
    assert [line.parameter for line in report.fallbacks()] == ["positions.embedding"]
    assert report["last.weight"].factors == (2 * D, 1)
    assert report["tokens.weight"].factors == (D, V)

    @jax.jit
    def step(params, state):
        value, grads, records = model.value_grad_and_records(params, tokens)
        updates, state = optimizer.update(grads, state, params, records=records)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(6):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]
    assert optimizer.diagnostics(state)["dropped_statistics"] == {}
