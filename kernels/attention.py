"""Attention within each sequence of an unpadded batch, and rotary positions."""

from __future__ import annotations  # without Triton, `tl.constexpr` is no more than a text

import math

import torch
from torch import Tensor

from kernels.dispatch import jit, tl, use_triton

# A length group ends where its next sequence would waste more than this share of the group's width. A wider
# tolerance computes more padding, a narrower one more and smaller products.
GROUP_WASTE = 0.25
# Group widths are rounded up to this, so that products meet few different shapes.
GROUP_MULTIPLE = 16
# What is read and written several times has to stay in the caches: so many tokens fill a group, so many rows
# go through GeGLU at a time, so many logits through the softmax.
GROUP_TOKENS = 2048
# Head sizes of Triton's attention, whose blocks are powers of 2; others take the torch code.
FLASH_HEAD_DIMS = (32, 64, 128)
ROTATED = 64  # tokens that a program rotates

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
    if use_triton(qkv) and qkv.shape[-1] in FLASH_HEAD_DIMS:
        return _FlashAttention.apply(qkv, cu_seqlens, max_seqlen, rope, window)
    # Groups follow from the lengths of the sequences, which a graph does not know. The decorator would import
    # the compiler, seconds at every start.
    apply = torch.compiler.disable(_Attention.apply) if torch.compiler.is_compiling() else _Attention.apply
    return apply(qkv, cu_seqlens, max_seqlen, rope, window)


class _Attention(torch.autograd.Function):
    """Sequences of similar length are padded to one width and multiplied together; nothing else is padded."""

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, max_seqlen, rope, window) -> Tensor:
        n_tokens, _, n_heads, head_dim = qkv.shape
        out = qkv.new_empty(n_tokens + 1, n_heads, head_dim)  # the extra row takes what the padding computes
        ctx.rope, ctx.shape, ctx.groups, saved = rope, qkv.shape, [], []
        for index, is_pad, shortest in _length_groups(cu_seqlens, n_tokens, max_seqlen):
            size, width = index.shape
            padded = qkv.index_select(0, index.where(~is_pad, 0).view(-1))
            padded = padded.view(size, width, 3, n_heads, head_dim).permute(2, 0, 3, 1, 4)  # (3, B, H, L, D)
            q, k = rotate(padded[:2], rope, head_dim**-0.5)
            v = padded[2].contiguous()
            scores = q @ k.transpose(-1, -2)  # (B, H, L, L)
            if window is None or width <= window + 1:  # only keys past the shortest sequence are padding
                scores[..., shortest:].masked_fill_(is_pad[:, None, None, shortest:], -math.inf)
            else:
                position = torch.arange(width, device=qkv.device)
                hidden_keys = is_pad[:, None, None, :] | ((position[:, None] - position).abs() > window)
                # a padded query whose whole window is padding would be a row of -inf, and so of NaN
                scores.masked_fill_(hidden_keys & ~is_pad[:, None, :, None], -math.inf)
            probabilities = torch.softmax(scores, dim=-1).to(v.dtype)
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
            d_padded[:2] = rotate(d_padded[:2], ctx.rope, head_dim**-0.5, inverse=True)
            d_padded = d_padded.permute(1, 3, 0, 2, 4).reshape(-1, 3, n_heads, head_dim)
            d_qkv.index_copy_(0, index.view(-1), d_padded)
        return d_qkv[:n_tokens], None, None, None, None


def _length_groups(cu_seqlens: Tensor, n_tokens: int, max_seqlen: int) -> list[tuple[Tensor, Tensor, int]]:
    """Sequences sorted into groups of similar length: per group the token of each place (B, L), whether it is
    padding, and the shortest length; padding points at row `n_tokens`. Empty sequences are in no group."""
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
        index = (starts[members, None] + position).masked_fill(is_pad, n_tokens)
        groups.append((index, is_pad, by_length[last - 1]))
        first = last
    return groups


