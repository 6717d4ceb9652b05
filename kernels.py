"""The fused operations of the model, each as one function with its formula, its source and its written-out
torch code.

Axes: T tokens of a whole batch, S sequences, B sequences of one length group, L the padded length of that
group, H heads, D head size, N rows of the vocabulary head, V vocabulary.

A batch is a flat row of T tokens; `cu_seqlens` (S + 1,) int32 says where each sequence begins, and only
`attention` looks at it. Three of the operations are autograd functions, because autograd's own graph would
keep float32 copies of everything that is wide: attention keeps bfloat16 probabilities, the vocabulary head
keeps no logits at all, GeGLU no activation. All three work in blocks that stay in the caches.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# A length group ends where its next sequence would waste more than this share of the group's width. A wider
# tolerance computes more padding, a narrower one more and smaller products.
GROUP_WASTE = 0.25
# Group widths are rounded up to this, so that products meet few different shapes.
GROUP_MULTIPLE = 16
# What is read and written several times has to stay in the caches: so many tokens fill a group, so many rows
# go through GeGLU at a time, so many logits through the softmax.
GROUP_TOKENS = 2048
BLOCK_TOKENS = 1024
BLOCK_LOGITS = 2**18
# Logits that exist at a time in the vocabulary head: enough rows for fast products.
CHUNK_LOGITS = 2**23

Rope = tuple[Tensor, Tensor]


def rope_tables(n_positions: int, head_dim: int, theta: float, device: torch.device | str = "cpu") -> Rope:
    """cos and sin of position x theta^(-2i / head_dim), each (n_positions, head_dim / 2), float32.

    Rotary position embedding, half-split (Su et al. 2021, arXiv 2104.09864, section 3.2).
    """
    inverse_frequency = 1.0 / theta ** (
        torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    )
    angles = torch.arange(n_positions, dtype=torch.float32, device=device)[:, None] * inverse_frequency
    return angles.cos(), angles.sin()


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, rope: Rope | None = None, window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each sequence (Vaswani et al. 2017, section 3.2.1).

    qkv: (T, 3, H, D). rope: tables of at least `max_seqlen` positions, applied to q and k in float32. window:
    a token at i sees j only where |i - j| <= window; None means the whole sequence. Returns (T, H, D).
    """
    if rope is not None and len(rope[0]) < max_seqlen:
        raise ValueError(f"rope has {len(rope[0])} positions, the longest sequence {max_seqlen}")
    return _Attention.apply(qkv, cu_seqlens, max_seqlen, rope, window)


class _Attention(torch.autograd.Function):
    """Sequences of similar length are padded to one width and multiplied together; nothing else is padded."""

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, max_seqlen, rope, window) -> Tensor:
        n_tokens, _, n_heads, head_dim = qkv.shape
        out = qkv.new_empty(n_tokens + 1, n_heads, head_dim)  # the extra row takes what the padding computes
        ctx.rope, ctx.shape, ctx.groups, saved = rope, qkv.shape, [], []
        for index, is_pad in _length_groups(cu_seqlens, n_tokens, max_seqlen):
            size, width = index.shape
            padded = qkv.index_select(0, index.where(~is_pad, 0).view(-1))
            padded = padded.view(size, width, 3, n_heads, head_dim).permute(2, 0, 3, 1, 4)  # (3, B, H, L, D)
            q, k = _rotate(padded[:2], rope, head_dim**-0.5)
            v = padded[2].contiguous()
            scores = q @ k.transpose(-1, -2)  # (B, H, L, L)
            hidden_keys = is_pad[:, None, None, :]
            if window is not None and width > window + 1:
                position = torch.arange(width, device=qkv.device)
                hidden_keys = hidden_keys | ((position[:, None] - position).abs() > window)
                # a padded query whose whole window is padding would be a row of -inf, and so of NaN
                hidden_keys = hidden_keys & ~is_pad[:, None, :, None]
            probabilities = torch.softmax(scores.masked_fill_(hidden_keys, -math.inf), dim=-1).to(v.dtype)
            heads = (probabilities @ v).transpose(1, 2)  # (B, L, H, D)
            out.index_copy_(0, index.view(-1), heads.reshape(-1, n_heads, head_dim))
            ctx.groups.append((index, is_pad))
            saved += [q, k, v, probabilities]
        ctx.save_for_backward(*saved)
        return out[:n_tokens]

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, None, None, None, None]:
        n_tokens, _, n_heads, head_dim = ctx.shape
        d_qkv = d_out.new_empty(n_tokens + 1, 3, n_heads, head_dim)
        for i, (index, is_pad) in enumerate(ctx.groups):
            q, k, v, probabilities = ctx.saved_tensors[4 * i : 4 * i + 4]
            size, width = index.shape
            d_heads = d_out.index_select(0, index.where(~is_pad, 0).view(-1))
            d_heads = d_heads.view(size, width, n_heads, head_dim).masked_fill(is_pad[:, :, None, None], 0)
            d_heads = d_heads.transpose(1, 2).contiguous()  # (B, H, L, D)
            d_probabilities = d_heads @ v.transpose(-1, -2)
            d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
            d_padded = torch.empty((3, *q.shape), dtype=q.dtype, device=q.device)  # (3, B, H, L, D)
            torch.matmul(d_scores, k, out=d_padded[0])
            torch.matmul(d_scores.transpose(-1, -2), q, out=d_padded[1])
            torch.matmul(probabilities.transpose(-1, -2), d_heads, out=d_padded[2])
            d_padded[:2] = _rotate(d_padded[:2], ctx.rope, head_dim**-0.5, inverse=True)
            d_padded = d_padded.permute(1, 3, 0, 2, 4).reshape(-1, 3, n_heads, head_dim)
            d_qkv.index_copy_(0, index.view(-1), d_padded)
        return d_qkv[:n_tokens], None, None, None, None


