"""Image folders read while training: layouts, counts, image modes, workers, resume, and their error messages."""

from __future__ import annotations

import tarfile
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from prune_lab.datasets import BatchFormat, describe, parse_config
from prune_lab.datasets.image_crops import cut_centre, cut_random, random_box
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.seeding import generator
from tests.helpers.data import (
    FORMAT,
    assert_equal_batches,
    evaluate,
    image_bytes,
    make,
    node,
    shared_data,
    train,
    write_tree,
)

TREE = {"train": {"cat": 6, "dog": 5, "owl": 6}, "val": {"cat": 2, "dog": 3, "owl": 2}}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Noise images of different sizes, so that every crop differs."""
    root = write_tree(tmp_path_factory.mktemp("folder") / "images", TREE)
    random = np.random.default_rng(0)
    for path in root.rglob("*.png"):
        shape = (*random.integers(20, 60, 2), 3)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return root


def folder(root, name="imagefolder", fmt=FORMAT, **overrides):
    return make(name, fmt, **{"root": str(root), "image_size": 24, "workers": 0, **overrides})


def test_classes_and_counts_come_from_the_folders(tree):
    dataset = folder(tree)
    assert (dataset.info.num_classes, dataset.info.num_train, dataset.info.num_eval) == (3, 17, 7)
    assert dataset.info == describe(parse_config(node("imagefolder", root=str(tree), image_size=24)))
    labels = torch.cat([labels for _, labels in evaluate(dataset, batch_size=2)])
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("channels_last", [True, False])
def test_batches_have_stated_shape_type_and_layout(tree, channels_last):
    fmt = BatchFormat(torch.device("cpu"), torch.bfloat16, channels_last)
    for images, labels in (*train(folder(tree, fmt=fmt), batch_size=4), *evaluate(folder(tree, fmt=fmt), batch_size=4)):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert images.dtype == torch.bfloat16 and images.shape == (len(labels), 3, 24, 24)
        assert images.is_contiguous(memory_format=layout) and labels.dtype == torch.int64


def test_workers_change_nothing(tree):
    assert_equal_batches(train(folder(tree), batch_size=4), train(folder(tree, workers=2), batch_size=4))
    assert_equal_batches(evaluate(folder(tree), batch_size=4), evaluate(folder(tree, workers=2), batch_size=4))
    assert folder(tree).fingerprint == folder(tree, workers=2).fingerprint


def test_shards_of_all_ranks_form_the_batch_of_one_process(tree):
    shards = [train(folder(tree), batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    joined = [tuple(torch.cat(parts) for parts in zip(*batch, strict=True)) for batch in zip(*shards, strict=True)]
    assert_equal_batches(joined, train(folder(tree), batch_size=4))


def test_resume_reads_only_the_rest_of_the_epoch(tree, monkeypatch):
    dataset = folder(tree)
    whole = train(dataset, batch_size=4, epoch=1)
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or original(path))
    assert_equal_batches(train(dataset, batch_size=4, epoch=1, start=3), whole[3:])
    assert len(opened) == 4


def test_epochs_crop_differently_and_evaluation_does_not(tree):
    dataset = folder(tree)
    first, second = (train(dataset, batch_size=17, epoch=epoch)[0][0] for epoch in range(2))
    assert first.sum() != second.sum()
    assert_equal_batches(evaluate(dataset), evaluate(dataset))


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_evaluation_covers_every_image_once(tree, world_size):
    dataset = folder(tree)
    whole = torch.cat([images for images, _ in evaluate(dataset)])
    ranks = [evaluate(dataset, batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat([images for batches in ranks for images, _ in batches]), whole)


def test_held_out_images_are_central_crops_of_training_images(tree):
    dataset = folder(tree, validation=0.2, augment=False)
    assert (dataset.eval_split, dataset.info.num_train, dataset.info.num_eval) == ("val", 14, 3)
    images, labels = evaluate(dataset, "val")[0]
    held_out = images[labels.argsort()], labels.sort().values
    assert held_out[1].tolist() == [0, 1, 2]
    trained = train(dataset, batch_size=14)[0][0]
    every = torch.cat([held_out[0], trained]).flatten(1)
    assert len(torch.unique(every, dim=0)) == 17
    assert sum(len(labels) for _, labels in evaluate(dataset, "test")) == 7


def test_fingerprint_follows_the_files(tmp_path):
    root = write_tree(tmp_path / "images", TREE)
    before = folder(root).fingerprint
    (root / "train" / "cat" / "000.png").rename(root / "train" / "cat" / "a.png")
    renamed = folder(root).fingerprint
    (root / "train" / "cat" / "a.png").write_bytes(image_bytes(3, size=40))
    assert len({before, renamed, folder(root).fingerprint}) == 3
    assert folder(root.rename(tmp_path / "moved")).fingerprint == folder(tmp_path / "moved").fingerprint


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG"), ("I;16", "PNG")]
)
def test_every_image_mode_becomes_rgb(tmp_path, mode, kind):
    root = write_tree(tmp_path / "images", {"train": {"a": 1, "b": 1}, "val": {"a": 1, "b": 1}})
    image = Image.new("RGB", (30, 40), (9, 9, 9))
    image = Image.new(mode, (30, 40), 9) if mode == "I;16" else image.convert(mode)
    image.save(root / "train" / "a" / "000.png", format=kind)
    images, _ = train(folder(root), batch_size=2)[0]
    assert images.shape == (2, 3, 24, 24) and images.isfinite().all()


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_named(tmp_path, workers):
    root = write_tree(tmp_path / "images", TREE)
    path = root / "train" / "dog" / "002.png"
    path.write_bytes(path.read_bytes()[:50])
    with (
        closing(folder(root, workers=workers)) as dataset,
        pytest.raises(UserError, match="train/dog/002.png is not a readable image: .+") as caught,
    ):
        train(dataset, batch_size=17)
    assert "\n" not in str(caught.value)


def test_tiny_imagenet_is_read_as_published(tmp_path):
    root = write_tree(tmp_path / "tiny", {"train": {"n01/images": 2, "n02/images": 2}, "val": {"images": 3}})
    (root / "test" / "images").mkdir(parents=True)
    (root / "val" / "val_annotations.txt").write_text(
        "000.png\tn02\t0\t0\t9\t9\n001.png\tn01\t0\t0\t9\t9\n002.png\tn02\t0\t0\t9\t9\n"
    )
    counts = {"num_classes": 2, "expect_train": 4, "expect_test": 3}
    dataset = folder(root, "tiny_imagenet", **counts, crop_ratio=1.0, mean=[0, 0, 0], std=[1, 1, 1])
    images, labels = evaluate(dataset)[0]
    pixels = (images[:, 0, 0, 0] * 255).round().tolist()
    assert sorted(zip(labels.tolist(), pixels, strict=True)) == [(0, 42), (1, 35), (1, 49)]
    (root / "val" / "val_annotations.txt").write_text("000.png\tn02\n")
    with pytest.raises(UserError, match="val_annotations.txt does not name the class of .*00[12].png"):
        folder(root, "tiny_imagenet", **counts)


def test_test_folder_is_preferred_and_can_be_chosen(tmp_path):
    root = write_tree(tmp_path / "images", {**TREE, "test": {"cat": 1, "dog": 1, "owl": 1}})
    assert folder(root).info.num_eval == 3
    assert folder(root, test_folder="val").info.num_eval == 7
    with pytest.raises(UserError, match="holds no folder holdout"):
        folder(root, test_folder="holdout")


@pytest.mark.parametrize(
    ("tree_counts", "change", "message"),
    [
        ({}, {}, "holds no folder train; expected layout: train/CLASS/.* and val/CLASS/.*dataset.root=/path/to/folder"),
        ({"train": {"a": 1}}, {}, "holds no folder val"),
        ({"train": {"a": 1}, "val": {"a": 1, "b": 1}}, {}, "val holds the class b, which .*train does not"),
        ({"train": {"a": 1, "b": 0}, "val": {"a": 1}}, {}, "the class folder .*train/b holds no image"),
        ({"train": {"a": 1, "b": 1}, "val": {"a": 1}}, {}, "val holds 1 of the 2 classes; for a subset: .*=false"),
        ({"train": {"a": 1}, "val": {"a": 0}}, {}, "val holds no image; expected layout"),
        (TREE, {"num_classes": 1000}, "holds 3 classes, but dataset.num_classes is 1000; .*dataset.num_classes=3"),
        (TREE, {"expect_train": 1281167}, "train holds 17 images, but dataset.expect_train is 1281167; .*check_counts"),
        (TREE, {"expect_test": 50000}, "val holds 7 images, but dataset.expect_test is 50000"),
    ],
)
def test_wrong_layouts_and_counts_are_refused(tmp_path, tree_counts, change, message):
    root = write_tree(tmp_path / "images", tree_counts)
    overrides = {"num_classes": None, "expect_train": None, "expect_test": None, **change}
    with pytest.raises(UserError, match=message) as caught:
        folder(root, "imagenet", **overrides)
    assert "\n" not in str(caught.value)


def test_flat_validation_folder_must_be_sorted(tmp_path):
    root = write_tree(tmp_path / "images", {"train": {"a": 1}})
    (root / "val").mkdir()
    (root / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(image_bytes(1))
    with pytest.raises(UserError, match="val holds images without class folders .*; sort them into .*val/CLASS/"):
        folder(root, "imagenet")


def test_archive_must_be_unpacked(tmp_path):
    (tmp_path / "images.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"images.tar is a file \(unpack it first\); expected layout"):
        folder(tmp_path / "images.tar")


def test_subset_is_allowed_when_asked_for(tmp_path):
    root = write_tree(tmp_path / "images", {"train": {"a": 2, "b": 1}, "val": {"a": 1}})
    dataset = folder(root, "imagenet", num_classes=2, check_counts=False)
    assert (dataset.info.num_train, dataset.info.num_eval) == (3, 1)


def test_sizes_without_images_must_be_stated(tmp_path):
    absent = {"root": str(tmp_path / "absent")}
    with pytest.raises(UserError, match="holds no folder train.*state dataset.num_classes, dataset.expect_train"):
        describe(parse_config(node("imagefolder", **absent)))
    stated = {"num_classes": 5, "expect_train": 100, "expect_test": 10, "check_counts": False}
    info = describe(parse_config(node("imagefolder", **absent, **stated)))
    assert (info.num_classes, info.num_train, info.num_eval) == (5, 100, 10)


def test_central_crop_follows_the_ratio():
    # 512 x 256 with ratio 0.5 and size 64: resized to 256 x 128, the middle 64 x 64 of it is kept.
    ramp = np.broadcast_to(np.arange(512)[None, :, None] // 2, (256, 512, 3)).astype(np.uint8)
    crop = cut_centre(Image.fromarray(ramp), 64, ratio=0.5)
    assert crop.shape == (64, 64, 3)
    np.testing.assert_allclose(crop[0, :, 0], np.arange(96, 160), atol=1)


def test_random_boxes_lie_inside_and_cover_the_allowed_areas():
    areas = []
    for i in range(500):
        draws = torch.rand(40, generator=generator(0, i), dtype=torch.float64).tolist()
        left, top, width, height = random_box(100, 80, min_scale=0.25, draws=draws)
        assert 0 <= left and left + width <= 100 and 0 <= top and top + height <= 80
        assert 0.7 < width / height < 1.4
        areas.append(width * height / 8000)
    assert 0.23 < min(areas) < 0.3 and max(areas) > 0.9


def test_box_that_never_fits_falls_back_to_the_centre():
    # 100 x 10 has no part of ratio <= 4/3 with 90 % of its area: the largest allowed central box is 13 x 10.
    assert random_box(100, 10, min_scale=0.9, draws=[0.5] * 40) == (43, 0, 13, 10)


def test_random_crop_mirrors_half_of_the_images():
    ramp = Image.fromarray(np.broadcast_to(np.arange(64)[None, :, None] * 4, (64, 64, 3)).astype(np.uint8))
    crops = [cut_random(ramp, 16, min_scale=1.0, flip=True, source=generator(0, i)) for i in range(200)]
    num_mirrored = sum(crop[0, 0, 0] > crop[0, -1, 0] for crop in crops)
    assert 70 < num_mirrored < 130
    for i in range(20):
        crop = cut_random(ramp, 16, min_scale=1.0, flip=False, source=generator(0, i))
        assert crop[0, 0, 0] < crop[0, -1, 0]


def test_real_imagenet_images(tmp_path):
    sample = shared_data() / "imagenet-sample.tar"
    if not sample.exists():
        pytest.skip(f"needs {sample.name} under PRUNE_LAB_TEST_DATA/data")
    with tarfile.open(sample) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "val").symlink_to(tmp_path / "train")
    options = {"root": str(tmp_path), "workers": 2, "mean": [0, 0, 0], "std": [1, 1, 1]}
    with pytest.raises(UserError, match="holds 250 classes, but dataset.num_classes is 1000"):
        make("imagenet", **options)
    with pytest.raises(UserError, match="train holds 250 images, but dataset.expect_train is 1281167"):
        make("imagenet", **options, num_classes=250)
    dataset = make("imagenet", **options, num_classes=250, check_counts=False)
    batches = evaluate(dataset, batch_size=64)
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(250))
    order = torch.cat([labels for _, labels in batches]).argsort()
    images = torch.cat([images for images, _ in batches])[order]
    assert images.shape == (250, 3, 224, 224)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor([0.485, 0.456, 0.406]), atol=0.05, rtol=0)
    modes = [Image.open(path).mode for path in sorted((tmp_path / "train").glob("*/*"))]
    is_grey = torch.tensor([mode == "L" for mode in modes])
    assert is_grey.any()
    assert torch.equal(images[is_grey, 0], images[is_grey, 2])
    ((images, _),) = train(dataset, batch_size=128)
    assert images.shape == (128, 3, 224, 224)
