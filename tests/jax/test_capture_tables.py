"""However rows of a table are taken, their ids and output gradients are captured and rebuild the gradient of the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kfcore_jax
from kfcore import Embedding, Linear, Norm

N, S, ROWS, WIDTH = 6, 5, 11, 4


def scalar(z):
    """A loss whose gradient is another one at every place of the output."""
    return jnp.mean(jnp.sin(z + jnp.arange(z.size).reshape(z.shape)))


def tokens(low=0, high=ROWS, shape=(N, S)):
    return jax.random.randint(jax.random.key(1), shape, low, high)


def table(lib):
    return {"embed": lib.normal(0, ROWS, WIDTH)}


def one(lib, loss, params, *args, name="embed"):
    """Ids and gradients of the only use of a table, whose gradient is rebuilt by hand once more."""
    model, records = lib.captured(loss, params, *args)
    assert isinstance(model.layers[name], Embedding)
    (use,), ((ids, grads),) = model.layout.sites[name], records.layers[name]
    expected = np.asarray(jax.tree.leaves(jax.grad(loss)(params, *args))[use.site.leaf]).reshape(use.rows, use.outs)
    rows = np.asarray(ids)[..., None] == np.arange(use.rows)
    assert np.abs(np.einsum("nsv,nsd->vd", rows, np.asarray(grads)) - expected).max() <= 1e-9 * np.abs(expected).max()
    return ids, grads


# ---- model libraries


def test_linen(lib):
    linen = pytest.importorskip("flax.linen")
    net, t = linen.Embed(ROWS, WIDTH), tokens()
    params = {"embed": lib.moved(net.init(jax.random.key(0), t)["params"])}
    ids, grads = one(lib, lambda p, t: scalar(net.apply({"params": p["embed"]}, t)), params, t)
    assert (np.asarray(ids) == np.asarray(t)).all()
    assert grads.shape == (N, S, WIDTH)


def test_nnx(lib):
    nnx = pytest.importorskip("flax.nnx")
    graph, params = nnx.split(nnx.Embed(ROWS, WIDTH, param_dtype="float64", rngs=nnx.Rngs(0)))
    one(lib, lambda p, t: scalar(nnx.merge(graph, p)(t)), lib.moved(params), tokens(), name="embedding")


@pytest.mark.parametrize("shape", [(N,), (N, S)])
def test_equinox_under_vmap(lib, shape):
    eqx = pytest.importorskip("equinox")
    params, static = eqx.partition(eqx.nn.Embedding(ROWS, WIDTH, key=jax.random.key(0)), eqx.is_array)

    def loss(p, t):
        row = eqx.combine(p["embed"], static)
        for _ in shape:
            row = jax.vmap(row)
        return scalar(row(t))

    t = tokens(shape=shape)
    ids, _ = one(lib, loss, {"embed": lib.moved(params)}, t)
    assert (np.asarray(ids) == np.asarray(t).reshape(N, -1)).all()


# ---- ways to take rows


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, jax.checkpoint, lambda f: jax.vmap(f, (None, 0))], ids=["plain", "jit", "remat", "vmap"]
)
@pytest.mark.parametrize("kind", ["int32", "int8", "uint8", "uint32", "int64"])
def test_wrappers_and_kinds_of_integers(lib, wrap, kind):
    t = tokens().astype(kind)
    ids, _ = one(lib, lambda p, t: scalar(wrap(lambda e, t: e[t])(p["embed"], t)), table(lib), t)
    assert (np.asarray(ids) == np.asarray(t)).all()


OUTSIDE = {
    "index": (-ROWS, ROWS, lambda e, t: e[t], lambda t: t % ROWS),
    "take": (-ROWS, ROWS, lambda e, t: jnp.take(e, t, axis=0), lambda t: t % ROWS),
    "take_wrap": (-30, 30, lambda e, t: jnp.take(e, t, axis=0, mode="wrap"), lambda t: t % ROWS),
    "take_clip": (-5, 20, lambda e, t: jnp.take(e, t, axis=0, mode="clip"), lambda t: np.clip(t, 0, ROWS - 1)),
    "index_clip": (-5, 20, lambda e, t: e.at[t].get(mode="clip"), lambda t: np.clip(np.where(t < 0, t + ROWS, t), 0, ROWS - 1)),
    "fill": (-30, 30, lambda e, t: e.at[t].get(mode="fill", fill_value=0.5), lambda t: np.where(abs(t + 0.5) < ROWS, t % ROWS, ROWS)),
    "promise": (0, ROWS, lambda e, t: e.at[t].get(mode="promise_in_bounds"), lambda t: t),
}


@pytest.mark.parametrize(("low", "high", "take", "meant"), OUTSIDE.values(), ids=OUTSIDE)
def test_what_becomes_of_numbers_outside_of_the_table(lib, low, high, take, meant):
    t = tokens(low, high)
    ids, grads = one(lib, lambda p, t: scalar(take(p["embed"], t)), table(lib), t)
    assert (np.asarray(ids) == meant(np.asarray(t))).all()
    assert not np.asarray(grads)[np.asarray(ids) == ROWS].any()


def test_small_integers_that_cannot_count_the_rows(lib):
    numbers = lax.GatherDimensionNumbers((2,), (0,), (0,))

    def loss(p, t):
        return scalar(lax.gather(p["embed"], t[..., None], numbers, (1, 2), mode="fill", fill_value=0.0))

    t = np.asarray(tokens(-5, 127))
    ids, _ = one(lib, loss, {"embed": lib.normal(0, 300, 2)}, t.astype("int8"))
    assert (np.asarray(ids) == np.where(t < 0, 300, t)).all()


def test_a_row_with_several_axes_and_one_that_is_a_number(lib):
    _, grads = one(lib, lambda p, t: scalar(p["embed"][t]), {"embed": lib.normal(0, ROWS, 2, 3)}, tokens())
    assert grads.shape == (N, S, 6)
    _, grads = one(lib, lambda p, t: scalar(p["embed"][t]), {"embed": lib.normal(0, ROWS)}, tokens())
    assert grads.shape == (N, S, 1)


def test_a_table_stored_the_other_way(lib):
    params = {"embed": lib.normal(0, WIDTH, ROWS)}
    model, records = lib.captured(lambda p, t: scalar(p["embed"].T[t]), params, tokens())
    assert records.layers["embed"][0][1].shape == (N, S, WIDTH)
    assert model.layout.sites["embed"][0].rows == ROWS


def test_a_table_in_half_precision(lib):
    params = {"embed": lib.normal(0, ROWS, WIDTH).astype("float32")}
    model = kfcore_jax.trace(lambda p, t: scalar(p["embed"].astype(jnp.bfloat16)[t].astype(jnp.float32)), params, tokens())
    assert model.check_capture(params, tokens(), rtol=2e-2).keys() == {"embed"}


@jax.custom_jvp
def ruled(e, t):
    return e[t]


@ruled.defjvp
def rule(primals, tangents):
    return ruled(*primals), tangents[0][primals[1]]


def test_inside_a_rule_of_its_own(lib):
    one(lib, lambda p, t: scalar(ruled(p["embed"], t)), table(lib), tokens())


def test_a_position_added_to_a_row_is_no_bias(lib):
    params = table(lib) | {"positions": lib.normal(2, S, WIDTH), "b": lib.normal(3, WIDTH)}
    model, _ = lib.captured(lambda p, t: scalar(p["embed"][t] + p["b"] + p["positions"]), params, tokens())
    assert model.layers == {"embed": Embedding(ROWS, WIDTH), "b": Norm(WIDTH, bias=False), "positions": Norm((S, WIDTH), bias=False)}


def test_flat_tokens_are_positions_of_their_examples(lib):
    ids, grads = one(lib, lambda p, t: scalar(p["embed"][t.reshape(-1)]), table(lib), tokens())
    assert (np.asarray(ids) == np.asarray(tokens())).all()
    assert grads.shape == (N, S, WIDTH)


# ---- loops, and tables used more than once


def test_a_recurrent_net_over_tokens(lib):
    def loss(p, t):
        def cell(h, t):
            h = jnp.tanh(p["embed"][t] + h @ p["w"])
            return h, h @ p["out"]

        return scalar(lax.scan(cell, jnp.zeros((N, WIDTH)), t.T)[1])

    params = table(lib) | {"w": lib.normal(1, WIDTH, WIDTH), "out": lib.normal(2, WIDTH, ROWS)}
    model, records = lib.captured(loss, params, tokens())
    assert set(model.layers) == {"embed", "w", "out"}
    ((ids, grads),) = records.layers["embed"]
    assert (np.asarray(ids) == np.asarray(tokens())).all()
    assert grads.shape == (N, S, WIDTH)


def test_a_loop_over_tables_is_a_stack(lib):
    def loss(p, t):
        return scalar(lax.scan(lambda h, e: (jnp.tanh(h + e[t]), None), jnp.zeros((N, S, WIDTH)), p["embed"])[0])

    model, records = lib.captured(loss, {"embed": lib.normal(0, 3, ROWS, WIDTH)}, tokens())
    ((ids, grads),) = records.layers["embed"]
    assert (ids.shape, grads.shape) == ((3, N, S), (3, N, S, WIDTH))
    assert model.layout.sites["embed"][0].stack == (3,)


def test_a_table_used_for_two_columns_has_two_records(lib):
    def loss(p, t):
        return scalar(jnp.tanh(p["embed"][t[:, 0]]) * jnp.take(p["embed"], t[:, 1], axis=0))

    model, records = lib.captured(loss, table(lib), tokens())
    assert model.layers == {"embed": Embedding(ROWS, WIDTH, padding=ROWS)}
    assert [ids.shape for ids, _ in records.layers["embed"]] == [(N, 1), (N, 1)]


def test_a_tied_head_is_captured_as_a_gather_and_as_a_product(lib):
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            embed = linen.Embed(ROWS, WIDTH, name="embed")
            return embed.attend(jnp.tanh(linen.Dense(WIDTH, name="fc")(embed(tokens))))

    net, t = Net(), tokens()
    params = lib.moved(net.init(jax.random.key(0), t)["params"])
    model, records = lib.captured(lambda p, t: scalar(net.apply({"params": p}, t)), params, t)
    assert model.layers == {"fc": Linear(WIDTH, WIDTH, layout="io")}
    assert model.layout.reasons["embed.embedding"] == "captured in a gather and in a product, but no curvature block covers both"
    (ids, rows), (inputs, grads) = records.layers["embed"]
    assert (ids.shape, rows.shape, inputs.shape, grads.shape) == ((N, S), (N, S, WIDTH), (N, S, WIDTH), (N, S, ROWS))


def test_a_tied_autoencoder_is_captured_in_both_orientations(lib):
    def loss(p, x):
        return scalar(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T)

    model, records = lib.captured(loss, {"w": lib.normal(0, 4, 3), "b": lib.normal(1, 3)}, lib.normal(2, N, 4))
    assert not model.layers
    assert [tuple(v.shape for v in pair) for pair in records.layers["w"]] == [((N, 1, 4), (N, 1, 3)), ((N, 1, 3), (N, 1, 4))]


# ---- what is none


TRAPS = {
    "constant_ids": ("add", lambda e, t, x: e[jnp.arange(S)] + x),
    "columns": ("gather of something else", lambda e, t, x: jnp.take(e, jnp.abs(t) % WIDTH, axis=1)),
    "entries": ("gather of something else", lambda e, t, x: e[t, jnp.abs(t) % WIDTH]),
    "several_rows": ("gather of something else", lambda e, t, x: jax.vmap(lambda i: lax.dynamic_slice(e, (i, 0), (2, WIDTH)))(t[:, 0])),
    "part_of_a_row": ("gather of something else", lambda e, t, x: jax.vmap(lambda i: lax.dynamic_slice(e, (i, 1), (1, 2)))(t[:, 0])),
    "row_out_of_a_place_that_is_filled": (
        "gather of something else",
        lambda e, t, x: lax.gather(
            e, jnp.stack([t, t], -1), lax.GatherDimensionNumbers((2,), (0,), (0, 1)), (1, WIDTH), mode="fill", fill_value=0.0
        ),
    ),
    "one_row": ("dynamic_slice", lambda e, t, x: e[t[0, 0]] + x),
    "rows_of_its_double": ("gather", lambda e, t, x: (2 * e)[t]),
    "a_table_each": (
        "gather of something else",
        lambda e, t, x: jax.vmap(lambda e, t: e[t])(e.reshape(ROWS, 2, 2), jnp.abs(t[:1]) % 2 + jnp.zeros((ROWS, 1), int)),
    ),
    "also_scaled": ("also used in mul", lambda e, t, x: e[t] * e[0, 0]),
}


@pytest.mark.parametrize(("word", "take"), TRAPS.values(), ids=TRAPS)
def test_other_uses_are_not_captured_and_have_a_reason(lib, word, take):
    model, records = lib.captured(lambda p, t, x: scalar(take(p["embed"], t, x)), table(lib), tokens(), lib.normal(1, N, S, WIDTH))
    assert not records.layers
    assert word in model.layout.reasons["embed"]


def test_rows_of_the_batch_at_places_that_a_parameter_does_not_tell(lib):
    params = {"w": lib.normal(0, WIDTH, 3)}
    model, records = lib.captured(lambda p, t, x: scalar(x[t[:, 0] % N] @ p["w"]), params, tokens(), lib.normal(1, N, WIDTH))
    assert records.layers.keys() == model.layers.keys() == {"w"}


# ---- the check itself


@pytest.mark.parametrize("part", ["ids", "output_grads"])
def test_an_error_in_a_record_is_caught(lib, part, monkeypatch):
    model, _ = lib.captured(lambda p, t: scalar(p["embed"][t]), table(lib), tokens())
    whole = model.capture

    def off(*args):
        value, grads, records = whole(*args)
        ((ids, dy),) = records.layers["embed"]
        records.layers["embed"] = [(ids.at[0, 0].set((ids[0, 0] + 1) % ROWS), dy) if part == "ids" else (ids, 1.01 * dy)]
        return value, grads, records

    monkeypatch.setattr(model, "capture", off)
    with pytest.raises(AssertionError, match="differ from autodiff's in embed"):
        model.check_capture(table(lib), tokens())
