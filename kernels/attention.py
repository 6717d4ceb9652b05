"""Attention within each sequence of an unpadded batch, with rotary positions.

`reference` is the formula and `attention` the function to call. `_Attention` is its code for CPUs,
`_FlashAttention` its code for GPUs, whose Triton kernels fill the rest of the file.

Axes: T tokens of the batch, S sequences, L positions of a sequence, H heads, D head_dim,
B sequences of a group. Sequence s is the rows cu_seqlens[s] to cu_seqlens[s + 1] of the batch.
"""

from __future__ import annotations  # without Triton, `tl.constexpr` must not be evaluated

import functools
import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kernels.dispatch import jit, tl, use_triton

# ruff: noqa: E741 (m and l are the names of the online softmax in the papers)

# Tokens that the CPU multiplies at a time: enough to outweigh the overhead of the calls, few enough
# for their scores to stay in the caches.
GROUP_TOKENS = 1024
# Head sizes of the Triton kernels, whose blocks are powers of 2; others take the torch code.
FLASH_HEAD_DIMS = (32, 64, 128)
ROTATE_BLOCK = 64  # tokens of one program of the rotation kernel

Rope = tuple[Tensor, Tensor]


def reference(
    qkv: Tensor, cu_seqlens: Tensor, rope: Rope | None = None, window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, one sequence after the other; arguments as in `attention`."""
    outputs = []
    for sequence in qkv.split(cu_seqlens.diff().tolist()):
        q, k, v = sequence.permute(1, 2, 0, 3)  # (H, L, D) each
        q = rotate(q, rope)
        k = rotate(k, rope)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (H, L, L)
        if window is not None:
            position = torch.arange(len(sequence), device=qkv.device)
            distance = (position[:, None] - position).abs()
            scores = scores.masked_fill(distance > window, -math.inf)
        outputs.append((scores.softmax(dim=-1) @ v).transpose(0, 1))  # (L, H, D)
    return torch.cat(outputs)


def rotate(x: Tensor, rope: Rope | None) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) by the angles of their position, in float32 or better.

    Args:
        x: (..., L, D).
        rope: tables of at least L positions. (cos, -sin) rotates back, None leaves x as it is.
    """
    if rope is None:
        return x
    cos, sin = (table[: x.shape[-2]] for table in rope)  # (L, D / 2) each
    half = cos.shape[-1]
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    out = x * torch.cat((cos, cos), dim=-1)
    out[..., :half].addcmul_(b, sin, value=-1)  # a * cos - b * sin
    out[..., half:].addcmul_(a, sin)  # b * cos + a * sin
    return out.to(x.dtype)


@functools.lru_cache(64)  # building them takes ten launches
def rope_tables(
    n_positions: int, head_dim: int, theta: float, device: torch.device | str = "cpu"
) -> Rope:
    """Tables for `rotate` (RoPE, half-split: Su et al. 2021, arXiv 2104.09864, section 3.2).

    Returns:
        cos and sin of position * theta^(-2i / head_dim), each (n_positions, head_dim / 2), float32.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    position = torch.arange(n_positions, dtype=torch.float32, device=device)
    angles = position[:, None] * (1.0 / theta**exponent)
    return angles.cos(), angles.sin()


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    rope: Rope | None = None,
    window: int | None = None,
) -> Tensor:
    """Scaled dot-product attention within each sequence (Vaswani et al. 2017, section 3.2.1).

    Args:
        qkv: (T, 3, H, D), the queries, keys and values of all tokens.
        cu_seqlens: (S + 1,) integers, the first row of each sequence, then T.
        max_seqlen: at least the length of the longest sequence.
        rope: the tables by which q and k are rotated, of at least max_seqlen positions.
        window: a token at position i sees j only where |i - j| <= window; None means all j.

    Returns:
        (T, H, D) in the dtype of qkv.

    Raises:
        ValueError: the tables of rope are too short.
    """
    if rope is not None and len(rope[0]) < max_seqlen:
        raise ValueError(f"rope has {len(rope[0])} positions, the longest sequence {max_seqlen}")
    if use_triton(qkv) and qkv.shape[-1] in FLASH_HEAD_DIMS:
        return _FlashAttention.apply(qkv, cu_seqlens, max_seqlen, rope, window)

    apply = _Attention.apply
    if torch.compiler.is_compiling():
        # The groups depend on the lengths, which a compiled graph does not know. A decorator would
        # do the same, but would import the compiler at each start, which takes seconds.
        apply = torch.compiler.disable(apply)
    return apply(qkv, cu_seqlens, rope, window)


# ------------------------------------------------------------------------------------------- CPU


class _Attention(torch.autograd.Function):
    """Sequences of similar length are padded to the longest of them and multiplied together."""

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, rope, window) -> Tensor:
        lengths = cu_seqlens.diff().tolist()
        sequences = qkv.split(lengths)
        outputs = [None] * len(lengths)
        groups = _length_groups(lengths)
        saved = []

        for group in groups:
            padded = pad_sequence([sequences[i] for i in group], batch_first=True)
            padded = padded.permute(2, 0, 3, 1, 4)  # (3, B, H, L, D)
            q, k = rotate(padded[:2].contiguous(), rope)
            q *= qkv.shape[-1] ** -0.5
            v = padded[2].contiguous()

            scores = q @ k.transpose(-1, -2)  # (B, H, L, L)
            _mask(scores, [lengths[i] for i in group], window)
            p = torch.softmax(scores, dim=-1).to(v.dtype)  # on a GPU, autocast makes it float32
            o = (p @ v).transpose(1, 2)  # (B, L, H, D)

            for i, o_i in zip(group, o, strict=True):
                outputs[i] = o_i[: lengths[i]]
            saved += [q, k, v, p]  # q is scaled, so that d_k needs no factor

        ctx.save_for_backward(*saved)
        ctx.lengths = lengths
        ctx.groups = groups
        ctx.rope = rope
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, None, None, None]:
        saved = ctx.saved_tensors
        d_outputs = d_out.split(ctx.lengths)
        d_sequences = [None] * len(ctx.lengths)

        for n, group in enumerate(ctx.groups):
            q, k, v, p = saved[4 * n : 4 * n + 4]
            d_o = pad_sequence([d_outputs[i] for i in group], batch_first=True)
            d_o = d_o.transpose(1, 2).contiguous()  # (B, H, L, D)

            d_p = d_o @ v.transpose(-1, -2)
            d_scores = p * (d_p - (p * d_p).sum(dim=-1, keepdim=True))  # (B, H, L, L)

            d_padded = q.new_empty(3, *q.shape)  # (3, B, H, L, D)
            torch.matmul(d_scores, k, out=d_padded[0]).mul_(q.shape[-1] ** -0.5)
            torch.matmul(d_scores.transpose(-1, -2), q, out=d_padded[1])
            torch.matmul(p.transpose(-1, -2), d_o, out=d_padded[2])
            if ctx.rope is not None:
                cos, sin = ctx.rope
                d_padded[:2] = rotate(d_padded[:2], (cos, -sin))

            for i, d_i in zip(group, d_padded.permute(1, 3, 0, 2, 4), strict=True):
                d_sequences[i] = d_i[: ctx.lengths[i]]  # (L, 3, H, D)

        return torch.cat(d_sequences), None, None, None


def _length_groups(lengths: list[int]) -> list[list[int]]:
    """Indices of the sequences, the longest first, in groups of at most GROUP_TOKENS tokens with
    their padding; a longer sequence is a group of its own."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    groups = []
    while order:
        longest = max(1, lengths[order[0]])
        size = max(1, GROUP_TOKENS // longest)
        groups.append(order[:size])
        order = order[size:]
    return groups


def _mask(scores: Tensor, lengths: list[int], window: int | None) -> None:
    """Overwrite the scores (B, H, L, L) of padded keys and of keys outside the window.

    The value is finite, because -inf in a whole row, which padding may cause, would give NaN.
    """
    width = scores.shape[-1]
    position = torch.arange(width, device=scores.device)
    ends = torch.tensor(lengths, device=scores.device)[:, None, None, None]
    is_hidden = position >= ends  # (B, 1, 1, L)
    first = min(lengths)  # no key before this one is padding
    if window is not None and width - 1 > window:  # the largest distance
        distance = (position[:, None] - position).abs()
        is_hidden = is_hidden | (distance > window)  # (B, 1, L, L)
        first = 0
    scores[..., first:].masked_fill_(is_hidden[..., first:], torch.finfo(scores.dtype).min)


# -------------------------------------------------------------------------------------------- GPU


class _FlashAttention(torch.autograd.Function):
    """FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithms 1 and 2), without atomics.

    q and k are rotated by a kernel of their own, because each block of them is loaded many times.
    The backward pass rotates their gradients back where it writes them.
    """

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, max_seqlen, rope, window) -> Tensor:
        n_tokens, _, n_heads, head_dim = qkv.shape
        qkv = qkv.contiguous()
        qk = qkv  # of which the first two of three PARTS are q and k
        if rope is not None:
            qk = qkv.new_empty(n_tokens, 2, n_heads, head_dim)
            grid = _grid(cu_seqlens, 2 * n_heads, max_seqlen, ROTATE_BLOCK)
            _flash_rotate[grid](
                qkv, qk, cu_seqlens, *rope, n_heads, HALF=head_dim // 2, BLOCK=ROTATE_BLOCK
            )

        out = qkv.new_empty(n_tokens, n_heads, head_dim)
        lse = qkv.new_empty(n_heads, n_tokens, dtype=torch.float32)  # logsumexp of scores, base 2
        options = flash_options(head_dim, qkv.dtype) | {"PARTS": qk.shape[1]}
        grid = _grid(cu_seqlens, n_heads, max_seqlen, options["BLOCK"])
        arguments = (qk, qkv, cu_seqlens, out, lse, n_tokens, n_heads, window)
        _flash_forward[grid](*arguments, **options)

        ctx.save_for_backward(qk, qkv, cu_seqlens, out, lse)
        ctx.max_seqlen = max_seqlen
        ctx.rope = rope
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, None, None, None, None]:
        qk, qkv, cu_seqlens, out, lse = ctx.saved_tensors
        n_tokens, _, n_heads, head_dim = qkv.shape
        d_out = d_out.contiguous()
        d_qkv = torch.empty_like(qkv)
        delta = torch.empty_like(lse)  # row sums of out * d_out, written by the first kernel
        options = flash_options(head_dim, qkv.dtype) | {"PARTS": qk.shape[1]}
        grid = _grid(cu_seqlens, n_heads, ctx.max_seqlen, options["BLOCK"])
        tensors = (qk, qkv, cu_seqlens, out, lse, d_out, delta, d_qkv, *(ctx.rope or (None, None)))
        arguments = (*tensors, n_tokens, n_heads, ctx.window)
        _flash_d_q[grid](*arguments, **options)
        _flash_d_kv[grid](*arguments, **options)
        return d_qkv, None, None, None, None


