"""What goes in and out of the passes through a network, and the two ways between it and columns by order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from kfcore._array import Array, Namespace, cast, device, namespace
from kfcore.taylor.derivatives import Derivatives, Each, Hessian
from kfcore.taylor.plan import pairs, pick, place, square
from kfcore.taylor.rules import Parts


class Jet(NamedTuple):
    """What is known of a network's output ``u`` at N points; or the gradient with respect to it, where ``None`` and operators that are
    left out stand for zeros.
    """

    value: Array | None = None
    """``u [*stack, N, out]``."""
    first: Array | None = None
    """Derivatives along the directions, ``[*stack, N, K, out]``."""
    operators: Mapping[str, Array] = {}
    """By name ``[*stack, N, out]``; ``[*stack, N, K, out]`` of Each, ``[*stack, N, K, K, out]`` of Hessian."""

    @property
    def laplacian(self) -> Array:
        """The operator of this name."""
        return self.operators["laplacian"]


class Trace(NamedTuple):
    """What the forward pass leaves for the reverse pass."""

    inputs: dict[str, Array]
    """Columns entering each dense layer, ``[*stack, N, S, in]``, labelled by :attr:`Propagation.input_columns`."""
    saved: tuple[Parts, ...]
    """Columns before each activation."""
    coefficients: tuple[Array | None, ...]
    """Of the operators."""


class Columns(NamedTuple):
    """What a dense layer saw, and the gradients with respect to what it gave, column by column.

    The gradient of one point with respect to ``[W b]`` is ``sum_s g_s [z_s, o_s]^T``.
    """

    inputs: Array
    """``z [*stack, N, S, in]``."""
    output_grads: Array
    """``g [..., *stack, N, S, out]``, with the leading axes of the cotangents."""
    ones: Array
    """``o [S]``, the input of the bias: 1 for the value, 0 for derivatives."""

    def rows(self, bias: bool = True) -> Array:
        """``[z_s, o_s]``, ``[*stack, N, S, in + 1]``, or without ``bias`` the inputs."""
        if not bias:
            return self.inputs
        xp = namespace(self.inputs)
        return xp.concat([self.inputs, xp.broadcast_to(self.ones[:, None], (*self.inputs.shape[:-1], 1))], axis=-1)


def jet_of(xp: Namespace, derivatives: Derivatives, parts: Parts) -> Jet:
    """The jet that columns at the output are, those put in that are zero whatever the data."""
    value, plan = parts.value, derivatives.plan
    assert value is not None

    def columns(order: int, places: tuple[int, ...]) -> Array:
        part = parts[order]
        if part is None:
            return xp.zeros((*value.shape[:-2], len(places), value.shape[-1]), dtype=value.dtype, device=device(value))
        return pick(xp, part, places)

    operators = {}
    for (name, order, places), (_, operator) in zip(plan.places, derivatives.operators, strict=True):
        if isinstance(operator, Hessian):
            full = columns(order, tuple(places[i] for i in square(plan.count)))
            operators[name] = xp.reshape(full, (*full.shape[:-2], plan.count, plan.count, full.shape[-1]))
        else:
            operators[name] = columns(order, places) if isinstance(operator, Each) else columns(order, places)[..., 0, :]
    return Jet(value[..., 0, :], columns(1, tuple(range(plan.count))), operators)


def present(derivatives: Derivatives, cotangents: Jet) -> tuple[str, ...]:
    """Columns of the jet that have a cotangent."""
    unknown = set(cotangents.operators) - {name for name, _ in derivatives.operators}
    if unknown:
        raise ValueError(f"`cotangents` must be of operators of these derivatives, got {', '.join(sorted(unknown))}")
    names = ["value"] if cotangents.value is not None else []
    names += ["first"] if cotangents.first is not None and derivatives.count else []
    names += [name for name, c in cotangents.operators.items() if c is not None]
    return derivatives.labels(*names)


def parts_of(
    xp: Namespace, derivatives: Derivatives, cotangents: Jet, used: Collection[str], points: tuple[int, ...], like: Array
) -> Parts:
    """Gradients with respect to the columns at the output from those with respect to the jet; columns that are not ``used`` have none.

    ``points`` is the shape of a value, ``[*stack, N, out]``, and ``like`` an array of the library and dtype.
    """
    plan = derivatives.plan
    leading: set[tuple[int, ...]] = set()

    def checked(name: str, c: Array, *middle: int) -> Array:
        namespace(like, c)
        shape = (*points[:-1], *middle, points[-1])
        leading.add(tuple(c.shape[: max(0, c.ndim - len(shape))]))
        if tuple(c.shape[-len(shape) :]) != shape or len(leading) > 1:
            raise ValueError(f"`cotangents` of {name!r} must have shape {shape}, all with the same leading axes, got {tuple(c.shape)}")
        return cast(xp, c, like.dtype)

    pieces: list[tuple[int, tuple[int, ...], Array]] = []
    if cotangents.value is not None:
        pieces.append((0, (0,), checked("value", cotangents.value)[..., None, :]))
    if cotangents.first is not None and plan.count:
        pieces.append((1, tuple(range(plan.count)), checked("first", cotangents.first, plan.count)))
    for (name, order, places), (_, operator) in zip(plan.places, derivatives.operators, strict=True):
        c = cotangents.operators.get(name)
        if c is None:
            continue
        if isinstance(operator, Hessian):
            piece = _of_pairs(xp, checked(name, c, plan.count, plan.count))
        else:
            piece = checked(name, c, plan.count) if isinstance(operator, Each) else checked(name, c)[..., None, :]
        pieces.append((order, places, piece))
    parts: list[Array | None] = [None] * len(Parts._fields)
    for order, places, piece in pieces:
        chosen = tuple(i for i, at in enumerate(places) if plan.parts[order][at] in used)
        if chosen:
            part = place(xp, pick(xp, piece, chosen), tuple(places[i] for i in chosen), plan.sizes[order])
            parts[order] = part if parts[order] is None else parts[order] + part
    if all(part is None for part in parts):
        raise ValueError("`cotangents` must not be None everywhere, or everywhere but where nothing is `used`")
    return Parts(*parts)


def _of_pairs(xp: Namespace, c: Array) -> Array:
    """What ``c [..., K, K, h]``, by the entries of a symmetric matrix, is by its pairs."""
    n = c.shape[-2]
    flat = xp.reshape(c, (*c.shape[:-3], n * n, c.shape[-1]))
    upper = pick(xp, flat, tuple(k * n + j for k, j in pairs(n)))
    lower = pick(xp, flat, tuple(j * n + k for k, j in pairs(n)))
    off = xp.asarray([[float(k != j)] for k, j in pairs(n)], dtype=c.dtype, device=device(c))
    return upper + off * lower
