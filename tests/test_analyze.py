"""The experiment: the whole command on a small dataset."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import sentences, write_csv

import analyze
import finetune
import train
from analysis import behaviour, experiment, plots, track
from files.disk import UserError
from labels import from_lists


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    """Fewer fine-tunings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "PRETRAINED_RATES", (0.0, 3e-4))
        yield


@pytest.fixture
def calls(monkeypatch):
    """The runs that are not in the results."""
    executed = []
    run_method = experiment.run_method
    monkeypatch.setattr(
        experiment,
        "run_method",
        lambda run, setup: (executed.append(run), run_method(run, setup))[1],
    )
    return executed


def flags_of(topics, model, out, *more):
    train, test = map(str, topics)
    flags = ["--model", str(model), "--train", train, "--test", test, "--out", str(out)]
    flags += [
        "--dtype",
        "float32",
        "--seeds",
        "2",
        "--methods",
        "pretrained,frozen,ngrams,majority",
    ]
    return [*flags, *more]


@pytest.fixture(scope="module")
def analysis(topics, pretrained, tmp_path_factory):
    """A model, the folder of its analysis, and what main returned."""
    folder = tmp_path_factory.mktemp("analysis")
    model = folder / "model"
    shutil.copytree(pretrained, model)
    out = folder / "out"
    return model, out, analyze.main(flags_of(topics, model, out, "--labels", "12,30"))


