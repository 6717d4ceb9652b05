"""The Triton kernels, on a GPU or else under Triton's interpreter: values and every gradient against plain
torch in float64, at most twice as far from it as plain torch is at the same precision."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_kernels import (
    as_leaf,
    attention_inputs,
    both_attentions,
    error,
    head_inputs,
    loss_and_gradients,
    plain_cross_entropy,
    rope_double,
)

import kernels.attention
import kernels.dispatch
from data import Batch
from kernels.attention import rope_tables
from kernels.cross_entropy import linear_cross_entropy
from kernels.geglu import geglu
from kernels.norm import add_norm
from model import Block, Config, MaskedLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = [torch.float32, torch.float16]
SLACK = 0.1  # units in the last place beyond twice the error of plain torch
if DEVICE == "cuda":
    PRECISIONS.append(torch.bfloat16)  # which the interpreter multiplies wrongly
    SLACK = 1  # exp2 and sums of products of GPUs are a unit or two off


@pytest.fixture(autouse=True)
def use_triton(monkeypatch, request):
    if kernels.dispatch.triton is None:
        assert sys.platform != "linux", "pip install -r requirements-dev.txt brings Triton"
        pytest.skip("Triton is not to be had on this system: its kernels stay untested here")
    monkeypatch.setattr(kernels, "FORCED", "triton")
    is_compiled = "compiled" in request.node.name  # the compiler cannot see through a default device
    with contextlib.nullcontext() if is_compiled else torch.device(DEVICE):
        yield


def deviation(x, exact):
    """Root mean square: which rounding error is the greatest depends on the BLAS of the machine."""
    return float((x.detach().double() - exact.detach()).square().mean().sqrt())


def compare(found, plain, exact):
    for ours, other, truth in zip(found, plain, exact, strict=True):
        assert ours.dtype == other.dtype and ours.shape == other.shape
        slack = SLACK * torch.finfo(ours.dtype).eps * float(truth.detach().square().mean().sqrt())
        assert deviation(ours, truth) <= 2 * deviation(other, truth) + slack


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows behind a sequence's end, computed and not stored
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("head_dim, window, rotated", ((32, 7, True), (64, None, True), (128, 1, False),
                                                       (64, 40, True), (32, None, False)))  # fmt: skip
def test_attention(monkeypatch, dtype, head_dim, window, rotated):
    blocks = {"WIDTH": head_dim, "BLOCK": 16, "STEP": 32 if head_dim == 64 else 16}  # several of each
    monkeypatch.setattr(kernels, "flash_options", lambda *_: blocks)
    monkeypatch.setattr(kernels, "ROTATED", 16)
    lengths, n_positions = [1, 33, 2, 47, 16, 1, 0, 0], 48
    qkv, d_out = (x.to(dtype) for x in attention_inputs(lengths, head_dim, seed=head_dim))
    rope = rope_double(n_positions, head_dim) if rotated else None
    exact = both_attentions(qkv.double(), lengths, rope, window, n_positions, d_out.double())[1]
    low_rope = rope and tuple(table.float() for table in rope)
    compare(*both_attentions(qkv, lengths, low_rope, window, n_positions, d_out), exact)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", PRECISIONS if DEVICE == "cuda" else [torch.float32])
@pytest.mark.parametrize("head_dim", (32, 64, 128) if DEVICE == "cuda" else (64,))
def test_attention_in_its_own_blocks(dtype, head_dim):
    lengths = [65, 3, 130]
    qkv, d_out = (x.to(dtype) for x in attention_inputs(lengths, head_dim, seed=0, n_heads=1))
    rope = rope_double(130, head_dim)
    exact = both_attentions(qkv.double(), lengths, rope, 30, 130, d_out.double())[1]
    low_rope = tuple(table.float() for table in rope)
    compare(*both_attentions(qkv, lengths, low_rope, 30, 130, d_out), exact)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("bags", (False, True))
def test_cross_entropy(monkeypatch, dtype, bags):
    for name in ("CHUNK_LOGITS", "GPU_CHUNK_LOGITS"):
        monkeypatch.setattr(kernels, name, 9 * 301)  # several chunks of rows,
    monkeypatch.setattr(kernels, "ROW_BLOCK", 128)  # several blocks of a row, the last one cut,
    monkeypatch.setattr(kernels, "BAG_BLOCK", 4)  # and of a bag
    parts, targets = head_inputs(31, 32, 301, bags, dtype=dtype)
    exact = loss_and_gradients(plain_cross_entropy, [part.double() for part in parts], targets)
    plain = loss_and_gradients(plain_cross_entropy, parts, targets)
    ours = loss_and_gradients(linear_cross_entropy, parts, targets)
    assert ours[0].dtype == torch.float32
    compare(ours[1:], plain[1:], exact[1:])
    assert error(ours[0], exact[0]) <= 2 * error(plain[0], exact[0]) + 1e-6 * float(exact[0])
    with torch.no_grad():
        assert linear_cross_entropy(*map(as_leaf, parts), *targets) == ours[0]


@pytest.mark.parametrize("dtype", PRECISIONS)
# of width 1 the gradient is 0, and all that a GPU's fused multiply-add leaves of it is its rounding
@pytest.mark.parametrize("d_model", (1 if DEVICE == "cpu" else 6, 48, 64))
def test_add_norm(monkeypatch, dtype, d_model):
    monkeypatch.setattr(kernels, "NORM_STRIPS", 4)
    torch.manual_seed(d_model)
    parts = [(torch.randn(n, d_model) * 3).to(dtype) for n in (19, 19, 1)]
    directions = [torch.randn(19, d_model).to(dtype) for _ in range(2)]

    def results(function, precision):
        x, residual, weight = leaves = [as_leaf(part.to(precision)) for part in parts]
        found = function(x, residual, weight[0])
        torch.autograd.backward(found, [d.to(precision) for d in directions])
        return [*found, *(leaf.grad for leaf in leaves)]

    def plain(x, residual, weight):
        return (total := x + residual), F.layer_norm(total, weight.shape, weight, None, 1e-3)

    ours = results(lambda x, residual, weight: add_norm(x, residual, weight, 1e-3), dtype)
    compare(ours, results(plain, dtype), results(plain, torch.float64))


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_geglu(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "ROW_BLOCK", 32)
    torch.manual_seed(0)
    x, d_out = (torch.randn(19, n).mul(3).to(dtype) for n in (2 * 45, 45))

    def results(function, precision):
        leaf = as_leaf(x.to(precision))
        found = function(leaf)
        found.backward(d_out.to(precision))
        return found, leaf.grad

    def plain(x):
        return F.gelu(x[:, :45]) * x[:, 45:]

    compare(results(geglu, dtype), results(plain, dtype), results(plain, torch.float64))


def small_batch():
    """Three sequences and an empty one."""
    return Batch(
        ids=torch.arange(3, 40),
        cu_seqlens=torch.tensor([0, 11, 12, 37, 37], dtype=torch.int32),
        max_seqlen=25,
        masked=torch.tensor([2, 5, 30, 33, 36]),
        targets=torch.tensor([40, 41, 7, 7, 9]),
        bag_ids=torch.tensor([4, 5, 5, 60, 61, 8]),
        bag_weights=torch.tensor([0.5, 0.5, 1.0, 0.25, 0.75, 1.0]),
        cu_bags=torch.tensor([0, 2, 3, 5, 6]),
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_whole_model(monkeypatch):
    config = Config(vocab_size=64, d_model=64, n_layers=3, n_heads=2, d_ff=72, max_len=32,
                    local_attention=8, global_attn_every_n_layers=2)  # fmt: skip
    torch.manual_seed(0)
    model, batch = MaskedLM(config), small_batch()

    def results():
        model.zero_grad()
        losses = model(batch)
        (losses[0] + losses[1]).backward()
        return [*losses, *(parameter.grad.clone() for parameter in model.parameters())]

    ours, again = results(), results()
    monkeypatch.setattr(kernels, "FORCED", "torch")
    reference = results()
    assert all(map(torch.equal, ours, again))  # to the bit
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


CAPTURE = """
import contextlib, torch, torch.utils._triton, kernels
from model import Block, Config
torch.utils._triton.has_triton = lambda: True  # else launches are not understood where there is no GPU
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

