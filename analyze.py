"""The experiment: python analyze.py. What was the pretraining worth?

Each method runs on several draws of each number of labels, and makes every choice inside them. OUT
gets report.md, staircase.png, cells.csv (a line per method and number of labels), results.csv (a
line per run) and predictions/. Finished runs are kept.
"""

import argparse
import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from analysis import behaviour, experiment, report, track
from analysis.experiment import METHODS, STARTS, Setup
from analysis.results import Plan, Results, Table
from files import disk, model_folder, run_folder
from files.cli import Parser, choose_hardware, flags_to_json, number, run_script
from files.disk import UserError
from labels import load, subsample

QUICK_METHODS = "majority,start,pretrained,pretrained+ngrams,ngrams"
QUICK = {"labels": "100,500", "seeds": 2, "methods": QUICK_METHODS}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("Compare pretrained models with baselines over label budgets and random draws.")
    add = parser.add_argument
    models = "folders of train.py, or BERTs; only the pretrained methods run for all of them"
    default = [Path("runs/pretrain")]
    add("--model", type=Path, nargs="+", default=default, metavar="DIR", help=models)
    pool = "the models are pretraining seeds of one recipe: count them as one method"
    add("--pool", action="store_true", help=pool)
    parser.add_examples(tasks=("classify", "regress"))
    add("--labels", default="100,1000,all", help="numbers of labels")
    draws = "draws of each number of labels; fewer than 5 make the intervals wide"
    add("--seeds", type=number(int, 1), default=5, help=draws)
    add("--methods", default=",".join(METHODS), help="which methods to run")
    rates = "networks take finetune.py's learning rates and choose none: several times as fast"
    add("--fixed-rates", action="store_true", help=rates)
    quick = " ".join(f"--{flag} {value}" for flag, value in QUICK.items())
    add("--quick", action="store_true", help=f"minutes, not hours: {quick}")
    about = "print the score of docs/track.md: all cells of mr and imdb; several models are pooled"
    add("--track", action="store_true", help=about)
    parser.add_device()
    parser.add_dtype()
    add("--out", type=Path, default=Path("runs/analysis"), help="folder of the results")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    args.methods = args.methods.split(",")
    for method in args.methods:
        if method not in METHODS:
            parser.error(f"--methods {method}: choose from {','.join(METHODS)}")
    args.labels = args.labels.split(",")
    for budget in args.labels:
        if budget != "all" and not re.fullmatch(r"[1-9]\d{0,8}", budget):
            parser.error(f"--labels {budget}: give whole numbers or all, separated by commas")
    parser.check_examples(args)
    if args.track and args.train:
        parser.error("--track has labels of its own, and takes no --train")
    if args.pool and len(args.model) == 1:
        parser.error("--pool needs several folders after --model")
    return args


def run_missing(plan: Plan, results: Results, setup: Setup) -> None:
    """Run what is not in the results. The output of finetune.py goes to OUT/log.txt."""
    missing = [run for runs in plan.values() for run in runs if run not in results]
    bar = tqdm(missing, disable=None)
    with bar, open(setup.out / "log.txt", "a", encoding="utf-8") as log:
        for i, run in enumerate(bar, 1):
            title = f"{run.method} of {run.model}, {run.labels:,} labels, draw {run.seed + 1}"
            bar.set_description_str(title)
            if bar.disable:  # stderr is no terminal
                print(f"run {i} of {len(missing)}: {title}", file=sys.stderr, flush=True)
            try:
                with contextlib.redirect_stdout(log):
                    print(f"# {title}", flush=True)
                    metrics, predictions = experiment.run_method(run, setup)
                results.add(run, metrics, predictions)
            except SystemExit as stop:
                if stop.code in (130, 143):  # Ctrl-C, SIGTERM
                    raise
                bar.write(f"{title}: training diverged; the report leaves it out", sys.stderr)


def run_track(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Run the experiment with the data, the labels and the methods of the track."""
    pretraining_time = max(map(track.duration, args.model))  # raises UserError now, not after hours
    flags = [flag for flag in argv if flag != "--track"] + track.FLAGS
    flags += ["--pool"] * (len(args.model) > 1)
    scores = {}
    for data in track.DATA:
        scores[data] = main([*flags, "--data", data, "--out", str(args.out / data)])
    runs = f"{len(args.model)} x {args.seeds}"
    print(track.line_to_submit(scores, runs, pretraining_time))
    return scores


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what is missing and write the report.

    Returns:
        {method: {number of labels: [mean, low, high] of the test accuracy or R squared}}; with
        --track {data: this}.
    """
    args = parse_args(argv)
    for folder in args.model:
        disk.make_folder(args.out, folder)  # results never replace the files of a model
        model_folder.load_model(folder)  # raises UserError now, not after hours
    if args.track:
        return run_track(args, sys.argv[1:] if argv is None else argv)
    with run_folder.lock(args.out):
        device, dtype = choose_hardware(args.device, args.dtype)
        models = experiment.name_models(args.model)
        with contextlib.redirect_stdout(sys.stderr):
            columns = (args.text_column, args.pair_column, args.label_column)
            train, test = load(args.data, args.train, args.test, columns, args.task)
        if train.is_multilabel:
            raise UserError(f"{args.train}: it has several labels per text; finetune.py takes them")
        budgets = sorted({len(train) if n == "all" else int(n) for n in args.labels})
        for n in budgets:
            subsample(train, n, seed=0)  # raises UserError if the labels are too few or too many
        results = Results(args.out)
        disk.write_file(args.out / "flags.json", disk.to_json(flags_to_json(args)))

        data = args.train.name if args.train else args.data
        needs_start = not set(STARTS).isdisjoint(args.methods)
        starts = experiment.make_starts(models, args.out / "work") if needs_start else {}
        if args.pool and len(starts) < len(models):
            starts = {}  # a cell has the same number of seeds everywhere
        probes = test[np.arange(0)] if args.train else behaviour.sentences()
        setup = Setup(
            data, models, starts, train, test, probes, device, dtype, args.fixed_rates, args.out
        )
        if args.pool:
            experiment.check_pool(setup)
        plan = experiment.make_plan(setup, args.methods, budgets, args.seeds, args.pool)
        if n_old := results.n_of_other_code(plan):
            advice = "a new --out measures today's"
            print(f"{args.out}: {n_old} finished runs are of other code; {advice}", file=sys.stderr)
        run_missing(plan, results, setup)

        table = Table(results, plan, test.targets, probes.targets)
        sizes = f"{len(train):,} training and {len(test):,} test examples"
        choices = "Every choice"
        if args.fixed_rates:
            choices = "Networks have the learning rates of finetune.py; every other choice"
        about = [f"{data}, {sizes}, {str(dtype).removeprefix('torch.')}.", choices]
        about += ["is made inside the labels. Every score is on the test set."]
        report.write(table, about, args.out)
        print(f"{args.out / 'report.md'}: {len(results.lines)} runs")
    scores: dict[str, dict[int, list[float]]] = {}
    for (name, n), estimate in table.estimates.items():
        scores.setdefault(name, {})[n] = list(estimate)
    return scores


if __name__ == "__main__":
    run_script(main, "stopped; the same command continues after the last run that finished")
