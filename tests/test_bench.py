"""Kernels compile ahead of time, and both sides of each comparison of bench.py do the same work.

Nothing is timed here.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import bench
import kernels
import kernels.dispatch
from benchmarks import gpu, references, steps, timing
from data import Batch
from files.disk import UserError
from model import MaskedLM

CPU = timing.Hardware(torch.device("cpu"), torch.float32)


@pytest.fixture
def compile_kernels(tmp_path):
    """A function that runs ahead_of_time.report in a new process, after `setup`: its rows.

    In this process the kernels are those of Triton's interpreter.
    """
    if kernels.dispatch.triton is None:
        assert sys.platform != "linux", "pip install -r requirements-dev.txt brings Triton"
        pytest.skip("there is no Triton for this system")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(bench.__file__).parent),
    }

    def run(setup: str = "") -> list[dict]:
        program = f"""
import json, sys
from benchmarks import ahead_of_time
{setup}
print(json.dumps(ahead_of_time.report(["sm_90"])))
"""
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def kernel_names() -> set[str]:
    """The functions in kernels/ that are launched: jit functions that ask for their program id."""
    names = set()
    for path in Path(kernels.__path__[0]).glob("*.py"):
        for function in path.read_text().split("\n@jit\n")[1:]:
            if "tl.program_id" in function:
                names.add(re.match(r"def _?(\w+)\(", function)[1])
    return names


def test_kernels_compile_without_spills_to_tensor_cores(compile_kernels):
    rows = compile_kernels()
    assert {row["kernel"] for row in rows} == kernel_names()
    assert {row["dtype"] for row in rows} == {"bf16", "fp16", "fp32"}
    for row in rows:
        assert row["registers"] > 0 and row["spills"] == 0, row
        if row["has_dot"] and row["dtype"] != "fp32":
            products = [re.search(r"wgmma.*m64n(\d+)k", name) for name in row["tensor_cores"]]
            assert products and all(product and int(product[1]) >= 64 for product in products), row
        if row["kernel"].startswith(("add_norm", "geglu")):
            assert row["wide_loads"] > 0, row
        if row["kernel"] == "add_norm_backward":
            assert row["barriers"] == 0, row  # in the loop over its rows
    assert any(row["has_dot"] for row in rows)


def test_kernels_take_floats_in_float64(compile_kernels):
    """As torch.compile passes them."""
    setup = """
ahead_of_time.FLOAT_TYPE = "fp64"
ahead_of_time.DTYPES = {"bf16": ahead_of_time.DTYPES["bf16"]}
record_launches = ahead_of_time.record_launches
def launches_with_floats(*args, **kwargs):
    return [launch for launch in record_launches(*args, **kwargs) if "fp64" in launch[1].values()]
ahead_of_time.record_launches = launches_with_floats
"""
    assert len(compile_kernels(setup)) >= 2


def test_refuses_to_compile_for_the_interpreter(tmp_path):
    with pytest.raises(UserError, match="TRITON_INTERPRET"):
        bench.main(["--aot", "--out", str(tmp_path)])


@pytest.mark.parametrize("flag, value", [("--shape", "2x250"), ("--against", "x"), ("--parts", "")])
def test_refuses_unknown_values(flag, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.parse_args([flag, value])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"{Path(sys.argv[0]).name}: {flag}")


def test_flops_are_counted_as_torch_counts_them():
    a = torch.randn(5, 7)
    b = torch.randn(7, 9)
    c = torch.randn(3, 4, 7)

    def step():
        torch.addmm(torch.randn(9), a, b)
        torch.baddbmm(torch.randn(3, 4, 9), c, b.expand(3, 7, 9))
        return c @ c.transpose(1, 2), a.T @ a

    with FlopCounterMode(display=False) as counter:
        step()
    timer = timing.time_matmuls(step)
    assert timer.flops == counter.get_total_flops()
    assert timer.seconds > 0


@pytest.mark.parametrize("n_layers", (1, 3))
def test_model_flops_are_those_that_torch_counts(n_layers):
    """Sequences of equal length, because the CPU's attention pads the others."""
    config = steps.config_of(f"{n_layers}x64", vocab_size=300)
    cu_seqlens = torch.arange(0, 65, 16, dtype=torch.int32)
    ids = torch.arange(64)
    batch = Batch(ids, cu_seqlens, 16, masked=torch.arange(10), targets=ids[:10])
    model = MaskedLM(config)
    with FlopCounterMode(display=False) as counter:
        model(batch)["masked_lm"][0].backward()
    assert steps.model_flops(config, batch) == counter.get_total_flops()


