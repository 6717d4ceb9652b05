"""Measure: python bench.py. The speed and memory of the pretraining step against its peers (references.py) and the
machine's own limit, of each fused operation, of fine-tuning and of predicting; with --aot, what compilers
make of the Triton kernels for GPUs that are not here (ahead_of_time.py).

Every comparison alternates in one run, and is a ratio: of speeds ours over theirs, of memory ours over
theirs, as [least, median, greatest]. Flags, then the parts in the order of the report, then `main`.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import labels
import train
from benchmarks import ahead_of_time, references
from data import Corpus, prepare
from files import disk
from files.cli import Parser, choose_hardware, number, run_script
from model import Classifier, Config, MaskedLM, preset
from optim import make_optimizers

PARTS = ("step", "memory", "operations", "finetune", "predict", "start")
# The comparison is fixed, whatever the presets become.
VOCAB_SIZE, MASKED, ROW_TOKENS, MAX_LEN = 8192, 0.22, 8192, 256
WIDE_VOCAB = 32_768  # of the comparison of memory
GPU_TOKENS = 65_536  # of single operations on a GPU, where fewer take no longer than a launch
BATCH_SIZE = 32  # examples of a fine-tuning step
# bfloat16 products a second without sparsity, of the makers' data sheets (SXM and OAM boards).
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "MI300X": 1307e12}


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = Parser("Measure speed and memory, or compile the kernels ahead of time.")
    add = flags.add_argument
    add("--against", default="hf,torch", help="peers of the step: hf is BERT and ModernBERT of transformers")
    add("--shape", default="2x256,6x384", help="layers x d_model of the step, with heads of 64")
    add("--parts", default=",".join(PARTS), help="what to measure")
    add("--rounds", type=number(int, 1), default=5, help="alternations of each comparison")
    add("--aot", action="store_true", help="instead compile every Triton kernel for GPUs that are not here")
    add("--targets", default=",".join(ahead_of_time.TARGETS), help="of --aot")
    add("--json", action="store_true", help="print one object")
    flags.add_device()
    flags.add_dtype()
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the bar chart and of bench.json")
    args = flags.parse_args(argv)
    for name, known in (("against", ("hf", "torch")), ("parts", PARTS), ("targets", tuple(ahead_of_time.TARGETS))):
        setattr(args, name, getattr(args, name).split(","))
        for chosen in getattr(args, name):
            if chosen not in known:
                flags.error(f"--{name} {chosen}: choose from {','.join(known)}")
    args.shape = args.shape.split(",")
    for shape in args.shape:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape) or int(shape.split("x")[1]) % 64:
            flags.error(f"--shape {shape}: layers x d_model, such as 2x256, with d_model a multiple of 64")
    return args


# ------------------------------------------------------------------------------------------------- timing


def alternate(steps: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each step in each round; the steps take turns, so that they share the machine's moods."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warm_up + rounds):
        for name, step in steps.items():
            seconds[name].append(references.seconds_of(step))
    return {name: found[warm_up:] for name, found in seconds.items()}


def spread(values: list[float]) -> list[float]:
    return [round(value, 3) for value in (min(values), statistics.median(values), max(values))]


def ratio(theirs: list[float], ours: list[float]) -> list[float]:
    """How many times as fast ours is, round by round."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


# --------------------------------------------------------------------------------------------- whole steps


def config_of(shape: str, vocab_size: int = VOCAB_SIZE) -> Config:
    n_layers, d_model = map(int, shape.split("x"))
    row = preset("tiny", n_layers=n_layers, d_model=d_model)
    return Config(**row | {"vocab_size": vocab_size, "max_len": MAX_LEN})


def training_step(
    model: nn.Module, optimizers: list, place: SimpleNamespace, next_loss: Callable[[], Tensor]
) -> Callable[[], None]:
    """The step that ours, its peers and fine-tuning take alike; `next_loss` makes a batch and its loss."""
    model.train()

    def step() -> None:
        with torch.autocast(place.device.type, place.dtype, enabled=place.dtype != torch.float32):
            loss = next_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)]


