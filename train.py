"""Pretrain: python train.py. Reads text, and leaves a model that finetune.py and transformers load.

Flags, then helper functions in the order of their use, then `main` with the training loop. On
several GPUs: torchrun --nproc-per-node 8 train.py --accumulate 8, which equals one GPU with the
same --accumulate.
"""

import argparse
import contextlib
import dataclasses
import math
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from data import Batch, Corpus
from files import hub_names, machine, model_folder, run_folder
from files.cli import Parser, choose_hardware, flags_to_json, number, run_script
from files.disk import UserError, to_json, write_file
from files.machine import MICRO_BATCH_TOKENS, STEPS, Ranks
from files.step_monitor import StepMonitor
from files.token_cache import prepare
from model import PRESETS, Config, MaskedLM, preset
from optim import make_optimizers, set_learning_rates

# The weight of each loss of MaskedLM.forward in the sum that is minimized.
LOSS_WEIGHTS = {"masked_lm": 1.0}

# Peak learning rates of a new model, and lower ones for a model that --model continues.
NEW_RATES = {"lr_muon": 0.02, "lr_adamw": 3e-3, "lr_embedding": 3e-3}
CONTINUED_RATES = {"lr_muon": 5e-4, "lr_adamw": 1e-4, "lr_embedding": 3e-5}
# Between these numbers of steps the embedding's learning rate grows with the steps: a short run
# cannot use the fast one, which pays in a long run.
SHORT_RUN = 500
LONG_RUN = 1500


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("Pretrain a transformer encoder by masked-language modelling.")
    add = parser.add_argument
    positive = number(int, 1)
    rate = number(float, 0)
    share = number(float, 0, 0.9)
    texts = ".txt, .jsonl, .csv, .tsv, .gz of each, folders of them, - for standard input"
    add("--corpus", nargs="+", default=[], metavar="PATH", help=f"{texts}; default: film reviews")
    add("--out", type=Path, default=Path("runs/pretrain"), help="folder of the run")
    add("--model", type=Path, help="continue this model, with its own tokenizer, on new text")
    add("--preset", choices=PRESETS, help="size of a new model; default tiny, for 2 CPU cores")
    add("--layers", type=number(int, 1, 1000), help="of a new model; default: the preset's")
    add("--d-model", type=number(int, 64), help="width of a new model, a multiple of 64")
    add("--family", choices=("modern", "bert"), help="of a new model; default modern: ModernBERT")
    add("--vocab-size", type=number(int, 100), help="default: the preset's, or what the text fills")
    add("--max-len", type=number(int, 8), help="tokens of a window; default: the preset's")
    fewer = f"default {STEPS}, fewer on a CPU without AMX; 0 saves the initialization"
    add("--steps", type=number(int, 0), help=fewer)
    at_once = f"tokens per micro-batch; default {MICRO_BATCH_TOKENS}, half of it for few steps"
    add("--micro-batch-tokens", type=number(int, 64), help=at_once)
    add("--accumulate", type=positive, help="micro-batches of a step; default: one per rank")
    continued = f"default {NEW_RATES}, slower for the embedding under {LONG_RUN} steps; with "
    continued += f"--model {CONTINUED_RATES}, since faster ones undo what it learned"
    add("--lr-muon", type=rate, help="peak learning rate of matrices; 0 gives them to AdamW")
    add("--lr-adamw", type=rate, help="peak learning rate of norms and biases")
    add("--lr-embedding", type=rate, help=f"of the embedding. Learning rates: {continued}")
    add("--warmup", type=share, default=0.05, help="share of the steps in which the rates rise")
    add("--clip", type=rate, default=1.0, help="maximum gradient norm; 0: no clipping")
    add("--mask-rate", type=share, default=0.3, help="share of tokens to mask: fewer teach less")
    masks = "whole words, rare ones more often, because frequent ones say less; or any token"
    add("--mask", choices=("rare", "even"), default="rare", help=masks)
    starts = "initial embedding: from co-occurrences, which saves a third of the steps; or random"
    add("--start", choices=("spectral", "random"), default="spectral", help=starts)
    add("--seed", type=number(int, 0), default=0, help="of the weights, the order and the masks")
    parser.add_device()
    parser.add_dtype()
    add("--compile", action="store_true", help="compile the blocks: a slower start, faster steps")
    add("--log-every", type=positive, default=20, help="steps between points of the curve")
    add("--validate-every", type=positive, default=200, help="steps between validations")
    add("--save-every", type=positive, default=200, help="steps between checkpoints")
    add("--keep", type=positive, default=2, help="last checkpoints to keep, beside the best one")
    best = "save the checkpoint with the best validation loss in place of the last weights"
    add("--keep-best", action="store_true", help=best)
    along = "models to save along the way, in OUT/snapshots; analyze.py draws a curve over them"
    add("--snapshots", type=number(int, 0), default=0, help=along)
    add("--resume", action="store_true", help="continue after the last checkpoint in --out")
    args = parser.parse_args(argv)

    of_a_new_model = (args.preset, args.layers, args.d_model, args.family, args.vocab_size)
    if args.model and any(of_a_new_model):
        flags = "--preset, --layers, --d-model, --family and --vocab-size"
        parser.error(f"{flags} are of a new model; --model brings its own")
    if args.d_model and args.d_model % 64:
        parser.error(f"--d-model {args.d_model}: it must be a multiple of 64")
    args.preset = args.preset or "tiny"
    if args.steps is None and args.preset not in STEPS:
        parser.error(f"--preset {args.preset} has no default number of steps: give --steps")
    return args


