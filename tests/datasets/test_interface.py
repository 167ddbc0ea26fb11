"""What the loop relies on: order, resume, shards, exact evaluation, held-out images."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from prune_lab.datasets import BatchFormat, describe, load, parse_config
from prune_lab.datasets.base import identity
from prune_lab.datasets.splits import held_out_counts
from prune_lab.foundations.errors import UserError
from tests.helpers.data import CONF, FORMAT, REPO, assert_equal_batches, evaluate, make, node, train

FAKE = {"num_train": 70, "num_test": 37, "num_classes": 5}


@pytest.fixture(scope="module")
def fake():
    return make("fake", **FAKE)


def test_batches_have_stated_shape_type_and_layout():
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (True, False):
            images, labels = train(make("fake", BatchFormat(torch.device("cpu"), dtype, channels_last), **FAKE))[0]
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert images.shape == (16, 3, 32, 32) and images.dtype == dtype
            assert images.is_contiguous(memory_format=layout)
            assert labels.shape == (16,) and labels.dtype == torch.int64


def test_memory_format_changes_no_value():
    contiguous = make("fake", BatchFormat(torch.device("cpu"), torch.float32, False), **FAKE)
    assert_equal_batches(train(make("fake", **FAKE)), train(contiguous))
    assert_equal_batches(evaluate(make("fake", **FAKE)), evaluate(contiguous))


def test_last_partial_batch_is_dropped(fake):
    assert fake.num_batches(16) == 4
    assert len(train(fake)) == 4
    assert len(train(fake, batch_size=70)) == 1


def test_resume_at_a_batch_yields_the_rest_of_the_epoch(fake):
    assert_equal_batches(train(fake, epoch=3, start=2), train(fake, epoch=3)[2:])
    assert train(fake, start=4) == []


def test_shards_of_all_ranks_form_the_batch_of_one_process(fake):
    shards = [train(fake, epoch=1, rank=rank, world_size=4) for rank in range(4)]
    joined = [tuple(torch.cat(parts) for parts in zip(*batch, strict=True)) for batch in zip(*shards, strict=True)]
    assert_equal_batches(joined, train(fake, epoch=1))


def test_epochs_and_seeds_differ_and_repeat(fake):
    assert_equal_batches(train(fake, epoch=1, seed=2), train(fake, epoch=1, seed=2))
    first = train(fake)[0]
    assert not torch.equal(first[0], train(fake, epoch=1)[0][0])
    assert not torch.equal(first[0], train(fake, seed=1)[0][0])


def test_an_epoch_visits_no_image_twice():
    plain = make("fake", **FAKE, augment=False)
    images = torch.cat([images for images, _ in train(plain, batch_size=70)])
    assert len(torch.unique(images.flatten(1), dim=0)) == 70


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("batch_size", [1, 10, 37, 100])
def test_evaluation_covers_every_image_once(fake, world_size, batch_size):
    whole = torch.cat([images for images, _ in evaluate(fake, batch_size=37)])
    ranks = [evaluate(fake, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat([images for batches in ranks for images, _ in batches]), whole)
    assert sum(len(labels) for batches in ranks for _, labels in batches) == 37


def test_crops_are_windows_of_the_padded_image_or_its_mirror():
    options = {"num_train": 1, "num_test": 1, "num_classes": 1, "crop_padding": 2, "mean": [0, 0, 0], "std": [1, 1, 1]}
    plain = train(make("fake", **options, augment=False), batch_size=1)[0][0][0]
    augmented = make("fake", **options)
    canvas = torch.zeros(2, 3, 36, 36)
    canvas[:, :, 2:34, 2:34] = torch.stack([plain, plain.flip(2)])
    windows = {
        canvas[mirrored, :, row : row + 32, column : column + 32].numpy().tobytes(): (mirrored, row, column)
        for mirrored in range(2)
        for row in range(5)
        for column in range(5)
    }
    crops = [train(augmented, epoch=epoch, batch_size=1)[0][0][0] for epoch in range(400)]
    seen = {windows[crop.contiguous().numpy().tobytes()] for crop in crops}
    # 50 equally likely windows: 400 draws miss a given one with probability 3e-4.
    assert len(seen) >= 45
    assert {row for _, row, _ in seen} == {column for _, _, column in seen} == set(range(5))


def test_pixels_are_normalised_per_channel():
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 0.125]
    options = {**FAKE, "augment": False}
    raw = train(make("fake", **options, mean=[0, 0, 0], std=[1, 1, 1]))[0][0]
    assert raw.min() == 0 and raw.max() == 1
    scaled = train(make("fake", **options, mean=mean, std=std))[0][0]
    expected = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=1e-6)


def test_counts_held_out_per_class_follow_largest_remainder():
    # Quotas 1.5, 1.5, 0.6, 0.4: round(4) in total; the third class has the largest remainder, then the first.
    assert held_out_counts([15, 15, 6, 4], 0.1) == [2, 1, 1, 0]
    assert held_out_counts([10, 10], 0.25) == [3, 2]
    assert held_out_counts([5000] * 10, 0.1) == [500] * 10


def test_held_out_images_are_stratified_and_not_trained_on():
    options = {**FAKE, "augment": False, "validation": 0.2}
    split = make("fake", **options)
    assert split.eval_split == "val"
    assert (split.info.num_train, split.info.num_eval) == (56, 14)
    held_out = torch.cat([images for images, _ in evaluate(split, "val")])
    labels = torch.cat([labels for _, labels in evaluate(split, "val")])
    assert torch.bincount(labels).tolist() == [3, 3, 3, 3, 2]
    trained = train(split, batch_size=56)[0][0]
    assert len(torch.unique(torch.cat([held_out, trained]).flatten(1), dim=0)) == 70
    other = make("fake", **options, validation_seed=1)
    assert not torch.equal(torch.cat([images for images, _ in evaluate(other, "val")]), held_out)
    assert_equal_batches(evaluate(split, "test"), evaluate(make("fake", **FAKE), "test"))


def test_held_out_images_are_not_augmented():
    plain, augmented = (make("fake", **FAKE, validation=0.2, augment=augment) for augment in (False, True))
    assert_equal_batches(evaluate(plain, "val"), evaluate(augmented, "val"))


@pytest.mark.parametrize("validation", [0.001, 0.999])
def test_validation_that_leaves_a_side_empty_is_refused(validation):
    with pytest.raises(UserError, match=f"dataset.validation={validation} holds out"):
        make("fake", **FAKE, validation=validation)


def test_wrong_batch_sizes_and_splits_are_refused(fake):
    with pytest.raises(UserError, match=r"schedule.batch_size must lie in \[1, 70\] .* got 71"):
        train(fake, batch_size=71)
    with pytest.raises(UserError, match="multiple of the 3 processes, got 16"):
        train(fake, world_size=3)
    with pytest.raises(UserError, match="no split 'val' .* dataset.validation is 0"):
        evaluate(fake, "val")


def test_digits_are_the_real_ones_in_a_fixed_stratified_split():
    digits = make("digits", augment=False, mean=[0, 0, 0], std=[1, 1, 1])
    assert digits.info == describe(parse_config(node("digits")))
    assert (digits.info.num_train, digits.info.num_eval) == (1438, 359)
    labels = torch.cat([labels for _, labels in evaluate(digits)])
    assert torch.bincount(labels).min() >= 34
    images = evaluate(digits)[0][0]
    assert torch.equal(images[:, 0], images[:, 2])
    # Enlarged by repetition: every 4x4 block is one pixel of the original.
    blocks = images[:, 0].reshape(-1, 8, 4, 8, 4)
    assert torch.equal(blocks, blocks[:, :, :1, :, :1].expand_as(blocks))


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100", "imagenet", "tiny_imagenet", "fake"])
def test_sizes_are_known_without_any_data(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    info = describe(parse_config(node(name, validation=0.1)))
    held_out = {"digits": 144, "cifar10": 5000, "cifar100": 5000, "imagenet": 128117, "tiny_imagenet": 10000}
    assert info.num_eval == held_out.get(name, 51)
    assert info.num_classes == {"cifar100": 100, "imagenet": 1000, "tiny_imagenet": 200}.get(name, 10)


def test_fingerprint_follows_content_and_preparation(fake):
    assert make("fake", **FAKE).fingerprint == fake.fingerprint
    for change in ({"content_seed": 1}, {"validation": 0.2}, {"augment": False}, {"mean": [0, 0, 0]}):
        assert make("fake", **{**FAKE, **change}).fingerprint != fake.fingerprint


def test_identity_leaves_out_paths_and_workers():
    one = identity(parse_config(node("imagenet")))
    other = identity(parse_config(node("imagenet", root="/elsewhere", workers=1, check_counts=False)))
    assert one == other and "root" not in one
    assert identity(parse_config(node("cifar10"))) == identity(parse_config(node("cifar10", cache_dir="x", root="y")))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fake", {"kind": "digit"}, r"dataset.kind=digit is not allowed \(did you mean 'digits'\?\); allowed: digits"),
        ("fake", {"validation": 1.0}, r"dataset.validation must lie in \[0, 1\), got 1.0"),
        ("fake", {"mean": [0.5]}, r"dataset.mean must hold 3 numbers \(one per channel\), got \[0.5\]"),
        ("fake", {"std": [0.5, 0.0, 1]}, r"dataset.std\[1\] must lie in \(0, inf\)"),
        ("fake", {"num_train": 0}, "dataset.num_train must lie in"),
        ("fake", {"augmnt": True}, r"unknown option dataset.augmnt \(did you mean 'augment'\?\)"),
        ("digits", {"image_size": 30}, "dataset.image_size must be a multiple of 8, got 30"),
        ("cifar10", {"archive": "cifar11"}, "dataset.archive=cifar11 is not allowed"),
        ("imagenet", {"min_scale": 0}, r"dataset.min_scale must lie in \(0, 1\], got 0"),
        ("imagenet", {"workers": -1}, "dataset.workers must lie in"),
    ],
)
def test_wrong_options_are_refused_in_one_line(name, change, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_config(node(name, **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_data_set_file_is_complete_and_commented(path):
    config = parse_config(node(path.stem))
    assert config.name == path.stem
    lines = [line for line in path.read_text().splitlines() if line and line != "defaults:"]  # Hydra's own key
    assert lines[0].startswith("# ")
    for above, line in zip(lines, lines[1:], strict=False):
        assert "#" in line or above.startswith("#"), f"no comment: {line}"


def test_options_and_sizes_need_no_torch():
    code = (
        "import sys; from prune_lab.datasets import parse_config, describe\n"
        f"for node in {[node(name) for name in ('digits', 'cifar10', 'imagenet', 'fake')]!r}: "
        "describe(parse_config(node))\n"
        "assert not {'torch', 'torchvision', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


def test_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="needs scikit-learn: pip install scikit-learn"):
        load(parse_config(node("digits")), FORMAT)
