"""prune-lab wandb-sync: sends runs to W&B from its local files. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab.commands.arguments import Arguments
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import read_json
from prune_lab.foundations.locks import is_held
from prune_lab.tracking.base import RunInfo
from prune_lab.tracking.jsonl import read_records
from prune_lab.tracking.wandb_key import require_key
from prune_lab.tracking.wandb_sink import WandbSink

_TIMEOUT_S = 120.0
"""for start and finish each; the user waits for the upload here"""


@dataclass(frozen=True)
class Sent:
    """Outcome of one refill."""

    url: str
    num_sent: int
    num_present: int
    """records that W&B already had"""


def refill(
    run_dir: Path,
    *,
    project: str | None = None,
    entity: str | None = None,
    suffix: str | None = None,
    timeout_s: float = _TIMEOUT_S,
    report: Callable[[str], None] = lambda text: None,
) -> Sent:
    """Send metrics.jsonl, layers.json and summary.json of a run to the W&B run of the same id.

    Records that W&B already has are kept, and missing ones follow. So a refill can be repeated, and completes a broken
    upload. Times in W&B are those of the upload.

    Args:
        project: W&B project; None: the one in the run's options. Likewise `entity`.
        suffix: added to id and name after a hyphen. W&B never frees an id: a run deleted there needs a new one.

    Raises:
        UserError: no run there, its files cannot be read, no key, or W&B refused.
    """
    require_key("prune-lab wandb-sync")
    info, logger, status = _read(run_dir, suffix)
    sink = WandbSink(
        mode="online",
        project=project or logger.get("project") or "prune-lab",
        entity=entity or logger.get("entity"),
        report=report,
        init_timeout_s=timeout_s,
        finish_timeout_s=timeout_s,
    )
    try:
        records = read_records(run_dir / "metrics.jsonl")
        return _send(sink, info, records, status)
    except Exception as error:  # wandb raises many types; only their text is useful to the reader
        raise UserError(f"{run_dir}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _read(run_dir: Path, suffix: str | None) -> tuple[RunInfo, dict[str, Any], dict[str, Any]]:
    """Return the run's identity, its logger options and its status."""
    try:
        run = read_json(run_dir / "run.json")
        status = read_json(run_dir / "status.json")
    except FileNotFoundError as error:
        raise UserError(f"{run_dir} is not the directory of a run (no {Path(error.filename).name})") from error
    except ValueError as error:
        raise UserError(f"{run_dir} cannot be read: {error}") from error
    ending = f"-{suffix}" if suffix else ""
    try:
        info = RunInfo(
            run_dir=run_dir,
            run_id=run["id"] + ending,
            name=run["name"] + ending,
            group=run["group"],
            tags=run["tags"],
            config=run["config"],
            plan=run["plan"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{run_dir}: run.json is not what a run writes ({error})") from error
    return info, info.config.get("logger") or {}, status


def _send(sink: WandbSink, info: RunInfo, records: list[dict[str, Any]], status: dict[str, Any]) -> Sent:
    sink.start(info)
    try:
        for record in records:
            sink.log(record)
        for name, send in (("layers.json", sink.layers), ("summary.json", sink.summary)):
            if (info.run_dir / name).exists():
                send(read_json(info.run_dir / name))
    finally:
        sink.finish(status["status"], status["error"])
    present = min(sink.num_present, len(records))
    return Sent(sink.url, len(records) - present, present)


def _sync(run_dir: Path, options: argparse.Namespace) -> str:
    """Send one run, print the outcome, and return its category for the count."""
    if not (run_dir / "run.json").exists():
        print(f"{run_dir}: skipped, it holds results without the run (no run.json)", flush=True)
        return "skipped"
    if is_held(run_dir / ".lock"):  # a process is running it: it would be marked as failed in W&B
        print(f"{run_dir}: running, skipped", flush=True)
        return "skipped"
    try:
        sent = refill(run_dir, project=options.project, entity=options.entity, suffix=options.suffix)
    except UserError as error:
        print(f"prune-lab: error: {error}", file=sys.stderr, flush=True)
        return "failed"
    print(f"{run_dir}: {sent.num_sent} records sent, {sent.num_present} there before: {sent.url}", flush=True)
    return "sent"


def main(argv: list[str]) -> int:
    """Send every run that the command line names, one after the other; return 1 if any could not be sent.

    Raises:
        UserError: wrong option, no key, or no run there.
    """
    from prune_lab.commands.compare.runs import find_runs

    parser = Arguments("wandb-sync", "Send runs to W&B from their local files.")
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run directories, folders of them, or patterns")
    parser.add_argument("--project", help="W&B project (default: the run's)")
    parser.add_argument("--entity", help="W&B team or user (default: the run's)")
    parser.add_argument("--suffix", help="added to the run's id, for a run that was deleted in W&B")
    options = parser.parse_args(argv)
    require_key("prune-lab wandb-sync")
    counts = Counter(_sync(run_dir, options) for run_dir in find_runs(options.runs))
    print("wandb-sync: " + ", ".join(f"{counts[word]} {word}" for word in ("sent", "skipped", "failed")))
    return 1 if counts["failed"] else 0
