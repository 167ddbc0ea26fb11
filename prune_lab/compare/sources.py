"""Which images a run is of where its options do not tell: folders of one's own, known by their content."""

from __future__ import annotations

from collections.abc import Mapping

from prune_lab.compare.runs import RunResult, flat_options

ANYWHERE = ("dataset.root", "dataset.download", "dataset.cache_dir", "dataset.workers")
"""where the same images come from"""
AS_PUBLISHED = "published"


def sources(firsts: Mapping[str, RunResult]) -> dict[str, str]:
    """Return group -> the folder that its images are from, or AS_PUBLISHED where the options fix them.

    The same images under another path have the folder that was met first. Other images that one folder held at another
    time have the beginning of their content hash beside it.
    """
    found, roots, contents = {}, {}, {}
    for name, run in firsts.items():
        content, root = run.summary.get("data/content"), str(run.options("dataset").get("root"))
        if content is None:  # runs of older versions do not tell the content of folders
            is_folder = run.options("dataset").get("kind") == "imagefolder"
            found[name] = root if is_folder else AS_PUBLISHED
            continue
        root = roots.setdefault(content, root)
        flat = flat_options({"dataset": run.options("dataset")})
        others = repr([entry for entry in flat if entry[0] not in ANYWHERE])  # they are part of the content
        first = contents.setdefault((root, others), content)
        found[name] = root if content == first else f"{root} ({content[:8]})"
    return found
