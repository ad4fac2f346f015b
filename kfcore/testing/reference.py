"""What the kit compares with: the formulas again, in plain NumPy and float64, from dense matrices wherever that is possible.

Nothing here calls the library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Arr = np.ndarray


def factors(inputs: Arr, output_grads: Arr, sharing: str = "expand", joint: bool = True) -> tuple[Arr, Arr]:
    """``A`` and ``G`` of captured ``[..., N, S, features]``, example by example."""
    if inputs.ndim > 3:
        pairs = [factors(a, g, sharing, joint) for a, g in zip(inputs, output_grads, strict=True)]
        return np.stack([a for a, _ in pairs]), np.stack([g for _, g in pairs])
    if sharing == "reduce":
        inputs, output_grads = inputs.mean(axis=1, keepdims=True), output_grads.sum(axis=1, keepdims=True)
    if joint:
        inputs = np.concatenate([inputs, np.ones((*inputs.shape[:2], 1))], axis=-1)
    a = np.einsum("nsi,nsj->ij", inputs, inputs) / (inputs.shape[0] * inputs.shape[1])
    return a, np.einsum("nsi,nsj->ij", output_grads, output_grads) / len(output_grads)


def table_factors(ids: Arr, output_grads: Arr, num: int, padding: int | None = None) -> tuple[Arr, Arr]:
    """``A`` and ``G`` of a table with ``num`` rows from one-hot inputs, without the positions whose id is ``padding``."""
    live = np.ones(ids.shape) if padding is None else (ids != padding).astype(float)
    one_hot = (ids[..., None] == np.arange(num)) * live[..., None]
    a = np.einsum("...nsi,...nsj->...ij", one_hot, one_hot) / live.sum(axis=(-2, -1))[..., None, None]
    return a, np.einsum("...ns,...nsi,...nsj->...ij", live, output_grads, output_grads) / ids.shape[-2]


def norm_factors(hat: Arr, output_grads: Arr, bias: bool = True, full: bool = False) -> tuple[Arr, Arr]:
    """The number 1, and the second moment of the gradients of each example by scale and shift, or its diagonal."""
    rows = [np.einsum("...nsc,...nsc->...nc", hat, output_grads), *([output_grads.sum(axis=-2)] if bias else [])]
    rows = np.concatenate(rows, axis=-1)
    moment = np.einsum("...ni,...nj->...ij", rows, rows) / rows.shape[-2]
    return np.ones((*rows.shape[:-2], 1, 1)), moment if full else moment * np.eye(rows.shape[-1])


def shortened(
    factors_of: Callable[[Arr, Arr], tuple[Arr, Arr]], inputs: Arr, output_grads: Arr, mask: Arr, by: str = "positions"
) -> tuple[Arr, Arr]:
    """``A`` and ``G`` of examples of their own length: the positions at which ``mask [..., N, S]`` is false are cut out of each.

    ``factors_of`` gives those of one example; ``A`` is their mean weighted by rows, one for each position or one for each example.
    """
    if mask.ndim > 2:
        pairs = [shortened(factors_of, *one, by) for one in zip(inputs, output_grads, mask, strict=True)]
        return np.stack([a for a, _ in pairs]), np.stack([g for _, g in pairs])
    found = [factors_of(a[m][None], g[m][None]) for a, g, m in zip(inputs, output_grads, mask, strict=True) if m.any()]
    rows = [m.sum() if by == "positions" else 1 for m in mask if m.any()]
    a = sum(n * a for n, (a, _) in zip(rows, found, strict=True)) / sum(rows)
    return np.asarray(a), np.mean([g for _, g in found], axis=0)


def padded(x: Arr, pads: Any) -> Arr:
    """``x [..., *spatial, channels]`` with ``(low, high)`` zeros around each spatial axis."""
    return np.pad(x, [(0, 0)] * (x.ndim - 1 - len(pads)) + list(pads) + [(0, 0)])


def patches(x: Arr, kernel: Any, stride: Any, dilation: Any) -> Arr:
    """Patches ``[..., *outputs, offsets, channels]`` of ``x [..., *spatial, channels]``, position by position."""
    spatial = x.shape[-1 - len(kernel) : -1]
    outputs = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(spatial, kernel, stride, dilation, strict=True)]
    found = np.zeros((*x.shape[: -1 - len(kernel)], *outputs, int(np.prod(kernel)), x.shape[-1]))
    for place in np.ndindex(*outputs):
        for k, offset in enumerate(np.ndindex(*kernel)):
            source = tuple(p * s + o * d for p, s, o, d in zip(place, stride, offset, dilation, strict=True))
            found[(..., *place, k, slice(None))] = x[(..., *source, slice(None))]
    return found


def average(values: list[Arr], decay: float) -> Arr:
    """Exponentially weighted mean, written out: the latest weighs 1, the one before ``decay``, and so on."""
    weights = [decay**i for i in reversed(range(len(values)))]
    return np.einsum("t,t...->...", np.asarray(weights), np.stack(values)) / sum(weights)


def norm(x: Arr, kind: str) -> float:
    """A norm of a semi-definite matrix by its eigenvalues."""
    values = np.linalg.eigvalsh(x)
    return {
        "mean": values.mean(),
        "trace": values.sum(),
        "frobenius": np.sqrt((values**2).sum()),
        "spectral": values.max(),
        "median": np.median(values),
    }[kind]


def damped_block(a: Arr, g: Arr, damping: float, kind: str = "factored", unit: str = "mean", relative: bool = False) -> Arr:
    """Damped dense matrix of a block."""
    if relative:
        damping = damping * np.trace(a) / len(a) * np.trace(g) / len(g)
    eye_a, eye_g = np.eye(len(a)), np.eye(len(g))
    if kind == "exact" or (kind == "factored" and 1 in (len(a), len(g))):
        return np.kron(g, a) + damping * np.eye(len(a) * len(g))
    if kind == "plain":
        return np.kron(g + damping * eye_g, a + damping * eye_a)
    pi = np.sqrt(norm(a, unit) / norm(g, unit))
    return np.kron(g + np.sqrt(damping) / pi * eye_g, a + pi * np.sqrt(damping) * eye_a)


def direction(a: Arr, g: Arr, grad: Arr, damping: float, kind: str = "factored", unit: str = "mean", relative: bool = False) -> Arr:
    """Damped block inverse applied to ``grad``."""
    if grad.ndim > 2:
        return np.stack([direction(x, y, z, damping, kind, unit, relative) for x, y, z in zip(a, g, grad, strict=True)])
    return np.linalg.solve(damped_block(a, g, damping, kind, unit, relative), grad.reshape(-1)).reshape(grad.shape)


def network(params: dict[str, Any], x: Arr, y: Arr, layout: str = "oi") -> tuple[dict[str, Any], dict[str, tuple[Arr, Arr]]]:
    """Gradients and records of ``mean_n 0.5 |f_n - y_n|^2`` of two dense layers with a scaled tanh between them."""
    w1, w2 = (params[name]["weight"] if layout == "oi" else params[name]["weight"].T for name in ("fc1", "fc2"))
    t = np.tanh(x @ w1.T + params["fc1"]["bias"])
    h = t * params["scale"]
    dz2 = (h @ w2.T + params["fc2"]["bias"] - y) / len(x)
    dh = dz2 @ w2
    dz1 = dh * params["scale"] * (1.0 - t**2)

    def turn(w: Arr) -> Arr:
        return w if layout == "oi" else w.T

    grads = {
        "fc1": {"weight": turn(dz1.T @ x), "bias": dz1.sum(axis=0)},
        "fc2": {"weight": turn(dz2.T @ h), "bias": dz2.sum(axis=0)},
        "scale": (dh * t).sum(axis=0),
    }
    return grads, {"fc1": (x, dz1), "fc2": (h, dz2)}


def tokens(
    params: dict[str, Any], ids: Arr, y: Arr, padding: int | None = None, layout: str = "io"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gradients and records of ``mean_n sum_s 0.5 |f_ns - y_ns|^2``, ``f`` a dense layer on layer-normalised rows of a table.

    Positions whose id is ``padding`` are not in the loss.
    """
    table = params["embed"]["weight"] if layout == "io" else params["embed"]["weight"].T
    x = table[ids]
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    hat = centred / deviation
    h = hat * params["norm"]["weight"] + params["norm"]["bias"]
    live = np.ones((*ids.shape, 1)) if padding is None else (ids != padding)[..., None]
    dz = (h @ params["head"]["weight"].T + params["head"]["bias"] - y) * live / len(ids)
    dh = dz @ params["head"]["weight"]
    dhat = dh * params["norm"]["weight"]
    dx = (dhat - dhat.mean(axis=-1, keepdims=True) - hat * (dhat * hat).mean(axis=-1, keepdims=True)) / deviation
    taken = np.zeros_like(table)
    np.add.at(taken, ids, dx)
    grads = {
        "embed": {"weight": taken if layout == "io" else taken.T},
        "norm": {"weight": (dh * hat).sum(axis=(0, 1)), "bias": dh.sum(axis=(0, 1))},
        "head": {"weight": np.einsum("nso,nsi->oi", dz, h), "bias": dz.sum(axis=(0, 1))},
    }
    return grads, {"embed": (ids, dx), "norm": (hat, dh), "head": (h, dz)}


