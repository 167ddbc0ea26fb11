"""Resized copies of an image folder: what is cut from them, one writer, damage, killed writers, full disks."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prune_lab.datasets import describe, parse_config
from prune_lab.datasets.base import identity
from prune_lab.datasets.folder_listing import list_splits
from prune_lab.datasets.image_crops import random_box, read_rgb, resize
from prune_lab.datasets.resized_images import open_resized
from prune_lab.foundations.errors import UserError
from tests.helpers.data import FORMAT, REPO, assert_equal_batches, evaluate, make, node, train, write_tree

TREE = {"train": {"cat": 6, "dog": 5}, "val": {"cat": 2, "dog": 3}}
SIDE = 32
"""of the copies; evaluation resizes to it as well: image_size 28 / crop_ratio 0.875"""


@pytest.fixture
def tree(tmp_path):
    """Noise images, some smaller than SIDE, one grey."""
    root = write_tree(tmp_path / "images", TREE)
    random = np.random.default_rng(0)
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        height, width = random.integers(20, 30, 2) if i % 4 == 0 else random.integers(33, 90, 2)
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        (image.convert("L") if i == 1 else image).save(path)
    return root


def options(root: Path, **overrides) -> dict:
    size = {"image_size": 28, "workers": 0, "cached_side": SIDE}
    return {"root": str(root), "cache_dir": str(root.parent / "cache"), **size, **overrides}


def cached(root: Path, **overrides):
    return make("imagefolder", FORMAT, **options(root, **overrides))


def copies(root: Path, **overrides):
    """Return (listing, resized images) of the training split."""
    listing = list_splits(parse_config(node("imagefolder", **options(root))))[0]
    place = {"side": SIDE, "cache_dir": root.parent / "cache", "name": "x", "workers": 0}
    return listing, open_resized(listing, **place | overrides)


def entry(root: Path, beginning: str = "") -> Path:
    (found,) = [path for path in (root.parent / "cache").glob(f"{beginning}*") if path.is_dir()]
    return found


def test_copies_are_pillows_resized_images_and_small_images_stay_as_they_are(tree):
    listing, images = copies(tree)
    num_small = 0
    for i in range(len(listing.labels)):
        whole = read_rgb(listing.path(i))
        if min(whole.size) <= SIDE:
            num_small += 1
            expected = np.asarray(whole)
        else:
            longer = round(max(whole.size) * SIDE / min(whole.size))
            shape = (SIDE, longer) if whole.width < whole.height else (longer, SIDE)
            expected = np.asarray(whole.resize(shape, Image.Resampling.BILINEAR))
        assert np.array_equal(images[i], expected)
    assert 0 < num_small < len(listing.labels)


def test_evaluation_sees_the_same_pixels_if_it_resizes_to_the_same_side(tree):
    with_copies = evaluate(cached(tree), batch_size=5)
    without = evaluate(cached(tree, cached_side=None), batch_size=5)
    listing = list_splits(parse_config(node("imagefolder", **options(tree))))[1]
    is_large = [min(read_rgb(listing.path(i)).size) >= SIDE for i in range(5)]
    ((images, labels),), ((plain, plain_labels),) = with_copies, without
    assert torch.equal(labels, plain_labels)
    # Enlarging small images is left to torch's kernel, which rounds differently: one level in 255, over std.
    assert (images - plain).abs().max() < 1.01 / 255 / 0.224
    assert sum(torch.equal(a, b) for a, b in zip(images, plain, strict=True)) >= sum(is_large) > 0


def test_crops_of_arrays_are_pillows_within_one_level():
    random = np.random.default_rng(1)
    for i in range(20):
        pixels = random.integers(0, 256, (*random.integers(30, 120, 2), 3), dtype=np.uint8)
        draws = random.random(40).tolist()
        left, top, width, height = random_box(*pixels.shape[1::-1], min_scale=0.08, draws=draws)
        box = (left, top, left + width, top + height)
        expected = np.asarray(Image.fromarray(pixels).crop(box).resize((24, 24), Image.Resampling.BILINEAR))
        found = resize(pixels, 24, 24, box=box)
        assert np.abs(found.astype(int) - expected).max() <= 1, i


def test_training_draws_the_same_boxes_and_flips_whatever_the_number_of_workers(tree):
    first, second = train(cached(tree), batch_size=4, epoch=2), train(cached(tree, workers=2), batch_size=4, epoch=2)
    assert_equal_batches(first, second)
    plain = train(cached(tree, cached_side=None), batch_size=4, epoch=2)
    for (images, labels), (others, other_labels) in zip(first, plain, strict=True):
        assert torch.equal(labels, other_labels) and not torch.equal(images, others)


def test_crops_of_smooth_images_are_close_to_those_of_the_files(tmp_path):
    """The boxes are drawn in fractions of the image: a ramp looks alike from the file and from the copy."""
    root = write_tree(tmp_path / "images", {"train": {"a": 2, "b": 2}, "val": {"a": 1, "b": 1}})
    ramp = np.add.outer(np.arange(128), np.arange(160))[..., None].repeat(3, axis=2) * 255 // 286
    for path in root.rglob("*.png"):
        Image.fromarray(ramp.astype(np.uint8)).save(path)
    plain_pixels = {"mean": [0, 0, 0], "std": [1, 1, 1], "min_scale": 0.5}
    ((images, _),) = train(cached(root, **plain_pixels, cached_side=64), batch_size=4)
    ((others, _),) = train(cached(root, **plain_pixels, cached_side=None), batch_size=4)
    assert (images - others).abs().max() < 6 / 255


def test_copies_are_made_once_and_follow_the_files(tree, capfd):
    first = train(cached(tree), batch_size=4)
    line = r"11 images at dataset.cached_side=32 take 0.00 GB \(.* are free\): resizing them once into .*-train-32px-"
    assert re.search(line, capfd.readouterr().err)
    assert_equal_batches(first, train(cached(tree), batch_size=4))
    assert capfd.readouterr().err == ""
    copies(tree, name="moved")
    shutil.move(tree, tree.parent / "elsewhere")
    copies(tree.parent / "elsewhere", name="moved")
    capfd.readouterr()
    os.utime(next((tree.parent / "elsewhere").rglob("*.png")), (1, 1))
    cached(tree.parent / "elsewhere")
    assert capfd.readouterr().err.count("resizing them once") == 1


def test_the_option_counts_and_where_copies_lie_does_not(tree):
    one, other, off = (parse_config(node("imagefolder", **options(tree, cached_side=side))) for side in (32, 64, None))
    assert len({json.dumps(identity(config), sort_keys=True) for config in (one, other, off)}) == 3
    assert "cache_dir" not in identity(one)
    elsewhere = cached(tree, cache_dir=str(tree.parent / "other"))
    assert elsewhere.fingerprint == cached(tree).fingerprint != cached(tree, cached_side=None).fingerprint
    assert describe(one) == describe(off)


def test_a_side_below_what_evaluation_needs_is_refused():
    message = r"dataset.cached_side must be null or at least 256 \(image_size / crop_ratio, .*\), got 255"
    with pytest.raises(UserError, match=message):
        parse_config(node("imagenet", cached_side=255))
    assert parse_config(node("imagenet", cached_side=256)).cached_side == 256


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_named_and_nothing_is_left(tree, workers):
    path = tree / "train" / "dog" / "002.png"
    path.write_bytes(path.read_bytes()[:200])  # the header is whole
    with pytest.raises(UserError, match="train/dog/002.png is not a readable image: .+") as caught:
        cached(tree, workers=workers)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tree.parent / "cache").iterdir() if path.is_dir()]
    path.write_bytes(b"no image")
    with pytest.raises(UserError, match="train/dog/002.png is not a readable image"):
        cached(tree, workers=workers)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_decoded(tree, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2000, 1000, 1000))
    with pytest.raises(UserError, match=r"11 images at .*=32 take 0.00 GB, but dataset.cache_dir=.* has 0.00 GB"):
        cached(tree)
    monkeypatch.undo()
    cached(tree)


def test_a_cache_that_cannot_be_written_is_named(tree):
    (tree.parent / "file").write_text("")
    with pytest.raises(UserError, match="dataset.cache_dir: cannot write .*file"):
        cached(tree, cache_dir=str(tree.parent / "file"))


def cut_short(folder: Path) -> None:
    os.truncate(folder / "pixels.bin", (folder / "pixels.bin").stat().st_size - 1)


def change_pixels(folder: Path) -> None:
    with open(folder / "pixels.bin", "rb+") as file:
        file.write(b"\0" * 100)


def change_index(folder: Path) -> None:
    index = np.load(folder / "index.npy")
    index[0, 1] += 1
    np.save(folder / "index.npy", index)


@pytest.mark.parametrize("damage", [
    cut_short, change_pixels, change_index, lambda folder: (folder / "meta.json").write_text("{"),
    lambda folder: (folder / "index.npy").write_bytes(b""), lambda folder: (folder / "pixels.bin").unlink(),
])  # fmt: skip
def test_damaged_copies_are_made_again(tree, damage, caplog):
    listing, images = copies(tree)
    before = [images[i].copy() for i in range(len(listing.labels))]
    damage(entry(tree))
    _, again = copies(tree)
    assert "are damaged" in caplog.text
    assert all(np.array_equal(again[i], pixels) for i, pixels in enumerate(before))


def test_copies_reach_other_processes_as_a_path(tree):
    _, images = copies(tree)
    expected = images[3]
    content = pickle.dumps(images)
    assert len(content) < 2000
    assert np.array_equal(pickle.loads(content)[3], expected)


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.helpers.data import make
from prune_lab.datasets import resized_images
slow = resized_images.resize
def resize(*arguments):
    time.sleep(float(sys.argv[1]))
    return slow(*arguments)
resized_images.resize = resize
make("imagefolder", **{options!r})
"""


def start(root: Path, delay: float, **overrides) -> subprocess.Popen:
    script = SCRIPT.format(tests=str(REPO), options=options(root, **overrides))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(delay)], cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_of_two_processes_one_writes_and_the_other_waits(tree):
    messages = "".join(process.communicate(timeout=120)[1] for process in [start(tree, 0.05) for _ in range(2)])
    assert messages.count("images at dataset.cached_side") == messages.count("resizing them once") == 2, messages
    assert len(messages.splitlines()) == 2  # one for each split, and no traceback


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])  # workers notice within seconds
def test_killed_writer_leaves_no_entry_and_no_lock(tree, workers):
    process = start(tree, 0.5, workers=workers)
    for line in process.stderr:
        if "resizing them once" in line:
            break
    time.sleep(0.7)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = [path.suffix for path in (tree.parent / "cache").iterdir() if path.is_dir()]
    assert left == [".tmp"]
    with_copies = train(cached(tree), batch_size=4)  # waits until the killed process's workers have noticed
    assert all(path.suffix != ".tmp" for path in (tree.parent / "cache").iterdir())
    shutil.rmtree(tree.parent / "cache")
    assert_equal_batches(with_copies, train(cached(tree), batch_size=4))
