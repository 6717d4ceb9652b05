"""A residual addition and the LayerNorm of the sum, fused.

`reference` is the formula and `add_norm` the function to call. Axes: T tokens, d_model features.
"""

from __future__ import annotations  # without Triton, `tl.constexpr` must not be evaluated

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import jit, tl, triton, use_triton

# Programs of the backward pass, each of which sums the gradient of the weight over its own rows.
NORM_STRIPS = 512


def reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual + x, and (sum - mean) / sqrt(variance + eps) * weight over the features."""
    total = residual + x
    centred = total - total.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return total, centred / (variance + eps).sqrt() * weight


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual + x, and its LayerNorm without a bias (Ba et al. 2016, arXiv 1607.06450).

    Args:
        x: (T, d_model).
        residual: (T, d_model).
        weight: (d_model,).
        eps: is added to the variance.

    Returns:
        The sum and its norm, (T, d_model) each.
    """
    if use_triton(x):
        return _AddNorm.apply(x, residual, weight, eps)
    total = residual + x
    return total, F.layer_norm(total, weight.shape, weight, None, eps)


# -------------------------------------------------------------------------------------------- GPU


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps) -> tuple[Tensor, Tensor]:
        n_rows, width = x.shape
        inputs = (x.contiguous(), residual.contiguous(), weight)
        total = torch.empty_like(inputs[0], dtype=torch.promote_types(x.dtype, residual.dtype))
        normed = torch.empty_like(total, dtype=torch.promote_types(total.dtype, weight.dtype))
        mean = x.new_empty(n_rows, dtype=torch.float32)
        rstd = torch.empty_like(mean)  # 1 / sqrt(variance + eps)
        block = triton.next_power_of_2(width)
        _add_norm[(n_rows,)](*inputs, total, normed, mean, rstd, width, eps, BLOCK=block)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.dtypes = (x.dtype, residual.dtype)
        return total, normed

    @staticmethod
    def backward(ctx, d_total: Tensor, d_normed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total, weight, mean, rstd = ctx.saved_tensors
        n_rows, width = total.shape
        strip_rows = max(1, n_rows // NORM_STRIPS)
        n_strips = -(-n_rows // strip_rows)
        d_sum = torch.empty_like(total)
        d_weights = total.new_empty(n_strips, width, dtype=torch.float32)
        inputs = (d_total.contiguous(), d_normed.contiguous(), total, weight, mean, rstd)
        sizes = (n_rows, strip_rows, width)
        block = triton.next_power_of_2(width)
        _add_norm_backward[(n_strips,)](*inputs, d_sum, d_weights, *sizes, BLOCK=block)

        x_dtype, residual_dtype = ctx.dtypes
        d_weight = d_weights.sum(dim=0).to(weight.dtype)
        return d_sum.to(x_dtype), d_sum.to(residual_dtype), d_weight, None


@jit
def _add_norm(x, residual, weight, total, normed, mean, rstd, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < width
    offset = row * width + column

    s = tl.load(residual + offset, mask=is_column, other=0.0).to(tl.float32)
    s += tl.load(x + offset, mask=is_column, other=0.0).to(tl.float32)
    s = s.to(total.dtype.element_ty)
    tl.store(total + offset, s, mask=is_column)

    s = s.to(tl.float32)  # the norm is that of the rounded sum, as in torch
    mu = tl.sum(s, 0) / width
    centred = tl.where(is_column, s - mu, 0.0)
    variance = tl.sum(centred * centred, 0) / width
    inverse = 1 / tl.sqrt((variance + eps).to(tl.float32))  # torch.compile passes eps in float64
    y = centred * inverse * tl.load(weight + column, mask=is_column, other=0.0)
    tl.store(normed + offset, y.to(normed.dtype.element_ty), mask=is_column)
    tl.store(mean + row, mu)
    tl.store(rstd + row, inverse)


@jit
def _add_norm_backward(
    d_total, d_normed, total, weight, mean, rstd, d_sum, d_weights, n_rows, strip_rows, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < width
    w = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(strip * strip_rows, tl.minimum(n_rows, (strip + 1) * strip_rows)):
        offset = row * width + column
        inverse = tl.load(rstd + row)
        s = tl.load(total + offset, mask=is_column, other=0.0).to(tl.float32)
        x_hat = tl.where(is_column, s - tl.load(mean + row), 0.0) * inverse
        d_y = tl.load(d_normed + offset, mask=is_column, other=0.0).to(tl.float32)
        d_weight += d_y * x_hat

        # the gradient of the norm has no part along x_hat and none along a constant
        d_x_hat = d_y * w
        along_x_hat = x_hat * tl.sum(d_x_hat * x_hat, 0) / width
        along_constant = tl.sum(d_x_hat, 0) / width
        d = inverse * (d_x_hat - along_constant - along_x_hat)
        d += tl.load(d_total + offset, mask=is_column, other=0.0)
        tl.store(d_sum + offset, d.to(d_sum.dtype.element_ty), mask=is_column)
    tl.store(d_weights + strip * width + column, d_weight, mask=is_column)
