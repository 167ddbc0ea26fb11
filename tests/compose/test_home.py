"""A ~ at the beginning of a path stands for the user's own folder, wherever a path can be typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_lab.cli import command as cli
from prune_lab.commands.arguments import Arguments
from prune_lab.foundations.home import with_home
from tests.helpers.runs import compose


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("~/x", "H/x"), ("--out=~/x", "H/x"), ("a=~/x,~/y", "H/x,H/y"), ("a='~/x'", "'H/x'"), ('a="~"', '"H"'),
        ("~trainer.threads", None), ("a=x~/y", None), ("a=~b", None), ("x/~/y", None),
    ],
)  # fmt: skip
def test_arguments_are_replaced_where_a_path_can_begin(home, typed, meant):
    prefix = typed.partition("=")[0] + "=" if "=" in typed else ""
    assert with_home([typed]) == [typed if meant is None else prefix + meant.replace("H", str(home))]


@pytest.mark.parametrize("quotes", ["", "'"])
def test_every_option_that_is_a_path(home, quotes):
    def value(group: str, key: str, *others: str) -> str:
        config = compose(*others, f"{group}.{key}={quotes}~/x{quotes}")
        return getattr({"model": config.model, "dataset": config.dataset, "method": config.method}[group], key)

    found = [
        value("dataset", "root", "dataset=imagefolder"), value("dataset", "cache_dir", "dataset=imagefolder"),
        value("dataset", "root", "dataset=cifar10"), value("dataset", "cache_dir", "dataset=cifar100"),
        value("model", "weights"), value("model", "weights", "model=torchvision", "model.name=resnet18"),
        value("method", "densities", "method=rigl", "method.distribution=file"),
        value("method", "mask_file", "method=masksparsity", "method.macs_ratio=null"),
        compose(f"output_dir={quotes}~/x{quotes}").output_dir,
    ]  # fmt: skip
    assert found == [str(home / "x")] * len(found)


def test_a_path_that_a_file_or_the_environment_sets(home, monkeypatch):
    monkeypatch.setenv("PRUNE_LAB_CACHE", "~/there")
    assert compose("dataset=imagefolder").dataset.cache_dir == str(home / "there")


def test_a_run_and_what_reads_it(home, tmp_path, capsys):
    assert cli.main(["dry_run=true", "output_dir='~/out'", "logger.wandb=disabled"]) == 0
    assert list(home.glob("out/*/dry_run.json"))
    assert cli.main(["compare", "outputs/reference", "--html=~/report.html"]) == 1  # no such folder from here
    assert "outputs/reference: no such run" in capsys.readouterr().err
    assert cli.main(["compare", "~/none"]) == 1
    assert f"{home}/none: no such run or folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    for command in ("connect", "export"):
        parser = Arguments(command, "")
        parser.add_argument("--out")
        assert parser.parse_args(["--out=~/x"]).out == str(home / "x")
        assert parser.parse_intermixed_args(["--out", "~/x"]).out == str(home / "x")
