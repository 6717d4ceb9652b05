"""GeGLU, the gated activation of the MLP, fused.

`reference` is the formula and `geglu` the function to call. Axes: T tokens, d_ff inner features.
"""

from __future__ import annotations  # without Triton, `tl.constexpr` must not be evaluated

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import jit, tl, use_triton

# Features of a row that a Triton program computes.
ROW_BLOCK = 1024


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
        grid = (n_tokens, -(-d_ff // ROW_BLOCK))
        _geglu[grid](x, out, d_ff, BLOCK=ROW_BLOCK)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        n_tokens, d_ff = d_out.shape
        d_x = torch.empty_like(x)
        grid = (n_tokens, -(-d_ff // ROW_BLOCK))
        _geglu_backward[grid](x, d_out.contiguous(), d_x, d_ff, BLOCK=ROW_BLOCK)
        return d_x


@jit
def _geglu(x, out, d_ff, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < d_ff
    x += row * 2 * d_ff
    a = tl.load(x + column, mask=is_column, other=0.0).to(tl.float32)
    b = tl.load(x + d_ff + column, mask=is_column, other=0.0).to(tl.float32)
    phi = 0.5 * (1 + tl.erf(a * 0.7071067811865476))  # a / sqrt(2)
    result = a * phi * b
    tl.store(out + row * d_ff + column, result.to(out.dtype.element_ty), mask=is_column)


@jit
def _geglu_backward(x, d_out, d_x, d_ff, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < d_ff
    x += row * 2 * d_ff
    d_x += row * 2 * d_ff
    a = tl.load(x + column, mask=is_column, other=0.0).to(tl.float32)
    b = tl.load(x + d_ff + column, mask=is_column, other=0.0).to(tl.float32)
    d = tl.load(d_out + row * d_ff + column, mask=is_column, other=0.0).to(tl.float32)
    phi = 0.5 * (1 + tl.erf(a * 0.7071067811865476))  # a / sqrt(2)
    density = 0.3989422804014327 * tl.exp(-0.5 * a * a)  # derivative of phi
    d_a = d * b * (phi + a * density)
    d_b = d * a * phi
    tl.store(d_x + column, d_a.to(d_x.dtype.element_ty), mask=is_column)
    tl.store(d_x + d_ff + column, d_b.to(d_x.dtype.element_ty), mask=is_column)