found, times = set(), []

def backend(module, inputs):
    times.append(module)
    graphs = [part.graph for part in module.modules() if hasattr(part, "graph")]
    launches = [node.kwargs for graph in graphs for node in graph.nodes if "kernel_idx" in node.kwargs]
    for given in launches:
        kernel = kernel_side_table.get_kernel(given["kernel_idx"])
        while hasattr(kernel, "fn"):
            kernel = kernel.fn
        found.add(kernel.__name__)
    return module.forward

block = torch.compile(Block(Config(100, 64, 1, 2, 96, 32), 1), backend=backend, fullgraph=True)
x, rope = torch.randn(40, 64, requires_grad=True), kernels.attention.rope_tables(32, 32, 1e4)
for n in (2, 3, 4, 5):
    cu_seqlens = torch.tensor([*range(n), 40], dtype=torch.int32)
    with contextlib.suppress(RuntimeError, ValueError):  # the graph is whole; to run it would take a GPU
        block(x, cu_seqlens, 32 - n, rope, torch.nn.Identity())
print(*found, f"compiled {len(times)} times", sep="\\n")
"""


def test_a_compiler_sees_one_graph_with_the_kernels_of_a_block_in_it():
    # in a process of its own: what the interpreter runs is not what is compiled
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CLOZE_KERNELS": "triton", "PYTHONPATH": str(Path(kernels.__file__).parent)}
    command = [sys.executable, "-c", CAPTURE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    names = ("flash_rotate", "flash_forward", "flash_d_q", "flash_d_kv", "add_norm", "add_norm_backward")
    for name in (*names, "geglu", "geglu_backward"):
        assert f"_{name}" in done.stdout.split(), done.stderr
    # for the first batch, and once for all other numbers of sequences and longest ones
    assert "compiled 2 times" in done.stdout, done.stdout


@pytest.mark.skipif(DEVICE == "cpu", reason="what the compiler makes of the kernels takes a GPU to run")
def test_a_compiled_block_is_the_block():
    torch.manual_seed(0)
    block, x = Block(Config(100, 64, 1, 2, 96, 32), 1).to(DEVICE), torch.randn(40, 64, device=DEVICE)
    cu_seqlens = torch.tensor([0, 10, 40], dtype=torch.int32, device=DEVICE)
    rope = rope_tables(32, 32, 1e4, DEVICE)
    compiled = torch.compile(block, fullgraph=True)

    def results(function):
        leaf = as_leaf(x)
        out = function(leaf, cu_seqlens, 32, rope, torch.nn.Identity())
        return out, *torch.autograd.grad(out.square().sum(), [leaf, *block.parameters()])

    for a, b in zip(results(compiled), results(block), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
