"""However a model is written, its dense layers are found, their records rebuild the gradient, and the rest falls back with a reason."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import kfcore_jax
from kfcore import Conv, Embedding, Linear, Norm

N = 8
oi, io = partial(Linear, layout="oi"), partial(Linear, layout="io")
bare_oi, bare_io = partial(oi, bias=None), partial(io, bias=None)


def normal(seed, *shape, dtype="float64"):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def mse(z, y):
    return jnp.mean((z - y) ** 2)


def data(inp=4, out=3):
    return normal(100, N, inp), normal(101, N, out)


def double(tree):
    """Parameters and states in float64, and away from the zeros and ones that libraries start with."""
    leaves, structure = jax.tree.flatten(tree)
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    moved = [x + 0.1 * normal(i, *x.shape) if f else x for i, (x, f) in enumerate(zip(leaves, floating, strict=True))]
    return jax.tree.unflatten(structure, moved)


def numbers(tree):
    """Leaves as NumPy arrays; ``None`` for gradients of integers."""
    return [None if x.dtype == jax.dtypes.float0 else np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def gap(x, y):
    return np.abs(np.asarray(x) - y).max() / max(np.abs(y).max(), 1e-300)


def close(trees, others, rtol):
    assert jax.tree.structure(trees) == jax.tree.structure(others)
    pairs = list(zip(numbers(trees), numbers(others), strict=True))
    scale = max(np.abs(y).max() for _, y in pairs if y is not None)
    for x, y in pairs:
        assert (x is None) == (y is None)
        assert x is None or np.abs(x - y).max() <= rtol * max(np.abs(y).max(), 1e-3 * scale)


def rebuilt(model, records, name):
    """Gradients of weight and bias that the records of a layer add up to, in the layout of the layer."""
    layer, pairs = model.layers[name], [tuple(np.asarray(v, np.float64) for v in pair) for pair in records.layers[name]]
    if isinstance(layer, Conv):
        sides = [(layer.output_rows(np, dy, np.float64), layer.input_rows(np, x, np.float64)) for x, dy in pairs]
        return layer.parameters_of({"": sum(np.swapaxes(g, -1, -2) @ a for g, a in sides)})
    if isinstance(layer, Norm):
        column = sum(layer.output_rows(np, dy, np.float64, x).sum(-2) for x, dy in pairs)
        return layer.parameters_of({"": column[..., None]})
    if isinstance(layer, Embedding):
        sides = [(layer.input_rows(np, x.astype(int), dy.dtype), layer.output_rows(np, dy, dy.dtype, x.astype(int))) for x, dy in pairs]
        return {"weight": sum(np.swapaxes(rows, -1, -2) @ dy for rows, dy in sides)}
    weight = sum(np.einsum("...nsi,...nsj->...ij", *(pair if layer.layout == "io" else pair[::-1])) for pair in pairs)
    return {"weight": weight, "bias": sum(dy.sum((-3, -2)) for _, dy in pairs)}


def capture(loss, params, *args, rtol=1e-9, **options):
    """The model of a loss, after its value, gradients and records were compared with autodiff."""
    model = kfcore_jax.trace(loss, params, *args, **options)
    value, grads, records = jax.jit(model.value_grad_and_records)(params, *args)
    plain = jax.jit(jax.value_and_grad(loss, has_aux=model.has_aux, allow_int=True))(params, *args)
    close((value, grads), plain, max(rtol, 1e-6))
    flat = model.layout.flat(grads)
    for name, layer in model.layers.items():
        for role in layer.parameters:
            if name not in model.layout.regularised:
                own = model.layout.model.roles(name)[role]
                assert gap(rebuilt(model, records, name)[role], np.asarray(flat[own], np.float64)) <= rtol, (name, role)
    assert model.check_capture(params, *args, rtol=rtol).keys() == model.layout.sites.keys() - model.layout.regularised
    return model


def assert_fallbacks(model, **reasons):
    """These parameters fall back and no other; each reason names what the parameter is used in."""
    assert model.layout.model.others.keys() == reasons.keys()
    for name, words in reasons.items():
        for word in [words] if isinstance(words, str) else words:
            assert word in model.layout.reasons[name], model.layout.reasons[name]


def uses(model):
    return {name: len(found) for name, found in model.layout.sites.items()}


# ---- products, written out


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-9), ("float32", 1e-4)])
def test_rows_times_matrix(dtype, rtol):
    def loss(p, x, y):
        return mse(jnp.tanh(x @ p["fc1"]["weight"] + p["fc1"]["bias"]) @ p["fc2"]["weight"], y)

    p = {"fc1": {"weight": normal(0, 4, 6), "bias": normal(1, 6)}, "fc2": {"weight": normal(2, 6, 3)}}
    model = capture(loss, *jax.tree.map(lambda x: x.astype(dtype), (p, *data())), rtol=rtol)
    assert model.layers == {"fc1": io(4, 6), "fc2": bare_io(6, 3)}
    assert_fallbacks(model)


def test_matrix_times_vector_under_vmap():
    def loss(p, x, y):
        def one(x, y):
            return mse(p["c"] @ jnp.tanh(p["a"] @ x + p["b"]), y)

        return jnp.mean(jax.vmap(one)(x, y))

    model = capture(loss, {"a": normal(0, 6, 4), "b": normal(1, 6), "c": normal(2, 3, 6)}, *data())
    assert model.layers == {"a": oi(4, 6), "c": bare_oi(6, 3)}
    assert_fallbacks(model)


def test_a_single_example_without_any_axis_of_rows():
    model = capture(lambda p, x, y: mse(p["w"] @ x + p["b"], y), {"w": normal(0, 3, 4), "b": normal(1, 3)}, *(a[0] for a in data()))
    assert model.layers == {"w": oi(4, 3)}


def test_a_weight_that_is_a_vector_has_one_output():
    model = capture(lambda p, x, y: mse(x @ p["w"], y[:, 0]), {"w": normal(0, 4)}, *data())
    assert {(layer.in_features, layer.out_features) for layer in model.layers.values()} == {(4, 1)}


def test_einsum_with_kernels_of_many_axes():
    def loss(p, x, y):
        heads = jnp.tanh(jnp.einsum("ni,ihk->nhk", x, p["split"]["kernel"]) + p["split"]["bias"])
        return mse(jnp.einsum("nhk,hko->no", heads, p["join"]["kernel"]) + p["join"]["bias"], y)

    p = {
        "split": {"kernel": normal(0, 4, 2, 5), "bias": normal(1, 2, 5)},
        "join": {"kernel": normal(2, 2, 5, 3), "bias": normal(3, 3)},
    }
    model = capture(loss, p, *data())
    assert model.layers == {"split": io(4, 10), "join": io(10, 3)}


def test_reshapes_and_transpositions_of_weight_output_and_bias():
    def loss(p, x, y):
        out = (x @ p["w"].reshape(4, 12)).reshape(N, 3, 4).transpose(0, 2, 1)
        return mse((out + p["b"].reshape(3, 4).T).sum(1), y)

    model = capture(loss, {"w": normal(0, 2, 2, 12), "b": normal(1, 12)}, *data())
    assert model.layers == {"w": io(4, 12)}
    assert_fallbacks(model)


def test_rows_with_positions_keep_the_example_first():
    def loss(p, x):
        return jnp.mean(jnp.tanh(jnp.einsum("nti,oi->nto", x, p["w"]) + p["b"]) ** 2)

    x = normal(5, N, 7, 4)
    model = capture(loss, {"w": normal(0, 6, 4), "b": normal(1, 6)}, x)
    assert model.layers == {"w": oi(4, 6)}
    (((inputs, grads),),) = model.value_grad_and_records({"w": normal(0, 6, 4), "b": normal(1, 6)}, x)[2].layers.values()
    assert inputs.shape == (N, 7, 4)
    assert grads.shape == (N, 7, 6)
    assert (np.asarray(inputs) == np.asarray(x)).all()


# ---- model libraries


def cross_entropy(z, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), labels[..., None], -1))


@pytest.fixture
def linen():
    return pytest.importorskip("flax.linen")


def test_linen_perceptron(linen):
    net, (x, y) = linen.Sequential([linen.Dense(6), linen.tanh, linen.Dense(3)]), data()
    model = capture(lambda p, x, y: mse(net.apply(p, x), y), double(net.init(jax.random.key(0), x)), x, y)
    assert model.layers == {"layers_0": io(4, 6), "layers_2": io(6, 3)}
    assert_fallbacks(model)


def test_linen_attention_block(linen):
    class Block(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(11, 8, name="embed")(tokens)
            x = x + linen.MultiHeadDotProductAttention(2, name="attention")(linen.LayerNorm(name="norm")(x))
            return linen.Dense(11, name="head")(x)

    net, tokens = Block(), jax.random.randint(jax.random.key(1), (N, 5), 0, 11)
    params = double(net.init(jax.random.key(0), tokens)["params"])
    model = capture(lambda p, t: cross_entropy(net.apply({"params": p}, t), t), params, tokens)
    projections = {f"attention.{name}": io(8, 8) for name in ("query", "value", "out")}
    # every query sees the bias of the keys alike, so softmax has no gradient there, and rounding is all there is to compare
    ends = {"embed": Embedding(11, 8, padding=11), "norm": Norm(8), "head": io(8, 11)}
    assert model.layers == projections | {"attention.key": io(8, 8)} | ends


def test_linen_convolution(linen):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Conv(5, (3, 3), name="conv")(x))
            return linen.Dense(3, name="head")(x.reshape(len(x), -1))

    net, images = Net(), normal(3, N, 6, 6, 2)
    params = double(net.init(jax.random.key(0), images)["params"])
    model = capture(lambda p, x, y: mse(net.apply({"params": p}, x), y), params, images, data()[1])
    conv = Conv(2, 5, (3, 3), padding=1, layout="io", channels="last")
    assert model.layers == {"conv": conv, "head": io(180, 3)}


def test_linen_batch_norm_with_a_state_that_comes_back(linen):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.BatchNorm(use_running_average=False, name="norm")(linen.Dense(6, use_bias=False, name="fc1")(x))
            return linen.Dense(3, name="fc2")(linen.relu(x))

    def loss(params, state, x, y):
        z, new = net.apply({"params": params, **state}, x, mutable=["batch_stats"])
        return mse(z, y), new

    net, (x, y) = Net(), data()
    variables = double(net.init(jax.random.key(0), x))
    state = {"batch_stats": variables["batch_stats"]}
    model = capture(loss, variables["params"], state, x, y, has_aux=True)
    assert model.layers == {"fc1": bare_io(4, 6), "fc2": io(6, 3)}
    assert_fallbacks(model, **{"norm.scale": "mul", "norm.bias": "add"})


def test_linen_dropout_takes_its_key_as_an_argument(linen):
    net = linen.Sequential([linen.Dense(6), linen.Dropout(0.5, deterministic=False), linen.Dense(3)])
    x, y = data()
    params = double(net.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x))
    key = jax.random.key(7)
    model = capture(lambda p, x, y, key: mse(net.apply(p, x, rngs={"dropout": key}), y), params, x, y, key)
    assert model.layers == {"layers_0": io(4, 6), "layers_2": io(6, 3)}


def test_linen_scan_over_checkpointed_layers_is_a_stack(linen):
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            h = linen.LayerNorm(name="norm")(x)
            h = linen.MultiHeadDotProductAttention(2, name="attention")(h)
            return x + linen.Dense(8, name="up")(jnp.tanh(h)), None

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            layers = linen.scan(linen.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return linen.Dense(3, name="head")(layers(name="layers")(x, None)[0].mean(1))

    net, x = Net(), normal(3, N, 5, 8)
    params = double(net.init(jax.random.key(0), x))
    model = capture(lambda p, x, y: mse(net.apply(p, x), y), params, x, data()[1])
    stacked = [f"layers.{name}" for name in ("attention.query", "attention.key", "attention.value", "attention.out", "up")]
    ends = {"layers.norm": Norm(8, stack=(3,)), "head": io(8, 3)}
    assert model.layers == {name: io(8, 8, stack=(3,)) for name in stacked} | ends


def test_linen_tied_head_falls_back(linen):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            embed = linen.Embed(11, 8, name="embed")
            return embed.attend(linen.Dense(8, name="fc")(embed(tokens)))

    net, tokens = Net(), jax.random.randint(jax.random.key(1), (N, 5), 0, 11)
    model = capture(lambda p, t: cross_entropy(net.apply(p, t), t), double(net.init(jax.random.key(0), tokens)), tokens)
    assert model.layers == {"fc": io(8, 8)}
    assert_fallbacks(model, **{"embed.embedding": "gather"})


def test_nnx_perceptron():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.b(jnp.tanh(self.a(x)))

    graph, params = nnx.split(Net(nnx.Rngs(0)))
    model = capture(lambda p, x, y: mse(nnx.merge(graph, p)(x), y), double(params), *data())
    assert model.layers == {"a": io(4, 6), "b": io(6, 3)}
    assert_fallbacks(model)


def test_equinox_perceptron_under_vmap():
    eqx = pytest.importorskip("equinox")
    params, static = eqx.partition(eqx.nn.MLP(4, 3, 6, 2, key=jax.random.key(0)), eqx.is_array)
    model = capture(lambda p, x, y: mse(jax.vmap(eqx.combine(p, static))(x), y), double(params), *data())
    assert model.layers == {"layers.0": oi(4, 6), "layers.1": oi(6, 6), "layers.2": oi(6, 3)}
    assert_fallbacks(model)


# ---- loops


def test_uses_of_a_recurrent_weight_are_positions():
    def loss(p, x):
        def cell(h, x):
            return jnp.tanh(h @ p["w"] + (x @ p["u"] + p["b"])), None

        return jnp.mean(lax.scan(cell, jnp.zeros((N, 6)), x)[0] ** 2)

    params, x = {"w": normal(0, 6, 6), "u": normal(1, 4, 6), "b": normal(2, 6)}, normal(3, 5, N, 4)
    model = capture(loss, params, x)
    assert model.layers == {"w": bare_io(6, 6), "u": io(4, 6)}
    _, _, records = model.value_grad_and_records(params, x)
    assert records.layers["w"][0][1].shape == (N, 5, 6)
    assert gap(records.layers["u"][0][0], np.swapaxes(np.asarray(x), 0, 1)) == 0


@pytest.mark.parametrize("reverse", [False, True])
def test_a_stack_of_recurrent_layers(reverse):
    def loss(p, x):
        def layer(x, p):
            def cell(h, x):
                h = jnp.tanh(h @ p["w"] + p["b"] + x)
                return h, h

            return lax.scan(cell, jnp.zeros((N, 4)), x, reverse=reverse)[1], None

        return jnp.mean(lax.scan(layer, x, p)[0] ** 2)

    params, x = {"w": normal(0, 3, 4, 4), "b": normal(1, 3, 4)}, normal(3, 5, N, 4)
    model = capture(loss, params, x)
    assert model.layers == {"w": io(4, 4, stack=(3,))}
    assert model.value_grad_and_records(params, x)[2].layers["w"][0][0].shape == (3, N, 5, 4)


def test_scans_within_scans_over_weights():
    def loss(p, x, y):
        def inner(x, p):
            return jnp.tanh(p["w"] @ x + p["b"][:, None]), None

        return mse(lax.scan(lambda x, p: lax.scan(inner, x, p), x.T, p)[0].T[:, :3], y)

    model = capture(loss, {"w": normal(0, 2, 3, 4, 4), "b": normal(1, 2, 3, 4)}, *data())
    assert model.layers == {"w": oi(4, 4, stack=(2, 3))}


def test_a_loop_over_one_axis_of_a_weight_seen_in_another_order():
    def loss(p, x, y):
        return mse(lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"].transpose(2, 0, 1))[0][:, :3], y)

    model = capture(loss, {"w": normal(0, 4, 4, 5)}, *data())
    assert model.layers == {"w": bare_io(4, 4, stack=(5,))}


def test_one_weight_repeated_for_a_loop_falls_back():
    def loss(p, x, y):
        repeated = jnp.broadcast_to(p["w"], (5, 4, 4))
        return mse(lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, repeated)[0][:, :3], y)

    assert_fallbacks(capture(loss, {"w": normal(0, 4, 4)}, *data()), w="dot_general")


def test_a_weight_in_the_carry_of_a_loop_falls_back():
    def loss(p, x, y):
        (h, _), _ = lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), 1.0 * c[1]), None), (x, p["w"]), None, length=3)
        return mse(h[:, :3], y)

    assert_fallbacks(capture(loss, {"w": normal(0, 4, 4)}, *data()), w="dot_general")


def test_a_first_state_that_is_learned_falls_back():
    def loss(p, x, y):
        h, _ = lax.scan(lambda h, _: (jnp.tanh(h @ p["w"] + x), None), jnp.broadcast_to(p["h"], (N, 4)), None, length=3)
        return mse(h[:, :3], y)

    model = capture(loss, {"w": normal(0, 4, 4), "h": normal(1, 4)}, *data())
    assert model.layers == {"w": bare_io(4, 4)}
    assert_fallbacks(model, h="scan carry")


def test_a_parameter_that_comes_out_of_a_loop_where_the_batch_went_in_falls_back():
    def loss(p, x, y):
        h, _ = lax.scan(lambda h, _: (p["w"], jnp.sum(h)), x, None, length=2)
        return mse(h[:, :3] * x[:, :3], y) + mse(x @ p["w"].T @ p["v"], y)

    model = capture(loss, {"w": normal(0, N, 4), "v": normal(1, N, 3)}, *data())
    assert model.layers == {"v": bare_io(N, 3)}
    assert_fallbacks(model, w="scan carry")


def test_members_of_an_ensemble_that_share_inputs_are_one_wide_layer():
    def loss(p, x, y):
        def member(p):
            return mse(x @ p["w"] + p["b"], y)

        return jnp.mean(jax.vmap(member)(p))

    model = capture(loss, {"w": normal(0, 5, 4, 3), "b": normal(1, 5, 3)}, *data())
    assert model.layers == {"w": io(4, 15)}


def test_members_of_an_ensemble_with_their_own_inputs_are_a_stack():
    def loss(p, x, y):
        def member(p, x):
            return mse(jnp.tanh(x @ p["a"] + p["b"]) @ p["c"], y)

        return jnp.mean(jax.vmap(member)(p, x))

    params = {"a": normal(0, 5, 4, 6), "b": normal(1, 5, 6), "c": normal(2, 5, 6, 3)}
    model = capture(loss, params, normal(3, 5, N, 4), data()[1])
    assert model.layers == {"a": io(4, 6, stack=(5,)), "c": bare_io(6, 3, stack=(5,))}


def test_a_loop_over_ensembles():
    def loss(p, x):
        def layer(x, p):
            return jnp.tanh(jnp.einsum("eni,eoi->eno", x, p["w"]) + p["b"][:, None]), None

        return jnp.mean(lax.scan(layer, x, p)[0] ** 2)

    model = capture(loss, {"w": normal(0, 2, 5, 4, 4), "b": normal(1, 2, 5, 4)}, normal(3, 5, N, 4))
    assert model.layers == {"w": oi(4, 4, stack=(2, 5))}


# ---- what surrounds a product


def dense_loss(product):
    """A loss with one layer, whose product is a function of ``(x, w, b)``."""
    return lambda p, x, y: mse(jnp.tanh(product(x, p["w"], p["b"])), y)


def one_layer(dtype="float64"):
    return {"w": normal(0, 4, 3, dtype=dtype), "b": normal(1, 3, dtype=dtype)}


def affine(x, w, b):
    return x @ w + b


def half(x, w, b):
    return affine(*(v.astype(jnp.bfloat16) for v in (x, w, b))).astype(x.dtype)


def half_with_wide_sums(x, w, b):
    return jnp.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32) + b.astype(jnp.float32)


POLICIES = {"none": None, "dots": jax.checkpoint_policies.dots_saveable, "nothing": jax.checkpoint_policies.nothing_saveable}
WRAPPERS = {
    "jit": jax.jit(affine),
    "jit_twice": jax.jit(lambda x, w, b: jax.jit(affine)(x, w, b)),
    "product_in_jit": lambda x, w, b: jax.jit(jnp.matmul)(x, w) + b,
    "bias_in_jit": lambda x, w, b: jax.jit(jnp.add)(x @ w, b),
    "named": lambda x, w, b: checkpoint_name(x @ w, "z") + b,
    "bias_first": lambda x, w, b: b + x @ w,
    "bias_with_a_unit_axis": lambda x, w, b: x @ w + b[None],
} | {f"remat_{name}": jax.checkpoint(affine, policy=policy) for name, policy in POLICIES.items()}


@pytest.mark.parametrize("product", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_change_nothing(product):
    model = capture(dense_loss(product), one_layer(), *data())
    assert model.layers == {"w": io(4, 3)}
    assert_fallbacks(model)


@pytest.mark.parametrize("product", [half, half_with_wide_sums])
def test_casts_inside_the_loss(product):
    model = capture(dense_loss(product), one_layer("float32"), *(v.astype("float32") for v in data()), rtol=2e-2)
    assert model.layers == {"w": io(4, 3)}


@jax.custom_jvp
def doubling(x, w, b):
    return x @ w + b


@doubling.defjvp
def doubling_rule(primals, tangents):
    x, w, b = primals
    dx, dw, db = tangents
    return doubling(x, w, b), x @ (2 * dw) + 2 * db + dx @ w


def test_a_rule_around_a_product_is_kept_and_its_outputs_are_tapped():
    loss, params, (x, y) = dense_loss(doubling), one_layer(), data()
    model = kfcore_jax.trace(loss, params, x, y)
    value, grads, records = jax.jit(model.value_grad_and_records)(params, x, y)
    close((value, grads), jax.value_and_grad(loss)(params, x, y), 1e-12)
    ((inputs, tap),) = records.layers["w"]
    true = jax.grad(lambda z: mse(jnp.tanh(z), y))(affine(x, **params))
    assert gap(tap[:, 0], true) <= 1e-12
    assert gap(inputs[:, 0], x) == 0
    with pytest.raises(AssertionError, match=r"w \(5\.0e-01\)"):
        model.check_capture(params, x, y)


def test_the_rule_of_relu_at_zero_is_kept():
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    model = capture(lambda p, x, y: mse(jax.nn.relu(affine(x, **p)), y), params, *data())
    assert not np.asarray(model.value_grad_and_records(params, *data())[1]["w"]).any()


def test_derivatives_inside_the_loss():
    def loss(p, x, y):
        def net(x):
            return jnp.sum(jnp.tanh(affine(x, p["w"], p["b"])))

        return jnp.mean(jax.vmap(jax.grad(net))(x) ** 2) + mse(affine(x, p["w"], p["b"]), y)

    model = capture(loss, one_layer(), *data())
    assert_fallbacks(model, w=["different orientation", "takes derivatives"], b="whose weight has no layer")


def test_integer_leaves_are_no_parameters():
    def loss(p, x, y):
        return mse(affine(x, p["w"], p["b"]) * (p["count"] + 1), y)

    params = {"count": jnp.asarray(2), **one_layer()}
    model = capture(loss, params, *data())
    assert model.layers == {"w": io(4, 3)}
    assert_fallbacks(model)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"])
def test_a_batch_that_the_loss_closes_over(wrap):
    x, y = data()

    def loss(p):
        return wrap(lambda p: mse(affine(x, **p), y))(p)

    model = capture(loss, one_layer())
    assert model.layers == {"w": io(4, 3)}
    assert_fallbacks(model)


def test_an_argument_that_no_parameter_meets_is_no_batch():
    x, y = data()
    model = capture(lambda p, unrelated: mse(affine(x, **p), y) + jnp.sum(unrelated), one_layer(), jnp.ones(3))
    assert model.layers == {"w": io(4, 3)}


def test_a_batch_inside_a_loop_that_the_loss_closes_over():
    x, y = data(4, 4)

    def loss(p):
        return mse(lax.scan(lambda h, _: (jnp.tanh(h @ p["w"] + x), None), jnp.zeros((N, 4)), None, length=3)[0], y)

    assert capture(loss, {"w": normal(0, 4, 4)}).layers == {"w": bare_io(4, 4)}


def test_another_batch_size_needs_no_new_trace():
    loss, params, (x, y) = dense_loss(affine), one_layer(), data()
    model = kfcore_jax.trace(loss, params, x, y)
    assert model.check_capture(params, x[:5], y[:5], rtol=1e-9).keys() == {"w"}


# ---- fallbacks


@jax.custom_vjp
def opaque(x, w):
    return x @ w


opaque.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, 2 * r[0].T @ g))


def last(x, p):
    """A loop without a fixed length: it has no gradient for what goes round, but one for what comes after."""
    frozen = lax.stop_gradient(p["w"])
    factor = lax.while_loop(lambda k: k < jnp.sum(lax.stop_gradient(x)), lambda k: k + jnp.sum(frozen**2) + 1.0, 0.0)
    return factor * x


FALLBACKS = {
    "custom_vjp": ("custom_vjp_call", lambda x, p: opaque(x, p["w"])),
    "cond": ("cond", lambda x, p: lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: -x @ p["w"])),
    "while": ("while", last),
    "normalised": ("dot_general after mul, reduce_sum, sqrt, div", lambda x, p: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0))),
    "divided_by_its_norm": ("div", lambda x, p: x @ p["w"] / jnp.linalg.norm(p["w"])),
    "lora": ("dot_general", lambda x, p: x @ (p["w"] @ p["w"])),
    "times_a_constant": ("dot_general", lambda x, p: x @ (p["w"] @ jnp.eye(4))),
    "slice": ("dot_general", lambda x, p: x @ p["w"][:, :3]),
    "stopped": ("dot_general", lambda x, p: x @ lax.stop_gradient(p["w"]) + x @ p["w"]),
    "masked_by_the_batch": ("mul", lambda x, p: x @ (p["w"] * x[:4])),
    "complex": ("dot_general", lambda x, p: jnp.real(jnp.fft.fft(x) @ p["w"])),
    "tied_transposed": ("different orientation", lambda x, p: jnp.tanh(x @ p["w"]) @ p["w"].T),
    "also_scaled": ("also used in mul", lambda x, p: x @ p["w"] * p["w"][0]),
}


@pytest.mark.parametrize(("word", "net"), FALLBACKS.values(), ids=FALLBACKS)
def test_other_uses_fall_back_with_a_reason(word, net):
    def loss(p, x, y):
        return mse(net(jnp.tanh(x @ p["first"]), p)[:, :3], y)

    model = capture(loss, {"first": normal(0, 4, 4), "w": normal(1, 4, 4)}, *data())
    assert model.layers == {"first": bare_io(4, 4)}
    assert_fallbacks(model, w=word)


def test_low_rank_updates_fall_back_and_their_base_is_a_layer():
    def loss(p, x, y):
        return mse(x @ p["w"] + x @ (p["a"] @ p["c"]), y)

    model = capture(loss, {"w": normal(0, 4, 3), "a": normal(1, 4, 2), "c": normal(2, 2, 3)}, *data())
    assert model.layers == {"w": bare_io(4, 3)}
    assert_fallbacks(model, a="dot_general", c="dot_general")


def test_a_term_that_does_not_see_the_batch_makes_no_layer():
    projection = normal(3, 3, 2)

    def loss(p, x, y):
        return mse(affine(x, p["w"], p["b"]), y) + jnp.sum((p["v"] @ projection) ** 2)

    model = capture(loss, one_layer() | {"v": normal(2, 5, 3)}, *data())
    assert model.layers == {"w": io(4, 3)}
    assert_fallbacks(model, v="does not see the batch")


@pytest.mark.parametrize("penalty", [lambda w: jnp.sum(w**2), lambda w: -jnp.sum(w @ w.T)])
def test_a_penalty_keeps_the_layer_and_is_no_part_of_its_records(penalty):
    def loss(p, x, y):
        return mse(affine(x, **p), y) + 0.1 * penalty(p["w"])

    params, (x, y) = one_layer(), data()
    model = capture(loss, params, x, y)
    assert model.layers == {"w": io(4, 3)}
    assert model.layout.regularised == {"w"}
    found = rebuilt(model, model.value_grad_and_records(params, x, y)[2], "w")
    without = jax.grad(lambda p: mse(affine(x, **p), y))(params)
    assert gap(found["weight"], without["w"]) <= 1e-9
    assert gap(found["bias"], without["b"]) <= 1e-9


def test_a_penalty_of_a_bias_leaves_its_layer_out_of_the_check():
    model = capture(lambda p, x, y: mse(affine(x, **p), y) + jnp.sum(p["b"] ** 2), one_layer(), *data())
    assert model.layers == {"w": io(4, 3)}
    assert model.layout.regularised == {"w"}


# ---- weights used twice, and biases


def test_a_weight_used_twice_is_one_layer_with_two_records():
    def loss(p, x, y):
        h = affine(jnp.tanh(affine(x, p["w"], p["b"])), p["w"], p["b"])
        return mse(h[:, :3], y)

    model = capture(loss, {"w": normal(0, 4, 4), "b": normal(1, 4)}, *data())
    assert model.layers == {"w": io(4, 4)}
    assert uses(model) == {"w": 2}
    assert "used 2 times" in model.layout.reasons["w.weight"]


def test_a_bias_at_one_of_two_uses_falls_back():
    def loss(p, x, y):
        return mse((jnp.tanh(affine(x, p["w"], p["b"])) @ p["w"])[:, :3], y)

    model = capture(loss, {"w": normal(0, 4, 4), "b": normal(1, 4)}, *data())
    assert model.layers == {"w": bare_io(4, 4)}
    assert uses(model) == {"w": 2}
    assert_fallbacks(model, b="bias")


SHARED = {
    "added_twice": ("more than one layer", lambda x, p: jnp.tanh(x @ p["w"] + p["b"]) + jnp.tanh(x @ p["u"] + p["b"])),
    "used_elsewhere": ("elsewhere", lambda x, p: jnp.tanh(x @ p["w"] + p["b"]) * p["b"] + x @ p["u"]),
    "subtracted": ("sub", lambda x, p: x @ p["w"] - p["b"] + x @ p["u"]),
    "along_the_rows": ("add", lambda x, p: x[:4] @ p["w"] + p["b"][:, None] + x[:4] @ p["u"]),
    "backwards": ("add", lambda x, p: x @ p["w"] + p["b"][::-1] + x @ p["u"]),
}


@pytest.mark.parametrize(("word", "net"), SHARED.values(), ids=SHARED)
def test_a_vector_that_is_not_the_bias_of_one_layer_falls_back(word, net):
    model = capture(lambda p, x: jnp.mean(net(x, p) ** 2), {"w": normal(0, 4, 4), "u": normal(1, 4, 4), "b": normal(2, 4)}, data()[0])
    assert model.layers == {"w": bare_io(4, 4), "u": bare_io(4, 4)}
    assert_fallbacks(model, b=word)


APART = {
    "added_to_a_sum": lambda x, p: x @ p["w"] + x @ p["u"] + p["b"],
    "of_an_output_used_elsewhere": lambda x, p: (z := x @ p["w"]) * jnp.tanh(z + p["b"]) + x @ p["u"],
    "of_a_scaled_output": lambda x, p: 2 * (x @ p["w"]) + p["b"] + x @ p["u"],
    "in_another_order": lambda x, p: (x @ p["w"]).reshape(-1, 2, 2) + p["b"].reshape(2, 2).T + (x @ p["u"]).reshape(-1, 2, 2),
}


@pytest.mark.parametrize("net", APART.values(), ids=APART)
def test_a_vector_that_is_the_bias_of_no_layer_is_a_shift(net):
    model = capture(lambda p, x: jnp.mean(net(x, p) ** 2), {"w": normal(0, 4, 4), "u": normal(1, 4, 4), "b": normal(2, 4)}, data()[0])
    assert model.layers == {"w": bare_io(4, 4), "u": bare_io(4, 4), "b": Norm(4, bias=False)}


def test_a_second_bias_is_a_shift():
    def loss(p, x, y):
        return mse(affine(x, p["w"], p["b"]) + p["c"], y)

    model = capture(loss, one_layer() | {"c": normal(2, 3)}, *data())
    assert model.layers == {"w": io(4, 3), "c": Norm(3, bias=False)}


def test_an_output_used_twice_after_its_bias_has_a_bias():
    def loss(p, x, y):
        z = affine(x, **p)
        return mse(z * jnp.tanh(z), y)

    assert capture(loss, one_layer(), *data()).layers == {"w": io(4, 3)}


def test_a_bias_of_every_position_is_a_shift():
    def loss(p, x):
        return jnp.mean(jnp.tanh(x @ p["w"] + p["positions"]) ** 2)

    model = capture(loss, {"w": normal(0, 4, 6), "positions": normal(1, 5, 6)}, normal(2, N, 5, 4))
    assert model.layers == {"w": bare_io(4, 6), "positions": Norm((5, 6), bias=False)}


def test_a_bias_under_a_rule_of_its_own_falls_back():
    @jax.custom_jvp
    def add(z, b):
        return z + b

    add.defjvp(lambda primals, tangents: (add(*primals), tangents[0] + 3 * tangents[1]))
    model = capture(dense_loss(lambda x, w, b: add(x @ w, b)), one_layer(), *data())
    assert model.layers == {"w": bare_io(4, 3)}
    assert_fallbacks(model, b="custom_jvp_call")


def test_a_bias_can_be_kept_apart():
    model = capture(dense_loss(affine), one_layer(), *data(), bias="separate")
    assert model.layers == {"w": io(4, 3, bias="separate")}


# ---- names


def test_names_are_paths_without_a_last_key_that_says_weight():
    def loss(p, x, y):
        pair = x @ p["pair"]["w"] + x @ p["pair"]["W"]
        return mse(pair + x @ p["lone"]["kernel"] + p["lone"]["bias"] + x @ p["list"][0] + x @ p["list"][1], y)

    p = {"pair": {"w": normal(0, 4, 3), "W": normal(1, 4, 3)}, "lone": {"kernel": normal(2, 4, 3), "bias": normal(3, 3)}}
    model = capture(loss, p | {"list": [normal(4, 4, 3), normal(5, 4, 3)]}, *data())
    dense = dict.fromkeys(["pair.w", "pair.W", "lone", "list.0", "list.1"], bare_io(4, 3))
    assert model.layers == dense | {"lone.bias": Norm(3, bias=False)}


def test_a_parameter_that_is_the_whole_tree():
    assert capture(lambda w, x, y: mse(x @ w, y), normal(0, 4, 3), *data()).layers == {"parameter": bare_io(4, 3)}


@pytest.mark.parametrize(("prefix", "name"), [(None, "fc"), ("", "params.fc"), ("params.fc", "kernel")])
def test_a_prefix_is_left_out(prefix, name):
    params = {"params": {"fc": {"kernel": normal(0, 4, 3)}}}
    model = capture(lambda p, x, y: mse(x @ p["params"]["fc"]["kernel"], y), params, *data(), prefix=prefix)
    assert model.layers == {name: bare_io(4, 3)}


# ---- layers named by hand


def tapped(x, w, b, layout="io"):
    z = opaque(x, w if layout == "io" else w.T) + b
    return kfcore_jax.tap(z, x, w, b, name="mine", layout=layout)


@jax.custom_vjp
def right(x, w):
    return x @ w


right.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def by_hand(x, w, b):
    return kfcore_jax.tap(right(x, w) + b, x, w, b, name="mine")


def by_hand_oi(x, w, b):
    return kfcore_jax.tap(right(x, w.T) + b, x, w, b, name="mine", layout="oi")


def over_examples(x, w, b):
    return jax.vmap(lambda x: by_hand(x[None], w, b)[0])(x)


@pytest.mark.parametrize("product", [by_hand, over_examples, jax.jit(by_hand), jax.checkpoint(by_hand)])
def test_a_tap_makes_a_layer_of_a_product_that_is_hidden(product):
    params = one_layer()
    assert_fallbacks(capture(dense_loss(lambda x, w, b: right(x, w) + b), params, *data()), w="custom_vjp_call")
    model = capture(dense_loss(product), params, *data())
    assert model.layers == {"mine": io(4, 3)}
    assert_fallbacks(model)


def test_a_tap_of_a_weight_out_by_in():
    params = {"w": normal(0, 3, 4), "b": normal(1, 3)}
    assert capture(dense_loss(by_hand_oi), params, *data()).layers == {"mine": oi(4, 3)}


def test_a_tap_in_a_loop_over_layers():
    def loss(p, x, y):
        return mse(lax.scan(lambda x, p: (jnp.tanh(by_hand(x, p["w"], p["b"])), None), x, p)[0][:, :3], y)

    model = capture(loss, {"w": normal(0, 5, 4, 4), "b": normal(1, 5, 4)}, *data())
    assert model.layers == {"mine": io(4, 4, stack=(5,))}


def test_a_tap_gives_its_outputs_and_their_derivatives():
    x, params = data()[0], one_layer()
    args = (x, params["w"], params["b"])
    close(by_hand(*args), affine(*args), 0)
    close(jax.jit(by_hand)(*args), affine(*args), 1e-15)
    close(
        jax.grad(lambda *a: jnp.sum(by_hand(*a) ** 2), (0, 1, 2))(*args),
        jax.grad(lambda *a: jnp.sum(affine(*a) ** 2), (0, 1, 2))(*args),
        1e-12,
    )


def test_a_tap_that_tells_what_is_not_computed_is_caught():
    wrong_gradient = dense_loss(lambda x, w, b: kfcore_jax.tap(opaque(x, w) + b, x, w, b, name="mine"))
    wrong_inputs = dense_loss(lambda x, w, b: kfcore_jax.tap(right(x, w) + b, 1.01 * x, w, b, name="mine"))
    for loss in (wrong_gradient, wrong_inputs):
        model = kfcore_jax.trace(loss, one_layer(), *data())
        with pytest.raises(AssertionError, match="mine"):
            model.check_capture(one_layer(), *data())


def test_a_tap_that_tells_a_wrong_bias_is_caught():
    loss = dense_loss(lambda x, w, b: kfcore_jax.tap(right(x, w) + 2 * b, x, w, b, name="mine"))
    with pytest.raises(AssertionError, match="mine"):
        kfcore_jax.trace(loss, one_layer(), *data()).check_capture(one_layer(), *data())


WRONG_TAPS = {
    "layout": ({"layout": "xy"}, "`layout`"),
    "weight": ({"weight": jnp.zeros((3, 5))}, "`weight` must have shape"),
    "inputs": ({"inputs": jnp.zeros((2, 4))}, "`inputs` and `outputs`"),
    "bias": ({"bias": jnp.zeros(4)}, "`bias`"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_TAPS.values(), ids=WRONG_TAPS)
def test_a_tap_of_wrong_shapes_is_refused(change, message):
    right_call = {"outputs": jnp.zeros((5, 3)), "inputs": jnp.zeros((5, 4)), "weight": jnp.zeros((4, 3)), "name": "mine"}
    with pytest.raises(ValueError, match=message):
        kfcore_jax.tap(**(right_call | change))


def test_a_tap_whose_weight_is_no_parameter_is_refused():
    loss = dense_loss(lambda x, w, b: by_hand(x, 2 * w, b))
    with pytest.raises(ValueError, match="tap 'mine': `weight`"):
        kfcore_jax.trace(loss, one_layer(), *data())


def test_a_tap_over_an_ensemble_is_refused():
    def loss(p, x):
        return jnp.mean(jax.vmap(by_hand, (None, 0, 0))(x, p["w"], p["b"]) ** 2)

    with pytest.raises(NotImplementedError, match="tap 'mine'"):
        kfcore_jax.trace(loss, {"w": normal(0, 5, 4, 3), "b": normal(1, 5, 3)}, data()[0])


# ---- the checks themselves, and wrong calls


@pytest.mark.parametrize("part", [0, 1], ids=["inputs", "output_grads"])
def test_an_error_of_one_percent_in_a_record_is_caught(part, monkeypatch):
    model = capture(dense_loss(affine), one_layer(), *data())
    whole = model.capture

    def off(*args):
        value, grads, records = whole(*args)
        ((inputs, dy),) = records.layers["w"]
        records.layers["w"] = [(1.01 * inputs, dy) if part == 0 else (inputs, 1.01 * dy)]
        return value, grads, records

    monkeypatch.setattr(model, "capture", off)
    with pytest.raises(AssertionError, match=r"differ from autodiff's in w \(1\.0e-02\)"):
        model.check_capture(one_layer(), *data())
    assert 0.0099 < model.check_capture(one_layer(), *data(), rtol=0.02)["w"] < 0.0101


def test_a_loss_must_be_a_scalar():
    x, y = data()
    for loss in (
        lambda p, x, y: affine(x, **p),
        lambda p, x, y: mse(affine(x, **p), y).astype(int),
        lambda p, x, y: (mse(affine(x, **p), y), x),
    ):
        with pytest.raises(ValueError, match="`loss_fn` must return a scalar"):
            kfcore_jax.trace(loss, one_layer(), x, y)
    with pytest.raises(ValueError, match=r"must return \(loss, aux\)"):
        kfcore_jax.trace(dense_loss(affine), one_layer(), x, y, has_aux=True)


def test_a_parameter_that_the_loss_ignores_is_named():
    with pytest.raises(ValueError, match="ignores the parameter spare"):
        kfcore_jax.trace(dense_loss(affine), one_layer() | {"spare": jnp.zeros(2)}, *data())


def test_a_loss_of_no_parameter_is_refused():
    with pytest.raises(ValueError, match="depends on no parameter"):
        kfcore_jax.trace(lambda p, x, y: mse(x[:, :3], y), one_layer(), *data())


def test_strict_refuses_a_fallback_and_tells_why():
    def loss(p, x, y):
        return mse(affine(x, p["w"], p["b"]) / p["scale"], y)

    with pytest.raises(ValueError, match=r"`strict` is set.*scale \(no layer: used in div\)"):
        kfcore_jax.trace(loss, one_layer() | {"scale": jnp.ones(3)}, *data(), strict=True)
    assert kfcore_jax.trace(dense_loss(affine), one_layer(), *data(), strict=True).layers == {"w": io(4, 3)}


def test_a_program_that_is_another_for_other_shapes_is_refused():
    loss = dense_loss(lambda x, w, b: affine(x, w, b) if len(x) == N else opaque(x, w) + b)
    x, y = data()
    model = kfcore_jax.trace(loss, one_layer(), x, y)
    with pytest.raises(ValueError, match="no longer uses w"):
        model.value_grad_and_records(one_layer(), x[:4], y[:4])
