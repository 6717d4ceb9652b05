"""Fine-tune, and compare: python finetune.py. Rows side by side, each with every choice made inside the
labels.

    bag_of_words   TF-IDF and logistic regression, fitted on the labels alone
    lsa            the same on a truncated SVD of the unlabelled text that pretraining saw
    scratch        the same network from random weights
    frozen         logistic regression on the pretrained network's vectors; runs where --rows names it
    pretrained     the network from the folder --model

Up to 1,000 labels choices are made by stratified cross-validation, above on a hold-out of a tenth; then the
row is fitted on all labels, and the test set is read once. Flags, then helpers in the order of their use,
then `main`.
"""

import argparse
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import confusion_matrix, f1_score
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from analysis.baselines import LSA_WIDTHS, Fit, bag_of_words, document_vectors, linear, linear_fits, lsa
from files import disk, model_folder, run_folder
from files.cli import Parser, choose_hardware, flags_to_json, number, run_script
from files.disk import UserError
from journal import as_bytes, begin_journal, keep, recall
from labels import LabeledDataset, batches, draw, encode, folds, load
from model import Classifier, Config, Tagger
from optim import AdamW, judge, new_health, set_learning_rates

# No row searches less than the pretrained one, which so gains nothing by searching. A choice of the bag and
# of frozen vectors is C; of LSA, width and C; of a network, its peak learning rate, 0 for a frozen one under
# a linear head.
GRIDS = {
    "bag_of_words": ((0.3,), (1.0,), (3.0,), (10.0,), (30.0,), (100.0,)),
    "lsa": tuple((width, c) for width in LSA_WIDTHS for c in (1.0, 10.0)),
    "scratch": ((5e-4,), (1e-3,), (2e-3,)),
    "frozen": ((1e-3,), (1e-2,), (0.1,), (1.0,)),
    "pretrained": ((0.0,), (1e-4,), (3e-4,)),
}
BERT_GRID = ((0.0,), (5e-5,), (1e-4,))  # of pretrained weights with post-norm: higher rates end lower
ROWS = "bag_of_words,lsa,scratch,pretrained"
# Adam's own lets a word that came once move as far as one that came a thousand times: a pretrained embedding
# would so learn by heart the names that stand in many labels.
ADAM_EPS, EMBEDDING_EPS = 1e-8, 3e-4
HEAD_C = 1e-3  # a weak head under pretrained states: fine-tuning that starts from a stronger one ends lower
CROSS_VALIDATED = 1000  # up to so many labels choices are made by cross-validation, above on a hold-out
N_FOLDS, HOLD_OUT = 3, 0.1
CHOOSING = 2000  # examples that networks are trained on while choices are made; the final fit takes all
MAX_LEN = 512
FEATURE_BATCH = 64

CORRELATIONS = (stats.pearsonr, stats.spearmanr)


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = Parser("Fine-tune a pretrained model, and compare it with three rivals.")
    add, positive, rate = flags.add_argument, number(int, 1), number(float, 0)
    models = "folder that train.py left, or a BERT, RoBERTa or ModernBERT: its folder or its name on the hub"
    add("--model", type=Path, default=Path("runs/pretrain"), help=models)
    add("--data", choices=("mr", "imdb"), default="mr", help="sentences of MR or reviews of IMDb, built in")
    add("--train", type=Path, metavar="FILE", help="your own labels: .csv, .tsv, .jsonl, or .gz of one")
    add("--test", type=Path, metavar="FILE", help="without it, the last fifth of each class of --train")
    add("--text-column", help="guessed where it is not given")
    add("--pair-column", help="column of a second text, for pairs")
    add("--label-column", help="guessed where it is not given")
    tasks = "guessed where not given: few integers are classes; tokens wants words with tags, see tag.py"
    add("--task", choices=("classify", "regress", "tokens"), help=tasks)
    add("--labels", type=positive, help="label budget: so many training examples are drawn; by default all")
    add("--rows", default=ROWS, help=f"which to run, of {', '.join(GRIDS)}")
    head = "what the classes are read from: BERT's pooler, or head(mean); each family has its own"
    add("--head", choices=("pooler", "mean"), help=head)
    add("--lr", type=rate, help="peak rate of the networks; by default the best of a few on held-out labels")
    add("--epochs", type=positive, help="passes over the labels; by default 8 for few a class to 2 for many")
    add("--batch-size", type=positive, default=32, help="examples of a step")
    add("--accumulate", type=positive, default=1, help="pieces a step is computed in, where memory is short")
    add("--max-len", type=number(int, 8), help="tokens of an example; by default 512, or a BERT's positions")
    add("--dropout", type=number(float, 0, 0.9), default=0.1, help="on hidden states: BERT's")
    add("--weight-decay", type=rate, default=0.01, help="of matrices: BERT's")
    add("--warmup", type=number(float, 0, 0.9), default=0.1, help="share of steps in which the rate rises")
    add("--clip", type=rate, default=1.0, help="the gradient's greatest length")
    add("--seed", type=number(int, 0), default=0, help="of the draw, the random weights and the order")
    flags.add_device()
    flags.add_dtype()
    add("--out", type=Path, default=Path("runs/finetune"), help="folder of the run")
    add("--resume", action="store_true", help="go on after the last fit that ended in --out")
    args = flags.parse_args(argv)
    args.rows = args.rows.split(",")
    for row in args.rows:
        if row not in GRIDS:
            flags.error(f"--rows {row}: choose from {','.join(GRIDS)}")
    if args.train is None and any(
        (args.test, args.text_column, args.pair_column, args.label_column, args.task)
    ):
        flags.error("--test, the columns and --task belong to --train FILE")
    return args


