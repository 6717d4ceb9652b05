"""The Triton kernels, on a GPU or else in Triton's interpreter: values and gradients against the
references in float64, at most twice as far from them as the references in the same precision."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_kernels import (
    as_float32,
    as_leaf,
    attention_inputs,
    error,
    exact_loss_and_gradients,
    generator_of,
    head_inputs,
    loss_and_gradients,
    outputs_and_gradients,
    random_tensor,
    rope_float64,
    run_attention,
    run_reference,
)

from data import Batch
from kernels import attention, cross_entropy, dispatch, geglu, norm
from kernels.cross_entropy import linear_cross_entropy
from model import Block, Config, MaskedLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = [torch.float32, torch.float16]
SLACK = 0.1  # units in the last place beyond twice the error of the reference
if DEVICE == "cuda":
    PRECISIONS.append(torch.bfloat16)  # which the interpreter multiplies wrongly
    SLACK = 1  # a GPU's exp2 and its sums of products are a unit or two off


@pytest.fixture(autouse=True)
def force_triton(monkeypatch, request):
    if dispatch.triton is None:
        assert sys.platform != "linux", "pip install -r requirements-dev.txt brings Triton"
        pytest.skip("Triton does not exist for this system")
    monkeypatch.setattr(dispatch, "FORCED", "triton")
    is_compiled = "compiled" in request.node.name  # the compiler does not support a default device
    with contextlib.nullcontext() if is_compiled else torch.device(DEVICE):
        yield


def rms_error(x, exact):
    """Root mean square, because the largest error depends on the machine's BLAS."""
    return float((x.detach().double() - exact.detach()).square().mean().sqrt())


def assert_as_exact(ours, plain, exact):
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        slack = SLACK * torch.finfo(a.dtype).eps * float(truth.detach().square().mean().sqrt())
        assert rms_error(a, truth) <= 2 * rms_error(b, truth) + slack


def check_attention(qkv, d_out, lengths, rope, window, max_seqlen):
    exact = run_reference(qkv.double(), lengths, rope, window, d_out.double())
    plain = run_reference(qkv, lengths, as_float32(rope), window, d_out)
    ours = run_attention(qkv, lengths, as_float32(rope), window, max_seqlen, d_out)
    assert_as_exact(ours, plain, exact)


# the interpreter also computes rows beyond a sequence's end, which are not stored
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    "head_dim, window, is_rotated",
    ((32, 7, True), (64, None, True), (128, 1, False), (64, 40, True), (32, None, False)),
)
def test_attention(monkeypatch, dtype, head_dim, window, is_rotated):
    # small blocks, so that a sequence has several of each kind
    options = {"WIDTH": head_dim, "BLOCK": 16, "STEP": 32 if head_dim == 64 else 16}
    monkeypatch.setattr(attention, "flash_options", lambda *_: options)
    monkeypatch.setattr(attention, "ROTATE_BLOCK", 16)
    lengths = [1, 33, 2, 47, 16, 1, 0, 0]
    qkv, d_out = (x.to(dtype) for x in attention_inputs(lengths, head_dim, seed=head_dim))
    rope = rope_float64(48, head_dim) if is_rotated else None
    check_attention(qkv, d_out, lengths, rope, window, 48)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", PRECISIONS if DEVICE == "cuda" else [torch.float32])
