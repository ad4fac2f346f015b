"""Convolutions over one, two or three spatial axes: strided, dilated, grouped, transposed, with any padding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from kfcore._array import Array, Namespace, append, cast, device, namespace
from kfcore.layers.base import Layer, Parameters, Plain, Sharing, mask_positions, merge
from kfcore.layers.linear import Bias
from kfcore.linalg import gram
from kfcore.patches import PADDING_MODES, PaddingMode, Window, patch_means, patch_moments, patch_rows

Padding: TypeAlias = int | tuple[int, ...] | tuple[tuple[int, int], ...] | Literal["valid", "same"]


@dataclass(frozen=True)
class Conv(Plain):
    """A convolution (cross-correlation, as in all frameworks) ``y[o, p] = sum_{i, k} w[o, i, k] x[i, stride p + dilation k] + b[o]``.

    It is a dense layer on patches of its input, shared by all S output positions (KFC, Grosse and Martens 2016; expand and reduce as in
    Eschenhagen et al. 2023). Its matrix is ``[out, in x kernel]``, columns in the order of ``weight.reshape(out, -1)`` of a PyTorch
    weight. Groups are independent layers: one exact block each, stacked, ``[groups, out / groups, in / groups x kernel]``.

    Parameters
    ----------
    in_channels, out_channels
        Channels, of all groups together.
    kernel
        Size of the kernel, one entry for each of one to three spatial axes.
    stride, dilation
        Steps of the window, and between the kernel's entries; an int stands for all axes.
    padding
        An int; one int an axis; a pair ``(low, high)`` an axis, negative numbers cropping; ``"valid"`` for none; or ``"same"``, by which
        the output has ``ceil(input / stride)`` positions, an odd one too many going to the high side. At stride 1 that is what PyTorch
        and XLA both do; at larger strides, where PyTorch has no ``"same"``, it is XLA's and depends on the size of the input.
    padding_mode
        ``"zeros"``, ``"reflect"`` (without repeating the edge), ``"replicate"`` or ``"circular"``.
    groups
        Channels are cut into so many groups that do not see each other; ``groups=in_channels`` is a depthwise convolution.
    transposed
        A transposed convolution as in ``torch.nn.ConvTranspose2d``: ``stride`` and ``padding`` are those of the convolution it
        transposes. It is an ordinary one with the kernel flipped, over the input with ``stride - 1`` zeros between its positions.
    output_padding
        Of a transposed convolution: positions added to the high side of the output.
    input_dilation
        XLA's ``lhs_dilation``: the convolution passes over the input with ``input_dilation - 1`` zeros between its positions. With
        explicit padding this expresses ``jax.lax.conv_transpose`` and Flax's ``ConvTranspose``, whose kernels are not flipped.
    bias
        As in :class:`kfcore.Linear`.
    sharing
        ``"expand"`` where the loss keeps the positions (segmentation), ``"reduce"`` where the net pools them (classification).
    layout
        How the user stores the weight. ``"oi"``: ``[out, in / groups, *kernel]``, for a transposed convolution
        ``[in, out / groups, *kernel]`` (PyTorch). ``"io"``: the first two axes last and swapped, ``[*kernel, in / groups, out]``, for a
        transposed one ``[*kernel, out / groups, in]`` (XLA, Flax, Keras).
    channels
        Where captured arrays have their channels: ``"first"`` for ``[N, channels, *spatial]``, ``"last"`` for ``[N, *spatial, channels]``.
    leading
        Leading axes of parameters and captured arrays that hold as many independent layers of equal shape (a scan over layers): what
        ``stack`` is in :class:`kfcore.Linear`. Groups are stacked behind them.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: Padding = 0
    padding_mode: PaddingMode = "zeros"
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    transposed: bool = False
    output_padding: int | tuple[int, ...] = 0
    input_dilation: int | tuple[int, ...] = 1
    bias: Literal["joint", "separate"] | bool | None = "joint"
    sharing: Sharing = "expand"
    layout: Literal["oi", "io"] = "oi"
    channels: Literal["first", "last"] = "first"
    leading: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, tuple) or len(self.kernel) not in (1, 2, 3) or not all(_is_int(k, 1) for k in self.kernel):
            raise ValueError(f"`kernel` of Conv must be a tuple of one to three positive ints, one a spatial axis, got {self.kernel!r}")
        for name in ("in_channels", "out_channels", "groups"):
            if not _is_int(getattr(self, name), 1):
                raise ValueError(f"`{name}` of Conv must be a positive int, got {getattr(self, name)!r}")
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"`groups` of Conv must divide `{name}` = {getattr(self, name)}, got {self.groups!r}")
        for name, least in (("stride", 1), ("dilation", 1), ("output_padding", 0), ("input_dilation", 1)):
            object.__setattr__(self, name, _each(name, getattr(self, name), len(self.kernel), least))
        object.__setattr__(self, "padding", _pairs(self.padding, len(self.kernel)))
        if not isinstance(self.leading, tuple) or not all(_is_int(n, 1) for n in self.leading):
            raise ValueError(f"`leading` of Conv must be a tuple of positive ints, got {self.leading!r}")
        if self.bias is True or self.bias is False:
            object.__setattr__(self, "bias", "joint" if self.bias else None)
        for name, allowed in (
            ("bias", ("joint", "separate", None)),
            ("padding_mode", PADDING_MODES),
            ("transposed", (False, True)),
            ("sharing", ("expand", "reduce")),
            ("layout", ("oi", "io")),
            ("channels", ("first", "last")),
        ):
            value = getattr(self, name)
            if not isinstance(value, str | bool | None) or value not in allowed:
                raise ValueError(f"`{name}` of Conv must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        self._check_combination()

    def _check_combination(self) -> None:
        """Raise where parameters that are valid by themselves exclude each other."""
        stride, dilation, more, spread = map(_ints, (self.stride, self.dilation, self.output_padding, self.input_dilation))
        if self.padding == "same" and (self.transposed or max(spread) > 1):
            kind = "a transposed Conv" if self.transposed else "Conv with `input_dilation`"
            raise ValueError(f"`padding` of {kind} must be given in numbers, got 'same'")
        if self.padding_mode != "zeros":
            if self.transposed or max(spread) > 1:
                raise ValueError(f"`padding_mode` of a transposed or input-dilated Conv must be 'zeros', got {self.padding_mode!r}")
            if self.padding != "same" and any(side < 0 for pair in _pairs_of(self.padding) for side in pair):
                raise ValueError(f"`padding` of Conv with padding_mode={self.padding_mode!r} must not be negative, got {self.padding!r}")
        if self.transposed:
            if max(spread) > 1:
                raise ValueError(f"`input_dilation` of a transposed Conv must be 1, for `stride` says it, got {self.input_dilation!r}")
            if any(m >= max(s, d) for m, s, d in zip(more, stride, dilation, strict=True)):
                raise ValueError(f"`output_padding` of Conv must be smaller than `stride` or `dilation`, got {self.output_padding!r}")
        elif any(more):
            raise ValueError(f"`output_padding` of Conv is for transposed=True and must otherwise be 0, got {self.output_padding!r}")

    # -- geometry ------------------------------------------------------------------------------------------------------

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out / groups, in / groups x kernel)`` of each group, with a joint bias one column more."""
        columns = self.in_channels // self.groups * math.prod(self.kernel)
        return self.out_channels // self.groups, columns + (self.bias == "joint")

    @property
    def stack(self) -> tuple[int, ...]:
        """``(*leading, groups)``, or ``leading`` for a single group."""
        return (*self.leading, self.groups) if self.groups > 1 else self.leading

    def window(self, spatial: tuple[int, ...]) -> Window:
        """How the kernel passes over an input of this size, as an ordinary convolution."""
        stride, dilation = _ints(self.stride), _ints(self.dilation)
        if self.transposed:
            more = _ints(self.output_padding)
            edges = [d * (k - 1) for k, d in zip(self.kernel, dilation, strict=True)]
            given = zip(edges, _pairs_of(self.padding), more, strict=True)
            padding = tuple((edge - low, edge - high + extra) for edge, (low, high), extra in given)
            return Window(self.kernel, (1,) * self.axes, dilation, padding, "zeros", stride)
        if self.padding == "same":
            sizes = zip(spatial, self.kernel, stride, dilation, strict=True)
            wanted = [max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n) for n, k, s, d in sizes]
            padding = tuple((total // 2, total - total // 2) for total in wanted)
        else:
            padding = _pairs_of(self.padding)
        return Window(self.kernel, stride, dilation, padding, self.padding_mode, _ints(self.input_dilation))

    # -- parameters ----------------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the layer's parameters in the user's layout, by role."""
        first, second = (self.in_channels, self.out_channels) if self.transposed else (self.out_channels, self.in_channels)
        second //= self.groups
        weight = (first, second, *self.kernel) if self.layout == "oi" else (*self.kernel, second, first)
        shapes: dict[str, tuple[int, ...]] = {"weight": (*self.leading, *weight)}
        return shapes | {"bias": (*self.leading, self.out_channels)} if self.bias else shapes

    def blocks(self) -> dict[str, Layer]:
        """The curvature blocks of this layer: itself under ``""``, or its weight and its bias (of all groups) apart."""
        if self.bias != "separate":
            return {"": self}
        return {".weight": replace(self, bias=None), ".bias": Bias(self.out_channels, self.leading, self.axes)}

    def to_oi(self, weight: Array) -> Array:
        """The user's weight as that of the ordinary convolution, ``[*leading, out, in / groups, *kernel]``, the layout of files."""
        xp, lead = namespace(weight), len(self.leading)
        if self.layout == "io":
            weight = _permuted(xp, weight, lead, (self.axes + 1, self.axes, *range(self.axes)))
        return _swapped(xp, weight, self.groups, lead) if self.transposed else weight

    def from_oi(self, weight: Array) -> Array:
        """Inverse of :meth:`to_oi`."""
        xp, lead = namespace(weight), len(self.leading)
        if self.transposed:
            weight = _swapped(xp, weight, self.groups, lead)
        return _permuted(xp, weight, lead, (*range(2, self.axes + 2), 1, 0)) if self.layout == "io" else weight

    def matrices(self, params: Parameters) -> dict[str, Array]:
        """The parameters (or their gradients) as one matrix a block, ``[*leading, groups, rows, columns]`` where there are groups."""
        xp, (rows, columns) = namespace(params["weight"]), replace(self, bias=None).shape
        weight = xp.reshape(self.to_oi(params["weight"]), (*self.stack, rows, columns))
        if self.bias == "separate":
            return {".weight": weight, ".bias": params["bias"][..., :, None]}
        if self.bias is None:
            return {"": weight}
        return {"": append(xp, weight, xp.reshape(params["bias"], (*self.stack, rows)))}

    def parameters_of(self, matrices: Mapping[str, Array]) -> dict[str, Array]:
        """Inverse of :meth:`matrices`."""
        matrix = matrices[".weight" if self.bias == "separate" else ""]
        xp = namespace(matrix)
        body = matrix[..., :, :-1] if self.bias == "joint" else matrix
        shape = (*self.leading, self.out_channels, self.in_channels // self.groups, *self.kernel)
        params = {"weight": self.from_oi(xp.reshape(body, shape))}
        if self.bias == "separate":
            params["bias"] = matrices[".bias"][..., :, 0]
        elif self.bias == "joint":
            params["bias"] = xp.reshape(matrix[..., :, -1], (*self.leading, self.out_channels))
        return params

    # -- captured arrays -----------------------------------------------------------------------------------------------

    @property
    def unmaskable(self) -> str:
        """A patch is made of several positions of the input, masked ones and others."""
        return "the positions of its output are not those of its input"

    def capture(self, inputs: Array, output_grads: Array | None) -> tuple[Array, Array | None]:
        """Bring what a user recorded to ``inputs [N, *spatial, in]`` and ``output_grads [N, S, out]``.

        It is ``[N, in, *spatial]`` and ``[N, out, *outputs]``, or both with the channels last. All behind the axes of ``leading``.
        """
        xp = namespace(inputs, output_grads)
        flat = self._channels_last(xp, "inputs", inputs, self.in_channels)
        lead = len(self.leading)
        examples, spatial = flat.shape[lead], tuple(flat.shape[lead + 1 : -1])
        outputs = self.window(spatial).outputs(spatial)
        if min(outputs) < 1:
            raise ValueError(f"`inputs` must be at least as large as the kernel {self.kernel} spreads, got {tuple(inputs.shape)}")
        self._check_padding(spatial, inputs)
        if output_grads is None:
            return flat, None
        grads = self._channels_last(xp, "output_grads", output_grads, self.out_channels)
        if tuple(grads.shape[:-1]) != (*self.leading, examples, *outputs):
            expected = self._axes_of(examples, self.out_channels, outputs)
            raise ValueError(
                f"`output_grads` must have shape {expected} for `inputs` of shape {tuple(inputs.shape)}, got {tuple(output_grads.shape)}"
            )
        return flat, xp.reshape(grads, (*self.leading, examples, math.prod(outputs), self.out_channels))

    def capture_mask(self, mask: Array, inputs: Array) -> Array:
        """Refused, see :attr:`unmaskable`."""
        return mask_positions(self, mask, inputs.shape, inputs)

    def input_rows(self, xp: Namespace, inputs: Array, dtype: object, mask: None = None) -> Array:
        """Patches as rows ``[..., *stack, n, columns]``; n = N S for expand, N (each the mean of its S patches) for reduce."""
        offsets, width = math.prod(self.kernel), self.in_channels // self.groups
        if self.sharing == "expand":
            rows = patch_rows(xp, cast(xp, inputs, dtype), self._window_of(inputs), self.groups)
            rows = xp.reshape(rows, (*rows.shape[:-1], offsets, width)).mT
            rows = xp.reshape(rows, (*self._stacked(rows.shape[:-3]), rows.shape[-3], width * offsets))
        else:
            rows = self._mean_rows(xp, inputs, dtype)
        return append(xp, rows, 1.0) if self.bias == "joint" else rows

    def input_count(self, inputs: Array, mask: None = None) -> int:
        """Rows of :meth:`input_rows`, in each group."""
        spatial = tuple(inputs.shape[-1 - self.axes : -1])
        return inputs.shape[-2 - self.axes] * (math.prod(self.window(spatial).outputs(spatial)) if self.sharing == "expand" else 1)

    def input_gram(self, xp: Namespace, inputs: Array, dtype: object, mask: None = None) -> Array:
        """Second moment of the patches ``[..., *stack, columns, columns]``; their matrix is never held (expand)."""
        if self.sharing == "reduce":
            return gram(xp, self.input_rows(xp, inputs, dtype))
        window = self._window_of(inputs)
        moment, first = patch_moments(xp, inputs, window, self.groups, dtype)
        # patches have their channels last, the columns of the matrix have them first
        leading, k, (offsets, width) = moment.shape[:-3], moment.ndim - 2, (math.prod(self.kernel), self.in_channels // self.groups)
        stack = self._stacked(moment.shape[:-2])
        moment = xp.reshape(moment, (*leading, self.groups, offsets, width, offsets, width))
        moment = xp.permute_dims(moment, (*range(k), k + 1, k, k + 3, k + 2))
        moment = xp.reshape(moment, (*stack, offsets * width, offsets * width))
        if self.bias != "joint":
            return moment
        first = xp.reshape(xp.reshape(first, (*stack, offsets, width)).mT, (*stack, offsets * width))
        corner = xp.full((*stack, 1), float(self.input_count(inputs)), dtype=moment.dtype, device=device(moment))
        return append(xp, xp.concat([moment, first[..., None, :]], axis=-2), xp.concat([first, corner], axis=-1))

    def input_sum(self, xp: Namespace, inputs: Array, dtype: object, mask: None = None) -> Array:
        """Sum of the patches ``[..., *stack, columns]``: those of the sum of all examples, which is one image."""
        image = xp.sum(inputs, axis=inputs.ndim - 2 - self.axes, keepdims=True, dtype=dtype)
        count = self.input_count(inputs)
        # a mean over positions is what each example adds; with "expand" it stands for as many rows as there are positions
        total = self._mean_rows(xp, image, dtype) * float(self.input_count(image))
        return (append(xp, total, float(count)) if self.bias == "joint" else total)[..., 0, :]

    def output_rows(self, xp: Namespace, output_grads: Array, dtype: object, inputs: Array | None = None, mask: None = None) -> Array:
        """Rows ``[..., *stack, n, out / groups]``; n = N S for expand, N for reduce."""
        grads = cast(xp, output_grads, dtype)
        rows = merge(xp, grads) if self.sharing == "expand" else xp.sum(grads, axis=-2)
        if self.groups == 1:
            return rows
        rows = xp.reshape(rows, (*rows.shape[:-1], self.groups, self.out_channels // self.groups))
        k = rows.ndim - 3
        return xp.permute_dims(rows, (*range(k), k + 1, k, k + 2))

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _mean_rows(self, xp: Namespace, inputs: Array, dtype: object) -> Array:
        """The mean patch of each example ``[..., *stack, N, columns]``, without the 1 of a joint bias."""
        rows, width = patch_means(xp, inputs, self._window_of(inputs), dtype), self.in_channels // self.groups
        rows = xp.reshape(rows, (*rows.shape[:-1], self.groups, width))
        k = rows.ndim - 4
        rows = xp.permute_dims(rows, (*range(k), k + 2, k, k + 3, k + 1))
        return xp.reshape(rows, (*self._stacked(rows.shape[:-3]), rows.shape[-3], width * rows.shape[-1]))

    def _window_of(self, inputs: Array) -> Window:
        return self.window(tuple(inputs.shape[-1 - self.axes : -1]))

    def _axes_of(self, examples: int | str, channels: int, spatial: tuple[int | str, ...]) -> str:
        """A shape in the user's order of axes, for messages."""
        axes = (examples, channels, *spatial) if self.channels == "first" else (examples, *spatial, channels)
        return f"[{', '.join(map(str, (*self.leading, *axes)))}]"

    def _channels_last(self, xp: Namespace, name: str, x: Array, channels: int) -> Array:
        """``x`` as ``[*leading, N, *spatial, channels]``, a view."""
        lead, place = len(self.leading), -1 - self.axes if self.channels == "first" else -1
        if x.ndim != lead + self.axes + 2 or tuple(x.shape[:lead]) != self.leading or x.shape[place] != channels:
            spatial = ("D", "H", "W")[-self.axes :] if self.axes > 1 else ("L",)
            raise ValueError(f"`{name}` must have shape {self._axes_of('N', channels, spatial)}, got {tuple(x.shape)}")
        return _permuted(xp, x, lead, (0, *range(2, self.axes + 2), 1)) if self.channels == "first" else x

    def _check_padding(self, spatial: tuple[int, ...], inputs: Array) -> None:
        """Raise where a padding that repeats positions wants more of them than there are."""
        if self.padding_mode in ("reflect", "circular"):
            limit = [n - (self.padding_mode == "reflect") for n in spatial]
            if any(max(pair) > n for pair, n in zip(self.window(spatial).padding, limit, strict=True)):
                raise ValueError(
                    f"`inputs` are too small for padding {self.padding!r} in mode {self.padding_mode!r}, which repeats at most "
                    f"{tuple(limit)} positions of shape {tuple(inputs.shape)}"
                )

    def _stacked(self, leading: tuple[int, ...]) -> tuple[int, ...]:
        """Leading axes that end with the groups, without them where there is one group."""
        return tuple(leading) if self.groups > 1 else tuple(leading[:-1])


def _permuted(xp: Namespace, x: Array, lead: int, axes: tuple[int, ...]) -> Array:
    """``x`` with the axes behind the first ``lead`` in another order."""
    return xp.permute_dims(x, (*range(lead), *(lead + a for a in axes)))


def _swapped(xp: Namespace, weight: Array, groups: int, lead: int) -> Array:
    """``[..., in, out / groups, *kernel]`` of a transposed convolution as ``[..., out, in / groups, *kernel]`` of the ordinary one.

    Or back; ``lead`` axes stand before.
    """
    leading, (first, second, *kernel) = weight.shape[:lead], weight.shape[lead:]
    parts = xp.reshape(weight, (*leading, groups, first // groups, second, *kernel))
    parts = _permuted(xp, parts, lead, (0, 2, 1, *range(3, len(kernel) + 3)))
    parts = xp.reshape(parts, (*leading, groups * second, first // groups, *kernel))
    return xp.flip(parts, axis=tuple(range(lead + 2, weight.ndim)))


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _each(name: str, value: int | tuple[int, ...], axes: int, least: int) -> tuple[int, ...]:
    """``value`` with one entry an axis."""
    parts = value if isinstance(value, tuple) else (value,) * axes
    if len(parts) != axes or not all(_is_int(part, least) for part in parts):
        kind = "positive" if least else "non-negative"
        raise ValueError(f"`{name}` of Conv must be a {kind} int or a tuple of {axes} such ints, got {value!r}")
    return parts


def _ints(value: int | tuple[int, ...]) -> tuple[int, ...]:
    """The tuple that :func:`_each` made."""
    assert isinstance(value, tuple)
    return value


def _pairs(padding: Padding, axes: int) -> Padding:
    """``padding`` as pairs, ``"same"`` as it is."""
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(f"`padding` of Conv must be ints, pairs of ints, 'valid' or 'same', got {padding!r}")
        return padding if padding == "same" else ((0, 0),) * axes
    parts = padding if isinstance(padding, tuple) else (padding,) * axes
    pairs = tuple((part, part) if _is_int(part, 0) else part for part in parts)
    good = [isinstance(p, tuple) and len(p) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in p) for p in pairs]
    if len(pairs) != axes or not all(good):
        raise ValueError(
            f"`padding` of Conv must be a non-negative int, a tuple of {axes} such ints or of {axes} pairs (low, high) of ints, 'valid' "
            f"or 'same', got {padding!r}"
        )
    return pairs  # pyright: ignore[reportReturnType]


def _pairs_of(padding: Padding) -> tuple[tuple[int, int], ...]:
    """The pairs that :func:`_pairs` made."""
    assert isinstance(padding, tuple)
    return padding  # pyright: ignore[reportReturnType]
