"""Derivatives through networks under JAX: against its Hessians and jets, its gradients through the whole pass, and under its transforms."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.jet import jet as taylor_series

from kfcore import taylor

D = 3
EVERY = {"laplacian": taylor.laplacian(D), "hessian": taylor.Hessian(), "at points": taylor.Pointwise("matrix"), "third": taylor.Each(3)}
NETWORK = taylor.Sequential.mlp((D, 5, 4, 2))
P = taylor.Propagation(NETWORK, taylor.Derivatives(D, operators=EVERY | {"fourth": taylor.Weighted((1.0, 0.0, 2.0), 4)}))


def arrays(n=5):
    rng = np.random.default_rng(0)
    params = {k: {r: 0.7 * rng.normal(size=s) for r, s in layer.parameters.items()} for k, layer in NETWORK.layers.items()}
    return jax.tree.map(jnp.asarray, (params, rng.normal(size=(n, D)), {"at points": rng.normal(size=(n, D, D))}))


def apply(params, z):
    for name, p in params.items():
        z = p["weight"] @ z + p["bias"]
        z = z if name == "fc3" else jnp.tanh(z)
    return z


def close(x, y, rtol=1e-12):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= rtol * max(1.0, np.abs(b).max())


def test_hessians_and_jets():
    """Full derivatives by autodiff, third and fourth ones by JAX's own Taylor mode."""
    params, x, given = arrays()
    found = jax.jit(lambda params, x, given: P.jet(params, x, coefficients=given))(params, x, given)

    @jax.jit
    def desired(params, x):
        def one(z):
            f = lambda z: apply(params, z)  # noqa: E731
            series = [taylor_series(f, (z,), [[v, *[jnp.zeros(D)] * 3]])[1] for v in jnp.eye(D)]
            return f(z), jax.jacfwd(f)(z).T, jnp.moveaxis(jax.hessian(f)(z), 0, -1), jnp.stack([jnp.stack(s[2:]) for s in series])

        return jax.vmap(one)(x)

    value, first, hessian, higher = desired(params, x)
    operators = {
        "laplacian": jnp.einsum("nkko->no", hessian),
        "hessian": hessian,
        "at points": jnp.einsum("nkl,nklo->no", given["at points"], hessian),
        "third": higher[:, :, 0],
        "fourth": higher[:, 0, 1] + 2.0 * higher[:, 2, 1],
    }
    close(found, taylor.Jet(value, first, operators))


def test_reverse_pass_is_autodiff_through_the_forward_pass():
    """Of a nonlinear function of the whole jet, point by point and weighted, inside one program."""
    params, x, given = arrays()

    def quantity(jet):
        leaves = jax.tree.leaves(jet)
        return sum(jnp.sin(a + 0.1 * i).reshape(len(a), -1).sum(axis=-1) for i, a in enumerate(leaves)) ** 2

    @jax.jit
    def by_hand(params, x, given):
        jet, trace = P.forward(params, x, coefficients=given)
        cotangents = jax.grad(lambda jet: quantity(jet).sum())(jet)
        return P.gradients(P.reverse(params, trace, cotangents), jnp.arange(1.0, 1.0 + len(x)))

    desired = jax.jit(jax.grad(lambda params: jnp.sum(jnp.arange(1.0, 1.0 + len(x)) * quantity(P.jet(params, x, coefficients=given)))))
    close(by_hand(params, x, given), desired(params))


def test_vmap_over_networks():
    """A batch of networks by ``vmap`` is a stack of them, is one after the other."""
    network = taylor.Sequential.mlp((2, 4, 1), "gelu")
    derivatives = taylor.Derivatives(2, operators={"laplacian": taylor.laplacian(2)})
    p, stacked = (
        taylor.Propagation(network, derivatives),
        taylor.Propagation(taylor.Sequential.mlp((2, 4, 1), "gelu", stack=(3,)), derivatives),
    )
    rng = np.random.default_rng(1)
    params = {k: {r: jnp.asarray(rng.normal(size=(3, *s))) for r, s in layer.parameters.items()} for k, layer in network.layers.items()}
    x = jnp.asarray(rng.normal(size=(3, 5, 2)))

    def run(p, params, x):
        jet, trace = p.forward(params, x)
        return jet, p.gradients(p.reverse(params, trace, jet))

    by_vmap = jax.jit(jax.vmap(lambda params, x: run(p, params, x)))(params, x)
    close(by_vmap, jax.jit(lambda params, x: run(stacked, params, x))(params, x))
    close(by_vmap[0].laplacian[1], p.jet(jax.tree.map(lambda a: a[1], params), x[1]).laplacian)