class Trajectory:
    """KFAC on :func:`network`, step by step, as the guide describes it; options have the names and defaults of the library."""

    def __init__(self, params: dict[str, Any], **options: Any) -> None:
        self.params = params
        defaults: dict[str, Any] = {
            "learning_rate": 0.1,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 0.0,
            "decay": "decoupled",
            "clip": None,
            "graft": False,
            "damping": 1e-3,
            "kind": "factored",
            "relative": False,
            "stats_every": 1,
            "refresh_every": 10,
            "stats_decay": 0.95,
            "spread": False,
            "layout": "oi",
            "bias": "joint",
        }
        assert set(options) <= set(defaults), set(options) - set(defaults)
        self.options = defaults | options
        self.count = 0
        self.seen: dict[str, list[Any]] = {}
        self.used: dict[str, Any] = {}
        self.buffers: dict[str, Arr] = {}

    def step(self, x: Arr, y: Arr) -> None:
        """One step on a batch."""
        o: dict[str, Any] = {k: v(self.count) if callable(v) else v for k, v in self.options.items()}
        grads, records = network(self.params, x, y, o["layout"])
        blocks = self._blocks(grads, o)
        if self.count % o["stats_every"] == 0:
            self._look(records, grads, o)
        directions = {}
        for k, (name, grad) in enumerate(blocks.items()):
            every = o["stats_every"] if name == "scale" else o["refresh_every"]
            offset = k % every if o["spread"] else 0
            directions[name] = self._direction(name, grad, self.count == 0 or self.count % every == offset, o)
            if o["graft"]:
                directions[name] *= np.linalg.norm(grad) / np.linalg.norm(directions[name])
        self._move(blocks, directions, o)
        self.count += 1

    def _averages(self, name: str, o: dict[str, Any]) -> list[Arr]:
        return [average(list(v), o["stats_decay"]) for v in zip(*self.seen[name], strict=True)]

    def _direction(self, name: str, grad: Arr, due: bool, o: dict[str, Any]) -> Arr:
        if due:
            self.used[name] = self._averages(name, o), o["damping"]
        values, damping = self.used[name]
        if name == "scale":
            damping = damping * (values[0].mean() if o["relative"] else 1.0)
            return grad / (average([v[0] for v in self.seen[name]], o["stats_decay"]) + damping)
        return direction(values[0], values[1], grad, damping, o["kind"], "mean", o["relative"])

    def _blocks(self, tree: dict[str, Any], o: dict[str, Any]) -> dict[str, Arr]:
        blocks = {}
        for name in ("fc1", "fc2"):
            w = tree[name]["weight"] if o["layout"] == "oi" else tree[name]["weight"].T
            b = tree[name]["bias"][:, None]
            blocks |= {name: np.hstack([w, b])} if o["bias"] == "joint" else {f"{name}.weight": w, f"{name}.bias": b}
        return blocks | {"scale": tree["scale"]}

    def _look(self, records: dict[str, tuple[Arr, Arr]], grads: dict[str, Any], o: dict[str, Any]) -> None:
        for name, (a, g) in records.items():
            own = len(a) * g  # of the example's own loss, not of the mean
            if o["bias"] == "joint":
                self.seen.setdefault(name, []).append(factors(a[:, None], own[:, None]))
            else:
                new = factors(a[:, None], own[:, None], joint=False)
                self.seen.setdefault(f"{name}.weight", []).append(new)
                self.seen.setdefault(f"{name}.bias", []).append((np.ones((1, 1)), new[1]))
        n = len(records["fc1"][0])
        self.seen.setdefault("scale", []).append((n * grads["scale"] ** 2,))

    def _move(self, grads: dict[str, Arr], directions: dict[str, Arr], o: dict[str, Any]) -> None:
        values = self._blocks(self.params, o)
        lr, mu, wd = o["learning_rate"], o["momentum"], o["weight_decay"]
        shrink = 1.0
        if o["clip"] is not None:
            shrink = min(1.0, np.sqrt(o["clip"] / (lr**2 * sum((grads[n] * d).sum() for n, d in directions.items()))))
        for name, d in directions.items():
            d = shrink * d + (wd * values[name] if o["decay"] == "coupled" else 0.0)
            self.buffers[name] = b = mu * self.buffers.get(name, 0.0) + d
            d = d + mu * b if o["nesterov"] else b
            values[name] = values[name] - lr * (d + (wd * values[name] if o["decay"] == "decoupled" else 0.0))
        new: dict[str, Any] = {"scale": values["scale"]}
        for name in ("fc1", "fc2"):
            m = values[name] if o["bias"] == "joint" else np.hstack([values[f"{name}.weight"], values[f"{name}.bias"]])
            new[name] = {"weight": m[:, :-1] if o["layout"] == "oi" else m[:, :-1].T, "bias": m[:, -1]}
        self.params = {name: new[name] for name in self.params}