@pytest.mark.parametrize("head_dim", (32, 64, 128) if DEVICE == "cuda" else (64,))
def test_attention_with_its_default_blocks(dtype, head_dim):
    lengths = [65, 3, 130]
    qkv, d_out = (x.to(dtype) for x in attention_inputs(lengths, head_dim, seed=0, n_heads=1))
    check_attention(qkv, d_out, lengths, rope_float64(130, head_dim), 30, 130)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_cross_entropy(monkeypatch, dtype):
    for name in ("CHUNK_LOGITS", "GPU_CHUNK_LOGITS"):
        monkeypatch.setattr(cross_entropy, name, 9 * 301)  # several chunks of rows
    monkeypatch.setattr(cross_entropy, "GPU_CHUNKS", 31)
    monkeypatch.setattr(cross_entropy, "ROW_BLOCK", 128)  # several, the last partial
    parts, targets = head_inputs(31, 32, 301, dtype=dtype)
    exact = exact_loss_and_gradients(parts, targets)
    plain = loss_and_gradients(cross_entropy.reference, parts, targets)
    ours = loss_and_gradients(linear_cross_entropy, parts, targets)
    assert ours[0].dtype == torch.float32
    # a sum over the rows: on a GPU, which draws other numbers, errors may cancel out in one of two
    slack = 1e-6 if DEVICE == "cpu" else max(1e-6, torch.finfo(dtype).eps)
    assert error(ours[0], exact[0]) <= 2 * error(plain[0], exact[0]) + slack * float(exact[0])
    assert_as_exact(ours[1:], plain[1:], exact[1:])
    with torch.no_grad():
        without_gradients = linear_cross_entropy(*map(as_leaf, parts), targets)
    # a GPU compiles another variant of the kernel
    tolerance = 0 if DEVICE == "cpu" else 1e-6
    torch.testing.assert_close(without_gradients, ours[0].detach(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", PRECISIONS)
# with one feature the gradient is 0, of which a GPU's fused multiply-add leaves only its rounding
@pytest.mark.parametrize("d_model", (1 if DEVICE == "cpu" else 6, 48, 64))
def test_add_norm(monkeypatch, dtype, d_model):
    monkeypatch.setattr(norm, "TILE", 256)  # several rows in a tile
    monkeypatch.setattr(norm, "_n_programs", lambda _: 2)  # and several tiles in a program
    generator = generator_of(d_model)
    x, residual, d_total, d_normed = random_tensor(4, 19, d_model, generator=generator).to(dtype)
    weight = random_tensor(d_model, generator=generator).to(dtype)

    def run(function, precision):
        inputs = [part.to(precision) for part in (3 * x, 3 * residual, weight)]
        return outputs_and_gradients(
            lambda *inputs: function(*inputs, 1e-3), inputs, [d_total, d_normed]
        )

    exact = run(norm.reference, torch.float64)
    assert_as_exact(run(norm.add_norm, dtype), run(norm.reference, dtype), exact)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_geglu(dtype):
    generator = generator_of(0)
    x = (3 * random_tensor(19, 2 * 70, generator=generator)).to(dtype)  # several tiles, in part
    d_out = (3 * random_tensor(19, 70, generator=generator)).to(dtype)
    exact = outputs_and_gradients(geglu.reference, [x.double()], [d_out])
    plain = outputs_and_gradients(geglu.reference, [x], [d_out])
    assert_as_exact(outputs_and_gradients(geglu.geglu, [x], [d_out]), plain, exact)


def batch_of_three_sequences():
    """Three sequences and an empty one."""
    return Batch(
        ids=torch.arange(3, 40),
        cu_seqlens=torch.tensor([0, 11, 12, 37, 37], dtype=torch.int32),
        max_seqlen=25,
        masked=torch.tensor([2, 5, 30, 33, 36]),
        targets=torch.tensor([40, 41, 7, 7, 9]),
        key=[0],
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_whole_model(monkeypatch):
    config = Config(
        vocab_size=64, d_model=64, n_layers=3, n_heads=2, d_ff=72, max_len=32, local_attention=8,
        global_attn_every_n_layers=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cpu"):  # where train.py makes it
        model = MaskedLM(config)
    model.to(DEVICE)
    batch = batch_of_three_sequences()

    def loss_and_gradients_of_the_model():
        model.zero_grad()
        loss, count = model(batch)["masked_lm"]
        assert count == 5
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    triton = loss_and_gradients_of_the_model()
    repeated = loss_and_gradients_of_the_model()
    monkeypatch.setattr(dispatch, "FORCED", "torch")
    plain = loss_and_gradients_of_the_model()
    assert all(map(torch.equal, triton, repeated))
    for a, b in zip(triton, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


KERNELS_OF_A_BLOCK = (
    "_flash_rotate", "_flash_forward", "_flash_d_q", "_flash_d_kv",
    "_add_norm", "_add_norm_backward", "_geglu", "_geglu_backward",
)  # fmt: skip

# Prints the names of the kernels in the compiled graphs, then how often a graph was compiled. Torch
# splits each into a forward and a backward pass, which fails if a kernel seems to change an input.
CAPTURE = """
import torch, torch.utils._triton, triton
from kernels.attention import rope_tables
from model import Block, Config
torch.utils._triton.has_triton = lambda: True  # without a GPU, launches are not traced otherwise
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

class Driver:  # of a GPU that is not here
    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        raise RuntimeError("a graph that was split is run")

triton.runtime.driver.set_active(Driver())
split = aot_autograd(
    fw_compiler=lambda module, _: module.forward,
    partition_fn=min_cut_rematerialization_partition,
)
names, compilations, problems = set(), [], set()

def backend(module, inputs):
    compilations.append(module)
    graphs = [part.graph for part in module.modules() if hasattr(part, "graph")]
    for node in (node for graph in graphs for node in graph.nodes if "kernel_idx" in node.kwargs):
        kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
        while hasattr(kernel, "fn"):
            kernel = kernel.fn
        names.add(kernel.__name__)
    return split(module, inputs)

block = torch.compile(Block(Config(100, 64, 1, 2, 96, 32), 1), backend=backend, fullgraph=True)
x, residual = torch.randn(2, 40, 64, requires_grad=True)
rope = rope_tables(32, 32, 1e4)
for n in (2, 3, 4, 5):
    cu_seqlens = torch.tensor([*range(n), 40], dtype=torch.int32)
    try:
        block(x, residual, cu_seqlens, 32 - n, rope, torch.nn.Identity())
    except RuntimeError as error:
        problems.add(str(error))
print(*names, *problems, f"compiled {len(compilations)} times", sep="\\n")
"""


def test_a_compiled_block_is_one_graph_that_contains_the_kernels():
    # in a process of its own, because what the interpreter runs is not what is compiled
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CLOZE_KERNELS": "triton", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", CAPTURE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert set(KERNELS_OF_A_BLOCK) <= set(lines), done.stderr
    assert "a graph that was split is run" in lines, lines
    # for the first batch, and once for all other numbers of sequences and maximum lengths
    assert "compiled 2 times" in lines


@pytest.mark.skipif(DEVICE == "cpu", reason="compiled kernels run on a GPU only")
def test_a_compiled_block_is_the_block():
    torch.manual_seed(0)
    block = Block(Config(100, 64, 1, 2, 96, 32), 1).to(DEVICE)
    x, residual = torch.randn(2, 40, 64, device=DEVICE)
    cu_seqlens = torch.tensor([0, 10, 40], dtype=torch.int32, device=DEVICE)
    rope = attention.rope_tables(32, 32, 1e4, DEVICE)
    compiled = torch.compile(block, fullgraph=True)

    def output_and_gradients(function):
        leaf = as_leaf(x)
        out = sum(function(leaf, residual, cu_seqlens, 32, rope, torch.nn.Identity()))
        return out, *torch.autograd.grad(out.square().sum(), [leaf, *block.parameters()])

    ours, plain = output_and_gradients(compiled), output_and_gradients(block)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
