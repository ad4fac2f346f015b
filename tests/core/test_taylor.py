"""Derivatives through networks against contour integrals, and their reverse pass against imaginary steps through the forward pass."""

import math

import array_api_strict as strict
import numpy as np
import pytest

import kfcore as kf
from kfcore import taylor
from kfcore import testing as kt

RTOL = 1e-11


def parameters(rng, network, scale=0.5):
    return {k: {r: scale * rng.normal(size=s) for r, s in layer.parameters.items()} for k, layer in network.layers.items()}


def evaluate(network, params, x):
    """The network by itself, with complex numbers too."""
    for step in network.steps:
        if isinstance(step, taylor.Activation):
            x = step(np, x, 0)[0]
        else:
            p = params[step[0]]
            x = x @ step[1].to_oi(p["weight"]).T + p.get("bias", 0.0)
    return x


def along(f, x, v, order, radius=0.3, points=64):
    """``D_v^order f`` at the points ``x``, by Cauchy's formula on a circle around each."""
    turns = np.exp(2j * np.pi * np.arange(points) / points)
    values = f(x[:, None] + radius * turns[:, None] * v)
    return math.factorial(order) * (values * turns[:, None] ** -order).mean(axis=1).real / radius**order


def mixed(f, x, v, w):
    """``D_v D_w f``."""
    return 0.25 * (along(f, x, v + w, 2, 0.15) - along(f, x, v - w, 2, 0.15))


def close(x, desired, rtol=RTOL):
    assert np.shape(x) == np.shape(desired)
    assert np.abs(x - desired).max() <= rtol * max(1.0, np.abs(desired).max())


def point_gradients(p, params, x, cotangents, **given):
    """Of ``sum cotangents jet`` by ``[W b]`` at each point, by imaginary steps through the forward pass."""
    found = {}
    for name, layer in p.network.layers.items():
        found[name] = np.zeros((len(x), layer.out_features, layer.in_features + bool(layer.bias)))
        for role, array in params[name].items():
            for entry in np.ndindex(array.shape):
                moved = {k: {r: a.astype(complex) for r, a in roles.items()} for k, roles in params.items()}
                moved[name][role][entry] += 1e-30j
                jet = p.jet(moved, x.astype(complex), **given)
                pairs = [(cotangents.value, jet.value), (cotangents.first, jet.first)]
                pairs += [(c, jet.operators[k]) for k, c in cotangents.operators.items()]
                total = sum((c * a).reshape(len(x), -1).sum(axis=-1) for c, a in pairs if c is not None)
                place = (entry if layer.layout == "oi" else entry[::-1]) if role == "weight" else (*entry, -1)
                found[name][(slice(None), *place)] = total.imag / 1e-30
    return found


def check_reverse(p, params, x, cotangents, used=None, seen=None, **given):
    """The gradient of each point is ``sum_s g_s [z_s, o_s]^T``, from live columns and from all; their sum is :meth:`gradients`."""
    _, trace = p.forward(params, x, **given)
    desired = point_gradients(p, params, x, cotangents if seen is None else seen, **given)
    for kind in ("live", "all"):
        columns = p.reverse(params, trace, cotangents, used=used, columns=kind)
        for name, layer in p.network.layers.items():
            close(np.swapaxes(columns[name].output_grads, -1, -2) @ columns[name].rows(bool(layer.bias)), desired[name])
        for name, roles in p.gradients(columns).items():
            layer = p.network.layers[name]
            close(layer.to_oi(roles["weight"]), desired[name].sum(axis=0)[:, : layer.in_features])
            if layer.bias:
                close(roles["bias"], desired[name].sum(axis=0)[:, -1])
    return columns


def cotangents_of(rng, jet):
    return taylor.Jet(*(rng.normal(size=part.shape) for part in jet[:2]), {k: rng.normal(size=a.shape) for k, a in jet.operators.items()})


