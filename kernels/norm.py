"""A residual addition and the LayerNorm of the sum, fused.

`reference` is the formula and `add_norm` the function to call. Axes: T tokens, d_model features.
"""

from __future__ import annotations  # without Triton, `tl.constexpr` must not be evaluated

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import jit, low_precision, tl, triton, use_triton

# Elements of a tile of whole rows, which one warp holds in registers: the sums over a row then need
# no barrier. Wider rows take more warps.
TILE = 1024
# Programs of the backward pass per multiprocessor of a GPU; each sums the gradient of the weight
# over its own rows.
PROGRAMS = 8


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
    """Under autocast the norm has the dtype in which the matrix multiplication that follows would
    read it."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps) -> tuple[Tensor, Tensor]:
        n_rows, width = x.shape
        inputs = (x.contiguous(), residual.contiguous(), weight)
        total = torch.empty_like(inputs[0], dtype=torch.promote_types(x.dtype, residual.dtype))
        dtype = low_precision(total) or torch.promote_types(total.dtype, weight.dtype)
        normed = torch.empty_like(total, dtype=dtype)
        mean = x.new_empty(n_rows, dtype=torch.float32)
        rstd = torch.empty_like(mean)  # 1 / sqrt(variance + eps)
        options = _tile(width)
        grid = (-(-n_rows // options["ROWS"]),)
        _add_norm[grid](*inputs, total, normed, mean, rstd, n_rows, width, eps, **options)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.dtypes = (x.dtype, residual.dtype)
        return total, normed

    @staticmethod
    def backward(ctx, d_total: Tensor, d_normed: Tensor) -> tuple:
        total, weight, mean, rstd = ctx.saved_tensors
        n_rows, width = total.shape
        x_dtype, residual_dtype = ctx.dtypes
        d_x = torch.empty_like(total, dtype=x_dtype)
        d_residual = None  # the same as d_x, unless its dtype differs
        if residual_dtype != x_dtype:
            d_residual = torch.empty_like(total, dtype=residual_dtype)
        options = _tile(width, d_normed.dtype.itemsize)
        n_programs = min(_n_programs(total.device), -(-n_rows // options["ROWS"]))
        d_weights = total.new_empty(n_programs, width, dtype=torch.float32)
        inputs = (d_total.contiguous(), d_normed.contiguous(), total, weight, mean, rstd)
        outputs = (d_x, d_residual, d_weights)
        _add_norm_backward[(n_programs,)](*inputs, *outputs, n_rows, width, **options)
        d_weight = d_weights.sum(dim=0).to(weight.dtype)
        return d_x, d_x if d_residual is None else d_residual, d_weight, None


def _tile(width: int, itemsize: int = 2) -> dict[str, int]:
    """The rows and columns of a tile, and its warps; half as many rows of a gradient in 32 bits,
    which would not fit into the registers."""
    columns = triton.next_power_of_2(width)
    rows = max(1, TILE // columns * 2 // itemsize)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": max(1, columns // TILE)}


def _n_programs(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return PROGRAMS
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


@jit
def _add_norm(
    x, residual, weight, total, normed, mean, rstd, n_rows, width, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row = row < n_rows
    is_column = column < width
    is_inside = is_row[:, None] & is_column[None, :]
    offset = row.to(tl.int64)[:, None] * width + column[None, :]

    s = tl.load(residual + offset, mask=is_inside, other=0.0).to(tl.float32)
    s += tl.load(x + offset, mask=is_inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    s = s.to(total.dtype.element_ty)
    tl.store(total + offset, s, mask=is_inside)

    s = s.to(tl.float32)  # the norm is that of the rounded sum, as in torch
    mu = tl.sum(s, 1) / width
    centred = tl.where(is_column[None, :], s - mu[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / width
    inverse = 1 / tl.sqrt((variance + eps).to(tl.float32))  # torch.compile passes eps in float64
    y = centred * inverse[:, None] * w[None, :]
    tl.store(normed + offset, y.to(normed.dtype.element_ty), mask=is_inside)
    tl.store(mean + row, mu, mask=is_row)
    tl.store(rstd + row, inverse, mask=is_row)


@jit
def _add_norm_backward(
    d_total, d_normed, total, weight, mean, rstd, d_x, d_residual, d_weights, n_rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    is_column = column < width
    w = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    d_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(program * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        is_row = row < n_rows
        is_inside = is_row[:, None] & is_column[None, :]
        offset = row.to(tl.int64)[:, None] * width + column[None, :]
        s = tl.load(total + offset, mask=is_inside, other=0.0).to(tl.float32)
        d_y = tl.load(d_normed + offset, mask=is_inside, other=0.0).to(tl.float32)
        d = tl.load(d_total + offset, mask=is_inside, other=0.0).to(tl.float32)
        mu = tl.load(mean + row, mask=is_row, other=0.0)
        inverse = tl.load(rstd + row, mask=is_row, other=0.0)

        x_hat = tl.where(is_column[None, :], s - mu[:, None], 0.0) * inverse[:, None]
        d_weight += d_y * x_hat
        # the gradient of the norm has no part along x_hat and none along a constant
        d_x_hat = d_y * w[None, :]
        along_x_hat = x_hat * (tl.sum(d_x_hat * x_hat, 1) / width)[:, None]
        along_constant = (tl.sum(d_x_hat, 1) / width)[:, None]
        d += inverse[:, None] * (d_x_hat - along_constant - along_x_hat)
        tl.store(d_x + offset, d.to(d_x.dtype.element_ty), mask=is_inside)
        if d_residual is not None:
            tl.store(d_residual + offset, d.to(d_residual.dtype.element_ty), mask=is_inside)
    offset = program.to(tl.int64) * width + column
    tl.store(d_weights + offset, tl.sum(d_weight, 0), mask=is_column)