def our_step(
    corpus: Corpus, config: Config, place: SimpleNamespace, compiled: bool = False
) -> Callable[[], None]:
    """The whole step with everything that train.py can do, batch making and pooled loss included."""
    torch.manual_seed(0)
    model, counter = MaskedLM(config).to(place.device), itertools.count()
    for layer in model.model.layers if compiled else ():
        layer.compile()
    optimizers = make_optimizers(model, (1e-3, 1e-4, 1e-4), 0.0, place.dtype)

    def next_loss() -> Tensor:
        batch = corpus.batch(next(counter), 0, 1, MASKED).to(place.device)
        token_loss, bag_loss = model(batch)
        return token_loss / len(batch.targets) + bag_loss / (len(batch.cu_seqlens) - 1)

    return training_step(model, optimizers, place, next_loss)


def peer_step(
    corpus: Corpus, name: str, config: Config, place: SimpleNamespace, attention: str, compiled: bool = False
) -> Callable[[], None]:
    """A peer's step on the same text, padded to the longest of the batch, with fused AdamW."""
    model, counter = references.build(name, config, attention).to(place.device), itertools.count()
    if compiled:
        model.compile(dynamic=True)

    def next_loss() -> Tensor:
        ids, mask, targets = references.padded(corpus.batch(next(counter), 0, 1, MASKED).to(place.device))
        return model(input_ids=ids, attention_mask=mask, labels=targets).loss

    return training_step(model, adamw(model), place, next_loss)


def best_of_peer(corpus: Corpus, name: str, config: Config, place: SimpleNamespace) -> tuple[str, dict]:
    """A peer in the better of its precisions and attentions: its full name, and what `peer_step` takes.
    Where the hardware does not multiply in bfloat16, that is not tried: emulated, a step takes a minute."""
    found = {}
    for attention in ("eager", "sdpa") if name != "torch" else ("sdpa",):
        for dtype in {torch.float32, place.dtype}:
            there = SimpleNamespace(device=place.device, dtype=dtype)
            given = {"name": name, "config": config, "place": there, "attention": attention}
            step = peer_step(corpus, **given)
            seconds = min(alternate({name: step}, 2, warm_up=1)[name])
            found[seconds] = f"{name}, {attention}, {str(dtype).removeprefix('torch.')}", given
    return found[min(found)]


def measure_step(
    corpus: Corpus, shape: str, compiles: bool, args: argparse.Namespace, place: SimpleNamespace, say
) -> dict[str, Any]:
    """Ours, eager and compiled, against each peer, eager and compiled, and against our own products."""
    config = config_of(shape)
    steps = {"ours": our_step(corpus, config, place)}
    if compiles:
        steps["ours, compiled"] = our_step(corpus, config, place, compiled=True)
    for name in args.against:
        for peer in ("bert", "modernbert") if name == "hf" else (name,):
            full_name, given = best_of_peer(corpus, peer, config, place)
            steps[full_name] = peer_step(corpus, **given)
            if compiles and name == "hf":
                steps[full_name + ", compiled"] = peer_step(corpus, **given, compiled=True)
    seconds, (products, flops) = alternate(steps, args.rounds), references.product_seconds(steps["ours"])
    speeds = {name: spread([ROW_TOKENS / x for x in s]) for name, s in seconds.items()}
    found: dict[str, Any] = {"tokens_per_second": speeds}
    best = "ours, compiled" if compiles else "ours"
    found["matmul_share"] = spread([products / s for s in seconds[best]])
    if place.device.type == "cuda":
        fastest = next((rate for gpu, rate in PEAKS.items() if gpu in args.hardware), math.nan)
        found["mfu"] = spread([flops / s / fastest for s in seconds[best]])

    def against_hf(ours: str, is_compiled: bool) -> list[float]:
        names = [n for n in seconds if n.startswith(("bert", "modern")) and ("compiled" in n) == is_compiled]
        return ratio(min((seconds[name] for name in names), key=statistics.median), seconds[ours])

    if "hf" in args.against:
        found |= {"ratio_eager": against_hf("ours", False), "ratio_compile": against_hf(best, False)}
        found |= {"ratio_both_compiled": against_hf(best, True)} if compiles else {}
    for name, speed in speeds.items():
        say(f"{shape:8}{name:36}{speed[1]:10,.0f} tokens/s")
    say(f"{shape:8}{'products alone':36}{found['matmul_share'][1]:10.2f} of the step of {best}")
    return found


