"""Fine-tune a pretrained encoder on labelled examples: python finetune.py.

The model learns a class, several labels or a number per example, or a tag per word (--task
tokens). These methods are measured on the same test set, which is not used for any choice:

    ngrams             a linear model of unigrams and bigrams (analysis/baselines.py)
    most_frequent      of tagged words instead: the most frequent tag of each word
    random_weights     the model, trained from random weights
    pretrained         the model, trained from the weights of --model and a fitted linear layer; it
                       is saved in --out
    pretrained+ngrams  of classes: that model and a linear model of n-grams (files/ngrams.py)
                       together; predict.py uses both
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from analysis.baselines import BASELINES, WITH_NGRAMS, choose_methods, fit_baseline
from analysis.evaluation import predict, print_summary, report, write_results
from analysis.fit_ngrams import add_ngrams
from analysis.last_layer import fit_last_layer, restore_unit, standardize
from analysis.multilabel import hold_out
from files import model_folder, run_folder, streams
from files.cli import Parser, choose_hardware, flags_to_argv, flags_to_json, number, run_script
from files.disk import UserError
from files.entities import NOT_SCORED, TaggedDataset
from files.examples import Dataset, balanced_weights, encode_examples, load_examples, load_lists
from files.machine import Ranks, own_stream
from files.model_card import describe_folder
from files.step_monitor import StepMonitor
from kernels.graphs import Recorded, can_record
from labels import batches
from model import Classifier, Config, Tagger
from optim import flatten_gradients, parameter_groups, set_learning_rates, update_weights

# Peak learning rates, chosen on folds of the training data of MR and IMDb.
LR_PRETRAINED = 3e-4
LR_PRETRAINED_BERT = 1e-4  # post-norm: higher rates score worse
LR_RANDOM_WEIGHTS = 1e-3
LR_TOKENS = 1e-3  # of taggers: MR and IMDb have no tags to choose it by
# With Adam's usual eps a word that occurs once moves as far as one that occurs a thousand times:
# a pretrained embedding would memorize the names in the labelled texts.
ADAM_EPS = 1e-8
EMBEDDING_EPS = 3e-4
HEAD_C = 1e-3  # fine-tuning from a linear layer that fits better ends lower
MAX_LEN = 512


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("Fine-tune a pretrained model, beside baselines.")
    add = parser.add_argument
    positive = number(int, 1)
    share = number(float, 0, 0.9)
    models = "folder of train.py, or BERT, RoBERTa or ModernBERT as a folder or a name on the hub"
    parser.add_run(out="runs/finetune")
    add("--model", type=Path, default=Path("runs/pretrain"), help=models)
    parser.add_examples(tasks=("classify", "multilabel", "regress", "tokens"))
    add("--labels", type=positive, help="number of training examples to sample; by default all")
    add("--methods", help="which to run, separated by commas; by default all")
    poolings = "what the classifier reads; by default mean, or what a BERT was trained with"
    add("--pooling", choices=("mean", "cls", "pooler"), help=poolings)
    rates = "peak learning rate; 0 fits a linear head alone; by default chosen by method"
    add("--lr", type=number(float, 0), help=rates)
    add("--epochs", type=positive, help="by default 8 for few labels per class to 2 for many")
    add("--batch-size", type=positive, default=32, help="examples per step")
    add("--accumulate", type=positive, default=1, help="micro-batches per step, to save memory")
    add("--max-len", type=number(int, 8), help="tokens; by default 512, or BERT's positions")
    add("--dropout", type=share, default=0.1, help="of hidden states, as in BERT")
    add("--weight-decay", type=number(float, 0), default=0.01, help="of matrices, as in BERT")
    add("--warmup", type=share, default=0.1, help="share of the steps in which the rate rises")
    add("--head-c", type=number(float, 1e-9), default=HEAD_C, help="C of the first linear layer")
    weights = "of the networks' loss; balanced: rare classes count as much as frequent ones"
    add("--class-weights", choices=("balanced",), help=weights)
    args = parser.parse_args(argv)
    parser.check_examples(args)
    return args


def set_defaults(
    args: argparse.Namespace, train: Dataset, config: Config, raw: dict[str, Any]
) -> None:
    """Set the flags whose defaults depend on the task, and check those that depend on the model."""
    is_tagged = isinstance(train, TaggedDataset)
    args.methods = choose_methods(args.methods, train)
    if is_tagged and (args.pooling or args.lr == 0):
        raise UserError("--task tokens takes no --pooling and no --lr 0")
    if args.class_weights and (is_tagged or not train.has_one_class or args.lr == 0):
        raise UserError("--class-weights needs examples of one class each, and a --lr above 0")
    args.pooling = model_folder.choose_pooling(config, raw, args.pooling, args.model)
    if args.epochs is None:  # fewer for more examples per class
        per_class = len(train) / (len(train.names) if train.names else 2)
        args.epochs = 10 if is_tagged else max(2, min(8, round(31 / per_class**0.35)))
    if args.lr == 0:
        args.epochs = 0


def build_model(
    args: argparse.Namespace, config: Config, train: Dataset, weights: dict[str, Tensor] | None
) -> Classifier | Tagger:
    """The model with pretrained weights, or with random ones if `weights` is None."""
    torch.manual_seed(args.seed)
    if isinstance(train, TaggedDataset):
        model = Tagger(config, len(train.names))
    else:
        model = Classifier(config, len(train.names or [""]), args.pooling)
        model.threshold = 0.5 if train.is_multilabel else None
    model.dropout.p = args.dropout
    if weights is not None:
        new_layers = ("classifier", "head" if isinstance(model, Tagger) else "pooler")
        model_folder.load_weights(model, weights, args.model, allow_missing=new_layers)
    return model


def new_optimizer(
    args: argparse.Namespace, model: Classifier | Tagger, is_pretrained: bool
) -> torch.optim.AdamW:
    """AdamW, whose learning rate depends on the weights that the training starts from."""
    is_tagger = isinstance(model, Tagger)
    lr = LR_PRETRAINED if is_pretrained else LR_RANDOM_WEIGHTS
    if is_pretrained and not model.config.is_modern:
        lr = LR_PRETRAINED_BERT
    elif is_tagger:
        lr = LR_TOKENS
    large_eps = is_pretrained and model.config.is_modern and not is_tagger
    matrices, embeddings, no_decay = parameter_groups(model)
    eps = EMBEDDING_EPS if large_eps else ADAM_EPS
    groups = [
        {"params": embeddings, "weight_decay": args.weight_decay, "eps": eps},
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr if args.lr is None else args.lr, fused=True)


def loss_sum(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Squared errors of numbers, or cross-entropies of classes, labels or tags."""
    if targets.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    if targets.is_floating_point():
        return F.mse_loss(logits[:, 0], targets, reduction="sum")
    return F.cross_entropy(logits, targets, weights, ignore_index=NOT_SCORED, reduction="sum")