class EigenTrajectory(Trajectory):
    """The same with EKFAC, whose scales are measured example by example in the basis that the step uses; refreshes come behind it."""

    def __init__(self, params: dict[str, Any], *, scales: str = "average", moved: str = "transport", **options: Any) -> None:
        super().__init__(params, **options)
        self.scales, self.moved = scales, moved
        self.bases: dict[str, tuple[Arr, Arr]] = {}
        self.measured: dict[str, tuple[float, Arr]] = {}

    def _look(self, records: dict[str, tuple[Arr, Arr]], grads: dict[str, Any], o: dict[str, Any]) -> None:
        super()._look(records, grads, o)
        blocks = self._blocks(grads, o)
        for name, (left, right) in self.bases.items():
            a, g = records[name.partition(".")[0]]
            n = len(a)
            if name.endswith(".bias"):
                a = np.ones((n, 1))
            elif not name.endswith(".weight"):
                a = np.hstack([a, np.ones((n, 1))])
            examples = [n * np.outer(*pair) for pair in zip(g, a, strict=True)]  # of each example's own loss
            if self.scales == "gradient":
                examples = [np.sqrt(n) * blocks[name]]
            new = np.mean([(left.T @ x @ right) ** 2 for x in examples], axis=0)
            weight, old = self.measured[name]
            weight = (0.0 if self.scales == "batch" else o["stats_decay"]) * weight + 1.0
            self.measured[name] = weight, old + (new - old) / weight

    def _direction(self, name: str, grad: Arr, due: bool, o: dict[str, Any]) -> Arr:
        if name == "scale":
            return super()._direction(name, grad, due, o)
        fresh = name not in self.bases
        if fresh:
            self._refresh(name, o)
        (left, right), values = self.bases[name], self.measured[name][1]
        found = left @ (left.T @ grad @ right / (values + self.used[name])) @ right.T
        if due and not fresh:
            self._refresh(name, o)
        return found

    def _refresh(self, name: str, o: dict[str, Any]) -> None:
        (of_a, right), (of_g, left) = map(np.linalg.eigh, self._averages(name, o))
        kfac = np.outer(of_g, of_a)
        weight, old = self.measured.get(name, (0.0, kfac))
        if self.moved == "measure":
            weight = 0.0
        if weight and self.moved == "transport":
            before = np.kron(*self.bases[name])
            matrix, after = before @ np.diag(old.reshape(-1)) @ before.T, np.kron(left, right)
            kfac = np.diag(after.T @ matrix @ after).reshape(old.shape)
        self.bases[name], self.measured[name] = (left, right), (weight, kfac)
        self.used[name] = o["damping"] * (kfac.mean() if o["relative"] else 1.0)


