"""The report of ahead-of-time compilation, for one GPU that is not here; its other figures are no tests."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bench
import kernels
from text import UserError


def test_kernels_compile_without_spills_to_tensor_cores(tmp_path):
    if kernels.triton is None:
        assert sys.platform != "linux", "pip install -r requirements-dev.txt brings Triton"
        pytest.skip("Triton is not to be had on this system: its kernels stay uncompiled here")
    # in a process of its own: in this one the kernels are for the interpreter
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, Path(bench.__file__), "--aot", "--targets", "sm_90", "--json"]
    rows = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)["aot"]
    launched = re.findall(r"wrap_triton\(_(\w+)\)", Path(kernels.__file__).read_text())
    assert {row["kernel"] for row in rows} == set(launched)
    for row in rows:
        assert row["registers"] > 0 and row["spills"] == 0, row
        if row["has_dot"] and row["dtype"] != "fp32":
            assert row["tensor_cores"].get("wgmma"), row


def test_refuses_what_it_cannot_do(capsys):
    with pytest.raises(UserError, match="TRITON_INTERPRET"):
        bench.main(["--aot"])
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--aot", "--targets", "sm_1"])
    assert stopped.value.code == 2 and "sm_80" in capsys.readouterr().err
