"""A causal transformer follows one trajectory in PyTorch and JAX, and a state saved in one goes on in the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfcore as kf
import kfcore_jax

torch = pytest.importorskip("torch")

SYMBOLS, PLACES, WIDTH, HEADS = 7, 5, 8, 2
DENSE = dict.fromkeys(("q", "k", "v", "o"), (WIDTH, WIDTH)) | {"up": (WIDTH, 20), "down": (20, WIDTH), "head": (WIDTH, SYMBOLS)}
NORMS = ("before", "between", "behind")
METHOD = kf.KFAC(damping=0.02, stats_every=2, refresh_every=5)
OPTIONS = {"momentum": 0.9, "clip": 1e-3}


def initial():
    """By layer; weights of dense layers ``[out, in]``."""
    rng = np.random.default_rng(0)
    dense = {n: {"weight": rng.normal(size=(b, a)) / a**0.5, "bias": 0.1 * rng.normal(size=b)} for n, (a, b) in DENSE.items()}
    norms = {n: {"weight": 1 + 0.1 * rng.normal(size=WIDTH), "bias": 0.1 * rng.normal(size=WIDTH)} for n in NORMS}
    tables = {"tokens": {"weight": 0.5 * rng.normal(size=(SYMBOLS, WIDTH))}, "places": {"weight": 0.1 * rng.normal(size=(PLACES, WIDTH))}}
    return dense | norms | tables


def data(step):
    rng = np.random.default_rng(100 + step)
    ids = np.cumsum(rng.choice([1, 1, 1, 2], size=(6, PLACES + 1)), axis=1) % SYMBOLS
    return ids[:, :-1], ids[:, 1:]


def vector(params):
    """All parameters one behind the other, but the bias of the keys, which no output depends on."""
    return np.concatenate([np.ravel(x) for name, p in params.items() for role, x in p.items() if (name, role) != ("k", "bias")])


def gap(x, y):
    return np.abs(x - y).max() / np.abs(y).max()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, (a, b) in DENSE.items():
            self.add_module(name, torch.nn.Linear(a, b))
        for name in NORMS:
            self.add_module(name, torch.nn.LayerNorm(WIDTH))
        self.tokens = torch.nn.Embedding(SYMBOLS, WIDTH)
        self.places = torch.nn.ParameterDict({"weight": torch.nn.Parameter(torch.zeros(PLACES, WIDTH))})

    def forward(self, ids):
        h = self.tokens(ids) + self.places["weight"]
        x = self.before(h)
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        h = h + self.o(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = h + self.down(torch.nn.functional.gelu(self.up(self.between(h))))
        return self.head(self.behind(h))


class Torch:
    def __init__(self):
        from kfcore_torch import Optimizer

        self.net = Net().double()
        self.set(initial())
        self.optimizer = Optimizer(self.net, METHOD, lr=0.05, **OPTIONS)

    def set(self, params):
        self.net.load_state_dict({f"{name}.{role}": torch.tensor(x) for name, p in params.items() for role, x in p.items()})

    @property
    def params(self):
        found = self.net.state_dict()
        return {name: {role: found[f"{name}.{role}"].numpy().copy() for role in p} for name, p in initial().items()}

    def step(self, x, y):
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self.net(torch.tensor(x)).flatten(0, 1), torch.tensor(y).flatten()).backward()
        self.optimizer.step()

    def save(self, path):
        self.optimizer.save(path)

    def load(self, path):
        self.optimizer.load(path)

    def fallbacks(self):
        return {row.parameter for row in self.optimizer.report().fallbacks()}


class Jax:
    """Kernels ``[in, out]``, and attention and normalisation written out."""

    def __init__(self):
        self.set(initial())
        self.optimizer, self._step = self._program()
        self.state = self.optimizer.init(self.tree)

    @classmethod
    @functools.cache
    def _program(cls):
        """The optimizer, and a step that all arms share."""
        model = kfcore_jax.trace(cls._loss, jax.tree.map(jnp.asarray, _turned(initial())), *data(0))
        optimizer = kfcore_jax.optimizer(METHOD, model, learning_rate=0.05, **OPTIONS)

        def step(tree, state, x, y):
            _, grads, records = model.value_grad_and_records(tree, x, y)
            updates, state = optimizer.update(grads, state, tree, records=records)
            return optax.apply_updates(tree, updates), state

        return optimizer, jax.jit(step)

    @staticmethod
    def _loss(p, x, y):
        def dense(name, x):
            return x @ p[name]["weight"] + p[name]["bias"]

        def norm(name, x):
            centred = x - x.mean(-1, keepdims=True)
            return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[name]["weight"] + p[name]["bias"]

        h = p["tokens"]["weight"][x] + p["places"]["weight"][jnp.arange(PLACES)]
        z = norm("before", h)
        q, k, v = (dense(name, z).reshape(*z.shape[:2], HEADS, -1) for name in ("q", "k", "v"))
        scores = jnp.einsum("nshd,nthd->nhst", q, k) / (WIDTH / HEADS) ** 0.5
        weights = jax.nn.softmax(jnp.where(jnp.tri(PLACES, dtype=bool), scores, -jnp.inf))
        h = h + dense("o", jnp.einsum("nhst,nthd->nshd", weights, v).reshape(z.shape))
        h = h + dense("down", jax.nn.gelu(dense("up", norm("between", h)), approximate=False))
        return optax.losses.softmax_cross_entropy_with_integer_labels(dense("head", norm("behind", h)), y).mean()

    def set(self, params):
        # committed to a device, as what is loaded is, so that one program serves all arms
        self.tree = jax.device_put(_turned(params), jax.devices()[0])

    @property
    def params(self):
        found = _turned(jax.tree.map(np.asarray, self.tree))
        return {name: {role: found[name][role] for role in p} for name, p in initial().items()}

    def step(self, x, y):
        self.tree, self.state = self._step(self.tree, self.state, x, y)

    def save(self, path):
        self.optimizer.save(path, self.state)

    def load(self, path):
        self.state = self.optimizer.load(path, self.state)

    def fallbacks(self):
        return {row.parameter for row in self.optimizer.report(self.tree).fallbacks()}


def _turned(params):
    return {name: p | {"weight": p["weight"].T} if name in DENSE else p for name, p in params.items()}


def run(arm, first, steps):
    for step in range(first, first + steps):
        arm.step(*data(step))
    return arm


@pytest.fixture(scope="module")
def whole():
    """The PyTorch arm after fifty steps."""
    return run(Torch(), 0, 50)


def test_fifty_steps_agree(whole):
    arm, expected = run(Jax(), 0, 50), vector(whole.params)
    assert arm.fallbacks() == whole.fallbacks() == {"places.weight"}
    assert gap(vector(arm.params), expected) <= 1e-9
    assert gap(1.01 * vector(arm.params), expected) > 5e-3
    assert gap(vector(initial()), expected) > 1e-2, "nothing moved"


@pytest.mark.parametrize(("before", "after"), [(Torch, Jax), (Jax, Torch)], ids=["torch-jax", "jax-torch"])
def test_half_in_one_and_half_in_the_other(before, after, whole, tmp_path):
    half, other = run(before(), 0, 25), after()
    half.save(tmp_path / "state.safetensors")
    other.set(half.params)
    other.load(tmp_path / "state.safetensors")
    assert gap(vector(run(other, 25, 25).params), vector(whole.params)) <= 1e-9