# ------------------------------------------------------------------------------------------- other figures


def peak(device: torch.device) -> int:
    """Bytes in use at most so far, of the GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # of Linux, where ru_maxrss begins at what the parent process had
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory(name: str, place: SimpleNamespace) -> int:
    """Bytes that three steps add at most to a fresh process, at the wide vocabulary."""
    corpus, given = open_corpus(), (config_of("2x256", WIDE_VOCAB), place)
    step = our_step(corpus, *given) if name == "ours" else peer_step(corpus, name, *given, "sdpa")
    before = peak(place.device)
    for _ in range(3):
        step()
    return peak(place.device) - before


def in_fresh_process(measure: Callable, *given: Any) -> Any:
    """What it returns there: memory of the past would count, and a heap of the past has room for tensors that
    a program of their own would map, and fault in page by page, at every call."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, given)


def measure_memory(place: SimpleNamespace, say) -> list[float]:
    """Ours over the lesser of the two of transformers."""
    found = {}
    for name in ("ours", "bert", "modernbert"):
        found[name] = in_fresh_process(peak_memory, name, place)
        say(f"memory  {name:36}{found[name] / 2**20:10,.0f} MiB above the model, vocabulary {WIDE_VOCAB:,}")
    return spread([found["ours"] / min(found["bert"], found["modernbert"])])


def operation_seconds(
    compiles: bool, rounds: int, place: SimpleNamespace
) -> dict[str, dict[str, list[float]]]:
    """{operation: {"ours", "eager", "compiled": seconds of each round}}, forward and backward."""
    corpus = open_corpus(GPU_TOKENS if place.device.type == "cuda" else ROW_TOKENS)
    batch = corpus.batch(0, 0, 1, MASKED).to(place.device)
    operations = references.operations(batch, config_of("2x256"), place, compiles)
    return {name: alternate(steps, rounds) for name, steps in operations.items()}


def measure_operations(
    compiles: bool, rounds: int, place: SimpleNamespace, say
) -> dict[str, dict[str, list[float]]]:
    found = {}
    for name, seconds in in_fresh_process(operation_seconds, compiles, rounds, place).items():
        found[name] = {key: ratio(s, seconds["ours"]) for key, s in seconds.items() if key != "ours"}
        times = ", ".join(f"{key} {1e3 * statistics.median(s):.2f} ms" for key, s in seconds.items())
        say(f"operation {name:12}{times}")
    return found


def measure_finetuning(
    data: str, corpus: Corpus, rounds: int, place: SimpleNamespace, say
) -> dict[str, list[float]]:
    """Examples a second of fine-tuning, unpadded against transformers' ModernBERT, padded."""
    examples, _ = labels.load(data)
    config = Config(**preset("tiny") | {"vocab_size": VOCAB_SIZE, "max_len": 512})
    rows, _ = labels.encode(examples[range(2000)], corpus.tokenizer, config.max_len)
    targets = torch.from_numpy(examples.targets)

    def step_of(model: nn.Module, padded_to: int | None) -> Callable[[], None]:
        model, counter = model.to(place.device), itertools.count()

        def next_loss() -> Tensor:
            order = next(counter) * BATCH_SIZE % (len(rows) - BATCH_SIZE) + np.arange(BATCH_SIZE)
            which, inputs = next(labels.batches(rows, order, BATCH_SIZE, place.device))
            if padded_to is None:
                logits = model(*inputs)[:BATCH_SIZE]
            else:
                ids, cu_seqlens, *_ = inputs
                x = pad_sequence(ids.split(cu_seqlens.diff().tolist())[:BATCH_SIZE], batch_first=True)
                x = F.pad(x, (0, max(0, padded_to - x.shape[1])))
                logits = model(input_ids=x, attention_mask=x != 0).logits
            return F.cross_entropy(logits.float(), targets[which].to(place.device))

        return training_step(model, adamw(model), place, next_loss)

    peer = functools.partial(references.build, "modernbert", config, "sdpa", n_labels=2)
    steps = {"ours": step_of(Classifier(config, 2), None)}
    steps |= {"longest": step_of(peer(), 0), "512": step_of(peer(), 512)}
    seconds = alternate(steps, rounds)
    for name, s in seconds.items():
        say(f"finetune {data:6}{name:29}{BATCH_SIZE / statistics.median(s):10,.0f} examples/s")
    return {name: ratio(s, seconds["ours"]) for name, s in seconds.items() if name != "ours"}