EVERY = {
    "laplacian": taylor.laplacian(3),
    "partial": taylor.laplacian(3, of=(1, 2)),
    "matrix": taylor.Weighted([[1.0, 2.0, 0.0], [0.0, -3.0, 0.5], [1.0, 0.0, 0.0]]),
    "hessian": taylor.Hessian(),
    "each": taylor.Each(),
    "diagonal at points": taylor.Pointwise(),
    "matrix at points": taylor.Pointwise("matrix"),
    "third": taylor.Weighted((1.0, 0.0, -0.5), 3),
    "fourth": taylor.Weighted((0.0, 2.0, 1.0), 4),
    "each third": taylor.Each(3),
    "fourth at points": taylor.Pointwise(order=4),
}


def everything(rng, n=4):
    p = taylor.Propagation(taylor.Sequential.mlp((3, 5, 4, 2)), taylor.Derivatives(3, operators=EVERY))
    shapes = {"diagonal at points": (n, 3), "matrix at points": (n, 3, 3), "fourth at points": (n, 3)}
    return p, parameters(rng, p.network), rng.normal(size=(n, 3)), {"coefficients": {k: rng.normal(size=s) for k, s in shapes.items()}}


class TestJet:
    def test_every_operator(self, rng):
        p, params, x, given = everything(rng)
        jet, _ = p.forward(params, x, **given)
        axes, c = np.eye(3), given["coefficients"]

        def f(x):
            return evaluate(p.network, params, x)

        hessian = np.stack([np.stack([mixed(f, x, v, w) for w in axes], 1) for v in axes], 1)
        pure = {m: np.stack([along(f, x, v, m) for v in axes], 1) for m in (1, 2, 3, 4)}
        close(jet.value, f(x))
        close(jet.first, pure[1])
        desired = {
            "laplacian": pure[2].sum(axis=1),
            "partial": pure[2][:, 1:].sum(axis=1),
            "matrix": np.einsum("kl,nklo->no", EVERY["matrix"].coefficients, hessian),
            "hessian": hessian,
            "each": pure[2],
            "diagonal at points": np.einsum("nk,nko->no", c["diagonal at points"], pure[2]),
            "matrix at points": np.einsum("nkl,nklo->no", c["matrix at points"], hessian),
            "third": pure[3][:, 0] - 0.5 * pure[3][:, 2],
            "fourth": 2.0 * pure[4][:, 1] + pure[4][:, 2],
            "each third": pure[3],
            "fourth at points": np.einsum("nk,nko->no", c["fourth at points"], pure[4]),
        }
        for name, value in desired.items():
            close(jet.operators[name], value, 1e-10)
        assert jet.laplacian is jet.operators["laplacian"]
        for (_, a), (_, b) in zip(kt.backend.leaves(jet), kt.backend.leaves(p.jet(params, x, **given)), strict=True):
            assert np.array_equal(a, b)

    def test_collapsed_or_not_is_the_same(self, rng):
        """The Laplacian as one column, as a weighted sum, at points, from a low rank, and summed up from the diagonal and the Hessian."""
        eye = np.eye(3).tolist()
        every = {"laplacian": taylor.laplacian(3), "each": taylor.Each(), "hessian": taylor.Hessian(), "matrix": taylor.Weighted(eye)}
        every |= {"diagonal": taylor.Pointwise(), "full": taylor.Pointwise("matrix")}
        network = taylor.Sequential.mlp((3, 6, 5, 1), "gelu")
        params, x = parameters(rng, network), rng.normal(size=(5, 3))
        given = {"diagonal": np.ones((5, 3)), "full": np.broadcast_to(np.eye(3), (5, 3, 3))}
        found = taylor.Propagation(network, taylor.Derivatives(3, operators=every)).jet(params, x, coefficients=given).operators
        factored = taylor.Propagation(network, taylor.Derivatives.factored(eye)).jet(params, x).operators["operator"]
        for other in (
            found["each"].sum(axis=1),
            np.einsum("nkko->no", found["hessian"]),
            *(found[k] for k in ("matrix", "diagonal", "full")),
            factored,
        ):
            close(other, found["laplacian"], 1e-14)

    def test_low_rank_and_indefinite(self, rng):
        """Constant, and of each point's own: as many directions as the rank, and the same operator as from all coordinates."""
        left = rng.normal(size=(4, 2))
        matrix = left @ np.diag([1.0, -1.0]) @ left.T
        low = taylor.Derivatives.factored(matrix + np.triu(np.ones((4, 4)), 1) - np.tril(np.ones((4, 4)), -1), "c")
        assert low.count == 2
        network = taylor.Sequential.mlp((4, 5, 1), "softplus")
        params, x = parameters(rng, network), rng.normal(size=(6, 4))
        full = taylor.Derivatives(4, operators={"c": taylor.Weighted(matrix), "at": taylor.Pointwise("matrix")})
        sigma = rng.normal(size=(6, 4, 2))
        desired = taylor.Propagation(network, full).jet(params, x, coefficients={"at": sigma @ np.swapaxes(sigma, 1, 2)})
        close(taylor.Propagation(network, low).jet(params, x).operators["c"], desired.operators["c"])
        own = taylor.Derivatives(4, taylor.PointwiseDirections(2), {"at": taylor.laplacian(2)})
        found = taylor.Propagation(network, own).jet(params, x, directions=np.swapaxes(sigma, 1, 2))
        close(found.operators["at"], desired.operators["at"])
        close(found.first, np.einsum("ndk,ndo->nko", sigma, desired.first))

    def test_biharmonic_from_directions(self, rng):
        """``sum_ij d_i^2 d_j^2`` from fourth derivatives along coordinates and their sums and differences, in one column."""
        directions, weights = [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, -1.0)], [1.0 - 1.0 / 3.0, 1.0 - 1.0 / 3.0, 1.0 / 6.0, 1.0 / 6.0]
        derivatives = taylor.Derivatives(2, directions, {"biharmonic": taylor.Weighted(weights, 4)})
        network = taylor.Sequential([("a", kf.Linear(2, 2)), "sin", ("b", kf.Linear(2, 1))])
        params = {
            "a": {"weight": rng.normal(size=(2, 2)), "bias": rng.normal(size=2)},
            "b": {"weight": np.ones((1, 2)), "bias": np.zeros(1)},
        }
        x = rng.normal(size=(5, 2))
        w = params["a"]["weight"]
        desired = np.sin(x @ w.T + params["a"]["bias"]) @ ((w**2).sum(axis=1) ** 2)[:, None]
        close(taylor.Propagation(network, derivatives).jet(params, x).operators["biharmonic"], desired)

    def test_coordinates_that_enter_no_derivative(self, rng):
        network = taylor.Sequential.mlp((3, 4, 2))
        params, x = parameters(rng, network), rng.normal(size=(5, 3))
        every = taylor.Propagation(network, taylor.Derivatives(3, operators={"each": taylor.Each()})).jet(params, x)
        some = taylor.Propagation(network, taylor.Derivatives(3, (2, 0), {"each": taylor.Each()})).jet(params, x)
        close(some.first, every.first[:, [2, 0]])
        close(some.operators["each"], every.operators["each"][:, [2, 0]])
        alone = taylor.Propagation(network, taylor.Derivatives(3, ())).jet(params, x)
        close(alone.value, every.value)
        assert alone.first.shape == (5, 0, 2)
        assert alone.operators == {}

    def test_any_chain(self, rng):
        """Activations first, last, two in a row, layers without a bias, layers in a row, either layout."""
        layers = [kf.Linear(2, 4, None), kf.Linear(4, 3, layout="io"), kf.Linear(3, 2, "separate")]
        network = taylor.Sequential(
            ["sin", ("a", layers[0]), ("b", layers[1]), "tanh", taylor.ACTIVATIONS["sin"].scaled(0.7), ("c", layers[2]), "tanh"]
        )
        p = taylor.Propagation(network, taylor.Derivatives(2, operators={"each": taylor.Each(4), "laplacian": taylor.laplacian(2)}))
        params, x = parameters(rng, network), rng.normal(size=(4, 2))
        jet = p.jet(params, x)
        for k, v in enumerate(np.eye(2)):
            close(jet.operators["each"][:, k], along(lambda x: evaluate(network, params, x), x, v, 4), 1e-10)
        check_reverse(p, params, x, cotangents_of(rng, jet))

    def test_a_linear_net_has_no_second_derivatives(self, rng):
        network = taylor.Sequential.mlp((2, 3, 1), "identity")
        p = taylor.Propagation(network, taylor.Derivatives(2, operators={"laplacian": taylor.laplacian(2), "fourth": taylor.Each(4)}))
        params, x = parameters(rng, network), rng.normal(size=(4, 2))
        jet, trace = p.forward(params, x)
        assert not jet.laplacian.any()
        assert jet.operators["fourth"].shape == (4, 2, 1)
        close(jet.first[0], (params["fc2"]["weight"] @ params["fc1"]["weight"]).T)
        check_reverse(p, params, x, cotangents_of(rng, jet))
        none = p.reverse(params, trace, taylor.Jet(None, None, {"laplacian": jet.value}))
        assert all(c.inputs.shape[1] == c.output_grads.shape[1] == 0 for c in none.values())
        assert not p.gradients(none)["fc1"]["weight"].any()

    def test_values_are_not_mixed_between_points(self, rng):
        p, params, x, given = everything(rng)
        order = rng.permutation(len(x))
        moved = p.jet(params, x[order], coefficients={k: c[order] for k, c in given["coefficients"].items()})
        for (_, a), (_, b) in zip(kt.backend.leaves(moved), kt.backend.leaves(p.jet(params, x, **given)), strict=True):
            close(a, b[order], 1e-14)


