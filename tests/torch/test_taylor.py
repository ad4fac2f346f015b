"""Derivatives through networks in PyTorch: residuals of differential equations, their gradients point by point, and transforms."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import func  # noqa: E402

from kfcore import taylor  # noqa: E402

# forward-mode derivatives of torch.func compile their decompositions on first use
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

N, D = 5, 3
NETWORK = taylor.Sequential.mlp((D, 6, 5, 1))


@pytest.fixture
def arrays():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = {k: {r: 0.7 * normal(*s) for r, s in layer.parameters.items()} for k, layer in NETWORK.layers.items()}
    return params, normal(N, D)


def network(params, z):
    """``u [N]`` by PyTorch's own layers."""
    for name, p in params.items():
        z = torch.nn.functional.linear(z, p["weight"], p["bias"])
        z = z if name == "fc3" else torch.tanh(z)
    return z[..., 0]


# residuals of u, its gradient, its Laplacian over the coordinates named, and the point; coordinate 0 is time in the last two
EQUATIONS = {
    "poisson": ((0, 1, 2), ("laplacian",), lambda u, du, lu, x: lu + torch.sin(x).sum(dim=-1)),
    "heat": ((1, 2), ("first[0]", "laplacian"), lambda u, du, lu, x: du[..., 0] - 0.25 * lu),
    "log-fokker-planck": (
        (1, 2),
        ("first", "laplacian"),
        lambda u, du, lu, x: du[..., 0] - 1.0 - 0.5 * (x * du)[..., 1:].sum(dim=-1) - (du[..., 1:] ** 2).sum(dim=-1) - lu,
    ),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_gradients_of_residuals(arrays, equation):
    """``dr_n / d[W b] = sum_s g_s [z_s, o_s]^T``, and with weights ``r_n / N`` the gradient of ``1 / (2 N) sum r_n^2``."""
    params, x = arrays
    of, used, residual = EQUATIONS[equation]

    def by_autograd(params, x):
        def u(x):
            return network(params, x)

        def one(z):
            return residual(u(z), func.grad(u)(z), func.hessian(u)(z).diagonal()[list(of)].sum(), z)

        return func.vmap(one)(x)

    r, each = by_autograd(params, x), func.jacrev(by_autograd)(params, x)
    loss = func.grad(lambda params: 0.5 * (by_autograd(params, x) ** 2).mean())(params)

    p = taylor.Propagation(NETWORK, taylor.Derivatives(D, operators={"laplacian": taylor.laplacian(D, of=of)}))
    jet, trace = p.forward(params, x)
    parts = [a.squeeze(-1).requires_grad_() for a in (jet.value, jet.first, jet.laplacian)]
    mine = residual(*parts, x)
    torch.testing.assert_close(mine, r, rtol=1e-12, atol=1e-12)
    cotangents = [None if g is None else g.unsqueeze(-1) for g in torch.autograd.grad(mine.sum(), parts, allow_unused=True)]
    for options in ({"used": used}, {}, {"columns": "all"}):
        columns = p.reverse(params, trace, taylor.Jet(cotangents[0], cotangents[1], {"laplacian": cotangents[2]}), **options)
        for name, c in columns.items():
            desired = torch.cat([each[name]["weight"], each[name]["bias"].unsqueeze(-1)], dim=-1)
            torch.testing.assert_close(c.output_grads.mT @ c.rows(), desired, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(p.gradients(columns, mine.detach() / N), loss, rtol=1e-12, atol=1e-12)
    if equation == "poisson":
        assert columns["fc3"].output_grads[:, -1].tolist() == [[1.0]] * N
        assert not columns["fc3"].output_grads[:, :-1].any()


def test_autograd_goes_through_it(arrays):
    """The reverse pass by hand gives what autograd gives, for every activation that PyTorch users have."""
    _, x = arrays
    for name in ("tanh", "sin", "gelu", "silu", "softplus", "sigmoid", "relu^3"):
        p = taylor.Propagation(
            taylor.Sequential.mlp((D, 4, 1), name),
            taylor.Derivatives(D, operators={"laplacian": taylor.laplacian(D), "third": taylor.Weighted((1.0, 0.0, 0.0), 3)}),
        )
        generator = torch.Generator().manual_seed(1)
        params = {
            k: {r: torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for r, s in layer.parameters.items()}
            for k, layer in p.network.layers.items()
        }
        jet, trace = p.forward(params, x)
        (jet.laplacian.sum() + 2.0 * jet.operators["third"].sum() + jet.first.sum() + jet.value.sum()).backward()
        ones = torch.ones(N, 1, dtype=torch.float64)
        with torch.no_grad():
            cotangents = taylor.Jet(ones, torch.ones(N, D, 1, dtype=torch.float64), {"laplacian": ones, "third": 2.0 * ones})
            for layer, roles in p.gradients(p.reverse(params, trace, cotangents)).items():
                for role, g in roles.items():
                    torch.testing.assert_close(g, params[layer][role].grad, rtol=1e-11, atol=1e-11)


def test_vmap_and_autodiff_of_torch_func(arrays):
    """Points one by one, and directional derivatives of a jet by the parameters."""
    params, x = arrays
    p = taylor.Propagation(NETWORK, taylor.Derivatives(D, operators={"laplacian": taylor.laplacian(D)}))
    jet, trace = p.forward(params, x)
    ones = torch.ones(N, 1, dtype=torch.float64)
    columns = p.reverse(params, trace, taylor.Jet(None, None, {"laplacian": ones}))

    def point(z):
        jet, trace = p.forward(params, z[None])
        return jet.laplacian, p.reverse(params, trace, taylor.Jet(None, None, {"laplacian": ones[:1]}))["fc2"].output_grads

    laplacian, grads = func.vmap(point)(x)
    torch.testing.assert_close(laplacian[:, 0], jet.laplacian, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grads[:, 0], columns["fc2"].output_grads, rtol=1e-13, atol=1e-13)
    direction = {k: {r: torch.cos(a) for r, a in roles.items()} for k, roles in params.items()}
    _, moved = func.jvp(lambda params: p.jet(params, x).laplacian, (params,), (direction,))
    # the same from what the layers saw, without another pass
    joint = {k: torch.cat([v["weight"], v["bias"][:, None]], dim=1) for k, v in direction.items()}
    product = sum(((c.rows() @ joint[k].mT) * c.output_grads).sum(dim=(-2, -1)) for k, c in columns.items())
    torch.testing.assert_close(product, moved[:, 0], rtol=1e-12, atol=1e-12)


def test_numbers_are_those_of_numpy(arrays):
    params, x = arrays
    p = taylor.Propagation(NETWORK, taylor.Derivatives(D, operators={"laplacian": taylor.laplacian(D)}))
    numpy = {k: {r: a.numpy() for r, a in roles.items()} for k, roles in params.items()}
    np.testing.assert_allclose(p.jet(params, x).laplacian.numpy(), p.jet(numpy, x.numpy()).laplacian, rtol=1e-12)
