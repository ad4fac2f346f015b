"""What every curvature approximation is: a frozen configuration, a state of arrays, and the verbs between them."""

from __future__ import annotations

import abc
import enum
import functools
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

from kfcore._array import Array, Namespace, Schedule, choose, is_real_floating, namespace, number
from kfcore.damping import Damping, LevenbergMarquardt, check_positive
from kfcore.layers import Layer
from kfcore.operators import BlockOperator
from kfcore.statistics import GradientRows, Use

Fisher = Literal["empirical", "mc", "exact", "forward"]
FISHERS: tuple[Fisher, ...] = ("empirical", "mc", "exact", "forward")


class Needs(enum.Flag):
    """What a method must see of a layer; an adapter captures nothing else."""

    NOTHING = 0
    INPUTS = enum.auto()
    OUTPUT_GRADS = enum.auto()
    TOGETHER = enum.auto()
    """Inputs and output gradients of the same rows in one call."""
    GRADIENT = enum.auto()
    """The gradient of the parameter itself."""
    ALL_USES = enum.auto()
    """All uses of the layer by the same examples in one call of :meth:`Method.reduce_all`, for it looks at gradients of single examples."""


class Cost(NamedTuple):
    """What a block costs, before it runs."""

    bytes: int
    """Size of its state."""
    statistics_flops: float
    """Floating-point operations a captured row."""
    refresh_flops: float
    """Operations a refresh."""
    step_flops: float
    """Operations of :meth:`Method.precondition`."""


@dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """Hyper-parameters and verbs that all approximations share. Subclasses implement the verbs, in this order.

    Parameters
    ----------
    damping
        Positive number, function of the step, a :class:`kfcore.LevenbergMarquardt`, or a :class:`kfcore.Damping`.
    stats_every, refresh_every
        Steps between two updates of the statistics, and between two refreshes of what is applied: an int, or a function of the
        step number that gives one.
    stats_decay
        Decay of the running averages in (0, 1]; 1 is the plain mean. A number, or a function of the step.
    fisher
        Which gradients make up the output factor: ``"empirical"`` (of the training loss: no extra pass), ``"mc"`` (labels drawn
        from the model: one more backward pass a sample), ``"exact"`` (the generalised Gauss-Newton matrix, type-2 Fisher: as many
        passes as the loss' output Hessian has columns) or ``"forward"`` (none: the output factor is the identity).
    mc_samples
        Draws an example for ``fisher="mc"``.
    """

    damping: float | Schedule | LevenbergMarquardt | Damping = 1e-3
    stats_every: int | Schedule = 1
    refresh_every: int | Schedule = 10
    stats_decay: float | Schedule = 0.95
    fisher: Fisher = "empirical"
    mc_samples: int = 1

    name: ClassVar[str] = "method"
    late: ClassVar[bool] = False
    """Whether a refresh that is due comes after the direction, all but the first: for methods that measure in what they refresh."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "damping", Damping.of(self.damping))
        for field in ("stats_every", "refresh_every", "mc_samples"):
            value = getattr(self, field)
            if field != "mc_samples" and callable(value):
                continue
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{field}` must be a positive int, got {value!r}")
        if not callable(self.stats_decay):
            check_positive("stats_decay", self.stats_decay)
            if self.stats_decay > 1:
                raise ValueError(f"`stats_decay` must lie in (0, 1], got {self.stats_decay!r}")
        if self.fisher not in FISHERS:
            raise ValueError(f"`fisher` must be one of {', '.join(FISHERS)}, got {self.fisher!r}")

    @property
    def rule(self) -> Damping:
        """``damping`` as the object it has become."""
        return Damping.of(self.damping)

    @property
    def tikhonov(self) -> bool:
        """Whether ``damping`` is a multiple of the identity that is added to the curvature."""
        return True

    @property
    def factored(self) -> bool:
        """Whether the damping is split between two factors, so that one other than ``lambda`` may serve better."""
        return False

    def config(self) -> dict[str, str]:
        """The hyper-parameters as text, for reports and file headers."""
        return {f.name: getattr(v := getattr(self, f.name), "__name__", None) or repr(v) for f in fields(self)}

    # -- set-up --------------------------------------------------------------------------------------------------------

    def assign(self, layers: Mapping[str, Any]) -> Mapping[str, Method]:
        """The method of each of a model's ``layers``, in the order of the forward pass: this one, unless a subclass knows better."""
        return dict.fromkeys(layers, self)

    def first_of(self, layers: Mapping[str, Any]) -> str | None:
        """Which of ``layers`` is treated as the first because it comes first among them; none, if nothing depends on that."""
        return None

    def others(self) -> Method | None:
        """The method of parameters that no layer covers; ``None`` stands for a :class:`kfcore.Diagonal` of the same damping."""
        return None

    # -- the verbs -----------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def requires(self, layer: Layer) -> Needs:
        """What must be captured of ``layer``."""

    @abc.abstractmethod
    def init(self, layer: Layer, like: Array, leading: tuple[int, ...] = ()) -> Any:
        """State of a block that has seen nothing; ``like`` gives library, device and dtype, ``leading`` stacks equal layers."""

    @abc.abstractmethod
    def reduce(
        self,
        layer: Layer,
        state: Any,
        inputs: Array | None = None,
        output_grads: Array | None = None,
        *,
        mask: Array | None = None,
        grad: Array | None = None,
        terms: float | Array = 1.0,
    ) -> Any:
        """Statistics, which merge by ``+``, of what :meth:`requires` asks for.

        ``inputs [..., N, S, in]`` and ``output_grads [..., N, S, out]`` are captured arrays; ``grad`` is the gradient of the mean loss and
        ``terms`` the number of terms in that mean. ``mask [..., N, S]`` is true at the positions that are real: the others are as if they
        had not been there, and an example without any is none.
        """

    def reduce_all(self, uses: Sequence[Use], state: Any) -> Any:
        """:meth:`reduce` of several uses of one layer in one batch."""
        return functools.reduce(operator.add, [self.reduce(u.layer, state, u.inputs, u.output_grads, mask=u.mask) for u in uses])

    @abc.abstractmethod
    def observe(self, state: Any, statistics: Any, decay: float | Array | None = None) -> Any:
        """Take statistics into the running averages; those that are not finite are dropped and counted."""

    @abc.abstractmethod
    def refresh(self, layer: Layer, state: Any, damping: float | Array | None = None) -> Any:
        """Recompute what :meth:`precondition` applies. The only expensive verb."""

    def refresh_all(self, layers: Sequence[Layer], states: Sequence[Any], dampings: Sequence[float | Array | None]) -> list[Any]:
        """:meth:`refresh` of several blocks, which may share calls of the library."""
        return [self.refresh(*block) for block in zip(layers, states, dampings, strict=True)]

    @abc.abstractmethod
    def precondition(self, layer: Layer, state: Any, grad: Array, rows: GradientRows | None = None) -> Array:
        """Direction of ``grad [..., out, in]``, of the same shape; the gradient itself before the first refresh.

        ``rows``, if the gradient is their product, may make that cheaper.
        """

    @abc.abstractmethod
    def operator(self, layer: Layer, state: Any, *, damped: bool = False) -> BlockOperator:
        """The matrix this block stands for, for analysis; with ``damped`` the one whose inverse :meth:`precondition` applies."""

    def dense(self, layer: Layer, state: Any) -> Array:
        """The undamped matrix of :meth:`operator`, ``[..., out in, out in]``, in row-major order. For small blocks."""
        return self.operator(layer, state).dense()

    def unit(self, layer: Layer, state: Any) -> float | Array:
        """What a relative damping is in units of: the mean eigenvalue of each block, ``[...]`` or a number; 1 where that is zero."""
        found = self.operator(layer, state)
        xp = namespace(found.values)
        mean = number(xp, xp.mean(found.values, axis=(-2, -1)))
        return choose(xp, mean > 0, mean, 1.0)

    @abc.abstractmethod
    def cost(self, layer: Layer, itemsize: int = 4) -> Cost:
        """Memory and operations of a block with factors of ``itemsize`` bytes a number."""

    # -- for subclasses ------------------------------------------------------------------------------------------------

    def _decay(self, decay: float | Array | None) -> float | Array:
        return _given("decay", "stats_decay", self.stats_decay, decay)

    def _damping(self, damping: float | Array | None) -> float | Array:
        return _given("damping", "damping", self.rule.value, damping)


