"""NumPy, PyTorch and JAX follow the same trajectory, and a state saved in one goes on in another."""

import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfcore as kf
import kfcore_jax

SIZES = (4, 6, 5, 3)
LAYERS = {f"l{i}": (a, b) for i, (a, b) in enumerate(itertools.pairwise(SIZES))}
KINDS = [kf.Damping(0.05, kind, relative=relative) for kind in ("exact", "factored", "plain") for relative in (False, True)]


def initial():
    rng = np.random.default_rng(0)
    weights = {n: {"weight": rng.normal(size=(b, a)) / np.sqrt(a), "bias": 0.1 * rng.normal(size=b)} for n, (a, b) in LAYERS.items()}
    return weights | {"scale": 1.0 + 0.1 * rng.normal(size=SIZES[-1])}


def data(step, dead=0):
    """The first ``dead`` inputs are zero for ever."""
    rng = np.random.default_rng(100 + step)
    x = rng.normal(size=(32, SIZES[0]))
    x[:, :dead] = 0.0
    return x, rng.integers(SIZES[-1], size=32)


def vector(params):
    """All parameters in one order, weights as ``[out, in]``."""
    return np.concatenate([np.ravel(np.asarray(params[n][role])) for n in LAYERS for role in ("weight", "bias")] + [params["scale"]])


def gap(x, y):
    return np.abs(x - y).max() / np.abs(y).max()


class Numpy:
    names: ClassVar = {n: n for n in LAYERS}

    def __init__(self, method, **options):
        self.optimizer = kf.Optimizer(method, {n: kf.Linear(*s) for n, s in LAYERS.items()}, learning_rate=0.05, **options)
        self.params = initial()
        self.state = self.optimizer.init(self.params)

    def step(self, x, y):
        p, hs = self.params, [x]
        for i, n in enumerate(LAYERS):
            z = hs[-1] @ p[n]["weight"].T + p[n]["bias"]
            hs.append(np.tanh(z) if i < 2 else z)
        logits = hs[-1] / p["scale"]
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        d = (e / e.sum(axis=1, keepdims=True) - np.eye(SIZES[-1])[y]) / len(x)
        grads, records, dz = {"scale": -(d * hs[-1]).sum(axis=0) / p["scale"] ** 2}, {}, d / p["scale"]
        for i, n in reversed(list(enumerate(LAYERS))):
            grads[n] = {"weight": dz.T @ hs[i], "bias": dz.sum(axis=0)}
            records[n] = (hs[i], dz)
            dz = (dz @ p[n]["weight"]) * (1 - hs[i] ** 2)
        self.params, self.state = self.optimizer.step(p, grads, records, self.state)

    def weights(self):
        return vector(self.params)

    def save(self, path):
        kf.save(path, self.optimizer.bind(self.params), self.state)

    def resume(self, path, weights, there):
        self.params = weights
        self.state = kf.load(path, self.optimizer.bind(weights), self.optimizer.init(weights), names=there)


class Torch:
    names: ClassVar = {n: n for n in LAYERS}

    def __init__(self, method, **options):
        torch = pytest.importorskip("torch")
        from kfcore_torch import Optimizer

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                for n, (a, b) in LAYERS.items():
                    self.add_module(n, torch.nn.Linear(a, b, dtype=torch.float64))
                self.scale = torch.nn.Parameter(torch.ones(SIZES[-1], dtype=torch.float64))

            def forward(self, x):
                return self.l2(torch.tanh(self.l1(torch.tanh(self.l0(x))))) / self.scale

        self.torch, self.net = torch, Net()
        self._set(initial())
        self.optimizer = Optimizer(self.net, method, lr=0.05, **options)

    def _set(self, weights):
        flat = {f"{n}.{role}": w for n in LAYERS for role, w in weights[n].items()} | {"scale": weights["scale"]}
        self.net.load_state_dict({name: self.torch.tensor(np.asarray(w)) for name, w in flat.items()})

    def step(self, x, y):
        self.optimizer.zero_grad()
        self.torch.nn.functional.cross_entropy(self.net(self.torch.tensor(x)), self.torch.tensor(y)).backward()
        self.optimizer.step()

    @property
    def params(self):
        state = {name: x.numpy().copy() for name, x in self.net.state_dict().items()}
        return {n: {role: state[f"{n}.{role}"] for role in ("weight", "bias")} for n in LAYERS} | {"scale": state["scale"]}

    def weights(self):
        return vector(self.params)

    @params.setter
    def params(self, weights):
        self._set(weights)

    def save(self, path):
        self.optimizer.save(path)

    def resume(self, path, weights, there):
        self._set(weights)
        self.optimizer.load(path, names=there)


