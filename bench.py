"""Measure: python bench.py. The speed and memory of the pretraining step against its peers and against the
machine's own limit, and, with --aot, what a compiler makes of the Triton kernels for GPUs that are not here.

Every comparison alternates in one run, and is a ratio: of speeds ours over theirs, of memory ours over
theirs, as [least, median, greatest]. Flags, then the parts in the order of the report, then `main`.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import aot
import checkpoint
import kernels
import labels
from checkpoint import number
from data import Batch, Corpus, prepare
from model import PRESETS, Classifier, Config, MaskedLM
from optim import make_optimizers
from text import UserError

PARTS = ("step", "memory", "operations", "finetune", "start")
# The comparison is fixed, whatever the presets become.
VOCAB_SIZE, MASKED, ROW_TOKENS, MAX_LEN = 8192, 0.22, 8192, 256
WIDE_VOCAB = 32_768  # of the comparison of memory
BATCH_SIZE = 32  # examples of a fine-tuning step


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = checkpoint.Flags("Measure speed and memory, or compile the kernels ahead of time.")
    add = flags.add_argument
    add("--against", default="hf,torch", help="peers of the step: hf is BERT and ModernBERT of transformers")
    add("--shape", default="2x256,6x384", help="layers x d_model of the step, with heads of 64")
    add("--parts", default=",".join(PARTS), help="what to measure")
    add("--rounds", type=number(int, 1), default=5, help="alternations of each comparison")
    add("--aot", action="store_true", help="instead compile every Triton kernel for GPUs that are not here")
    add("--targets", default=",".join(aot.TARGETS), help="of --aot")
    add("--json", action="store_true", help="print one object")
    add("--device", help="cuda, cuda:1, mps or cpu; by default the fastest that is there")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the bar chart and of bench.json")
    args = flags.parse_args(argv)
    for name, known in (("against", ("hf", "torch")), ("parts", PARTS), ("targets", tuple(aot.TARGETS))):
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
    for step in steps.values():
        for _ in range(warm_up):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: list[float]) -> list[float]:
    return [round(value, 3) for value in (min(values), statistics.median(values), max(values))]


def ratio(theirs: list[float], ours: list[float]) -> list[float]:
    """How many times as fast ours is, round by round."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


# --------------------------------------------------------------------------------------------- whole steps


