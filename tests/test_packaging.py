"""prune-lab as users get it: wheel, editable install and source distribution, run from an empty folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
TINY = ["dataset=fake", "dataset.image_size=16", "dataset.num_train=32", "dataset.num_test=8", "model.width=0.25",
        "debug=tiny", "logger.wandb=disabled"]  # fmt: skip

for module in ("build", "hatchling", "editables"):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed", allow_module_level=True)


def call(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel made from it."""
    folder = tmp_path_factory.mktemp("dist")
    done = call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, REPO, cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def environment(folder: Path) -> Path:
    """Make a virtual environment that sees the packages of this one, but not its prune-lab; return its bin folder."""
    venv.create(folder, with_pip=False)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "tests_own.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def install(bin_folder: Path, *what: str | Path) -> None:
    command = ["-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps", "--no-build-isolation"]
    done = call(bin_folder / "python", *command, "--ignore-installed", *what, cwd=bin_folder)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin folder of an environment with the wheel."""
    bin_folder = environment(tmp_path_factory.mktemp("wheel"))
    (wheel,) = built.glob("*.whl")
    install(bin_folder, wheel)
    return bin_folder


def test_the_wheel_holds_every_file_of_the_package_and_every_option_file(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {path.relative_to(REPO).as_posix() for path in (REPO / "prune_lab").rglob("*.*")
             if path.is_file() and path.suffix != ".pyc"}  # fmt: skip
    options = {f"prune_lab/{path.relative_to(REPO).as_posix()}" for path in (REPO / "conf").rglob("*.yaml")}
    assert files | options <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"prune_lab"}


def test_the_source_distribution_holds_what_the_tests_need(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    assert {"pyproject.toml", "README.md", "conf/config.yaml", "prune_lab/cli/command.py", "tests/conftest.py"} <= names
    assert not [name for name in names if name.startswith(("outputs/", ".venv/"))]


def test_the_wheel_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    code = "import prune_lab.cli.command as c; print(c.__file__, c.conf_dir())"
    found = call(installed / "python", "-c", code, cwd=tmp_path)
    assert str(REPO) not in found.stdout and "site-packages" in found.stdout
    assert "rigl" in call(installed / "prune-lab", "list", "methods", cwd=tmp_path).stdout
    done = call(installed / "prune-lab", "method=static", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("outputs/*/summary.json"))) == 1
    module = call(installed / "python", "-m", "prune_lab", "compare", "outputs", "--html", "r.html", cwd=tmp_path)
    assert module.returncode == 0 and "static" in module.stdout, module.stderr
    assert "<h2>Results</h2>" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_bash_completes_the_installed_command(installed: Path, tmp_path: Path) -> None:
    script = tmp_path / "complete.sh"
    script.write_text(
        'eval "$(prune-lab -sc install=bash)"\n'
        'COMP_LINE="prune-lab method=ri"; COMP_POINT=${#COMP_LINE}; COMP_CWORD=1; COMP_WORDS=($COMP_LINE)\n'
        "hydra_bash_completion\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    done = call("bash", script, cwd=tmp_path, PATH=f"{installed}{os.pathsep}{os.environ['PATH']}")
    assert done.stdout.split() == ["method=rigl", "method=rigl_itop", "method=rigl_structured"], done.stderr


def test_an_editable_install_uses_the_checkout(tmp_path: Path) -> None:
    bin_folder = environment(tmp_path / "environment")
    install(bin_folder, "--editable", REPO)
    found = call(bin_folder / "python", "-c", "import prune_lab.cli.command as c; print(c.conf_dir())", cwd=tmp_path)
    assert found.stdout.strip() == str(REPO / "conf")
    assert "method" in call(bin_folder / "prune-lab", "--help", cwd=tmp_path).stdout


def test_the_checkout_runs_without_installation(tmp_path: Path) -> None:
    done = call(sys.executable, "-m", "prune_lab", "--cfg", "job", "method=rigl", cwd=tmp_path, PYTHONPATH=str(REPO))
    assert done.returncode == 0 and "sparsity: 0.9" in done.stdout