def test_what_a_gpu_measures_runs(monkeypatch):
    """On the CPU, with small sizes, without graphs and compiler, and each call once."""
    monkeypatch.setenv("CLOZE_GRAPHS", "0")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(gpu, "TOKENS", (512, 512))
    monkeypatch.setattr(gpu, "SHAPES", ("1x64",))
    monkeypatch.setattr(gpu, "WIDTHS", (64,))
    monkeypatch.setattr(gpu, "recorded_milliseconds", lambda call: call() and 1.0)
    monkeypatch.setattr(gpu, "milliseconds", lambda call, **_: (call(), 1.0)[1])
    operations = dict(gpu.operations(CPU))
    names = {"attention 64", "head 64", "add_norm 64", "geglu 64"}
    assert {row.partition(",")[0] for row in operations} == names
    assert all(row == {"milliseconds": 1.0} for row in operations.values()), operations
    speeds = dict(gpu.steps("1x64", CPU))
    names = ("ours, eager", "ours, compiled, graphs", "bert", "modernbert, compiled")
    assert all(speeds[f"512 tokens, {name}"]["tokens/s"] == 512_000 for name in names), speeds
    names = ("ours", "ours, graphs", "modernbert")
    expected = {f"{data}, {name}" for data in ("as MR", "as IMDb") for name in names}
    assert dict(gpu.finetune(CPU)).keys() == expected
    monkeypatch.setattr(gpu, "TOKENS", (64, 64))
    assert dict(gpu.loss(CPU)).keys() == {"seed 0, eager", "seed 1, eager", "seed 0, graphs"}


def test_one_part_that_fails_costs_no_other(monkeypatch, tmp_path):

    def bad(hardware):
        yield "first", 1
        yield "second", 1 / 0

    parts = {"bad": bad, "good": lambda hardware: [("name", hardware.name)]}
    monkeypatch.setattr(gpu, "PARTS", parts)
    result = {}
    gpu.measure(tmp_path, CPU, result)
    assert result["bad"]["first"] == 1 and "ZeroDivisionError" in result["bad"]["error"]
    assert result["good"]["name"] == CPU.name
    assert json.loads((tmp_path / "bench.json").read_text()) == result


def test_both_sides_of_an_operation_compute_the_same():
    cu_seqlens = torch.tensor([0, 20, 21, 50, 64], dtype=torch.int32)
    ids = torch.arange(64)
    batch = Batch(ids, cu_seqlens, 29, masked=torch.arange(10), targets=ids[:10])
    operations = references.operations(batch, steps.config_of("1x64"), CPU, compiles=False)
    assert set(operations) == {"attention", "head", "add_norm", "geglu"}
    for calls in operations.values():
        for name in calls.keys() - {"ours"}:
            for ours, theirs in zip(calls["ours"](), calls[name](), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def small_batch() -> Batch:
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
    targets = torch.tensor([77, 88])
    return Batch(torch.arange(10, 18), cu_seqlens, 5, torch.tensor([1, 6]), targets)


def test_references_learn_from_the_same_tokens():
    inputs = references.padded_inputs(small_batch())
    assert inputs["input_ids"].tolist() == [[10, 11, 12, 0, 0], [13, 14, 15, 16, 17]]
    assert inputs["attention_mask"].sum(1).tolist() == [3, 5]
    assert inputs["labels"].tolist() == [[-100, 77, -100, -100, -100], [-100, -100, -100, 88, -100]]


def test_sparse_prediction_has_the_loss_and_gradients_of_all_logits():
    """ModernBERT of transformers computes logits for masked tokens only, with the same result."""
    torch.manual_seed(0)
    inputs = references.padded_inputs(small_batch())
    model = references.build("modernbert", steps.config_of("1x64"), "sdpa").eval()
    results = {}
    for is_sparse in (True, False):
        if not is_sparse:  # the default of bench.py comes first
            model.sparse_prediction = False
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        results[is_sparse] = (out.loss, *(p.grad.clone() for p in model.parameters()))
        n_tokens = 2 if is_sparse else 2 * 5
        assert out.logits.numel() == n_tokens * steps.VOCAB_SIZE
    for sparse, dense in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(sparse, dense)


def test_torch_encoder_has_the_loss_of_all_logits():
    torch.manual_seed(0)
    inputs = references.padded_inputs(small_batch())
    model = references.build("torch", steps.config_of("1x64"), "sdpa").train()
    x = model.words(inputs["input_ids"]) + model.positions.weight[:5]
    x = model.encoder(x, src_key_padding_mask=inputs["attention_mask"] == 0)
    dense = F.cross_entropy(model.decoder(x).flatten(0, 1), inputs["labels"].flatten())
    torch.testing.assert_close(model(**inputs).loss, dense)
