"""The report of ahead-of-time compilation, for one GPU that is not here; and that what bench.py times is the
same work on both sides. Its figures are no tests."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import kernels.dispatch
from benchmarks import references
from data import Batch
from files.disk import UserError


@pytest.fixture
def compiling(tmp_path):
    """The environment of a process that compiles kernels: in this one they are for the interpreter."""
    if kernels.dispatch.triton is None:
        assert sys.platform != "linux", "pip install -r requirements-dev.txt brings Triton"
        pytest.skip("Triton is not to be had on this system: its kernels stay uncompiled here")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    folder = str(Path(bench.__file__).parent)
    return environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": folder}


def test_kernels_compile_without_spills_to_tensor_cores(compiling):
    command = [sys.executable, Path(bench.__file__), "--aot", "--targets", "sm_90", "--json"]
    rows = json.loads(subprocess.run(command, env=compiling, check=True, capture_output=True).stdout)["aot"]
    launched = re.findall(r"^ +_(\w+)\[", Path(kernels.__file__).read_text(), re.MULTILINE)
    assert {row["kernel"] for row in rows} == set(launched)
    for row in rows:
        assert row["registers"] > 0 and row["spills"] == 0, row
        if row["has_dot"] and row["dtype"] != "fp32":
            assert row["tensor_cores"].get("wgmma"), row


def test_kernels_take_numbers_in_float64(compiling):
    """As torch.compile passes them."""
    program = """
import aot, kernels
ahead_of_time.TYPES |= {"eps": "fp64", "sign": "fp64"}
table = ahead_of_time.kernel_table(ahead_of_time.DTYPES["bf16"], False)
ahead_of_time.kernel_table = lambda *_: [row for row in table if {"eps", "sign"} & set(row[0].arg_names)]
print(len(ahead_of_time.report(["sm_90"], lambda text: None)))
"""
    done = subprocess.run([sys.executable, "-c", program], env=compiling, capture_output=True, text=True)
    assert int(done.stdout) >= 2, done.stderr


def test_refuses_what_it_cannot_do(capsys):
    with pytest.raises(UserError, match="TRITON_INTERPRET"):
        bench.main(["--aot"])
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--aot", "--targets", "sm_1"])
    assert stopped.value.code == 2 and "sm_80" in capsys.readouterr().err


def test_products_are_counted_as_torch_counts_them():
    a, b, c = torch.randn(5, 7), torch.randn(7, 9), torch.randn(3, 4, 7)

    def step():
        torch.addmm(torch.randn(9), a, b)
        torch.baddbmm(torch.randn(3, 4, 9), c, b.expand(3, 7, 9))
        return c @ c.transpose(1, 2), a.T @ a

    with FlopCounterMode(display=False) as counted:
        step()
    seconds, flops = references.product_seconds(step)
    assert flops == counted.get_total_flops() and seconds > 0


def test_what_is_compared_computes_the_same():
    starts = torch.tensor([0, 20, 21, 50, 64], dtype=torch.int32)
    ids = torch.arange(64)
    bags = (torch.zeros(4, dtype=torch.long), torch.ones(4), torch.arange(5))
    batch = Batch(ids, starts, 29, torch.arange(10), ids[:10], *bags)
    place = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    for name, calls in references.operations(batch, bench.config_of("1x64"), place, compiles=False).items():
        for ours, plain in zip(calls["ours"](), calls["eager"](), strict=True):
            torch.testing.assert_close(
                ours, plain, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_a_peer_learns_from_the_same_tokens():
    starts, ids = torch.tensor([0, 3, 8], dtype=torch.int32), torch.arange(10, 18)
    bags = (torch.zeros(2, dtype=torch.long), torch.ones(2), torch.arange(3))
    batch = Batch(ids, starts, 5, torch.tensor([1, 6]), torch.tensor([77, 88]), *bags)
    x, mask, targets = references.padded(batch)
    assert x.tolist() == [[10, 11, 12, 0, 0], [13, 14, 15, 16, 17]]
    assert mask.sum(1).tolist() == [3, 5]
    assert targets.tolist() == [[-100, 77, -100, -100, -100], [-100, -100, -100, 88, -100]]
