"""Compile the Triton kernels for GPUs that this machine does not have: python bench.py --aot.

A model runs forward and backward on the CPU while each launch of a kernel is recorded instead of
run. The kernels are then compiled for the recorded types of arguments.
"""

import contextlib
import functools
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import kernels.attention
import kernels.dispatch
from benchmarks.timing import Hardware
from data import Batch
from files.disk import UserError
from model import PRESETS, MaskedLM, preset

# The names of GPUs in Triton: backend, architecture, threads of a warp.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Triton's names of the types of arguments. A compiled model passes Python's floats as fp64.
TENSOR_TYPES = {dtype: f"*{name}" for name, dtype in DTYPES.items()}
TENSOR_TYPES |= {torch.int32: "*i32", torch.int64: "*i64"}
FLOAT_TYPE = "fp32"
LINE = "{kernel:24}{target:7}{dtype:5}{registers:5} registers{shared:7} shared{spills:3} spills"
LINE += "{barriers:4} barriers{wide_loads:4} wide loads  "
# Instructions of tensor cores: of NVIDIA's GPUs from old to new (Hopper's with the sizes of their
# product), and of AMD's.
TENSOR_CORES = r"mma\.sync|wgmma\.mma_async\.sync\.aligned\.m64n\d+k\d+|tcgen05\.mma|v_mfma"
BARRIER = r"bar\.sync|s_barrier"
WIDE_LOAD = r"ld\.global\S*\.v4\.b32|global_load_dwordx4"


def argument_type(value: Any) -> str:
    """Triton's name of the type of an argument; what is no tensor or number is compiled in."""
    if isinstance(value, Tensor):
        return TENSOR_TYPES[value.dtype]
    return {int: "i32", float: FLOAT_TYPE}.get(type(value), "constexpr")


def is_multiple_of_16(kind: str, value: Any) -> bool:
    return kind.startswith("*") or (kind == "i32" and value % 16 == 0)


def record_launches(dtype: torch.dtype, architecture: str) -> list[tuple]:
    """(kernel, types of arguments, constants, compiler options, indices of the arguments that are
    multiples of 16, as Triton specializes them) of each launch in a model.

    The model trains and predicts, at the widths of all presets; the smallest one as a BERT too.
    """
    launches: dict[str, tuple] = {}

    def record(kernel: Any, *args: Any, grid: tuple, warmup: bool, **keywords: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | keywords
        types = {
            p.name: "constexpr" if p.is_constexpr else argument_type(arguments[p.name])
            for p in kernel.params
        }
        constants = {n: x for n, x in arguments.items() if types.get(n) == "constexpr"}
        options = {n: x for n, x in keywords.items() if n not in types}
        # torch aligns the memory of tensors
        aligned = [
            i for i, name in enumerate(types) if is_multiple_of_16(types[name], arguments[name])
        ]
        key = f"{kernel.fn.__name__} {types} {constants} {options} {aligned}"
        launches[key] = (kernel, types, constants, options, aligned)

    flash_options = functools.partial(kernels.attention.flash_options, architecture=architecture)
    ids = torch.arange(64)
    cu_seqlens = torch.tensor([0, 24, 64], dtype=torch.int32)
    batch = Batch(ids, cu_seqlens, 40, masked=ids[:8], targets=ids[:8])
    with (
        mock.patch.object(kernels.dispatch.triton.JITFunction, "run", record),
        mock.patch.object(kernels.dispatch, "FORCED", "triton"),
        mock.patch.object(kernels.attention, "flash_options", flash_options),
        Hardware(torch.device("cpu"), dtype).autocast(),
    ):
        for name, family in (("tiny", "bert"), *((name, "modern") for name in PRESETS)):
            # one layer that sees everything and one with a window; the fewest words of a preset
            sizes = {"vocab_size": 8192, "n_layers": 2, "global_attn_every_n_layers": 2}
            model = MaskedLM(preset(name, family=family, **sizes))
            with torch.no_grad():
                model(batch)
            for total, _ in model(batch).values():
                total.backward()
    return list(launches.values())


def compile_launch(launch: tuple, target: str, dtype_name: str) -> dict[str, Any]:
    """Compile a kernel for a target, and return its row of the report.

    "spills" are bytes that ptxas stores and loads, or registers that AMD's compiler lists;
    "tensor_cores", "barriers" and "wide_loads", of 16 bytes, count instructions; "has_dot": the
    kernel multiplies matrices.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants, options, aligned = launch
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, types, constants, attributes)
    gpu = GPUTarget(*TARGETS[target])
    with contextlib.redirect_stdout(io.StringIO()) as output:  # of ptxas
        compiled = kernels.dispatch.triton.compile(source, gpu, options)
    if "ptx" in compiled.asm:
        assembly = compiled.asm["ptx"]
        registers = re.search(r"Used (\d+) registers", output.getvalue())
        spills = re.findall(r"(\d+) bytes spill", output.getvalue())
    else:
        assembly = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
        spills = re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", assembly)
    return {
        "kernel": kernel.fn.__name__.lstrip("_"),
        "target": target,
        "dtype": dtype_name,
        "registers": int(registers[1]),
        "shared": compiled.metadata.shared,
        "spills": sum(map(int, spills)),
        "tensor_cores": dict(Counter(re.findall(TENSOR_CORES, assembly))),
        "has_dot": "tt.dot" in compiled.asm["ttir"],
        "barriers": len(re.findall(BARRIER, assembly)),
        "wide_loads": len(re.findall(WIDE_LOAD, assembly)),
    }


def report(targets: Iterable[str] = tuple(TARGETS)) -> list[dict[str, Any]]:
    """Compile every kernel for every target and precision, and print a row for each."""
    triton = kernels.dispatch.triton
    if triton is None:
        raise UserError("--aot: Triton is not installed; on Linux, pip install triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("--aot: TRITON_INTERPRET=1 is set, so nothing is compiled; unset it")
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # a cached kernel has no log
    rows = []
    for target, (dtype_name, dtype) in itertools.product(targets, DTYPES.items()):
        architecture = "hip" if TARGETS[target][0] == "hip" else target
        for launch in record_launches(dtype, architecture):
            row = compile_launch(launch, target, dtype_name)
            rows.append(row)
            print(LINE.format(**row), *row["tensor_cores"].items(), flush=True)
    return rows
