"""The experiment: python analyze.py. What was the pretraining worth, and which model should I take?

Accuracy against labels, over draws, for the pretrained network (whole, and frozen) and its rivals; each run
is finetune.py's. OUT gets results.csv (a line a run), what each row said of each test text in predictions/,
pictures, and report.md, whose sentences are computed from the statistics. A run that is there is not run
again. Flags, then the runs, then the parts of the report in their order, then `main`.
"""

import argparse
import contextlib
import hashlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import finetune
import train
from analysis import plots, report
from analysis.baselines import linear_fits
from analysis.results import Results, Table
from files import disk, model_folder, run_folder
from files.cli import Flags, choose_hardware, flags_to_json, number, run_script
from files.disk import UserError
from files.reviews import load_reviews
from labels import LabeledDataset, encode, load, subsample as draw
from model import Classifier, mean_pool

NETWORK = ("pretrained", "frozen")  # rows of each model
RIVALS = {"scratch": "random weights", "lsa": "LSA", "bag_of_words": "bag of words"}
QUICK = {"labels": "100,500", "seeds": 2, "rows": "pretrained,frozen,lsa,bag_of_words"}
TRANSFER_ROWS = ("frozen", "lsa")


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = Flags("Compare pretrained models with their rivals over label budgets and draws, and report.")
    add = flags.add_argument
    models = "folders of train.py, or BERTs; the rivals are run with the first one's text and shape"
    add("--model", type=Path, nargs="+", default=[Path("runs/pretrain")], metavar="DIR", help=models)
    add("--data", choices=("mr", "imdb"), default="mr", help="built-in labels")
    add("--train", type=Path, metavar="FILE", help="your own labels, as in finetune.py")
    add("--test", type=Path, metavar="FILE", help="without it, the last fifth of each class of --train")
    add("--labels", default="100,1000,all", help="budgets")
    add("--seeds", type=number(int, 1), default=5, help="draws of each budget; the fewest that t forgives")
    add("--rows", default=",".join((*NETWORK, *RIVALS)), help="which to run")
    add("--quick", action="store_true", help=f"minutes, not an hour: no snapshots, {QUICK}")
    add("--transfer", action="store_true", help="also pretrain on IMDb alone, on MR alone, and on both")
    add("--transfer-steps", type=number(int, 1), help="of each of these; by default train.py's")
    flags.add_device()
    flags.add_dtype()
    add("--out", type=Path, default=Path("runs/analysis"), help="folder of results, pictures and the report")
    args = flags.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    args.rows = args.rows.split(",")
    for row in args.rows:
        if row not in (*NETWORK, *RIVALS):
            flags.error(f"--rows {row}: choose from {','.join((*NETWORK, *RIVALS))}")
    args.labels = args.labels.split(",")
    for budget in args.labels:
        if budget != "all" and not re.fullmatch(r"[1-9]\d*", budget):
            flags.error(f"--labels {budget}: whole numbers and all, parted by commas")
    if args.test and not args.train:
        flags.error("--test belongs to --train FILE")
    return args


# ---------------------------------------------------------------------------------------------------- runs


class Run(NamedTuple):
    """One call of finetune.py: rows of a model, with so many labels."""

    data: str  # "mr", "imdb", or the name of the user's file
    flags: tuple[str, ...]  # that say so
    name: str  # of the model
    model: Path
    labels: int
    seed: int
    rows: tuple[str, ...]

    def key(self, row: str) -> tuple[str, ...]:
        return self.data, self.name, row, str(self.labels), str(self.seed)


def name_models(models: list[Path]) -> dict[str, Path]:
    """Short names, longer ones where folders are called alike."""
    names = [model.resolve().name if model.exists() else str(model) for model in models]
    if len(set(names)) < len(names):
        names = [str(model) for model in models]
    if len(set(names)) < len(names):
        raise UserError("--model: the same folder twice")
    return {name.replace("/", "-"): model for name, model in zip(names, models, strict=True)}


def weight_files(model: Path) -> list[Path]:
    there = sorted(model_folder.find_model(model).glob("*"))
    return [file for file in there if file.suffix in (".safetensors", ".bin")]


