"""Datasets of the Hugging Face hub by name: hf:OWNER/NAME[:CONFIG][:SPLIT].

The hub has a copy of each dataset as parquet files, with a folder per configuration and split. They
are downloaded once, into the cache of huggingface_hub, whose variables HF_ENDPOINT, HF_TOKEN,
HF_HOME and HF_HUB_OFFLINE apply. What the hub lists is saved too: where it cannot be reached, a
name stands for the same files as before.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from files.disk import CACHE, UserError, first_line, print_once, to_json, using_cache, write_file
from files.reviews import check_sha256

REVISION = "refs/convert/parquet"
PARQUET_FILE = re.compile(r"(.+)/(partial-)?([^/]+)/\d+\.parquet")  # of a configuration and a split


class HubDataset(NamedTuple):
    """One configuration of a dataset."""

    repo: str
    name: str  # hf:OWNER/NAME:CONFIG
    splits: dict[str, list[str]]  # the files of each
    split: str | None  # that was named


def is_hub_name(path: Path) -> bool:
    return path.as_posix().startswith("hf:")


def parquet_files(path: Path) -> list[Path]:
    """The files of a split on the hub, by default "train"; any other path is a file itself.

    Raises:
        UserError: There is no such dataset, configuration or split; or its files cannot be
            fetched, or are damaged.
    """
    if not is_hub_name(path):
        return [path]
    dataset = find_dataset(path)
    split = dataset.split or "train"
    if split not in dataset.splits:
        names = ", ".join(dataset.splits)
        raise UserError(f"{dataset.name}: no split {split!r}; add one of them: {names}")
    files = dataset.splits[split]
    if "/partial-" in files[0]:
        print_once(f"{dataset.name}:{split}: the hub has only the beginning of it as parquet files")
    return [_fetch(dataset.repo, file) for file in files]


def find_dataset(path: Path) -> HubDataset:
    """What a name stands for. Raises UserError if it has to say which configuration it means."""
    _, repo, *parts = path.as_posix().split(":")
    configs: dict[str, dict[str, list[str]]] = {}
    for file in sorted(_list_files(repo)["files"]):
        if match := PARQUET_FILE.fullmatch(file):
            config, _, split = match.groups()
            configs.setdefault(config, {}).setdefault(split, []).append(file)
    config = "default" if len(configs) != 1 else next(iter(configs))
    if parts and parts[0] in configs:
        config = parts.pop(0)
    if config not in configs or len(parts) > 1:
        names = ", ".join(list(configs)[:50]) or "it has no parquet files"
        raise UserError(f"{path.as_posix()}: add one of the configurations to hf:{repo}: {names}")
    return HubDataset(repo, f"hf:{repo}:{config}", configs[config], parts[0] if parts else None)


@functools.cache  # all splits of a run come from one commit
@using_cache()
def _list_files(repo: str) -> dict[str, Any]:
    """The commit of the parquet files, and the SHA-256 of each."""
    import huggingface_hub

    saved = CACHE / f"hub-{repo.replace('/', '--')}.json"
    try:
        info = huggingface_hub.HfApi().dataset_info(repo, revision=REVISION, files_metadata=True)
    except Exception as error:  # the network, the hub and its cache each have errors of their own
        if not saved.exists():
            raise UserError(f"hf:{repo}: {_explain(error)}") from None
        print_once(f"hf:{repo}: {_explain(error)}; what was downloaded before is used")
    else:
        files = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings}
        CACHE.mkdir(parents=True, exist_ok=True)
        write_file(saved, to_json({"commit": info.sha, "files": files}))
    return json.loads(saved.read_bytes())


@functools.cache
def _fetch(repo: str, file: str) -> Path:
    import huggingface_hub

    listing = _list_files(repo)
    try:
        revision = {"repo_type": "dataset", "revision": listing["commit"]}
        path = Path(huggingface_hub.hf_hub_download(repo, file, **revision))
    except Exception as error:
        raise UserError(f"hf:{repo}: {file}: {_explain(error)}") from None
    if sha256 := listing["files"][file]:
        check_sha256(path, sha256, f"{path.resolve()}: delete this damaged file")
    return path


def _explain(error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "gated: accept its terms on its page of the hub, and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such dataset on the hub, or a private one, which needs HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has no parquet files of this dataset"
    return f"cannot be fetched from {constants.ENDPOINT}: {first_line(error)}"
