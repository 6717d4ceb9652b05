"""What a compiler makes of the Triton kernels for GPUs that are not here: python bench.py --aot."""

import contextlib
import io
import os
import re
from typing import Any

import torch

import kernels.attention
import kernels.cross_entropy
import kernels.dispatch
import kernels.geglu
import kernels.norm
from files.disk import UserError
from model import PRESETS

# How GPUs are named to Triton: backend, architecture, threads of a warp.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Instructions of tensor cores, in the assembly of each kind of GPU.
TENSOR_CORES = {
    "mma": r"\bmma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mfma": r"v_mfma",
}
# Arguments of kernels by their type; all others point to numbers of the kernel's precision.
ARGUMENTS = {
    "i32": "n_tokens n_heads window vocab_size width d_ff n_rows rows_of_strip",
    "fp32": "eps sign",
    "*i32": "cu_seqlens",
    "*i64": "ids cu_bags",
    "*fp32": "cos sin lse delta bias bag_weights losses d_targets weight mean inverse_std strips "
    "residual total normed d_total d_normed d_sum",
}
TYPES = {name: kind for kind, names in ARGUMENTS.items() for name in names.split()}


def kernel_table(dtype: torch.dtype, on_hip: bool) -> list[tuple[Any, dict[str, Any], bool]]:
    """(kernel, its constants, whether it has a dot) of every kernel at the sizes of the presets."""
    attention = kernels.attention.flash_options(64, dtype, on_hip)  # the head size of all presets
    rows, bag = {"BLOCK": kernels.cross_entropy.ROW_BLOCK}, {"BAG": kernels.cross_entropy.BAG_BLOCK}
    table = [(kernels.attention._flash_rotate, {"HALF": 32, "BLOCK": kernels.attention.ROTATED}, False)]
    for window in ({"window": None}, {}):  # None is compiled in, a number is an argument
        for kernel in (kernels.attention._flash_forward, kernels.attention._flash_d_q, kernels.attention._flash_d_kv):
            table.append((kernel, attention | window, True))
    for wants_gradient in (False, True):
        table.append((kernels.cross_entropy._bag_softmax, rows | bag | {"WANTS_GRADIENT": wants_gradient}, False))
    for width in sorted({preset["d_model"] for preset in PRESETS.values()}):
        block = {"BLOCK": kernels.dispatch.triton.next_power_of_2(width)}
        table += [(kernels.norm._add_norm, block, False), (kernels.norm._add_norm_backward, block, False)]
    return [*table, (kernels.geglu._geglu, rows, False), (kernels.geglu._geglu_backward, rows, False)]


def compile_for(target: str, kernel: Any, constants: dict[str, Any], dtype_name: str) -> dict[str, Any]:
    """One row of the report: registers, bytes of shared memory, spills and instructions of tensor cores.

    Spills are bytes that ptxas stores and loads, or registers that AMD's compiler lists.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {key: constants[key] for key in ("num_stages",) if key in constants}
    constants = {key: value for key, value in constants.items() if key not in options}
    low = "*" + dtype_name
    types = {n: "constexpr" if n in constants else TYPES.get(n, low) for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(types) if types[n].startswith("*")}
    source = ASTSource(kernel, types, constants, aligned)
    with contextlib.redirect_stdout(io.StringIO()) as said:  # ptxas's own words
        compiled = kernels.dispatch.triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    assembly = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    if "ptx" in compiled.asm:
        registers = int(re.search(r"Used (\d+) registers", said.getvalue())[1])
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", said.getvalue())))
    else:
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        spills = sum(map(int, re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", assembly)))
    found = {name: len(re.findall(pattern, assembly)) for name, pattern in TENSOR_CORES.items()}
    row = {"kernel": kernel.fn.__name__.lstrip("_"), "target": target, "dtype": dtype_name}
    row |= {"constants": constants, "registers": registers, "shared": compiled.metadata.shared}
    return row | {"spills": spills, "tensor_cores": {name: n for name, n in found.items() if n}}


def report(targets: list[str], say) -> list[dict[str, Any]]:
    """Every kernel for every target and precision."""
    if kernels.dispatch.triton is None:
        raise UserError("--aot: Triton is not installed; on Linux, pip install triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("--aot: nothing is compiled where TRITON_INTERPRET=1 is set; unset it")
    knobs, rows = kernels.dispatch.triton.knobs, []
    knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = True, True  # no log of what is cached
    say(f"{'kernel':20}{'target':8}{'dtype':6}{'registers':>10}{'shared':>8}{'spills':>7}  tensor cores")
    for target in targets:
        for dtype_name, dtype in DTYPES.items():
            for kernel, constants, has_dot in kernel_table(dtype, TARGETS[target][0] == "hip"):
                row = compile_for(target, kernel, constants, dtype_name) | {"has_dot": has_dot}
                rows.append(row)
                used = " ".join(f"{name} {n}" for name, n in row["tensor_cores"].items())
                sizes = f"{row['registers']:10}{row['shared']:8}{row['spills']:7}"
                say(f"{row['kernel']:20}{target:8}{dtype_name:6}{sizes}  {used}")
    return rows
