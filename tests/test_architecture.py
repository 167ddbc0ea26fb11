"""The order of the rooms: which part of the package may import which, and that no files import each other."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "prune_lab"
ROOMS = [
    "cli", "commands", "launch", "pipeline", "compose", "training", "tracking", "methods", "families", "core",
    "pruning", "optim", "accounting", "datasets", "models", "config", "foundations",
]  # fmt: skip
"""from the top down: a room imports itself and the rooms after it"""
FLAT = ["__init__.py", "__main__.py"]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """Return the room of a module; none for the two files that lie flat."""
    return next((name for name in ROOMS if f"{module}.".startswith(f"prune_lab.{name}.")), "")


@cache
def modules() -> dict[str, Path]:
    return {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def named(node: ast.AST) -> list[str]:
    """Return the dotted names that a statement or a call may import, each perhaps a module or something in one."""
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports name the whole path"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("prune_lab."):
        return [node.value]  # tables of modules
    return []


@cache
def imports() -> frozenset[tuple[str, str]]:
    """Return all pairs (importer, imported) of the package: under TYPE_CHECKING, in functions, and by name, too."""
    found = set()
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in named(node):
                target = name if name in modules() else name.rpartition(".")[0]
                if target in modules() and target != module:
                    found.add((module, target))
    return frozenset(found)


def circles(arrows: frozenset[tuple[str, str]]) -> set[str]:
    """Return what is left when files that import nothing left, and files that nothing left imports, are taken away."""
    left = {end for arrow in arrows for end in arrow}
    while True:
        inside = [(a, b) for a, b in arrows if a in left and b in left]
        kept = {a for a, _ in inside} & {b for _, b in inside}
        if kept == left:
            return left
        left = kept


def test_torch_alone_is_lazy() -> None:
    """Own modules are imported by statements, which readers and type checkers can follow, not by their names."""
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "prune_lab.foundations.lazy":
                assert {alias.name for alias in node.names} <= {"torch", "no_grad"}, path
            if isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
                assert [name for argument in node.args for name in named(argument)] == [], path


def test_imports_run_down_the_list_of_rooms() -> None:
    between = [(a, b) for a, b in imports() if room(a) and room(b)]
    assert len(between) > 500, "the package was read"
    assert sorted((a, b) for a, b in between if ROOMS.index(room(b)) < ROOMS.index(room(a))) == []


def test_no_files_import_each_other() -> None:
    assert circles(frozenset({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "a")})) == {"a", "b", "c"}
    assert sorted(circles(imports())) == []


def test_no_method_names_another() -> None:
    inside = [(a, b) for a, b in imports() if room(a) == room(b) == "methods"]
    assert [(a, b) for a, b in inside if b != "prune_lab.methods"] == []


def test_every_file_has_a_room() -> None:
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == FLAT
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert folders == set(ROOMS)


def test_every_room_says_what_it_is_for() -> None:
    for folder in {path.parent for path in modules().values()}:
        face = folder / "__init__.py"
        assert face.is_file(), folder
        assert ast.get_docstring(ast.parse(face.read_text(encoding="utf-8"))), face
