"""GeGLU, a gated GELU, fused."""

from __future__ import annotations  # without Triton, `tl.constexpr` is no more than a text

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import jit, tl, use_triton

BLOCK_TOKENS = 1024
ROW_BLOCK = 1024  # what of a row a program of Triton's has at a time


def geglu(x: Tensor) -> Tensor:
    """gelu(a) * b of x = [a, b], (T, 2 d_ff) to (T, d_ff), gelu by erf (Shazeer 2020, arXiv 2002.05202).

    The backward pass computes gelu(a) once more, and writes both halves of its gradient where they belong.
    """
    if torch.compiler.is_compiling() and not use_triton(x):  # the compiler fuses better than blocks do
        a, b = x.chunk(2, dim=-1)
        return F.gelu(a) * b
    return (_FusedGeGLU if use_triton(x) else _GeGLU).apply(x)


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x) -> Tensor:
        ctx.save_for_backward(x)
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        for block, part in zip(x.split(BLOCK_TOKENS), out.split(BLOCK_TOKENS), strict=True):
            a, b = block.chunk(2, dim=-1)
            torch.mul(F.gelu(a), b, out=part)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        d_x = torch.empty_like(x)
        for block, d_block, d in zip(*(t.split(BLOCK_TOKENS) for t in (x, d_x, d_out)), strict=True):
            (a, b), (d_a, d_b) = block.chunk(2, dim=-1), d_block.chunk(2, dim=-1)
            torch.mul(d, F.gelu(a), out=d_b)
            torch.ops.aten.gelu_backward.grad_input(d * b, a, grad_input=d_a)
        return d_x


class _FusedGeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return geglu_forward(x)

    @staticmethod
    def backward(ctx, d_out: Tensor) -> Tensor:
        return geglu_backward(*ctx.saved_tensors, d_out.contiguous())


def geglu_forward(x: Tensor) -> Tensor:
    n_rows, d_ff = x.shape[0], x.shape[1] // 2
    out = x.new_empty(n_rows, d_ff)
    _geglu[(n_rows, -(-d_ff // ROW_BLOCK))](x, out, d_ff, BLOCK=ROW_BLOCK)
    return out


def geglu_backward(x: Tensor, d_out: Tensor) -> Tensor:
    n_rows, d_ff = d_out.shape
    d_x = torch.empty_like(x)
    _geglu_backward[(n_rows, -(-d_ff // ROW_BLOCK))](x, d_out, d_x, d_ff, BLOCK=ROW_BLOCK)
    return d_x


@jit
def _geglu(x, out, d_ff, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, inside = x + row * 2 * d_ff + column, column < d_ff
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(place + d_ff, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * a * (1 + tl.erf(a * 0.7071067811865476))
    tl.store(out + row * d_ff + column, (gelu * b).to(out.dtype.element_ty), mask=inside)


@jit
def _geglu_backward(x, d_out, d_x, d_ff, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset, inside = row * 2 * d_ff + column, column < d_ff
    a = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + offset + d_ff, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_out + row * d_ff + column, mask=inside, other=0.0).to(tl.float32)
    below = 0.5 * (1 + tl.erf(a * 0.7071067811865476))  # the share of a normal distribution below a
    density = 0.3989422804014327 * tl.exp(-0.5 * a * a)
    tl.store(d_x + offset, (d * b * (below + a * density)).to(d_x.dtype.element_ty), mask=inside)
    tl.store(d_x + offset + d_ff, (d * a * below).to(d_x.dtype.element_ty), mask=inside)
