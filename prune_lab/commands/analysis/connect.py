"""prune-lab connect: is there a barrier between two finished networks? Options are checked without torch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from prune_lab.commands.analysis.output import ResultFolder
from prune_lab.commands.analysis.runs import FinishedRun, data_options, read_run, require_comparable
from prune_lab.commands.arguments import Arguments
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import Count, Index, Momentum, Positive, Range, coerce
from prune_lab.tracking.lines import to_ascii

STABLE_BELOW_POINTS = 2.0
"""a convention: the line has no barrier if the test error rises by less"""
POINTS = {"line": 31, "bezier": 61}
RECIPE = {"epochs": 10, "lr": 0.1, "momentum": 0.9, "batch_size": 128}
_LEVELS = " .:-=+*#%@"

_DESCRIPTION = (
    "Measure loss and error along a curve between the networks of two finished runs, and the barrier: the largest "
    "value minus the mean of the two ends. The result is kept in a folder; the same command shows it again."
)


def main(argv: list[str]) -> int:
    """Measure, or read a stored result, and print it.

    Raises:
        UserError: wrong option, or runs that no curve can connect.
    """
    options = parse_options(argv)
    runs = read_run(options.run_a), read_run(options.run_b)
    require_comparable(*runs)
    data_options(*runs, options.data)
    from prune_lab.commands.analysis.bench import open_bench  # torch is imported only once the options are valid

    setting = open_bench(*runs, root=options.data, device=options.device, seed=options.seed)
    try:
        _connect(options, runs, setting)
    finally:
        setting.dataset.close()
    return 0


def _connect(options: Namespace, runs: tuple[FinishedRun, FinishedRun], setting: Any) -> None:
    from prune_lab.commands.analysis import connection

    plan = make_plan(options, setting.dataset.info.num_train)
    inputs = {
        "plan": asdict(plan),
        "seed": options.seed,
        "data": setting.dataset.fingerprint,
        "device_config": setting.device_config.identity(),
    }
    folder = ResultFolder.of("connect", runs, inputs, chosen=options.output)
    lines = _Lines(plan)
    for t, run in enumerate(runs):
        _say(f"t = {t}: {run.directory}")

    def explore() -> dict[str, Any]:
        result = connection.explore(setting, runs, plan, folder.directory, report=_say, show=lines.point)
        return result | {"reported_error": [_reported(run) for run in runs]}

    done, known = folder.settle(runs, explore, report=_say)
    for point in done["points"] if known else ():
        lines.point(point)
    for line in summary_lines(done, plan):
        _say(line)
    _say(f"written: {folder.directory}")


def _say(line: str) -> None:
    print(to_ascii(line), flush=True)


def _reported(run: FinishedRun) -> float | None:
    top1 = run.summary.get("final/top1")
    return None if top1 is None else 100 - top1


def parse_options(argv: list[str]) -> Namespace:
    """Return the checked options.

    Raises:
        UserError: unknown, out of range, or without effect given the others.
    """
    parser = Arguments("connect", _DESCRIPTION)
    parser.add_argument("run_a", metavar="RUN_A", help="directory of a finished run: t = 0")
    parser.add_argument("run_b", metavar="RUN_B", help="of another one with the same network and data set: t = 1")
    parser.add_argument("--curve", choices=tuple(POINTS), default="line", help="bezier: with a middle that is trained")
    parser.add_argument("--points", type=int, help="evenly spaced, ends included; default 31, with bezier 61")
    parser.add_argument(
        "--batch-norm", choices=("recompute", "interpolate"), default="recompute",
        help="running statistics at every point: from training images, or interpolated between the runs' own",
    )  # fmt: skip
    parser.add_argument("--batch-norm-images", metavar="N", help="training images for recompute, or all; default 5000")
    parser.add_argument(
        "--limit-train-images", metavar="N", default="10000", help="measure on so many, or all; default 10000"
    )
    parser.add_argument("--data", metavar="ROOT", help="where the data lie; default: dataset.root of the runs")
    parser.add_argument("--epochs", type=int, help="bezier: training of the middle; default 10, published 200 to 300")
    parser.add_argument("--lr", type=float, help="bezier: default 0.1")
    parser.add_argument("--momentum", type=float, help="bezier: default 0.9")
    parser.add_argument("--batch-size", type=int, help="bezier: default 128")
    parser.add_argument("--seed", type=int, default=0, help="draws images, and t of the curve's batches; default 0")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default auto")
    parser.add_argument("--output", metavar="FOLDER", help="default outputs/analysis/connect-RUN_A-RUN_B-HASH")
    options = parser.parse_args(argv)
    _check(options)
    return options


def _check(options: Namespace) -> None:
    given = [name for name in RECIPE if getattr(options, name) is not None]
    if options.curve == "line" and given:
        raise UserError(f"--{given[0].replace('_', '-')} goes with --curve bezier; nothing of a line is trained")
    if options.batch_norm == "interpolate" and options.batch_norm_images is not None:
        raise UserError("--batch-norm-images goes with --batch-norm recompute")
    options.points = coerce(
        Annotated[int, Range(3)], POINTS[options.curve] if options.points is None else options.points, "--points"
    )
    for name, kind in (("epochs", Count), ("lr", Positive), ("momentum", Momentum), ("batch_size", Count)):
        value = RECIPE[name] if getattr(options, name) is None else getattr(options, name)
        setattr(options, name, coerce(kind, value, f"--{name.replace('_', '-')}"))
    coerce(Index, options.seed, "--seed")
    options.limit_train_images = count_or_all(options.limit_train_images, "--limit-train-images")
    wanted = "5000" if options.batch_norm_images is None else options.batch_norm_images
    options.batch_norm_images = count_or_all(wanted, "--batch-norm-images", least=2)  # one image has no variance


def count_or_all(text: str, option: str, *, least: int = 1) -> int | None:
    """Return a number of images, None for `all`.

    Raises:
        UserError: neither, or fewer than `least`.
    """
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UserError(f"{option} must be a whole number above {least - 1}, or all, got {text or 'nothing'}")
    return int(text)


def make_plan(options: Namespace, num_train: int) -> Any:
    """Return the plan for a data set of `num_train` training images."""
    from prune_lab.commands.analysis.connection import Plan
    from prune_lab.commands.analysis.curve_training import Recipe

    recipe = None
    if options.curve == "bezier":
        if options.batch_size > num_train:
            raise UserError(f"--batch-size must lie in [1, {num_train}] (training images), got {options.batch_size}")
        recipe = Recipe(options.epochs, options.lr, options.momentum, options.batch_size)

    def at_most(count: int | None) -> int:
        return num_train if count is None else min(count, num_train)

    norm_images = at_most(options.batch_norm_images) if options.batch_norm == "recompute" else None
    return Plan(options.points, at_most(options.limit_train_images), norm_images, recipe)


class _Lines:
    """Prints the table as it grows."""

    def __init__(self, plan: Any) -> None:
        self._plan, self._begun = plan, False

    def point(self, point: dict[str, Any]) -> None:
        columns = [name for name in point if name not in ("t", "zeros")]
        if not self._begun:
            print("     t  " + "  ".join(f"{name:>11}" for name in columns))
        self._begun = True
        cells = "  ".join(f"{_number(point[name], 2 if name.endswith('error') else 4):>11}" for name in columns)
        print(f"{point['t']:6.4f}  {cells}", flush=True)


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def summary_lines(result: dict[str, Any], plan: Any) -> list[str]:
    """Return the barriers, their images, and one line that draws the error along the curve."""
    split, curve = result["split"], "line" if plan.recipe is None else "bezier"
    barriers, zeros = result["barrier"], result["zeros"]
    lines = [
        f"{split + ' error along the curve':30} {plot([point[f'{split}/error'] for point in result['points']])}",
        *(f"{f'barrier, {part}':30} loss {_number(barriers[f'{part}/loss'], 4)}, "
          f"error {_number(barriers[f'{part}/error'], 2)} points" for part in ("train", split)),
        f"{'verdict':30} {verdict(barriers[f'{split}/error'], split=split, curve=curve)}",
        f"{'distance of the ends':30} {result['distance']:.4f}; length of the curve {result['length']:.4f}",
        f"{'zeros, conv and linear weights':30} {zeros['start']:.2%} at t = 0, {zeros['middle']:.2%} in the middle, "
        f"{zeros['end']:.2%} at t = 1",
        f"{'batch norm':30} {_norm_line(result, plan)}",
        f"{'measured on':30} {plan.train_images} training images without augmentation, all images of {split}",
    ]
    if None not in result["reported_error"]:
        own = " and ".join(f"{value:.2f}" for value in result["reported_error"])
        lines.append(f"{'as reported by the runs':30} error {own} (last epoch, own batch-norm statistics)")
    if plan.points % 2 == 0:
        lines.append(f"note: with {plan.points} points none lies in the middle; an odd number has one")
    return lines


def _norm_line(result: dict[str, Any], plan: Any) -> str:
    if result["norm_layers"] == 0:
        return "none in this network"
    if plan.norm_images is None:
        return "statistics interpolated linearly between those of the two runs"
    return f"statistics recomputed at every point from {plan.norm_images} augmented training images"


def verdict(error_barrier: float | None, *, split: str, curve: str) -> str:
    """Return whether the runs are connected, for a straight line by the usual term."""
    words = ("stable", "not stable") if curve == "line" else ("connected", "not connected by this curve")
    is_below = error_barrier is not None and error_barrier < STABLE_BELOW_POINTS
    return f"{words[0 if is_below else 1]}: by convention, under {STABLE_BELOW_POINTS:g} points of {split} error"


def plot(values: Sequence[float | None]) -> str:
    """Return the values as one ASCII character each, from the lowest (blank) to the highest (@), ! if not finite."""
    finite = [value for value in values if value is not None]
    if not finite:
        return "[" + "!" * len(values) + "]"
    low, high = min(finite), max(finite)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    drawn = "".join("!" if value is None else _LEVELS[round((value - low) * scale)] for value in values)
    return f"{low:.2f} [{drawn}] {high:.2f}"
