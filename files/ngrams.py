"""A linear model of n-grams beside a classifier. It knows the weights of single words and of pairs
of words, which a network learns badly from few labels.

Its n-grams are of tokens, so whatever calls the classifier uses it too. It is ngrams.safetensors in
the folder of the model; `transformers` reads the network alone.

Axes: T tokens of a batch, S texts, G n-grams, C classes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from files.disk import write_file

NGRAMS_FILE = "ngrams.safetensors"
N_BUCKETS = 2**20  # of the hash
LONGEST = 3  # tokens; words are one or two tokens long
N_POINTS = 256  # of the path of integrated gradients
MULTIPLIER = 0x5851F42D4C957F2D  # of Knuth's linear congruential generator MMIX


class Ngrams(NamedTuple):
    """The n-grams of a batch."""

    start: Tensor  # (G,) position of the first token
    length: Tensor  # (G,) in tokens
    key: Tensor  # (G,) the number of its text times N_BUCKETS, plus its hash


def find_ngrams(ids: Tensor, cu_seqlens: Tensor) -> Ngrams:
    """All n-grams of up to LONGEST tokens that lie within a text; the arguments are those of
    `model.Encoder`, on the CPU."""
    text_of_token = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff())  # (T,)
    parts = []
    for length in range(1, LONGEST + 1):
        start = torch.arange(max(0, len(ids) - length + 1))
        start = start[text_of_token[start] == text_of_token[start + length - 1]]
        code = torch.full_like(start, length)
        for i in range(length):
            code = (code + ids[start + i] + 1) * MULTIPLIER  # modulo 2**64
        bucket = (code >> 40) & (N_BUCKETS - 1)
        key = text_of_token[start] * N_BUCKETS + bucket
        parts.append((start, torch.full_like(start, length), key))
    return Ngrams(*map(torch.cat, zip(*parts, strict=True)))


class NgramModel(NamedTuple):
    """One class against the rest: logistic regression on which n-grams a text contains."""

    buckets: Tensor  # (G,) int64, those with a weight, in order
    weight: Tensor  # (G, C) float32
    bias: Tensor  # (C,) float32

    def token_scores(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """What each token contributes to the log-odds of each class, (T, C).

        The weight of an n-gram counts once per text; its tokens and occurrences share it evenly.
        """
        ngrams = find_ngrams(ids.cpu(), cu_seqlens.cpu())
        _, inverse, counts = ngrams.key.unique(return_inverse=True, return_counts=True)
        bucket = ngrams.key % N_BUCKETS
        row = torch.searchsorted(self.buckets, bucket).clamp(max=len(self.buckets) - 1)
        has_weight = (self.buckets[row] == bucket)[:, None]
        weights = torch.where(has_weight, self.weight[row], 0.0)  # (G, C)
        shares = weights / (counts[inverse] * ngrams.length)[:, None]
        scores = torch.zeros(len(ids), self.weight.shape[1])
        for i in range(LONGEST):
            has_token = ngrams.length > i
            scores.index_add_(0, ngrams.start[has_token] + i, shares[has_token])
        return scores

    def __call__(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The log-probability of each class against the rest, (S, C), on the device of `ids`."""
        scores = self.token_scores(ids, cu_seqlens)
        lengths = cu_seqlens.diff().long().cpu()
        log_odds = torch.segment_reduce(scores, "sum", lengths=lengths) + self.bias
        return F.logsigmoid(log_odds).to(ids.device)

    def attributions(self, ids: Tensor, cu_seqlens: Tensor, score: Callable) -> Tensor:
        """Integrated gradients of a function of the log-probabilities of one text, (T,): from no
        n-gram at all to those of the text.

        Args:
            score: (P, C) to (P,), of each point of the path.
        """
        scores = self.token_scores(ids, cu_seqlens)
        middles = (torch.arange(N_POINTS) + 0.5) / N_POINTS
        log_odds = self.bias + middles[:, None] * scores.sum(0)  # (P, C)
        log_odds.requires_grad_()
        total = score(F.logsigmoid(log_odds)).sum()
        (gradient,) = torch.autograd.grad(total, log_odds)
        return scores @ gradient.mean(0)

    def save(self, folder: Path) -> None:
        write_file(folder / NGRAMS_FILE, safetensors.torch.save(self._asdict()))


def load_ngrams(folder: Path, n_classes: int) -> NgramModel | None:
    """The n-gram model of a folder, if it has one; ValueError if it is of other classes."""
    path = folder / NGRAMS_FILE
    if not path.is_file():
        return None
    model = NgramModel(**safetensors.torch.load_file(path))
    if model.weight.shape != (len(model.buckets), n_classes) or len(model.bias) != n_classes:
        raise ValueError(f"{NGRAMS_FILE} is not of {n_classes} classes")
    return model
