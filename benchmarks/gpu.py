"""What only a GPU can decide, in about ten minutes: python bench.py --gpu.

No data are needed: the tokens are random, and the windows as long as those of text. bench.json is
written after each row, the most important parts first; what fails leaves its error there.

    tests       tests/test_triton.py, on the GPU in bfloat16 too
    machine     the rates of copying and of a large matrix multiplication, the limits of the rest
    step        training steps of a shape, ours and transformers'; shares of the peak (MFU)
    operations  each operation forward and backward, in a CUDA graph: milliseconds
    finetune    fine-tuning on texts as short as MR's and as long as IMDb's: milliseconds
    loss        after 200 steps with and without CUDA graphs
    profile     milliseconds of three steps by kinds of kernels
    layer       the matrix multiplications of a layer of base: TFLOP/s
"""

import contextlib
import functools
import gc
import io
import itertools
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import references
from benchmarks.steps import config_of, finetuning_step, model_flops, our_step, reference_step
from benchmarks.timing import Call, Hardware
from data import Batch
from files.disk import first_line, to_json, write_file
from files.machine import own_stream
from model import Classifier, Config, preset

# Dense bfloat16, in TFLOP/s, by a part of the GPU's name (NVIDIA's data sheets).
PEAK = {"A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250}
TOKENS = (8192, 32_768, 65_536)
WIDTHS = (256, 384, 768)
SHAPES = ("2x256", "6x384", "12x768")
MASK_RATE = 0.3
TEST_SECONDS = 180
KINDS = {
    "attention": "_flash",
    "add-norm": "_add_norm",
    "GeGLU": "_geglu",
    "vocabulary head": "_softmax_cross_entropy",
    "matrix multiplication": "gemm|nvjet|cutlass|xmma|splitk",
    "copies and casts": "copy|memcpy|memset|fill",
}

Rows = Iterator[tuple[str, Any]]  # names and results, each as soon as it is measured


def random_batches(config: Config, n_tokens: int, device: torch.device) -> Iterator[Batch]:
    """Endless batches of random tokens, eight different ones."""
    rng = np.random.default_rng(0)
    batches = []
    for i in range(8):
        lengths = rng.integers(54, config.max_len, n_tokens // 54)  # more than fill the batch
        ends = np.cumsum([0, *lengths])
        cu_seqlens = np.append(ends[ends < n_tokens], n_tokens).astype(np.int32)
        ids = torch.from_numpy(rng.integers(5, config.vocab_size, n_tokens))
        masked = torch.from_numpy(rng.permutation(n_tokens)[: int(MASK_RATE * n_tokens)])
        tensors = (ids, torch.from_numpy(cu_seqlens), config.max_len, masked, ids[masked])
        batches.append(Batch(*tensors, key=(0, 0, i, 0)).to(device))
    return itertools.cycle(batches)


def milliseconds(call: Call, n_calls: int = 10, n_rounds: int = 5) -> float:
    """The median time of a call of several that wait for each other but not for Python."""
    for _ in range(5):
        call()
    times = []
    for _ in range(n_rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n_calls):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / n_calls)
    return round(1e3 * statistics.median(times), 4)


def recorded_milliseconds(call: Call) -> float:
    """The same of ten calls in one CUDA graph. Where none can be recorded, a line says why, and the
    calls are launched one by one."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(10):
                call()
    except RuntimeError as error:
        print(f"no graph: {first_line(error.__context__ or error)}")
        return milliseconds(call)
    return round(milliseconds(graph.replay, n_calls=2) / 10, 4)


def attempt(measure: Callable[[], float], unit: str = "milliseconds") -> dict[str, Any]:
    """{unit: result} or the error, and what is printed, such as why no graphs are used."""
    torch.compiler.reset()  # its limit of variants counts those of all models together
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            row: dict[str, Any] = {unit: measure()}
        except Exception as error:  # the other rows are worth their minutes
            row = {"error": f"{type(error).__name__}: {error}"[:500]}
    return row | ({"printed": output.getvalue()} if output.getvalue() else {})


# ------------------------------------------------------------------------------------------- parts


def tests(hardware: Hardware) -> Rows:
    root = Path(__file__).parents[1]
    command = ["timeout", str(TEST_SECONDS), sys.executable, "-m", "pytest", "-q", "-rf"]
    command.append("tests/test_triton.py")
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    yield "exit code", done.returncode
    yield "output", (done.stdout + done.stderr)[-4000:]


def machine(hardware: Hardware) -> Rows:
    source = torch.empty(2**30, dtype=torch.uint8, device=hardware.device)
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, dtype=hardware.dtype, device=hardware.device)
    yield "TB/s", 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e9
    yield "TFLOP/s", 2 * 8192**3 / milliseconds(lambda: square @ square) / 1e9


def layer(hardware: Hardware) -> Rows:
    """The products of a layer, forward and backward, by T and the sizes of the map."""
    config = preset("base")
    maps = {"qkv": (768, 3 * 768), "out": (768, 768)}
    maps |= {"mlp in": (768, 2 * config.d_ff), "mlp out": (config.d_ff, 768)}
    for n_tokens, (name, (d_in, d_out)) in itertools.product(TOKENS, maps.items()):
        options = {"dtype": hardware.dtype, "device": hardware.device}
        x = torch.randn(n_tokens, d_in, **options)
        weight = torch.randn(d_out, d_in, **options)
        d_y = torch.randn(n_tokens, d_out, **options)
        products = {"forward": lambda x=x, w=weight: x @ w.T}
        products["backward, x"] = lambda d_y=d_y, w=weight: d_y @ w
        products["backward, weight"] = lambda d_y=d_y, x=x: d_y.T @ x
        for kind, product in products.items():
            rate = 2 * n_tokens * d_in * d_out / recorded_milliseconds(product) / 1e9
            yield f"{n_tokens} tokens, {name}, {kind}", round(rate)


def operations(hardware: Hardware) -> Rows:
    for width in WIDTHS:
        config = config_of(f"1x{width}")
        batch = next(random_batches(config, TOKENS[-1], hardware.device))
        for name, calls in references.operations(batch, config, hardware, compiles=True).items():
            for implementation, call in calls.items():
                measured = attempt(functools.partial(recorded_milliseconds, call))
                yield f"{name} {width}, {implementation}", measured


def steps(shape: str, hardware: Hardware) -> Rows:
    """Tokens per second; of ours the share of the GPU's peak too.

    ModernBERT is compiled for one number of tokens only, because that takes its time.
    """
    peaks = [peak for name, peak in PEAK.items() if name in hardware.name]
    config = config_of(shape)
    compiled_for = TOKENS[0] if shape == SHAPES[0] else TOKENS[-1]
    for n_tokens in (TOKENS[-1], TOKENS[0]):
        batches = random_batches(config, n_tokens, hardware.device)
        some = list(itertools.islice(batches, 8))
        flops = model_flops(config, some[0])
        ours = functools.partial(our_step, config, hardware, batches=batches)
        makers = {"ours, eager": ours, "ours, compiled": functools.partial(ours, compiled=True)}
        inputs = itertools.cycle([references.padded_inputs(batch) for batch in some])
        for name in ("modernbert", "bert"):
            arguments = (reference_step, name, config, "sdpa", hardware)
            makers[name] = functools.partial(*arguments, inputs=inputs)
        # after the others, because a recording that fails keeps its memory
        makers["ours, graphs"] = functools.partial(ours, uses_graphs=True)
        makers["ours, compiled, graphs"] = functools.partial(makers["ours, graphs"], compiled=True)
        if n_tokens == compiled_for:
            makers["modernbert, compiled"] = functools.partial(makers["modernbert"], compiled=True)

        for name, make in makers.items():
            row = attempt(lambda make=make: milliseconds(make(), n_calls=5, n_rounds=3))
            if "milliseconds" in row:
                row["tokens/s"] = round(1e3 * n_tokens / row["milliseconds"])
                if peaks and name.startswith("ours"):
                    row["MFU"] = round(flops / row["milliseconds"] / 1e9 / peaks[0], 3)
            yield f"{n_tokens} tokens, {name}", row


def kernel_times(hardware: Hardware) -> Rows:
    config = config_of(SHAPES[-1])
    step = our_step(config, hardware, batches=random_batches(config, TOKENS[-1], hardware.device))
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.is_user_annotation:
            continue
        kinds = [k for k, parts in KINDS.items() if re.search(parts, event.key.lower())]
        times[(kinds or ["other"])[0]] += event.self_device_time_total / 1e3
    yield from ((name, round(value, 2)) for name, value in times.items())


def loss(hardware: Hardware) -> Rows:
    def loss_after(seed: int, uses_graphs: bool) -> float:
        torch.manual_seed(seed)
        config = config_of(SHAPES[0])
        batches = random_batches(config, TOKENS[0], hardware.device)
        step = our_step(config, hardware, batches=batches, uses_graphs=uses_graphs)
        losses = [step() for _ in range(200)]
        return float(torch.stack(losses[-8:]).mean())

    for seed, uses_graphs in ((0, False), (1, False), (0, True)):
        name = f"seed {seed}, {'graphs' if uses_graphs else 'eager'}"
        yield name, attempt(functools.partial(loss_after, seed, uses_graphs), "loss")


def finetune(hardware: Hardware) -> Rows:
    """A step of 32 examples."""
    config = config_of(SHAPES[0], max_len=512)
    rng = np.random.default_rng(0)
    for name, (low, high) in {"as MR": (8, 60), "as IMDb": (80, 512)}.items():
        lengths = rng.integers(low, high, 2048)
        rows = [np.stack([rng.integers(5, 8000, n), np.zeros(n, int)], axis=1) for n in lengths]
        task = (rows, torch.from_numpy(rng.integers(0, 2, len(rows))), hardware)
        modernbert = references.build("modernbert", config, "sdpa", n_labels=2)
        calls = {
            "ours, graphs": finetuning_step(Classifier(config, 2), *task, uses_graphs=True),
            "ours": finetuning_step(Classifier(config, 2), *task),
            "modernbert": finetuning_step(modernbert, *task, pad_to=0),
        }
        for implementation, call in calls.items():
            measured = attempt(functools.partial(milliseconds, call, n_calls=64))
            yield f"{name}, {implementation}", measured


PARTS: dict[str, Callable[[Hardware], Rows]] = {
    "tests": tests,
    "machine": machine,
    "step 12x768": functools.partial(steps, "12x768"),
    "step 2x256": functools.partial(steps, "2x256"),
    "operations": operations,
    "finetune": finetune,
    "loss": loss,
    "profile": kernel_times,
    "layer": layer,
    "step 6x384": functools.partial(steps, "6x384"),
}


def measure(out: Path, hardware: Hardware, result: dict[str, Any]) -> None:
    """Add what each part yields to `result`, and write it to OUT/bench.json at once."""
    with own_stream(hardware.device):
        for part, measure_part in PARTS.items():
            start = time.perf_counter()
            rows = result[part] = {}
            try:
                for name, row in measure_part(hardware):
                    rows[name] = row
                    print(f"{part}, {name}: {row}", flush=True)
                    write_file(out / "bench.json", to_json(result))
            except Exception:
                rows["error"] = traceback.format_exc()
                print(rows["error"], flush=True)
            rows["seconds"] = round(time.perf_counter() - start)
            write_file(out / "bench.json", to_json(result))
