"""Primitives of the core that PyTorch computes faster than the portable reference. Each passes the reference's tests."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kfcore import register_kernel
from kfcore.patches import Window

ODD = 256
"""From this width on, one column beyond a multiple of 16 (a joint bias) is cheaper apart: 1025 columns cost a third more than 1024."""


def truth(xp: Any, flag: bool | Tensor) -> bool | Tensor:
    """A bool on the CPU, outside of compiled and batched programs. Elsewhere the host would wait for the device."""
    return bool(flag) if isinstance(flag, bool) or _readable(flag) else flag


def number(xp: Any, value: Tensor) -> float | Tensor:
    """A float under the same conditions."""
    return float(value) if _readable(value) else value


def blend(xp: Any, old: Tensor, new: Tensor, keep: Any, weight: Any, ok: bool | Tensor) -> Tensor:
    """With one pass and one array less: the second term is added in the pass that makes it, into the first."""
    if isinstance(ok, bool):
        if not ok:
            return old
        if isinstance(keep, float) and isinstance(weight, float):
            return torch.add(new, old, alpha=keep) if weight == 1.0 else torch.mul(old, keep).add_(new, alpha=weight)
        return torch.addcmul(old * keep, new, weight) if isinstance(weight, Tensor) else torch.add(old * keep, new, alpha=weight)
    if ok.ndim:
        keep, weight, ok = keep[..., None, None], weight[..., None, None], ok[..., None, None]
    return torch.where(ok, torch.addcmul(old * keep, new, weight), old)


def energy(xp: Any, x: Tensor) -> Tensor:
    """Without an array of squares."""
    if x.ndim != 2 or not x.is_contiguous():
        return torch.sum(x * x, dim=(-2, -1))
    flat = x.view(-1)
    return torch.dot(flat, flat)


def absorb(xp: Any, old: Tensor, rows: Tensor, keep: Any, weight: Any, ok: bool | Tensor) -> Tensor:
    """The product is added to the scaled average in the pass that makes it."""
    if ok is True and rows.ndim == 2 and isinstance(keep, float) and isinstance(weight, float):
        return torch.addmm(old, rows.mT, rows, beta=keep, alpha=weight)
    return blend(xp, old, rows.mT @ rows, keep, weight, ok)


def append(xp: Any, x: Tensor, column: float | Tensor) -> Tensor:
    """Past the promotion rules of the general concatenation."""
    last = column.unsqueeze(-1) if isinstance(column, Tensor) else x.new_full((*x.shape[:-1], 1), column)
    return torch.cat([x, last], dim=-1)


def trace(xp: Any, x: Tensor) -> Tensor:
    """Of one matrix in a single call."""
    return torch.trace(x) if x.ndim == 2 else xp.linalg.trace(x)


def total(xp: Any, arrays: list[Tensor]) -> float | Tensor:
    """All sums first, then all reads."""
    sums = [torch.sum(x) for x in arrays]
    if all(map(_readable, sums)):
        return sum(map(float, sums))
    return torch.stack([s.to(arrays[0].dtype) for s in sums]).sum()


def scale_all(xp: Any, arrays: list[Tensor], factors: list[Any]) -> list[Tensor]:
    """In one call for all."""
    if all(isinstance(factor, float) for factor in factors):
        return list(torch._foreach_mul(arrays, factors))  # pyright: ignore[reportPrivateImportUsage]
    return [factor * x for x, factor in zip(arrays, factors, strict=True)]


def shift(xp: Any, x: Tensor, value: float | Tensor) -> Tensor:
    """Only the diagonal is added to: no identity is made, and no product of it."""
    if isinstance(value, float):
        shifted = x.clone(memory_format=torch.contiguous_format)
        shifted.diagonal(dim1=-2, dim2=-1).add_(value)
        return shifted
    assert isinstance(value, Tensor)
    return torch.diagonal_scatter(x, x.diagonal(dim1=-2, dim2=-1) + value[..., None], dim1=-2, dim2=-1)


def sandwich(xp: Any, left: Tensor, x: Tensor, right: Tensor) -> Tensor:
    """Two products; a last odd column as a vector beside a matrix of even width."""
    n = right.shape[-1]
    if x.ndim != 2 or right.ndim != 2 or right.shape[0] != n or n % 16 != 1 or n < ODD:
        return left @ x @ right
    body, column = left @ x[:, :-1], left @ x[:, -1:]
    even = torch.addmm(column * right[-1:, :-1], body, right[:-1, :-1])
    odd = torch.addmm(column * right[-1, -1], body, right[:-1, -1:])
    return torch.cat([even, odd], dim=1)


def invert(xp: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """By Cholesky, a third of the work of a general inverse, and without the exception or the synchronisation of the checked one.

    The result is exactly symmetric; its transpose has its rows contiguous, as an inverse read from a checkpoint has.
    """
    factor, info = torch.linalg.cholesky_ex(x, upper=True)
    return torch.cholesky_inverse(factor, upper=True).mT, info == 0


def eigh(xp: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With contiguous rows in the vectors: products then round as they do with vectors read from a checkpoint.

    LAPACK's method for single precision now and then does not converge on a harmless factor of low rank, where PyTorch raises: then in
    double precision.
    """
    x = 0.5 * (x + x.mT)
    try:
        values, vectors = torch.linalg.eigh(x)
    except torch.linalg.LinAlgError:
        values, vectors = _eigh_again(x)
    return values.clamp(min=0.0), vectors.contiguous(), torch.isfinite(values.sum(dim=-1))


