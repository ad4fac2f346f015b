"""A convolutional net follows one trajectory in PyTorch and JAX, and a state saved in one goes on in the other.

PyTorch is at the level of arrays here: its inputs and output gradients are handed to :class:`kfcore.Optimizer`.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import kfcore as kf
import kfcore_jax

torch = pytest.importorskip("torch")

LAYERS = {"c1": kf.Conv(2, 4, (3, 3), 2, 1), "c2": kf.Conv(4, 6, (3, 2), 1, (1, 0), groups=2), "head": kf.Linear(12, 3)}
METHOD = kf.KFAC(damping=0.05, stats_every=2, refresh_every=5)
OPTIONS = {"learning_rate": 0.05, "momentum": 0.9, "clip": 1e-3}


def initial():
    rng = np.random.default_rng(0)
    shapes = {name: layer.parameters for name, layer in LAYERS.items()}
    return {
        name: {"weight": rng.normal(size=s["weight"]) / np.prod(s["weight"][1:]) ** 0.5, "bias": 0.1 * rng.normal(size=s["bias"])}
        for name, s in shapes.items()
    }


def data(step):
    rng = np.random.default_rng(100 + step)
    return rng.normal(size=(16, 2, 7, 6)), rng.integers(3, size=16)


def vector(params):
    return np.concatenate([np.ravel(np.asarray(params[name][role])) for name in LAYERS for role in ("weight", "bias")])


def gap(x, y):
    return np.abs(x - y).max() / np.abs(y).max()


class Torch:
    names: ClassVar = {name: name for name in LAYERS}

    def __init__(self):
        self.optimizer = kf.Optimizer(METHOD, LAYERS, **OPTIONS)
        self.set(initial())
        self.state = self.optimizer.init(self.params)

    def set(self, params):
        self.params = {name: {role: torch.tensor(np.asarray(x)) for role, x in p.items()} for name, p in params.items()}

    def step(self, x, y):
        p = {name: {role: x.clone().requires_grad_() for role, x in roles.items()} for name, roles in self.params.items()}
        seen = {}

        def layer(name, function, x, *how):
            z = function(x, p[name]["weight"], p[name]["bias"], *how)
            z.retain_grad()
            seen[name] = (x, z)
            return z

        functional = torch.nn.functional
        h = torch.tanh(layer("c1", functional.conv2d, torch.tensor(x), 2, 1))
        h = torch.tanh(layer("c2", functional.conv2d, h, 1, (1, 0), 1, 2))
        h = functional.avg_pool2d(h, 2, 2).flatten(1)
        functional.cross_entropy(layer("head", functional.linear, h), torch.tensor(y)).backward()
        grads = {name: {role: x.grad for role, x in roles.items()} for name, roles in p.items()}
        records = {name: (x.detach(), z.grad) for name, (x, z) in seen.items()}
        self.params, self.state = self.optimizer.step(self.params, grads, records, self.state)

    def save(self, path):
        kf.save(path, self.optimizer.bind(self.params), self.state)

    def load(self, path, there):
        self.state = kf.load(path, self.optimizer.bind(self.params), self.optimizer.init(self.params), names=there)


class Jax:
    """Channels last, kernels ``[*kernel, in / groups, out]``, under names of its own."""

    names: ClassVar = {"c1": "first.conv", "c2": "second.conv", "head": "out"}

    def __init__(self):
        zeros = {name: {role: np.zeros(shape) for role, shape in layer.parameters.items()} for name, layer in LAYERS.items()}
        self.tree = self._tree(zeros)
        self.model = kfcore_jax.trace(self._loss, self.tree, *data(0), strict=True)
        self.optimizer = kfcore_jax.optimizer(METHOD, self.model, **OPTIONS)
        self.set(initial())
        self.state, self.traces = self.optimizer.init(self.tree), 0
        self._step = jax.jit(self._one)

    @staticmethod
    def _tree(params):
        turned = {n: jnp.asarray(np.moveaxis(p["weight"], (0, 1), (-1, -2)) if n != "head" else p["weight"].T) for n, p in params.items()}
        leaf = {n: {"kernel": turned[n], "bias": jnp.asarray(p["bias"])} for n, p in params.items()}
        return {"params": {"first": {"conv": leaf["c1"]}, "second": {"conv": leaf["c2"]}, "out": leaf["head"]}}

    @staticmethod
    def _loss(tree, x, y):
        p = tree["params"]

        def conv(p, x, stride, padding, groups=1):
            numbers = ("NHWC", "HWIO", "NHWC")
            how = {"dimension_numbers": numbers, "feature_group_count": groups}
            return jnp.tanh(lax.conv_general_dilated(x, p["kernel"], (stride, stride), padding, **how) + p["bias"])

        h = conv(p["first"]["conv"], jnp.moveaxis(x, 1, -1), 2, ((1, 1), (1, 1)))
        h = conv(p["second"]["conv"], h, 1, ((1, 1), (0, 0)), 2)
        h = lax.reduce_window(h, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        logits = jnp.moveaxis(h, -1, 1).reshape(len(x), -1) @ p["out"]["kernel"] + p["out"]["bias"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def _one(self, tree, state, x, y):
        self.traces += 1
        _, grads, records = self.model.value_grad_and_records(tree, x, y)
        updates, state = self.optimizer.update(grads, state, tree, records=records)
        return optax.apply_updates(tree, updates), state

    def set(self, params):
        arrays = {f"{name}.{role}": np.asarray(x) for name, p in params.items() for role, x in p.items()}
        self.tree = self.model.params_from(arrays, self.tree, names={own: name for name, own in self.names.items()})

    @property
    def params(self):
        arrays = self.model.named_arrays(self.tree)
        return {name: {role: arrays[f"{own}.{role}"] for role in ("weight", "bias")} for name, own in self.names.items()}

    def step(self, x, y):
        self.tree, self.state = self._step(self.tree, self.state, x, y)

    def save(self, path):
        self.optimizer.save(path, self.state)

    def load(self, path, there):
        self.state = self.optimizer.load(path, self.state, names={own: there[name] for name, own in self.names.items()})


def run(arm, first, steps):
    for step in range(first, first + steps):
        arm.step(*data(step))
    return arm


@pytest.fixture(scope="module")
def whole():
    """Parameters after fifty steps in PyTorch."""
    return vector(run(Torch(), 0, 50).params)


def test_fifty_steps_agree(whole):
    arm = run(Jax(), 0, 50)
    assert arm.traces == 1
    assert gap(vector(arm.params), whole) <= 1e-9
    assert gap(1.01 * vector(arm.params), whole) > 5e-3
    assert gap(vector(initial()), whole) > 1e-2, "nothing moved"


@pytest.mark.parametrize(("before", "after"), [(Torch, Jax), (Jax, Torch)], ids=["torch-jax", "jax-torch"])
def test_half_in_one_and_half_in_the_other(before, after, whole, tmp_path):
    half, other, fresh = run(before(), 0, 25), after(), after()
    half.save(tmp_path / "state.safetensors")
    for arm in (other, fresh):
        arm.set(half.params)
    other.load(tmp_path / "state.safetensors", half.names)
    assert gap(vector(run(other, 25, 25).params), whole) <= 1e-9
    assert gap(vector(run(fresh, 25, 25).params), whole) > 1e-5, "without the state it must differ"


def test_parameters_are_those_of_the_state_dict_of_a_module():
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3, 2, 1), torch.nn.Tanh(), torch.nn.Conv2d(4, 6, (3, 2), 1, (1, 0), groups=2))
    arm = Jax()
    own = {"first.conv": "0", "second.conv": "2"}
    arrays = module.state_dict() | {"out.weight": np.zeros((3, 12)), "out.bias": np.zeros(3)}
    arm.tree = arm.model.params_from(arrays, arm.tree, names=own)
    x, _ = data(0)
    with torch.no_grad():
        hidden = torch.tanh(module.double()(torch.tensor(x))).numpy()
    p, numbers = arm.tree["params"], {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    h = lax.conv_general_dilated(jnp.moveaxis(x, 1, -1), p["first"]["conv"]["kernel"], (2, 2), ((1, 1), (1, 1)), **numbers)
    h = jnp.tanh(h + p["first"]["conv"]["bias"])
    h = lax.conv_general_dilated(h, p["second"]["conv"]["kernel"], (1, 1), ((1, 1), (0, 0)), feature_group_count=2, **numbers)
    h = jnp.tanh(h + p["second"]["conv"]["bias"])
    assert gap(np.moveaxis(np.asarray(h), -1, 1), hidden) <= 1e-12