def set_defaults(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, ranks: Ranks
) -> None:
    """Fill in the flags whose default depends on the machine or on other flags."""
    args.dtype = str(dtype).removeprefix("torch.")
    if args.steps is None:
        args.steps, args.micro_batch_tokens, reason = machine.default_steps(
            args.preset, device, args.dtype, args.micro_batch_tokens
        )
        ranks.log(reason)
    args.micro_batch_tokens = args.micro_batch_tokens or MICRO_BATCH_TOKENS
    args.accumulate = args.accumulate or ranks.n
    if args.accumulate % ranks.n:
        multiple = f"it must be a multiple of the {ranks.n} ranks"
        raise UserError(f"--accumulate {args.accumulate}: {multiple}")

    rates = dict(CONTINUED_RATES if args.model else NEW_RATES)
    if not args.model:
        rates["lr_embedding"] *= min(1.0, max(SHORT_RUN, args.steps) / LONG_RUN)
    for name, default in rates.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def build_config(args: argparse.Namespace, initial: tuple | None) -> Config:
    """The shape of the model: that of --model, or the preset's, with --max-len."""
    if initial:
        config = initial[0]
        if not config.is_modern and (args.max_len or 0) > config.max_len:
            positions = f"{args.model} has {config.max_len} positions"
            raise UserError(f"--max-len {args.max_len}: {positions}")
        # learned positions keep their table; windows may be shorter
        max_len = args.max_len if config.is_modern else None
        return dataclasses.replace(config, max_len=max_len or config.max_len)
    fields = preset(args.preset, args.family or "modern", args.layers, args.d_model)
    fields["vocab_size"] = args.vocab_size or fields["vocab_size"]
    fields["max_len"] = args.max_len or fields["max_len"]
    return Config(**fields)


def load_corpus(
    args: argparse.Namespace, config: Config, initial: tuple | None, ranks: Ranks
) -> Corpus:
    """Tokenize the text on the first rank, and open it on all."""
    folder = None
    if ranks.is_first:
        tokenizer = initial[2] if initial else None
        folder = prepare(args.corpus, config.vocab_size, tokenizer)
    folder = ranks.from_first(folder)
    max_len = args.max_len or config.max_len
    return Corpus(folder, max_len, args.micro_batch_tokens, args.seed, args.mask)


def build_model(
    args: argparse.Namespace, config: Config, corpus: Corpus, initial: tuple | None, ranks: Ranks
) -> MaskedLM:
    """The model at step 0: that of --model, or a new one with a spectral embedding."""
    torch.manual_seed(args.seed)
    model = MaskedLM(dataclasses.replace(config, vocab_size=corpus.vocab_size))
    # a setting that could not be saved fails here, and not at the first checkpoint
    hub_names.config_to_json(model.config, model.task, corpus.special)
    if initial:
        # a classifier has no decoder, and a bare encoder no head
        missing = ("decoder.bias", "head", "pooler", *model.pretraining_only)
        model_folder.load_weights(model, initial[1], args.model, allow_missing=missing)
    elif args.start == "spectral":
        if ranks.is_first:  # computes it; the others read it from the cache
            corpus.spectral_embedding(config.d_model)
        ranks.from_first(None)
        vectors, occurs = corpus.initial_embedding(config.d_model, config.init_std, args.seed)
        model.model.embeddings.tok_embeddings.weight.data[occurs] = vectors[occurs]
    return model