def joined(examples: LabeledDataset) -> list[str]:
    """Pairs as one text, for rows that count words."""
    pairs = examples.pairs or [""] * len(examples)
    return [f"{a} {b}" if b else a for a, b in zip(examples.texts, pairs, strict=True)]


# --------------------------------------------------------------------------------------------- the network


def fit_head(model: Classifier, features: np.ndarray, targets: np.ndarray, is_classes: bool) -> None:
    """Set the classifier to a linear fit on features, head(mean) of the examples, (S, d_model)."""
    fitted = linear(features, targets, is_classes, HEAD_C)
    coefficients, intercepts = np.atleast_2d(fitted.coef_), np.atleast_1d(fitted.intercept_)
    if is_classes and len(coefficients) == 1:  # one row that tells two classes apart: two that differ by it
        coefficients = np.outer([-0.5, 0.5], coefficients)
        intercepts = np.outer([-0.5, 0.5], intercepts)[:, 0]
    # a class that these examples lack keeps the bias of -10
    weight, bias = model.classifier.weight.data.zero_(), model.classifier.bias.data.fill_(-10.0)
    present = torch.from_numpy(fitted.classes_) if is_classes else torch.tensor([0])
    weight[present] = torch.from_numpy(coefficients).to(weight)
    bias[present] = torch.from_numpy(intercepts).to(bias)


@torch.no_grad()
def outputs(
    model: Classifier, rows: list[np.ndarray], which: np.ndarray, autocast, part: Callable
) -> np.ndarray:
    """part(ids, cu_seqlens, longest, token_types) of the chosen rows, (len(which), ...), in float32."""
    model.eval()
    by_length = which[np.argsort([len(rows[i]) for i in which], kind="stable")]
    device, found = next(model.parameters()).device, {}
    for members, inputs in batches(rows, by_length, FEATURE_BATCH, device):
        with autocast:
            computed = part(*inputs)[: len(members)]
        found.update(zip(members.tolist(), computed.float().cpu().numpy(), strict=True))
    return np.array([found[i] for i in which.tolist()])