def config_of(shape: str, vocab_size: int = VOCAB_SIZE) -> Config:
    n_layers, d_model = map(int, shape.split("x"))
    d_ff = -(-(8 * d_model // 3) // 64) * 64
    return Config(vocab_size, d_model, n_layers, d_model // 64, d_ff, MAX_LEN)


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


def our_step(corpus: Corpus, config: Config, place: SimpleNamespace) -> Callable[[], None]:
    """The whole step of the default recipe, batch making included."""
    torch.manual_seed(0)
    model, counter = MaskedLM(config).to(place.device), itertools.count()
    optimizers = make_optimizers(model, 1e-3, 1e-4, 0.0, place.dtype)

    def next_loss() -> Tensor:
        batch = corpus.batch(next(counter), 0, 1, MASKED).to(place.device)
        token_loss, bag_loss = model(batch)
        return token_loss / len(batch.targets) + bag_loss / (len(batch.cu_seqlens) - 1)

    return training_step(model, optimizers, place, next_loss)


def padded(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, labels) of a batch, (S, longest): what peers are given."""
    lengths, targets = batch.cu_seqlens.diff().tolist(), torch.full_like(batch.ids, -100)
    targets[batch.masked] = batch.targets
    parts = ((batch.ids, 0), (torch.ones_like(batch.ids), 0), (targets, -100))
    return tuple(pad_sequence(x.split(lengths), batch_first=True, padding_value=value) for x, value in parts)


class TorchEncoder(nn.Module):
    """The same task with torch's own nn.TransformerEncoder."""

    def __init__(self, config: Config):
        super().__init__()
        d_model = config.d_model
        self.words = nn.Embedding(config.vocab_size, d_model)
        self.positions = nn.Embedding(config.max_len, d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, config.n_heads, 4 * d_model, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.n_layers, enable_nested_tensor=False)
        self.decoder = nn.Linear(d_model, config.vocab_size)
        self.decoder.weight = self.words.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        x = self.words(input_ids) + self.positions.weight[: input_ids.shape[1]]
        logits = self.decoder(self.encoder(x, src_key_padding_mask=attention_mask == 0))
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()))


def peer_model(name: str, config: Config, attention: str, n_labels: int = 0) -> nn.Module:
    """A peer of the same shape: BERT or ModernBERT of transformers (a classifier, where there are labels), or
    torch's own encoder."""
    if name == "torch":
        return TorchEncoder(config)
    try:
        import transformers
    except ImportError:
        raise UserError(
            "--against hf: transformers is not installed; pip install -r requirements-dev.txt"
        ) from None
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.d_model, "attn_implementation": attention}
    sizes |= {"num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads, "pad_token_id": 0}
    if name == "bert":
        theirs = transformers.BertConfig(**sizes, intermediate_size=4 * config.d_model)
        return transformers.BertForMaskedLM(theirs)
    tokens = dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 1)
    if n_labels:
        sizes |= {"num_labels": n_labels, "classifier_pooling": "mean"}
    theirs = transformers.ModernBertConfig(
        **sizes, **tokens, intermediate_size=config.d_ff, global_attn_every_n_layers=1
    )
    kind = (
        transformers.ModernBertForSequenceClassification if n_labels else transformers.ModernBertForMaskedLM
    )
    return kind(theirs)


def peer_step(corpus: Corpus, model: nn.Module, place: SimpleNamespace) -> Callable[[], None]:
    """A peer's step on the same text, padded to the longest of the batch, with fused AdamW."""
    model, counter = model.to(place.device), itertools.count()

    def next_loss() -> Tensor:
        ids, mask, targets = padded(corpus.batch(next(counter), 0, 1, MASKED).to(place.device))
        return model(input_ids=ids, attention_mask=mask, labels=targets).loss

    return training_step(model, adamw(model), place, next_loss)


def measure_step(corpus: Corpus, shape: str, args: argparse.Namespace, place: SimpleNamespace, say) -> dict:
    """Ours against each peer in the better of its precisions and attentions, and against our own products."""
    config, contenders = config_of(shape), {"ours": our_step(corpus, config_of(shape), place)}
    names = [name for group in args.against for name in {"hf": ("bert", "modernbert")}.get(group, (group,))]
    for name in names:
        tried = {}
        for attention in ("eager", "sdpa") if name != "torch" else ("sdpa",):
            for dtype in (torch.float32, torch.bfloat16):
                there = SimpleNamespace(device=place.device, dtype=dtype)
                step = peer_step(corpus, peer_model(name, config, attention), there)
                seconds = min(alternate({name: step}, 2, warm_up=1)[name])
                tried[seconds] = f"{name}, {attention}, {str(dtype).removeprefix('torch.')}", step
        best, step = tried[min(tried)]
        contenders[best] = step
    seconds = alternate(contenders, args.rounds)
    speeds = {name: spread([ROW_TOKENS / s for s in found]) for name, found in seconds.items()}
    products = product_seconds(contenders["ours"])
    found = {"tokens_per_second": speeds, "matmul_share": spread([products / s for s in seconds["ours"]])}
    found["ratios"] = {name: ratio(s, seconds["ours"]) for name, s in seconds.items() if name != "ours"}
    for name, speed in speeds.items():
        against = "" if name == "ours" else f"  ours is {found['ratios'][name][1]:.2f} times as fast"
        say(f"{shape:8}{name:32}{speed[1]:10,.0f} tokens/s{against}")
    say(f"{shape:8}{'products alone':32}{found['matmul_share'][1]:10.2f} of our step")
    return found


