"""The CIFAR files as published by their authors: how to find, check and read them."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import tarfile
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prune_lab.foundations.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """One published archive with the md5 sums given at https://www.cs.toronto.edu/~kriz/cifar.html."""

    url: str
    md5: str
    folder: str
    label_key: bytes
    train: dict[str, str]
    test: dict[str, str]
    meta: dict[str, str]
    names_key: bytes

    @property
    def archive_name(self) -> str:
        return self.url.rsplit("/", 1)[1]


PUBLISHED = {
    "cifar10": Published(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        label_key=b"labels",
        train={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        test={"test_batch": "40351d587109b95175f43aff81a1287e"},
        meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        names_key=b"label_names",
    ),
    "cifar100": Published(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        label_key=b"fine_labels",
        train={"train": "16019d7e3df5f24257cddd939b257f8d"},
        test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
        names_key=b"fine_label_names",
    ),
}


def find_source(root: str, archive: str, *, download: bool) -> Path:
    """Return the path to read: a folder of published files, the published tar.gz, or a folder or tar of images.

    Args:
        root: any of these, or a folder that contains the published folder or tar.gz.
        archive: key of `PUBLISHED`.
        download: fetch the published tar.gz into the folder `root` if nothing is there.

    Raises:
        UserError: nothing found (and no download requested), or the download failed.
    """
    published = PUBLISHED[archive]
    path = Path(root)
    if path.is_file():
        return path
    for candidate in (path / published.folder, path / published.archive_name):
        if candidate.exists():
            return candidate
    if path.is_dir() and (path.name == published.folder or (path / "train").is_dir()):
        return path
    if download:
        return _download(published, path)
    raise UserError(
        f"dataset.root={root} holds no {archive}; add dataset.download=true, or dataset.root=/path/to/"
        f"{published.archive_name}, or dataset.root=/path/to/{archive}.tar.xz "
        "(a folder or tar with train/CLASS/*.jpg|png and test/CLASS/*.jpg|png)"
    )


def is_published(source: Path, archive: str) -> bool:
    """Return whether `source` is the published folder or tar.gz (by name), not a collection of images."""
    published = PUBLISHED[archive]
    return source.name in (published.folder, published.archive_name) or (source / next(iter(published.meta))).is_file()


def read_published(source: Path, archive: str) -> dict[str, Any]:
    """Return {"classes": names, "train_images": uint8 [N, 32, 32, 3], "train_labels": int64 [N], "test_...": ...}.

    Raises:
        UserError: a file is missing, differs from the published one, or holds anything but plain data.
    """
    published = PUBLISHED[archive]
    files = _read_checked(source, published)
    decoded: dict[str, Any] = {}
    for split, table in (("train", published.train), ("test", published.test)):
        batches = [_unpickle(files[name], f"{source}/{name}") for name in table]
        pixels = np.concatenate([batch[b"data"] for batch in batches])
        decoded[f"{split}_images"] = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels = [batch[published.label_key] for batch in batches]
        decoded[f"{split}_labels"] = np.concatenate(labels).astype(np.int64)
    (meta_name,) = published.meta
    names = _unpickle(files[meta_name], f"{source}/{meta_name}")[published.names_key]
    decoded["classes"] = [name.decode() for name in names]
    return decoded


def _read_checked(source: Path, published: Published) -> dict[str, bytes]:
    expected = {**published.train, **published.test, **published.meta}
    if source.is_dir():
        files = {name: (source / name).read_bytes() for name in expected if (source / name).is_file()}
    else:
        _check_md5(source.read_bytes(), published.md5, source)
        files = _read_tar(source, published.folder, expected)
    for name, md5 in expected.items():
        if name not in files:
            raise UserError(f"{source} holds no file {name}; expected: {', '.join(expected)}")
        _check_md5(files[name], md5, source / name)
    return files


def _read_tar(source: Path, folder: str, names: dict[str, str]) -> dict[str, bytes]:
    wanted = {f"{folder}/{name}" for name in names}
    try:
        with tarfile.open(source, "r|gz") as archive:
            files = ((member.name, archive.extractfile(member)) for member in archive if member.name in wanted)
            return {name.rsplit("/", 1)[1]: file.read() for name, file in files if file is not None}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{source} is damaged: {error}") from error


def _check_md5(content: bytes, expected: str, path: Path) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise UserError(f"{path} is damaged or not the published file: md5 {found}, expected {expected}")


class _PlainDataUnpickler(pickle.Unpickler):
    """Builds containers, numbers, bytes and numpy arrays; a pickle that names anything else is rejected."""

    # The published files were written with an old numpy; the module of this function has moved since.
    _RECONSTRUCT = np.empty(0).__reduce__()[0]
    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self._ALLOWED[module, name]


def _unpickle(content: bytes, name: str) -> dict:
    try:
        return _PlainDataUnpickler(io.BytesIO(content), encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{name} is no plain data file: {error}") from error


def _download(published: Published, folder: Path) -> Path:
    target = folder / published.archive_name
    partial = target.with_suffix(".partial")
    log.info("downloading %s to %s", published.url, target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(published.url, timeout=30) as response:
            content = response.read()
        _check_md5(content, published.md5, target)
        partial.write_bytes(content)
        partial.replace(target)
    except OSError as error:
        raise UserError(f"cannot download {published.url} ({error}); put the file at {target}") from error
    return target
