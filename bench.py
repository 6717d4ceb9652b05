"""Measure speed and memory: python bench.py. With --aot, compile the Triton kernels for other GPUs.

Both sides take turns. Ratios are ours over theirs: [minimum, median, maximum] of the rounds.

    step        the pretraining step against those of benchmarks/references.py
    memory      peak memory of that step at a large vocabulary
    operations  each fused operation of kernels/ against plain torch, forward and backward
    finetune    fine-tuning against padded batches

glibc returns freed tensors above 32 MB to the system, and the page faults of the next ones take
much of the reference implementations' time. Measure a second time with that memory kept:

    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
    python bench.py --out runs/bench-memory-kept
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import labels
from benchmarks import ahead_of_time, references, timing
from benchmarks.timing import Call, Hardware, Seconds, summarize
from data import Batch, Corpus
from files import disk
from files.cli import Parser, choose_hardware, number, run_script
from files.machine import compiler_problem
from files.token_cache import prepare
from model import Classifier, Config, MaskedLM, preset
from optim import make_optimizers

REFERENCES = {"hf": ("bert", "modernbert"), "torch": ("torch",)}
# The comparison is fixed, whatever the presets become.
VOCAB_SIZE = 8192
MASK_RATE = 0.22
MAX_LEN = 256
BATCH_TOKENS = 8192
GPU_TOKENS = 65_536  # of single operations on a GPU, where fewer take no longer than a launch
BATCH_SIZE = 32  # examples of a fine-tuning step


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("Measure speed and memory, or compile the kernels ahead of time.")
    add = parser.add_argument
    add("--against", default=",".join(REFERENCES), help="hf: BERT and ModernBERT of transformers")
    add("--shape", default="2x256,6x384", help="layers x d_model of the step, heads of 64")
    add("--parts", default=",".join(PARTS), help="what to measure")
    add("--rounds", type=number(int, 1), default=5, help="of each comparison, after a warm-up")
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


# ------------------------------------------------------------------------------------------- steps


def config_of(shape: str, vocab_size: int = VOCAB_SIZE, max_len: int = MAX_LEN) -> Config:
    """The config of a shape: layers x d_model."""
    n_layers, d_model = map(int, shape.split("x"))
    sizes = {"n_layers": n_layers, "d_model": d_model}
    return preset("tiny", vocab_size=vocab_size, max_len=max_len, **sizes)


@functools.cache
def open_corpus(n_tokens: int = BATCH_TOKENS) -> Corpus:
    return Corpus(prepare([], VOCAB_SIZE), MAX_LEN, n_tokens, seed=0)


def pretraining_batches(hardware: Hardware, n_tokens: int = BATCH_TOKENS) -> Iterator[Batch]:
    """Endless batches of the default corpus."""
    corpus = open_corpus(n_tokens)  # at once, and not with the first batch
    steps = itertools.count()
    return (corpus.batch(step, 0, 1, MASK_RATE).to(hardware.device) for step in steps)


def training_step(
    model: nn.Module, next_loss: Callable[[], Tensor], hardware: Hardware, optimizers: list = ()
) -> Call:
    """The training step that all share, by default with AdamW; `next_loss` makes the batch too."""
    optimizers = optimizers or [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)]
    model.train()

    def step() -> None:
        with hardware.autocast():
            loss = next_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def our_step(config: Config, hardware: Hardware, compiled: bool = False) -> Call:
    """The pretraining step of train.py, Muon included."""
    model = MaskedLM(config).to(hardware.device)
    for layer in model.model.layers if compiled else ():
        layer.compile()
    optimizers = make_optimizers(model, 1e-3, 1e-4, 1e-4, hardware.dtype)

    batches = pretraining_batches(hardware)

    def next_loss() -> Tensor:
        return sum(total / count for total, count in model(next(batches)).values())

    return training_step(model, next_loss, hardware, optimizers)


def reference_step(
    name: str, config: Config, attention: str, hardware: Hardware, compiled: bool = False
) -> Call:
    """The step of a reference implementation on the same batches, padded."""
    model = references.build(name, config, attention).to(hardware.device)
    if compiled:
        model.compile(dynamic=True)
    batches = pretraining_batches(hardware)

    def next_loss() -> Tensor:
        return model(**references.padded_inputs(next(batches))).loss

    return training_step(model, next_loss, hardware)


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
        steps = {"ours": our_step(config, hardware)}
        if args.compiles:
            steps["ours, compiled"] = our_step(config, hardware, compiled=True)
        best = list(steps)[-1]
        for name in itertools.chain.from_iterable(REFERENCES[key] for key in args.against):
            label, variant = fastest_reference(name, config, hardware)
            steps[label] = variant()
            if args.compiles and name != "torch":
                steps[f"{label}, compiled"] = variant(compiled=True)

        seconds = timing.alternate(steps, args.rounds)
        timing.show(f"step {shape}", seconds, BATCH_TOKENS, "tokens")
        matmuls = timing.time_matmuls(steps["ours"])
        speeds = {n: summarize([BATCH_TOKENS / s for s in seconds[n]]) for n in steps}
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
    batch = next(pretraining_batches(hardware, n_tokens))
    operations = references.operations(batch, config_of("2x256"), hardware, args.compiles)
    return {name: timing.alternate(calls, args.rounds) for name, calls in operations.items()}


def measure_operations(args: argparse.Namespace, hardware: Hardware) -> dict[str, dict]:
    """How many times as fast each fused operation is as plain torch."""
    operations = timing.run_in_new_process(operation_seconds, args, hardware)
    for name, seconds in operations.items():
        timing.show(name, seconds, 1, "calls")
    return {name: timing.ratios(seconds) for name, seconds in operations.items()}


def finetuning_step(
    model: nn.Module, rows: list, targets: Tensor, hardware: Hardware, pad_to: int | None = None
) -> Call:
    """A step of ours, or, with `pad_to`, of a model that takes batches of that length or more."""
    model.to(hardware.device)
    order = np.tile(np.arange(len(rows)), 1000)
    batches = labels.batches(rows, order, BATCH_SIZE, hardware.device)

    def next_loss() -> Tensor:
        indices, inputs = next(batches)
        if pad_to is None:
            logits = model(*inputs)[:BATCH_SIZE]
        else:
            ids = references.pad(*inputs[:2], at_least=pad_to)[:BATCH_SIZE]
            logits = model(input_ids=ids, attention_mask=ids != 0).logits
        return F.cross_entropy(logits, targets[indices].to(hardware.device))

    return training_step(model, next_loss, hardware)


def measure_finetuning(args: argparse.Namespace, hardware: Hardware) -> dict[str, dict]:
    """Our speed over that of ModernBERT of transformers, padded to the longest text or to 512."""
    config = config_of("2x256", max_len=512)
    result = {}
    for data in ("mr", "imdb"):
        examples = labels.load(data)[0][np.arange(64 * BATCH_SIZE)]
        rows, _ = labels.encode(examples, open_corpus().tokenizer, config.max_len)
        task = (rows, torch.from_numpy(examples.targets), hardware)
        steps = {"ours": finetuning_step(Classifier(config, 2), *task)}
        for name, pad_to in (("padded to the longest", 0), ("padded to 512", 512)):
            model = references.build("modernbert", config, "sdpa", n_labels=2)
            steps[name] = finetuning_step(model, *task, pad_to)
        seconds = timing.alternate(steps, args.rounds)
        timing.show(f"finetune {data}", seconds, BATCH_SIZE, "examples")
        result[data] = timing.ratios(seconds)
    return result


PARTS = {"step": measure_step, "memory": measure_memory}
PARTS |= {"operations": measure_operations, "finetune": measure_finetuning}


def main(argv: list[str] | None = None) -> dict:
    """Measure, and return what OUT/bench.json holds."""
    args = parse_args(argv)
    hardware = Hardware(*choose_hardware(args.device, args.dtype))
    disk.make_folder(args.out)
    result = {"hardware": hardware.name, "dtype": str(hardware.dtype).removeprefix("torch.")}
    result["malloc"] = {name: x for name, x in os.environ.items() if name.startswith("MALLOC_")}
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        print(f"{hardware.name}, {hardware.dtype}")
        if args.aot:
            result["aot"] = ahead_of_time.report()
        else:
            result["compiler_problem"] = compiler_problem(hardware.device)
            args.compiles = not result["compiler_problem"]
            result |= {part: PARTS[part](args, hardware) for part in args.parts}
    disk.write_file(args.out / "bench.json", disk.to_json(result))
    if args.json:
        print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_script(main)
