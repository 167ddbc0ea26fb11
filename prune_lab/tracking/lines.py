"""Records and results as plain ASCII text: one line per epoch, a few at the start and the end. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prune_lab.accounting import targets
from prune_lab.tracking.base import RunInfo

MANY_ZEROS = 0.01
"""minimum fraction of zeros among start weights that is reported; trained dense networks have almost none"""


def to_ascii(text: str) -> str:
    """Return `text` with non-ASCII characters escaped, so that no terminal or locale can fail on it."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


def plan_lines(info: RunInfo) -> list[str]:
    """Return the run's name, its phases and its directory."""
    phases = " -> ".join(_phase(phase) for phase in info.plan)
    return [f"run {info.name}", *([f"plan: {phases}"] if phases else []), f"directory: {info.run_dir}"]


def _phase(phase: dict[str, Any]) -> str:
    notes = [phase["length"]] if phase.get("length") else []
    notes += ["reused"] if phase.get("reused") else []
    return f"{phase['name']} ({', '.join(notes)})" if notes else str(phase["name"])


_EPOCH_PARTS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("train/loss", "loss", "{:.4f}".format),
    ("train/top1", "top1", "{:.2f}".format),
    ("train/bpc", "bpc", "{:.4f}".format),
    ("train/perplexity", "perplexity", "{:.2f}".format),
    ("eval/loss", "eval loss", "{:.4f}".format),
    ("eval/top1", "eval top1", "{:.2f}".format),
    ("eval/bpc", "eval bpc", "{:.4f}".format),
    ("eval/perplexity", "eval perplexity", "{:.2f}".format),
    ("sparsity", "sparsity", "{:.4f}".format),
    ("channels/kept", "channels kept", "{:.4f}".format),
    ("prune/channels_kept", "channels kept", "{:.4f}".format),
    ("remove/channels_kept", "channels kept", "{:.4f}".format),
    ("lr", "lr", "{:.2e}".format),
    ("time/epoch_s", "s", "{:.1f}".format),
    ("time/images_per_s", "img/s", "{:.0f}".format),
]


def epoch_line(record: dict[str, Any], epochs: dict[str, int]) -> str | None:
    """Return one line for a record, without missing keys; None for a record that has no key to show.

    Args:
        epochs: planned epochs of each phase.
    """
    phase = record.get("phase", "?")
    total = epochs.get(phase)
    parts = [f"{phase} {record.get('epoch', '?')}" + (f"/{total}" if total else "")]
    for key, label, show in _EPOCH_PARTS:
        value = record.get(key)
        if value is not None:
            parts.append(f"{label} {show(value)}{_of_part(key, record)}")
    return "  ".join(parts) if len(parts) > 1 else None


def _of_part(key: str, record: dict[str, Any]) -> str:
    """Return the number of images behind an accuracy, if it was not all of them."""
    split, _, what = key.partition("/")
    images = record.get(f"{split}/images") if what == "top1" else None
    return "" if images is None else f" ({images:,} images)"


def part_evaluated(summary: dict[str, Any]) -> str | None:
    """Return the part of the evaluation images behind the accuracies; None: all of them, or unknown."""
    images, num_eval = summary.get("final/images"), summary.get("data/num_eval")
    return f"of {images:,} of {num_eval:,} images" if images and num_eval and images < num_eval else None


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (label, value) pairs for the end of a run, from the flat keys of summary.json, without missing ones."""
    get = summary.get
    evaluated = part_evaluated(summary)
    rows = [
        ("top-1", _join(_percent(get("final/top1")), evaluated, _before_pruning(summary))),
        ("top-5", _join(_percent(get("final/top5")), evaluated)),
        ("bits per char.", _lower(summary, "bpc", 4)),
        ("perplexity", _lower(summary, "perplexity", 2)),
        ("start weights", _start(get("start/top1"), get("start/zeros"), evaluated)),
        ("sparsity", _requested(get("sparsity/achieved"), get("sparsity/requested"))),
        ("target", targets.line(summary)),
        ("channels", _channels(get("remove/channels_kept"))),
        ("parameters", _parameters(summary)),
        (f"MACs per {_unit(summary)}", _of(get("macs/inference"), get("macs/dense"), "")),
        ("not counted", _without_weight(get("macs/not_counted"))),
        ("merging", _merging(get("haste/channels_left"), get("haste/macs_ratio_without_overhead"))),
        ("merging, draws", _draws(summary)),
        ("time per image", _times(get("time/inference_s_per_image"), get("time/inference_dense_s_per_image"))),
        ("masks", _masks(summary)),
        ("gradient norm", _change(get("prune/gradient_norm_before"), get("prune/gradient_norm_after"))),
        ("training images", _in_each_epoch(get("train/images_per_epoch"), get("data/num_train"))),
        ("training MACs", _training(get("macs/train"), get("macs/train_dense"))),
        ("wall time", _duration(get("time/wall_s"))),
    ]
    return [(name, text) for name, text in rows if text]


def summary_lines(summary: dict[str, Any]) -> list[str]:
    return [f"{name:15} {text}" for name, text in summary_rows(summary)]


def duration(seconds: float) -> str:
    """Return `seconds` as 1.5 s, 2 min 03 s or 4 h 05 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _duration(seconds: float | None) -> str | None:
    return None if seconds is None else duration(seconds)


