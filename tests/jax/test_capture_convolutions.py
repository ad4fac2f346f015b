"""However a convolution is written, its inputs and output gradients are captured channels last, and rebuild the gradient of its kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kfcore_jax
from kfcore import Norm

N = 3


def scalar(z):
    """A loss whose gradient is another one at every place of the output."""
    return jnp.mean(jnp.sin(z + jnp.arange(z.size).reshape(z.shape)))


def by_hand(lib, use, inputs, grads):
    """The gradient of a kernel ``[*kernel, in / groups, out]`` from patches, without any convolution."""
    seen, grads = lib.patches(np.asarray(inputs), use), np.asarray(grads)
    seen = seen.reshape(-1, seen[(0,) * len(use.kernel)].size // use.ins, use.groups, use.ins // use.groups)
    grads = grads.reshape(-1, use.groups, use.outs // use.groups)
    return np.einsum("kngi,ngo->kigo", seen, grads).reshape(*use.kernel, use.ins // use.groups, use.outs)


def one(lib, loss, params, *args, name="conv", biased=True):
    """The use and the arrays of the only convolution, whose kernel gradient and factors are made by hand once more."""
    model, records = lib.captured(loss, params, *args)
    (use,), ((inputs, grads),) = model.layout.sites[name], records.layers[name]
    assert (use.site.bias is not None) == biased
    leaf = jax.tree.leaves(jax.grad(loss)(params, *args))[use.site.leaf]
    expected = kfcore_jax.views.apply(use.weight, np.asarray(leaf))
    assert np.abs(by_hand(lib, use, inputs, grads) - expected).max() <= 1e-9 * np.abs(expected).max()
    assert ("bias" in model.layers[name].parameters) == biased
    lib.check_factors(model.layers[name], use, inputs, grads)
    if biased or len(jax.tree.leaves(params)) == 1:
        assert set(kfcore_jax.trace(loss, params, *args, strict=True).layers) == {name}
    return use, inputs, grads


# ---- model libraries


LINEN = {
    "1d": ((9, 2), {"kernel_size": (3,)}),
    "2d": ((6, 5, 2), {"kernel_size": (3, 2)}),
    "3d": ((4, 3, 5, 2), {"kernel_size": (2, 3, 2)}),
    "stride": ((7, 6, 2), {"kernel_size": (3, 3), "strides": (2, 1)}),
    "dilation": ((8, 7, 2), {"kernel_size": (3, 2), "kernel_dilation": (2, 3)}),
    "groups": ((6, 5, 4), {"kernel_size": (3, 3), "feature_group_count": 2}),
    "depthwise": ((6, 5, 4), {"kernel_size": (3, 3), "feature_group_count": 4}),
    "valid": ((6, 5, 2), {"kernel_size": (3, 3), "padding": "VALID"}),
    "explicit": ((6, 5, 2), {"kernel_size": (3, 3), "padding": ((2, 0), (1, 3)), "strides": 2}),
    "cut": ((6, 5, 2), {"kernel_size": (3, 3), "padding": ((-1, 0), (0, -2))}),
    "circular": ((6, 5, 2), {"kernel_size": (3, 3), "padding": "CIRCULAR"}),
    "causal": ((9, 2), {"kernel_size": (3,), "padding": "CAUSAL"}),
    "input_dilation": ((5, 4, 2), {"kernel_size": (3, 3), "input_dilation": (2, 1), "padding": ((1, 1), (2, 0))}),
    "no_bias": ((6, 5, 2), {"kernel_size": (3, 3), "use_bias": False}),
    "everything": ((9, 8, 4), {"kernel_size": (3, 2), "strides": (2, 3), "kernel_dilation": (2, 1), "feature_group_count": 2}),
}


@pytest.mark.parametrize(("shape", "options"), LINEN.values(), ids=LINEN)
def test_linen(lib, shape, options):
    linen = pytest.importorskip("flax.linen")
    net, x = linen.Conv(4, **options, name="conv"), lib.normal(0, N, *shape)
    params = {"conv": lib.moved(net.init(jax.random.key(0), x)["params"])}
    biased = options.get("use_bias", True)
    use, inputs, grads = one(lib, lambda p, x: scalar(net.apply({"params": p["conv"]}, x)), params, x, biased=biased)
    if options.get("padding") not in ("CIRCULAR", "CAUSAL"):
        assert (np.asarray(inputs) == np.asarray(x)).all()
    out = jax.eval_shape(net.apply, {"params": params["conv"]}, x).shape
    assert (grads.shape, use.ins, use.outs) == ((N, np.prod(out[1:-1]), 4), shape[-1], 4)


TRANSPOSED = {
    "same": {"strides": (2, 2)},
    "valid": {"strides": (2, 3), "padding": "VALID"},
    "dilated": {"strides": (2, 2), "kernel_dilation": (2, 1)},
    "kernel_of_the_forward_one": {"strides": (2, 2), "transpose_kernel": True},
    "circular": {"strides": (2, 2), "padding": "CIRCULAR"},
}


@pytest.mark.parametrize("options", TRANSPOSED.values(), ids=TRANSPOSED)
def test_linen_transposed(lib, options):
    linen = pytest.importorskip("flax.linen")
    net, x = linen.ConvTranspose(3, (3, 2), **options), lib.normal(0, N, 4, 5, 2)
    params = {"conv": lib.moved(net.init(jax.random.key(0), x)["params"])}
    # where the outputs are wrapped around, the bias is added to several places of the convolution at once
    biased = options.get("padding") != "CIRCULAR"
    use, *_ = one(lib, lambda p, x: scalar(net.apply({"params": p["conv"]}, x)), params, x, biased=biased)
    assert use.input_dilation == options["strides"]


def test_nnx(lib):
    nnx = pytest.importorskip("flax.nnx")
    graph, params = nnx.split(nnx.Conv(2, 4, (3, 3), strides=2, rngs=nnx.Rngs(0)))
    one(lib, lambda p, x: scalar(nnx.merge(graph, p["conv"])(x)), {"conv": lib.moved(params)}, lib.normal(0, N, 6, 5, 2))


EQUINOX = {
    "1d": ("Conv1d", (9,), {}),
    "2d": ("Conv2d", (6, 5), {"stride": 2, "padding": 1}),
    "3d": ("Conv3d", (4, 3, 5), {"padding": "SAME"}),
    "groups": ("Conv2d", (6, 5), {"groups": 2}),
    "dilation": ("Conv2d", (6, 7), {"dilation": 2}),
    "transposed": ("ConvTranspose2d", (4, 3), {"stride": 2, "output_padding": 1}),
}


@pytest.mark.parametrize(("kind", "space", "options"), EQUINOX.values(), ids=EQUINOX)
def test_equinox_under_vmap(lib, kind, space, options):
    eqx = pytest.importorskip("equinox")
    params, static = eqx.partition(getattr(eqx.nn, kind)(4, 6, 3, key=jax.random.key(0), **options), eqx.is_array)
    x = lib.normal(0, N, 4, *space)
    _, inputs, _ = one(lib, lambda p, x: scalar(jax.vmap(eqx.combine(p["conv"], static))(x)), {"conv": lib.moved(params)}, x)
    assert (np.asarray(inputs) == np.moveaxis(np.asarray(x), 1, -1)).all()


# ---- written out


def affine(x, p, **options):
    return lax.conv(x, p["w"], (1, 1), "SAME") + p["b"][:, None, None]


def first(lib):
    return {"conv": {"w": lib.normal(1, 4, 2, 3, 2), "b": lib.normal(2, 4)}}


def test_channels_first_and_the_gradient_at_the_output(lib):
    params, x = first(lib), lib.normal(0, N, 2, 5, 6)
    use, inputs, grads = one(lib, lambda p, x: scalar(jnp.tanh(affine(x, p["conv"]))), params, x)
    z = affine(x, params["conv"])
    expected = np.moveaxis(np.asarray(jax.grad(lambda z: scalar(jnp.tanh(z)))(z)), 1, -1).reshape(N, 30, 4)
    assert np.abs(np.asarray(grads) - expected).max() <= 1e-12
    assert (np.asarray(inputs) == np.moveaxis(np.asarray(x), 1, -1)).all()
    assert (use.kernel, use.strides, use.padding, use.groups) == ((3, 2), (1, 1), ((1, 1), (0, 1)), 1)


WRAPPERS = {
    "jit": jax.jit(affine),
    "remat": jax.checkpoint(affine),
    "remat_of_jit": jax.checkpoint(jax.jit(affine), policy=jax.checkpoint_policies.nothing_saveable),
    "vmap": lambda x, p: jax.vmap(lambda x: affine(x[None], p)[0])(x),
    "bias_in_another_call": lambda x, p: jax.jit(jnp.add)(lax.conv(x, p["w"], (1, 1), "SAME"), p["b"][None, :, None, None]),
    "reversed_kernel": lambda x, p: affine(x, {"w": p["w"][:, :, ::-1], "b": p["b"]}),
    "kernel_of_another_shape": lambda x, p: affine(
        x, {"w": p["w"].transpose(2, 3, 0, 1).reshape(6, 8).reshape(3, 2, 4, 2).transpose(2, 3, 0, 1)} | {"b": p["b"]}
    ),
}


@pytest.mark.parametrize("net", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_change_nothing(lib, net):
    _, inputs, _ = one(lib, lambda p, x: scalar(net(x, p["conv"])), first(lib), lib.normal(0, N, 2, 5, 6))
    assert inputs.shape == (N, 5, 6, 2)


@jax.custom_jvp
def ruled(x, p):
    return affine(x, p)


ruled.defjvp(lambda primals, tangents: jax.jvp(affine, primals, tangents))


def test_inside_a_rule_of_its_own(lib):
    # its bias has no owner: the rule need not treat it as the sum does
    one(lib, lambda p, x: scalar(ruled(x, p["conv"])), first(lib), lib.normal(0, N, 2, 5, 6), biased=False)


def test_a_mapped_ensemble_is_one_convolution_in_groups(lib):
    def loss(p, x):
        return scalar(jax.vmap(lambda w, x: lax.conv(x, w, (1,), "SAME"))(p["conv"], x))

    use, *_ = one(lib, loss, {"conv": lib.normal(1, 5, 4, 2, 3)}, lib.normal(0, 5, N, 2, 7), biased=False)
    assert (use.groups, use.ins, use.outs) == (5, 10, 20)


def test_a_mapped_ensemble_with_channels_last(lib):
    def conv(w, x):
        return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    def loss(p, x):
        return scalar(jax.vmap(conv)(p["conv"], x))

    use, *_ = one(lib, loss, {"conv": lib.normal(1, 5, 3, 2, 4)}, lib.normal(0, 5, N, 7, 2), biased=False)
    assert (use.groups, use.outs) == (5, 20)


def test_a_kernel_shared_by_the_rounds_of_a_loop_sees_further_examples(lib):
    def loss(p, x):
        def cell(h, x):
            h = jnp.tanh(affine(x, p["into"]) + lax.conv(h, p["conv"], (1, 1), "SAME"))
            return h, None

        return scalar(lax.scan(cell, jnp.zeros((N, 4, 5, 6)), x)[0])

    params, x = {"conv": lib.normal(3, 4, 4, 3, 3), "into": first(lib)["conv"]}, lib.normal(0, 7, N, 2, 5, 6)
    model, records = lib.captured(loss, params, x)
    ((inputs, grads),) = records.layers["into"]
    assert (inputs.shape, grads.shape) == ((N * 7, 5, 6, 2), (N * 7, 30, 4))
    assert (np.asarray(inputs).reshape(N, 7, 5, 6, 2) == np.asarray(x).transpose(1, 0, 3, 4, 2)).all()
    assert model.layout.sites["into"][0].site.bias is not None
    assert records.layers["conv"][0][0].shape == (N * 7, 5, 6, 4)


def test_a_loop_over_layers_is_a_stack(lib):
    def loss(p, x):
        return scalar(lax.scan(jax.checkpoint(lambda x, p: (jnp.tanh(affine(x, p)), None)), x, p["conv"])[0])

    params = {"conv": {"w": lib.normal(1, 6, 2, 2, 3, 3), "b": lib.normal(2, 6, 2)}}
    model, records = lib.captured(loss, params, lib.normal(0, N, 2, 5, 4))
    (use,), ((inputs, grads),) = model.layout.sites["conv"], records.layers["conv"]
    assert (use.stack, use.site.bias is not None) == ((6,), True)
    assert (inputs.shape, grads.shape) == ((6, N, 5, 4, 2), (6, N, 20, 2))
    assert model.layers["conv"].parameters == {"weight": (6, 3, 3, 2, 2), "bias": (6, 2)}


def test_reversed_kernels_in_a_loop_over_layers(lib):
    def loss(p, x):
        return scalar(lax.scan(lambda x, w: (jnp.tanh(lax.conv(x, w[:, :, ::-1], (1, 1), "SAME")), None), x, p["conv"])[0])

    params = {"conv": lib.normal(1, 6, 2, 2, 3, 3)}
    model, _ = lib.captured(loss, params, lib.normal(0, N, 2, 5, 4))
    seen = kfcore_jax.views.apply(model.layout.sites["conv"][0].weight, params["conv"])
    assert (np.asarray(seen) == np.asarray(params["conv"])[:, :, :, ::-1].transpose(0, 3, 4, 2, 1)).all()


def test_a_kernel_used_twice_has_two_records(lib):
    def loss(p, x):
        return scalar(affine(jnp.tanh(affine(x, p["conv"])), p["conv"]))

    model, records = lib.captured(loss, {"conv": {"w": lib.normal(1, 2, 2, 3, 3), "b": lib.normal(2, 2)}}, lib.normal(0, N, 2, 5, 4))
    assert len(records.layers["conv"]) == 2
    assert model.layout.reasons["conv.weight"] == "convolution: conv.w, used 2 times"


def test_a_kernel_in_two_convolutions_of_different_strides_is_one_layer(lib):
    def loss(p, x):
        return sum(scalar(lax.conv(x, p["conv"], strides, "SAME")) for strides in ((1, 1), (2, 2)))

    model, records = lib.captured(loss, {"conv": lib.normal(1, 4, 2, 3, 3)}, lib.normal(0, N, 2, 5, 4))
    assert [grads.shape for _, grads in records.layers["conv"]] == [(N, 20, 4), (N, 6, 4)]
    assert [use.stride for use in records.uses["conv"]] == [(1, 1), (2, 2)]
    assert model.layers["conv"] == records.uses["conv"][0]


def test_the_weight_of_a_convolution_and_a_product_is_captured_in_both(lib):
    def loss(p, x):
        return scalar(lax.conv(x[..., None], p["w"][..., None], (1,), "SAME")) + scalar(jnp.tanh(x) @ p["w"].T)

    model, records = lib.captured(loss, {"w": lib.normal(1, 4, 2)}, lib.normal(0, N, 2))
    assert len(records.layers["w"]) == 2
    assert "convolution and in a product" in model.layout.reasons["w"]


def test_half_precision(lib):
    def loss(p, x):
        return scalar(affine(x.astype(jnp.bfloat16), jax.tree.map(lambda v: v.astype(jnp.bfloat16), p["conv"])).astype(jnp.float32))

    params, x = jax.tree.map(lambda v: v.astype("float32"), (first(lib), lib.normal(0, N, 2, 5, 6)))
    model = kfcore_jax.trace(loss, params, x)
    assert model.layout.sites["conv"][0].site.bias is not None
    assert model.check_capture(params, x, rtol=2e-2)["conv"] > 1e-9


def test_layers_around_a_convolution_keep_their_blocks(lib):
    def loss(p, x):
        h = jnp.tanh(affine(x, p["conv"])).reshape(len(x), -1)
        return scalar(h @ p["head"])

    model, _ = lib.captured(loss, first(lib) | {"head": lib.normal(3, 120, 3)}, lib.normal(0, N, 2, 5, 6))
    assert set(model.layers) == {"conv", "head"}
    assert model.layout.reasons["conv.weight"] == "convolution: conv.w"


NO_BLOCKS = {
    "over no axis": ((4, 2), (5, 2), ()),
    "over 4 axes": ((4, 2, 1, 2, 1, 2), (5, 2, 2, 3, 2, 3), (1, 1, 1, 1)),
    "that has no output": ((4, 2, 3), (5, 2, 2), (1,)),
}


@pytest.mark.parametrize(("kernel", "batch", "strides"), NO_BLOCKS.values(), ids=NO_BLOCKS)
def test_convolutions_without_a_block_have_a_reason(lib, kernel, batch, strides, request):
    def loss(p, x):
        return jnp.sum(jnp.sin(lax.conv(x, p["conv"], strides, "VALID"))) + jnp.sum(x)

    model = kfcore_jax.trace(loss, {"conv": lib.normal(1, *kernel)}, lib.normal(0, *batch))
    assert not model.layers
    words = request.node.callspec.id.replace("no axis", "0 axes")
    assert model.layout.reasons["conv"].startswith(f"convolution {words}")
    with pytest.raises(ValueError, match=f"`strict` is set.*{words}"):
        kfcore_jax.trace(loss, {"conv": lib.normal(1, *kernel)}, lib.normal(0, *batch), strict=True)


def test_rows_of_a_convolution_that_comes_last_are_the_terms(lib):
    params, x = first(lib) | {"in": lib.normal(3, 2, 2)}, lib.normal(0, N, 2, 5, 6)
    model = kfcore_jax.trace(lambda p, x: scalar(affine(jnp.einsum("nchw,cd->ndhw", x, p["in"]), p["conv"])), params, x)
    assert model.value_grad_and_records(params, x)[2].terms == N * 5 * 6


# ---- what is none


TRAPS = {
    "kernel_of_data": ("conv_general_dilated", lambda p, x: lax.conv(p["w"], x, (1, 1), "SAME")),
    "both_parameters": ("add", lambda p, x: lax.conv(p["w"], p["v"], (1, 1), "SAME")[0] + x),
    "made_of_the_kernel": ("conv_general_dilated", lambda p, x: lax.conv(x, 2 * p["w"], (1, 1), "SAME")),
    "part_of_the_kernel": ("conv_general_dilated", lambda p, x: lax.conv(x, p["w"][:, :, 1:], (1, 1), "SAME")),
    "repeated_kernel": (
        "conv_general_dilated",
        lambda p, x: lax.conv(x, jnp.broadcast_to(p["w"][:, :, :1, None], (4, 4, 3, 3, 3))[..., 0], (1, 1), "SAME"),
    ),
    "groups_of_the_batch": (
        "groups of the batch",
        lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", batch_group_count=4),
    ),
    "also_elsewhere": ("also used in mul", lambda p, x: lax.conv(x, p["w"], (1, 1), "SAME") * p["w"][0, 0, 0, 0]),
}


@pytest.mark.parametrize(("word", "net"), TRAPS.values(), ids=TRAPS)
def test_other_uses_are_not_captured_and_have_a_reason(lib, word, net):
    params = {"w": lib.normal(1, 4, 4, 3, 3), "v": lib.normal(2, 4, 4, 3, 3)}
    x = lib.normal(0, 4, 4, 3, 3)
    model, records = lib.captured(lambda p, x: scalar(net(p, x)) + jnp.sum(p["v"]), params, x)
    assert not records.layers
    assert word in model.layout.reasons["w"]


BIASES = {
    "of_every_place": ((4, 4, 4), lambda z, b: z + b),
    "along_a_row": ((4,), lambda z, b: z + b),
    "of_a_scaled_output": ((4,), lambda z, b: 2 * z + b[:, None, None]),
    "of_an_output_used_elsewhere": ((4,), lambda z, b: z * jnp.tanh(z + b[:, None, None])),
    "of_a_pooled_output": ((4,), lambda z, b: z.mean((2, 3)) + b),
}


@pytest.mark.parametrize(("shape", "add"), BIASES.values(), ids=BIASES)
def test_what_is_added_otherwise_is_no_bias(lib, shape, add):
    params = {"conv": lib.normal(1, 4, 2, 3, 3), "b": lib.normal(2, *shape)}
    model, _ = lib.captured(lambda p, x: scalar(add(lax.conv(x, p["conv"], (1, 1), "SAME"), p["b"])), params, lib.normal(0, N, 2, 4, 4))
    assert model.layout.sites["conv"][0].site.bias is None
    assert model.layers["b"] == Norm(shape if len(shape) > 1 else shape[0], bias=False)


def test_a_bias_of_the_channels_in_another_order_falls_back(lib):
    params = {"conv": lib.normal(1, 4, 2, 3, 3), "b": lib.normal(2, 4)}
    z = lambda p, x: lax.conv(x, p["conv"], (1, 1), "SAME") + p["b"][::-1][:, None, None]  # noqa: E731
    model, _ = lib.captured(lambda p, x: scalar(z(p, x)), params, lib.normal(0, N, 2, 4, 4))
    assert "add" in model.layout.reasons["b"]


# ---- the check itself


@pytest.mark.parametrize("part", [0, 1], ids=["inputs", "output_grads"])
def test_an_error_of_one_percent_in_a_record_is_caught(lib, part, monkeypatch):
    params, x = first(lib), lib.normal(0, N, 2, 5, 6)
    model, _ = lib.captured(lambda p, x: scalar(affine(x, p["conv"])), params, x)
    whole = model.capture

    def off(*args):
        value, grads, records = whole(*args)
        ((inputs, dy),) = records.layers["conv"]
        records.layers["conv"] = [(1.01 * inputs, dy) if part == 0 else (inputs, 1.01 * dy)]
        return value, grads, records

    monkeypatch.setattr(model, "capture", off)
    with pytest.raises(AssertionError, match=r"differ from autodiff's in conv \(1\.0e-02\)"):
        model.check_capture(params, x)


def test_a_program_that_is_another_for_other_shapes_is_refused(lib):
    def loss(p, x):
        return scalar(affine(x, p["conv"]) if len(x) == N else affine(x, jax.tree.map(jnp.sin, p["conv"])))

    params, x = first(lib), lib.normal(0, N, 2, 5, 6)
    model, _ = lib.captured(loss, params, x)
    with pytest.raises(ValueError, match="no longer uses conv"):
        model.capture(params, x[:2])


def test_another_batch_size_needs_no_new_trace(lib):
    params, x = first(lib), lib.normal(0, N, 2, 5, 6)
    model, _ = lib.captured(lambda p, x: scalar(affine(x, p["conv"])), params, x)
    assert model.check_capture(params, x[:2], rtol=1e-9).keys() == {"conv"}


def test_nothing_is_paid_for_what_has_no_layer(lib):
    x = lib.normal(0, N, 2, 5, 6)
    params = {"table": lib.normal(1, 4, 2)}

    def loss(p, x):
        return scalar(p["table"][jnp.argmax(x[:, :, 0, 0], axis=1)] @ p["table"].T)

    model = kfcore_jax.trace(loss, params, x)
    plain, asked, bare = (
        len(jax.make_jaxpr(f)(params, x).eqns) for f in (model.value_grad_and_records, model.capture, jax.value_and_grad(loss))
    )
    assert plain == bare < asked
