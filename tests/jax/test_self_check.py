"""The self-check passes programs that are captured rightly, and finds those that are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kfcore as kf
import kfcore_jax
from kfcore_jax import self_check

N, T, D, C = 2, 3, 4, 3


def dense(p, x):
    return x @ p["w"] + p["b"]


def linear(lib, seed, inp, out, *lead):
    return {"w": lib.normal(seed, *lead, inp, out) / np.sqrt(inp), "b": 0.1 * lib.normal(seed + 1, *lead, out)}


def normed(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-3) * p["scale"] + p["shift"]


def mlp(p, x):
    """Also with a parameter of no layer, and with integers among the parameters."""
    y = dense(p["two"], normed(p["norm"], jnp.tanh(dense(p["one"], x))))
    return y * jnp.exp(p["bare"]) + 0 * p["count"]


def with_mlp(lib):
    params = {"one": linear(lib, 0, D, 5), "norm": {"scale": 1 + 0.3 * lib.normal(2, 5), "shift": lib.normal(3, 5)}}
    return mlp, params | {"two": linear(lib, 4, 5, C), "bare": 0.1 * lib.normal(6, C), "count": jnp.arange(3)}


def loops(p, x):
    """Layers of a scan, each with weights of its own; and weights used again at every step of time, dense and convolutional."""
    x, _ = lax.scan(lambda h, q: (h + jnp.tanh(dense(q, h)), None), x, p["deep"])

    def step(h, x):
        h = jnp.tanh(dense(p["cell"], h) + x[:, None, :])
        return jnp.tanh(lax.conv_general_dilated(h, p["conv"]["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))), None

    h, _ = lax.scan(step, jnp.ones((len(x), 2, D)), jnp.swapaxes(x, 0, 1))
    return dense(p["head"], h.mean(1))


def with_loops(lib):
    params = {"deep": linear(lib, 0, D, D, 2), "cell": linear(lib, 2, D, D), "conv": {"w": lib.normal(4, 3, D, D) / 3}}
    return loops, params | {"head": linear(lib, 5, D, C)}


def with_flax_words(lib):
    nn = pytest.importorskip("flax.linen")

    class Words(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(5, D, name="embed")(ids)
            x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm")(x))
            return nn.Dense(C, name="head")(nn.RMSNorm(name="last")(x))

    net, ids = Words(), jnp.zeros((N, T), int)
    return net.apply, lib.moved(net.init(jax.random.key(0), ids))


def with_equinox_images(lib):
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)
    layers = [
        eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, key=keys[0]),
        eqx.nn.GroupNorm(2, 4),
        eqx.nn.Lambda(jnp.tanh),
        eqx.nn.ConvTranspose2d(4, 2, 2, key=keys[1]),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(18, C, key=keys[2]),
    ]
    params, static = eqx.partition(eqx.nn.Sequential(layers), eqx.is_array)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), lib.moved(params)


MODELS = {
    "mlp": (with_mlp, lambda lib, n: lib.normal(10, n, D)),
    "loops": (with_loops, lambda lib, n: lib.normal(10, n, T, D)),
    "words": (with_flax_words, lambda lib, n: jax.random.randint(jax.random.key(0), (n, T), 0, 5)),
    "images": (with_equinox_images, lambda lib, n: lib.normal(10, n, 2, 3, 4)),
}
EKFAC = (kf.EKFAC(scales="gradient"), {"bias": "separate", "norm": "full"})
HOW = {"mlp": (kf.KFAC(), {}), "loops": EKFAC, "words": EKFAC, "images": (kf.KFAC(), {"bias": "separate", "sharing": "reduce"})}


def made(lib, which, n=N, **options):
    build, data = MODELS[which]
    (net, params), x = build(lib), data(lib, n)
    return kfcore_jax.trace(lambda p, x: jnp.mean(jnp.sin(net(p, x))), params, x, **options), net, params, x


@pytest.mark.parametrize("which", MODELS)
def test_programs_that_are_captured_rightly_pass(lib, which, capsys):
    method, options = HOW[which]
    model, net, params, x = made(lib, which, **options)
    found = self_check(model, net, params, x, method=method)
    assert found.left_out == ({"bare": model.layout.reasons["bare"]} if which == "mlp" else {})
    assert [row.block for row in found] == [block for name in model.layers for block in model.layout.model.blocks(name).values()]
    assert max(row.gradient for row in found) < 1e-12
    assert {row.block: row.note for row in found if row.note} == (
        {"attention.key.bias": "its gradient vanishes"} if which == "words" else {}
    )
    for row in found:
        if not row.note:
            assert row.exact == row.kind.startswith(("Norm", "Bias"))
            assert row.distance < 1e-10 if row.exact else row.distance > 1e-4
            assert row.kind.endswith(f", {method.name}")
    assert all(row.block in line for row, line in zip(found, capsys.readouterr().out.splitlines()[1:], strict=False))


def test_one_example_at_one_position_is_exact(lib):
    found = self_check(*made(lib, "mlp", 1, norm="full"), show=False)
    assert all(row.exact and row.distance < 1e-10 for row in found)


def test_the_distance_is_that_of_the_blocks_of_the_optimizer(lib):
    """From the matrix ``2 / M J^T J`` of the mean of M squares, with J by autodiff."""
    model, net, params, x = made(lib, "words")
    found = self_check(model, net, params, x, loss=kf.MSE(), show=False)
    method = kf.KFAC(fisher="exact")
    optimizer = kfcore_jax.optimizer(method, model)
    layout, core = optimizer.core.bind(params)

    @jax.jit
    def blocks(params, x):
        records = model.fisher_records(net, method, kf.MSE(), params, x)
        grads = jax.grad(lambda p: jnp.mean(net(p, x) ** 2))(params)
        _, state = optimizer.update(grads, optimizer.init(params), params, records=records)
        outputs, pull = jax.vjp(lambda p: net(p, x).ravel(), params)
        rows = jax.vmap(lambda v: core.model.matrices(layout.flat(pull(v)[0])))(jnp.eye(len(outputs)))
        return core.preconditioner.dense(state.curvature), rows, len(outputs)

    dense, rows, terms = blocks(params, x)
    for row in found:
        j = np.asarray(rows[row.block]).reshape(terms, -1)
        f, b = 2.0 / terms * j.T @ j, np.asarray(dense[row.block])
        if row.kind.startswith("Norm"):
            f, b = np.diag(f), np.diag(b)
        assert row.distance == pytest.approx(np.linalg.norm(b - f) / np.linalg.norm(f), rel=1e-6, abs=1e-10)


# -- what is wrong is found --------------------------------------------------------------------------------------------


def tapped(outputs, inputs):
    """A layer named by hand: what it computes, and what its tap says that it sees."""

    def net(p, x):
        y = kfcore_jax.tap(outputs(p["a"], x), inputs(x), p["a"]["w"], p["a"]["b"], name="mine")
        return dense(p["head"], jnp.tanh(y))

    return net


def mixed(p, x):
    """The second use has the examples in another order."""
    return dense(p["head"], jnp.tanh(dense(p["a"], x) + dense(p["a"], x[::-1])[::-1]))


def shared_rows(p, x):
    """Rows without examples, made of the whole batch."""
    return dense(p["head"], jnp.tanh(x + dense(p["a"], (x.T @ x)[:3]).mean(0)))


OFF = "gradients from what was captured are .* off autodiff's: its layer computes something else"
CASES = {
    "scaled": (tapped(lambda a, x: 2.0 * x @ a["w"] + a["b"], lambda x: x), f"mine: {OFF}"),
    "other bias": (tapped(lambda a, x: x @ a["w"] + 2.0 * a["b"], lambda x: x), f"mine: {OFF}"),
    "other input": (tapped(dense, lambda x: jnp.roll(x, 1, axis=1)), f"mine: {OFF}"),
    "mixed": (mixed, "a: gradients of single examples are .* off autodiff's, though not their sum: examples are mixed"),
    "shared rows": (shared_rows, "a: the first axis of its input has 3 entries, which are not the 2 examples"),
}


def small(lib, net):
    params, x = {"a": linear(lib, 0, D, D), "head": linear(lib, 2, D, C)}, lib.normal(4, N, D)
    return kfcore_jax.trace(lambda p, x: jnp.mean(net(p, x) ** 2), params, x), net, params, x


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_found(lib, case, capsys):
    net, message = CASES[case]
    with pytest.raises(AssertionError, match=f"^{message}") as error:
        self_check(*small(lib, net))
    assert "head:" not in str(error.value)
    assert str(error.value).partition(": ")[2] in capsys.readouterr().out, "the table is printed first"


def other_layer(layers):
    layers["a"], layers["head"] = layers["head"], layers["a"]


def other_example(layers):
    ((inputs, grads),) = layers["a"]
    layers["a"] = [(inputs[::-1], grads)]


def one_percent(side):
    def change(layers):
        layers["a"] = [tuple(1.01 * x if k == side else x for k, x in enumerate(pair)) for pair in layers["a"]]

    return change


def one_vector(layers):
    ((inputs, grads),) = layers["a"]
    layers["a"] = [(inputs, grads.at[-1].multiply(1.01))]


BROKEN = {
    "another layer": (other_layer, "a: gradients .*; head: gradients"),
    "another example": (other_example, "a: gradients"),
    "inputs by a percent": (one_percent(0), "a: gradients"),
    "output gradients by a percent": (one_percent(1), "a: gradients"),
    "one vector by a percent": (one_vector, "a: gradients"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_record_is_found(lib, case, monkeypatch):
    change, message = BROKEN[case]
    net = lambda p, x: dense(p["head"], jnp.tanh(dense(p["a"], x)))  # noqa: E731
    params, x = {"a": linear(lib, 0, D, D), "head": linear(lib, 2, D, D)}, lib.normal(4, N, D)
    model = kfcore_jax.trace(lambda p, x: jnp.mean(net(p, x) ** 2), params, x)
    whole = model.fisher_records

    def broken(*args, **options):
        records = whole(*args, **options)
        change(records.layers)
        return records

    monkeypatch.setattr(model, "fisher_records", broken)
    with pytest.raises(AssertionError, match=f"^{message}") as error:
        self_check(model, net, params, x, show=False)
    assert ("head" in str(error.value)) == (change is other_layer)


def test_examples_that_depend_on_each_other_are_told_and_not_wrong(lib):
    """Only sums over them are checked: those are still found to be wrong."""

    def net(wrong):
        def batch_normed(x):
            return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-3)

        return lambda p, x: dense(p["head"], batch_normed(kfcore_jax.tap(wrong * dense(p["a"], x), x, **taps(p["a"]))))

    def taps(p):
        return {"weight": p["w"], "bias": p["b"], "name": "a"}

    model, *call, x = small(lib, net(1.0))
    call.append(np.asarray(x))
    found = self_check(model, *call, show=False)
    assert found["a"].note == "examples depend on each other, through normalisations of the batch"
    assert np.isnan(found["a"].distance)
    assert (found["head"].note, found["head"].gradient < 1e-12) == ("", True)
    whole = self_check(model, *call, examples=1, show=False)
    assert max(row.gradient for row in whole) < 1e-12
    with pytest.raises(AssertionError, match=f"^a: {OFF}"):
        self_check(*small(lib, net(2.0)), show=False)


# -- masks, and the call -----------------------------------------------------------------------------------------------


def test_masked_positions_are_none(lib):
    """As if the sequences were shorter; where real positions look at masked ones the check says so."""
    params = {"one": linear(lib, 0, D, D), "norm": {"scale": 1 + lib.normal(2, D), "shift": lib.normal(3, D)}, "two": linear(lib, 4, D, C)}
    x, mask = lib.normal(10, N, T, D), jnp.arange(T) < jnp.asarray([[2], [1]])

    def check(net, x, **options):
        model = kfcore_jax.trace(lambda p, x: jnp.mean(net(p, x) ** 2), params, x)
        return self_check(model, net, params, x, show=False, **options)

    apart = lambda p, x: dense(p["two"], normed(p["norm"], jnp.tanh(dense(p["one"], x))))  # noqa: E731
    found, whole = check(apart, x, mask=mask), check(apart, x)
    assert max(row.gradient for row in found) < 1e-12
    assert found["norm"].distance < 1e-12
    assert found["norm"].exact
    assert abs(found["one"].distance - whole["one"].distance) > 1e-3
    with pytest.raises(AssertionError, match=f"^one: {OFF}"):
        check(lambda p, x: apart(p, x + dense(p["one"], x).mean(1, keepdims=True)), x, mask=mask)


def test_the_call_is_as_it_is_told(lib, capsys):
    model, net, params, x = made(lib, "mlp")
    with pytest.raises(TypeError, match=r"`model` must be what kfcore_jax.trace.* got function"):
        self_check(net, params, x)
    with pytest.raises(ValueError, match=r"`outputs` must have the 2 examples of the layers on their first axis, got \(3, 2\)"):
        self_check(model, lambda p, x: net(p, x).T, params, x)
    with pytest.raises(ValueError, match="`targets` must be given"):
        self_check(model, net, params, x, loss=kf.CrossEntropy(ignore_index=0))
    with pytest.raises(ValueError, match="no columns"):
        self_check(model, net, params, x, loss=kf.CustomLoss(lambda f, y: 1.0, hessian_columns=lambda f, y: []))
    with pytest.raises(ValueError, match="no longer uses two"):
        self_check(model, lambda p, x: normed(p["norm"], jnp.tanh(dense(p["one"], x))), params, x)
    self_check(model, net, params, x, loss=kf.CrossEntropy(ignore_index=0), targets=jnp.asarray([0, 1]), show=False)
    assert capsys.readouterr().out == ""
    x = lib.normal(10, N, T, D)
    params, x = jax.tree.map(lambda v: v.astype("bfloat16") if v.dtype == "float64" else v, (params, x))
    narrow = kfcore_jax.trace(lambda p, x: jnp.mean(net(p, x) ** 2), params, x)
    assert 0.0 < max(row.gradient for row in self_check(narrow, net, params, x, show=False)) < 0.05
    with pytest.raises(AssertionError, match="off autodiff"):
        self_check(narrow, net, params, x, tolerance=1e-9, show=False)
