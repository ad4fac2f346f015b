"""Elementwise activations with their derivatives.

Derivatives of order m through a network need those of its activations up to order m, and the reverse pass one more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kfcore._array import Array, Namespace, primitive

HIGHEST = 5
"""Derivatives that the activations of this library have: fourth derivatives of a network, and the reverse pass of those."""

Derived = Callable[[Namespace, Array, int], Sequence[Array]]
"""``(xp, z, order)`` -> ``(s(z), s'(z), ..., s^(order)(z))``, each of the shape of ``z``."""


@dataclass(frozen=True)
class Activation:
    """An elementwise function ``s`` with its derivatives.

    Parameters
    ----------
    name
        For messages.
    derived
        Called as ``derived(xp, z, order)`` with the namespace of ``z [...]``, returns ``s`` and its first ``order`` derivatives at ``z``,
        ``order + 1`` arrays ``[...]``. A pure function of array-API operations; see :func:`kfcore.testing.check_activation`.
    highest
        The largest ``order`` it can be called with. Second derivatives and their reverse pass take 3, fourth ones 5.
    piecewise_linear
        Whether derivatives beyond the first vanish, so that none of their products are formed.
    """

    name: str
    derived: Derived
    highest: int = HIGHEST
    piecewise_linear: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"`name` of Activation must be a string that is not empty, got {self.name!r}")
        if not callable(self.derived):
            raise TypeError(f"`derived` of Activation must be callable as derived(xp, z, order), got {self.derived!r}")
        if not isinstance(self.highest, int) or isinstance(self.highest, bool) or self.highest < 1:
            raise ValueError(f"`highest` of Activation must be a positive int, got {self.highest!r}")

    def __call__(self, xp: Namespace, z: Array, order: int) -> Sequence[Array]:
        """``s(z)`` and its derivatives up to ``order``."""
        found = self.derived(xp, z, order)
        if len(found) != order + 1:
            raise ValueError(f"`derived` of activation {self.name!r} must return {order + 1} arrays for order {order}, got {len(found)}")
        return found

    def scaled(self, factor: float) -> Activation:
        """``z -> s(factor z)``, as SIREN has ``sin(30 z)`` in its first layer."""
        inner, factor = self.derived, float(factor)

        def derived(xp: Namespace, z: Array, order: int) -> list[Array]:
            return [factor**k * s for k, s in enumerate(inner(xp, factor * z, order))]

        return Activation(f"{self.name}({factor:g} z)", derived, self.highest, self.piecewise_linear)


def activation(kind: str | Activation) -> Activation:
    """An activation by its name, one of :data:`ACTIVATIONS`, or as it is.

    Raises
    ------
    ValueError
        If there is none of this name.
    """
    if isinstance(kind, Activation):
        return kind
    if kind not in ACTIVATIONS:
        allowed = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(f"`activation` must be one of {allowed}, or a kfcore.taylor.Activation, got {kind!r}")
    return ACTIVATIONS[kind]


def relu_power(power: int) -> Activation:
    """``max(z, 0)^power``. Where the derivative jumps, at 0, it is taken from the left, and the jump's own derivative is left out.

    Networks with derivatives of order m want ``power > m``: else what a Laplacian or a gradient misses is not small.
    """
    if not isinstance(power, int) or isinstance(power, bool) or power < 1:
        raise ValueError(f"`power` of relu_power must be a positive int, got {power!r}")

    def derived(xp: Namespace, z: Array, order: int) -> list[Array]:
        zeros = xp.zeros_like(z)
        above = z > 0
        base = xp.where(above, z, zeros)
        found = []
        for k in range(order + 1):
            if k > power:
                found.append(zeros)
            else:
                value = xp.ones_like(z) if k == power else base ** (power - k)
                found.append(xp.where(above, float(math.perm(power, k)) * value, zeros))
        return found

    return Activation("relu" if power == 1 else f"relu^{power}", derived, piecewise_linear=power == 1)


# -- the functions -----------------------------------------------------------------------------------------------------


def _tanh(xp: Namespace, z: Array, order: int) -> list[Array]:
    """With ``t = tanh z``, each derivative is ``1 - t^2`` times a polynomial in ``t``."""
    t = xp.tanh(z)
    square = t * t
    slope = 1.0 - square
    found = [t, slope]
    if order >= 2:
        found.append(-2.0 * t * slope)
    if order >= 3:
        found.append((6.0 * square - 2.0) * slope)
    if order >= 4:
        found.append((16.0 - 24.0 * square) * t * slope)
    if order >= 5:
        found.append((16.0 - 120.0 * square * slope) * slope)
    return found[: order + 1]


def _sin(xp: Namespace, z: Array, order: int) -> list[Array]:
    sine = xp.sin(z)
    if not order:
        return [sine]
    cosine = xp.cos(z)
    return [(sine, cosine, -sine, -cosine)[k % 4] for k in range(order + 1)]


def _softplus(xp: Namespace, z: Array, order: int) -> list[Array]:
    value = xp.logaddexp(z, xp.zeros_like(z))
    return [value, *(_sigmoid_of(xp, z, value, order - 1) if order else [])]


def _sigmoid(xp: Namespace, z: Array, order: int) -> list[Array]:
    return _sigmoid_of(xp, z, xp.logaddexp(z, xp.zeros_like(z)), order)


