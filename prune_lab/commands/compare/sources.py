"""Identifies the files that a run read by their content, regardless of the typed path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prune_lab.commands.compare.runs import RunResult, flat_options

ANYWHERE = ("dataset.root", "dataset.download", "dataset.cache_dir", "dataset.workers")
"""sources of the same images"""
AS_PUBLISHED = "published"


@dataclass(frozen=True)
class _Source:
    """The input files of one run."""

    path: str
    """as typed"""
    content: str | None
    """hash; None: not recorded, or fixed by the options"""
    rest: str = ""
    """further inputs of the hash"""


def sources(firsts: Mapping[str, RunResult]) -> dict[str, dict[str, str]]:
    """Return group -> {dataset.root: images, model.weights: start weights}, as far as the run has these options.

    Images that the options fix are "published". The same content under another path gets the path found first.
    Different content found at the same path at another time is shown with the beginning of its hash.
    """
    read = {"dataset.root": _images, "model.weights": _start_weights}
    texts = {option: _texts({name: source for name, run in firsts.items() if (source := of(run))})
             for option, of in read.items()}  # fmt: skip
    return {name: {option: found[name] for option, found in texts.items() if name in found} for name in firsts}


def _images(run: RunResult) -> _Source | None:
    data, content = run.options("dataset"), run.summary.get("data/content")
    if "root" not in data:
        return None
    if content is None and data.get("kind") != "imagefolder":
        return _Source(AS_PUBLISHED, None)
    others = [entry for entry in flat_options({"dataset": data}) if entry[0] not in ANYWHERE]
    return _Source(str(data["root"]), content, repr(others))


def _start_weights(run: RunResult) -> _Source | None:
    weights = run.options("model").get("weights")
    return None if weights is None else _Source(str(weights), run.summary.get("start/content"))


def _texts(sources_of: Mapping[str, _Source]) -> dict[str, str]:
    found: dict[str, str] = {}
    paths: dict[str, str] = {}
    contents: dict[tuple[str, str], str] = {}
    for name, source in sources_of.items():
        if source.content is None:
            found[name] = source.path
            continue
        path = paths.setdefault(source.content, source.path)
        is_first = contents.setdefault((path, source.rest), source.content) == source.content
        found[name] = path if is_first else f"{path} ({source.content[:8]})"
    return found