def _given(name: str, field: str, configured: Any, value: Any) -> Any:
    """``value``, or the configured one if that is a number."""
    if value is not None:
        return value
    if not isinstance(configured, numbers.Real):
        raise ValueError(f"`{name}` must be given: this method's `{field}` changes with the steps, so pass its value at the current one")
    return configured


def check_captured(name: str, x: Array, like: Array, kind: Literal["features", "ids"] = "features") -> Namespace:
    """Raise unless ``x`` is of the library of ``like`` and of its kind; its namespace otherwise.

    The kinds are those of :class:`kfcore.layers.Layer`: real floating ``[..., N, S, features]``, or integers ``[..., N, S]``.
    """
    xp = namespace(x, like)
    if kind == "ids":
        if x.ndim < 2:
            raise ValueError(f"`{name}` must have shape [..., N, S], got {tuple(x.shape)}")
        if not xp.isdtype(x.dtype, "integral"):
            raise TypeError(f"`{name}` must be integers, got {x.dtype}")
        return xp
    if x.ndim < 3:
        raise ValueError(f"`{name}` must have shape [..., N, S, features], got {tuple(x.shape)}")
    if not is_real_floating(xp, x):
        raise TypeError(f"`{name}` must be real floating point, got {x.dtype}")
    return xp


def count_failure(xp: Namespace, counter: Array, ok: bool | Array) -> Array:
    """``counter`` plus one where not ``ok``."""
    if isinstance(ok, bool):
        return counter if ok else counter + 1
    return xp.where(ok, counter, counter + 1)
