"""Each fused operation against plain torch in float64: values, gradients, precisions, and no leaks."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.dispatch
from kernels.attention import attention, rope_tables
from kernels.cross_entropy import linear_cross_entropy
from kernels.geglu import geglu
from kernels.norm import add_norm


def error(x, exact):
    return float((x.detach().double() - exact.detach()).abs().max())


def as_leaf(x):
    return x.detach().clone().requires_grad_()


def generator_of(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


# ------------------------------------------------------------------------------------------------ attention


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def plain_attention(qkv, lengths, rope, window):
    """One sequence and one head after the other, in the dtype of qkv; rotation in float32 or more."""
    out, first = torch.empty_like(qkv[:, 0]), 0
    for length in lengths:
        q, k, v = qkv[first : first + length].unbind(1)  # (length, heads, head_dim)
        if rope is not None:
            cos, sin = (table[:length, None] for table in rope)
            q, k = (torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(q.dtype)
                    for a, b in (x.to(cos.dtype).chunk(2, -1) for x in (q, k)))  # fmt: skip
        distance = (torch.arange(length)[:, None] - torch.arange(length)).abs()
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head].T * q.shape[-1] ** -0.5
            if window is not None:
                scores = scores.masked_fill(distance > window, -torch.inf)
            out[first : first + length, head] = scores.softmax(-1) @ v[:, head]
        first += length
    return out


def both_attentions(qkv, lengths, rope, window, max_seqlen, d_out):
    """(output, gradient of qkv), once of ours and once of plain torch."""
    ours, plain = as_leaf(qkv), as_leaf(qkv)
    found = attention(ours, boundaries(lengths), max_seqlen, rope, window)
    expected = plain_attention(plain, lengths, rope, window)
    found.backward(d_out.to(found.dtype))
    expected.backward(d_out.to(expected.dtype))
    return (found, ours.grad), (expected, plain.grad)


def attention_inputs(lengths, head_dim, seed, n_heads=2):
    generator = generator_of(seed)
    qkv = torch.randn(sum(lengths), 3, n_heads, head_dim, generator=generator, dtype=torch.float64)
    qkv[:, :2] *= 1.5  # peaked probabilities, so that a wrong key is no small matter
    return qkv, torch.randn(sum(lengths), n_heads, head_dim, generator=generator, dtype=torch.float64)


def rope_double(n_positions, head_dim):
    return tuple(
        table.double() for table in rope_tables(n_positions, head_dim, 100.0, torch.get_default_device())
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=8),
    n_empty=st.integers(0, 3),
    head_dim=st.sampled_from((32, 64, 128)),
    reach=st.sampled_from((None, 0, 1, 5, 16, -3, -2, -1, 500)),  # negative ones count from the longest
    rotated=st.booleans(),
    spare=st.sampled_from((0, 1, 40)),
    full=st.sampled_from((1, 100, 2048)),
    seed=st.integers(0, 99),
)
@example(lengths=[7, 3], n_empty=0, head_dim=32, reach=-2, rotated=False, spare=0, full=2048, seed=0)
def test_attention_is_exact(lengths, n_empty, head_dim, reach, rotated, spare, full, seed):
    window = reach if reach is None or reach >= 0 else max(0, max(lengths) + reach)
    lengths, longest = lengths + [0] * n_empty, max(lengths) + spare
    qkv, d_out = attention_inputs(lengths, head_dim, seed)
    rope = rope_double(longest, head_dim) if rotated else None
    with mock.patch.object(kernels, "GROUP_TOKENS", full):
        both = both_attentions(qkv, lengths, rope, window, longest, d_out)
    for ours, plain in zip(*both, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("head_dim", (32, 64, 128))
@pytest.mark.parametrize("window", (None, 0, 7, 200))
@pytest.mark.parametrize("rotated", (False, True))
def test_attention_rounds_no_more_than_twice_plain_torch(dtype, head_dim, window, rotated):
    lengths = [1, 33, 2, 90, 17, 1, 64, 0]
    qkv, d_out = (x.to(dtype) for x in attention_inputs(lengths, head_dim, seed=head_dim))
    rope = rope_double(90, head_dim) if rotated else None
    exact = both_attentions(qkv.double(), lengths, rope, window, 90, d_out.double())[1]
    low_rope = rope and tuple(table.float() for table in rope)
    results = zip(*both_attentions(qkv, lengths, low_rope, window, 90, d_out), exact, strict=True)
    for ours, plain, truth in results:
        assert ours.dtype == dtype
        assert error(ours, truth) <= 2 * error(plain, truth) + torch.finfo(dtype).eps * 1e-2


@pytest.mark.parametrize("window", (None, 6))
def test_attention_keeps_sequences_apart(window):
    """Every other token may change: outputs and gradients of a sequence stay equal to the bit."""
    lengths = [9, 40, 1, 37, 16]
    qkv, d_out = (x.float() for x in attention_inputs(lengths, 32, seed=0))
    d_out = torch.ones_like(d_out)
    rope = rope_tables(40, 32, 100.0)
    before, d_before = both_attentions(qkv, lengths, rope, window, 40, d_out)[0]
    first = 0
    for length in lengths:
        mine = torch.zeros(len(qkv), dtype=torch.bool)
        mine[first : first + length] = True
        changed = torch.where(mine[:, None, None, None], qkv, 3 * qkv.flip(0))
        after, d_after = both_attentions(changed, lengths, rope, window, 40, d_out)[0]
        assert torch.equal(before[mine], after[mine]) and torch.equal(d_before[mine], d_after[mine])
        assert not torch.equal(before[~mine], after[~mine])
        first += length


def test_attention_refuses_a_rope_that_is_too_short():
    qkv, _ = attention_inputs([9], 32, seed=0)
    with pytest.raises(ValueError, match="8 positions"):
        attention(qkv, boundaries([9]), 9, rope_double(8, 32))


# ------------------------------------------------------------------------------------------ vocabulary head


def head_inputs(n_rows, d_model, vocab_size, bags, seed=0, dtype=torch.float64):
    """hidden, weight, bias; then ids, bag_weights, cu_bags (the last two None for single targets)."""
    generator = generator_of(seed)
    shapes = (n_rows, d_model), (vocab_size, d_model), (vocab_size,)
    parts = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    if not bags:
        return parts, (torch.randint(vocab_size, (n_rows,), generator=generator), None, None)
    sizes = torch.randint(1, 12, (n_rows,), generator=generator)
    ids = torch.randint(min(5, vocab_size), (int(sizes.sum()),), generator=generator)  # few, so they repeat
    weights = torch.cat([torch.rand(int(n), generator=generator).add(0.1) for n in sizes])
    cu_bags = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
    row = torch.repeat_interleave(torch.arange(n_rows), sizes)
    weights = weights.double() / torch.zeros(n_rows).double().index_add(0, row, weights.double())[row]
    return parts, (ids, weights, cu_bags)


def plain_cross_entropy(hidden, weight, bias, ids, bag_weights, cu_bags):
    """Against a dense target distribution, from all logits at once."""
    target = torch.zeros(len(hidden), len(weight), dtype=torch.float64)
    for row in range(len(hidden)):
        for i in [row] if cu_bags is None else range(cu_bags[row], cu_bags[row + 1]):
            target[row, ids[i]] += 1.0 if bag_weights is None else bag_weights[i]
    return -((hidden @ weight.T + bias).log_softmax(-1).double() * target).sum()


def loss_and_gradients(function, parts, targets, factor=1.0):
    leaves = [as_leaf(part) for part in parts]
    loss = function(*leaves, *targets)
    (factor * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("bags", (False, True))
@pytest.mark.parametrize("shape", ((1, 3, 1), (7, 5, 13), (64, 8, 101), (23, 16, 257)))
@pytest.mark.parametrize("chunk, block", ((1, 1), (1500, 700), (2000, 1000), (2**22, 700), (2**22, 2**18)))
def test_cross_entropy_is_exact(monkeypatch, bags, shape, chunk, block):
    monkeypatch.setattr(kernels, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(kernels, "BLOCK_LOGITS", block)
    inputs = head_inputs(*shape, bags)
    ours = loss_and_gradients(linear_cross_entropy, *inputs, factor=0.3)
    plain = loss_and_gradients(plain_cross_entropy, *inputs, factor=0.3)
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(*map(as_leaf, inputs[0]), *inputs[1]), plain[0])


@pytest.mark.parametrize("bags", (False, True))
@pytest.mark.parametrize("chunk, block", ((1500, 700), (2**22, 2**18)))
def test_cross_entropy_rounds_no_more_than_twice_plain_torch(monkeypatch, bags, chunk, block):
    monkeypatch.setattr(kernels, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(kernels, "BLOCK_LOGITS", block)
    parts, targets = head_inputs(150, 32, 301, bags, dtype=torch.float32)
    exact = loss_and_gradients(plain_cross_entropy, [part.double() for part in parts], targets)
    ours = loss_and_gradients(linear_cross_entropy, parts, targets)
    plain = loss_and_gradients(plain_cross_entropy, parts, targets)
    for found, other, truth in zip(ours, plain, exact, strict=True):
        assert found.dtype == torch.float32
        assert error(found, truth) <= 2 * error(other, truth) + 1e-6 * float(truth.abs().max())


@pytest.mark.parametrize("scale", (1e-3, 30.0, 3e3))
def test_cross_entropy_of_any_size_of_logits(scale):
    """Where the probability of a target is 0 in float32, its logit still counts."""
    (hidden, weight, bias), targets = head_inputs(23, 16, 257, False, dtype=torch.float32)
    parts = (scale * hidden, weight, bias)
    exact = loss_and_gradients(plain_cross_entropy, [part.double() for part in parts], targets)
    for found, truth in zip(loss_and_gradients(linear_cross_entropy, parts, targets), exact, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


class ChunksOfLogits(TorchDispatchMode):
    """The memory that results of this shape lay in."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.places = shape, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.places.add(result.untyped_storage().data_ptr())
        return result