def rotate(qk: Tensor, rope: Rope | None, scale: float, inverse: bool = False) -> Tensor:
    """Rotate q and k, (2, B, H, L, D), by their positions in float32 and scale q; `inverse` turns gradients
    back."""
    exact = torch.promote_types(qk.dtype, torch.float32)
    scales = torch.tensor([scale, 1.0], dtype=exact, device=qk.device).view(2, 1, 1, 1, 1)
    if rope is None:
        return (qk * scales).to(qk.dtype)
    cos, sin = (table[: qk.shape[-2]] * scales for table in rope)  # (2, 1, 1, L, D / 2)
    half = qk.shape[-1] // 2
    first, second = (qk32 := qk.to(cos.dtype))[..., :half], qk32[..., half:]
    turned = torch.empty(qk.shape, dtype=cos.dtype, device=qk.device)  # contiguous, whatever qk is
    torch.mul(qk32, torch.cat((cos, cos), dim=-1), out=turned)
    turned[..., :half].addcmul_(second, sin, value=1 if inverse else -1)
    turned[..., half:].addcmul_(first, sin, value=-1 if inverse else 1)
    return turned.to(qk.dtype)


class _FlashAttention(torch.autograd.Function):
    """Online softmax over blocks of keys; the backward pass computes the probabilities once more from their
    logsumexp (Dao 2023, arXiv 2307.08691, algorithms 1 and 2). q and k are rotated by a kernel of their own:
    rotated as they are loaded they would be so once for every block that meets them, and the registers do not
    hold it."""

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, max_seqlen, rope, window) -> Tensor:
        qkv = qkv.contiguous()
        if rope is not None:
            qkv = flash_rotate(qkv, cu_seqlens, max_seqlen, *rope, 1.0)
        out, lse = flash_forward(qkv, cu_seqlens, max_seqlen, window)
        ctx.save_for_backward(qkv, cu_seqlens, out, lse)
        ctx.max_seqlen, ctx.rope, ctx.window = max_seqlen, rope, window
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, None, None, None, None]:
        qkv, cu_seqlens, out, lse = ctx.saved_tensors
        d_qkv = flash_backward(qkv, cu_seqlens, ctx.max_seqlen, ctx.window, out, lse, d_out.contiguous())
        if ctx.rope is not None:
            d_qkv = flash_rotate(d_qkv, cu_seqlens, ctx.max_seqlen, *ctx.rope, -1.0)
        return d_qkv, None, None, None, None


def flash_options(head_dim: int, dtype: torch.dtype, on_hip: bool = torch.version.hip is not None) -> dict:
    """Rows of a block, rows of the other side in a step, depth of the pipeline: the largest at which no GPU
    spills registers (bench.py --aot)."""
    is_low = dtype.itemsize == 2
    sizes = {
        "WIDTH": head_dim,
        "BLOCK": 64 if is_low else 32,
        "STEP": 32 if is_low and head_dim <= 64 else 16,
    }
    return sizes | {"num_stages": 1 if on_hip else 2 if is_low else 3}