def fit_network(
    model: Classifier | Tagger,
    rows: list[np.ndarray],
    targets: np.ndarray | list[np.ndarray],
    which: np.ndarray,
    rate: float,
    args: argparse.Namespace,
    autocast,
    embedding_eps: float = ADAM_EPS,
) -> None:
    """The training loop: cross-entropy (or squared error) on the examples `which`, AdamW, linear warm-up and
    decay. `targets` has one number an example, or for token labels an array of one a token."""
    device = next(model.parameters()).device
    embeddings, matrices, vectors = [], [], []
    for name, parameter in model.named_parameters():
        members = vectors if parameter.dim() == 1 else embeddings if "embeddings" in name else matrices
        members.append(parameter)
    groups = [
        {"params": embeddings, "weight_decay": args.weight_decay, "eps": embedding_eps},
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=rate, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast.fast_dtype == torch.float16)
    rng = np.random.default_rng([args.seed, 5])
    order = np.concatenate([rng.permutation(which) for _ in range(args.epochs)])
    n_steps = -(-len(order) // args.batch_size)
    health = new_health(scaler.is_enabled())
    model.train()
    for step in tqdm(range(n_steps), desc=f"rate {rate:g}", disable=None, leave=False, unit="step"):
        examples = order[step * args.batch_size : (step + 1) * args.batch_size]
        set_learning_rates([optimizer], step, n_steps, args.warmup)
        piece, total = -(-len(examples) // args.accumulate), 0.0
        for members, inputs in batches(rows, examples, piece, device):
            wanted = torch.from_numpy(np.concatenate([np.atleast_1d(targets[i]) for i in members])).to(device)
            with autocast:
                logits = model(*inputs).float()[: len(wanted)]
            if wanted.is_floating_point():
                loss = F.mse_loss(logits[:, 0], wanted, reduction="sum")
            else:
                loss = F.cross_entropy(logits, wanted, reduction="sum")
            loss = loss / sum(np.size(targets[i]) for i in examples)
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        length = float(nn.utils.clip_grad_norm_(model.parameters(), args.clip))
        said = judge(health, float(total), length)
        if health["in_row"]:
            print(f"rate {rate:g}, step {step + 1}: {said}", flush=True)
        else:  # a leap of the loss is no news where batches are small
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if health["in_row"] == health["patience"]:
            print(f"stopped after {health['patience']} bad steps in a row: a lower --lr may help", flush=True)
            raise SystemExit(1)


# ----------------------------------------------------------------------------- choices and results


def measure(targets: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-F1 of probabilities, or of numbers RMSE, Pearson's and Spearman's correlation."""
    if found.ndim == 2:
        predictions = found.argmax(1)
        f1 = f1_score(targets, predictions, average="macro")
        return {"accuracy": float(np.mean(targets == predictions)), "macro_f1": float(f1)}
    rmse, varies = float(np.sqrt(np.mean((targets - found) ** 2))), np.ptp(found) > 0
    pearson, spearman = (float(f(targets, found).statistic) if varies else 0.0 for f in CORRELATIONS)
    return {"rmse": rmse, "pearson": pearson, "spearman": spearman}


def best_choice(tried: list[tuple[np.ndarray, Fit]]) -> tuple[Any, float]:
    """The choice with the best mean over the folds, (targets, {choice: scores}): accuracy, or -RMSE."""

    def mean_score(choice: Any) -> float:
        measured = [measure(targets, fit[choice]) for targets, fit in tried]
        return float(np.mean([m.get("accuracy", -m.get("rmse", 0)) for m in measured]))

    means = {choice: mean_score(choice) for choice in tried[0][1]}
    best = max(means, key=means.get)
    return best, means[best]


def show_confusion(confusion: np.ndarray, names: list[str], path: Path) -> None:
    """Print the matrix, and draw it."""
    from analysis import plots  # matplotlib takes a second to import

    body = [[name, *map(str, row)] for name, row in zip(names, confusion, strict=True)]
    cells = [[cell[:20] for cell in row] for row in [["true, predicted", *names], *body]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    plots.confusion(confusion, names, path)


def save_classifier(
    out: Path, model: Classifier, tokenizer: Tokenizer, names: list[str] | None, center: float, spread: float
) -> None:
    """The folder that AutoModelForSequenceClassification reads, numbers in their own unit."""
    if names is None:
        model.classifier.weight.data *= spread
        model.classifier.bias.data = model.classifier.bias.data * spread + center
    task = "regression" if names is None else "single_label_classification"
    extra: dict[str, Any] = {"problem_type": task}
    extra["id2label"] = dict(enumerate(names or ["value"]))
    extra["label2id"] = {name: i for i, name in extra["id2label"].items()}
    model_folder.save_model(out, model, tokenizer, extra)


def choose_splits(examples: LabeledDataset) -> tuple[list[tuple[np.ndarray, np.ndarray]], str]:
    """The splits that choices are made by, and what they are called."""
    if len(examples) <= CROSS_VALIDATED:
        return folds(examples, N_FOLDS, HOLD_OUT), f"{N_FOLDS}-fold cross-validation"
    return folds(examples, 1, HOLD_OUT), "a hold-out of a tenth"


def choose_length(config: Config, asked: int | None, model: Path) -> tuple[Config, int]:
    """(config, tokens of an example): RoPE reaches beyond the windows of pretraining, learned positions do
    not. Raises UserError where --max-len asks for more of them than there are."""
    if config.is_modern:
        config = replace(config, max_len=asked or MAX_LEN)
    elif (asked or 0) > config.max_len:
        raise UserError(f"--max-len {asked}: {model} has {config.max_len} positions")
    return config, min(asked or MAX_LEN, config.max_len)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the rows, and return what OUT/metrics.json says."""
    args = parse(argv)
    with run_folder.lock_folder(args.out, args.model):
        if args.task == "tokens":
            import tag  # which trains by this file's loop

            return tag.run(args)
        return compare_rows(args)


def compare_rows(args: argparse.Namespace) -> dict[str, Any]:
    device, dtype = choose_hardware(args.device, args.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    dtype_name = str(dtype).removeprefix("torch.")
    config, weights, tokenizer, _ = model_folder.load_model(args.model)
    heads = ("mean", "head(mean)") if config.is_modern else ("pooler", "its pooler")
    if args.head not in (None, heads[0]):
        raise UserError(f"--head {args.head}: {args.model} is a {config.family} model, which has {heads[1]}")
    config, max_len = choose_length(config, args.max_len, args.model)
    columns = (args.text_column, args.pair_column, args.label_column)
    train, test = load(args.data, args.train, args.test, columns, args.task)
    train = draw(train, args.labels, args.seed)
    flags = flags_to_json(args)

    grids = GRIDS if config.is_modern else GRIDS | {"pretrained": BERT_GRID}
    if len(train) > CHOOSING:  # some of the labels cannot tell what all of them add to a network that learns
        grids = grids | {"pretrained": tuple(choice for choice in grids["pretrained"] if choice[0])}
    if args.lr is not None:
        grids = grids | dict.fromkeys(("scratch", "pretrained"), ((args.lr,),))
    n_classes, n_train = train.names and len(train.names), len(train)  # None where numbers are learned
    (train_rows, n_cut), (test_rows, n_cut_test) = (encode(x, tokenizer, max_len) for x in (train, test))
    rows, texts = train_rows + test_rows, joined(train) + joined(test)
    all_train, all_test = np.arange(n_train), n_train + np.arange(len(test))
    splits, how = choose_splits(train)
    read = [*rows, train.targets, test.targets, *as_bytes(weights)]
    journal = begin_journal(args.out, flags, read, args.resume, device)
    args.epochs = args.epochs or max(2, min(8, round(31 / (n_train / (n_classes or 2)) ** 0.35)))
    print(f"{n_train:,} labels, {len(test):,} examples to test on; choices by {how}; {args.epochs} epochs")
    cut = f"{n_cut + n_cut_test:,} texts cut to head and tail of together {max_len} tokens"
    print(f"{cut}; products in {dtype_name} on {device}", flush=True)

    # networks learn numbers in units of their deviation; `decide`, and the saved classifier, turn them back
    center, spread = (0, 1) if n_classes else (train.targets.mean(), train.targets.std() + 1e-6)
    targets = train.targets if n_classes else ((train.targets - center) / spread).astype(np.float32)

    def decide(logits: np.ndarray) -> np.ndarray:
        return softmax(logits, axis=1) if n_classes else logits[:, 0] * spread + center

    def new_model(start: str) -> Classifier:
        torch.manual_seed(args.seed)
        model = Classifier(config, n_classes or 1).to(device)
        model.dropout.p = args.dropout
        if start == "pretrained":
            model_folder.load_weights(model, weights, args.model, allow_missing=("classifier", "pooler"))
        return model

    def fit(
        row: str, on: np.ndarray, unseen: np.ndarray, grid: Sequence, fold: int | None = None
    ) -> tuple[Fit, Classifier | None]:
        """Scores of `unseen` for each choice of the grid, fitted on the examples `on`; and of a network the
        last one. Those of a fold are looked up in the journal first."""
        if row == "bag_of_words":
            known, asked = ([texts[i] for i in which] for which in (on, unseen))
            return bag_of_words(known, train.targets[on], asked, n_classes, grid), None
        if row == "lsa":
            return lsa(vectors[on], train.targets[on], vectors[unseen], n_classes, grid), None
        if row == "frozen":
            return linear_fits(features[on], train.targets[on], features[unseen], n_classes, grid), None
        found, model = {}, None
        for (rate,) in grid:
            place = journal / f"{row}-{fold}-{rate!r}"
            if fold is not None and (kept := recall(place)):
                found[rate,] = kept[1]
                continue
            model = new_model(row)
            if row == "pretrained":  # whole fine-tuning begins from the fitted head (Kumar et al. 2022)
                fit_head(model, features[on], targets[on], n_classes is not None)
            if rate:
                eps = EMBEDDING_EPS if row == "pretrained" and config.is_modern else ADAM_EPS
                fit_network(model, rows, targets, on, rate, args, autocast, eps)
                logits = outputs(model, rows, unseen, autocast, model)
            else:
                states = torch.from_numpy(features[unseen]).to(device)
                logits = model.classifier(states).detach().cpu().numpy()
            found[rate,] = decide(logits)
            if fold is not None:
                keep(place, None, found[rate,])
        return found, model

    results, choices, predicted, features = {}, {}, {}, None
    for name in args.rows:
        if kept := recall(journal / name):
            (results[name], choices[name], line), predicted[name] = kept
            print(line, flush=True)
            continue
        begun, note = time.time(), ""
        most = CHOOSING if name in ("scratch", "pretrained") else n_train
        if name == "lsa":
            vectors, note = document_vectors(texts, texts[:n_train], args.model, args.seed)
        elif name in ("frozen", "pretrained") and features is None:
            fresh = new_model("pretrained")
            features = outputs(fresh, rows, np.arange(len(rows)), autocast, fresh.features)
        rng, tried = np.random.default_rng([args.seed, 6]), []
        for fold, (on, held_out) in enumerate(splits if len(grids[name]) > 1 else []):
            some = np.sort(rng.permutation(on)[:most])
            tried.append((train.targets[held_out], fit(name, some, held_out, grids[name], fold)[0]))
        choice, validation = best_choice(tried) if tried else (grids[name][0], None)
        fitted, model = fit(name, all_train, all_test, [choice])
        predicted[name] = fitted[choice]
        if name == "pretrained":
            save_classifier(args.out, model, tokenizer, train.names, center, spread)
        results[name] = measure(test.targets, predicted[name])
        shown = "  ".join(f"{key} {value:.3f}" for key, value in results[name].items())
        results[name]["seconds"] = time.time() - begun
        choices[name] = {"choice": choice, "validation": validation, "fitted_on": note}
        note = f"chose {', '.join(map(str, choice))}" + (f"; vectors of {note}" if note else "")
        line = f"{name:<13} {shown}  {results[name]['seconds']:4.0f} s  {note}"
        keep(journal / name, (results[name], choices[name], line), predicted[name])
        print(line, flush=True)

    shares = np.bincount(train.targets, minlength=n_classes) / n_train if n_classes else center
    majority = measure(test.targets, np.broadcast_to(shares, (len(test), *np.shape(shares))))
    of, majority = next(iter(majority.items()))
    print(f"{'majority' if n_classes else 'mean':<13} {of} {majority:.3f}")
    metrics: dict[str, Any] = {
        "test": results,
        "majority": majority,
        "choices": choices,
        "names": train.names,
    }
    metrics |= {"n_train": n_train, "n_test": len(test), "n_cut": n_cut + n_cut_test, "dtype": dtype_name}
    if n_classes and "pretrained" in predicted:
        confusion = confusion_matrix(test.targets, predicted["pretrained"].argmax(1), labels=range(n_classes))
        show_confusion(confusion, train.names, args.out / "confusion.png")
        metrics["confusion"] = confusion.tolist()
    np.savez_compressed(kept := io.BytesIO(), targets=test.targets, **predicted)
    disk.write_file(args.out / "predictions.npz", kept.getbuffer())
    disk.write_file(args.out / "metrics.json", disk.to_json(metrics))
    return metrics


if __name__ == "__main__":
    run_script(main, "stopped; the same command with --resume goes on after the last fit that ended")