def test_cross_entropy_has_one_chunk_of_logits_at_a_time(monkeypatch):
    for limit, n_rows in (("CHUNK_LOGITS", 8), ("GPU_CHUNK_LOGITS", 8), ("BLOCK_LOGITS", 1)):
        monkeypatch.setattr(kernels, limit, n_rows * 301)
    with ChunksOfLogits((8, 301)) as logits:
        loss_and_gradients(linear_cross_entropy, *head_inputs(40, 32, 301, False))
    assert len(logits.places) == 1


@pytest.mark.parametrize("bags", (False, True))
def test_cross_entropy_under_autocast(bags):
    """Products in bfloat16, the loss in float32, the gradients in the dtypes of the weights."""
    parts, targets = head_inputs(150, 32, 301, bags, dtype=torch.float32)
    exact = loss_and_gradients(plain_cross_entropy, [part.double() for part in parts], targets)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(linear_cross_entropy, parts, targets)
    assert all(found.dtype == torch.float32 for found in ours)
    assert abs(ours[0] / exact[0] - 1) < 2e-3
    for found, truth in zip(ours[1:], exact[1:], strict=True):
        assert 0 < (found - truth).norm() / truth.norm() < 2e-2


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_cross_entropy_of_extreme_logits(dtype):
    """Logits of 10^4 and -10^4: rows whose target is certain, impossible, or one of two equals."""
    low = float(torch.tensor(1e4).to(dtype))
    inputs = [torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, 1.0]]) * 1e4, torch.eye(2), torch.zeros(2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, d_hidden, d_weight, d_bias = loss_and_gradients(
            linear_cross_entropy, inputs, (torch.tensor([0, 1, 0]), None, None)
        )
    assert float(loss) == pytest.approx(2 * low + math.log(2))
    torch.testing.assert_close(d_hidden, torch.tensor([[0.0, 0.0], [1.0, -1.0], [-0.5, 0.5]]))
    torch.testing.assert_close(d_bias, torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(d_weight, torch.tensor([[0.5, -1.5], [-0.5, 1.5]]) * low)


# --------------------------------------------------------------------------------------------- norm, geglu


@pytest.mark.parametrize("d_model", (1, 7, 64))
def test_add_norm(d_model):
    torch.manual_seed(d_model)
    parts = [torch.randn(n, d_model, dtype=torch.float64) * 3 for n in (19, 19, 1)]
    directions = [torch.randn(19, d_model, dtype=torch.float64) for _ in range(2)]

    def plain(x, residual, weight):
        total = x + residual
        centred = total - total.mean(-1, keepdim=True)
        return total, centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    leaves, plain_leaves = ([as_leaf(part) for part in parts] for _ in range(2))
    found = add_norm(leaves[0], leaves[1], leaves[2][0], 1e-3)
    expected = plain(*plain_leaves)
    torch.autograd.backward(found, directions)
    torch.autograd.backward(expected, directions)
    for a, b in zip((*found, *leaves), (*expected, *plain_leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(leaves, plain_leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", (5, 1024))
def test_geglu(monkeypatch, block):
    """The first half is activated, by erf; the second is the gate."""
    monkeypatch.setattr(kernels, "BLOCK_TOKENS", block)
    torch.manual_seed(0)
    x = torch.randn(19, 2 * 33, dtype=torch.float64) * 3
    ours, plain, d_out = as_leaf(x), as_leaf(x), torch.randn(19, 33, dtype=torch.float64)
    found = geglu(ours)
    a, b = plain[:, :33], plain[:, 33:]
    expected = a * 0.5 * (1 + torch.erf(a / 2**0.5)) * b
    found.backward(d_out)
    expected.backward(d_out)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_norm_and_geglu_round_no_more_than_twice_plain_torch(dtype):
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(n, 64).to(dtype) for n in (300, 300, 1))
    total, normed = add_norm(x, residual, weight[0], 1e-5)
    exact_total = x.double() + residual.double()
    exact = F.layer_norm(exact_total, (64,), weight[0].double(), None, 1e-5)
    plain = F.layer_norm(x + residual, (64,), weight[0], None, 1e-5)
    assert error(total, exact_total) <= 2 * error(x + residual, exact_total)
    assert error(normed, exact) <= 2 * error(plain, exact)
    a, b = x.chunk(2, -1)
    exact = F.gelu(a.double()) * b.double()
    assert error(geglu(x), exact) <= 2 * error(F.gelu(a) * b, exact)
