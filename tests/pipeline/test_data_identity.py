"""Two data sets under the same options are two runs; a dry run names the directory that the run will have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prune_lab import datasets
from prune_lab.cli import command as cli
from prune_lab.pipeline import dry_run
from tests.helpers.folder_runs import FOLDER, OPTIONS, write_images
from tests.helpers.runs import TINY, compose, execute, run_dir, summary


def dry_directory(folder: Path, *overrides: str) -> str:
    """Return the name of the directory that a dry run into the empty `folder` names."""
    assert dry_run.dry_run(compose(*overrides, f"output_dir={folder}", "dry_run=true")) == 0
    (path,) = folder.glob("*/dry_run.json")
    shutil.rmtree(folder)
    return path.parent.name


def test_a_sweep_over_two_folders_finishes_two_runs(tmp_path, capsys):
    roots = [write_images(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    (roots[1] / "train" / "dog" / "extra.png").write_bytes((roots[1] / "train" / "dog" / "0.png").read_bytes())
    chosen = f"dataset.root={roots[0]},{roots[1]}"
    assert cli.main(["-m", *FOLDER, chosen, f"output_dir={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "sweep: 2 of 2 runs finished" in printed
    assert "16 training and 4 test images of 2 classes" in printed
    assert "17 training and 4 test images of 2 classes" in printed
    found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/summary.json")]
    assert sorted(flat["data/num_train"] for flat in found) == [16, 17]
    assert {(flat["data/num_test"], flat["data/num_classes"]) for flat in found} == {(4, 2)}
    assert len({flat["data/content"] for flat in found}) == 2
    names = {dry_directory(tmp_path / "dry", *FOLDER, f"dataset.root={root}") for root in roots}
    assert names == {path.parent.name for path in (tmp_path / "out").glob("*/summary.json")}


def test_another_image_makes_another_run_and_the_old_one_stays_done(tmp_path, capsys):
    root, out = write_images(tmp_path / "images", seed=0), tmp_path / "out"
    options = (*FOLDER, f"dataset.root={root}")
    assert execute(out, *options) == 0
    first = run_dir(out)
    extra = root / "train" / "cat" / "new.png"
    extra.write_bytes((root / "train" / "cat" / "1.png").read_bytes())
    assert execute(out, *options) == 0
    (second,) = {path.parent for path in out.glob("*/run.json")} - {first}
    assert json.loads((second / "summary.json").read_text())["data/num_train"] == 17
    extra.unlink()
    moved = root.rename(tmp_path / "moved")
    capsys.readouterr()
    assert execute(out, *FOLDER, f"dataset.root={moved}") == 0
    assert f"done already: {first}" in capsys.readouterr().out


def test_a_dry_run_needs_no_data(tmp_path):
    stated = ("dataset.num_classes=2", "dataset.expect_train=16", "dataset.expect_test=4")
    absent = dry_directory(tmp_path / "dry", *FOLDER, *stated, f"dataset.root={tmp_path / 'absent'}")
    root = write_images(tmp_path / "images", seed=0)
    there = dry_directory(tmp_path / "dry", *FOLDER, *stated, f"dataset.root={root}")
    assert execute(tmp_path / "out", *FOLDER, *stated, f"dataset.root={root}") == 0
    assert there == run_dir(tmp_path / "out").name != absent


def test_copies_in_smaller_size_do_not_change_the_directory(tmp_path):
    root = write_images(tmp_path / "images", seed=0)
    options = (*FOLDER, f"dataset.root={root}", "dataset.cached_side=18", f"dataset.cache_dir={tmp_path / 'cache'}")
    before = dry_directory(tmp_path / "dry", *options)
    assert not (tmp_path / "cache").exists()  # no image was decoded
    assert execute(tmp_path / "out", *options) == 0
    assert before == run_dir(tmp_path / "out").name == dry_directory(tmp_path / "dry", *options)


@pytest.mark.parametrize("there", [True, False])
def test_cifar_from_images_of_ones_own_is_told_apart_too(tmp_path, there):
    roots = [write_images(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    sizes = ("dataset.num_classes=2", "dataset.num_train=16", "dataset.num_test=4", "dataset.crop_padding=0")
    options = ("dataset=cifar10", *sizes, *OPTIONS, f"dataset.cache_dir={tmp_path / 'cache'}")
    choices = [(*options, f"dataset.root={root if there else tmp_path / 'absent'}") for root in roots]
    names = [dry_directory(tmp_path / "dry", *chosen) for chosen in choices]
    assert len(set(names)) == (2 if there else 1)
    if there:
        assert execute(tmp_path / "out", *choices[0]) == 0
        assert run_dir(tmp_path / "out").name == names[0]


@pytest.mark.parametrize("name", ["digits", "fake"])
def test_where_options_fix_the_data_they_alone_name_the_directory(tmp_path, name):
    assert datasets.content(compose(f"dataset={name}").dataset) is None
    if name == "fake":
        assert execute(tmp_path / "out", *TINY, "dataset.validation=0.25") == 0
        flat = summary(tmp_path / "out")
        counts = {"data/num_train": 36, "data/num_val": 12, "data/num_test": 20, "data/num_classes": 4}
        assert {key: flat[key] for key in counts} == counts and flat["data/content"] is None
        dry = dry_directory(tmp_path / "dry", *TINY, "dataset.validation=0.25")
        assert dry == run_dir(tmp_path / "out").name
