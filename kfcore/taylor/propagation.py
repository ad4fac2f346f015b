"""Derivatives forward through a network, and the gradients of what is made of them backward, both by hand.

Forward, every point carries S columns (its value, first derivatives, operators), which dense layers treat as S inputs of one example.
This is ordinary weight sharing, and so the Kronecker factors of losses that contain derivatives are those of shared weights
(Dangel, Mueller and Zeinhofer 2024, arXiv 2405.15603). No autodiff is involved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from kfcore._array import Array, Namespace, cast, device, is_real_floating, namespace
from kfcore.taylor.activations import Activation
from kfcore.taylor.derivatives import Derivatives, Pointwise, PointwiseDirections
from kfcore.taylor.jets import Columns, Jet, Trace, jet_of, parts_of, present
from kfcore.taylor.network import Sequential
from kfcore.taylor.plan import pick, place
from kfcore.taylor.rules import Parts, pull, push

Params: TypeAlias = Mapping[str, Mapping[str, Array]]
"""By layer and role, ``{"fc1": {"weight": ..., "bias": ...}}``, in the layers' own layouts."""


@dataclass(frozen=True)
class Propagation:
    """A network with the derivatives of it that are wanted: what there is to say before there are arrays.

    Parameters
    ----------
    network
        Dense layers and activations.
    derivatives
        Which derivatives, with respect to the input of the network.

    Examples
    --------
    >>> import numpy as np
    >>> from kfcore import taylor
    >>> net = taylor.Sequential.mlp((2, 1))
    >>> p = taylor.Propagation(net, taylor.Derivatives(2, operators={"laplacian": taylor.laplacian(2)}))
    >>> jet, trace = p.forward({"fc1": {"weight": np.array([[3.0, 4.0]]), "bias": np.zeros(1)}}, np.ones((1, 2)))
    >>> jet.value.item(), jet.first[0, :, 0].tolist(), jet.laplacian.item()
    (7.0, [3.0, 4.0], 0.0)

    """

    network: Sequential
    derivatives: Derivatives
    input_columns: Mapping[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)
    """By layer, labels of the columns entering it that are not zero whatever the data."""

    def __post_init__(self) -> None:
        network, derivatives = self.network, self.derivatives
        if not isinstance(network, Sequential) or not isinstance(derivatives, Derivatives):
            raise TypeError(f"`network` must be a Sequential and `derivatives` a Derivatives, got {network!r} and {derivatives!r}")
        if network.inputs != derivatives.inputs:
            raise ValueError(f"`inputs` of Derivatives must be those of the network, {network.inputs}, got {derivatives.inputs}")
        for step in network.steps:
            if isinstance(step, Activation) and not step.piecewise_linear and step.highest < derivatives.order:
                raise ValueError(
                    f"`highest` of activation {step.name!r} must be at least the order of the derivatives, {derivatives.order}, got "
                    f"{step.highest}"
                )
        plan, live, found = derivatives.plan, set(self.columns[: 1 + derivatives.count]), {}
        for step in network.steps:
            if not isinstance(step, Activation):
                found[step[0]] = tuple(c for c in plan.labels if c in live)
            elif not step.piecewise_linear and derivatives.count:
                live = set(plan.labels)
        object.__setattr__(self, "input_columns", found)

    @property
    def columns(self) -> tuple[str, ...]:
        """Labels of the S columns."""
        return self.derivatives.columns

    def live_columns(self, used: Sequence[str] | None = None) -> dict[str, tuple[str, ...]]:
        """By layer, labels of the columns that can contribute to a gradient.

        Such a column neither enters the layer as zeros, whatever the data, nor is its output without effect on what of the jet is ``used``:
        names and columns as :meth:`Derivatives.labels` takes them, all of the jet if ``None``.
        """
        plan, found = self.derivatives.plan, {}
        live = set(plan.public if used is None else self.derivatives.labels(*used))
        for step in reversed(self.network.steps):
            if not isinstance(step, Activation):
                found[step[0]] = tuple(c for c in self.input_columns[step[0]] if c in live)
            elif not step.piecewise_linear:
                live = live.union({"value"}, *(plan.sources(c) for c in live))
        return {name: found[name] for name in self.network.layers}

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(
        self, params: Params, x: Array, *, coefficients: Mapping[str, Array] | None = None, directions: Array | None = None
    ) -> tuple[Jet, Trace]:
        """Derivatives of the network's output, and what the reverse pass needs.

        Parameters
        ----------
        params
            Of the dense layers, in the dtype of ``x``.
        x
            Points ``[*stack, N, d]``.
        coefficients
            Of the operators that are :class:`Pointwise`, by name: ``[*stack, N, K]`` or ``[*stack, N, K, K]``.
        directions
            ``[*stack, N, K, d]`` where the directions are :class:`PointwiseDirections`.

        Raises
        ------
        ValueError, TypeError
            Naming what does not fit the network or the derivatives.
        """
        xp = self._check(params, x, coefficients or {}, directions)
        numbers = self.derivatives.plan.coefficients(xp, coefficients or {}, x)
        inputs: dict[str, Array] = {}
        saved: list[Parts] = []
        jet = self._run(xp, params, self._start(xp, x, directions), numbers, inputs, saved)
        return jet, Trace(inputs, tuple(saved), numbers)

    def jet(self, params: Params, x: Array, *, coefficients: Mapping[str, Array] | None = None, directions: Array | None = None) -> Jet:
        """The jet of :meth:`forward` alone, holding no more than two layers at a time."""
        xp = self._check(params, x, coefficients or {}, directions)
        numbers = self.derivatives.plan.coefficients(xp, coefficients or {}, x)
        return self._run(xp, params, self._start(xp, x, directions), numbers, None, None)

    def _check(self, params: Params, x: Array, coefficients: Mapping[str, Array], directions: Array | None) -> Namespace:
        xp = namespace(x, directions, *coefficients.values())
        if not is_real_floating(xp, x) and not xp.isdtype(x.dtype, "complex floating"):
            raise TypeError(f"`x` must be floating point, got {x.dtype}")
        self.network.check(params, x)
        count, before = self.derivatives.count, tuple(x.shape[:-1])
        wanted = {
            name: (*before, count) if operator.form == "diagonal" else (*before, count, count)
            for name, operator in self.derivatives.operators
            if isinstance(operator, Pointwise)
        }
        given = {name: tuple(c.shape) for name, c in coefficients.items()}
        if given != wanted:
            raise ValueError(f"`coefficients` must have the shapes {wanted}, those of the Pointwise operators, got {given}")
        pointwise = isinstance(self.derivatives.directions, PointwiseDirections)
        shape, got = ((*before, count, x.shape[-1]) if pointwise else None), None if directions is None else tuple(directions.shape)
        if shape != got:
            raise ValueError(f"`directions` must be {'None' if shape is None else f'an array {shape}'} for these derivatives, got {got}")
        return xp

    def _start(self, xp: Namespace, x: Array, directions: Array | None) -> Parts:
        """The columns at the input: the point, the directions, and nothing of higher order."""
        kept = self.derivatives.directions
        if directions is not None:
            first = cast(xp, directions, x.dtype)
        elif not self.derivatives.count:
            first = None
        else:
            rows = [[float(i == k) for i in range(x.shape[-1])] if isinstance(k, int) else k for k in kept]
            constant = xp.asarray(rows, dtype=x.dtype, device=device(x))
            first = xp.broadcast_to(constant, (*x.shape[:-1], *constant.shape))
        return Parts(x[..., None, :], first, None, None, None)

    def _run(
        self,
        xp: Namespace,
        params: Params,
        parts: Parts,
        numbers: tuple[Array | None, ...],
        inputs: dict[str, Array] | None,
        saved: list[Parts] | None,
    ) -> Jet:
        for step in self.network.steps:
            if isinstance(step, Activation):
                if saved is not None:
                    saved.append(parts)
                parts = push(xp, self.derivatives.plan, step, parts, numbers)
                continue
            name, layer = step
            columns = _joined(xp, parts)
            if inputs is not None:
                inputs[name] = columns
            parts = _divided(_through(xp, columns, layer.to_oi(params[name]["weight"]).mT), parts)
            if "bias" in params[name]:
                assert parts.value is not None
                parts = parts._replace(value=parts.value + params[name]["bias"][..., None, None, :])
        return jet_of(xp, self.derivatives, parts)

    # -- reverse -------------------------------------------------------------------------------------------------------

    def reverse(
        self,
        params: Params,
        trace: Trace,
        cotangents: Jet,
        *,
        used: Sequence[str] | None = None,
        columns: Literal["live", "all"] = "live",
    ) -> dict[str, Columns]:
        """Gradients with respect to what each dense layer gave, with the columns that entered it.

        Parameters
        ----------
        params, trace
            As of :meth:`forward`.
        cotangents
            Gradient of each point's own quantity with respect to the jet at this point: of its residual, for instance, not of a mean over
            points. Leading axes in front of those of the jet, the same for all entries, hold several quantities, which are taken back
            together.
        used
            Names and columns of the jet (see :meth:`Derivatives.labels`) that the quantity depends on; cotangents of the rest are not
            looked at. All that are not ``None`` if not given.
        columns
            ``"live"``: of each layer those that can contribute to a gradient, see :meth:`live_columns`; the others are dropped.
            ``"all"``: all S, with zeros where they are zero whatever the data.

        Raises
        ------
        ValueError
            If cotangents do not fit the jet, or an activation lacks the one more derivative that this takes.
        """
        xp = namespace(*trace.inputs.values())
        if columns not in ("live", "all"):
            raise ValueError(f"`columns` must be 'live' or 'all', got {columns!r}")
        plan, kept = self.derivatives.plan, list(trace.saved)
        like = next(iter(trace.inputs.values()))
        there = present(self.derivatives, cotangents)
        chosen = there if used is None else self.derivatives.labels(*used)
        live = self.live_columns(chosen)
        g = parts_of(xp, self.derivatives, cotangents, chosen, (*like.shape[:-2], self.network.outputs), like)
        order = max(i for i, part in enumerate(g) if part is not None)
        found, remaining = {}, list(self.network.layers)
        for step in reversed(self.network.steps):
            if isinstance(step, Activation):
                if not step.piecewise_linear and step.highest <= order:
                    raise ValueError(
                        f"`highest` of activation {step.name!r} must be at least {order + 1} for the reverse pass of derivatives of order "
                        f"{order}, got {step.highest}"
                    )
                before = kept.pop()
                g = pull(xp, plan, step, before, trace.coefficients, g)
                known = Parts(*(None if y is None else part for part, y in zip(g, before, strict=True)))
                if columns == "live" and any(part is not None for part in known):
                    g = known
                continue
            name, layer = step
            labels = live[name] if columns == "live" else plan.labels
            there = tuple(label for part, of in zip(g, plan.parts, strict=True) if part is not None for label in of)
            joined = _joined(xp, g)
            found[name] = self._columns(xp, trace.inputs[name], self.input_columns[name], joined, there, labels)
            remaining.remove(name)
            if not remaining:
                break
            g = _divided(_through(xp, joined, layer.to_oi(params[name]["weight"])), g)
        return {name: found[name] for name in self.network.layers}

    def gradients(self, columns: Mapping[str, Columns], weights: Array | None = None) -> dict[str, dict[str, Array]]:
        """Sums over the points (and over the leading axes of the cotangents) of their gradients, by layer and role as parameters are.

        Parameters
        ----------
        columns
            Of :meth:`reverse`.
        weights
            What the gradient of each point is multiplied with, ``[..., *stack, N]`` as the cotangents: ``r_n / N`` makes of the gradients
            of residuals that of ``1 / (2 N) sum_n r_n^2``.
        """
        found = {}
        for name, layer in self.network.layers.items():
            z, g, ones = columns[name]
            xp = namespace(z, weights)
            if weights is not None:
                g = weights[..., None, None] * g
            if g.ndim > z.ndim:
                g = xp.sum(g, axis=tuple(range(g.ndim - z.ndim)))
            roles = {"weight": layer.from_oi(_flat(xp, g).mT @ _flat(xp, z))}
            if layer.bias:
                roles["bias"] = xp.sum(g * ones[:, None], axis=(-3, -2))
            found[name] = roles
        return found

    def _columns(
        self, xp: Namespace, z: Array, entering: tuple[str, ...], g: Array, there: tuple[str, ...], labels: tuple[str, ...]
    ) -> Columns:
        """Both sides with the same columns."""
        ones = xp.asarray([float(label == "value") for label in labels], dtype=z.dtype, device=device(z))
        return Columns(_chosen(xp, z, entering, labels), _chosen(xp, g, there, labels), ones)