def _length_groups(cu_seqlens: Tensor, n_tokens: int, max_seqlen: int) -> list[tuple[Tensor, Tensor]]:
    """Sequences sorted into groups of similar length: per group the token of each place (B, L) and whether it
    is padding; padding points at row `n_tokens`. Empty sequences are in no group."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    order = torch.argsort(lengths, descending=True, stable=True)
    by_length = lengths[order].tolist()
    first, groups = 0, []
    while first < len(by_length) and by_length[first]:
        last = first
        shortest = by_length[first] * (1 - GROUP_WASTE) - GROUP_MULTIPLE
        largest = max(1, GROUP_TOKENS // by_length[first])
        while last < min(len(by_length), first + largest) and by_length[last] > shortest:
            last += 1
        width = min(max_seqlen, -(-by_length[first] // GROUP_MULTIPLE) * GROUP_MULTIPLE)
        members, position = order[first:last], torch.arange(width, device=cu_seqlens.device)
        is_pad = position >= lengths[members, None]
        groups.append(((starts[members, None] + position).masked_fill(is_pad, n_tokens), is_pad))
        first = last
    return groups


def _rotate(qk: Tensor, rope: Rope | None, scale: float, inverse: bool = False) -> Tensor:
    """Rotate q and k, (2, B, H, L, D), by their positions in float32 and scale q; `inverse` turns gradients
    back."""
    exact = torch.promote_types(qk.dtype, torch.float32)
    scales = torch.tensor([scale, 1.0], dtype=exact, device=qk.device).view(2, 1, 1, 1, 1)
    if rope is None:
        return (qk * scales).to(qk.dtype)
    cos, sin = (table[: qk.shape[-2]] * scales for table in rope)  # (2, 1, 1, L, D / 2)
    half = qk.shape[-1] // 2
    first, second = (qk32 := qk.to(cos.dtype))[..., :half], qk32[..., half:]
    turned = qk32 * torch.cat((cos, cos), dim=-1)
    turned[..., :half].addcmul_(second, sin, value=1 if inverse else -1)
    turned[..., half:].addcmul_(first, sin, value=-1 if inverse else 1)
    return turned.to(qk.dtype)


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
        row_of_target = torch.repeat_interleave(torch.arange(n_rows, device=device), cu_bags.diff())
        rows_of_chunk, rows_of_block = (max(1, n // vocab_size) for n in (CHUNK_LOGITS, BLOCK_LOGITS))
        target_bounds = cu_bags.tolist()

        loss = torch.zeros((), dtype=exact, device=device)
        if wants_gradient:
            d_hidden = torch.empty(hidden.shape, dtype=exact, device=device)
            d_weight = torch.zeros(weight.shape, dtype=exact, device=device)
            d_bias = torch.zeros(bias.shape, dtype=exact, device=device)
        for first in range(0, n_rows, rows_of_chunk):
            chunk = rows[first : first + rows_of_chunk]
            logits = chunk @ weight_low.T
            for j, block in enumerate(logits.split(rows_of_block)):
                i = first + j * rows_of_block
                targets = slice(target_bounds[i], target_bounds[i + len(block)])
                place, weights = (row_of_target[targets] - i, ids[targets]), bag_weights[targets]
                z = block + bias_exact
                largest, at_targets = z.amax(dim=-1, keepdim=True), z[place]
                p = z.sub_(largest).exp_()  # several times as fast as log_softmax
                total = p.sum(dim=-1, keepdim=True)
                loss += (total.log() + largest).sum() - (at_targets * weights).sum()
                if wants_gradient:
                    d_logits = p.div_(total).index_put_(place, -weights, accumulate=True)
                    d_bias += d_logits.sum(0)
                    block.copy_(d_logits)  # the chunk's logits turn into their gradient
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


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + x, LayerNorm(residual + x) * weight), both (T, d_model) (Ba et al. 2016, arXiv
    1607.06450)."""
    total = residual + x
    return total, F.layer_norm(total, weight.shape, weight, None, eps)


def geglu(x: Tensor) -> Tensor:
    """gelu(a) * b of x = [a, b], (T, 2 d_ff) to (T, d_ff), gelu by erf (Shazeer 2020, arXiv 2002.05202).

    The backward pass computes gelu(a) once more, and writes both halves of its gradient where they belong.
    """
    return _GeGLU.apply(x)


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