def _eigh_again(x: Tensor) -> tuple[Tensor, Tensor]:
    """In double precision, or NaN if that fails too."""
    try:
        values, vectors = torch.linalg.eigh(x.double())
    except torch.linalg.LinAlgError:
        return torch.full_like(x[..., 0], math.nan), torch.full_like(x, math.nan)
    return values.to(x.dtype), vectors.to(x.dtype)


def counts(xp: Any, ids: Tensor, num: int) -> Tensor:
    """By a sum at places, whose result has a known size: that of ``torch.bincount`` has not, for which a GPU would be waited for."""
    ids = ids.to(torch.int64)
    places = torch.where((ids >= 0) & (ids < num), ids, num)
    zeros = torch.zeros((*ids.shape[:-1], num + 1), dtype=torch.int32, device=ids.device)
    return zeros.scatter_add(-1, places, torch.ones_like(places, dtype=torch.int32))[..., :num]


def gather_sum(xp: Any, rows: Tensor, ids: Tensor, num: int) -> Tensor:
    """By a sum at places, one beyond the last for what is no row of the table."""
    places = torch.where((ids >= 0) & (ids < num), ids.to(torch.int64), num)
    zeros = torch.zeros((*ids.shape[:-1], num + 1, rows.shape[-1]), dtype=rows.dtype, device=rows.device)
    return zeros.scatter_add(-2, places[..., None].expand(rows.shape), rows)[..., :num, :]


def patches(xp: Any, x: Tensor, window: Window) -> Tensor:
    """In one copy of a view, which moves whole rows of the kernel at once: up to thirty times as fast as a stack of slices."""
    lead = x.ndim - 1 - window.axes
    view = x
    for i, (reach, stride, dilation) in enumerate(zip(window.reach, window.stride, window.dilation, strict=True)):
        view = view.unfold(lead + i, reach, stride)[..., ::dilation]
    outputs = view.shape[: lead + window.axes]
    return view.movedim(lead + window.axes, -1).reshape(*outputs, math.prod(window.kernel), x.shape[-1])


def register() -> None:
    """Make the core use these for torch tensors."""
    kernels = (
        truth,
        number,
        append,
        energy,
        absorb,
        blend,
        trace,
        total,
        scale_all,
        shift,
        sandwich,
        invert,
        eigh,
        counts,
        gather_sum,
        patches,
    )
    for kernel in kernels:
        register_kernel(kernel.__name__, "torch", kernel)


def _readable(flag: Tensor) -> bool:
    """Whether the host can branch on a 0-d tensor at once: on the CPU, and neither compiled nor batched."""
    return (
        flag.ndim == 0 and flag.is_cpu and not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
    )