def total_counts(batches: list[Batch]) -> dict[str, int]:
    """How many elements each loss sums over in all of the batches."""
    counts = dict.fromkeys(LOSS_WEIGHTS, 0)
    for batch in batches:
        for name, count in MaskedLM.loss_counts(batch).items():
            counts[name] += count
    return counts


def weighted_sum(losses: dict[str, Any]) -> Any:
    return sum(LOSS_WEIGHTS[name] * loss for name, loss in losses.items())


@torch.no_grad()
def validate(model: MaskedLM, batches: list[Batch], autocast) -> dict[str, float]:
    """Mean losses over the validation batches, and their weighted sum."""
    model.eval()
    sums = dict.fromkeys(LOSS_WEIGHTS, 0.0)
    counts = dict.fromkeys(LOSS_WEIGHTS, 0)
    for batch in batches:
        with autocast:
            losses = model(batch)
        for name, (total, count) in losses.items():
            sums[name] += float(total)
            counts[name] += count
    means = {name: sums[name] / counts[name] for name in sums}
    named = {f"validation_{name}": mean for name, mean in means.items()}
    model.train()
    return {"validation_loss": weighted_sum(means)} | named


def show_progress(bar: tqdm, point: dict[str, Any], n_tokens_left: int, ranks: Ranks) -> None:
    """Loss and speed beside the bar, or in a line of their own where there is none."""
    speed = point["tokens_per_second"]
    text = f"loss {point['loss']:.3f}, {speed:,.0f} tokens/s"
    bar.set_postfix_str(text)
    if bar.disable:
        ranks.log(f"step {point['step']}: {text}, {n_tokens_left / speed:.0f} s left")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Pretrain, and return what OUT/metrics.json holds."""
    start_time = time.time()
    args = parse_args(argv)
    device, dtype = choose_hardware(args.device, args.dtype)
    ranks = machine.join_ranks(device)
    with contextlib.ExitStack() as stack:
        if ranks.is_first:
            stack.enter_context(run_folder.lock(args.out, args.model))
        set_defaults(args, device, dtype, ranks)
        environment = run_folder.environment(device, ranks.n)
        record = {"flags": flags_to_json(args), "environment": environment}
        defaults = flags_to_json(parse_args([]))
        checkpoint, state = run_folder.find_checkpoint(args, record, defaults, ranks)

        initial = model_folder.load_model(args.model) if args.model else None
        config = build_config(args, initial)
        run_folder.check_memory(config, device)
        corpus = load_corpus(args, config, initial, ranks)
        validation = [batch.to(device) for batch in corpus.validation_batches()]
        model = build_model(args, config, corpus, initial, ranks).to(device)
        optimizers = make_optimizers(model, args.lr_muon, args.lr_adamw, args.lr_embedding, dtype)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        monitor = StepMonitor(has_scaler=scaler.is_enabled())
        record["data"] = corpus.folder.name
        n_weights = sum(p.numel() for p in model.parameters())
        step_tokens = args.accumulate * args.micro_batch_tokens

        # from here on the folder belongs to this run: what an earlier one left in it is removed
        training = (model, optimizers, scaler, monitor)
        first_step, points = run_folder.start_or_resume(
            args, checkpoint, state, record, training, ranks
        )
        if args.compile:
            machine.compile_blocks(model.model.layers, device, ranks.log)
        # DDP regroups gradients after its first step, which a resumed run has behind it
        rehearsal = corpus.batch(0, ranks.rank, ranks.n, args.mask_rate) if checkpoint else None
        parallel_model = ranks.wrap(model, rehearsal)
        ranks.log(f"{n_weights:,} weights on {device}, {args.dtype}; {step_tokens:,} tokens a step")

        progress = tqdm(total=args.steps, initial=first_step, unit="step", disable=ranks.hide_bar)
        signals = stack.enter_context(machine.collect_signals())
        clock_time = time.time()
        clock_step = first_step
        for step in range(first_step, args.steps):
            lr_factor = set_learning_rates(optimizers, step, args.steps, args.warmup)
            micros = range(ranks.rank, args.accumulate, ranks.n)
            batches = [corpus.batch(step, i, args.accumulate, args.mask_rate) for i in micros]

            # each loss is a sum divided by the count of the whole step, so that it makes no
            # difference how the step is split into micro-batches and ranks
            counts = ranks.sum(total_counts(batches), device)
            sums = dict.fromkeys(LOSS_WEIGHTS, 0.0)
            for i, batch in enumerate(batches):
                with ranks.gradient_sync(parallel_model, is_last=i + 1 == len(batches)):
                    with autocast:
                        losses = parallel_model(batch.to(device))
                        means = {n: total / counts[n] for n, (total, _) in losses.items()}
                    scaler.scale(weighted_sum(means) * ranks.n).backward()  # DDP averages
                for name, mean in means.items():
                    sums[name] += mean.detach()

            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            max_norm = args.clip or math.inf
            grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
            totals = ranks.sum(sums | {"signals": len(signals)}, device)  # ranks decide alike
            interrupted = totals.pop("signals") > 0
            loss = weighted_sum(totals)
            message = monitor.check(loss, grad_norm)
            if message:
                ranks.log(f"step {step + 1}: {message}")
            for optimizer in optimizers:
                if not monitor.skip:
                    scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()

            done = step + 1
            is_last = done == args.steps
            new_points = []
            progress.update()
            if done % args.log_every == 0 or is_last:
                speed = (done - clock_step) * step_tokens / (time.time() - clock_time)
                clock_time = time.time()
                clock_step = done
                point = {"step": done, "loss": loss, **totals, "skipped": monitor.n_skipped}
                point |= {"lr": lr_factor, "grad_norm": grad_norm, "tokens_per_second": speed}
                new_points.append(point)
                show_progress(progress, point, (args.steps - done) * step_tokens, ranks)
            is_snapshot = done * args.snapshots // args.steps > step * args.snapshots // args.steps
            if is_snapshot or done % args.validate_every == 0 or is_last:
                new_points.append({"step": done} | validate(model, validation, autocast))
                validation_loss = new_points[-1]["validation_loss"]
                ranks.log(f"step {done}: validation loss {validation_loss:.3f}")
            points += new_points

            must_save = interrupted or done % args.save_every == 0 or is_last
            gave_up = monitor.gave_up
            if gave_up:  # skipped steps changed no weight: save them if they still predict
                monitor.reset()
                validation_loss = validate(model, validation, autocast)["validation_loss"]
                must_save = math.isfinite(validation_loss)
            if ranks.is_first:
                run_folder.append_metrics(args.out, new_points)
                if must_save:
                    state = record | {"step": done}
                    run_folder.save_checkpoint(
                        args.out, training, corpus.tokenizer, state, args.keep, points
                    )
                if is_snapshot:
                    snapshot = args.out / "snapshots" / f"step-{done}"
                    model_folder.save_model(snapshot, model, corpus.tokenizer)
            if gave_up:
                advice = run_folder.how_to_continue(args.out)
                ranks.log(f"stopped after {monitor.patience} skipped steps in a row; {advice}")
                raise SystemExit(1)
            if interrupted:
                message = "the same command with --resume goes on"
                ranks.log(f"stopped after step {done}, saved; {message}")
                # the signal may have reached another rank
                raise SystemExit(128 + (signals[0] if signals else signal.SIGTERM))
        progress.close()

        if not args.steps:
            points.append({"step": 0} | validate(model, validation, autocast))
        metrics = {
            "seconds": time.time() - start_time,
            "steps": args.steps,
            "tokens": args.steps * step_tokens,
            "n_weights": n_weights,
            "device": str(device),
            "dtype": args.dtype,
            "tokens_folder": corpus.folder.name,
            **points[-1],
            "skipped": monitor.n_skipped,
            "spikes": monitor.n_spikes,
        }
        if ranks.is_first:
            if args.keep_best:
                metrics |= run_folder.load_best(args.out, model, points)
            model_folder.save_model(args.out, model, corpus.tokenizer)
            write_file(args.out / "metrics.json", to_json(metrics))
            from analysis import plots  # matplotlib takes a second to import

            plots.loss_curve(points, args.out / "curve.png")
        seconds = f"{metrics['seconds']:.0f} s"
        ranks.log(f"{args.out}: validation loss {metrics['validation_loss']:.3f} after {seconds}")
    return metrics


if __name__ == "__main__":
    run_script(main, "stopped; the same command with --resume goes on after the last saved step")
