"""Vectors of texts: the encoder of a model, and a .npy file that is written row by row."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from tokenizers import Tokenizer

from files import disk
from files.disk import UserError
from files.model_folder import load_model, load_weights
from model import Encoder


def open_encoder(folder: Path, device: torch.device) -> tuple[Encoder, Tokenizer, None]:
    """As `open_model`: the encoder alone of any model of a folder or of the hub."""
    config, weights, tokenizer, _ = load_model(folder)
    encoder = Encoder(config)
    prefix = "model."
    names = [name for name in weights if name.startswith(prefix)]
    of_encoder = {name.removeprefix(prefix): weights[name] for name in names}
    load_weights(encoder, of_encoder, folder)
    return encoder.to(device).eval(), tokenizer, None


@contextlib.contextmanager
def npy_rows(path: Path, width: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that adds a row to a .npy file of float32 rows (n, width), which replaces an
    older file once all rows, at least one, are in it."""
    if path.is_dir():
        raise UserError(f"--embeddings {path}: this is a folder; name a file such as texts.npy")
    n_rows = 0

    def append(row: np.ndarray) -> None:
        nonlocal n_rows
        n_rows += 1
        file.write(np.ascontiguousarray(row, "<f4"))

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            for is_last in (False, True):  # the header has room for any number of rows
                file.seek(0)
                header = {"descr": "<f4", "fortran_order": False, "shape": (n_rows, width)}
                npy.write_array_header_1_0(file, header)
                if not is_last:
                    yield append
        if n_rows:
            disk.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
