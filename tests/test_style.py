"""House rules that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "prune_lab").rglob("*.py"))
YAML = sorted((ROOT / "conf").rglob("*.yaml"))
TEXTS = [
    *PACKAGE, *YAML, *sorted((ROOT / "tests").rglob("*.py")),
    *(path for path in sorted((ROOT / "scripts").rglob("*")) if path.is_file() and path.suffix != ".pyc"),
    *(ROOT / name for name in ("README.md", "pyproject.toml", ".gitignore")),
]  # fmt: skip
RECIPES = {"experiment", "debug", "config.yaml"}
"""they set options that are explained where they live"""

TORCH_FREE = [
    "cli", "cli.command", "cli.listing", "cli.completion", "compose.check", "compose.overrides", "config.run",
    "foundations.schema", "foundations.files", "foundations.lazy", "launch.sweep", "launch.worker",
    "launch.launchers", "launch.slots", "pipeline.identity", "core.method", "core.phase", "core.card", "core.chain",
    "config.time", "pruning.masks.selection", "commands.verdict.conditions", "commands.verdict.cases",
    "commands.compare.command", "commands.compare.figures", "commands.compare.html",
    "commands.dashboard.wandb_sync", "tracking", "models", "datasets",
]  # fmt: skip


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_lines(function: ast.FunctionDef) -> int:
    """Return the lines of a function without its decorators and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.body[0].lineno - function.lineno + (body[-1].end_lineno - body[0].lineno + 1 if body else 0)


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_files_and_functions_are_short_and_documented(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(tree), "says in its first line what it is about"
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert {node.name: code_lines(node) for node in functions if code_lines(node) > 60} == {}


@pytest.mark.parametrize("path", [path for path in TEXTS if path.is_file()], ids=name_of)
def test_texts_are_ascii_without_paths_of_one_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if not line.isascii()] == []
    if path != Path(__file__):
        assert re.findall(r"(?<![\w.])/(?:home|root|work|Users|tmp/\w)\b\S*", text) == []


@pytest.mark.parametrize("path", [path for path in YAML if not RECIPES & {*path.parts}], ids=name_of)
def test_every_key_of_a_yaml_file_is_explained(path: Path) -> None:
    """A comment behind the key or above it; what repeats the file's name or an explained key needs none."""
    unexplained, before, explained = [], "", {"_target_", "name", "defaults"}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"\s*([A-Za-z_]\w*):(.*)$", line)
        if match and ("#" in line or before.strip().startswith("#")):
            explained.add(match[1])
        elif match and match[1] not in explained and match[2].strip():
            unexplained.append(match[1])
        before = line
    assert unexplained == []


def test_the_loop_knows_no_method_by_name() -> None:
    methods = {path.stem for path in (ROOT / "conf" / "method").glob("[!_]*.yaml")} - {"dense", "set", "static"}
    rooms = ("training", "pipeline", "optim")
    files = [path for path in PACKAGE if path.relative_to(ROOT / "prune_lab").parts[0] in rooms]
    assert len(files) > 20
    for path in files:
        words = set(re.findall(r"[\"'](\w+)[\"']", path.read_text(encoding="utf-8")))
        assert words & methods == set(), path.name


def test_the_readme_has_one_page_and_links_of_all_guides_lead_somewhere() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
    folders = ("prune_lab", "scripts", "outputs/reference")
    guides = [ROOT / "README.md", *(path for name in folders for path in (ROOT / name).rglob("*.md"))]
    assert len(guides) > 15
    for guide in guides:
        for link in re.findall(r"\]\(([^)#\s]+)\)", guide.read_text(encoding="utf-8")):
            assert "://" in link or (guide.parent / link).exists(), f"{guide}: {link}"


def test_ignored_paths_are_anchored() -> None:
    """An unanchored `data/` once removed a package's folder from a wheel."""
    harmless = {"__pycache__/", "*.egg-info/"}
    for line in (ROOT / ".gitignore").read_text().splitlines():
        assert not line or line.startswith(("/", "!/", "#")) or line in harmless, line


def test_top_level_holds_no_more_than_agreed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    allowed = {"pyproject.toml", "README.md", "conf", "prune_lab", "tests", "scripts", "outputs", "findings"}
    allowed |= {"LICENSE", "CITATION.cff", "CHANGELOG.md"}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_conf_holds_data_only() -> None:
    assert {path.suffix for path in (ROOT / "conf").rglob("*") if path.is_file()} == {".yaml"}


def test_options_are_checked_without_torch_and_wandb() -> None:
    modules = [f"prune_lab.{name}" for name in TORCH_FREE]
    modules += [f"prune_lab.methods.{path.stem}" for path in (ROOT / "prune_lab" / "methods").glob("[!_]*.py")]
    heavy = {"torch", "torchvision", "wandb", "optuna", "sklearn", "PIL"}
    code = f"import sys\nfor name in {modules}: __import__(name)\nprint({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