def fingerprint(model: Path) -> str:
    """Of the weights: a model that was trained anew has other results."""
    digest = hashlib.sha256()
    for file in weight_files(model):
        with open(file, "rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest()[:12]


def hardware_flags(args: argparse.Namespace) -> list[str]:
    return ["--dtype", args.dtype, *(["--device", args.device] if args.device else [])]


def run_all(planned: list[Run], results: Results, args: argparse.Namespace) -> None:
    """What is missing of each, by finetune.main, whose lines go to OUT/log.txt."""
    models = {run.name: run.model for run in planned}
    prints = {name: fingerprint(model) for name, model in models.items()}
    results.forget_others(prints)
    missing = {run: tuple(row for row in run.rows if run.key(row) not in results.rows) for run in planned}
    weights = {  # for the time left: about the seconds that sentences take
        run: sum(6 * run.labels**0.35 if row in ("pretrained", "scratch") else 4 for row in rows)
        for run, rows in missing.items()
    }
    form = "{desc}{percentage:3.0f}% {elapsed}, {remaining} left"
    begun, done, total = time.time(), 0.0, sum(weights.values())
    bar = tqdm(total=total, disable=None, bar_format=form)
    for run, rows in missing.items():
        if not rows:
            continue
        shown = f"{run.name} on {run.data}, {run.labels:,} labels, draw {run.seed + 1}"
        bar.set_description_str(f"{shown}: ")
        if bar.disable:
            left = f"; {(time.time() - begun) * (total / done - 1) / 60:.0f} minutes left" if done else ""
            print(shown + left, file=sys.stderr, flush=True)
        place = (run.data, run.name, prints[run.name], run.labels, run.seed)
        out = args.out / "work" / "-".join(map(str, place)).replace("/", "-")
        flags = ["--model", str(run.model), *run.flags, "--labels", str(run.labels), "--seed", str(run.seed)]
        flags += hardware_flags(args)
        with open(args.out / "log.txt", "a") as log, contextlib.redirect_stdout(log):
            print(f"# {shown}")
            metrics = finetune.main([*flags, "--rows", ",".join(rows), "--out", str(out), "--resume"])
        with np.load(out / "predictions.npz") as kept:
            for row in rows:
                chosen = metrics["choices"][row]
                line = metrics["test"][row] | {"data": run.data, "model": run.name, "row": row}
                line |= {"labels": run.labels, "seed": run.seed, "fingerprint": prints[run.name]}
                line |= {"choice": " ".join(map(str, chosen["choice"])), "validation": chosen["validation"]}
                results.add(run.key(row), line, kept["targets"], kept[row])
        last = args.out / "models" / run.name  # a model of each name stays, to measure its memory
        last.parent.mkdir(exist_ok=True)
        run_folder.remove_folder(last)
        out.rename(last)
        bar.update(weights[run])
        done += weights[run]
    bar.close()


@torch.no_grad()
def layer_scores(
    model: Path,
    parts: tuple[LabeledDataset, LabeledDataset],
    budgets: list[int],
    n_seeds: int,
    device: torch.device,
    autocast,
) -> dict[int, dict[int, np.ndarray]]:
    """{layer: {budget: what each test example has, (draws, examples)}} of logistic regression on the mean of
    the states after each layer; 0 is the embedding. C is chosen inside the labels, as finetune.py does it."""
    config, weights, tokenizer, _ = model_folder.load_model(model)
    config, max_len = finetune.choose_length(config, None, model)
    (examples, test), n_classes = parts, len(parts[0].names)
    drawn = {(budget, seed): draw(examples, budget, seed) for budget in budgets for seed in range(n_seeds)}
    network = Classifier(config, n_classes).to(device).eval()
    model_folder.load_weights(network, weights, model, fresh=("classifier", "pooler", "head"))
    rows = [row for part in (test, *drawn.values()) for row in encode(part, tokenizer, max_len)[0]]
    states: list[torch.Tensor] = []
    for module in (network.model.embeddings, *network.model.layers):
        module.register_forward_hook(lambda module, inputs, output: states.append(output))

    def all_means(*inputs) -> torch.Tensor:  # (S, layers + 1, d_model)
        states.clear()
        network.model(*inputs)
        return torch.stack([mean_pool(x, inputs[1]) for x in states], dim=1)

    vectors = finetune.outputs(network, rows, np.arange(len(rows)), autocast, all_means)
    asked, choices = np.arange(len(test)), finetune.GRIDS["frozen"]
    found = {layer: {b: np.zeros((n_seeds, len(test))) for b in budgets} for layer in range(vectors.shape[1])}
    for layer in found:
        features, begin = vectors[:, layer], len(test)
        for (budget, seed), some in drawn.items():
            on, tried = np.arange(begin, begin := begin + len(some)), []
            for a, b in finetune.choose_splits(some)[0]:
                fit = linear_fits(features[on[a]], some.targets[a], features[on[b]], n_classes, choices)
                tried.append((some.targets[b], fit))
            best, _ = finetune.best_choice(tried)
            fit = linear_fits(features[on], some.targets, features[asked], n_classes, [best])
            found[layer][budget][seed] = fit[best].argmax(1) == test.targets
    return found


def pretrain_for_transfer(args: argparse.Namespace) -> dict[str, Path]:
    """Models of the text of IMDb alone, MR alone, and both, in OUT/transfer; those that are there stay."""
    models, collections = {}, load_reviews()
    for source in ("imdb", "mr", "both"):
        models[source] = out = args.out / "transfer" / source
        if (out / "metrics.json").exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        names = ("imdb", "mr") if source == "both" else (source,)
        texts = [text for name in names for text, _ in collections[name]["train"]]
        corpus = out.with_suffix(".jsonl")
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        steps = ["--steps", str(args.transfer_steps)] if args.transfer_steps else []
        print(f"pretraining on {source}", file=sys.stderr, flush=True)
        with open(args.out / "log.txt", "a") as log, contextlib.redirect_stdout(log):
            train.main(["--corpus", str(corpus), "--out", str(out), *hardware_flags(args), *steps])
    return models


def measure_costs(
    args: argparse.Namespace,
    shown: dict[str, tuple[str, str]],
    models: dict[str, Path],
    parts: tuple[LabeledDataset, LabeledDataset],
    device: torch.device,
    autocast,
) -> dict[str, dict[str, float]]:
    """{row: costs}. All rows of one model are the same network; random weights cost no pretraining."""
    examples, test = parts
    n_classes, costs, measured = len(examples.names or ["value"]), {}, {}
    for name, model in models.items():
        config, _, tokenizer, _ = model_folder.load_model(model)
        config, max_len = finetune.choose_length(config, None, model)
        measured[name] = costs.of_network(config, tokenizer, max_len, test.texts, n_classes, device, autocast)
        measured[name]["megabytes"] = sum(file.stat().st_size for file in weight_files(model)) / 1e6
        if (classifier := args.out / "models" / name / "config.json").exists():
            measured[name]["peak_megabytes"] = costs.peak_memory(classifier.parent, test.texts, args.out)
        measured[name] |= costs.of_pretraining(model, config)
    pipelines = costs.rival_pipelines(examples.names is not None)
    for row, (name, kind) in shown.items():
        if kind in pipelines:
            fitted = pipelines[kind].fit(finetune.joined(examples), examples.targets)
            costs[row] = costs.time_answers(fitted.predict, test.texts)
        else:
            own = kind != "scratch"
            costs[row] = {k: v for k, v in measured[name].items() if own or not k.startswith("pretraining")}
    return costs


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is missing, write the report, and return {row: {labels: [mean, low, high]}}."""
    args = parse(argv)
    with run_folder.lock_folder(args.out):
        return experiment(args)


def experiment(args: argparse.Namespace) -> dict[str, Any]:
    device, dtype = choose_hardware(args.device, args.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    models = name_models(args.model)
    ours = next(iter(models))
    with contextlib.redirect_stdout(sys.stderr):
        parts = examples, test = load(args.data, args.train, args.test)
    budgets = sorted({len(examples) if b == "all" else int(b) for b in args.labels})
    for budget in budgets:
        draw(examples, budget, 0)  # refuses what is too few or too many
    few = [b for b in budgets if b < len(examples)] or budgets
    for model in models.values():
        model_folder.load_model(model)
    record = flags_to_json(args) | {"dtype": str(dtype).removeprefix("torch.")}
    if (kept := args.out / "flags.json").exists():
        with model_folder.reading(kept):
            before = {flag: json.loads(kept.read_text()).get(flag) for flag in ("train", "test", "dtype")}
        for flag, value in before.items():
            if value != record[flag]:
                raise UserError(f"--out {args.out}: its results are of --{flag} {value}, not {record[flag]}")
    disk.write_file(kept, disk.to_json(record))

    data = args.train.name if args.train else args.data
    flags = ["--train", str(args.train)] if args.train else ["--data", args.data]
    flags = tuple(flags + (["--test", str(args.test)] if args.test else []))
    seeds, planned, shown = range(args.seeds), [], {}
    for name, model in models.items():
        rows = tuple(row for row in args.rows if row in NETWORK or name == ours)
        planned += [Run(data, flags, name, model, b, seed, rows) for b in budgets for seed in seeds if rows]
        called = NETWORK if len(models) == 1 else (name, f"{name}, frozen")
        shown |= {shown_as: (name, row) for shown_as, row in zip(called, NETWORK, strict=True) if row in rows}
    shown |= {called: (ours, row) for row, called in RIVALS.items() if row in args.rows}
    timed = "frozen" in args.rows and not args.quick
    curve = report.read_curve(models[ours]) if timed else None
    for step in curve.steps if curve else ():
        name, model = f"{ours}@{step}", models[ours] / "snapshots" / f"step-{step}"
        planned += [Run(data, flags, name, model, b, seed, ("frozen",)) for b in few for seed in seeds]
    results, problem = Results(args.out), None
    try:
        if args.transfer:
            for name, model in pretrain_for_transfer(args).items():
                planned += [
                    Run(where, ("--data", where), name, model, b, seed, TRANSFER_ROWS)
                    for where in ("mr", "imdb")
                    for b in few
                    for seed in seeds
                ]
        run_all(planned, results, args)
    except UserError as error:  # a model that is gone, perhaps: what was computed is still reported
        problem = error

    table = Table(results, data, shown, budgets, args.seeds)
    looks = plots.look_of(list(shown))
    is_classes, first = examples.names is not None, next(iter(table.scores))
    majority = np.mean(test.targets == np.bincount(examples.targets).argmax()) if is_classes else 0.0
    rivals = [row for row in table.scores if row != first]
    lines = [f"# What the pretraining was worth: {data}", ""]
    lines += [
        f"{len(examples):,} examples to train on, {len(test):,} to test on; products in {record['dtype']}.",
        "Every choice is made inside the labels; what is shown is the test set.",
        "",
    ]
    lines += ["## Accuracy against labels", "", *report.write_scores(table, args.out, looks, float(majority))]
    lines += ["## Compared", "", *report.write_verdicts(table, first, rivals)]
    if problem is None:
        costs = measure_costs(
            args, {row: shown[row] for row in table.scores}, models, parts, device, autocast
        )
        lines += ["## What it costs", "", *report.write_costs(table, costs, looks, args.out)]
        lines += ["## Over the time of pretraining", ""]
        flat = {
            row: table.scores[row] for row in (RIVALS["lsa"], RIVALS["bag_of_words"]) if row in table.scores
        }
        lines += report.write_time(curve, ours, results, data, few, args.seeds, flat, args.out)
    if is_classes:
        if problem is None:
            found = layer_scores(models[ours], parts, few, args.seeds, device, autocast)
            lines += ["## By layer", "", *report.write_layers(table, found, ours, args.out)]
        lines += ["## Calibration", "", *report.write_calibration(table, args.out, looks)]
        lines += ["## The hardest texts", "", *report.write_hardest(table, test)]
    if args.transfer and problem is None:
        lines += ["## Transfer", "", *report.write_transfer(results, TRANSFER_ROWS, few, args.seeds)]
    disk.write_file(args.out / "report.md", "\n".join(lines).encode())
    print(f"{args.out / 'report.md'}: {len(results.rows)} runs")
    if problem:
        raise problem
    return {
        row: {b: [*vars(score.level()).values()] for b, score in cells.items()}
        for row, cells in table.scores.items()
    }


if __name__ == "__main__":
    run_script(main, "stopped; the same command goes on after the last fit that ended")