def flash_rotate(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, cos: Tensor, sin: Tensor, sign: float
) -> Tensor:
    """qkv with q and k rotated by their positions in float32, backwards where the sign is -1."""
    out, (n_heads, head_dim) = torch.empty_like(qkv), qkv.shape[2:]
    # sequences come first: of the three only the first size may exceed 65,535
    grid = (cu_seqlens.shape[0] - 1, 3 * n_heads, -(-max_seqlen // ROTATED))
    options = {"HALF": head_dim // 2, "BLOCK": ROTATED}
    _flash_rotate[grid](qkv, out, cu_seqlens, cos, sin, sign, n_heads, **options)
    return out


def flash_forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """(out (T, H, D), logsumexp of the scores in base 2, (H, T) float32) of contiguous qkv."""
    n_tokens, _, n_heads, head_dim = qkv.shape
    out = qkv.new_empty(n_tokens, n_heads, head_dim)
    lse = qkv.new_empty(n_heads, n_tokens, dtype=torch.float32)
    options = flash_options(head_dim, qkv.dtype)
    grid = (cu_seqlens.shape[0] - 1, n_heads, -(-max_seqlen // options["BLOCK"]))
    _flash_forward[grid](qkv, cu_seqlens, out, lse, n_tokens, n_heads, window, **options)
    return out, lse


def flash_backward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
) -> Tensor:
    """The gradient of qkv: one pass for q, which leaves rowsum(out * d_out) for the other, of k and v."""
    n_tokens, _, n_heads, head_dim = qkv.shape
    d_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    options = flash_options(head_dim, qkv.dtype)
    grid = (cu_seqlens.shape[0] - 1, n_heads, -(-max_seqlen // options["BLOCK"]))
    given = (qkv, cu_seqlens, out, lse, d_out, delta, d_qkv, n_tokens, n_heads, window)
    _flash_d_q[grid](*given, **options)
    _flash_d_kv[grid](*given, **options)
    return d_qkv


@jit
def _sequence(cu_seqlens, index):
    """Where a sequence begins, in 64 bits because offsets are multiples of it, and its length."""
    begin, end = tl.load(cu_seqlens + index), tl.load(cu_seqlens + index + 1)
    return begin.to(tl.int64), end - begin


@jit
def _load(base, rows, length, stride, WIDTH: tl.constexpr):
    """Rows (rows, WIDTH) of a sequence, zeros beyond its length."""
    place = base + (rows[:, None] * stride + tl.arange(0, WIDTH))
    return tl.load(place, mask=(rows < length)[:, None], other=0.0)


@jit
def _store(base, rows, length, stride, x, WIDTH: tl.constexpr):
    place = base + (rows[:, None] * stride + tl.arange(0, WIDTH))
    tl.store(place, x.to(base.dtype.element_ty), mask=(rows < length)[:, None])


@jit
def _flash_rotate(qkv, out, cu_seqlens, cos, sin, sign, n_heads, HALF: tl.constexpr, BLOCK: tl.constexpr):
    head, block = tl.program_id(1), tl.program_id(2)
    begin, length = _sequence(cu_seqlens, tl.program_id(0))
    stride = 3 * n_heads * 2 * HALF
    rows, place = block * BLOCK + tl.arange(0, BLOCK), begin * stride + head * 2 * HALF
    a = _load(qkv + place, rows, length, stride, HALF).to(tl.float32)
    b = _load(qkv + place + HALF, rows, length, stride, HALF).to(tl.float32)
    if head < 2 * n_heads:  # behind q and k comes v, which is copied
        c, s = _load(cos, rows, length, HALF, HALF), _load(sin, rows, length, HALF, HALF)
        s = (s * sign).to(tl.float32)  # compilers pass numbers in float64
        a, b = a * c - b * s, b * c + a * s
    _store(out + place, rows, length, stride, a, HALF)
    _store(out + place + HALF, rows, length, stride, b, HALF)


@jit
def _scores(x, y, rows, columns, length, window, WIDTH: tl.constexpr):
    """Scores in base 2 of the rows with the columns, -inf where one does not see the other."""
    scale = 1.4426950408889634 / tl.sqrt(1.0 * WIDTH)  # log2(e), because exp2 is the faster one
    seen = (columns < length)[None, :]
    if window is not None:
        seen = seen & (tl.abs(rows[:, None] - columns[None, :]) <= window)
    return tl.where(seen, tl.dot(x, tl.trans(y), input_precision="ieee") * scale, float("-inf"))


@jit
def _span(block, length, window, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """First and last row of the other side that a block of this side meets."""
    first, last = 0, length
    if window is not None:
        first = tl.maximum(0, block * BLOCK - window) // STEP * STEP
        last = tl.minimum(length, (block + 1) * BLOCK + window)
    return first, last


@jit
def _flash_forward(
    qkv, cu_seqlens, out, lse, n_tokens, n_heads, window,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(1), tl.program_id(2)
    begin, length = _sequence(cu_seqlens, tl.program_id(0))
    width, i = n_heads * WIDTH, block * BLOCK + tl.arange(0, BLOCK)
    qkv += begin * 3 * width + head * WIDTH
    q = _load(qkv, i, length, 3 * width, WIDTH)
    # finite, so that a block in which a query sees nothing leaves 0 and not NaN
    largest, total = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
    heads = tl.zeros((BLOCK, WIDTH), tl.float32)
    first, last = _span(block, length, window, BLOCK, STEP)
    for start in range(first, last, STEP):
        j = start + tl.arange(0, STEP)
        k = _load(qkv + width, j, length, 3 * width, WIDTH)
        v = _load(qkv + 2 * width, j, length, 3 * width, WIDTH)
        scores = _scores(q, k, i, j, length, window, WIDTH)
        higher = tl.maximum(largest, tl.max(scores, 1))
        p, fade = tl.exp2(scores - higher[:, None]), tl.exp2(largest - higher)
        total, largest = total * fade + tl.sum(p, 1), higher
        heads = tl.dot(p.to(v.dtype), v, heads * fade[:, None], input_precision="ieee")
    _store(out + begin * width + head * WIDTH, i, length, width, heads / total[:, None], WIDTH)
    tl.store(lse + head * n_tokens + begin + i, largest + tl.log2(total), mask=i < length)


@jit
def _flash_d_q(
    qkv, cu_seqlens, out, lse, d_out, delta, d_qkv, n_tokens, n_heads, window,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(1), tl.program_id(2)
    begin, length = _sequence(cu_seqlens, tl.program_id(0))
    width, i = n_heads * WIDTH, block * BLOCK + tl.arange(0, BLOCK)
    place, row = begin * width + head * WIDTH, head * n_tokens + begin + i
    qkv += begin * 3 * width + head * WIDTH
    q = _load(qkv, i, length, 3 * width, WIDTH)
    heads, d_heads = (
        _load(out + place, i, length, width, WIDTH),
        _load(d_out + place, i, length, width, WIDTH),
    )
    d_total = tl.sum(heads.to(tl.float32) * d_heads.to(tl.float32), 1)
    tl.store(delta + row, d_total, mask=i < length)
    lse_i = tl.load(lse + row, mask=i < length, other=0.0)
    d_q = tl.zeros((BLOCK, WIDTH), tl.float32)
    first, last = _span(block, length, window, BLOCK, STEP)
    for start in range(first, last, STEP):
        j = start + tl.arange(0, STEP)
        k = _load(qkv + width, j, length, 3 * width, WIDTH)
        v = _load(qkv + 2 * width, j, length, 3 * width, WIDTH)
        p = tl.exp2(_scores(q, k, i, j, length, window, WIDTH) - lse_i[:, None])
        d_p = tl.dot(d_heads, tl.trans(v), input_precision="ieee")
        d_q = tl.dot((p * (d_p - d_total[:, None])).to(k.dtype), k, d_q, input_precision="ieee")
    d_qkv += begin * 3 * width + head * WIDTH
    _store(d_qkv, i, length, 3 * width, d_q / tl.sqrt(1.0 * WIDTH), WIDTH)


@jit
def _flash_d_kv(
    qkv, cu_seqlens, out, lse, d_out, delta, d_qkv, n_tokens, n_heads, window,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(1), tl.program_id(2)
    begin, length = _sequence(cu_seqlens, tl.program_id(0))
    width, j = n_heads * WIDTH, block * BLOCK + tl.arange(0, BLOCK)
    qkv += begin * 3 * width + head * WIDTH
    d_out, lse = d_out + begin * width + head * WIDTH, lse + head * n_tokens + begin
    delta += head * n_tokens + begin
    k = _load(qkv + width, j, length, 3 * width, WIDTH)
    v = _load(qkv + 2 * width, j, length, 3 * width, WIDTH)
    d_k, d_v = tl.zeros((BLOCK, WIDTH), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    first, last = _span(block, length, window, BLOCK, STEP)
    for start in range(first, last, STEP):
        i = start + tl.arange(0, STEP)
        q, d_heads = _load(qkv, i, length, 3 * width, WIDTH), _load(d_out, i, length, width, WIDTH)
        lse_i = tl.load(lse + i, mask=i < length, other=0.0)
        d_total = tl.load(delta + i, mask=i < length, other=0.0)
        p = tl.exp2(_scores(k, q, j, i, length, window, WIDTH) - lse_i[None, :])  # (keys, queries)
        d_v = tl.dot(p.to(v.dtype), d_heads, d_v, input_precision="ieee")
        d_p = tl.dot(v, tl.trans(d_heads), input_precision="ieee")
        d_k = tl.dot((p * (d_p - d_total[None, :])).to(q.dtype), q, d_k, input_precision="ieee")
    d_qkv += begin * 3 * width + head * WIDTH
    _store(d_qkv + width, j, length, 3 * width, d_k / tl.sqrt(1.0 * WIDTH), WIDTH)
    _store(d_qkv + 2 * width, j, length, 3 * width, d_v, WIDTH)