def _joined(xp: Namespace, parts: Parts) -> Array:
    """All columns, ``[..., N, S, h]``."""
    there = [part for part in parts if part is not None]
    return there[0] if len(there) == 1 else xp.concat(there, axis=-2)


def _divided(columns: Array, like: Parts) -> Parts:
    """Inverse of :func:`_joined`."""
    found, start = [], 0
    for part in like:
        size = 0 if part is None else part.shape[-2]
        found.append(columns[..., start : start + size, :] if size else None)
        start += size
    return Parts(*found)


def _through(xp: Namespace, columns: Array, matrix: Array) -> Array:
    """``columns [..., N, S, p]`` times ``matrix [*stack, p, q]``, as one long matrix of rows."""
    return xp.reshape(_flat(xp, columns) @ matrix, (*columns.shape[:-1], matrix.shape[-1]))


def _flat(xp: Namespace, columns: Array) -> Array:
    """``[..., N, S, h]`` as rows ``[..., N S, h]``."""
    return xp.reshape(columns, (*columns.shape[:-3], columns.shape[-3] * columns.shape[-2], columns.shape[-1]))


def _chosen(xp: Namespace, x: Array, there: tuple[str, ...], labels: tuple[str, ...]) -> Array:
    """Columns of ``x`` by their labels, zeros for those it has not."""
    if there == labels:
        return x
    common = tuple(label for label in labels if label in there)
    found = pick(xp, x, tuple(there.index(label) for label in common))
    return place(xp, found, tuple(labels.index(label) for label in common), len(labels))
