"""A mistake of the user ends in one line and exit code 2; an earlier run in --out stays whole."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, sentences

import analyze
import finetune
import kernels.dispatch
import predict
import train
from analysis.baselines import pretraining_corpus
from files.cli import choose_hardware
from files.disk import UserError

ROOT = Path(__file__).parent.parent
GOOD_CORPUS = "\n".join(sentences(60, 11))
GOOD_LABELS = "text,label\n" + "".join(
    f"{s},{'xy'[i % 2]}\n" for i, s in enumerate(sentences(30, 12))
)
FILES = {
    "good.txt": GOOD_CORPUS.encode(),
    "short.txt": b"one short line\nand another\n",
    "empty.txt": b"",
    "blank.txt": b"\n\n \n",
    "picture.txt": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)),
    "latin1.txt": "café\n".encode("latin-1") * 9,
    "cut.txt.gz": gzip.compress(GOOD_CORPUS.encode())[:60],
    "broken.jsonl": b'{"text": "a b c"}\n{"text": "a b\n',
    "other.jsonl": b'{"body": "a b c"}\n',
    "fields.csv": b"text,n\na,1\na,b,2\n",
    "good.csv": GOOD_LABELS.encode(),
    "one_class.csv": b"text,label\na,x\nb,x\n",
    "folder/notes.rst": b"no text file",
    "model/config.json": b"{",
}

TRAIN = {  # flags -> a part of the message; {} is the folder of FILES
    "--stepz 5": "--stepz",
    "--step 5": "--step",  # no abbreviations
    "--steps -5": "-5: it must be at least 0",
    "--steps many": "whole number",
    "--lr-muon nan": "nan",
    "--mask-rate 1.5": "at most 0.9",
    "--preset huge": "huge",
    "--model {}/nothing": "{}/nothing: no checkpoint",
    "--model {}/model --out {}/model": "--out {}/model: this is the folder of --model",
    "--d-model 1048576": "GB of memory",
    "--d-model 100": "--d-model: 100: it must be a multiple of 64",
    "--model {}/model --preset tiny": "--preset is of a new model; --model brings its own",
    "--model {}/model --d-model 128": "--d-model is of a new model; --model brings its own",
    "--device abacus": "abacus: not on this machine",
    "--device cuda": "cuda: not on this machine",
    "--device cuda:7": "cuda:7: not on this machine",
    "--corpus {}/missing.txt": "{}/missing.txt: no such file or folder",
    "--corpus {}/good.txt {}/missing.txt": "{}/missing.txt: no such file or folder",
    "--corpus {}/folder": "{}/folder: neither a regular file nor a folder of .txt",
    "--corpus {}/empty.txt": "",
    "--corpus {}/blank.txt": "",
    "--corpus {}/picture.txt": "{}/picture.txt:1: ",
    "--corpus {}/latin1.txt": "{}/latin1.txt:1: not UTF-8",
    "--corpus {}/cut.txt.gz": "{}/cut.txt.gz: cannot be read",
    "--corpus {}/broken.jsonl": "{}/broken.jsonl:2: broken JSON",
    "--corpus {}/other.jsonl": "{}/other.jsonl:1: no text in field 'text'",
    "--corpus {}/fields.csv": "{}/fields.csv:3: 3 fields",
    "--corpus {}/short.txt": "fewer than one batch of 512",
    "--corpus {}/good.txt --out {}/good.txt/below": "--out {}/good.txt/below: cannot be written",
    "--corpus {}/good.txt --out {}/good.txt": "--out {}/good.txt: cannot be written",
}

FINETUNE = {
    "--label 5": "--label",
    "--labels 0": "0: it must be at least 1",
    "--methods pretrained,magic": "magic",
    "--task classify": "--train",
    "--data sst": "sst",
    "--device cuda": "cuda: not on this machine",
    "--model {}/nothing": "{}/nothing: no checkpoint",
    "--model {}/folder": "{}/folder: no checkpoint",
    "--model {}/good.txt": "{}/good.txt: no checkpoint",
    "--model {}/model": "{}/model: cannot be read",
    "--model {}/model --out {}/model": "--out {}/model: this is the folder of --model",
    "--pooling pooler": "--pooling pooler",
    "--methods most_frequent": "--methods most_frequent: choose from ngrams,",
    "--train {}/good.csv --task tokens": "{}/good.csv:1: one column; a word and its tag are needed",
    "--train {}/missing.csv": "{}/missing.csv: cannot be read",
    "--train {}/good.txt": "{}/good.txt: labelled examples come as",
    "--train {}/one_class.csv": "{}/one_class.csv: fewer than two classes",
    "--train {}/broken.jsonl": "{}/broken.jsonl:2: broken JSON",
    "--train {}/fields.csv": "{}/fields.csv:3: 3 fields",
    "--train {}/good.csv --labels 25": "--labels 25: there are only 24",
    "--train {}/good.csv --label-column mood": "--label-column mood",
    "--train {}/good.csv --test {}/missing.csv": "{}/missing.csv: cannot be read",
    "--train {}/good.csv --task regress": "{}/good.csv:2: label 'x' is no number",
    "--train {}/good.csv --out {}/good.txt/below": "--out {}/good.txt/below: cannot be written",
}

ANALYZE = {
    "--task tokens": "invalid choice: 'tokens'",
    "--label-column mood": "--label-column mood: the columns are text, label",
    "--task regress": "{}/good.csv:2: label 'x' is no number",
    "--labels 0": "--labels 0: give whole numbers or all",
    "--labels 99": "--labels 99: there are only 24",
    "--seeds 0": "0: it must be at least 1",
    "--methods frozen,magic": "--methods magic: choose from",
    "--model {}/nothing": "{}/nothing: no checkpoint",
    "--model {}/model --out {}/model": "--out {}/model: this is the folder of --model",
    "--train {}/missing.csv": "{}/missing.csv: cannot be read",
    "--out {}/good.txt": "--out {}/good.txt: cannot be written",
}

PREDICT = {
    "": "give texts",
    "text --file {}/good.txt": "give texts",
    "text -": "stands alone",
    "text \u00a0": "a TEXT is blank",
    "text --top 0": "0: it must be at least 1",
    "text --text-column body": "--text-column",
    "text --model {}/nothing": "{}/nothing: no checkpoint",
    "--file {}/missing.csv": "{}/missing.csv: cannot be read",
    "--file {}/empty.txt": "{}/empty.txt: no texts",
    "--file {}/blank.txt": "{}/blank.txt: no texts",
    "--file {}/cut.txt.gz": "{}/cut.txt.gz: cannot be read",
    "--file {}/other.jsonl --text-column text": ("--text-column text: the columns are body"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """FILES, in a working folder without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def train_flags(flags: str, folder: Path) -> list[str]:
    corpus = [] if "--corpus" in flags else ["--corpus", str(folder / "good.txt")]
    defaults = ["--steps", "1", "--out", str(folder / "out"), *SMALL]
    return [*defaults, *corpus, *flags.format(*[folder] * 2).split()]


