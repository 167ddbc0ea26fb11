"""CIFAR from published files, folders and tars of images; the cache of decoded arrays; every error message."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from prune_lab.datasets import cifar, cifar_files, image_files, parse_config
from prune_lab.foundations.errors import UserError
from tests.helpers.data import (
    evaluate,
    image_bytes,
    make,
    node,
    published_files,
    shared_data,
    small_cifar,
    tar_bytes,
    train,
    write_tree,
)

TREE = {"train": {"cat": 2, "dog": 3}, "test": {"cat": 1, "dog": 2}}


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "images", TREE)


def read(**overrides):
    return cifar.read(parse_config(node("cifar10", **overrides)))


def tree_files(tree) -> dict[str, bytes]:
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*.png")}


def publish(monkeypatch, files: dict[str, bytes]) -> bytes:
    """Make `files` the published ones; returns their tar.gz."""
    archive = tar_bytes({f"cifar-10-batches-py/{name}": content for name, content in files.items()}, "w:gz")
    old = cifar_files.PUBLISHED["cifar10"]

    def md5(names):
        return {name: hashlib.md5(files[name]).hexdigest() for name in names}

    new = replace(
        old, md5=hashlib.md5(archive).hexdigest(), train=md5(old.train), test=md5(old.test), meta=md5(old.meta)
    )
    monkeypatch.setitem(cifar_files.PUBLISHED, "cifar10", new)
    return archive


def test_folder_is_decoded_in_sorted_order(tmp_path, tree):
    arrays = read(**small_cifar(tmp_path, tree))
    assert arrays.train_labels.tolist() == [0, 0, 1, 1, 1]
    assert arrays.train_images[:, 0, 0, 0].tolist() == [7, 14, 21, 28, 35]
    assert arrays.test_images.shape == (3, 32, 32, 3)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
@pytest.mark.parametrize("prefix", ["", "some/folder/", "./"])
def test_tar_holds_what_the_folder_holds(tmp_path, tree, suffix, prefix):
    archive = tmp_path / f"cifar.tar{suffix}"
    files = {prefix + name: content for name, content in tree_files(tree).items()}
    archive.write_bytes(tar_bytes(files | {"README.txt": b"hello"}, f"w:{suffix[1:]}"))
    from_tar, from_folder = (read(**small_cifar(tmp_path, root)) for root in (archive, tree))
    assert from_tar.content_hash == from_folder.content_hash
    assert np.array_equal(from_tar.train_images, from_folder.train_images)


def test_published_folder_and_archive_are_read(tmp_path, monkeypatch):
    files = published_files()
    archive = publish(monkeypatch, files)
    folder = tmp_path / "a" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    packed = tmp_path / "b" / "cifar-10-python.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(archive)
    for root in (folder, folder.parent, packed, packed.parent):
        arrays = read(**small_cifar(tmp_path, root))
        assert arrays.train_labels.tolist() == [0, 1, 0, 1, 0]
        assert arrays.train_images[:, 5, 5].tolist() == [[10 * i + 1, 10 * i, 10 * i] for i in range(5)]
        assert arrays.test_labels.tolist() == [1, 0, 1]


def test_damaged_published_files_are_named(tmp_path, monkeypatch):
    files = published_files()
    archive = publish(monkeypatch, files)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "data_batch_3").write_bytes(files["data_batch_3"][:-1] + b"x")
    with pytest.raises(UserError, match="data_batch_3 is damaged or not the published file: md5 .* expected"):
        read(**small_cifar(tmp_path, folder))
    (folder / "data_batch_3").unlink()
    with pytest.raises(UserError, match="holds no file data_batch_3; expected: data_batch_1"):
        read(**small_cifar(tmp_path, folder))
    packed = tmp_path / "cifar-10-python.tar.gz"
    packed.write_bytes(archive[:-100])
    with pytest.raises(UserError, match="cifar-10-python.tar.gz is damaged"):
        read(**small_cifar(tmp_path, packed))


class Malicious:
    def __reduce__(self):
        return os.system, ("echo never",)


@pytest.mark.parametrize("payload", [Malicious(), {b"label_names": [np.array([Malicious()], dtype=object)]}])
def test_pickle_that_names_code_is_refused(tmp_path, monkeypatch, payload):
    packed = tmp_path / "cifar-10-python.tar.gz"
    packed.write_bytes(publish(monkeypatch, published_files(payload=payload)))
    with pytest.raises(UserError, match=r"batches.meta is no plain data file: it asks for \w+.system"):
        read(**small_cifar(tmp_path, packed))


def test_old_numpy_pickles_are_read():
    content = pickle.dumps({b"data": np.arange(3, dtype=np.uint8)}, protocol=4)
    old = content.replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray")
    # The frame length in bytes 3 to 10 must follow the change.
    shift = len(content) - len(old)
    old = old[:3] + (int.from_bytes(old[3:11], "little") - shift).to_bytes(8, "little") + old[11:]
    assert cifar_files._unpickle(old, "old")[b"data"].tolist() == [0, 1, 2]


def test_nothing_at_root_ends_with_what_to_do(tmp_path):
    with pytest.raises(UserError) as caught:
        read(**small_cifar(tmp_path, tmp_path / "absent"))
    message = str(caught.value)
    for part in ("absent holds no cifar10", "dataset.download=true", "root=/path/to/cifar10.tar.xz", "train/CLASS"):
        assert part in message
    assert "\n" not in message


def test_download_is_checked_and_kept(tmp_path, monkeypatch):
    archive = publish(monkeypatch, published_files())
    served = tmp_path / "served" / "cifar-10-python.tar.gz"
    served.parent.mkdir()
    served.write_bytes(archive)
    local = replace(cifar_files.PUBLISHED["cifar10"], url=served.as_uri())
    monkeypatch.setitem(cifar_files.PUBLISHED, "cifar10", local)
    root = tmp_path / "data"
    assert len(read(**small_cifar(tmp_path, root, download=True)).train_labels) == 5
    served.unlink()
    assert len(read(**small_cifar(tmp_path, root)).train_labels) == 5
    with pytest.raises(UserError, match=r"cannot download file:.*put the file at .*other/cifar-10-python.tar.gz"):
        read(**small_cifar(tmp_path, tmp_path / "other", download=True))
    served.write_bytes(b"an error page")
    with pytest.raises(UserError, match="damaged or not the published file"):
        read(**small_cifar(tmp_path, tmp_path / "other", download=True))
    assert not list((tmp_path / "other").iterdir())


def test_broken_image_is_named(tmp_path, tree):
    (tree / "train" / "dog" / "001.png").write_bytes(image_bytes(1)[:60])
    with pytest.raises(UserError, match="train/dog/001.png is not a readable image") as caught:
        read(**small_cifar(tmp_path, tree))
    assert "\n" not in str(caught.value)


def test_image_of_another_size_is_named(tmp_path, tree):
    (tree / "test" / "cat" / "000.png").write_bytes(image_bytes(1, size=28))
    with pytest.raises(UserError, match=r"test/cat/000.png must be 32x32 pixels .* got 28x28"):
        read(**small_cifar(tmp_path, tree))


def test_grey_and_palette_images_become_rgb(tmp_path, tree):
    for i, mode in enumerate(("L", "P", "RGBA")):
        (tree / "train" / "dog" / f"{i:03}.png").write_bytes(image_bytes(9, mode=mode))
    assert read(**small_cifar(tmp_path, tree)).train_images.shape == (5, 32, 32, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train": 6}, "holds num_train = 5, but dataset.num_train is 6; expected layout: train/CLASS"),
        ({"num_test": 2}, "holds num_test = 3, but dataset.num_test is 2"),
        ({"num_classes": 10}, "holds num_classes = 2, but dataset.num_classes is 10"),
    ],
)
def test_wrong_counts_are_refused(tmp_path, tree, change, message):
    with pytest.raises(UserError, match=message):
        read(**small_cifar(tmp_path, tree, **change))


def test_splits_with_different_classes_are_refused(tmp_path):
    tree = write_tree(tmp_path / "images", {"train": {"cat": 1, "dog": 1}, "test": {"cat": 1}})
    with pytest.raises(UserError, match="same classes in train and test, got 2 classes in train and 1 in test"):
        read(**small_cifar(tmp_path, tree))


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_truncated_tar_is_refused(tmp_path, tree, suffix):
    archive = tmp_path / f"cifar.tar{suffix}"
    whole = tar_bytes(tree_files(tree), f"w:{suffix[1:]}")
    archive.write_bytes(whole[: len(whole) // 3])
    # A plain tar cut between two files looks complete; then the counts tell.
    with pytest.raises(UserError, match="cifar.tar.*(is damaged or no tar|a tar that is not cut short)") as caught:
        read(**small_cifar(tmp_path, archive))
    assert "\n" not in str(caught.value)


def test_file_that_is_no_tar_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="notes.txt is damaged or no tar of images"):
        read(**small_cifar(tmp_path, tmp_path / "notes.txt"))


def count_decoding(monkeypatch) -> list:
    calls = []
    original = image_files.decode_folder_or_tar
    monkeypatch.setattr(
        image_files, "decode_folder_or_tar", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    return calls


def test_images_are_decoded_once_and_again_after_a_change(tmp_path, tree, monkeypatch):
    calls = count_decoding(monkeypatch)
    first = read(**small_cifar(tmp_path, tree))
    assert read(**small_cifar(tmp_path, tree)).content_hash == first.content_hash
    assert len(calls) == 1
    (tree / "train" / "cat" / "000.png").write_bytes(image_bytes(200))
    assert read(**small_cifar(tmp_path, tree)).content_hash != first.content_hash
    assert len(calls) == 2


def flip_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: flip_last_byte(entry / "train_images.npy"),
        lambda entry: (entry / "test_images.npy").write_bytes((entry / "test_images.npy").read_bytes()[:-9]),
        lambda entry: (entry / "train_labels.npy").unlink(),
        lambda entry: (entry / "meta.json").write_text("{"),
        lambda entry: (entry / "meta.json").write_text("{}"),
        lambda entry: (entry / "meta.json").write_text(
            json.dumps({"classes": None, "sha256": json.loads((entry / "meta.json").read_text())["sha256"]})
        ),
    ],
)
def test_damaged_cache_is_reported_and_rebuilt(tmp_path, tree, damage, monkeypatch, caplog):
    calls = count_decoding(monkeypatch)
    first = read(**small_cifar(tmp_path, tree))
    expected = np.array(first.train_images)
    (entry,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    damage(entry)
    again = read(**small_cifar(tmp_path, tree))
    assert len(calls) == 2 and "damaged" in caplog.text
    assert np.array_equal(again.train_images, expected) and again.content_hash == first.content_hash


def test_killed_writer_leaves_no_entry(tmp_path, tree, monkeypatch):
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        read(**small_cifar(tmp_path, tree))
    monkeypatch.undo()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(read(**small_cifar(tmp_path, tree)).train_labels) == 5
    assert not list((tmp_path / "cache").glob("*.tmp"))


def _read_in_process(overrides, queue):
    queue.put(read(**overrides).content_hash)


def test_two_processes_at_once_get_the_same_arrays(tmp_path, tree):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    overrides = small_cifar(tmp_path, tree)
    workers = [context.Process(target=_read_in_process, args=(overrides, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    hashes = {queue.get(timeout=30) for _ in workers}
    for worker in workers:
        worker.join()
    assert hashes == {read(**overrides).content_hash}


def test_cache_dir_that_cannot_be_written_is_named(tmp_path, tree):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="dataset.cache_dir: cannot write .*file"):
        read(**small_cifar(tmp_path, tree, cache_dir=str(tmp_path / "file" / "cache")))


def test_cache_dir_follows_the_environment(monkeypatch):
    monkeypatch.setenv("PRUNE_LAB_CACHE", "/somewhere")
    assert node("cifar10")["cache_dir"] == "/somewhere"
    monkeypatch.delenv("PRUNE_LAB_CACHE")
    assert node("cifar100")["cache_dir"] == "~/.cache/prune_lab"


def test_batches_come_from_the_decoded_images(tmp_path, tree):
    options = {"augment": False, "mean": [0, 0, 0], "std": [1, 1, 1]}
    dataset = make("cifar10", **small_cifar(tmp_path, tree), **options)
    ((images, labels),) = train(dataset, batch_size=5)
    order = torch.argsort(images[:, 0, 0, 0])
    torch.testing.assert_close(images[order, 0, 0, 0] * 255, torch.tensor([7.0, 14, 21, 28, 35]))
    assert labels[order].tolist() == [0, 0, 1, 1, 1]
    assert len(evaluate(dataset)[0][1]) == 3


@pytest.mark.slow
def test_real_tar_of_60000_images(tmp_path, monkeypatch):
    root = shared_data() / "cifar10-jpeg.tar.xz"
    if not root.exists():
        pytest.skip(f"needs {root.name} under PRUNE_LAB_TEST_DATA/data")
    calls = count_decoding(monkeypatch)
    for _ in range(2):
        arrays = read(root=str(root), cache_dir=str(tmp_path))
    assert len(calls) == 1
    assert np.bincount(arrays.train_labels).tolist() == [5000] * 10
    assert np.bincount(arrays.test_labels).tolist() == [1000] * 10
    mean = np.array(arrays.train_images).mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=0.002)
