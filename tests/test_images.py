"""examples/images.py: the readers, the codebook and the features by hand, and a run."""

import gzip
import io
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA

from examples import images
from files.disk import UserError

TINY = "--layers 1 --d-model 64 --mask even --lr-embedding 0.01"


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
    patch.setattr(images, "NETWORK", TINY)
    patch.setattr(images, "BUDGETS", (30,))
    patch.setattr(images, "MICRO_BATCH_TOKENS", 512)
    patch.setattr(images, "FINETUNE_SEQUENCES", 400)
    flags = ["--images", f"{folder}/x.gz", "--labels", f"{folder}/y", "--out", f"{folder}/out"]
    metrics = images.main([*flags, "--codes", "8", "--steps", "20"])
    patch.undo()
    return folder / "out", metrics


def test_a_run_measures_all_methods_and_learns(run):
    out, metrics = run
    assert metrics["network, fine-tuned"]["120"] > 0.8
    assert metrics["raw pixels"]["30"] > 0.8
    assert all(set(metrics[name]) == {"30", "120"} for name in metrics if name != "seconds")
    assert json.loads((out / "metrics.json").read_text()) == metrics
    with Image.open(out / "pictures.png") as figure:
        assert figure.size == (2 * 12 * images.N_DRAWN, 2 * 12 * 3)


def test_pretraining_sees_each_training_picture_shifted_and_no_test_picture(run):
    rows = [json.loads(line)["ids"] for line in (run[0] / "train.jsonl").read_text().splitlines()]
    pixels, classes = bars()
    part, test = images.split(images.Pictures(pixels[..., None], classes, list("abc")))
    assert (len(part.classes), len(test.classes)) == (120, 30)
    codebook = images.Codebook(part.pixels, 2, 8)
    codes = np.stack([codebook.encode(copy) for copy in images.copies(part.pixels)], axis=1)
    assert rows == codes.reshape(-1, 36).tolist()


def test_codes_are_those_of_the_nearest_centroids():
    pixels, _ = bars(side=10)
    codebook = images.Codebook(pixels[..., None], 4, 5)  # the edge is repeated up to 12 x 12
    codes = codebook.encode(pixels[..., None])
    padded = np.pad(pixels, ((0, 0), (0, 2), (0, 2)), "edge") / 255
    centroids = codebook.centroids.numpy()
    for place in range(9):
        row, column = divmod(place, 3)
        patches = padded[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1, 16)
        distances = ((patches[:, None] - centroids[place]) ** 2).sum(2)
        np.testing.assert_array_equal(codes[:, place], 5 * place + distances.argmin(1))
        np.testing.assert_array_equal(
            codebook.decode(codes)[:, place], centroids[place][codes[:, place] % 5]
        )


def test_few_distinct_patches_are_coded_without_loss():
    pixels = np.zeros((20, 4, 4, 3), np.uint8)
    pixels[::2, :2] = 200
    codebook = images.Codebook(pixels, 2, 50)
    decoded = codebook.decode(codebook.encode(pixels))
    np.testing.assert_allclose(decoded, codebook.patches(pixels), atol=1e-6)


def test_the_vectors_of_a_picture_add_up_to_its_principal_components():
    pixels, _ = bars()
    codebook = images.Codebook(pixels[..., None], 3, 6)
    codes = codebook.encode(pixels[..., None])
    vectors = codebook.vectors(codes, 8)
    pictures = codebook.decode(codes).reshape(len(codes), -1)
    expected = PCA(8, random_state=0).fit_transform(pictures)
    np.testing.assert_allclose(vectors[codes].sum(1), expected, atol=1e-4)
    sums = images.sum_vectors(vectors, np.stack((codes, codes[::-1])))
    np.testing.assert_allclose(sums, (expected + expected[::-1]) / 2, atol=1e-4)


def test_shifted_copies_repeat_the_edge():
    picture = np.arange(12, dtype=np.uint8).reshape(1, 3, 4, 1)
    same, down_right, up_left = (copy[0, :, :, 0].tolist() for copy in images.copies(picture))
    assert same == picture[0, :, :, 0].tolist()
    assert down_right == [[0, 0, 1, 2], [0, 0, 1, 2], [4, 4, 5, 6]]
    assert up_left == [[5, 6, 7, 7], [9, 10, 11, 11], [9, 10, 11, 11]]


