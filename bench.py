"""Measure speed and memory: python bench.py. With --aot, compile the Triton kernels for other GPUs.

Both sides take turns. Ratios are ours over theirs: [minimum, median, maximum] of the rounds.

    step        the pretraining step against those of benchmarks/references.py
    memory      peak memory of that step at a large vocabulary
    operations  each fused operation of kernels/ against plain torch, forward and backward
    finetune    fine-tuning against padded batches
    launches    how many kernels a step launches on a GPU (benchmarks/launches.py), without one

glibc returns freed tensors above 32 MB to the system, and the page faults of the next ones take
much of the reference implementations' time. Measure a second time with that memory kept:

    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
    python bench.py --out runs/bench-memory-kept

On a GPU, python bench.py --gpu measures what benchmarks/gpu.py lists, without any data.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import labels
from benchmarks import ahead_of_time, gpu, references, steps, timing
from benchmarks.launches import count_launches
from benchmarks.steps import BATCH_SIZE, BATCH_TOKENS, config_of, our_step, reference_step
from benchmarks.timing import Hardware, Seconds, summarize
from files import disk
from files.cli import Parser, choose_hardware, number, run_script
from files.machine import compiler_problem
from model import PRESETS, Classifier, Config, preset

REFERENCES = {"hf": ("bert", "modernbert"), "torch": ("torch",)}
GPU_TOKENS = 65_536  # of single operations on a GPU, where fewer take no longer than a launch


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("Measure speed and memory, or compile the kernels ahead of time.")
    add = parser.add_argument
    add("--against", default=",".join(REFERENCES), help="hf: BERT and ModernBERT of transformers")
    add("--shape", default="2x256,6x384", help="layers x d_model of the step, heads of 64")
    add("--parts", default=",".join(PARTS), help="what to measure")
    add("--rounds", type=number(int, 1), default=5, help="of each comparison, after a warm-up")
    add("--gpu", action="store_true", help="measure what benchmarks/gpu.py lists instead")
    add("--aot", action="store_true", help="compile the kernels for A100 to MI300 instead")
    add("--json", action="store_true", help="print one JSON object, and the table on stderr")
    parser.add_device()
    parser.add_dtype()
    add("--out", type=Path, default=Path("runs/bench"), help="folder of bench.json and bench.png")
    args = parser.parse_args(argv)

    for flag in ("against", "shape", "parts"):
        setattr(args, flag, getattr(args, flag).split(","))
    for flag, choices in (("against", REFERENCES), ("parts", PARTS)):
        for value in set(getattr(args, flag)) - set(choices):
            parser.error(f"--{flag} {value}: choose from {','.join(choices)}")
    for shape in args.shape:
        if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", shape) or int(shape.split("x")[1]) % 64:
            parser.error(f"--shape {shape}: layers x a multiple of 64, such as 2x256")
    return args


def fastest_reference(name: str, config: Config, hardware: Hardware) -> tuple[str, Callable]:
    """Find the fastest attention and precision of a reference: a label, and what makes the step."""
    variants = {}
    dtypes = {torch.float32, hardware.dtype}  # emulated bfloat16 would take a minute per step
    attentions = ("sdpa",) if name == "torch" else ("eager", "sdpa")
    for attention, dtype in itertools.product(attentions, dtypes):
        settings = (name, config, attention, hardware._replace(dtype=dtype))
        step = reference_step(*settings)
        seconds = min(timing.seconds_of(step) for _ in range(3))
        label = f"{name}, {attention}, {dtype}".replace("torch.", "")
        variants[seconds] = (label, functools.partial(reference_step, *settings))
    return variants[min(variants)]


# ------------------------------------------------------------------------------------------- parts


def measure_step(args: argparse.Namespace, hardware: Hardware) -> dict:
    """Compare our step with the others, and with its matrix multiplications by themselves."""
    result = {}
    for shape in args.shape:
        config = config_of(shape)
        calls = {"ours": our_step(config, hardware)}
        if args.compiles:
            calls["ours, compiled"] = our_step(config, hardware, compiled=True)
        best = list(calls)[-1]
        for name in itertools.chain.from_iterable(REFERENCES[key] for key in args.against):
            label, variant = fastest_reference(name, config, hardware)
            calls[label] = variant()
            if args.compiles and name != "torch":
                calls[f"{label}, compiled"] = variant(compiled=True)

        seconds = timing.alternate(calls, args.rounds)
        timing.show(f"step {shape}", seconds, BATCH_TOKENS, "tokens")
        matmuls = timing.time_matmuls(calls["ours"])
        speeds = {n: summarize([BATCH_TOKENS / s for s in seconds[n]]) for n in calls}
        result[shape] = {
            "tokens_per_second": speeds,
            "ratios": {name: timing.ratios(seconds, name) for name in ("ours", best)},
            "matmul_share": summarize([matmuls.seconds / s for s in seconds[best]]),
            "matmul_tflops": summarize([matmuls.flops / s / 1e12 for s in seconds[best]]),
        }
        print("matrix multiplications by themselves / our time:", result[shape]["matmul_share"])
    return result


def added_bytes(name: str, hardware: Hardware) -> int:
    """By how much three steps raise the peak memory of this process."""
    config = config_of("2x256", vocab_size=32_768)
    is_ours = name == "ours"
    step = our_step(config, hardware) if is_ours else reference_step(name, config, "sdpa", hardware)
    before = timing.peak_bytes(hardware.device)
    for _ in range(3):
        step()
    return timing.peak_bytes(hardware.device) - before


def measure_memory(args: argparse.Namespace, hardware: Hardware) -> dict[str, float]:
    """Our peak memory over that of BERT and ModernBERT, at a large vocabulary."""
    peaks = {}
    for name in ("ours", *REFERENCES["hf"]):
        peaks[name] = timing.run_in_new_process(added_bytes, name, hardware)
        print(f"memory {name:12}{peaks[name] / 2**20:10,.0f} MiB above the model", flush=True)
    return {name: round(peaks["ours"] / peaks[name], 3) for name in REFERENCES["hf"]}


def operation_seconds(args: argparse.Namespace, hardware: Hardware) -> dict[str, Seconds]:
    """The seconds of each operation, forward and backward."""
    n_tokens = GPU_TOKENS if hardware.device.type == "cuda" else BATCH_TOKENS
    batch = next(steps.pretraining_batches(hardware, n_tokens))
    operations = references.operations(batch, config_of("2x256"), hardware, args.compiles)
    return {name: timing.alternate(calls, args.rounds) for name, calls in operations.items()}


def measure_operations(args: argparse.Namespace, hardware: Hardware) -> dict[str, dict]:
    """How many times as fast each fused operation is as plain torch."""
    operations = timing.run_in_new_process(operation_seconds, args, hardware)
    for name, seconds in operations.items():
        timing.show(name, seconds, 1, "calls")
    return {name: timing.ratios(seconds) for name, seconds in operations.items()}


def measure_finetuning(args: argparse.Namespace, hardware: Hardware) -> dict[str, dict]:
    """Our speed over that of ModernBERT of transformers, padded to the longest text or to 512."""
    config = config_of("2x256", max_len=512)
    result = {}
    for data in ("mr", "imdb"):
        examples = labels.load(data)[0][np.arange(64 * BATCH_SIZE)]
        rows, _ = labels.encode(examples, steps.open_corpus().tokenizer, config.max_len)
        task = (rows, torch.from_numpy(examples.targets), hardware)
        calls = {"ours": steps.finetuning_step(Classifier(config, 2), *task)}
        for name, pad_to in (("padded to the longest", 0), ("padded to 512", 512)):
            model = references.build("modernbert", config, "sdpa", n_labels=2)
            calls[name] = steps.finetuning_step(model, *task, pad_to)
        seconds = timing.alternate(calls, args.rounds)
        timing.show(f"finetune {data}", seconds, BATCH_SIZE, "examples")
        result[data] = timing.ratios(seconds)
    return result


def measure_launches(args: argparse.Namespace, hardware: Hardware) -> dict[str, dict[str, int]]:
    """What a step launches on a GPU, by preset; no GPU is needed."""
    result = {}
    for name in PRESETS:
        config = preset(name)
        batch = next(gpu.random_batches(config, BATCH_TOKENS, torch.device("cpu")))
        launches = count_launches(config, batch)
        result[name] = {part: counts.total() for part, counts in launches.items()}
        print(f"launches {name:10}{result[name]}", flush=True)
    return result


PARTS = {"step": measure_step, "memory": measure_memory, "operations": measure_operations}
PARTS |= {"finetune": measure_finetuning, "launches": measure_launches}


def main(argv: list[str] | None = None) -> dict:
    """Measure, and return what OUT/bench.json holds."""
    args = parse_args(argv)
    hardware = Hardware(*choose_hardware(args.device, args.dtype))
    disk.make_folder(args.out)
    result = {"hardware": hardware.name, "dtype": str(hardware.dtype).removeprefix("torch.")}
    result["malloc"] = {name: x for name, x in os.environ.items() if name.startswith("MALLOC_")}
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        print(f"{hardware.name}, {hardware.dtype}")
        if args.gpu:
            if hardware.device.type != "cuda":
                raise disk.UserError("--gpu: torch finds no GPU here")
            gpu.measure(args.out, hardware, result)
        elif args.aot:
            result["aot"] = ahead_of_time.report()
            disk.write_file(args.out / "bench.json", disk.to_json(result))
        else:
            result["compiler_problem"] = compiler_problem(hardware.device)
            args.compiles = not result["compiler_problem"]
            for part in args.parts:
                result[part] = PARTS[part](args, hardware)
                disk.write_file(args.out / "bench.json", disk.to_json(result))
    if args.json:
        print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_script(main)
