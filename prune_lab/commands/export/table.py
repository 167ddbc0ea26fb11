"""Findings of an export as lines of text. Pure functions; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prune_lab.commands.compare.formats import markdown
from prune_lab.commands.export.catalog import FORMATS

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def check_line(record: Mapping[str, Any], files: Sequence[str]) -> str:
    """Return a line on the agreement of one runtime's outputs with the run's network."""
    verdict = "" if record["accepted"] else "; ABOVE TOLERANCE"
    return (
        f"{' + '.join(files):33} {record['runtime']:24} difference {record['relative']:.1e} "
        f"(tolerance {record['tolerance']:g}), top-1 equal on {record['same_top1']} of {record['images']}{verdict}"
    )


def size_table(formats: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the sizes on disk of the written formats, dense beside pruned."""
    labels = [label for label in ("dense", "pruned") if any(label in entry["size"] for entry in formats.values())]
    header = ["on disk", *labels, *(["ratio"] if len(labels) > 1 else []), *(f"{label}, gzip" for label in labels)]
    header += ["ratio, gzip"] if len(labels) > 1 else []
    lines = []
    for name, entry in formats.items():
        plain, packed = ([entry["size"][label][key] for label in labels] for key in ("bytes", "gzip_bytes"))
        lines.append([FORMATS[name].title, *_sizes(plain), *_sizes(packed)])
    return markdown(header, lines)


def _sizes(values: Sequence[int]) -> list[str]:
    return [*map(size, values), *([f"{values[1] / values[0]:.3f}"] if len(values) > 1 else [])]


def size(count: int) -> str:
    """Return bytes in decimal units: 1.09 MB."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.3g} {name}" if count < 999.5 * unit else f"{count / unit:.0f} {name}"
    return f"{count} B"


def latency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return medians with quartiles, and ratios if a difference was measured."""
    has_pruned = "pruned" in rows[0]
    header = ["latency, ms", "batch", "dense", *(["pruned", "by pruning"] if has_pruned else []), "to dense PyTorch"]
    lines = []
    for row in rows:
        cells = [row["runtime"], str(row["batch"]), _time(row["dense"])]
        if has_pruned:
            cells += [_time(row["pruned"]), _ratio(row["by_pruning"])]
        reference = row.get("to_dense_pytorch", row.get("by_pruning"))
        lines.append([*cells, _ratio(reference) if reference else "1"])
    return markdown(header, lines)


def _time(times: Mapping[str, Any]) -> str:
    low, high = times["quartiles_s"]
    return f"{milliseconds(times['median_s'])} ({milliseconds(low)}-{milliseconds(high)})"


def milliseconds(seconds: float) -> str:
    """Return milliseconds with three digits, whole from 100 on."""
    value = seconds * 1e3
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{digits}f}"


def _ratio(found: Mapping[str, Any]) -> str:
    return f"{found['median']:.2f}x" if found["is_difference"] else "no difference"


def is_busy(machine: Mapping[str, Any]) -> bool:
    """Return whether other work occupied cores of the measurement before it began."""
    load = machine["load_average_1min"]
    return load is not None and load > machine["cores"] - machine["threads"] + 0.5


def kernel_lines(tried: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return, for each batch size, the number of layers in which 2:4 kernels are faster."""
    return [
        f"2:4 kernels on {entry['device']}, batch {entry['batch']}: "
        + (f"used in {len(entry['layers'])} layers (export.json)" if entry["layers"] else "not faster; not used")
        for entry in tried
    ]


def sparse_lines(tried: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the outcome of the sparse form: a line per batch size for which it is faster, else one line."""
    lines = [
        f"sparse, batch {entry['batch']}: {milliseconds(entry['median_s'])} ms in PyTorch with {len(entry['layers'])} "
        f"layers as CSR, {entry['ratio']['median']:.2f}x of {entry['against']} (layers: export.json; "
        "prune_lab.commands.export.sparse.with_csr)"
        for entry in tried if entry["is_faster"]
    ]  # fmt: skip
    slower = [str(entry["batch"]) for entry in tried if not entry["is_faster"]]
    if slower:
        lines.append(
            f"sparse, batch {' and '.join(slower)}: leaving the zeros out (PyTorch CSR) is not faster; not used"
        )
    return lines