def _grid(cu_seqlens: Tensor, n_heads: int, max_seqlen: int, block: int) -> tuple[int, int, int]:
    """Programs of a launch; the sequences come first, as only the first size may exceed 65,535."""
    return len(cu_seqlens) - 1, n_heads, -(-max_seqlen // block)


def flash_options(
    head_dim: int, dtype: torch.dtype, architecture: str | None = None
) -> dict[str, int]:
    """Rows of a program (BLOCK), rows of the other side that it reads at a time (STEP), and depth
    of the pipeline: the largest at which none spills registers in 16 bits (python bench.py --aot).

    Args:
        architecture: "hip", or "sm_" and the compute capability; None: of this machine.
    """
    architecture = architecture or _architecture()
    is_16_bit = dtype.itemsize == 2
    step = 16
    if is_16_bit and head_dim <= 64:
        step = 64 if architecture == "sm_90" else 32  # Hopper's tensor cores take wide tiles
    num_stages = 2 if is_16_bit else 3
    return {
        "WIDTH": head_dim,
        "BLOCK": 64 if is_16_bit else 32,
        "STEP": step,
        "num_stages": 1 if architecture == "hip" else num_stages,
    }


def _architecture() -> str:
    if torch.version.hip:
        return "hip"
    if not torch.cuda.is_available():  # Triton's interpreter
        return ""
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


# In the kernels below i counts queries and j keys, from the start of their sequence, row `begin`,
# in 64 bits, because it is multiplied by strides. Each kernel loads it itself: in a function of its
# own torch.compile would take cu_seqlens for written. Every matrix multiplication states
# input_precision="ieee", because that of float32 would default to TF32.


@jit
def _load(base, rows, length, stride, WIDTH: tl.constexpr):
    """(rows, WIDTH) of a sequence, zeros beyond its length."""
    pointers = base + (rows[:, None] * stride + tl.arange(0, WIDTH))
    return tl.load(pointers, mask=(rows < length)[:, None], other=0.0)


@jit
def _store(base, rows, length, stride, x, WIDTH: tl.constexpr):
    pointers = base + (rows[:, None] * stride + tl.arange(0, WIDTH))
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(rows < length)[:, None])


