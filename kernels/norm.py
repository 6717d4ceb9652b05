"""A residual addition and the LayerNorm of the sum, fused."""

from __future__ import annotations  # without Triton, `tl.constexpr` is no more than a text

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import jit, tl, triton, use_triton

NORM_STRIPS = 512  # programs that the rows of a norm's backward pass are dealt to, each a partial d_weight


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + x, LayerNorm(residual + x) * weight), both (T, d_model) (Ba et al. 2016, arXiv
    1607.06450)."""
    if use_triton(x):
        return _AddNorm.apply(x, residual, weight, eps)
    total = residual + x
    return total, F.layer_norm(total, weight.shape, weight, None, eps)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps) -> tuple[Tensor, Tensor]:
        total, normed, mean, inverse_std = add_norm_forward(
            x.contiguous(), residual.contiguous(), weight, eps
        )
        ctx.save_for_backward(total, weight, mean, inverse_std)
        ctx.dtypes = x.dtype, residual.dtype
        return total, normed

    @staticmethod
    def backward(ctx, d_total: Tensor, d_normed: Tensor):
        given = (d_total.contiguous(), d_normed.contiguous(), *ctx.saved_tensors)
        d_sum, d_weight = add_norm_backward(*given)
        return d_sum.to(ctx.dtypes[0]), d_sum.to(ctx.dtypes[1]), d_weight, None


def add_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, normed, mean (T,), 1 / deviation (T,))."""
    n_rows, width = x.shape
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    normed = torch.empty_like(x, dtype=torch.promote_types(total.dtype, weight.dtype))
    mean, inverse_std = (x.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
    given = (x, residual, weight, total, normed, mean, inverse_std, width, eps)
    _add_norm[(n_rows,)](*given, BLOCK=triton.next_power_of_2(width))
    return total, normed, mean, inverse_std


def add_norm_backward(
    d_total: Tensor, d_normed: Tensor, total: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of residual + x, gradient of the weight)."""
    n_rows, width = total.shape
    rows_of_strip = max(1, n_rows // NORM_STRIPS)
    strips = torch.empty(-(-n_rows // rows_of_strip), width, dtype=torch.float32, device=total.device)
    d_sum = torch.empty_like(total)
    given = (d_total, d_normed, total, weight, mean, inverse_std, d_sum, strips, n_rows, rows_of_strip, width)
    _add_norm_backward[(len(strips),)](*given, BLOCK=triton.next_power_of_2(width))
    return d_sum, strips.sum(0).to(weight.dtype)


@jit
def _add_norm(x, residual, weight, total, normed, mean, inverse_std, width, eps, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    place, inside = row * width + column, column < width
    stream = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    stream = (stream + tl.load(x + place, mask=inside, other=0.0)).to(total.dtype.element_ty)
    tl.store(total + place, stream, mask=inside)
    stream = stream.to(tl.float32)
    mu = tl.sum(stream, 0) / width
    centred = tl.where(inside, stream - mu, 0.0)
    rstd = 1 / tl.sqrt((tl.sum(centred * centred, 0) / width + eps).to(tl.float32))
    scaled = centred * rstd * tl.load(weight + column, mask=inside, other=0.0)
    tl.store(normed + place, scaled.to(normed.dtype.element_ty), mask=inside)
    tl.store(mean + row, mu)
    tl.store(inverse_std + row, rstd)


@jit
def _add_norm_backward(
    d_total, d_normed, total, weight, mean, inverse_std, d_sum, strips, n_rows, rows_of_strip, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    strip, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(strip * rows_of_strip, tl.minimum(n_rows, (strip + 1) * rows_of_strip)):
        place, rstd = row * width + column, tl.load(inverse_std + row)
        stream = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        x_hat = tl.where(inside, stream - tl.load(mean + row), 0.0) * rstd
        d_y = tl.load(d_normed + place, mask=inside, other=0.0).to(tl.float32)
        d_weight += d_y * x_hat
        d_hat = d_y * w
        along, constant = tl.sum(d_hat * x_hat, 0) / width, tl.sum(d_hat, 0) / width
        d = tl.load(d_total + place, mask=inside, other=0.0) + rstd * (d_hat - constant - x_hat * along)
        tl.store(d_sum + place, d.to(d_sum.dtype.element_ty), mask=inside)
    tl.store(strips + strip * width + column, d_weight, mask=inside)
