"""How rows look in every figure: short labels, colours, markers and dashes. Pure; no plotting library."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prune_lab.commands.compare.groups import Row
from prune_lab.commands.compare.peers import circles
from prune_lab.tracking.lines import to_ascii

LIGHT = ("#4279e7", "#d28217", "#23a95d", "#761230", "#0a305c", "#5a5c0a", "#3929e7", "#898989")
"""eight colours with contrast of at least 3:1 on white, found by maximising the smallest distance (CIELAB) for normal
vision and for each of the three kinds of colour blindness"""
DARK = ("#7ea1f1", "#e84031", "#41d37b", "#a73e9d", "#a7f5f0", "#e4e748", "#a01ee6", "#727272")
"""the same on a dark background"""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down")
"""seven, so that with eight colours 56 methods have distinct pairs"""
DASHES = ("solid", "dash", "dot", "dashdot")

_KIND = ("model.", "dataset.", "schedule.batch_size", "schedule.multiplier", "schedule.train.epochs",
         "schedule.finetune.epochs")  # fmt: skip
"""options, or beginnings of them, in which compared rows must agree"""


@dataclass(frozen=True)
class Style:
    """Indices into the palette of the theme, SYMBOLS and DASHES."""

    color: int
    symbol: int
    dash: int = 0
    hollow: bool = False
    """whether it is a control of the method with the same colour"""


def labels(rows: Sequence[Row]) -> dict[str, str]:
    """Return group -> ASCII text for legends; model and schedule are named if the rows have several.

    Options lose their prefix (schedule.train.lr=0.1 becomes lr=0.1) unless two rows would then look the same.
    """
    several = [position for position in (1, 3) if len({row.labels[position] for row in rows}) > 1]
    full = {row.group: " ".join([row.name, *(row.labels[position] for position in several), *_parts(row)])
            for row in rows}  # fmt: skip
    short = {group: _short(text) for group, text in full.items()}
    keys = {row.group: (row.labels[2], short[row.group]) for row in rows}
    taken = list(keys.values())
    named = {group: full[group] if taken.count(key) > 1 else short[group] for group, key in keys.items()}
    looks = [(keys[group][0], text) for group, text in named.items()]
    return {
        group: to_ascii(f"{text} {group}" if looks.count((keys[group][0], text)) > 1 else text)
        for group, text in named.items()
    }


def method_names(rows: Sequence[Row]) -> list[str]:
    """Return the methods in the order of their colours, which does not depend on the order of the rows."""
    return sorted({row.labels[0] for row in rows})


def kind_names(rows: Sequence[Row]) -> dict[str, str]:
    """Return group -> ASCII text that separates the row's network, data and schedule from those of other rows.

    Texts are empty if all rows are comparable with each other.
    """
    if len(circles(rows)) == 1:
        return dict.fromkeys((row.group for row in rows), "")
    several = [position for position in (1, 3) if len({row.labels[position] for row in rows}) > 1]
    options = {row.group: re.split(r" (?=[\w.]+=)", row.options) for row in rows}  # values may have spaces
    words = {group: [text for text in texts if text.startswith(_KIND)] for group, texts in options.items()}
    parts = {row.group: [row.labels[position] for position in several] + words[row.group] for row in rows}
    return {row.group: to_ascii(_short(" ".join([*parts[row.group], *_parts(row)]))) for row in rows}


def _parts(row: Row) -> list[str]:
    """Return the parts of the images that the row used."""
    return [f"({part} images)" for part in (row.evaluated, row.trained) if part]


def _short(text: str) -> str:
    """Return `text` with options without their prefix: lr=0.1 for schedule.train.lr=0.1."""
    return re.sub(r"(?<!\S)(?:\w+\.)+(\w+=)", r"\1", text)


def of_methods(rows: Sequence[Row], kinds: Mapping[str, str] | None = None) -> dict[str, Style]:
    """Return group -> colour and marker of its method, or of method and kind of network as in `kind_names`."""
    names = {row.group: (row.labels[0], (kinds or {}).get(row.group, "")) for row in rows}
    order = sorted(set(names.values()))
    return {row.group: _of_method(order.index(names[row.group]), row) for row in rows}


def of_lines(rows: Sequence[Row]) -> tuple[dict[str, Style], bool]:
    """Return group -> style of a line, and whether colours mean methods.

    They do while there are enough dashes for each row of a method on every data set; else each row has its own colour.
    """
    members: Mapping[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        members[row.labels[2], row.labels[0]].append(row)
    if max(map(len, members.values()), default=0) <= len(DASHES):
        order = method_names(rows)
        found = {}
        for (_, method), same_method in members.items():
            for index, row in enumerate(same_method):
                base = _of_method(order.index(method), row)
                found[row.group] = Style(base.color, base.symbol, index, base.hollow)
        return found, True
    num = len(LIGHT)
    return {
        row.group: Style(index % num, index % len(SYMBOLS), index // num % len(DASHES))
        for dataset in dict.fromkeys(row.labels[2] for row in rows)
        for index, row in enumerate(row for row in rows if row.labels[2] == dataset)
    }, False


def _of_method(index: int, row: Row) -> Style:
    return Style(index % len(LIGHT), index % len(SYMBOLS), hollow=row.control not in ("", "none"))