def _sigmoid_of(xp: Namespace, z: Array, softplus: Array, order: int) -> list[Array]:
    """Of ``z`` and its softplus: both ``p`` and ``1 - p`` are exact to rounding in either tail, and smooth for autodiff."""
    p = xp.exp(z - softplus)
    if not order:
        return [p]
    rest = xp.exp(-softplus)
    slope, odd = p * rest, rest - p
    found = [p, slope]
    if order >= 2:
        found.append(slope * odd)
    if order >= 3:
        found.append(slope * (1.0 - 6.0 * slope))
    if order >= 4:
        found.append(slope * odd * (1.0 - 12.0 * slope))
    if order >= 5:
        found.append(slope * (1.0 - 30.0 * slope + 120.0 * slope * slope))
    return found


def _silu(xp: Namespace, z: Array, order: int) -> list[Array]:
    return _times_argument(z, _sigmoid(xp, z, order))


def _gelu(xp: Namespace, z: Array, order: int) -> list[Array]:
    """``z Phi(z)`` with the distribution function of the standard normal distribution."""
    phi = xp.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    square = z * z
    factors = (None, None, -z, square - 1.0, z * (3.0 - square), square * (square - 6.0) + 3.0)
    found = [0.5 + 0.5 * erf(xp, math.sqrt(0.5) * z)]
    found += [phi if k == 1 else factors[k] * phi for k in range(1, order + 1)]
    return _times_argument(z, found)


def _gelu_tanh(xp: Namespace, z: Array, order: int) -> list[Array]:
    """``z (1 + tanh u) / 2`` with ``u = sqrt(2 / pi) (z + 0.044715 z^3)``."""
    a, b = math.sqrt(2.0 / math.pi), 0.044715
    square = z * z
    # Taylor coefficients of u, all that are not zero
    u = [a * z * (1.0 + b * square), a * (1.0 + 3.0 * b * square), 3.0 * a * b * z, a * b * xp.ones_like(z)]
    t = [xp.tanh(u[0])]
    for k in range(order):
        # tanh' = (1 - tanh^2) u': coefficients of the square up to the order at hand give the next one of tanh
        powers = [1.0 - t[0] * t[0], *(-sum(t[i] * t[j - i] for i in range(j + 1)) for j in range(1, k + 1))]
        t.append(sum((j + 1) * u[j + 1] * powers[k - j] for j in range(min(k, 2) + 1)) / (k + 1))
    return _times_argument(z, [0.5 + 0.5 * t[0], *(0.5 * math.factorial(k) * t[k] for k in range(1, order + 1))])


def _times_argument(z: Array, found: list[Array]) -> list[Array]:
    """Derivatives of ``z f(z)`` from those of ``f``."""
    return [z * found[0], *(z * found[k] + float(k) * found[k - 1] for k in range(1, len(found)))]


def _identity(xp: Namespace, z: Array, order: int) -> list[Array]:
    return [z, xp.ones_like(z), *(xp.zeros_like(z) for _ in range(order - 1))][: order + 1]


_NEAR = (
    (3.16112374387056560e00, 1.13864154151050156e02, 3.77485237685302021e02, 3.20937758913846947e03, 1.85777706184603153e-1),
    (2.36012909523441209e01, 2.44024637934444173e02, 1.28261652607737228e03, 2.84423683343917062e03),
)
_FAR = (
    (
        5.64188496988670089e-1,
        8.88314979438837594e0,
        6.61191906371416295e01,
        2.98635138197400131e02,
        8.81952221241769090e02,
        1.71204761263407058e03,
        2.05107837782607147e03,
        1.23033935479799725e03,
        2.15311535474403846e-8,
    ),
    (
        1.57449261107098347e01,
        1.17693950891312499e02,
        5.37181101862009858e02,
        1.62138957456669019e03,
        3.29079923573345963e03,
        4.36261909014324716e03,
        3.43936767414372164e03,
        1.23033935480374942e03,
    ),
)


@primitive
def erf(xp: Namespace, x: Array) -> Array:
    """Error function of ``x [...]``, which the array API lacks: rational functions of W. J. Cody (1969), to rounding errors of float64."""
    size = xp.abs(x)
    near = xp.where(size < 0.46875, x, xp.zeros_like(x))
    far = xp.clip(size, 0.46875, 6.0)
    close = near * _quotient(near * near, *_NEAR)
    tail = 1.0 - xp.exp(-far * far) * _quotient(far, *_FAR)
    return xp.where(size < 0.46875, close, xp.sign(x) * tail)


def _quotient(y: Array, above: tuple[float, ...], below: tuple[float, ...]) -> Array:
    """A rational function as Cody writes it: the last coefficient above is the leading one, and that below is 1."""
    numerator, denominator = above[-1] * y, y
    for a, b in zip(above[:-2], below[:-1], strict=True):
        numerator, denominator = (numerator + a) * y, (denominator + b) * y
    return (numerator + above[-2]) / (denominator + below[-1])


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation("gelu", _gelu),
    "gelu_tanh": Activation("gelu_tanh", _gelu_tanh),
    "identity": Activation("identity", _identity, piecewise_linear=True),
    "relu": relu_power(1),
    "relu^2": relu_power(2),
    "relu^3": relu_power(3),
    "relu^4": relu_power(4),
    "sigmoid": Activation("sigmoid", _sigmoid),
    "silu": Activation("silu", _silu),
    "sin": Activation("sin", _sin),
    "softplus": Activation("softplus", _softplus),
    "tanh": Activation("tanh", _tanh),
}
"""The activations by name. ``gelu`` is PyTorch's default, ``gelu_tanh`` JAX's."""
