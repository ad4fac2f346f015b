"""Seeing the four products inside of ``nn.MultiheadAttention``, whose weights are used without a call of a module.

While such a module runs its forward pass a :class:`torch.overrides.TorchFunctionMode` watches it. ``F.multi_head_attention_forward`` is
Python code that asks first whether anybody overrides it, and would hand itself to the mode as a whole; it is therefore run without that
question, and the mode is asked about each ``F.linear`` in it. Nothing that is computed changes.
"""

from __future__ import annotations

import operator
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from kfcore_torch.views import View

Seen = Callable[[str, Tensor, Tensor, bool, View, Tensor | None], None]


class Projection(NamedTuple):
    """Rows of a weight of an attention module that are a layer."""

    layer: str
    weight: str
    """Attribute of the module, such as ``"out_proj.weight"``."""
    rows: tuple[int, int] | None

    @property
    def of_keys(self) -> bool:
        """Whether it is a projection of the keys or of the values."""
        return self.weight in ("k_proj_weight", "v_proj_weight") or (self.rows is not None and self.rows[0] > 0)


class Watch:
    """Watches one attention module for one capture; its methods are the hooks before and after the module's forward pass.

    Parameters
    ----------
    module, projections
        The module and its layers.
    wanted
        Asked before each forward pass whether to look.
    seen
        Called as ``seen(layer, inputs, output, training, view, padding)`` for every use of a layer. ``inputs`` are ``[N, S, in]``; ``view``
        brings an array of the shape of ``output`` (its gradient) to ``[N, S, out]``; ``padding`` is the ``key_padding_mask`` where these
        are keys or values, and the keys are not the queries.
    """

    def __init__(self, module: nn.Module, projections: Sequence[Projection], wanted: Callable[[], bool], seen: Seen) -> None:
        self._module = weakref.ref(module)
        self._projections = tuple(projections)
        self._wanted, self._seen = wanted, seen
        self._mode: _Mode | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start watching."""
        query = args[0] if args else kwargs.get("query")
        if self._module() is not module or not isinstance(query, Tensor) or not self._wanted():
            return
        examples = query.shape[0 if module.batch_first else 1] if query.ndim == 3 else 1
        own = (args[1] if len(args) > 1 else kwargs.get("key")) is query
        padding = None if own else args[3] if len(args) > 3 else kwargs.get("key_padding_mask")
        if self._mode is not None:  # an interrupt from the keyboard calls no hooks: it is still active
            self._mode.examples, self._mode.padding = examples, padding
            return
        self._mode = _Mode(module, self._projections, self._seen, examples, padding)
        self._mode.__enter__()

    def after(self, module: nn.Module, *rest: Any) -> None:
        """Stop watching, also if the forward pass ended in an exception (activation checkpointing stops it so)."""
        if self._mode is not None and self._module() is module:
            self._mode.__exit__(None, None, None)
            self._mode = None

    def attach(self, capture: Any) -> list[Any]:
        """Hook the module for ``capture``, a weak reference; gives handles that have ``remove``."""
        module = self._module()
        assert module is not None
        first = module.register_forward_pre_hook(Hook(self.before, capture), with_kwargs=True)
        return [first, module.register_forward_hook(Hook(self.after, capture), always_call=True)]


class Hook:
    """A hook that serves one module; a copied or unpickled module carries an inert one."""

    def __init__(self, call: Callable[..., None] | None = None, capture: Any = None) -> None:
        self._call, self.capture = call, capture

    def __call__(self, *args: Any) -> None:
        """Run it."""
        # a compiler leaves the hook out of its program, and compiles what is between two of them under the mode, or leaves it out too
        (self._outside if torch.compiler.is_compiling() else self._run)(*args)

    def _run(self, *args: Any) -> None:
        if self._call is not None:
            self._call(*args)

    _outside: Any = torch.compiler.disable(_run)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class _Mode(TorchFunctionMode):
    """Sees the products with the weights of a module while its forward pass runs."""

    def __init__(self, module: nn.Module, projections: Sequence[Projection], seen: Seen, examples: int, padding: Tensor | None) -> None:
        super().__init__()
        self._module, self._projections, self._seen = module, projections, seen
        self.examples, self.padding = examples, padding

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            with self:
                return _unasked(func)(*args, **kwargs)
        output = func(*args, **kwargs)
        if func is functional.linear and len(args) > 1:
            self._product(args[0], args[1], output)
        return output

    def _product(self, inputs: Tensor, weight: Tensor, output: Tensor) -> None:
        """Report the layers whose rows are in ``weight``, which is one of the module's or a view of some of its rows."""
        for projection in self._projections:
            layer, attribute, rows = projection
            held = operator.attrgetter(attribute)(self._module)
            if held is None or _base(weight) is not _base(held) or not held.numel():
                continue
            first = (weight.storage_offset() - held.storage_offset()) // held.stride(0)
            start, stop = (0, held.shape[0]) if rows is None else rows
            start, stop = start - first, stop - first
            if start >= 0 and stop <= weight.shape[0]:
                rows = _Rows(self.examples, start, stop)
                padding = self.padding if projection.of_keys else None
                self._seen(layer, _positions(inputs, self.examples), output, self._module.training, rows, padding)


class _Rows(NamedTuple):
    """Takes some of the features of a projection, by example."""

    examples: int
    start: int
    stop: int

    def __call__(self, inputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, _positions(y[..., self.start : self.stop], self.examples)


def _positions(x: Tensor, examples: int) -> Tensor:
    """``[N, S, features]`` from what attention computes with, ``[S, N, features]``, or the same as one axis of positions."""
    return (x if x.ndim == 3 else x.unflatten(0, (-1, examples))).transpose(0, 1)


def _base(x: Tensor) -> Tensor:
    return x if x._base is None else x._base


def _unasked(function: Any) -> Any:
    """A function of :mod:`torch.nn.functional` that does not ask whether it is overridden."""
    space = vars(functional) | {"has_torch_function": lambda _: False}
    found = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__, function.__closure__)
    found.__kwdefaults__ = function.__kwdefaults__
    return found