def test_kmeans_features_are_those_by_hand(monkeypatch):
    monkeypatch.setattr(images, "FILTERS", 7)
    pixels, _ = bars(20, side=11)
    features = images.PatchFeatures(pixels[..., None])
    got = features(pixels[..., None])[3].reshape(7, 3, 3)
    maps = np.zeros((6, 6, 7))
    for row in range(6):
        for column in range(6):
            patch = pixels[3, row : row + 6, column : column + 6].reshape(-1).astype(float)
            patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 10)
            white = (patch - features.mean.numpy()) @ features.whiten.numpy()
            distances = np.linalg.norm(white - features.centroids.numpy(), axis=1)
            maps[row, column] = np.maximum(0, distances.mean() - distances)
    expected = maps.reshape(3, 2, 3, 2, 7).mean((1, 3)).transpose(2, 0, 1)
    np.testing.assert_allclose(got, expected, atol=1e-4)


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
        data = images.read_pictures(tmp_path / name, tmp_path / "y")
        np.testing.assert_array_equal(data.pixels, expected)
        assert data.names == ["0", "1", "2"] and data.classes.tolist() == classes.tolist()
    for kind, expected in (("grey", pixels[..., None]), ("colour", colours)):
        data = images.read_pictures(tmp_path / kind, None)
        np.testing.assert_array_equal(data.pixels, expected[order])
        assert data.classes.tolist() == classes[order].tolist()


def test_large_pictures_are_reduced():
    pixels = np.repeat(np.repeat(np.arange(36, dtype=np.uint8).reshape(1, 6, 6, 1), 22, 1), 22, 2)
    assert images.shrink(pixels).shape == (1, 44, 44, 1)  # blocks of 3 x 3
    np.testing.assert_array_equal(images.shrink(pixels[:, ::11, ::11]), pixels[:, ::11, ::11])


PIXELS, CLASSES = bars(30)


@pytest.mark.parametrize(
    ("pictures", "labels", "problem"),
    [
        (
            idx(PIXELS)[:-5],
            npy(CLASSES),
            "x: truncated or damaged: its header announces 4,336 bytes",
        ),
        (gzip.compress(idx(PIXELS))[:-5], npy(CLASSES), "x: damaged: "),
        (npy(PIXELS)[:-5], npy(CLASSES), "x: damaged: "),
        (b"", npy(CLASSES), "x: neither .npy nor IDX of bytes"),
        (b"\0\0\x0d\x03", npy(CLASSES), "x: neither .npy nor IDX of bytes"),
        (idx(PIXELS[:0]), npy(CLASSES[:0]), "x: no pictures"),
        (idx(PIXELS), npy(CLASSES[1:]), "y: 29 labels for 30 pictures"),
        (idx(PIXELS), npy(CLASSES / 2), r"y: float64 of \(30,\), not one label per picture"),
        (idx(PIXELS), idx(PIXELS), "y: uint8 of .*, not one label per picture"),
        (npy(PIXELS / 255), npy(CLASSES), "x: float64 of .*, not uint8 of"),
        (npy(PIXELS[0]), npy(CLASSES), r"x: uint8 of \(12, 12\), not uint8 of"),
        (npy(PIXELS[..., None].repeat(4, 3)), npy(CLASSES), r"x: uint8 of .*, not uint8 of"),
        (npy(np.array([{}])), npy(CLASSES), "x: damaged: .*pickle"),
        (idx(PIXELS), npy(CLASSES * 0 + 2), "x: pictures of one class only, '2'"),
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


def test_bad_folders_and_patches_end_in_one_line(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "a").mkdir(parents=True)
    flags = ["--images", str(folder), "--out", f"{tmp_path}/out"]
    with pytest.raises(UserError, match="no PNG or JPEG pictures in folders, one for each class"):
        images.main(flags)
    for i, picture in enumerate(PIXELS[:4]):
        Image.fromarray(picture).save(folder / f"a/{i}.png")
    with pytest.raises(UserError, match="pictures of one class only, 'a'"):
        images.main(flags)
    (folder / "b").mkdir()
    Image.fromarray(PIXELS[0, :5]).save(folder / "b/1.png")
    with pytest.raises(UserError, match=r"b/1.png: 12 x 5 pixels, but .*a/0.png has 12 x 12"):
        images.main(flags)
    (folder / "b/1.png").write_bytes((folder / "a/1.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"b/1.png: not a readable picture: "):
        images.main(flags)
    for i, picture in enumerate(PIXELS[:4]):
        Image.fromarray(picture).save(folder / f"b/{i}.png")
    with pytest.raises(UserError, match="--patch 13: the pictures have 12 x 12 pixels"):
        images.main([*flags, "--patch", "13"])
    other = tmp_path / "other" / "c"
    other.mkdir(parents=True)
    Image.fromarray(PIXELS[0]).save(other / "1.png")
    with pytest.raises(UserError, match="other: class 'c' is not in --images"):
        images.main([*flags, "--test-images", str(other.parent)])
    Image.fromarray(PIXELS[0, :5]).save(other / "1.png")
    with pytest.raises(UserError, match="other: pictures of another size than --images"):
        images.main([*flags, "--test-images", str(other.parent)])


@pytest.mark.slow
def test_mnist_is_read_better_than_by_a_linear_model(tmp_path):
    metrics = images.main(["--out", str(tmp_path / "out")])
    assert metrics["raw pixels"]["4000"] > 0.88
    assert metrics["network, fine-tuned"]["4000"] > metrics["raw pixels"]["4000"]
