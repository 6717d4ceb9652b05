"""Each fused operation against its reference in float64: values, gradients, precision, no leaks."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import attention, cross_entropy, geglu, norm
from kernels.cross_entropy import linear_cross_entropy


def error(x, exact):
    return float((x.detach().double() - exact.detach()).abs().max())


def as_leaf(x):
    return x.detach().clone().requires_grad_()


def generator_of(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def random_tensor(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def outputs_and_gradients(function, inputs, d_outputs):
    """The outputs of function(*inputs), then the gradients of those inputs that are leaves."""
    inputs = [as_leaf(x) for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    d_outputs = [d.to(out.dtype) for d, out in zip(d_outputs, outputs, strict=True)]
    torch.autograd.backward(outputs, d_outputs)
    return [*(out.detach() for out in outputs), *(x.grad for x in inputs)]


# ------------------------------------------------------------------------------------- attention


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def run_attention(qkv, lengths, rope, window, max_seqlen, d_out):
    """The output of `attention` and the gradient of qkv."""
    cu_seqlens = boundaries(lengths)
    return outputs_and_gradients(
        lambda x: attention.attention(x, cu_seqlens, max_seqlen, rope, window), [qkv], [d_out]
    )


def run_reference(qkv, lengths, rope, window, d_out):
    cu_seqlens = boundaries(lengths)
    return outputs_and_gradients(
        lambda x: attention.reference(x, cu_seqlens, rope, window), [qkv], [d_out]
    )


def attention_inputs(lengths, head_dim, seed, n_heads=2):
    generator = generator_of(seed)
    qkv = random_tensor(sum(lengths), 3, n_heads, head_dim, generator=generator)
    qkv[:, :2] *= 1.5  # peaked probabilities, so that a wrong key makes a large difference
    return qkv, random_tensor(sum(lengths), n_heads, head_dim, generator=generator)


def rope_float64(n_positions, head_dim):
    rope = attention.rope_tables(n_positions, head_dim, 100.0, torch.get_default_device())
    return tuple(table.double() for table in rope)


def as_float32(rope):
    return rope and tuple(table.float() for table in rope)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=8),
    n_empty=st.integers(0, 3),
    head_dim=st.sampled_from((32, 64, 128)),
    # negative windows count from the length of the longest sequence
    window=st.sampled_from((None, 0, 1, 5, 16, -3, -2, -1, 500)),
    is_rotated=st.booleans(),
    n_spare=st.sampled_from((0, 1, 40)),
    group_tokens=st.sampled_from((1, 100, 2048)),
    seed=st.integers(0, 99),
)
@example(
    lengths=[7, 3], n_empty=0, head_dim=32, window=-2, is_rotated=False, n_spare=0,
    group_tokens=2048, seed=0,
)  # fmt: skip
def test_attention_is_exact(
    lengths, n_empty, head_dim, window, is_rotated, n_spare, group_tokens, seed
):
    if window is not None and window < 0:
        window = max(0, max(lengths) + window)
    max_seqlen = max(lengths) + n_spare
    lengths = [*lengths, *([0] * n_empty)]
    qkv, d_out = attention_inputs(lengths, head_dim, seed)
    rope = rope_float64(max_seqlen, head_dim) if is_rotated else None
    with mock.patch.object(attention, "GROUP_TOKENS", group_tokens):
        ours = run_attention(qkv, lengths, rope, window, max_seqlen, d_out)
    exact = run_reference(qkv, lengths, rope, window, d_out)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_rotate_is_a_multiplication_of_complex_numbers():
    """The pairs (x_i, x_{i + D/2}) are complex numbers, multiplied by e^(i angle)."""
    x = random_tensor(2, 9, 8, generator=generator_of(0))
    position = torch.arange(9.0, dtype=torch.float64)
    angles = position[:, None] * 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    rope = (angles.cos(), angles.sin())
    product = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles)
    rotated = attention.rotate(x, rope)
    torch.testing.assert_close(rotated, torch.cat((product.real, product.imag), dim=-1))
    torch.testing.assert_close(attention.rotate(rotated, (rope[0], -rope[1])), x)
    for table, exact in zip(attention.rope_tables(9, 8, 100.0), rope, strict=True):
        torch.testing.assert_close(table.double(), exact, rtol=1e-6, atol=1e-6)
    torch.autograd.gradcheck(lambda x: attention.rotate(x, rope), as_leaf(x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("head_dim", (32, 64, 128))
@pytest.mark.parametrize("window", (None, 0, 7, 200))
@pytest.mark.parametrize("is_rotated", (False, True))
def test_attention_rounds_at_most_twice_as_much_as_torch(dtype, head_dim, window, is_rotated):
    lengths = [1, 33, 2, 90, 17, 1, 64, 0]
    qkv, d_out = (x.to(dtype) for x in attention_inputs(lengths, head_dim, seed=head_dim))
    rope = rope_float64(90, head_dim) if is_rotated else None
    exact = run_reference(qkv.double(), lengths, rope, window, d_out.double())
    plain = run_reference(qkv, lengths, as_float32(rope), window, d_out)
    ours = run_attention(qkv, lengths, as_float32(rope), window, 90, d_out)
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert a.dtype == dtype
        assert error(a, truth) <= 2 * error(b, truth) + torch.finfo(dtype).eps * 1e-2


@pytest.mark.parametrize("window", (None, 6))
def test_attention_of_a_sequence_does_not_depend_on_the_others(window):
    """All other tokens change; output and gradient of a sequence stay equal bit for bit."""
    lengths = [9, 40, 1, 37, 16]
    qkv = attention_inputs(lengths, 32, seed=0)[0].float()
    d_out = torch.ones_like(qkv[:, 0])
    rope = attention.rope_tables(40, 32, 100.0)
    out, d_qkv = run_attention(qkv, lengths, rope, window, 40, d_out)
    first = 0
    for length in lengths:
        is_own = torch.zeros(len(qkv), dtype=torch.bool)
        is_own[first : first + length] = True
        changed = torch.where(is_own[:, None, None, None], qkv, 3 * qkv.flip(0))
        new_out, new_d_qkv = run_attention(changed, lengths, rope, window, 40, d_out)
        assert torch.equal(out[is_own], new_out[is_own])
        assert torch.equal(d_qkv[is_own], new_d_qkv[is_own])
        assert not torch.equal(out[~is_own], new_out[~is_own])
        first += length


def test_attention_refuses_a_rope_that_is_too_short():
    qkv, _ = attention_inputs([9], 32, seed=0)
    with pytest.raises(ValueError, match="8 positions"):
        attention.attention(qkv, boundaries([9]), 9, rope_float64(8, 32))


# ------------------------------------------------------------------------------- vocabulary head


def head_inputs(n_rows, d_model, vocab_size, dtype=torch.float64):
    """(hidden, weight, bias) and the targets."""
    generator = generator_of(0)
    shapes = ((n_rows, d_model), (vocab_size, d_model), (vocab_size,))
    parts = [random_tensor(*shape, generator=generator).to(dtype) for shape in shapes]
    return parts, torch.randint(vocab_size, (n_rows,), generator=generator)


def loss_and_gradients(function, parts, targets, factor=1.0):
    d_loss = torch.tensor(factor, dtype=torch.float64)
    return outputs_and_gradients(lambda *inputs: function(*inputs, targets), parts, [d_loss])


def exact_loss_and_gradients(parts, targets, factor=1.0):
    parts = [part.double() for part in parts]
    return loss_and_gradients(cross_entropy.reference, parts, targets, factor)


@pytest.mark.parametrize("shape", ((1, 3, 1), (7, 5, 13), (64, 8, 101), (23, 16, 257)))
@pytest.mark.parametrize(
    "chunk, block", ((1, 1), (1500, 700), (2000, 1000), (2**22, 700), (2**22, 2**18))
)
def test_cross_entropy_is_exact(monkeypatch, shape, chunk, block):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(cross_entropy, "BLOCK_LOGITS", block)
    parts, targets = head_inputs(*shape)
    ours = loss_and_gradients(linear_cross_entropy, parts, targets, factor=0.3)
    exact = exact_loss_and_gradients(parts, targets, factor=0.3)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(*map(as_leaf, parts), targets), exact[0])


@pytest.mark.parametrize("chunk, block", ((1500, 700), (2**22, 2**18)))
def test_cross_entropy_rounds_at_most_twice_as_much_as_torch(monkeypatch, chunk, block):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(cross_entropy, "BLOCK_LOGITS", block)
    parts, targets = head_inputs(150, 32, 301, dtype=torch.float32)
    exact = exact_loss_and_gradients(parts, targets)
    ours = loss_and_gradients(linear_cross_entropy, parts, targets)
    plain = loss_and_gradients(cross_entropy.reference, parts, targets)
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert a.dtype == torch.float32
        assert error(a, truth) <= 2 * error(b, truth) + 1e-6 * float(truth.abs().max())


@pytest.mark.parametrize("scale", (1e-3, 30.0, 3e3))
def test_cross_entropy_of_any_size_of_logits(scale):
    """Where the probability of a target is 0 in float32, its logit still counts."""
    (hidden, weight, bias), targets = head_inputs(23, 16, 257, dtype=torch.float32)
    parts = (scale * hidden, weight, bias)
    ours = loss_and_gradients(linear_cross_entropy, parts, targets)
    for a, truth in zip(ours, exact_loss_and_gradients(parts, targets), strict=True):
        atol = 1e-5 * float(truth.abs().max())
        torch.testing.assert_close(a.double(), truth, rtol=1e-5, atol=atol)


class StorageOfShape(TorchDispatchMode):
    """Collects the addresses of all results of one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.addresses = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.addresses.add(result.untyped_storage().data_ptr())
        return result


