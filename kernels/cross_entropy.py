"""The vocabulary head: a matrix multiplication and the cross-entropy of its logits, fused.

`reference` is the formula and `linear_cross_entropy` the function to call. It computes the loss and
all gradients in one pass, chunk by chunk, so that the logits of all rows never exist together.

Axes: N rows (masked tokens), V words of the vocabulary.
"""

from __future__ import annotations  # without Triton, `tl.constexpr` must not be evaluated

import torch
from torch import Tensor

from kernels.dispatch import jit, low_precision, tl, triton, use_triton

# ruff: noqa: E741 (m and l are the names of the online softmax in the papers)

# Logits that exist at a time: enough rows for a fast matrix multiplication and, on a GPU, enough
# work to outlast the launches of the kernels. There each chunk also reads and writes the gradient
# of the weight once more, so there are only a few.
CHUNK_LOGITS = 2**23
GPU_CHUNK_LOGITS = 2**26
GPU_CHUNKS = 4
# Logits that go through the softmax at a time on a CPU, so that they stay in its caches.
BLOCK_LOGITS = 2**18
# Logits of a row that a Triton program reads at a time; more would spill registers.
ROW_BLOCK = 8192


def reference(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden weight^T + bias) at the targets, summed in float64."""
    logits = hidden @ weight.T + bias  # (N, V)
    log_p = logits.log_softmax(dim=-1)
    return -log_p.gather(1, targets[:, None]).sum(dtype=torch.float64)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Sum over the rows of the cross-entropy of softmax(hidden weight^T + bias) with the targets.

    Under autocast the matrix multiplications run in its dtype; the loss and the sums that are the
    gradients of weight and bias are float32 or better.

    Args:
        hidden: (N, d_model).
        weight: (V, d_model).
        bias: (V,).
        targets: (N,) int64, the index of the right word of each row.

    Returns:
        A scalar in float32, for float64 inputs in float64.
    """
    # inside an autograd.Function gradients are always disabled
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, needs_gradient) -> Tensor:
        low = low_precision(hidden) or hidden.dtype
        exact = torch.promote_types(hidden.dtype, torch.float32)
        hidden_low = hidden.to(low)
        weight_low = weight.to(low)
        bias_exact = bias.to(exact)

        n_chunk = max(1, CHUNK_LOGITS // len(weight))  # rows
        if hidden.is_cuda:
            n_chunk = max(1, GPU_CHUNK_LOGITS // len(weight), -(-len(hidden) // GPU_CHUNKS))
        buffer = hidden_low.new_empty(min(len(hidden), n_chunk), len(weight))  # of every chunk
        softmax = _softmax_by_rows if use_triton(hidden) else _softmax_by_blocks

        loss = bias_exact.new_zeros(())
        d_bias = None
        if needs_gradient:
            d_hidden = torch.empty_like(hidden, dtype=exact)
            d_weight = torch.zeros_like(weight, dtype=exact)
            d_bias = torch.zeros_like(bias, dtype=exact)

        for first in range(0, len(hidden), n_chunk):
            rows = slice(first, first + n_chunk)
            chunk = hidden_low[rows]
            logits = torch.mm(chunk, weight_low.T, out=buffer[: len(chunk)])
            loss += softmax(logits, bias_exact, targets[rows], d_bias)
            if needs_gradient:  # the logits have become their gradient
                d_hidden[rows] = logits @ weight_low
                _add_product(d_weight, logits.T, chunk)

        if needs_gradient:
            ctx.save_for_backward(d_hidden, d_weight, d_bias)
            ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype)
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *((gradient * d_loss).to(dtype) for gradient, dtype in gradients), None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; a GPU adds in the precision of the total without rounding the product."""
    if total.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


# ------------------------------------------------------------------------------------------- CPU


def _softmax_by_blocks(
    logits: Tensor, bias: Tensor, targets: Tensor, d_bias: Tensor | None
) -> Tensor:
    """The summed loss of a chunk of logits, which do not include their bias yet.

    If d_bias is given, the logits are overwritten by their gradient, softmax - 1 at the target, and
    its sum over the rows is added to d_bias.
    """
    n_block = max(1, BLOCK_LOGITS // logits.shape[1])
    loss = bias.new_zeros(())
    for block, target in zip(logits.split(n_block), targets.split(n_block), strict=True):
        row = torch.arange(len(block), device=block.device)
        log_p = torch.log_softmax(block + bias, dim=-1)
        loss -= log_p[row, target].sum()
        if d_bias is not None:
            d_logits = log_p.exp_()
            d_logits[row, target] -= 1
            d_bias += d_logits.sum(dim=0)
            block.copy_(d_logits)
    return loss


# -------------------------------------------------------------------------------------------- GPU


def _softmax_by_rows(
    logits: Tensor, bias: Tensor, targets: Tensor, d_bias: Tensor | None
) -> Tensor:
    """The same as `_softmax_by_blocks`, with one Triton program for each row."""
    n_rows, vocab_size = logits.shape
    losses = logits.new_empty(n_rows, dtype=torch.float32)
    block = min(ROW_BLOCK, triton.next_power_of_2(vocab_size))
    options = {"NEEDS_GRADIENT": d_bias is not None, "BLOCK": block, "num_warps": 8}
    _softmax_cross_entropy[(n_rows,)](logits, bias, targets, losses, vocab_size, **options)
    if d_bias is not None:
        d_bias += logits.sum(dim=0, dtype=torch.float32)
    return losses.sum()


@jit
def _softmax_cross_entropy(
    logits, bias, targets, losses, vocab_size, NEEDS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocab_size
    target = tl.load(targets + row)
    z_target = tl.load(logits + target).to(tl.float32) + tl.load(bias + target)

    m = -1e30  # running maximum of the logits
    l = 0.0  # running sum of exp(z - m)
    for start in range(0, vocab_size, BLOCK):
        word = start + tl.arange(0, BLOCK)
        is_word = word < vocab_size
        z = tl.load(logits + word, mask=is_word, other=float("-inf")).to(tl.float32)
        z += tl.load(bias + word, mask=is_word, other=0.0)
        m_new = tl.maximum(m, tl.max(z, 0))
        alpha = tl.exp(m - m_new)
        l = l * alpha + tl.sum(tl.exp(z - m_new), 0)
        m = m_new
    lse = m + tl.log(l)
    tl.store(losses + row, lse - z_target)

    if NEEDS_GRADIENT:
        tl.debug_barrier()  # all threads have read the target's logit before one overwrites it
        for start in range(0, vocab_size, BLOCK):
            word = start + tl.arange(0, BLOCK)
            is_word = word < vocab_size
            z = tl.load(logits + word, mask=is_word, other=0.0).to(tl.float32)
            z += tl.load(bias + word, mask=is_word, other=0.0)
            p = tl.exp(z - lse)
            d = tl.where(word == target, p - 1, p)
            tl.store(logits + word, d.to(logits.dtype.element_ty), mask=is_word)