def read_results(out):
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_whole_experiment(analysis):
    _, out, scores = analysis
    lines = read_results(out)
    assert len(lines) == 4 * 2 * 2  # methods, budgets, draws
    assert set(scores) == {"pretrained", "frozen", "ngrams", "majority"}
    for method, cells in scores.items():
        accuracies = [
            float(line["accuracy"])
            for line in lines
            if (line["method"], line["labels"], line["model"]) == (method, "30", "model")
        ]
        mean, low, high = cells[30]
        assert np.mean(accuracies) == pytest.approx(mean)
        assert low <= mean <= high
    assert (out / "staircase.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "report.md").read_text()
    for title in ("Test scores", "Lead over the best baseline", "What each step is worth"):
        assert f"## {title}\n" in text


def test_each_cell_has_its_lead_over_the_best_baseline(analysis):
    _, out, scores = analysis
    with open(out / "cells.csv", newline="") as file:
        cells = {(line["method"], line["labels"]): line for line in csv.DictReader(file)}
    assert len(cells) == 4 * 2  # methods, budgets
    text = (out / "report.md").read_text()
    for n in (12, 30):
        best = max(("ngrams", "majority"), key=lambda method: scores[method][n][0])
        assert f"{best} {scores[best][n][0]:.3f}" in text.split("| best baseline |")[1]
        for method in ("pretrained", "frozen"):
            line = cells[method, str(n)]
            assert line["best_baseline"] == best
            lead = scores[method][n][0] - scores[best][n][0]
            assert float(line["lead"]) == pytest.approx(lead, abs=1e-6)
            assert float(line["lead_low"]) < lead < float(line["lead_high"])
        assert cells["ngrams", str(n)]["best_baseline"] == ""
    assert "all 2 of one budget hold at once" in text


def test_a_network_is_fine_tuned_once_for_both_of_its_methods(
    analysis, topics, tmp_path, monkeypatch
):
    rates = []
    fine_tune = finetune.main

    def count(flags, data):
        rates.append(flags[flags.index("--lr") + 1])
        return fine_tune(flags, data)

    monkeypatch.setattr(finetune, "main", count)
    flags = flags_of(topics, analysis[0], tmp_path, "--labels", "30", "--seeds", "1")
    analyze.main([*flags, "--methods", "pretrained,pretrained+ngrams", "--fixed-rates"])
    assert rates == [str(finetune.LR_PRETRAINED)]


def test_the_behavioural_test_set_is_predicted_and_not_part_of_the_score(
    analysis, tmp_path, monkeypatch
):
    sides = {"positive": 0, "negative": 1}
    parts = [
        from_lists(
            [text for topic in sides.values() for text in sentences(n, seed + topic, topic)],
            [name for name in sides for _ in range(n)],
        )
        for n, seed in ((40, 10), (20, 20))
    ]
    monkeypatch.setattr(analyze, "load", lambda *_: parts)
    flags = ["--model", str(analysis[0]), "--dtype", "float32", "--out", str(tmp_path)]
    flags += ["--labels", "30", "--seeds", "1", "--methods", "frozen,majority"]
    assert analyze.main(flags)["majority"][30][0] == 0.5
    [saved] = (tmp_path / "predictions").glob("*-frozen-*.npz")
    with np.load(saved) as arrays:
        predictions = arrays["predictions"]
    probes = behaviour.sentences()
    assert len(predictions) == 40 + len(probes)
    correct = predictions[40:].argmax(1) == probes.targets
    accuracies = " | ".join(f"{value:.2f}" for value in behaviour.by_category(correct).values())
    assert f"| frozen | {accuracies} |" in (tmp_path / "report.md").read_text()


def test_the_behavioural_test_set_is_balanced_and_its_pairs_are_opposites():
    probes = behaviour.sentences()
    assert len(probes) == len(set(probes.texts)) == 300
    assert probes.targets.tolist() == [1, 0] * 150
    by_category = dict(zip(behaviour.TEMPLATES, np.split(np.array(probes.texts), 5), strict=True))
    assert by_category["negation"][:2].tolist() == [
        "The script isn't bad at all.",
        "The script isn't clever at all.",
    ]
    for positive, negative in by_category["but"].reshape(-1, 2):
        words = re.findall(r"\w+", positive)
        assert words != re.findall(r"\w+", negative)
    assert behaviour.by_category(np.arange(300) < 90) == {
        "plain": 1.0,
        "negation": 0.5,
        "but": 0.0,
        "intensifiers": 0.0,
        "who did what": 0.0,
    }


def test_track_runs_both_datasets_and_prints_a_line(analysis, tmp_path, monkeypatch, capsys):
    """The score is the mean of the six leads over the best baseline of each cell."""
    cells = {100: [0.7, 0.6, 0.8], 1000: [0.8, 0.7, 0.9], 9000: [0.85, 0.8, 0.9]}
    weaker = {n: [mean - 0.1, low, high] for n, (mean, low, high) in cells.items()}
    mixed = {n: [0.78, 0.7, 0.8] for n in cells}
    frozen = {n: [0.99, 0.9, 1.0] for n in cells}  # no baseline
    scores = {"pretrained+ngrams": cells, "start": weaker, "ngrams": mixed, "frozen": frozen}
    calls = []
    main = analyze.main
    monkeypatch.setattr(analyze, "main", lambda argv: (calls.append(argv), scores)[1])
    flags = ["--track", "--model", str(analysis[0]), "--out", str(tmp_path), "--seeds", "3"]
    assert main(flags) == {"mr": scores, "imdb": scores}
    for argv, data in zip(calls, track.DATA, strict=True):
        args = analyze.parse_args(argv)
        assert (args.data, args.out, args.seeds) == (data, tmp_path / data, 3)
        assert args.labels == ["100", "1000", "all"]
        assert {"pretrained+ngrams", "start+ngrams", "lsa"} <= set(args.methods)
    leads = "-0.080 | +0.020 | +0.070"
    line = capsys.readouterr().out
    assert f"| +0.003 | {leads} | {leads} | 1 x 3 |" in line
    records = (Path(__file__).parent.parent / "docs" / "track.md").read_text()
    [header] = [row for row in records.splitlines() if row.startswith("| name | score |")]
    assert line.count("|") == header.count("|")


def test_a_run_is_a_fine_tuning_with_the_chosen_learning_rate(analysis, topics, tmp_path):
    """The result of a network is that of finetune.py by hand."""
    model, out, _ = analysis
    line = next(
        line
        for line in read_results(out)
        if (line["method"], line["labels"], line["seed"]) == ("pretrained", "30", "1")
    )
    flags = ["--model", str(model), "--train", str(topics[0]), "--test", str(topics[1])]
    flags += ["--labels", "30", "--seed", "1", "--lr", line["choice"], "--dtype", "float32"]
    metrics = finetune.main([*flags, "--methods", "pretrained", "--out", str(tmp_path / "out")])
    assert metrics["test"]["pretrained"]["accuracy"] == float(line["accuracy"])


def test_the_start_is_the_run_at_step_0_and_ngrams_stand_beside_the_network(
    analysis, topics, corpus_file, tmp_path
):
    model, _, _ = analysis
    flags = flags_of(topics, model, tmp_path / "out", "--labels", "30", "--seeds", "1")
    scores = analyze.main([*flags, "--methods", "start,pretrained+ngrams"])
    assert set(scores) == {"start", "pretrained+ngrams"}
    [start] = (tmp_path / "out" / "work").glob("start-*")
    recipe = json.loads((model / "flags.json").read_text())
    by_hand = ["--corpus", *recipe["corpus"], "--max-len", "32", "--micro-batch-tokens", "512"]
    train.main([*by_hand, "--steps", "0", "--dtype", "float32", "--out", str(tmp_path / "zero")])
    weights = (tmp_path / "zero" / "model.safetensors").read_bytes()
    assert (start / "model.safetensors").read_bytes() == weights
    assert weights != (model / "model.safetensors").read_bytes()

    common = ["--model", str(model), "--train", str(topics[0]), "--test", str(topics[1])]
    common += ["--labels", "30", "--dtype", "float32", "--out", str(tmp_path / "fine")]
    lines = read_results(tmp_path / "out")
    [line] = [line for line in lines if line["method"] == "pretrained+ngrams"]
    methods = ["--methods", "pretrained,pretrained+ngrams", "--lr", line["choice"]]
    metrics = finetune.main([*common, *methods])
    assert metrics["test"]["pretrained+ngrams"]["accuracy"] == float(line["accuracy"])


def test_a_start_that_cannot_be_made_again_is_left_out(analysis, topics, tmp_path, capsys):
    model, _, _ = analysis
    other = tmp_path / "model"
    shutil.copytree(model, other, ignore=shutil.ignore_patterns("checkpoints", "flags.json"))
    flags = flags_of(topics, other, tmp_path / "out", "--labels", "12", "--seeds", "1")
    scores = analyze.main([*flags, "--methods", "start,ngrams"])
    assert set(scores) == {"ngrams"}
    assert "start is left out" in capsys.readouterr().err


def test_finished_runs_are_not_repeated(analysis, topics, calls, capsys):
    model, out, scores = analysis
    flags = flags_of(topics, model, out, "--labels", "12,30")
    assert analyze.main(flags) == scores
    assert not calls
    assert "of other code" not in capsys.readouterr().err

    lines = read_results(out)
    results = (out / "results.csv").read_text()
    (out / "results.csv").write_text(results.replace(lines[0]["code"], "0123456789ab", 1))
    assert analyze.main(flags) == scores
    assert "1 finished runs are of other code" in capsys.readouterr().err

    next((out / "predictions").glob("*-model-frozen-30-1-*.npz")).unlink()
    lines = (out / "results.csv").read_text().splitlines()
    last = lines[-1][:30]  # cut off
    (out / "results.csv").write_text("\n".join([*lines[:-1], last]) + "\n")
    assert analyze.main(flags) == scores
    assert len(calls) == 2


def test_a_stop_loses_only_the_run_that_was_stopped(analysis, topics, tmp_path, monkeypatch, calls):
    model, _, _ = analysis
    flags = flags_of(topics, model, tmp_path, "--labels", "12", "--methods", "ngrams,spectral")
    run_method = experiment.run_method

    def stop(run, setup):
        if run.method == "spectral" and run.seed == 1:
            raise SystemExit(130)
        return run_method(run, setup)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "run_method", stop)
        with pytest.raises(SystemExit, match="130"):
            analyze.main(flags)
    finished = list(calls)
    calls.clear()
    analyze.main(flags)
    assert finished
    assert not set(finished) & set(calls)