def measure_predictions(corpus: Corpus, rounds: int, place: SimpleNamespace, say) -> dict[str, list[float]]:
    """Texts a second of predict.py against pipeline() of transformers, with the same weights."""
    texts = labels.load("mr")[1].texts
    with tempfile.TemporaryDirectory() as folder:
        seconds = alternate(references.predictions(Path(folder), texts, corpus.tokenizer, place), rounds)
    for name, s in seconds.items():
        say(f"predict mr     {name:29}{len(texts) / statistics.median(s):10,.0f} texts/s")
    return {name: ratio(s, seconds["ours"]) for name, s in seconds.items() if name != "ours"}


def first_step_seconds(rounds: int, out: Path, dtype: str, say) -> list[float]:
    """From the start of `python train.py` to its first step, the tokens and the spectral matrix cached."""
    found, script = [], str(Path(__file__).with_name("train.py"))
    flags = ["--steps=2", "--log-every=1", "--validate-batches=1", f"--out={out}", f"--dtype={dtype}"]
    for _ in range(rounds + 1):  # the first one fills the caches
        started = time.perf_counter()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        with subprocess.Popen([sys.executable, "-u", script, *flags], **pipes) as process:
            for line in process.stdout:
                if line.startswith("step 1:"):
                    found.append(time.perf_counter() - started)
    say(f"train.py to its first step {statistics.median(found[1:]):.1f} s")
    return spread(found[1:])


def open_corpus(row_tokens: int = ROW_TOKENS) -> Corpus:
    return Corpus(prepare([], VOCAB_SIZE), max_len=MAX_LEN, row_tokens=row_tokens, seed=0, with_bags=True)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, and return what OUT/bench.json says."""
    args = parse(argv)
    say = (lambda text: None) if args.json else functools.partial(print, flush=True)
    device, dtype = choose_hardware(args.device, args.dtype)
    place = SimpleNamespace(device=device, dtype=dtype)
    cpu = (
        f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    args.hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    result: dict[str, Any] = {"hardware": args.hardware, "dtype": str(dtype).removeprefix("torch.")}
    say(f"{args.hardware}, {result['dtype']}")
    disk.make_folder(args.out)
    if args.aot:
        result["aot"] = ahead_of_time.report(args.targets, say)
        args.parts = []
    corpus = open_corpus() if args.parts else None
    problem = train.no_compiler(device) if {"step", "operations"} & set(args.parts) else ""
    if problem:
        say(f"torch.compile: {problem}: eager alone is measured")
    if "step" in args.parts:
        result["steps"] = {
            shape: measure_step(corpus, shape, not problem, args, place, say) for shape in args.shape
        }
        from analysis import plots  # matplotlib takes a second to import

        plots.speeds(result, args.out / "bench.png")
        narrow, wide = (result["steps"].get(shape, {}) for shape in ("2x256", "6x384"))
        result |= {key: figure for key, figure in narrow.items() if key != "tokens_per_second"}
        result |= {"ratio_6x384": wide["ratio_eager"]} if "ratio_eager" in wide else {}
    if "memory" in args.parts:
        result["peak_memory_ratio"] = measure_memory(place, say)
    if "operations" in args.parts:
        result["operations"] = measure_operations(not problem, args.rounds, place, say)
        result["head_ratio"] = result["operations"]["head"]["eager"]
    if "finetune" in args.parts:
        for data, suffix in (("mr", ""), ("imdb", "_imdb")):
            found = measure_finetuning(data, corpus, args.rounds, place, say)
            result |= {f"finetune_vs_{name}{suffix}": r for name, r in found.items()}
    if "predict" in args.parts:
        found = measure_predictions(corpus, args.rounds, place, say)
        result |= {f"predict_vs_{name.replace(', ', '_')}": r for name, r in found.items()}
    if "start" in args.parts:
        result["first_step_seconds"] = first_step_seconds(args.rounds, args.out / "start", args.dtype, say)
    disk.write_file(args.out / "bench.json", disk.to_json(result))
    if args.json:
        print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_script(main)
