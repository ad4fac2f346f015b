"""The optimizer: a real ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from kfcore import CheckpointError, Loss, Method, QuadraticModel, StepSize
from kfcore._array import Schedule
from kfcore.damping import check_positive
from kfcore.optimizer import added
from kfcore.stepsize import coupled
from kfcore_torch.engine import Engine
from kfcore_torch.objective import LossFunction, Predict
from kfcore_torch.shell import Shell
from kfcore_torch.sites import NormBlock, Sharing

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class Optimizer(Shell, torch.optim.Optimizer):
    """Curvature-preconditioned gradient descent with momentum, for any ``nn.Module``.

    Use it like ``torch.optim.SGD``: ``loss.backward(); optimizer.step(); optimizer.zero_grad()``. Parameters of no supported layer get
    the fallback; :meth:`report` says which and why.

    Parameters
    ----------
    model
        The module, whose layers are hooked: it takes examples on the first axis. Create the optimizer before compiling the model, and
        with normalisations that are to keep fixed statistics in evaluation mode.
    method
        Such as :class:`kfcore.KFAC`.
    params
        Parameters or groups of them, as for any optimizer; all of the model's if not given. A group may set ``lr``, ``weight_decay`` and
        ``damping``.
    lr, momentum, nesterov, weight_decay, decay, clip, graft
        See :class:`kfcore.StepSize`. ``lr`` lives in the groups, where schedulers find it. Clipping of raw gradients goes between
        ``backward`` and ``step`` as usual; ``clip`` here bounds the preconditioned step.
    quadratic
        Learning rate, momentum or both from the quadratic model of the loss, see :class:`kfcore.QuadraticModel`; :meth:`step` then needs
        ``predict`` and ``loss_fn``, and all groups the same ``lr``, which is a factor on the step.
    loss
        Description of the loss such as :class:`kfcore.CrossEntropy`; needed for the Fisher types ``"mc"`` and ``"exact"``.
    loss_reduction
        ``"mean"`` or ``"sum"``: what the training loss is over its terms. The terms are counted as the rows of the output layer (examples
        of a classifier, tokens of a language model, pixels where it is a convolution), times its width if ``loss`` compares numbers one
        by one (MSE, BCE); give ``terms`` to :meth:`step` where that is not so, as in a network that pools or resizes what its last layer
        made. With gradient accumulation the sum of the micro-batches' gradients must be
        the gradient of the whole.
    bias, sharing
        See :class:`kfcore.Linear`; ``sharing`` may be a dictionary by layer name. ``"expand"`` is for networks whose loss keeps the
        positions of a layer (language models, segmentation), ``"reduce"`` for those that average them before it (convolutional and
        attention classifiers): it is closer to the curvature there, and cheaper. Layers behind the average have one position, and both
        are the same. The layers of an attention module are its ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``. Tables
        (``nn.Embedding``) know no ``"reduce"`` and are not meant by one for all layers.
    norm
        Blocks of normalisations, see ``block`` of :class:`kfcore.Norm`: ``"diagonal"``, or ``"full"`` for scale and shift in one matrix.
    fallback
        Method for parameters of no layer, a :class:`kfcore.Diagonal` if not given.
    grad_scaler
        The ``torch.amp.GradScaler`` in use, if any: output gradients are captured before it unscales.
    all_reduce
        For data parallelism: a function that sums a tensor over the ranks in place, such as ``torch.distributed.all_reduce``.
    group, spread
        See :class:`kfcore.Preconditioner`; ``group`` is on by default where parameters are not on the CPU.
    strict
        Raise where a parameter would get the fallback.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        params: Params | None = None,
        *,
        lr: float | None = None,
        momentum: float | Schedule = 0.9,
        nesterov: bool | Literal["delayed"] = False,
        weight_decay: float = 0.0,
        decay: Literal["decoupled", "coupled"] = "decoupled",
        clip: float | Schedule | None = None,
        graft: bool = False,
        quadratic: QuadraticModel | None = None,
        loss: Loss | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        bias: Literal["joint", "separate"] = "joint",
        sharing: Sharing | Mapping[str, Sharing] = "expand",
        norm: NormBlock = "diagonal",
        fallback: Method | None = None,
        grad_scaler: Any = None,
        all_reduce: Callable[[Tensor], Any] | None = None,
        group: bool | None = None,
        spread: bool = False,
        strict: bool = False,
    ) -> None:
        self._step = step = StepSize(momentum=momentum, nesterov=nesterov, decay=decay, clip=clip, graft=graft, quadratic=quadratic)
        lr = cast("float", step.learning_rate) if lr is None else lr
        self._engine: Engine | None = None
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "damping": None})
        self._arguments = {k: v for k, v in locals().items() if k not in ("self", "model", "params", "step", "__class__")}
        self._model = model
        self._engine = Engine(
            model,
            method,
            step,
            self._trained(),
            loss=loss,
            loss_reduction=loss_reduction,
            bias=bias,
            sharing=sharing,
            norm=norm,
            fallback=fallback,
            grad_scaler=grad_scaler,
            all_reduce=all_reduce,
            group=group,
            spread=spread,
            strict=strict,
        )

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        terms: float | Tensor | None = None,
        predict: Predict | None = None,
        loss_fn: LossFunction | None = None,
    ) -> Any:
        """Run ``closure`` if given, take its gradients, and update the parameters.

        Parameters of the groups that were frozen and are no more take part from the step after this one.

        Parameters
        ----------
        closure
            Computes the gradients and returns the loss, which this returns too.
        terms
            Number of terms in the loss of this step, where the default count (see the class) is not right.
        predict, loss_fn
            With ``quadratic``, the loss ``loss_fn(predict())`` whose gradients these are: ``predict`` runs the model on the batch and
            returns its outputs, a tensor or a tuple or list of tensors, and ``loss_fn`` makes of outputs like these the scalar loss. It is
            unscaled, and of this rank's part of the batch where ``all_reduce`` is given. Both are run several times, with the same random
            numbers, and leave buffers, gradients, captures and generators as they are. The curvature is positive where ``loss_fn`` is
            convex.

        Raises
        ------
        ValueError
            If ``predict`` and ``loss_fn`` are missing with ``quadratic``, or given without.
        RuntimeError
            At the first step, if no exact curvature products can be taken through what ``predict`` runs.
        """
        lent = self._lent(predict, loss_fn)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine = self.engine
        rates: dict[str, Any] = {}
        decays: dict[str, Any] = {}
        dampings: dict[str, Any] = {}
        names = engine.layout.names
        for group in self.param_groups:
            for p in group["params"]:
                for name in names.get(id(p), ()):
                    rates[name], decays[name], dampings[name] = group["lr"], group["weight_decay"], group["damping"]
        self._write(engine.updates({"learning_rate": rates, "weight_decay": decays, "damping": dampings}, terms, lent))
        engine.join(self._trained())
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in every optimizer; what the backward pass captured of gradients that are thrown away is thrown away too.

        What the forward pass captured stays, since the call may stand between the forward and the backward pass.
        """
        super().zero_grad(set_to_none)
        if self._engine is not None and self._engine.method.fisher == "empirical":
            self._engine.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every optimizer; layers of the new parameters are hooked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            unknown = sorted(set(group) - {"params", "param_names", "lr", "weight_decay", "damping", "initial_lr", "max_lr", "min_lr"})
            if unknown:
                raise ValueError(f"`params` has a group with {unknown[0]!r}; a group may set lr, weight_decay and damping")
            for name in ("lr", "weight_decay"):
                if not isinstance(group[name], Tensor):
                    check_positive(name, group[name], zero=True)
            if group["damping"] is not None:
                check_positive("damping", group["damping"])
            if self._step.quadratic is not None:
                coupled(self._step, group["weight_decay"], ("weight_decay",))
            if self._engine is not None:
                self._engine.plan(self._trained())
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Groups as in every optimizer; curvature and momentum under ``"kfcore"``, in float32 or wider whatever the model's dtype."""
        return super().state_dict() | {"kfcore": self.engine.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly from ``state_dict``.

        Raises
        ------
        kfcore.CheckpointError
            If it is of another model or method; the optimizer is then as it was.
        """
        restored = self.engine.restored(state_dict.get("kfcore"))
        try:
            super().load_state_dict({key: value for key, value in state_dict.items() if key != "kfcore"})
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"the parameter groups of `state_dict` do not fit: {error}") from error
        self.engine.restore(*restored)

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        """An independent optimizer of a copy of the model (of the copy in ``memo``, if the model was copied before)."""
        model = copy.deepcopy(self._model, memo)
        twins = dict(zip(map(id, self._model.parameters()), model.parameters(), strict=True))
        groups = [{**group, "params": [twins[id(p)] for p in group["params"]]} for group in self.param_groups]
        twin = Optimizer(model, params=groups, **self._arguments)
        twin.load_state_dict(copy.deepcopy(self.state_dict()))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an optimizer with hooks cannot be pickled: save `state_dict()`, or `optimizer.save(path)`")

    def _lent(self, predict: Predict | None, loss_fn: LossFunction | None) -> tuple[Predict, LossFunction] | None:
        """What the quadratic model asks for."""
        if self._step.quadratic is None:
            if predict is not None or loss_fn is not None:
                raise ValueError("`predict` and `loss_fn` have no use without `quadratic`, whose model of the loss they are for")
            return None
        if predict is None or loss_fn is None:
            raise ValueError(
                "`predict` and `loss_fn` must be given to `step` with `quadratic`, such as "
                "`optimizer.step(predict=lambda: model(x), loss_fn=lambda z: criterion(z, y))`"
            )
        return predict, loss_fn

    def _trained(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _write(self, updates: Mapping[str, Tensor]) -> None:
        parameters = self.engine.layout.values()
        same = {name: u for name, u in updates.items() if u.dtype == parameters[name].dtype}
        if same:
            torch._foreach_add_([parameters[name] for name in same], list(same.values()))  # pyright: ignore[reportPrivateImportUsage]
        for name, update in updates.items():
            if name not in same:
                p = parameters[name]
                p.copy_(added(p, update))