class TestReverse:
    def test_everything_together(self, rng):
        p, params, x, given = everything(rng)
        check_reverse(p, params, x, cotangents_of(rng, p.jet(params, x, **given)), **given)

    @pytest.mark.parametrize("name", [*EVERY, "value", "first"])
    def test_one_at_a_time(self, rng, name):
        """What is ``None`` or not there has no cotangent, and what is not used is not looked at."""
        p, params, x, given = everything(rng, 2)
        whole = cotangents_of(rng, p.jet(params, x, **given))
        alone = taylor.Jet(
            *(c if k == name else None for k, c in zip(("value", "first"), whole[:2], strict=True)),
            {k: c for k, c in whole.operators.items() if k == name},
        )
        check_reverse(p, params, x, alone, **given)
        spoilt = whole._replace(
            value=whole.value if name == "value" else np.nan * whole.value,
            first=whole.first if name == "first" else np.nan * whole.first,
            operators={k: c if k == name else np.nan * c for k, c in whole.operators.items()},
        )
        check_reverse(p, params, x, spoilt, used=(name,), seen=alone, **given)

    def test_a_column_of_many(self, rng):
        """Of the gradient only the time derivative, as in the heat equation: the last layer keeps two columns."""
        p = taylor.Propagation(
            taylor.Sequential.mlp((3, 5, 4, 1)), taylor.Derivatives(3, operators={"laplacian": taylor.laplacian(3, of=(1, 2))})
        )
        params, x = parameters(rng, p.network), rng.normal(size=(4, 3))
        first = np.zeros((4, 3, 1))
        first[:, 0] = 1.0
        heat = taylor.Jet(None, first, {"laplacian": np.full((4, 1), -0.25)})
        used = ("first[0]", "laplacian")
        live = {"fc1": p.columns[:4], "fc2": p.columns, "fc3": used}
        assert p.live_columns(used) == live
        _, trace = p.forward(params, x)
        assert (
            {k: v.shape[1] for k, v in trace.inputs.items()}
            == {k: len(v) for k, v in p.input_columns.items()}
            == {"fc1": 4, "fc2": 5, "fc3": 5}
        )
        columns = p.reverse(params, trace, heat, used=used)
        assert {k: c.inputs.shape[1] for k, c in columns.items()} == {k: len(v) for k, v in live.items()}
        assert [c.ones.tolist() for c in columns.values()] == [[1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0]]
        whole = p.reverse(params, trace, heat, columns="all")
        for name, labels in live.items():
            places = [p.columns.index(label) for label in labels]
            close(columns[name].inputs, whole[name].inputs[:, places], 0.0)
            close(columns[name].output_grads, whole[name].output_grads[:, places], 1e-15)
        check_reverse(p, params, x, heat, used=used)

    @pytest.mark.parametrize("order", [3, 4])
    def test_orders_among_other_directions(self, rng, order):
        """A high derivative along one direction carries the lower ones of that one, in no place of their own if wanted anyway."""
        every = {
            "high": taylor.Weighted((0.0, 0.0, 1.0), order),
            "low": taylor.Weighted((0.0, 0.0, 1.0)),
            "mixed": taylor.Weighted(1.0 - np.eye(3)),
        }
        p = taylor.Propagation(taylor.Sequential.mlp((3, 4, 3, 1)), taylor.Derivatives(3, operators=every))
        assert p.columns[4:] == ("low", "mixed", *(["high"] if order == 3 else ["D3[2]", "high"]))
        params, x = parameters(rng, p.network), rng.normal(size=(3, 3))
        jet = p.jet(params, x)
        close(jet.operators["high"], along(lambda x: evaluate(p.network, params, x), x, np.eye(3)[2], order), 1e-10)
        check_reverse(p, params, x, cotangents_of(rng, jet))
        assert p.live_columns(("low",))["fc2"] == ("value", "first[2]", "low")

    def test_several_quantities_at_once(self, rng):
        p, params, x, given = everything(rng)
        jet, trace = p.forward(params, x, **given)
        each = [cotangents_of(rng, jet) for _ in range(3)]
        stacked = taylor.Jet(
            *(np.stack([c[i] for c in each]) for i in range(2)), {k: np.stack([c.operators[k] for c in each]) for k in EVERY}
        )
        together, weights = p.reverse(params, trace, stacked), rng.normal(size=(3, len(x)))
        apart = [p.reverse(params, trace, c) for c in each]
        for name, columns in together.items():
            close(columns.output_grads, np.stack([a[name].output_grads for a in apart]), 1e-14)
        total = p.gradients(together, weights)
        for name, roles in total.items():
            for role, value in roles.items():
                close(value, sum(p.gradients(a, w)[name][role] for a, w in zip(apart, weights, strict=True)), 1e-13)

    def test_hidden_units_in_another_order(self, rng):
        """Permuting the units of a layer permutes what it saw and gave."""
        p = taylor.Propagation(
            taylor.Sequential.mlp((2, 5, 4, 1), "silu"), taylor.Derivatives(2, operators={"laplacian": taylor.laplacian(2)})
        )
        params, x, order = parameters(rng, p.network), rng.normal(size=(4, 2)), rng.permutation(5)
        moved = params | {
            "fc1": {"weight": params["fc1"]["weight"][order], "bias": params["fc1"]["bias"][order]},
            "fc2": params["fc2"] | {"weight": params["fc2"]["weight"][:, order]},
        }
        one = taylor.Jet(None, None, {"laplacian": np.ones((4, 1))})
        before, after = (p.reverse(q, p.forward(q, x)[1], one, columns="all") for q in (params, moved))
        close(after["fc1"].output_grads, before["fc1"].output_grads[..., order], 1e-14)
        close(after["fc2"].inputs, before["fc2"].inputs[..., order], 1e-14)
        close(after["fc3"].output_grads, before["fc3"].output_grads, 1e-14)

    def test_poisson_leaves_one_exact_block(self, rng):
        """Of the last layer only the Laplacian's column is live, its output gradient is 1, and one Kronecker product is the exact Gramian.

        All S columns, as the paper takes them, are far from it.
        """
        p = taylor.Propagation(taylor.Sequential.mlp((2, 6, 5, 1)), taylor.Derivatives(2, operators={"laplacian": taylor.laplacian(2)}))
        params, x = parameters(rng, p.network), rng.normal(size=(6, 2))
        _, trace = p.forward(params, x)
        poisson = taylor.Jet(None, None, {"laplacian": np.ones((6, 1))})
        off = {}
        for kind in ("live", "all"):
            columns = p.reverse(params, trace, poisson, columns=kind)["fc3"]
            rows, g = columns.rows(), columns.output_grads
            each = (np.swapaxes(g, 1, 2) @ rows).reshape(6, -1)
            exact = each.T @ each / 6
            block = np.einsum("nsi,nsj->ij", rows, rows) / (6 * rows.shape[1]) * np.einsum("nsi,nsj->ij", g, g) / 6
            off[kind] = np.linalg.norm(block - exact) / np.linalg.norm(exact)
        assert off["live"] < 1e-14 < 0.3 < off["all"]


