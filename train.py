"""Pretrain: python train.py. Reads text, and leaves a model that finetune.py and transformers load.

On several GPUs: torchrun --nproc-per-node 8 train.py --accumulate 8 (untried).
"""

import contextlib
import math
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.curve import make_recorder, require_tensorboard
from data import Batch, Corpus
from files import machine, model_folder, run_folder
from files.cli import Parser, choose_hardware, flags_to_json, number, run_script
from files.disk import UserError, to_json, write_file
from files.machine import MICRO_BATCH_TOKENS, STEPS, Ranks
from files.model_card import REVIEWS, describe_folder
from files.starting_point import build_config, build_model, load_corpus
from files.step_monitor import StepMonitor
from files.threads import compute_ahead
from files.tokenizer import TRAINERS
from kernels.graphs import Recorded, can_record
from model import PRESETS, MaskedLM
from optim import flatten_gradients, make_optimizers, set_learning_rates, update_weights

# The weight of each loss of MaskedLM.forward in the sum that is minimized.
LOSS_WEIGHTS = {"masked_lm": 1.0}

# Peak learning rates of a new model, and lower ones for a model that --model continues.
NEW_RATES = {"lr_muon": 0.02, "lr_adamw": 3e-3, "lr_embedding": 3e-3}
CONTINUED_RATES = {"lr_muon": 5e-4, "lr_adamw": 1e-4, "lr_embedding": 3e-5}
# Between these numbers of steps the embedding's learning rate grows with the steps: a short run
# cannot use the fast one, which pays in a long run.
SHORT_RUN = 500
LONG_RUN = 1500
WARMUP = 0.05  # share of the steps in which the learning rates rise


def parse_args(argv: list[str] | None) -> Namespace:
    parser = Parser("Pretrain a transformer encoder by masked-language modelling.")
    add = parser.add_argument
    positive = number(int, 1)
    rate = number(float, 0)
    parser.add_run(out="runs/pretrain")
    texts = ".txt, .md, .jsonl, .csv, .tsv, .parquet, .gz or .zst of text, folders of them, "
    texts += "hf:OWNER/NAME[:CONFIG][:SPLIT] of the hub, - for standard input"
    add("--corpus", nargs="+", default=[], metavar="PATH", help=f"{texts}; default: film reviews")
    add("--text-column", help="of tables; by default text; of interactions USER,ITEM,TIME")
    add("--min-count", type=positive, default=1, help="rarer items of sequences become [UNK]")
    add("--model", type=Path, help="continue this model, with its own tokenizer, on new text")
    add("--preset", choices=PRESETS, help="size of a new model; default tiny, for 2 CPU cores")
    add("--layers", type=number(int, 1, 1000), help="of a new model; default: the preset's")
    add("--d-model", type=number(int, 64, multiple_of=64), help="of a new model, a multiple of 64")
    add("--family", choices=("modern", "bert"), help="of a new model; default modern: ModernBERT")
    add("--vocab-size", type=number(int, 100), help="default: the preset's, or what the text fills")
    add("--tokenizer", help="of a new model: a folder, a file or a name on the hub, used as it is")
    kinds = "of a new tokenizer; default wordpiece; bpe: of bytes, to which nothing is unknown"
    add("--tokenizer-kind", choices=TRAINERS, help=kinds)
    add("--cased", action="store_true", help="a new tokenizer keeps capital letters")
    add("--max-len", type=number(int, 8), help="tokens of a window; default: the preset's")
    add("--steps", type=number(int, 0), help=f"default {STEPS}, fewer on slow CPUs; 0: initialize")
    add("--micro-batch-tokens", type=number(int, 64), help=f"default {MICRO_BATCH_TOKENS}")
    add("--accumulate", type=positive, help="micro-batches of a step; default: one per rank")
    add("--lr-muon", type=rate, help="peak learning rate of matrices; 0 gives them to AdamW")
    add("--lr-adamw", type=rate, help="peak learning rate of norms and biases")
    rates = f"of the embedding. Default rates: {NEW_RATES}; with --model {CONTINUED_RATES}"
    add("--lr-embedding", type=rate, help=rates)
    add("--dropout", type=number(float, 0, 0.9), default=0.0, help="for text that is read often")
    add("--mask-rate", type=number(float, 0, 0.9), default=0.3, help="fewer masks teach less")
    add("--mask", choices=("rare", "even"), default="rare", help="favour rare words, or all alike")
    starts = "initial embedding: from co-occurrences, which saves a third of the steps; or random"
    add("--start", choices=("spectral", "random"), default="spectral", help=starts)
    add("--compile", action="store_true", help="compile the blocks: a slower start, faster steps")
    add("--log-every", type=positive, default=20, help="steps between points of the curve")
    add("--save-every", type=positive, default=200, help="steps between validated checkpoints")
    add("--keep", type=positive, default=2, help="last checkpoints to keep, beside the best one")
    add("--keep-best", action="store_true", help="save the best checkpoint, not the last weights")
    add("--snapshots", type=number(int, 0), default=0, help="models to save in OUT/snapshots")
    add("--tensorboard", action="store_true", help="write event files into OUT/tensorboard too")
    args = parser.parse_args(argv)

    of_a_new_tokenizer = ("vocab_size", "tokenizer_kind", "cased")
    of_a_new_model = ("preset", "layers", "d_model", "family", "tokenizer", *of_a_new_tokenizer)
    refused = {"model": of_a_new_model, "tokenizer": of_a_new_tokenizer}
    for other, names in refused.items():
        for name in names:
            if getattr(args, other) and getattr(args, name):
                flag = f"--{name.replace('_', '-')}"
                parser.error(f"{flag} is of a new {other}; --{other} brings its own")
    args.preset = args.preset or (None if args.model else "tiny")
    if args.tensorboard:
        require_tensorboard()
    return args