class Products(TorchDispatchMode):
    """Counts the matrix products of what runs under it, by the shapes and strides of their factors."""

    NAMES = ("mm", "bmm", "addmm", "baddbmm")

    def __init__(self):
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket.__name__ in self.NAMES:
            factors = [x for x in args if isinstance(x, Tensor)][-2:]  # addmm and baddbmm add a tensor before
            self.found[tuple((x.shape, x.stride(), x.dtype, x.device) for x in factors)] += 1
        return operation(*args, **(kwargs or {}))


def product_seconds(step: Callable[[], None], repeats: int = 5) -> float:
    """Seconds that the matrix products of a step take by themselves, at its precision."""
    with Products() as products:
        step()
    total = 0.0
    for factors, count in products.found.items():
        a, b = (
            torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()
            for shape, stride, dtype, device in factors
        )
        total += count * min(alternate({"product": lambda a=a, b=b: a @ b}, repeats, warm_up=1)["product"])
    return total


# ------------------------------------------------------------------------------------------- other figures


def peak_memory(name: str, dtype: torch.dtype) -> int:
    """Bytes that three steps add at most to a fresh process, at the wide vocabulary."""
    config, place = config_of("2x256", WIDE_VOCAB), SimpleNamespace(device=torch.device("cpu"), dtype=dtype)
    corpus = open_corpus()
    if name == "ours":
        step = our_step(corpus, config, place)
    else:
        step = peer_step(corpus, peer_model(name, config, "sdpa"), place)
    unit = 1 if platform.system() == "Darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def measure_memory(place: SimpleNamespace, say) -> list[float]:
    """Ours over the lesser of the two of transformers."""
    found = {}
    for name in ("ours", "bert", "modernbert"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # memory of the past would count
            found[name] = pool.apply(peak_memory, (name, place.dtype))
        say(f"memory  {name:32}{found[name] / 2**20:10,.0f} MiB above the model, vocabulary {WIDE_VOCAB:,}")
    return spread([found["ours"] / min(found["bert"], found["modernbert"])])


def measure_operations(
    corpus: Corpus, rounds: int, place: SimpleNamespace, say
) -> dict[str, dict[str, list[float]]]:
    """Each fused operation, forward and backward, against plain torch, eager and compiled."""
    torch.manual_seed(0)
    batch, config = corpus.batch(0, 0, 1, MASKED).to(place.device), config_of("2x256")
    low, device = {"dtype": place.dtype, "device": place.device}, {"device": place.device}
    n, n_heads, head_dim = ROW_TOKENS, config.n_heads, config.head_dim
    longest, lengths = batch.max_seqlen, batch.cu_seqlens.diff().tolist()
    rope = kernels.rope_tables(longest, head_dim, 1e4, place.device)
    mask = pad_sequence(
        [torch.ones(length, dtype=torch.bool, **device) for length in lengths], batch_first=True
    )
    embedding, bias = torch.randn(VOCAB_SIZE, config.d_model, **device), torch.zeros(VOCAB_SIZE, **device)
    weight = torch.ones(config.d_model, **device)

    def plain_attention(qkv: Tensor) -> Tensor:
        q, k, v = pad_sequence(qkv.split(lengths), batch_first=True).permute(2, 0, 3, 1, 4)
        cos, sin = (torch.cat((table, table), -1)[: q.shape[-2]] for table in rope)
        halves = (torch.cat((-x[..., head_dim // 2 :], x[..., : head_dim // 2]), -1) for x in (q, k))
        q, k = ((x * cos + y * sin).to(v.dtype) for x, y in zip((q, k), halves, strict=True))
        return F.scaled_dot_product_attention(q, k, v, mask[:, None, None]).transpose(1, 2)[mask]

    def plain_head(hidden: Tensor, embedding: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, embedding, bias).float(), batch.targets, reduction="sum")

    def plain_norm(x: Tensor, residual: Tensor) -> Tensor:
        return F.layer_norm(x + residual, weight.shape, weight)

    operations = {
        "attention": (
            lambda qkv: kernels.attention(qkv, batch.cu_seqlens, longest, rope),
            plain_attention,
            [torch.randn(n, 3, n_heads, head_dim, **low)],
        ),
        "head": (
            lambda hidden, embedding: kernels.linear_cross_entropy(hidden, embedding, bias, batch.targets),
            plain_head,
            [torch.randn(len(batch.targets), config.d_model, **device), embedding],
        ),
        "add_norm": (
            lambda x, residual: kernels.add_norm(x, residual, weight, 1e-5)[1],
            plain_norm,
            [torch.randn(n, config.d_model, **low), torch.randn(n, config.d_model, **device)],
        ),
        "geglu": (
            kernels.geglu,
            lambda x: F.gelu(x[:, : config.d_ff]) * x[:, config.d_ff :],
            [torch.randn(n, 2 * config.d_ff, **low)],
        ),
    }
    found = {}
    for name, (ours, plain, inputs) in operations.items():
        contenders = {"ours": ours, "eager": plain, "compiled": torch.compile(plain)}

        def both_ways(function, inputs=inputs) -> None:
            leaves = [x.detach().requires_grad_() for x in inputs]
            with torch.autocast(place.device.type, place.dtype, enabled=place.dtype != torch.float32):
                out = function(*leaves)
            out.backward(out.detach())

        steps = {key: functools.partial(both_ways, function) for key, function in contenders.items()}
        try:
            seconds = alternate(steps, rounds)
        except Exception as error:  # no compiler on this machine: eager is what remains to compare with
            say(f"torch.compile: {str(error).splitlines()[0]}")
            del steps["compiled"]
            seconds = alternate(steps, rounds)
        found[name] = {key: ratio(s, seconds["ours"]) for key, s in seconds.items() if key != "ours"}
        times = ", ".join(f"{key} {1e3 * statistics.median(s):.1f} ms" for key, s in seconds.items())
        say(f"operation {name:12}{times}")
    return found


def measure_finetuning(
    data: str, corpus: Corpus, rounds: int, place: SimpleNamespace, say
) -> dict[str, list[float]]:
    """Examples a second of fine-tuning, unpadded against transformers' ModernBERT, padded."""
    examples, _ = labels.load(data)
    config = Config(**PRESETS["tiny"] | {"vocab_size": VOCAB_SIZE, "max_len": 512})
    rows, _ = labels.encode(examples[range(2000)], corpus.tokenizer, config.max_len)
    targets = torch.from_numpy(examples.targets)

    def make(model: nn.Module, logits_of: Callable) -> Callable[[], None]:
        counter = itertools.count()

        def next_loss() -> Tensor:
            first = next(counter) * BATCH_SIZE % (len(rows) - BATCH_SIZE)
            order = np.arange(first, first + BATCH_SIZE)
            which, *batch = next(labels.batches(rows, order, BATCH_SIZE))
            logits = logits_of(model, *batch)[:BATCH_SIZE]
            return F.cross_entropy(logits.float(), targets[which])

        return training_step(model, adamw(model), place, next_loss)

    def theirs(width: int | None) -> Callable:
        def logits_of(model: nn.Module, ids: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
            sequences = ids.split(cu_seqlens.diff().tolist())[:BATCH_SIZE]
            x = pad_sequence(sequences, batch_first=True)
            x = F.pad(x, (0, (width or x.shape[1]) - x.shape[1]))
            return model(input_ids=x, attention_mask=x != 0).logits

        return logits_of

    peer = functools.partial(peer_model, "modernbert", config, "sdpa", n_labels=2)
    steps = {"ours": make(Classifier(config, 2), lambda model, *batch: model(*batch))}
    steps |= {"longest": make(peer(), theirs(None)), "512": make(peer(), theirs(512))}
    seconds = alternate(steps, rounds)
    found = {name: ratio(s, seconds["ours"]) for name, s in seconds.items() if name != "ours"}
    for name, s in seconds.items():
        say(f"finetune {data:6}{name:25}{BATCH_SIZE / statistics.median(s):10,.0f} examples/s")
    return found


def first_step_seconds(rounds: int, out: Path, say) -> list[float]:
    """From the start of `python train.py` to its first step, the tokens and the spectral matrix cached."""
    found = []
    script = str(Path(__file__).with_name("train.py"))
    flags = ["--steps=2", "--log-every=1", "--validate-batches=1", f"--out={out}"]
    command = [sys.executable, "-u", script, *flags]
    for _ in range(rounds + 1):  # the first one fills the caches
        started = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            for line in process.stdout:
                if line.startswith("step 1:"):
                    found.append(time.perf_counter() - started)
    say(f"train.py to its first step {statistics.median(found[1:]):.1f} s")
    return spread(found[1:])


def open_corpus() -> Corpus:
    return Corpus(prepare([], VOCAB_SIZE), max_len=MAX_LEN, row_tokens=ROW_TOKENS, seed=0)


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar chart of tokens a second, a group a shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = result["steps"]
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(5 * len(shapes), 4), layout="constrained", squeeze=False
    )
    for axis, (shape, found) in zip(axes[0], shapes.items(), strict=True):
        names = list(found["tokens_per_second"])
        low, middle, high = zip(*found["tokens_per_second"].values(), strict=True)
        errors = [
            [m - x for m, x in zip(middle, low, strict=True)],
            [x - m for m, x in zip(middle, high, strict=True)],
        ]
        axis.barh(names, middle, xerr=errors)
        axis.set(title=f"{shape}, {result['dtype']}", xlabel="tokens a second")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, and return what OUT/bench.json says."""
    args = parse(argv)
    say = (lambda text: None) if args.json else functools.partial(print, flush=True)
    device, dtype = checkpoint.choose_hardware(args.device, "auto")
    place = SimpleNamespace(device=device, dtype=dtype)
    hardware = (
        f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    result: dict[str, Any] = {"hardware": hardware, "dtype": str(dtype).removeprefix("torch.")}
    say(f"{result['hardware']}, {result['dtype']}")
    checkpoint.make_folder(args.out)
    if args.aot:
        result["aot"] = aot.report(args.targets, say)
        args.parts = []
    corpus = open_corpus() if args.parts else None
    if "step" in args.parts:
        result["steps"] = {shape: measure_step(corpus, shape, args, place, say) for shape in args.shape}
        draw(result, args.out / "bench.png")
        for shape, name in (("2x256", "ratio_eager"), ("6x384", "ratio_6x384")):
            if shape in result["steps"] and "hf" in args.against:
                peers = [r for peer, r in result["steps"][shape]["ratios"].items() if peer[:5] != "torch"]
                result[name] = min(peers, key=lambda r: r[1])
        result["matmul_share"] = result["steps"][args.shape[0]]["matmul_share"]
    if "memory" in args.parts:
        result["peak_memory_ratio"] = measure_memory(place, say)
    if "operations" in args.parts:
        result["operations"] = measure_operations(corpus, args.rounds, place, say)
        result["head_ratio"] = result["operations"]["head"]["eager"]
    if "finetune" in args.parts:
        for data, suffix in (("mr", ""), ("imdb", "_imdb")):
            found = measure_finetuning(data, corpus, args.rounds, place, say)
            result |= {f"finetune_vs_{name}{suffix}": r for name, r in found.items()}
    if "start" in args.parts:
        result["first_step_seconds"] = first_step_seconds(args.rounds, args.out / "start", say)
    checkpoint.write(args.out / "bench.json", checkpoint.to_json(result))
    if args.json:
        print(json.dumps(result))
    return result


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