def finetune_flags(flags: str, folder: Path, model: Path) -> list[str]:
    names_data = any(name in flags for name in ("--train", "--data", "--task"))
    data = [] if names_data else ["--train", str(folder / "good.csv")]
    defaults = ["--model", str(model), "--methods", "ngrams", "--out", str(folder / "out")]
    return [*defaults, *data, *flags.format(*[folder] * 2).split()]


def error_message(script, flags: list[str], capsys) -> str:
    """The one line that a script ends with."""
    with pytest.raises((UserError, SystemExit)) as caught:
        script.main(flags)
    message = str(caught.value)
    if caught.type is SystemExit:
        assert caught.value.code == 2
        message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    return message


@pytest.mark.parametrize("flags", TRAIN)
def test_train_refuses_a_mistake_in_one_line(folder, capsys, flags):
    assert TRAIN[flags].format(folder) in error_message(train, train_flags(flags, folder), capsys)


@pytest.mark.parametrize("flags", FINETUNE)
def test_finetune_refuses_a_mistake_in_one_line(folder, pretrained, capsys, flags):
    argv = finetune_flags(flags, folder, pretrained)
    assert FINETUNE[flags].format(folder) in error_message(finetune, argv, capsys)


@pytest.mark.parametrize("flags", ANALYZE)
def test_analyze_refuses_a_mistake_in_one_line(folder, pretrained, capsys, flags):
    defaults = ["--model", pretrained, "--train", folder / "good.csv", "--out", folder / "out"]
    argv = [*map(str, defaults), *flags.format(*[folder] * 2).split()]
    assert ANALYZE[flags].format(folder) in error_message(analyze, argv, capsys)


