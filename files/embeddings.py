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


def open_encoder(folder: Path, device: torch.device) -> tuple[Encoder, Tokenizer]:
    """The encoder of any model of a folder or of the hub, without its heads."""
    config, weights, tokenizer, _ = load_model(folder)
    encoder = Encoder(config)
    prefix = "model."
    own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    load_weights(encoder, own, folder)
    return encoder.to(device).eval(), tokenizer


@contextlib.contextmanager
def npy_rows(path: Path, width: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Write float32 rows (n, width) to a .npy file, which appears once all of them are in it.

    Yields:
        A function that appends rows.
    """
    if path.is_dir():
        raise UserError(f"--embeddings {path}: this is a folder; name a file such as texts.npy")
    n_rows = 0
    temporary = path.with_name(f".{path.name}.tmp")
    with contextlib.ExitStack() as on_error, open(temporary, "wb") as file:
        on_error.callback(temporary.unlink, missing_ok=True)

        def write_header() -> None:
            header = {"descr": "<f4", "fortran_order": False, "shape": (n_rows, width)}
            npy.write_array_header_1_0(file, header)  # it has room for any number of rows

        def append(rows: np.ndarray) -> None:
            nonlocal n_rows
            file.write(np.ascontiguousarray(rows, "<f4"))
            n_rows += len(rows)

        write_header()
        yield append
        file.seek(0)
        write_header()
        file.close()
        if n_rows:
            disk.rename(temporary, path)