def softmax(x: Arr) -> Arr:
    """Along the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def random_params(rng: np.random.Generator, sizes: tuple[int, int, int], layout: str = "oi") -> dict[str, Any]:
    """Parameters of :func:`network`."""
    i, h, o = sizes
    w1, w2 = rng.normal(size=(h, i)) / 2, rng.normal(size=(o, h)) / 2
    return {
        "fc1": {"weight": w1 if layout == "oi" else w1.T.copy(), "bias": 0.1 * rng.normal(size=h)},
        "fc2": {"weight": w2 if layout == "oi" else w2.T.copy(), "bias": 0.1 * rng.normal(size=o)},
        "scale": 1.0 + 0.1 * rng.normal(size=h),
    }


def jets(weights: list[Arr], biases: list[Arr], kinds: list[str], x: Arr, directions: Arr) -> tuple[Arr, ...]:
    """Derivatives of a chain of dense layers with ``"tanh"`` or ``"sin"`` between them, along ``directions [N, K, d]``.

    The value ``[N, out]``, ``D_k [N, K, out]``, ``D_k D_l [N, K, K, out]``, and ``D_k^3`` and ``D_k^4``, all by the chain rule as it
    stands in books. Complex weights are differentiated as real ones.
    """
    value, first = x, directions
    second = np.zeros((*directions.shape[:2], directions.shape[1], x.shape[-1]))
    third = fourth = np.zeros(directions.shape)
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        value, first, second, third, fourth = value @ w.T + b, *(d @ w.T for d in (first, second, third, fourth))
        if i == len(kinds):
            break
        s0, s1, s2, s3, s4 = _elementary(kinds[i], value)
        pure, s = np.einsum("nkkh->nkh", second), [None, *(s[:, None] for s in (s1, s2, s3, s4))]
        fourth = (
            s[4] * first**4 + 6 * s[3] * first**2 * pure + 3 * s[2] * pure**2 + 4 * s[2] * first * third + s[1] * fourth  # pyright: ignore
        )
        third = s[3] * first**3 + 3 * s[2] * first * pure + s[1] * third  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
        second = s2[:, None, None] * first[:, :, None] * first[:, None] + s1[:, None, None] * second
        value, first = s0, s[1] * first  # pyright: ignore[reportOperatorIssue]
    return value, first, second, third, fourth


def _elementary(kind: str, z: Arr) -> tuple[Arr, ...]:
    """A function and its first four derivatives."""
    if kind == "sin":
        return np.sin(z), np.cos(z), -np.sin(z), -np.cos(z), np.sin(z)
    t = np.tanh(z)
    return t, 1 - t**2, 2 * t**3 - 2 * t, -2 + 8 * t**2 - 6 * t**4, 16 * t - 40 * t**3 + 24 * t**5