def set_defaults(args: Namespace, device: torch.device, dtype: torch.dtype, ranks: Ranks) -> None:
    """Fill in the flags whose default depends on the machine or on other flags."""
    args.dtype = str(dtype).removeprefix("torch.")
    if args.steps is None:
        ranks.log(machine.set_steps(args, device))
    args.micro_batch_tokens = args.micro_batch_tokens or MICRO_BATCH_TOKENS
    args.accumulate = args.accumulate or ranks.n
    if args.accumulate % ranks.n:
        raise UserError(f"--accumulate {args.accumulate}: not a multiple of the {ranks.n} ranks")

    rates = dict(CONTINUED_RATES if args.model else NEW_RATES)
    if not args.model:
        rates["lr_embedding"] *= min(1.0, max(SHORT_RUN, args.steps) / LONG_RUN)
    for name, default in rates.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def load_step(corpus: Corpus, args: Namespace, ranks: Ranks, step: int) -> list[Batch]:
    """The micro-batches of a step that belong to this rank."""
    micros = range(ranks.rank, args.accumulate, ranks.n)
    return [corpus.batch(step, micro, args.accumulate, args.mask_rate) for micro in micros]


def total_counts(batches: list[Batch]) -> dict[str, int]:
    """How many elements each loss sums over in all of the batches."""
    return {name: sum(MaskedLM.loss_counts(b)[name] for b in batches) for name in LOSS_WEIGHTS}


def weighted_sum(losses: dict[str, Any]) -> Any:
    return sum(LOSS_WEIGHTS[name] * loss for name, loss in losses.items())


