"""examples/images.py: the readers, the codes and the masks by hand, and a run."""

import gzip
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from examples import images
from files.disk import UserError
from model import MaskedLM, preset

TINY = {"n_layers": 1, "d_model": 64, "vocab_size": 16, "max_len": images.PLACES}


def bars(n=150, side=12, seed=0):
    """Pictures whose class is where a bar stands, and their classes."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(3, size=n)
    pixels = rng.integers(0, 30, size=(n, side, side)).astype(np.uint8)
    for picture, place in zip(pixels, classes, strict=True):
        picture[4 * place : 4 * place + 4, 2:10] += 150
    return pixels, classes


def idx(array):
    sizes = b"".join(size.to_bytes(4) for size in array.shape)
    return b"\0\0\x08" + bytes([array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels, classes = bars()
    (folder / "x.gz").write_bytes(gzip.compress(idx(pixels)))
    (folder / "y").write_bytes(idx(classes))
    patch = pytest.MonkeyPatch()
    patch.setattr(images, "SHAPE", TINY)
    patch.setattr(images, "TARGETS", 16)
    patch.setattr(images, "BUDGETS", (30,))
    patch.setattr(images, "BATCH_SIZE", 16)
    flags = ["--images", f"{folder}/x.gz", "--labels", f"{folder}/y", "--out", f"{folder}/out"]
    metrics = images.main([*flags, "--codes", "8", "--steps", "20"])
    patch.undo()
    return folder / "out", metrics


def test_a_run_measures_all_methods_and_learns(run):
    out, metrics = run
    assert metrics["network, fine-tuned"]["120"] > 0.8
    assert metrics["raw pixels"]["30"] > 0.8
    assert all(set(row) == {"30", "120"} for row in metrics.values())
    assert json.loads((out / "metrics.json").read_text()) == metrics
    with Image.open(out / "pictures.png") as figure:
        assert figure.size == (2 * 12 * images.N_DRAWN, 2 * 12 * 3)


def tiny_model(soft):
    torch.manual_seed(0)
    config = preset("tiny", **TINY)
    model = MaskedLM(config)
    model.model.embeddings = images.PatchEmbeddings(config, soft.shape[2])
    return model.eval()


def test_masked_patches_are_unknown_to_the_network_and_learned_from_the_others(monkeypatch):
    monkeypatch.setattr(images, "TARGETS", 16)
    pixels, _ = bars()
    soft = images.soft_codes(pixels[..., None], 120, 4, 8)
    codes = images.hard_codes(soft, 120)
    model = tiny_model(soft)
    is_masked = images.draw_masks((30, images.PLACES), 0.5, np.random.default_rng(0))
    assert (is_masked.sum(1) == images.PLACES // 2).all()

    def accuracy(noise):
        with torch.no_grad():
            inputs = soft[120:] + noise * is_masked[..., None]
            logits = model.logits(*images.make_inputs(inputs, is_masked))
        guesses = logits.argmax(1).view(is_masked.shape)
        return float((guesses == codes[120:])[is_masked].float().mean()), logits

    before, logits = accuracy(0.0)
    assert torch.equal(accuracy(9.0)[1], logits)
    images.pretrain(model, soft[:120], codes[:120], 60, seed=0)
    assert accuracy(0.0)[0] > before + 0.2


def test_the_vectors_of_a_picture_add_up_to_its_principal_components():
    pixels, _ = bars()
    soft = images.soft_codes(pixels[..., None], 150, 4, 8)
    embeddings = tiny_model(soft).model.embeddings
    embeddings.start_from(soft)
    embeddings.norm = torch.nn.Identity()
    embeddings.positions.data.zero_()
    codes, cu_seqlens, _ = images.make_inputs(soft)
    with torch.no_grad():
        sums = embeddings(codes, cu_seqlens, None).unflatten(0, (150, -1)).sum(1)
    components = PCA(64, random_state=0).fit_transform(soft.flatten(1).numpy())
    components /= components.std(0) ** 0.5
    ratio = torch.pdist(sums).numpy() / torch.pdist(torch.from_numpy(components)).numpy()
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)


def test_hard_codes_name_the_nearest_centroids(monkeypatch):
    monkeypatch.setattr(images, "TARGETS", 3)
    soft = np.random.default_rng(0).normal(0, 0.1, (20, images.PLACES, 2)).astype(np.float32)
    groups = np.arange(20 * images.PLACES).reshape(20, -1) % 3
    soft += np.array([[0, 0], [4, 0], [0, 4]], np.float32)[groups]
    codes = images.hard_codes(torch.from_numpy(soft), 20).numpy()
    pairs = set(zip(groups.flat, codes.flat, strict=True))
    assert len(pairs) == 3 and len({code for _, code in pairs}) == 3


def test_soft_codes_are_those_by_hand(monkeypatch):
    pixels, _ = bars(20, side=13)
    made = []

    def fit_kmeans(vectors, n):
        made.append(vectors)
        return SimpleNamespace(cluster_centers_=vectors[:n])

    monkeypatch.setattr(images, "fit_kmeans", fit_kmeans)
    soft = images.soft_codes(pixels[..., None], 20, 6, 7)
    order = torch.randperm(20 * 64, generator=torch.Generator())
    centroids = made[0][:7]
    white = np.empty_like(made[0])
    white[order] = made[0]
    distances = np.linalg.norm(white[:, None] - centroids, axis=2)  # (windows, K)
    active = np.maximum(0, distances.mean(1, keepdims=True) - distances)
    pooled = active.reshape(20, 4, 2, 4, 2, 7).mean((2, 4)).reshape(20, 16, 7)
    expected = (pooled - pooled.mean(0)) / (pooled.std(0) + 0.02)
    np.testing.assert_allclose(soft, expected, atol=1e-3)
    np.testing.assert_allclose(np.cov(made[0].T), np.eye(36), atol=0.4)  # white


def test_all_forms_of_a_file_hold_the_same_pictures(tmp_path):
    pixels, classes = bars(12)
    colours = np.stack((pixels, pixels // 2, pixels), axis=3)
    for name, content in (("x.idx", idx(pixels)), ("x.npy", npy(pixels)), ("c.npy", npy(colours))):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "y").write_bytes(gzip.compress(npy(classes)))
    for i, (picture, of_class) in enumerate(zip(pixels, classes, strict=True)):
        for kind, image in (("grey", picture), ("colour", colours[i])):
            folder = tmp_path / kind / str(of_class)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:02}.png")
    order = np.argsort(classes, kind="stable")
    for name, expected in (
        ("x.idx", pixels[..., None]),
        ("x.npy", pixels[..., None]),
        ("c.npy", colours),
    ):
        content, labels = images.read_pictures(tmp_path / name, tmp_path / "y")
        np.testing.assert_array_equal(content, expected)
        np.testing.assert_array_equal(labels, classes)
    for kind, expected in (("grey", pixels[..., None]), ("colour", colours)):
        content, labels = images.read_pictures(tmp_path / kind, None)
        np.testing.assert_array_equal(content, expected[order])
        np.testing.assert_array_equal(labels, classes[order].astype(str))


def test_large_pictures_are_reduced(tmp_path):
    pixels = np.repeat(np.repeat(np.arange(36, dtype=np.uint8).reshape(6, 6), 22, 0), 22, 1)
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "1.png")
    reduced, _ = images.read_pictures(tmp_path, None)
    assert reduced.shape == (2, 44, 44, 1)  # blocks of 3 x 3
    np.testing.assert_array_equal(
        reduced[0, 3::22, 3::22, 0], np.arange(36).reshape(6, 6)[::3, ::3]
    )


PIXELS, CLASSES = bars(30)


@pytest.mark.parametrize(
    ("pictures", "labels", "problem"),
    [
        (idx(PIXELS)[:-5], npy(CLASSES), "x: cannot be .*: cannot reshape array of size 4315"),
        (idx(PIXELS)[:9], npy(CLASSES), "x: cannot be .*: buffer"),
        (gzip.compress(idx(PIXELS))[:-5], npy(CLASSES), "x: cannot be .*: .* ended"),
        (npy(PIXELS)[:-5], npy(CLASSES), "x: cannot be .*: EOF"),
        (b"", npy(CLASSES), "x: cannot be .*: neither .npy nor IDX of bytes"),
        (b"\0\0\x0d\x03", npy(CLASSES), "x: cannot be .*: neither .npy nor IDX of bytes"),
        (b"\0\0\x08", npy(CLASSES), "x: cannot be .*: "),
        (idx(PIXELS[:0]), npy(CLASSES[:0]), r"x: uint8 of \(0, 12, 12, 1\), not uint8 of"),
        (idx(PIXELS), npy(CLASSES[1:]), r"y: .*\(29,\), not one label for each of 30 pictures"),
        (idx(PIXELS), npy(CLASSES / 2), r"y: float64 of \(30,\), not one label for each"),
        (idx(PIXELS), idx(PIXELS), "y: uint8 of .*, not one label for each"),
        (npy(PIXELS / 255), npy(CLASSES), "x: float64 of .*, not uint8 of"),
        (npy(PIXELS[0]), npy(CLASSES), r"x: uint8 of \(12, 12\), not uint8 of"),
        (npy(PIXELS[..., None].repeat(4, 3)), npy(CLASSES), r"x: uint8 of .*, not uint8 of"),
        (npy(np.array([{}])), npy(CLASSES), "x: cannot be .*: .*pickle"),
        (idx(PIXELS), npy(CLASSES * 0 + 2), "x: pictures of one class only, 2"),
        (idx(PIXELS), None, "x: a file of pictures needs one of labels"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path, pictures, labels, problem):
    (tmp_path / "x").write_bytes(pictures)
    flags = ["--images", f"{tmp_path}/x", "--out", f"{tmp_path}/out"]
    if labels is not None:
        (tmp_path / "y").write_bytes(labels)
        flags += ["--labels", f"{tmp_path}/y"]
    with pytest.raises(UserError, match=problem):
        images.main(flags)


def test_flags_that_need_others(capsys):
    for flag in ("--labels", "--test-images", "--test-labels"):
        with pytest.raises(SystemExit):
            images.main([flag, "x"])
        assert "--labels and --test-images need --images" in capsys.readouterr().err


def test_bad_folders_and_patches_end_in_one_line(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "a").mkdir(parents=True)
    flags = ["--images", str(folder), "--out", f"{tmp_path}/out"]
    with pytest.raises(UserError, match="no PNG or JPEG pictures in folders, one for each class"):
        images.main(flags)
    for i, picture in enumerate(PIXELS[:4]):
        Image.fromarray(picture).save(folder / f"a/{i}.png")
    with pytest.raises(UserError, match="pictures of one class only, a"):
        images.main(flags)
    (folder / "b").mkdir()
    Image.fromarray(PIXELS[0, :5]).save(folder / "b/1.png")
    with pytest.raises(UserError, match=r"b/1.png: \(5, 12\) pixels, but .*a/0.png has \(12, 12\)"):
        images.main(flags)
    (folder / "b/1.png").write_bytes((folder / "a/1.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"b/1.png: not a readable picture: "):
        images.main(flags)
    for i, picture in enumerate(PIXELS[:4]):
        Image.fromarray(picture).save(folder / f"b/{i}.png")
    with pytest.raises(
        UserError, match="--patch 13: the shorter side of the pictures has 12 pixels"
    ):
        images.main([*flags, "--patch", "13"])
    other = tmp_path / "other" / "c"
    other.mkdir(parents=True)
    Image.fromarray(PIXELS[0]).save(other / "1.png")
    with pytest.raises(UserError, match="other: class c is not in --images"):
        images.main([*flags, "--test-images", str(other.parent)])
    Image.fromarray(PIXELS[0, :5]).save(other / "1.png")
    with pytest.raises(UserError, match="other: pictures of another size than --images"):
        images.main([*flags, "--test-images", str(other.parent)])


@pytest.mark.slow
def test_mnist_is_read_better_than_by_a_linear_model(tmp_path):
    metrics = images.main(["--out", str(tmp_path / "out")])
    assert metrics["raw pixels"]["4000"] > 0.88
    assert metrics["network, fine-tuned"]["4000"] > metrics["raw pixels"]["4000"]
