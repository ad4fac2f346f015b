"""MAC and its relatives in JAX: one trajectory with PyTorch, the first layer by the order of the program, inputs alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import kfcore as kf
import kfcore_jax

OPTIONS = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": "delayed"}
METHODS = {
    "mac": kf.MAC(damping=0.7, stats_every=2, refresh_every=2, stats_decay=0.8),
    "smac": kf.SMAC(damping=0.7, stats_every=1, refresh_every=2, first="decoupled"),
    "eva": kf.Eva(damping=0.3, stats_every=1, refresh_every=2),
}


def initial():
    """Names in another order than that of the forward pass; PyTorch's layouts."""
    rng = np.random.default_rng(0)
    return {
        "b_norm": {"weight": 1 + 0.1 * rng.normal(size=4), "bias": 0.1 * rng.normal(size=4)},
        "a_head": {"weight": rng.normal(size=(3, 4)) / 2, "bias": 0.1 * rng.normal(size=3)},
        "d_gain": {"value": rng.normal(size=(6, 4))},
        "c_conv": {"weight": rng.normal(size=(4, 2, 3, 2)) / 3, "bias": 0.1 * rng.normal(size=4)},
    }


def data(step):
    rng = np.random.default_rng(100 + step)
    return rng.normal(size=(5, 2, 4, 3)) + 0.5, rng.integers(3, size=5)


def loss(p, x, y):
    z = lax.conv_general_dilated(x, p["c_conv"]["weight"], (2, 1), ((1, 1), (0, 1)), dimension_numbers=("NCHW", "OIHW", "NCHW"))
    h = jnp.tanh(z + p["c_conv"]["bias"][:, None, None]).reshape(5, 4, -1).transpose(0, 2, 1)  # [N, 6, 4]
    centred = h - h.mean(-1, keepdims=True)
    h = centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["b_norm"]["weight"] + p["b_norm"]["bias"]
    h = jnp.sin(h * jnp.exp(p["d_gain"]["value"]))  # by a function of the gain, which no layer describes
    logits = h @ p["a_head"]["weight"].T + p["a_head"]["bias"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y[:, None].repeat(6, 1)).mean()


def model():
    return kfcore_jax.trace(loss, jax.tree.map(jnp.asarray, initial()), *data(0))


def vector(params):
    return np.concatenate([np.ravel(np.asarray(params[name][role])) for name, p in initial().items() for role in p])


def gap(x, y):
    return np.abs(x - y).max() / np.abs(y).max()


def by_torch(method, steps):
    torch = pytest.importorskip("torch")
    from kfcore_torch import Optimizer

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.c_conv = torch.nn.Conv2d(2, 4, (3, 2), (2, 1), bias=True)
            self.b_norm = torch.nn.LayerNorm(4)
            self.d_gain = torch.nn.ParameterDict({"value": torch.nn.Parameter(torch.zeros(6, 4))})
            self.a_head = torch.nn.Linear(4, 3)

        def forward(self, x):
            x = torch.nn.functional.pad(x, (0, 1, 1, 1))
            h = self.b_norm(torch.tanh(self.c_conv(x)).flatten(2).transpose(1, 2))
            return self.a_head(torch.sin(h * torch.exp(self.d_gain["value"])))

    net = Net().double()
    net.load_state_dict({f"{name}.{role}": torch.tensor(x) for name, p in initial().items() for role, x in p.items()})
    optimizer = Optimizer(net, method, lr=0.05, **OPTIONS)
    for t in range(steps):
        x, y = (torch.tensor(v) for v in data(t))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x).flatten(0, 1), y.repeat_interleave(6)).backward()
        optimizer.step()
    kinds = {row.parameter: row.kind for row in optimizer.report()}
    found = net.state_dict()
    return {name: {role: found[f"{name}.{role}"].numpy() for role in p} for name, p in initial().items()}, kinds


@pytest.mark.parametrize("kind", METHODS)
def test_a_trajectory_is_that_of_pytorch(kind):
    method, traced, params = METHODS[kind], model(), jax.tree.map(jnp.asarray, initial())
    optimizer = kfcore_jax.optimizer(method, traced, learning_rate=0.05, group=True, **OPTIONS)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, y):
        _, grads, records = traced.value_grad_and_records(params, x, y)
        updates, state = optimizer.update(grads, state, params, records=records)
        return optax.apply_updates(params, updates), state

    for t in range(12):
        params, state = step(params, state, *data(t))
    expected, kinds = by_torch(method, 12)
    assert gap(vector(params), vector(initial())) > 1e-2, "nothing moved"
    assert {row.parameter: row.kind for row in optimizer.report(params)} == kinds
    assert gap(vector(params), vector(expected)) <= 1e-9
    assert gap(1.01 * vector(params), vector(expected)) > 5e-3
    assert kinds["d_gain.value"] == ("diagonal" if kind == "eva" else "gradient")
    assert kinds["c_conv.weight"] == ("eva" if kind == "eva" else "foof"), "the first in the program, not in the tree"
    assert max(x.ndim for name in ("a_head", "b_norm") for x in jax.tree.leaves(state.curvature.blocks[name])) <= 1


def test_output_gradients_are_not_looked_at():
    """No equation of an update takes an array of output gradients, so that a compiled step does not compute them."""
    traced, params = model(), jax.tree.map(jnp.asarray, initial())
    _, grads, records = jax.eval_shape(traced.value_grad_and_records, params, *data(0))
    for method, wanted in ((METHODS["mac"], False), (METHODS["eva"], True)):
        optimizer = kfcore_jax.optimizer(method, traced, learning_rate=0.05)
        state = jax.eval_shape(optimizer.init, params)

        def update(output_grads, inputs, grads, params, state, optimizer=optimizer):
            layers = {name: [(x, output_grads[name])] for name, x in inputs.items()}
            given = kfcore_jax.records.Records(layers, records.terms, records.uses, records.rounds)
            return optimizer.update(grads, state, params, records=given)

        inputs, output_grads = ({name: uses[0][side] for name, uses in records.layers.items()} for side in (0, 1))
        program = jax.make_jaxpr(update)(output_grads, inputs, grads, params, state).jaxpr
        taken = {id(v) for equation in program.eqns for v in equation.invars}
        assert len(output_grads) == 3
        assert any(id(v) in taken for v in program.invars[: len(output_grads)]) == wanted