def test_other_weights_or_labels_in_the_same_folder_are_another_result(
    analysis, topics, tmp_path, calls
):
    model, out, _ = analysis
    out = shutil.copytree(out, tmp_path / "out")
    model = shutil.copytree(model, tmp_path / "model")
    flags = [*flags_of(topics, model, out), "--labels", "12", "--methods", "ngrams"]
    analyze.main(flags)
    assert not calls  # the copy is the same model

    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    analyze.main(flags)
    assert len(calls) == 2

    train = tmp_path / topics[0].name
    train.write_text(topics[0].read_text().replace("2\n", "кошки\n", 1))
    analyze.main([*flags, "--train", str(train)])
    assert len(calls) == 4


def test_training_that_diverges_leaves_its_cell_out(
    analysis, topics, tmp_path, monkeypatch, capsys
):
    model, _, _ = analysis
    fine_tune = finetune.main

    def diverge(flags, data):
        if len(data[0]) == 30:
            raise SystemExit(1)
        return fine_tune(flags, data)

    monkeypatch.setattr(finetune, "main", diverge)
    more = ["--labels", "12,30", "--methods", "pretrained,ngrams", "--seeds", "1"]
    scores = analyze.main(flags_of(topics, model, tmp_path, *more))
    assert set(scores["pretrained"]) == {12}
    assert set(scores["ngrams"]) == {12, 30}
    line = "pretrained of model, 30 labels, draw 1: training diverged; the report leaves it out"
    assert line in capsys.readouterr().err.splitlines()
    assert "| ngrams |" in (tmp_path / "report.md").read_text()