def quantity(value: float) -> str:
    """Return a count with three digits and a unit prefix: 4.09 G."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:g}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f} %"


def _unit(summary: dict[str, Any]) -> str:
    """Return what costs are per."""
    return str(summary.get("task/unit", "images")).removesuffix("s")


def _lower(summary: dict[str, Any], key: str, digits: int) -> str | None:
    """Return a metric of which less is better, validation and test, and what it was before pruning."""
    final, test, before = (summary.get(f"{part}/{key}") for part in ("final", "test", "dense"))
    if final is None:
        return None
    parts = [f"{final:.{digits}f}", None if test is None else f"(test {test:.{digits}f})"]
    if before is not None and summary.get(f"delta/{key}"):
        parts.append(f"({summary[f'delta/{key}']:+.{digits}f} against {before:.{digits}f} before pruning)")
    return _join(*parts)


def _start(top1: float | None, zeros: float | None, evaluated: str | None) -> str | None:
    if top1 is None or zeros is None:
        return None
    line = _join(f"top-1 {top1:.2f} %", evaluated, "before training")
    return f"{line}, {zeros:.2%} zeros" if zeros >= MANY_ZEROS else line


def _in_each_epoch(images: int | None, total: int | None) -> str | None:
    return None if images is None or total is None else f"{images:,} of {total:,} in each epoch"


def dense_epochs(summary: dict[str, Any]) -> int | None:
    """Return the epochs after which `dense/top1` was measured; None: unknown."""
    phases = [phase["epochs"] for phase in summary.get("phases") or () if phase["epochs"]]
    return summary.get("dense/epochs", phases[0] if phases else None)


def epochs_text(epochs: int | None) -> str:
    return "? epochs" if epochs is None else "start weights" if epochs == 0 else f"{epochs} epoch{'s' * (epochs != 1)}"


def _before_pruning(summary: dict[str, Any]) -> str | None:
    """Return the change from the accuracy of the run's own dense training; None if the run ended with it."""
    delta, before = summary.get("delta/top1"), summary.get("dense/top1")
    if delta is None or before is None or (delta == 0 and len(summary.get("phases") or ()) == 1):
        return None
    return f"({delta:+.2f} against {before:.2f} % before pruning, {epochs_text(dense_epochs(summary))})"


def _requested(achieved: float | None, requested: float | None) -> str | None:
    if achieved is None:
        return None
    return f"{achieved:.6g}" + ("" if requested is None else f" (requested {requested:.6g})")


def _channels(kept: float | None) -> str | None:
    return None if kept is None else f"{kept:.2%} kept of those that can be removed"


def _parameters(summary: dict[str, Any]) -> str | None:
    """Return the remaining parameters: all of them if channels were removed, else the nonzero ones."""
    nonzero, dense = summary.get("params/nonzero"), summary.get("params/dense")
    return _of(summary.get("params/total"), dense, "") if nonzero is None else _of(nonzero, dense, "nonzero")


def _masks(summary: dict[str, Any]) -> str | None:
    """Return the positions that the masks have explored; masks that only shrink have explored none."""
    explored, dead = summary.get("mask/exploration"), summary.get("mask/dead_filters")
    if explored is None:
        return None
    if not summary.get("mask/updates"):
        return f"{dead} dead filters"
    overlap = summary["mask/overlap"]
    return f"{explored:.1%} of positions tried, {overlap:.1%} of the kept ones kept from the start, {dead} dead filters"


def _without_weight(macs: int | None) -> str | None:
    return f"{quantity(macs)} MACs per image of products without a weight, such as attention" if macs else None


def _merging(left: float | None, ratio: float | None) -> str | None:
    return None if left is None else f"{left:.2%} of channels left; {ratio:.2%} of dense MACs without its overhead"


def _draws(summary: dict[str, Any]) -> str | None:
    if "haste/top1_std" not in summary:
        return None
    top1 = f"{summary['haste/top1_mean']:.2f} +- {summary['haste/top1_std']:.2f} %"
    macs = f"{summary['haste/macs_ratio_mean']:.2%} +- {summary['haste/macs_ratio_std']:.2%}"
    return f"top-1 {top1}, MACs {macs} of dense (mean and std)"


def _times(seconds: float | None, dense: float | None) -> str | None:
    if seconds is None or dense is None:
        return None
    factor = f"{seconds / dense:.1f} times as long" if seconds > dense else f"{dense / seconds:.1f} times faster"
    verdict = f"slower than dense: {factor}" if seconds > dense else factor
    return f"{1000 * seconds:.3g} ms measured, dense {1000 * dense:.3g} ms; {verdict}"


def _change(before: float | None, after: float | None) -> str | None:
    return None if before is None else f"{before:.4g} dense, {after:.4g} pruned, at initialisation"


def _of(value: float | None, dense: float | None, word: str) -> str | None:
    if value is None:
        return None
    text = _join(quantity(value), word)
    return text if not dense else f"{text} ({value / dense:.2%} of {quantity(dense)} dense)"


def _training(value: float | None, dense: float | None) -> str | None:
    if value is None or not dense:
        return None if value is None else quantity(value)
    return f"{quantity(value)} ({value / dense:.2%} of {quantity(dense)}, dense training over schedule.train once)"


def _join(*parts: str | None) -> str | None:
    kept = [part for part in parts if part]
    return " ".join(kept) if kept else None