def test_cross_entropy_has_one_chunk_of_logits_at_a_time(monkeypatch):
    for limit, n_rows in (("CHUNK_LOGITS", 8), ("GPU_CHUNK_LOGITS", 8), ("BLOCK_LOGITS", 1)):
        monkeypatch.setattr(cross_entropy, limit, n_rows * 301)
    monkeypatch.setattr(cross_entropy, "GPU_CHUNKS", 40)
    with StorageOfShape((8, 301)) as logits:
        loss_and_gradients(linear_cross_entropy, *head_inputs(40, 32, 301))
    assert len(logits.addresses) == 1


def test_cross_entropy_under_autocast():
    """Matrix multiplications in bfloat16, the loss in float32, the gradients in the weights'."""
    parts, targets = head_inputs(150, 32, 301, dtype=torch.float32)
    exact = exact_loss_and_gradients(parts, targets)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(linear_cross_entropy, parts, targets)
    assert all(a.dtype == torch.float32 for a in ours)
    assert abs(ours[0] / exact[0] - 1) < 2e-3
    for a, truth in zip(ours[1:], exact[1:], strict=True):
        assert 0 < (a - truth).norm() / truth.norm() < 2e-2


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_cross_entropy_of_extreme_logits(dtype):
    """Logits of 10^4 and -10^4: rows whose target is certain, impossible, or one of two equals."""
    low = float(torch.tensor(1e4).to(dtype))
    hidden = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, 1.0]]) * 1e4
    parts = [hidden, torch.eye(2), torch.zeros(2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, d_hidden, d_weight, d_bias = loss_and_gradients(
            linear_cross_entropy, parts, torch.tensor([0, 1, 0])
        )
    assert float(loss) == pytest.approx(2 * low + math.log(2))
    torch.testing.assert_close(d_hidden, torch.tensor([[0.0, 0.0], [1.0, -1.0], [-0.5, 0.5]]))
    torch.testing.assert_close(d_bias, torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(d_weight, torch.tensor([[0.5, -1.5], [-0.5, 1.5]]) * low)


# ---------------------------------------------------------------------------------- norm, geglu


@pytest.mark.parametrize("d_model", (1, 7, 64))
def test_add_norm(d_model):
    generator = generator_of(d_model)
    x, residual, d_total, d_normed = random_tensor(4, 19, d_model, generator=generator)
    weight = random_tensor(d_model, generator=generator)
    ours, exact = (
        outputs_and_gradients(
            lambda *inputs, function=function: function(*inputs, 1e-3),
            [3 * x, 3 * residual, weight],
            [d_total, d_normed],
        )
        for function in (norm.add_norm, norm.reference)
    )
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_geglu():
    generator = generator_of(0)
    x = 3 * random_tensor(19, 2 * 33, generator=generator)
    d_out = random_tensor(19, 33, generator=generator)
    ours = outputs_and_gradients(geglu.geglu, [x], [d_out])
    exact = outputs_and_gradients(geglu.reference, [x], [d_out])
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    a, b = x.chunk(2, dim=-1)
    torch.testing.assert_close(exact[0], F.gelu(a) * b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_norm_and_geglu_round_at_most_twice_as_much_as_the_reference(dtype):
    generator = generator_of(0)
    x, residual = random_tensor(2, 300, 64, generator=generator).to(dtype)
    weight = random_tensor(64, generator=generator).to(dtype)
    inputs = (x, residual, weight)
    ours = (*norm.add_norm(*inputs, 1e-5), geglu.geglu(x))
    plain = (*norm.reference(*inputs, 1e-5), geglu.reference(x))
    x, *_ = inputs = [part.double() for part in inputs]
    exact = (*norm.reference(*inputs, 1e-5), geglu.reference(x))
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert error(a, truth) <= 2 * error(b, truth)