class TestActivations:
    @pytest.mark.parametrize("name", taylor.ACTIVATIONS)
    def test_own_ones(self, name):
        kt.check_activation(name)
        kt.check_activation(taylor.ACTIVATIONS[name].scaled(-1.5))

    def test_tails(self):
        z = np.array([-1e4, -40.0, 40.0, 1e4])
        for name in taylor.ACTIVATIONS:
            found = taylor.ACTIVATIONS[name](np, z, 5)
            assert all(np.isfinite(s).all() for s in found), name
        p, slope, curved = taylor.ACTIVATIONS["sigmoid"](np, z, 2)
        small = np.exp(-40.0)
        assert np.allclose(p[:2], [0.0, small], rtol=1e-13, atol=0.0)
        assert np.allclose(slope, [0.0, small, small, 0.0], rtol=1e-13, atol=0.0)
        assert np.allclose(curved, [0.0, small, -small, 0.0], rtol=1e-13, atol=0.0)

    def test_one_of_a_user(self, rng):
        """With as many derivatives as it is asked for, and no more: the Laplacian takes two, its reverse pass three."""

        def gaussian(xp, z, order):
            s = xp.exp(-0.5 * z * z)
            return [s, -z * s, (z * z - 1.0) * s, (3.0 - z * z) * z * s][: order + 1]

        made = taylor.Activation("gaussian", gaussian, highest=3)
        kt.check_activation(made)
        p = taylor.Propagation(taylor.Sequential.mlp((2, 4, 1), made), taylor.Derivatives(2, operators={"laplacian": taylor.laplacian(2)}))
        params, x = parameters(rng, p.network), rng.normal(size=(3, 2))
        check_reverse(p, params, x, cotangents_of(rng, p.jet(params, x)))

    @pytest.mark.parametrize("wrong", [1, 2, 3])
    def test_a_wrong_one_is_found(self, wrong):
        def derived(xp, z, order):
            s = taylor.ACTIVATIONS["tanh"](xp, z, order)
            return [1.00001 * d if k == wrong else d for k, d in enumerate(s)]

        with pytest.raises(AssertionError, match=rf"derivative {wrong} is off"):
            kt.check_activation(taylor.Activation("wrong", derived))

    def test_one_that_depends_on_the_order_is_found(self):
        def derived(xp, z, order):
            return [s * (1.0 + 1e-6 * order) for s in taylor.ACTIVATIONS["tanh"](xp, z, order)]

        with pytest.raises(AssertionError, match="derivative 0 of 0"):
            kt.check_activation(taylor.Activation("wrong", derived))