@pytest.mark.parametrize("flags", PREDICT)
def test_predict_refuses_a_mistake_in_one_line(folder, pretrained, capsys, flags):
    argv = ["--model", str(pretrained), *filter(None, flags.format(*[folder] * 2).split(" "))]
    message = ""
    try:
        assert predict.main(argv) == {"answered": 0, "broken": 1, "cut": 0}
    except UserError as error:
        message = str(error)
    except SystemExit as end:
        assert end.code == 2
    message += capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1 and PREDICT[flags].format(folder) in message


def double_width(config: bytes) -> bytes:
    raw = json.loads(config)
    return json.dumps(raw | {"hidden_size": 2 * raw["hidden_size"]}).encode()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", None),
        ("model.safetensors", lambda raw: raw[:1000]),
        ("tokenizer.json", None),
        ("tokenizer.json", lambda raw: b"{}"),
        ("config.json", None),
        ("config.json", lambda raw: raw[:100]),
        ("config.json", lambda raw: b"[]"),
        ("config.json", double_width),
    ],
)
def test_a_damaged_model_is_named(folder, pretrained, capsys, name, damage):
    model = folder / "damaged"
    shutil.copytree(pretrained, model, ignore=shutil.ignore_patterns("checkpoints"))
    (model / name).unlink()
    if damage:
        (model / name).write_bytes(damage((pretrained / name).read_bytes()))
    flags = finetune_flags("--methods pretrained", folder, model)
    assert str(model) in error_message(finetune, flags, capsys)


def test_damaged_metrics_are_named_where_the_corpus_is_looked_up(folder, pretrained):
    model = folder / "unreadable"
    shutil.copytree(pretrained, model, ignore=shutil.ignore_patterns("checkpoints"))
    (model / "metrics.json").write_text('{"tokens_folder": 5}')
    with pytest.raises(UserError, match=f"{model}/metrics.json: cannot be read"):
        pretraining_corpus(model)


def test_a_damaged_run_cannot_be_resumed(folder, pretrained, corpus_file, capsys):
    run = folder / "run"
    shutil.copytree(pretrained, run)
    (run / "checkpoints" / "step-20" / "training.pt").write_bytes(b"damaged")
    flags = ["--corpus", str(corpus_file), "--steps", "20", "--dtype", "float32", *SMALL]
    assert str(run) in error_message(train, [*flags, "--out", str(run), "--resume"], capsys)


EARLIER = [
    "flags.json",
    "metrics.json",
    "metrics.jsonl",
    "model.safetensors",
    "config.json",
    "tokenizer.json",
]
EARLIER += ["checkpoints/step-9/training.pt", "checkpoints/step-9/model.safetensors"]


def earlier_run(out: Path) -> dict[Path, bytes]:
    for name in EARLIER:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(f"the earlier {name}".encode())
    return content(out)


def content(out: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize(
    "flags", [flags for flags in TRAIN if flags.startswith("--corpus") and "--out" not in flags]
)
def test_a_failing_pretraining_leaves_an_earlier_run_untouched(folder, capsys, flags):
    before = earlier_run(folder / "out")
    error_message(train, train_flags(flags, folder), capsys)
    assert content(folder / "out") == before


@pytest.mark.parametrize(
    "flags",
    [
        flags
        for flags in FINETUNE
        if flags.startswith(("--train", "--model")) and "--out" not in flags
    ],
)
def test_a_failing_fine_tuning_leaves_an_earlier_run_untouched(folder, pretrained, capsys, flags):
    before = earlier_run(folder / "out")
    error_message(finetune, finetune_flags(flags, folder, pretrained), capsys)
    assert content(folder / "out") == before


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("train.py", "--stepz 5", "--stepz"),
        ("train.py", "--corpus {}/latin1.txt", "{}/latin1.txt:1: not UTF-8"),
        ("train.py", "--corpus {}/short.txt", "fewer than one batch"),
        ("finetune.py", "--model {}/folder", "{}/folder: no checkpoint"),
    ],
)
def test_a_script_ends_with_one_line_and_exit_code_2(folder, script, flags, words):
    argv = [*flags.format(folder).split(), "--out", str(folder / "out")]
    done = subprocess.run(
        [sys.executable, ROOT / script, *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"{script}: ") and words.format(folder) in line
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("forced", ["cuda", "Triton", "triton"])
def test_unavailable_kernels_are_refused(forced, monkeypatch):
    monkeypatch.setattr(kernels.dispatch, "FORCED", forced)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match=f"^CLOZE_KERNELS={forced}: "):
        choose_hardware("cpu", "float32")
