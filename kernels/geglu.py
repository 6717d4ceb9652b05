"""GeGLU, the gated activation of the MLP, fused.

`reference` is the formula and `geglu` the function to call. Axes: T tokens, d_ff inner features.
"""

from __future__ import annotations  # without Triton, `tl.constexpr` must not be evaluated

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import jit, tl, use_triton

# The tile of one Triton program. Its width divides d_ff of all presets, so that no lane is idle.
ROWS = 16
COLUMNS = 64


def reference(x: Tensor) -> Tensor:
    """GELU(a) * b with GELU(a) = a * Phi(a), where Phi is the normal distribution function."""
    a, b = x.chunk(2, dim=-1)
    phi = (1 + torch.erf(a / math.sqrt(2))) / 2
    return a * phi * b


def geglu(x: Tensor) -> Tensor:
    """GELU of the first half of the features, gated by the second (Shazeer 2020, arXiv 2002.05202).

    Args:
        x: (T, 2 * d_ff).

    Returns:
        (T, d_ff).
    """
    if use_triton(x):
        return _FusedGeGLU.apply(x)
    a, b = x.chunk(2, dim=-1)
    return F.gelu(a) * b


# -------------------------------------------------------------------------------------------- GPU


class _FusedGeGLU(torch.autograd.Function):
    """Saves x alone: the backward pass computes GELU(a) once more."""

    @staticmethod
    def forward(ctx, x) -> Tensor:
        x = x.contiguous()
        n_tokens = len(x)
        d_ff = x.shape[1] // 2
        out = x.new_empty(n_tokens, d_ff)
        _geglu[_grid(out)](x, out, n_tokens, d_ff, ROWS=ROWS, COLUMNS=COLUMNS)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_x = torch.empty_like(x)
        sizes = {"ROWS": ROWS, "COLUMNS": COLUMNS}
        _geglu_backward[_grid(d_out)](x, d_out, d_x, *d_out.shape, **sizes)
        return d_x


def _grid(out: Tensor) -> tuple[int, int]:
    return -(-out.shape[0] // ROWS), -(-out.shape[1] // COLUMNS)


@jit
def _tile(i, j, n_tokens, d_ff, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of tile (i, j), and which of its elements exist."""
    row = (i.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (j * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, column, (row < n_tokens) & (column < d_ff)


@jit
def _geglu(x, out, n_tokens, d_ff, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.program_id(0), tl.program_id(1)
    row, column, is_inside = _tile(i, j, n_tokens, d_ff, ROWS, COLUMNS)
    x += row * 2 * d_ff + column
    a = tl.load(x, mask=is_inside, other=0.0).to(tl.float32)
    b = tl.load(x + d_ff, mask=is_inside, other=0.0).to(tl.float32)
    phi = 0.5 * (1 + tl.erf(a * 0.7071067811865476))  # a / sqrt(2)
    result = a * phi * b
    tl.store(out + row * d_ff + column, result.to(out.dtype.element_ty), mask=is_inside)


@jit
def _geglu_backward(x, d_out, d_x, n_tokens, d_ff, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.program_id(0), tl.program_id(1)
    row, column, is_inside = _tile(i, j, n_tokens, d_ff, ROWS, COLUMNS)
    x += row * 2 * d_ff + column
    d_x += row * 2 * d_ff + column
    a = tl.load(x, mask=is_inside, other=0.0).to(tl.float32)
    b = tl.load(x + d_ff, mask=is_inside, other=0.0).to(tl.float32)
    d = tl.load(d_out + row * d_ff + column, mask=is_inside, other=0.0).to(tl.float32)
    phi = 0.5 * (1 + tl.erf(a * 0.7071067811865476))  # a / sqrt(2)
    density = 0.3989422804014327 * tl.exp(-0.5 * a * a)  # derivative of phi
    d_a = d * b * (phi + a * density)
    d_b = d * a * phi
    tl.store(d_x, d_a.to(d_x.dtype.element_ty), mask=is_inside)
    tl.store(d_x + d_ff, d_b.to(d_x.dtype.element_ty), mask=is_inside)
