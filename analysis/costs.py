"""What a prediction costs: time and weights."""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer

from analysis.baselines import LSA_WIDTHS
from analysis.evaluation import forward_all
from analysis.experiment import Setup, load_classifier
from analysis.results import Plan
from labels import LabeledDataset, encode

TIMED_TEXTS = 64
ROUNDS = 5


def measure(plan: Plan, setup: Setup) -> dict[str, dict[str, float]]:
    """{method: {"milliseconds": of a single text, and "weights": of a network}}."""
    measured = {}
    for name, cells in plan.items():
        run = next(iter(cells.values()))[0]
        if run.method in ("ngrams", "lsa", "bag_of_words"):
            pipeline = baseline_pipeline(run.method, setup)
            measured[name] = {"milliseconds": time_predictions(pipeline.predict, setup)}
        else:
            measured[name] = network_costs(run.model, setup)
    return measured


def baseline_pipeline(method: str, setup: Setup) -> Pipeline:
    """A baseline from text to prediction, as it would be used."""
    texts = setup.train.joined_texts()
    n_grams = (1, 2 if method == "ngrams" else 1)
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=n_grams, token_pattern=r"\S+")
    steps = [words]
    if method == "lsa":
        n_components = min(LSA_WIDTHS[1], len(words.fit(texts).vocabulary_))
        steps += [TruncatedSVD(n_components, random_state=0), Normalizer()]
    linear = LogisticRegression() if setup.train.names else Ridge()
    return make_pipeline(*steps, linear).fit(texts, setup.train.targets)


@functools.cache  # methods share a network
def network_costs(model: str, setup: Setup) -> dict[str, float]:
    network, tokenizer, max_len = load_classifier(model, setup)

    def predict(texts: list[str]) -> np.ndarray:
        examples = LabeledDataset(texts, None, np.zeros(len(texts)), None)
        rows, _ = encode(examples, tokenizer, max_len)
        return forward_all(network, rows, np.arange(len(rows)), setup.autocast, network)

    weights = sum(parameter.numel() for parameter in network.parameters())
    return {"milliseconds": time_predictions(predict, setup), "weights": weights}


def time_predictions(predict: Callable[[list[str]], Any], setup: Setup) -> float:
    """Milliseconds per single text, the median of several rounds after one that warms up."""
    texts = setup.test.texts[:TIMED_TEXTS]
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        for text in texts:
            predict([text])
        seconds.append((time.perf_counter() - start) / len(texts))
    return 1000 * float(np.median(seconds[1:]))