class Jax:
    """The kernels are stored as ``[in, out]`` under names of its own, and the first product is written as ``W^T x`` under vmap."""

    names: ClassVar = {"l0": "first", "l1": "second", "l2": "third"}

    def __init__(self, method, **options):
        self.tree = self._from(initial())
        x, y = data(0)
        self.model = kfcore_jax.trace(self._loss, self.tree, x, y)
        self.optimizer = kfcore_jax.optimizer(method, self.model, learning_rate=0.05, **options)
        self.state = self.optimizer.init(self.tree)
        self.traces = 0
        self._step = jax.jit(self._one, donate_argnums=(0, 1))

    @staticmethod
    def _from(weights):
        tree = {Jax.names[n]: {"kernel": jnp.asarray(weights[n]["weight"].T), "bias": jnp.asarray(weights[n]["bias"])} for n in LAYERS}
        return {"params": tree | {"scale": jnp.asarray(weights["scale"])}}

    @staticmethod
    def _loss(tree, x, y):
        p = tree["params"]
        h = jnp.tanh(jax.vmap(lambda x: p["first"]["kernel"].T @ x + p["first"]["bias"])(x))
        h = jnp.tanh(h @ p["second"]["kernel"] + p["second"]["bias"])
        logits = (h @ p["third"]["kernel"] + p["third"]["bias"]) / p["scale"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def _one(self, tree, state, x, y):
        self.traces += 1
        _, grads, records = self.model.value_grad_and_records(tree, x, y)
        updates, state = self.optimizer.update(grads, state, tree, records=records)
        return optax.apply_updates(tree, updates), state

    def step(self, x, y):
        self.tree, self.state = self._step(self.tree, self.state, x, y)

    @property
    def params(self):
        p = self.tree["params"]
        found = {n: {"weight": np.asarray(p[own]["kernel"]).T, "bias": np.asarray(p[own]["bias"])} for n, own in self.names.items()}
        return found | {"scale": np.asarray(p["scale"])}

    def weights(self):
        return vector(self.params)

    @params.setter
    def params(self, weights):
        self.tree = self._from(weights)

    def save(self, path):
        self.optimizer.save(path, self.state)

    def resume(self, path, weights, there):
        self.tree = self._from(weights)
        self.state = self.optimizer.load(path, self.state, names={own: there[n] for n, own in self.names.items()})


def run(arm, first, steps, dead=0):
    for step in range(first, first + steps):
        arm.step(*data(step, dead))
    return arm


@pytest.mark.parametrize("damping", KINDS, ids=lambda d: f"{d.kind}-{'relative' if d.relative else 'absolute'}")
def test_a_hundred_steps_agree_in_all_three(damping):
    method = kf.KFAC(damping=damping, stats_every=2, refresh_every=5)
    options = {"clip": 1e-3, "momentum": 0.0 if damping.relative else 0.9, "weight_decay": 0.02}
    arms = [run(kind(method, **options), 0, 100) for kind in (Numpy, Torch, Jax)]
    reference = arms[0].weights()
    assert gap(arms[1].weights(), reference) <= 1e-10
    assert gap(arms[2].weights(), reference) <= 1e-10
    assert gap(vector(initial()), reference) > 1e-2, "nothing moved"
    assert arms[2].traces == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"scales": "gradient", "moved": "measure"}, {"basis": kf.Tracked(smallest=2, tolerance=0.05)}],
    ids=["average", "gradient", "tracked"],
)
def test_a_hundred_steps_of_ekfac_agree_in_all_three(options):
    """With two inputs that are always zero, where every basis is as good as another."""
    method = kf.EKFAC(damping=0.05, stats_every=2, refresh_every=5, **options)
    arms = [run(kind(method, momentum=0.9, clip=1e-3), 0, 100, dead=2) for kind in (Numpy, Torch, Jax)]
    reference = arms[0].weights()
    assert gap(arms[1].weights(), reference) <= 1e-9
    assert gap(arms[2].weights(), reference) <= 1e-9
    assert gap(vector(initial()), reference) > 1e-2, "nothing moved"
    assert arms[2].traces == 1


@pytest.mark.parametrize("kind", [kf.KFAC, kf.EKFAC])
@pytest.mark.parametrize(
    ("before", "after"), [(Torch, Jax), (Jax, Torch), (Numpy, Jax), (Jax, Numpy)], ids=lambda arm: arm.__name__.lower()
)
def test_fifty_steps_in_one_and_fifty_in_another_are_a_hundred(before, after, kind, tmp_path):
    method, options = kind(damping=0.05, stats_every=2, refresh_every=5), {"clip": 1e-3, "nesterov": True}
    half = run(before(method, **options), 0, 50)
    path = tmp_path / "state.safetensors"
    half.save(path)
    other, fresh = after(method, **options), after(method, **options)
    other.resume(path, half.params, half.names)
    whole = run(before(method, **options), 0, 100).weights()
    assert gap(run(other, 50, 50).weights(), whole) <= 1e-10
    fresh.params = half.params
    assert gap(run(fresh, 50, 50).weights(), whole) > 1e-6, "without the state it must differ"


def test_parameters_cross_over_by_name():
    there = {own: n for n, own in Jax.names.items()}
    torch_arm = Torch(kf.KFAC(), clip=None)
    jax_arm = Jax(kf.KFAC())
    state = {name: 2.0 * x for name, x in torch_arm.net.state_dict().items()}
    jax_arm.tree = jax_arm.model.params_from(state, jax_arm.tree, names=there)
    np.testing.assert_array_equal(jax_arm.weights(), 2.0 * vector(initial()))
    back = jax_arm.model.named_arrays(jax_arm.tree)
    for name, array in back.items():
        head, _, role = name.rpartition(".")
        np.testing.assert_array_equal(array, state[f"{there[head]}.{role}" if head else name].numpy())
    with pytest.raises(ValueError, match="`arrays` lack 'first"):
        jax_arm.model.params_from(state, jax_arm.tree)


def test_a_file_of_another_model_is_refused(tmp_path):
    arm = run(Jax(kf.KFAC()), 0, 2)
    path = tmp_path / "state.safetensors"
    arm.save(path)
    with pytest.raises(kf.CheckpointError, match="another model"):
        Numpy(kf.KFAC()).resume(path, initial(), Numpy.names)
    with pytest.raises(ValueError, match="`names`"):
        arm.optimizer.load(path, arm.state, names={"first": "l0", "second": "l0"})