def add_gradients(
    model: MaskedLM, autocast: torch.autocast, scaler: Any, batch: Batch, counts: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Add the gradients of a micro-batch to those of the others, and return its losses.

    Each loss is a sum divided by the count of the whole step, so that it makes no difference how
    the step is split into micro-batches and ranks.
    """
    with autocast:
        sums = model(batch)
        losses = {name: total / counts[name].clamp(min=1) for name, (total, _) in sums.items()}
    scaler.scale(weighted_sum(losses)).backward()
    return {name: loss.detach() for name, loss in losses.items()}


@torch.no_grad()
def validate(model: MaskedLM, batches: list[Batch], autocast: torch.autocast) -> dict[str, float]:
    """Mean losses over the validation batches, and their weighted sum."""
    model.eval()
    with autocast:
        losses = [model(batch) for batch in batches]
    model.train()
    means = {}
    for name in LOSS_WEIGHTS:
        sums, counts = zip(*(of_batch[name] for of_batch in losses), strict=True)
        means[name] = sum(map(float, sums)) / max(1, sum(counts))
    return {"validation_loss": weighted_sum(means)} | {f"validation_{n}": means[n] for n in means}


def show_progress(bar: tqdm, point: dict[str, Any], n_tokens_left: int, ranks: Ranks) -> None:
    """Loss and speed beside the bar, or in a line of their own where there is none."""
    speed = point["tokens_per_second"]
    text = f"loss {point['loss']:.3f}, {speed:,.0f} tokens/s"
    bar.set_postfix_str(text)
    if bar.disable:
        ranks.log(f"step {point['step']}: {text}, {n_tokens_left / speed:.0f} s left")


def main(argv: list[str] | None = None, data: Corpus | None = None) -> dict[str, Any]:
    """Pretrain, and return what OUT/metrics.json holds; `data`, of equal flags, is the corpus."""
    start_time = time.time()
    args = parse_args(argv)
    device, dtype = choose_hardware(args.device, args.dtype)
    ranks = machine.join_ranks(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(machine.own_stream(device))
        if ranks.is_first:
            stack.enter_context(run_folder.lock(args.out, args.model))
        set_defaults(args, device, dtype, ranks)
        initial = model_folder.load_model(args.model) if args.model else None
        config = build_config(args, initial)
        machine.check_memory(config, device)
        corpus = data or load_corpus(args, config, initial, ranks)
        validation = [batch.to(device) for batch in corpus.validation_batches()]
        model = build_model(args, config, corpus, initial, ranks).to(device)
        ranks.share_weights(model)
        optimizers = make_optimizers(model, args.lr_muon, args.lr_adamw, args.lr_embedding, dtype)
        gradients = flatten_gradients(model)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        monitor = StepMonitor(has_scaler=scaler.is_enabled())
        training = (model, *optimizers, scaler, monitor)  # what --resume restores

        # from here on the folder belongs to this run: what an earlier one left in it is removed
        content = corpus.folder.name
        content += run_folder.digest(initial.weights.values()) if initial else ""
        record = run_folder.describe(args, content, device, ranks.n)
        state = run_folder.start_or_resume(args, record, flags_to_json(parse_args([])), ranks)
        if state["step"]:
            run_folder.restore(args.out, state, training)
            ranks.log(f"resuming after step {state['step']}")
        start_time -= state["seconds"]
        points = state.setdefault("points", [])
        record_points = make_recorder(args, points, ranks)
        built_in = [] if args.corpus or data else list(REVIEWS)
        if args.compile:
            machine.compile_blocks(model.model.layers, device, ranks.log)
        uses_graphs = can_record(device, dtype, config.head_dim)
        forward_backward = Recorded(uses_graphs, ranks.log, add_gradients, model, autocast, scaler)
        updating = (update_weights, optimizers, scaler, gradients, args.clip)
        update = Recorded(uses_graphs and ranks.n == 1, ranks.log, *updating)
        n_weights = sum(p.numel() for p in model.parameters())
        step_tokens = args.accumulate * args.micro_batch_tokens
        ranks.log(f"{n_weights:,} weights on {device}, {args.dtype}; {step_tokens:,} tokens a step")

        bar = tqdm(total=args.steps, initial=state["step"], unit="step", disable=ranks.hide_bar)
        signals = stack.enter_context(machine.collect_signals())
        durations = []  # seconds of each step since the last point, without waiting for its batch
        unread: deque[Callable] = deque()  # functions that return what the last steps computed
        interrupted = False
        load = partial(load_step, corpus, args, ranks)
        for step, batches in compute_ahead(load, range(state["step"], args.steps)):
            step_time = time.time()
            lr_factor = set_learning_rates(optimizers, step, args.steps, WARMUP)
            counts = ranks.sum(total_counts(batches), device)
            losses = dict.fromkeys(LOSS_WEIGHTS, 0.0)
            for batch in batches:
                torch.manual_seed(batch.generator().initial_seed())  # of dropout
                for name, loss in forward_backward(batch.to(device), counts).items():
                    losses[name] = losses[name] + loss

            values = ranks.sum(losses | {"signals": len(signals)}, device)  # ranks decide alike
            loss = weighted_sum({name: values[name] for name in LOSS_WEIGHTS})
            ranks.sum_in_place(gradients)
            grad_norm = update(loss)  # clips, makes the step, and clears the gradients
            values |= {"loss": loss, "grad_norm": grad_norm}
            unread.append(machine.start_reading(values))
            bar.update()

            done = step + 1
            is_point = done % args.log_every == 0 or done == args.steps
            is_snapshot = done * args.snapshots // args.steps > step * args.snapshots // args.steps
            is_saved = done % args.save_every == 0 or done == args.steps or is_snapshot
            # with CUDA graphs values are read one step late, unless this step needs them
            is_read = is_point or is_saved or not uses_graphs
            while len(unread) > 1 or (unread and (is_read or interrupted or monitor.gave_up)):
                values = unread.popleft()()
                interrupted = values.pop("signals") > 0
                if message := monitor.check(values["loss"], values["grad_norm"]):
                    ranks.log(f"step {done - len(unread)}: {message}")
            durations.append(time.time() - step_time)

            new_points = []
            if is_point:
                speed = len(durations) * step_tokens / sum(durations)
                durations.clear()
                point = {"step": done, **values, "skipped": monitor.n_skipped, "lr": lr_factor}
                new_points.append(point | {"tokens_per_second": speed})
                show_progress(bar, new_points[-1], (args.steps - done) * step_tokens, ranks)
            must_save = interrupted
            if is_saved or monitor.gave_up:
                new_points.append({"step": done} | validate(model, validation, autocast))
                validation_loss = new_points[-1]["validation_loss"]
                ranks.log(f"step {done}: validation loss {validation_loss:.3f}")
                must_save = math.isfinite(validation_loss)  # after skipped steps, too
            record_points(new_points)
            if ranks.is_first and must_save:
                state |= {"step": done, "points": points, "seconds": time.time() - start_time}
                run_folder.save_checkpoint(args.out, training, corpus.tokenizer, state, args.keep)
            if ranks.is_first and is_snapshot:
                snapshot = args.out / "snapshots" / f"step-{done}"
                model_folder.save_model(snapshot, model, corpus.tokenizer)
                describe_folder(snapshot, args.out, built_in)
            if monitor.gave_up:
                advice = "start again with lower rates, or --resume after the last checkpoint"
                ranks.log(f"stopped: {monitor.patience} skipped steps in a row; {advice}")
                raise SystemExit(1)
            if interrupted:
                saved = "saved" if must_save else "not saved: its validation loss is not finite"
                ranks.log(f"stopped after step {done}, {saved}; --resume continues the run")
                raise SystemExit(machine.exit_code(signals))
        bar.close()

        if not args.steps:
            record_points([{"step": 0} | validate(model, validation, autocast)])
        seconds = time.time() - start_time
        n_steps = points[-1]["step"]
        metrics = {"seconds": seconds, "steps": n_steps, "tokens": n_steps * step_tokens}
        metrics |= {"n_weights": n_weights, "tokens_folder": corpus.folder.name, **points[-1]}
        metrics |= {"skipped": monitor.n_skipped, "spikes": monitor.n_spikes}
        tensors = [x for batch in validation for x in (batch.ids, batch.masked, batch.targets)]
        metrics["validation_digest"] = run_folder.digest(tensors)
        if ranks.is_first:
            if args.keep_best:
                metrics |= run_folder.load_best(args.out, model, points)
            model_folder.save_model(args.out, model, corpus.tokenizer)
            write_file(args.out / "metrics.json", to_json(metrics))
            describe_folder(args.out, args.out, built_in)
        validation_loss = metrics["validation_loss"]
        ranks.log(f"{args.out}: validation loss {validation_loss:.3f} after {seconds:.0f} s")
    return metrics


if __name__ == "__main__":
    run_script(main, "stopped; the same command with --resume continues after the last checkpoint")