def test_without_any_result_there_is_no_report(analysis, topics, tmp_path, monkeypatch):
    def diverge(*_):
        raise SystemExit(1)

    monkeypatch.setattr(experiment, "run_method", diverge)
    with pytest.raises(UserError, match="no method has finished"):
        analyze.main(flags_of(topics, analysis[0], tmp_path, "--labels", "12"))
    assert not (tmp_path / "report.md").exists()


def test_flags_change_what_quick_runs():
    args = analyze.parse_args(["--quick", "--labels", "50"])
    assert (args.labels, args.seeds) == (["50"], 2)
    assert args.methods == ["majority", "start", "pretrained", "pretrained+ngrams", "ngrams"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--labels", "12,121"], "--labels 121: there are only 120"),
        (["--labels", "12", "--model", "nowhere"], "nowhere"),
        (["--labels", "12", "--model", "{model}", "{empty}"], "{empty}: no checkpoint"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_run(
    analysis, topics, tmp_path, flags, problem
):
    model, _, _ = analysis
    names = {"model": model, "empty": tmp_path}
    flags = [flag.format(**names) for flag in flags]
    with pytest.raises(UserError, match=re.escape(problem.format(**names))):
        analyze.main([*flags_of(topics, model, tmp_path / "out"), *flags])
    assert not (tmp_path / "out" / "results.csv").exists()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--methods", "frozen,svm"], "--methods svm: choose from pretrained,"),
        (["--labels", "ten"], "--labels ten: give whole numbers or all"),
        (["--test", "test.csv"], "--task belong to --train FILE"),
    ],
)
def test_wrong_flags_are_refused(capsys, flags, problem):
    with pytest.raises(SystemExit, match="2"):
        analyze.main(flags)
    assert problem in capsys.readouterr().err


def test_table_of_something_else_is_refused(analysis, topics, tmp_path):
    model, _, _ = analysis
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"results\.csv:1: its columns must be"):
        analyze.main(flags_of(topics, model, tmp_path, "--labels", "12"))


def test_regression_has_r_squared(pretrained, tmp_path):
    texts = [s for topic in (0, 1) for s in sentences(60, topic, topic)]
    order = np.random.default_rng(0).permutation(len(texts))
    examples = [(texts[i], f"{(i >= 60) + 0.01 * i:.3f}") for i in order]
    path = write_csv(tmp_path / "numbers.csv", examples)
    out = tmp_path / "out"
    flags = ["--model", str(pretrained), "--train", str(path), "--out", str(out), "--seeds", "1"]
    flags += ["--methods", "frozen,ngrams,lsa,spectral", "--labels", "30,all"]
    scores = analyze.main([*flags, "--dtype", "float32"])
    assert scores["ngrams"][96][0] > 0
    report = (out / "report.md").read_text()
    assert "R squared" in report and "accuracy" not in report


def test_models_of_equal_names_get_their_paths(tmp_path):
    folders = [tmp_path / "a" / "model", tmp_path / "b" / "model"]
    for folder in folders:
        folder.mkdir(parents=True)
    assert list(experiment.name_models(folders).values()) == folders
    with pytest.raises(UserError, match="the same folder twice"):
        experiment.name_models([folders[0], folders[0]])


def test_figure_that_cannot_be_drawn_is_a_warning(tmp_path, capsys):
    path = tmp_path / "missing" / "curve.png"
    plots.loss_curve([{"step": 1, "loss": 2.0}], path)
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {path} was not drawn: ")
    assert len(warning.splitlines()) == 1


def test_a_run_with_flags_of_another_version_has_no_start(analysis, topics, tmp_path, capsys):
    model, _, _ = analysis
    other = tmp_path / "model"
    shutil.copytree(model, other, ignore=shutil.ignore_patterns("checkpoints"))
    flags = json.loads((model / "flags.json").read_text()) | {"activation": "silu"}
    (other / "flags.json").write_text(json.dumps(flags))
    argv = flags_of(topics, other, tmp_path / "out", "--labels", "12", "--seeds", "1")
    assert set(analyze.main([*argv, "--methods", "start,ngrams"])) == {"ngrams"}
    assert "start is left out: train.py refuses its flags" in capsys.readouterr().err
