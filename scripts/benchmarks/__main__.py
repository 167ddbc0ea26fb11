"""The command scripts/benchmark: which sections are run, in which order, with which options."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.failure import fail
from prune_lab.foundations.schema import suggestion


@dataclass(frozen=True)
class Section:
    """A part of the report; its module is imported when it is run."""

    where: str
    """module and function"""
    minutes: str
    """on two cores"""
    line: str
    is_long: bool = False
    """True: only when asked for by name"""

    def load(self) -> Callable:
        module, _, function = self.where.partition(":")
        return getattr(import_module(f"benchmarks.{module}"), function)


SECTIONS = {
    "goals": Section("steps:goals", "4", "the loop over bare PyTorch, masks and RigL over dense, many rounds"),
    "steps": Section("steps:small", "5", "every method's step over the dense step, ResNet-20, batch 128"),
    "steps_large": Section("steps:large", "10", "the same, ResNet-50 at 224 px", is_long=True),
    "data": Section("data:run", "1", "the in-memory data path over torchvision's DataLoader"),
    "stream": Section("data:stream", "2", "scripts/benchmarks/stream.py: streamed images", is_long=True),
    "formats": Section("formats:run", "1", "fp32 and bf16, contiguous and channels_last; threads"),
    "compile": Section("formats:compiled", "6", "the same with torch.compile, a minute to warm up each", is_long=True),
    "checkpoints": Section("checkpoints:run", "2", "a save in steps, its share of training (computed), resuming"),
    "startup": Section("startup:run", "2", "help, options and a run of one step over importing torch"),
    "scoring": Section("scoring:run", "2", "scores at initialisation and removal of channels over a dense step"),
    "memory": Section("memory:run", "3", "peak memory of RigL over dense and its masks"),
    "peer": Section("peer:run", "2", "training over a plain PyTorch and DataLoader script; --accuracy: both trained"),
    "gpu": Section("gpu:run", "0", "images/s, fraction of the bf16 peak, seconds per CIFAR-10 epoch"),
}


def main(argv: list[str]) -> int:
    try:
        return _run(argv)
    except Exception as error:
        return fail(error)


def _run(argv: list[str]) -> int:
    typed = _parser().parse_intermixed_args(argv)
    overrides = [word for word in typed.words if "=" in word]
    chosen = [word for word in typed.words if "=" not in word]
    for word in chosen:
        if word not in SECTIONS:
            raise UserError(f"section {word}{suggestion(word, SECTIONS)}; allowed: {', '.join(SECTIONS)}")
    from benchmarks.report import Report, load_warning, reason
    from benchmarks.workload import SMALL, Options, compose
    from prune_lab.training.device_config import resolve_device_config

    if typed.root:
        overrides.append(f"dataset.root={typed.root}")
    # Refuses wrong options; sets the number of threads.
    resolve_device_config(compose(Options(tuple(overrides)).over(*SMALL)).trainer)
    options = Options(tuple(overrides), typed.rounds, typed.quick, typed.root, typed.accuracy, typed.epochs,
                      typed.batches)  # fmt: skip
    report, began = Report(), time.monotonic()
    head = report.head()
    print("\n".join(f"{key}: {value}" for key, value in head.items()))
    if warning := load_warning(head["load_average_1min"], head["cores"]):
        print(warning)
    print("each number: the median of ratios paired round by round, in brackets its 99 % interval")
    names = chosen or [name for name, section in SECTIONS.items() if not section.is_long]
    failed = []
    for name in names:
        report.begin(name, SECTIONS[name].line)
        try:
            SECTIONS[name].load()(options, report)
        except UserError:
            raise
        except Exception as error:  # what other sections found must not be lost
            traceback.print_exception(error)
            report.note(f"failed: {reason(error)}")
            failed.append(name)
        if typed.json:
            report.write(Path(typed.json), argv, head)
    left = [name for name in SECTIONS if name not in names]
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes" + (f"; not run: {', '.join(left)}" if left else ""))
    if failed:
        print(f"scripts/benchmark: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(
        f"  {name:12} {section.line} ({section.minutes} min{', only when named' if section.is_long else ''})"
        for name, section in SECTIONS.items()
    )
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark", description="Ratios of times and memory, measured in turn, with intervals.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent("sections, with minutes on two cores:\n") + listed,
    )  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="SECTION|OPTION=VALUE",
                        help="sections (default: all but the long ones) and options of prune-lab, such as model=vgg16")
    parser.add_argument("--rounds", type=_positive, help="rounds of each comparison, instead of each section's own")
    parser.add_argument("--quick", action="store_true", help="few rounds and short: does it run at all?")
    parser.add_argument("--root", help="CIFAR-10 in any form that dataset=cifar10 takes; without it, random images")
    parser.add_argument("--accuracy", action="store_true", help="peer: train both and print top-1 (needs --root)")
    parser.add_argument("--epochs", type=_positive, default=3, help="peer --accuracy: epochs (default: 3)")
    parser.add_argument("--batches", type=_positive, default=30,
                        help="data, peer: batches per stretch or epoch (default: 30)")
    parser.add_argument("--json", help="file for all ratios, machine and versions")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