def add_gradients(
    model: Classifier | Tagger,
    autocast: torch.autocast,
    scaler: torch.amp.GradScaler,
    class_weights: Tensor | None,
    targets: Tensor,
    n_targets: Tensor,
    *inputs: Any,
) -> Tensor:
    """Add the gradients of a micro-batch to those of the others, and return its loss.

    The sum of the losses is divided by the number of targets of the whole step.
    """
    with autocast:
        # `batches` appends filler sequences, whose outputs are dropped
        logits = model(*inputs)[: len(targets)].float()
    loss = loss_sum(logits, targets, class_weights) / n_targets
    scaler.scale(loss).backward()
    return loss.detach()


def main(argv: list[str] | None = None, data: tuple[Dataset, Dataset] | None = None) -> dict:
    """Fine-tune, and return the content of OUT/metrics.json.

    Args:
        argv: The flags; None means those of the command line.
        data: Training and test examples that replace files and --labels. For speed, neither epochs
            are saved nor a figure drawn then.
    """
    args = parse_args(argv)
    device, dtype = choose_hardware(args.device, args.dtype)
    with run_folder.lock(args.out, args.model), own_stream(device):
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        config, weights, tokenizer, raw = model_folder.load_model(args.model)
        config, max_len = model_folder.choose_max_len(config, args.max_len, MAX_LEN, args.model)
        train, test = data or load_examples(args)
        set_defaults(args, train, config, raw)
        train, test, n_held_out = hold_out(train, test)
        rows, targets, _, n_cut = encode_examples(train, tokenizer, max_len)
        test_rows, test_targets, first_pieces, n_more = encode_examples(test, tokenizer, max_len)
        content = [*rows, *targets, *test_rows, *test_targets, *weights.values()]
        record = run_folder.describe(args, run_folder.digest(content), device, n_ranks=1)
        state = run_folder.start_or_resume(args, record, flags_to_json(parse_args([])), Ranks(0, 1))
        results = state.setdefault("results", {})  # of the methods that are finished
        predictions = state.setdefault("predictions", {})
        about = {"n_train": len(train), "n_test": len(test) - n_held_out, "n_cut": n_cut + n_more}
        about["dtype"] = str(dtype).removeprefix("torch.")
        print_summary(about, args.epochs, max_len)
        targets, mean, scale = standardize(targets, train)
        class_weights = balanced_weights(train).to(device) if args.class_weights else None
        uses_graphs = can_record(device, dtype, config.head_dim)
        steps_per_epoch = math.ceil(len(train) / args.batch_size)

        for method in args.methods:
            if method in results:
                continue
            start_time = time.time()
            if method in BASELINES:
                predictions[method] = fit_baseline(train, test, tokenizer, args.seed)
            elif method == WITH_NGRAMS:
                of_network = predictions["pretrained"]
                predictions[method] = add_ngrams(
                    args.out, rows, train, test_rows, of_network, args.seed
                )
            if method in predictions:  # it has no network to train
                results[method] = report(method, test, predictions[method], start_time, n_held_out)
                continue

            is_pretrained = method == "pretrained"
            model = build_model(args, config, train, weights if is_pretrained else None).to(device)
            optimizer = new_optimizer(args, model, is_pretrained)
            gradients = flatten_gradients(model)
            scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
            monitor = StepMonitor(has_scaler=scaler.is_enabled())
            training = (model, optimizer, scaler, monitor)
            first_epoch = state["epoch"] if state.get("method") == method else 0
            if first_epoch:
                run_folder.restore(args.out, state, training)
                start_time -= state["seconds"]
                print(f"resuming after epoch {first_epoch} of {method}", flush=True)
            elif isinstance(model, Classifier) and (is_pretrained or args.lr == 0):
                fit_last_layer(model, rows, targets, args.head_c, autocast)

            settings = (model, autocast, scaler, class_weights)
            forward_backward = Recorded(uses_graphs, print, add_gradients, *settings)

            for epoch in range(first_epoch, args.epochs):
                # order and dropout depend on seed and epoch alone, so that a run can be resumed
                rng = np.random.default_rng([args.seed, streams.EXAMPLE_ORDER, epoch])
                torch.manual_seed(int(rng.integers(2**32)))
                model.train()
                groups = np.array_split(rng.permutation(len(train)), steps_per_epoch)
                bar = tqdm(groups, f"{method}, epoch {epoch + 1}", leave=False, disable=None)
                losses = []
                for step, examples in enumerate(bar, epoch * steps_per_epoch):
                    set_learning_rates([optimizer], step, args.epochs * len(groups), args.warmup)
                    n_scored = sum(int((targets[i] != NOT_SCORED).sum()) for i in examples)
                    n_targets = torch.tensor(max(1, n_scored), device=device)
                    micro_batch_size = math.ceil(len(examples) / args.accumulate)
                    loss = torch.zeros((), device=device)
                    for members, inputs in batches(rows, examples, micro_batch_size, device):
                        expected = torch.from_numpy(np.concatenate([targets[i] for i in members]))
                        if isinstance(model, Tagger):  # one per token, those of fillers too
                            n_fillers = len(inputs[0]) - len(expected)
                            expected = F.pad(expected, (0, n_fillers), value=NOT_SCORED)
                        loss += forward_backward(expected.to(device), n_targets, *inputs)

                    grad_norm = update_weights([optimizer], scaler, gradients, args.clip, loss)
                    losses.append(float(loss))
                    if message := monitor.check(losses[-1], float(grad_norm)):
                        print(f"{method}, step {step + 1}: {message}", flush=True)
                    if monitor.gave_up:
                        raise SystemExit("too many skipped steps in a row; a lower --lr may help")

                if bar.disable:  # stderr is not a terminal
                    progress = f"{method}, epoch {epoch + 1} of {args.epochs}"
                    print(f"{progress}: loss {np.mean(losses):.3f}", file=sys.stderr, flush=True)
                if data is None:
                    state |= {"method": method, "epoch": epoch + 1, "step": state["step"] + 1}
                    state["seconds"] = time.time() - start_time  # of this method
                    run_folder.save_checkpoint(args.out, training, tokenizer, state, keep=1)

            if train.names is None:
                restore_unit(model, mean, scale)
            predictions[method] = predict(model, test_rows, first_pieces, train.names, autocast)
            results[method] = report(method, test, predictions[method], start_time, n_held_out)
            if is_pretrained:
                model.threshold = results[method].get("threshold")
                model_folder.save_fine_tuned(args.out, model, tokenizer, train.names)

        metrics = write_results(
            args.out, train, test, results, predictions, about, data is None, n_held_out
        )
        describe_folder(args.out, args.out, [] if args.train or data else [args.data])
        return metrics


def fit(
    texts: list[str], labels: list, test: tuple[list[str], list] | None = None, **flags: Any
) -> dict[str, Any]:
    """Fine-tune on lists: fit(texts, labels, model="runs/pretrain", out="runs/mine", epochs=3).

    Args:
        texts, labels: See `labels.from_lists`.
        test: Texts and labels; by default, the last fifth of each class is held out.
        flags: Those of the command line, with _ for -.

    Returns:
        The content of OUT/metrics.json.
    """
    if unknown := flags.keys() - vars(parse_args([])).keys():
        raise TypeError(f"finetune.py has no flag {unknown.pop()!r}")
    return main(flags_to_argv(flags), load_lists(texts, labels, test))


if __name__ == "__main__":
    run_script(main, "stopped; the same command with --resume continues after the last epoch")