@jit
def _flash_rotate(qkv, qk, cu_seqlens, cos, sin, n_heads, HALF: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1)  # of 2 * n_heads: those of q and of k
    block = tl.program_id(2)
    begin = tl.load(cu_seqlens + tl.program_id(0)).to(tl.int64)
    length = tl.load(cu_seqlens + tl.program_id(0) + 1) - begin.to(tl.int32)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    d_model = n_heads * 2 * HALF
    qkv += begin * 3 * d_model + head * 2 * HALF
    qk += begin * 2 * d_model + head * 2 * HALF

    a = _load(qkv, rows, length, 3 * d_model, HALF).to(tl.float32)
    b = _load(qkv + HALF, rows, length, 3 * d_model, HALF).to(tl.float32)
    c = _load(cos, rows, length, HALF, HALF)
    s = _load(sin, rows, length, HALF, HALF)
    _store(qk, rows, length, 2 * d_model, a * c - b * s, HALF)
    _store(qk + HALF, rows, length, 2 * d_model, b * c + a * s, HALF)


@jit
def _rotate_back(x, cos, sin, rows, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Undo the rotation of (BLOCK, WIDTH); without tables there was none."""
    if cos is not None:
        HALF: tl.constexpr = WIDTH // 2
        c = _load(cos, rows, length, HALF, HALF)
        s = _load(sin, rows, length, HALF, HALF)
        a, b = tl.split(tl.permute(tl.reshape(x, (BLOCK, 2, HALF)), (0, 2, 1)))  # (BLOCK, HALF)
        pairs = tl.join(a * c + b * s, b * c - a * s)  # (BLOCK, HALF, 2)
        x = tl.reshape(tl.permute(pairs, (0, 2, 1)), (BLOCK, WIDTH))
    return x


@jit
def _scores(x, y, rows, columns, length, window, WIDTH: tl.constexpr):
    """Scores of the rows with the columns in base 2, -inf where one must not see the other."""
    scale = 1.4426950408889634 / tl.sqrt(1.0 * WIDTH)  # log2(e) / sqrt(D): exp2 is faster than exp
    is_seen = (columns < length)[None, :]
    if window is not None:
        is_seen = is_seen & (tl.abs(rows[:, None] - columns[None, :]) <= window)
    scores = tl.dot(x, tl.trans(y), input_precision="ieee") * scale
    return tl.where(is_seen, scores, float("-inf"))


@jit
def _span(block, length, window, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """First and last row of the other side that a block can see or be seen from; none if the block
    begins beyond the end of the sequence."""
    first, last = 0, length
    if window is not None:
        first = tl.maximum(0, block * BLOCK - window) // STEP * STEP
        last = tl.minimum(length, (block + 1) * BLOCK + window)
    return first, tl.where(block * BLOCK < length, last, first)


@jit
def _flash_forward(
    qk, qkv, cu_seqlens, out, lse, n_tokens, n_heads, window,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    block = tl.program_id(2)
    begin = tl.load(cu_seqlens + tl.program_id(0)).to(tl.int64)
    length = tl.load(cu_seqlens + tl.program_id(0) + 1) - begin.to(tl.int32)
    d_model = n_heads * WIDTH
    i = block * BLOCK + tl.arange(0, BLOCK)
    qk += begin * PARTS * d_model + head * WIDTH
    qkv += begin * 3 * d_model + head * WIDTH
    q = _load(qk, i, length, PARTS * d_model, WIDTH)

    m = tl.full((BLOCK,), -1e30, tl.float32)  # running maximum; -inf would give NaN
    l = tl.zeros((BLOCK,), tl.float32)  # running sum of exp2(scores - m)
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)  # the output before its division by l
    first, last = _span(block, length, window, BLOCK, STEP)
    for start in range(first, last, STEP):
        j = start + tl.arange(0, STEP)
        k = _load(qk + d_model, j, length, PARTS * d_model, WIDTH)
        v = _load(qkv + 2 * d_model, j, length, 3 * d_model, WIDTH)
        scores = _scores(q, k, i, j, length, window, WIDTH)

        m_new = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2(scores - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new

    _store(out + begin * d_model + head * WIDTH, i, length, d_model, acc / l[:, None], WIDTH)
    tl.store(lse + head * n_tokens + begin + i, m + tl.log2(l), mask=i < length)


@jit
def _flash_d_q(
    qk, qkv, cu_seqlens, out, lse, d_out, delta, d_qkv, cos, sin,
    n_tokens, n_heads, window,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    block = tl.program_id(2)
    begin = tl.load(cu_seqlens + tl.program_id(0)).to(tl.int64)
    length = tl.load(cu_seqlens + tl.program_id(0) + 1) - begin.to(tl.int32)
    d_model = n_heads * WIDTH
    i = block * BLOCK + tl.arange(0, BLOCK)
    offset = begin * d_model + head * WIDTH
    row = head * n_tokens + begin + i
    qk += begin * PARTS * d_model + head * WIDTH
    qkv += begin * 3 * d_model + head * WIDTH
    d_qkv += begin * 3 * d_model + head * WIDTH

    q = _load(qk, i, length, PARTS * d_model, WIDTH)
    o = _load(out + offset, i, length, d_model, WIDTH)
    d_o = _load(d_out + offset, i, length, d_model, WIDTH)
    lse_i = tl.load(lse + row, mask=i < length, other=0.0)
    delta_i = tl.sum(o.to(tl.float32) * d_o.to(tl.float32), 1)
    tl.store(delta + row, delta_i, mask=i < length)

    d_q = tl.zeros((BLOCK, WIDTH), tl.float32)
    first, last = _span(block, length, window, BLOCK, STEP)
    for start in range(first, last, STEP):
        j = start + tl.arange(0, STEP)
        k = _load(qk + d_model, j, length, PARTS * d_model, WIDTH)
        v = _load(qkv + 2 * d_model, j, length, 3 * d_model, WIDTH)
        p = tl.exp2(_scores(q, k, i, j, length, window, WIDTH) - lse_i[:, None])
        d_p = tl.dot(d_o, tl.trans(v), input_precision="ieee")
        d_scores = p * (d_p - delta_i[:, None])
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q, input_precision="ieee")
    d_q = _rotate_back(d_q / tl.sqrt(1.0 * WIDTH), cos, sin, i, length, WIDTH, BLOCK)
    _store(d_qkv, i, length, 3 * d_model, d_q, WIDTH)


@jit
def _flash_d_kv(
    qk, qkv, cu_seqlens, out, lse, d_out, delta, d_qkv, cos, sin,
    n_tokens, n_heads, window,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    block = tl.program_id(2)
    begin = tl.load(cu_seqlens + tl.program_id(0)).to(tl.int64)
    length = tl.load(cu_seqlens + tl.program_id(0) + 1) - begin.to(tl.int32)
    d_model = n_heads * WIDTH
    j = block * BLOCK + tl.arange(0, BLOCK)
    qk += begin * PARTS * d_model + head * WIDTH
    qkv += begin * 3 * d_model + head * WIDTH
    d_qkv += begin * 3 * d_model + head * WIDTH
    d_out += begin * d_model + head * WIDTH
    lse += head * n_tokens + begin
    delta += head * n_tokens + begin

    k = _load(qk + d_model, j, length, PARTS * d_model, WIDTH)
    v = _load(qkv + 2 * d_model, j, length, 3 * d_model, WIDTH)
    d_k = tl.zeros((BLOCK, WIDTH), tl.float32)
    d_v = tl.zeros((BLOCK, WIDTH), tl.float32)
    first, last = _span(block, length, window, BLOCK, STEP)
    for start in range(first, last, STEP):
        i = start + tl.arange(0, STEP)
        q = _load(qk, i, length, PARTS * d_model, WIDTH)
        d_o = _load(d_out, i, length, d_model, WIDTH)
        lse_i = tl.load(lse + i, mask=i < length, other=0.0)
        delta_i = tl.load(delta + i, mask=i < length, other=0.0)
        # all of these are transposed, (keys, queries)
        p = tl.exp2(_scores(k, q, j, i, length, window, WIDTH) - lse_i[None, :])
        d_v = tl.dot(p.to(v.dtype), d_o, d_v, input_precision="ieee")
        d_p = tl.dot(v, tl.trans(d_o), input_precision="ieee")
        d_scores = p * (d_p - delta_i[None, :])
        d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision="ieee")
    d_k = _rotate_back(d_k / tl.sqrt(1.0 * WIDTH), cos, sin, j, length, WIDTH, BLOCK)
    _store(d_qkv + d_model, j, length, 3 * d_model, d_k, WIDTH)
    _store(d_qkv + 2 * d_model, j, length, 3 * d_model, d_v, WIDTH)
