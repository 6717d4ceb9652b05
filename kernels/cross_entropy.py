"""The vocabulary head: a matrix multiplication and the cross-entropy of its logits, fused."""

from __future__ import annotations  # without Triton, `tl.constexpr` is no more than a text

import torch
from torch import Tensor

from kernels.dispatch import jit, tl, use_triton

BLOCK_LOGITS = 2**18
# Logits that exist at a time in the vocabulary head: enough rows for fast products, and on a GPU enough for
# the work of a chunk to outlast its launches.
CHUNK_LOGITS, GPU_CHUNK_LOGITS = 2**23, 2**26
ROW_BLOCK = 1024  # what of a row a program of Triton's has at a time
BAG_BLOCK = 64  # targets of a row that it has at a time


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    bag_weights: Tensor | None = None,
    cu_bags: Tensor | None = None,
) -> Tensor:
    """Sum over rows of the cross-entropy between softmax(hidden weight^T + bias) and a bag of words.

    hidden: (N, d_model), weight: (V, d_model), bias: (V,). Without bags, ids: (N,) is one target a row. With
    bags, row i has the targets ids[cu_bags[i] : cu_bags[i + 1]] with `bag_weights` that sum to 1 over the
    row. With z = hidden E^T + b the loss of a row is logsumexp(z) - sum_i w_i z_i, which for a bag of one is
    the loss of a masked token. Returns a float32 scalar.

    The loss and all three gradients come from one pass over chunks of rows, so that no more than a chunk of
    logits ever exists; d_weight and d_bias are summed up in float32.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, ids, bag_weights, cu_bags, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, bag_weights, cu_bags, wants_gradient) -> Tensor:
        n_rows, vocab_size = len(hidden), len(weight)
        device, exact = hidden.device, torch.promote_types(hidden.dtype, torch.float32)
        dtype = (
            torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
        )
        rows, weight_low, bias_exact = hidden.to(dtype), weight.to(dtype), bias.to(exact)
        if cu_bags is None:
            cu_bags = torch.arange(n_rows + 1, device=device)
        if bag_weights is None:
            bag_weights = torch.ones(len(ids), device=device)
        bag_weights = bag_weights.to(exact)
        rows_of_chunk = max(1, (GPU_CHUNK_LOGITS if hidden.is_cuda else CHUNK_LOGITS) // vocab_size)
        softmax = bag_softmax if use_triton(hidden) else _bag_softmax_by_blocks

        buffer = rows.new_empty(min(n_rows, rows_of_chunk), vocab_size)  # one chunk of logits after the other
        loss, d_bias = torch.zeros((), dtype=exact, device=device), None
        if wants_gradient:
            d_hidden = torch.empty(hidden.shape, dtype=exact, device=device)
            d_weight = torch.zeros(weight.shape, dtype=exact, device=device)
            d_bias = torch.zeros(bias.shape, dtype=exact, device=device)
        for first in range(0, n_rows, rows_of_chunk):
            chunk = rows[first : first + rows_of_chunk]
            logits = torch.mm(chunk, weight_low.T, out=buffer[: len(chunk)])
            bags = cu_bags[first : first + len(chunk) + 1]
            loss += softmax(logits, bias_exact, ids, bag_weights, bags, d_bias)
            if wants_gradient:
                d_hidden[first : first + len(chunk)] = logits @ weight_low
                d_weight += logits.T @ chunk
        if wants_gradient:
            ctx.save_for_backward(d_hidden, d_weight, d_bias)
            ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        gradients = [(g * d_loss).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return *gradients, None, None, None, None


def _bag_softmax_by_blocks(
    logits: Tensor, bias: Tensor, ids: Tensor, bag_weights: Tensor, cu_bags: Tensor, d_bias: Tensor | None
) -> Tensor:
    """The loss of a chunk's logits, (rows, V) without their bias; cu_bags (rows + 1,) points into ids. Where
    there is a d_bias, the logits turn into their gradient in place, and it is added to d_bias."""
    row = torch.repeat_interleave(torch.arange(len(logits), device=logits.device), cu_bags.diff())
    bounds, rows_of_block = cu_bags.tolist(), max(1, BLOCK_LOGITS // logits.shape[1])
    loss = bias.new_zeros(())
    for i, block in zip(range(0, len(logits), rows_of_block), logits.split(rows_of_block), strict=True):
        first, last = bounds[i], bounds[i + len(block)]
        place = (row[first - bounds[0] : last - bounds[0]] - i, ids[first:last])
        weights = bag_weights[first:last]
        z = block + bias
        p = torch.softmax(z, dim=-1)  # fused: exp, sum and division take twice as long
        logsumexp = z.amax(dim=-1) - p.amax(dim=-1).log()  # the largest p is 1 / sum(exp(z - largest z))
        loss += logsumexp.sum() - (z[place] * weights).sum()
        if d_bias is not None:
            d_logits = p.index_put_(place, -weights, accumulate=True)
            d_bias += d_logits.sum(0)
            block.copy_(d_logits)
    return loss


def bag_softmax(
    logits: Tensor, bias: Tensor, ids: Tensor, bag_weights: Tensor, cu_bags: Tensor, d_bias: Tensor | None
) -> Tensor:
    """The same by one Triton program a row."""
    losses, d_targets = (logits.new_empty(len(x), dtype=torch.float32) for x in (logits, ids))
    given = (logits, bias, ids, bag_weights, cu_bags, losses, d_targets, logits.shape[1])
    options = {"WANTS_GRADIENT": d_bias is not None, "BLOCK": ROW_BLOCK, "BAG": BAG_BLOCK}
    _bag_softmax[(len(logits),)](*given, **options)
    if d_bias is not None:
        d_bias += logits.sum(0, dtype=torch.float32)
    return losses.sum()


@jit
def _bag_softmax(
    logits, bias, ids, bag_weights, cu_bags, losses, d_targets, vocab_size,
    WANTS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr, BAG: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocab_size
    begin, end = tl.load(cu_bags + row), tl.load(cu_bags + row + 1)
    largest, total, at_targets = -1e30, 0.0, 0.0
    for start in range(0, vocab_size, BLOCK):
        word = start + tl.arange(0, BLOCK)
        z = tl.load(logits + word, mask=word < vocab_size, other=float("-inf")).to(tl.float32)
        z += tl.load(bias + word, mask=word < vocab_size, other=0.0)
        higher = tl.maximum(largest, tl.max(z, 0))
        total, largest = total * tl.exp(largest - higher) + tl.sum(tl.exp(z - higher), 0), higher
    lse = largest + tl.log(total)
    for start in range(begin, end, BAG):
        i = start + tl.arange(0, BAG)
        word = tl.load(ids + i, mask=i < end, other=0)
        z = (tl.load(logits + word) + tl.load(bias + word)).to(tl.float32)
        at_targets += tl.sum(z * tl.load(bag_weights + i, mask=i < end, other=0.0), 0)
        if WANTS_GRADIENT:
            share = tl.zeros((BAG,), tl.float32)  # of the word in its bag, where it may stand often
            for other in range(begin, end, BAG):
                j = other + tl.arange(0, BAG)
                is_same = word[:, None] == tl.load(ids + j, mask=j < end, other=-1)[None, :]
                weight = tl.load(bag_weights + j, mask=j < end, other=0.0)
                share += tl.sum(tl.where(is_same, weight[None, :], 0.0), 1)
            tl.store(d_targets + i, tl.exp(z - lse) - share, mask=i < end)
    tl.store(losses + row, lse - at_targets)
    if WANTS_GRADIENT:
        tl.debug_barrier()  # all targets are read before the first logit is overwritten
        for start in range(0, vocab_size, BLOCK):
            word = start + tl.arange(0, BLOCK)
            z = tl.load(logits + word, mask=word < vocab_size, other=0.0).to(tl.float32)
            p = tl.exp(z + tl.load(bias + word, mask=word < vocab_size, other=0.0) - lse)
            tl.store(logits + word, p.to(logits.dtype.element_ty), mask=word < vocab_size)
        tl.debug_barrier()
        for start in range(begin, end, BAG):  # a word that stands often is written often, each time alike
            i = start + tl.arange(0, BAG)
            word, d = tl.load(ids + i, mask=i < end, other=0), tl.load(d_targets + i, mask=i < end)
            tl.store(logits + word, d.to(logits.dtype.element_ty), mask=i < end)
