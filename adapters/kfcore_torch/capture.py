"""Seeing a layer's inputs and output gradients: one forward hook, and a tensor hook on the output where gradients are wanted.

A hook on the output tensor, unlike a full backward hook, survives in-place activations, sees every call of a reused module, and
fires exactly once for an output in each backward pass it takes part in; nothing is stored for one that takes part in none. Passes of the
user's own through the layers (``torch.autograd.grad`` for an input gradient, say) are seen too: make them with ``wanted`` off.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from kfcore_torch import attention
from kfcore_torch.attention import Projection, Watch
from kfcore_torch.views import Reader, View

Sink = Callable[[str, Tensor, Tensor | None, tuple[int, ...], Any], None]
Refuse = Callable[[str, str], None]


class Use(NamedTuple):
    """A use of a layer whose output gradients are still to come."""

    layer: str
    inputs: Tensor
    edge: Any
    """Of the output in the graph."""
    view: View | str | None
    """See :mod:`kfcore_torch.views`; ``None`` where the layer takes what the module does, a text where this is no use of it."""
    call: Any
    """What :attr:`Capture.called` gave."""


class Capture:
    """Hooks on the layers of a model.

    They feed the sink while ``wanted``, and with a sink that needs the output gradients at every step also while ``counting``. Where more
    is to be known of a use than its arrays, ``called`` is run at each call with the layer's name and, for the keys and values of attention
    that are not those of its queries, its ``key_padding_mask``. Examples then come first in all arrays (see
    :data:`kfcore_torch.views.Reader`).

    Parameters
    ----------
    calls
        Layers with the modules whose calls are their uses, and how these are read (see :mod:`kfcore_torch.views`).
    attentions
        Attention modules with the layers inside of them.
    sink
        Called as ``sink(layer, inputs, output_grads, shape of the output, call)`` for every use of a layer, ``call`` being what
        :attr:`called` gave at the call, or ``None``.
    refuse
        Called as ``refuse(layer, reason)`` for every call that is no use of the layer although its module is the layer's.
    output_grads
        Whether output gradients are wanted; if not, the sink is called in the forward pass of training mode and no backward hook exists.
    deferred
        Keep each use for :meth:`take`, instead of waiting for the training backward.
    """

    def __init__(
        self,
        calls: Sequence[tuple[str, nn.Module, Reader | None]],
        attentions: Sequence[tuple[nn.Module, Sequence[Projection]]],
        sink: Sink,
        refuse: Refuse,
        *,
        output_grads: bool,
        deferred: bool,
    ) -> None:
        self.wanted = True
        self.counting = False
        self.called: Callable[[str, Tensor | None], Any] | None = None
        self._sink, self._refuse = sink, refuse
        self._output_grads = output_grads
        self._deferred = deferred
        self._uses: list[Use] = []
        me: weakref.ref[Any] = weakref.ref(self)
        self._handles = [
            module.register_forward_hook(cast("Any", _Hook(me, weakref.ref(module), layer, reader)), with_kwargs=True)
            for layer, module, reader in calls
        ]

        def wanted() -> bool:
            capture = me()
            return capture is not None and capture._looking()

        def seen(layer: str, inputs: Tensor, output: Tensor, training: bool, view: View, padding: Tensor | None) -> None:
            capture = me()
            if capture is not None:
                capture.use(layer, inputs, output, training, view, padding)

        for module, projections in attentions:
            self._handles += Watch(module, projections, wanted, seen).attach(me)

    def _looking(self) -> bool:
        return (self.wanted or self.counting) and torch.is_grad_enabled()

    def use(
        self,
        layer: str,
        inputs: Tensor,
        output: Tensor,
        training: bool,
        view: View | str | None = None,
        padding: Tensor | None = None,
    ) -> None:
        """A layer was called; ``view`` gives what it takes, where that is not what its module was called with and gave."""
        if not self._looking() or not output.requires_grad:
            return
        inputs = inputs.detach()
        call = None if self.called is None else self.called(layer, padding)
        if not self._output_grads:
            if training:
                self._give(layer, inputs, output.detach(), view, call)
        elif self._deferred:
            self._uses.append(Use(layer, inputs, torch.autograd.graph.get_gradient_edge(output), view, call))
        else:
            me = weakref.ref(self)

            def fire(grad: Tensor) -> None:
                capture = me()
                if capture is not None and (capture.wanted or capture.counting):
                    capture._fire(layer, inputs, grad, view, call)

            output.register_hook(fire)

    def _fire(self, layer: str, inputs: Tensor, grad: Tensor, view: View | str | None, call: Any) -> None:
        if torch.is_grad_enabled():  # a backward pass that is to be differentiated
            with torch.no_grad():
                self._give(layer, inputs, grad.detach(), view, call)
        else:
            self._give(layer, inputs, grad, view, call)

    def deliver(self, use: Use, grad: Tensor) -> None:
        """The output gradient of a deferred use."""
        self._give(use.layer, use.inputs, grad, use.view, use.call)

    def _give(self, layer: str, inputs: Tensor, y: Tensor, view: View | str | None, call: Any) -> None:
        """Hand a use to the sink; ``y`` is the output gradient, or the output where no gradients are wanted."""
        if isinstance(view, str):
            self._refuse(layer, view)
            return
        if view is not None:
            inputs, y = view(inputs, y)
        self._sink(layer, inputs, y if self._output_grads else None, y.shape, call)

    def take(self) -> list[Use]:
        """The deferred uses since the last call."""
        uses, self._uses = self._uses, []
        return uses

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.wanted = self.counting = False
        self._uses = []


class _Hook:
    """Forward hook that serves one module of one capture; a copied or unpickled module carries an inert one."""

    def __init__(self, capture: weakref.ref[Any], module: weakref.ref[nn.Module], layer: str, reader: Reader | None) -> None:
        self.capture, self.module, self.layer, self.reader = capture, module, layer, reader

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        # a compiler leaves the hook out of its program; otherwise its switch costs more than the hook
        (self._outside if torch.compiler.is_compiling() else self._use)(module, args, kwargs, output)

    def _use(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        capture = self.capture()
        if capture is not None and self.module() is module:
            inputs = args[0] if args else kwargs["input"] if "input" in kwargs else kwargs["x"]  # which is that of nn.RMSNorm
            view = self.reader and self.reader(module, capture.called is not None)
            capture.use(self.layer, inputs, output, module.training, view)

    _outside: Any = torch.compiler.disable(_use)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


def captures_of(model: nn.Module) -> list[Capture]:
    """Those whose hooks are on ``model``."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    found = [hook.capture() for hook in hooks if isinstance(hook, (_Hook, attention.Hook)) and hook.capture is not None]
    return list({id(capture): capture for capture in found if capture is not None}.values())


class _Inert:
    def __call__(self, *args: Any) -> None:
        """Nothing: the copy of a model is not watched by the optimizer of the original."""