NET = taylor.Sequential.mlp((2, 3, 1))
LAPLACE = taylor.Derivatives(2, operators={"laplacian": taylor.laplacian(2)})
POINTWISE = taylor.Derivatives(2, taylor.PointwiseDirections(3), {"c": taylor.Pointwise()})


def short(highest):
    return taylor.Activation("short", taylor.ACTIVATIONS["tanh"].derived, highest)


class TestWrongCalls:
    @pytest.mark.parametrize(
        ("make", "word"),
        [
            (lambda: taylor.Weighted([[1.0, 2.0]]), "`coefficients` of Weighted"),
            (lambda: taylor.Weighted([0.0, 0.0]), "not all zero"),
            (lambda: taylor.Weighted([1.0, np.nan]), "finite"),
            (lambda: taylor.Weighted(["a"]), "numbers"),
            (lambda: taylor.Weighted([[1.0, 0.0], [0.0, 1.0]], 4), "for order 4"),
            (lambda: taylor.Weighted([1.0], 5), "`order` of Weighted"),
            (lambda: taylor.Each(1), "`order` of Each"),
            (lambda: taylor.Pointwise("low rank"), "`form`"),
            (lambda: taylor.Pointwise("matrix", 3), "`order` of Pointwise must be 2"),
            (lambda: taylor.laplacian(2, of=(2,)), "`of`"),
            (lambda: taylor.Derivatives(0), "`inputs`"),
            (lambda: taylor.Derivatives(2, (0, 0)), "different coordinates"),
            (lambda: taylor.Derivatives(2, (2,)), "from 0 to 1"),
            (lambda: taylor.Derivatives(2, ((1.0, 0.0, 0.0),)), "vectors of 2"),
            (lambda: taylor.Derivatives(2, taylor.PointwiseDirections(0)), "`count`"),
            (lambda: taylor.Derivatives(2, (), {"each": taylor.Each()}), "`directions` must not be empty"),
            (lambda: taylor.Derivatives(2, None, {"laplacian": taylor.laplacian(3)}), "'laplacian' must be 2"),
            (lambda: taylor.Derivatives(2, None, {"first": taylor.Each()}), "named"),
            (lambda: taylor.Derivatives.factored([[0.0, 1.0], [-1.0, 0.0]]), "not zero"),
            (lambda: taylor.Sequential(["tanh"]), "dense layers"),
            (lambda: taylor.Sequential([("a", kf.Linear(2, 3)), ("a", kf.Linear(3, 1))]), "different names"),
            (lambda: taylor.Sequential([("a", kf.Linear(2, 3)), ("b", kf.Linear(2, 1))]), "fit together"),
            (lambda: taylor.Sequential([("a", kf.Linear(2, 3, stack=(2,))), ("b", kf.Linear(3, 1))]), "`stack`"),
            (lambda: taylor.Sequential.mlp((2, 3, 1), "softsign"), "`activation` must be one of gelu"),
            (lambda: taylor.relu_power(0), "`power`"),
            (lambda: taylor.Activation("", abs), "`name`"),
            (lambda: taylor.Activation("a", abs, 0), "`highest`"),
            (lambda: taylor.Propagation(taylor.Sequential.mlp((3, 1)), LAPLACE), "`inputs` of Derivatives"),
            (lambda: taylor.Propagation(taylor.Sequential.mlp((2, 3, 1), short(1)), LAPLACE), "`highest` of activation 'short'"),
        ],
    )
    def test_values(self, make, word):
        with pytest.raises(ValueError, match=word):
            make()

    @pytest.mark.parametrize(
        "make",
        [
            lambda: taylor.Sequential([("conv", kf.Conv(2, 3, (1,)))]),
            lambda: taylor.Activation("a", 3),
            lambda: taylor.Derivatives(2, None, {"laplacian": (1.0, 1.0)}),
            lambda: taylor.Propagation([("a", kf.Linear(2, 1))], LAPLACE),
        ],
    )
    def test_types(self, make):
        with pytest.raises(TypeError, match="`"):
            make()

    @pytest.mark.parametrize(
        ("change", "error", "word"),
        [
            ({"x": np.zeros((4, 3))}, ValueError, "`x` must have shape"),
            ({"x": np.zeros(2)}, ValueError, "`x` must have shape"),
            ({"x": np.zeros((4, 2), dtype=np.float32)}, TypeError, "dtype of the parameters"),
            ({"x": np.zeros((4, 2), dtype=int)}, TypeError, "floating"),
            ({"x": strict.zeros((4, 2))}, TypeError, "one array-API library"),
            ({"params": {}}, ValueError, "`params` of layer 'fc1'"),
            ({"coefficients": {"c": np.zeros((4, 2))}}, ValueError, "`coefficients` must have the shapes"),
            ({"coefficients": {"d": np.zeros((4, 3))}}, ValueError, "`coefficients` must have the shapes"),
            ({"coefficients": None}, ValueError, "`coefficients` must have the shapes"),
            ({"directions": None}, ValueError, "`directions` must be an array"),
            ({"directions": np.zeros((4, 2, 2))}, ValueError, "`directions` must be an array"),
        ],
    )
    def test_forward(self, rng, change, error, word):
        good = {
            "params": parameters(rng, NET),
            "x": np.zeros((4, 2)),
            "coefficients": {"c": np.zeros((4, 3))},
            "directions": np.zeros((4, 3, 2)),
        }
        p = taylor.Propagation(NET, POINTWISE)
        p.forward(**good)
        for call in (p.forward, p.jet):
            with pytest.raises(error, match=word):
                call(**good | change)
        with pytest.raises(ValueError, match="`directions` must be None"):
            taylor.Propagation(NET, LAPLACE).forward(good["params"], good["x"], directions=good["directions"])

    def test_reverse(self, rng):
        p, params = taylor.Propagation(NET, LAPLACE), parameters(rng, NET)
        jet, trace = p.forward(params, np.zeros((4, 2)))
        for cotangents, options, word in (
            (taylor.Jet(), {}, "everywhere"),
            (taylor.Jet(jet.value), {"used": ("laplacian",)}, "everywhere"),
            (taylor.Jet(jet.value), {"used": ("gradient",)}, "`used` must name"),
            (taylor.Jet(jet.value), {"columns": "some"}, "`columns`"),
            (taylor.Jet(jet.value[:2]), {}, "'value' must have shape"),
            (taylor.Jet(jet.value[None], jet.first), {}, "same leading axes"),
            (taylor.Jet(None, jet.value), {}, "'first' must have shape"),
            (taylor.Jet(None, None, {"heat": jet.value}), {}, "got heat"),
        ):
            with pytest.raises(ValueError, match=word):
                p.reverse(params, trace, cotangents, **options)
        p = taylor.Propagation(taylor.Sequential.mlp((2, 3, 1), short(2)), LAPLACE)
        with pytest.raises(ValueError, match="must be at least 3 for the reverse pass"):
            p.reverse(params, p.forward(params, np.zeros((4, 2)))[1], taylor.Jet(None, None, {"laplacian": jet.value}))

    def test_an_activation_that_returns_too_little(self, rng):
        few = taylor.Activation("few", lambda xp, z, order: [z])
        with pytest.raises(ValueError, match="must return 3 arrays"):
            taylor.Propagation(taylor.Sequential.mlp((2, 3, 1), few), LAPLACE).jet(parameters(rng, NET), np.zeros((4, 2)))


def test_configurations_are_values():
    """Equal where they say the same, hashable, and free of what was found from them."""
    again = taylor.Derivatives(2, (0, 1), {"laplacian": taylor.Weighted([1, 1])})
    assert again == LAPLACE
    assert hash(taylor.Propagation(NET, again)) == hash(taylor.Propagation(NET, LAPLACE))
    assert taylor.Derivatives(2) != LAPLACE
    assert "plan" not in repr(LAPLACE)
