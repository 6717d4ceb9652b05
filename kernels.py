"""The fused operations of the model, each as one function with its formula, its source, its written-out
torch code and its Triton kernels.

Axes: T tokens of a whole batch, S sequences, B sequences of one length group, L the padded length of that
group, H heads, D head size, N rows of the vocabulary head, V vocabulary.

A batch is a flat row of T tokens; `cu_seqlens` (S + 1,) int32 says where each sequence begins, and only
`attention` looks at it. The operations are autograd functions, because autograd's own graph would keep
float32 copies of everything that is wide. The torch code works in blocks that stay in a CPU's caches; it
keeps bfloat16 probabilities of attention, no logits of the vocabulary head and no activation of GeGLU. The
Triton kernels keep no probabilities either. Nothing in them is atomic, so that a run repeats to the bit.
"""

from __future__ import annotations  # without Triton, `tl.constexpr` is no more than a text

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, and the CPU build of torch
    triton = None

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
# Logits that exist at a time in the vocabulary head: enough rows for fast products, and on a GPU enough for
# the work of a chunk to outlast its launches.
CHUNK_LOGITS, GPU_CHUNK_LOGITS = 2**23, 2**26
# Head sizes of Triton's attention, whose blocks are powers of 2; others take the torch code.
FLASH_HEAD_DIMS = (32, 64, 128)
ROW_BLOCK = 1024  # what of a row a program of Triton's has at a time
BAG_BLOCK = 64  # targets of a row that it has at a time
ROTATED = 64  # tokens that a program rotates
NORM_STRIPS = 512  # programs that the rows of a norm's backward pass are dealt to, each a partial d_weight

# "torch" or "triton" forces the one or the other; on a CPU "triton" wants TRITON_INTERPRET=1 at the import.
FORCED = os.environ.get("CLOZE_KERNELS")

Rope = tuple[Tensor, Tensor]


def check_forced(device: torch.device) -> None:
    """Raises ValueError where CLOZE_KERNELS asks for what this machine cannot do on that device."""
    if FORCED not in (None, "torch", "triton"):
        raise ValueError(f"CLOZE_KERNELS={FORCED}: it must be torch or triton")
    if FORCED == "triton" and triton is None:
        raise ValueError("CLOZE_KERNELS=triton: Triton is not installed; on Linux, pip install triton")
    if FORCED == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("CLOZE_KERNELS=triton: on a CPU this takes the interpreter, TRITON_INTERPRET=1")


def on_triton(x: Tensor) -> bool:
    """The one rule of dispatch: Triton's kernels for a GPU's tensors, torch code for all others."""
    chosen = FORCED == "triton" or (FORCED is None and triton is not None and x.is_cuda)
    return chosen and x.dtype != torch.float64


def jit(kernel):
    return triton.jit(kernel) if triton else kernel


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
    if on_triton(qkv) and qkv.shape[-1] in FLASH_HEAD_DIMS:
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
        softmax = bag_softmax if on_triton(hidden) else _bag_softmax_by_blocks

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


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + x, LayerNorm(residual + x) * weight), both (T, d_model) (Ba et al. 2016, arXiv
    1607.06450)."""
    if on_triton(x):
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


def geglu(x: Tensor) -> Tensor:
    """gelu(a) * b of x = [a, b], (T, 2 d_ff) to (T, d_ff), gelu by erf (Shazeer 2020, arXiv 2002.05202).

    The backward pass computes gelu(a) once more, and writes both halves of its gradient where they belong.
    """
    if torch.compiler.is_compiling() and not on_triton(x):  # the compiler fuses better than blocks do
        a, b = x.chunk(2, dim=-1)
        return F.gelu(a) * b
    return (_FusedGeGLU if on_triton(x) else _GeGLU).apply(x)


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
