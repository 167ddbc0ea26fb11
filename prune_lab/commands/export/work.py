"""One export from end to end: write, check, measure; the record that becomes export.json."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune_lab import models
from prune_lab.commands.analysis.runs import FinishedRun
from prune_lab.commands.export import agreement, files, formats, packed, runtimes, sparse, tensor_cores, timing
from prune_lab.commands.export.catalog import FORMATS, Runtime
from prune_lab.commands.export.catalog import runtimes as runtimes_of
from prune_lab.commands.export.files import Network
from prune_lab.commands.export.machine import machine, versions
from prune_lab.commands.export.table import check_line
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline.saved_model import load_model

RECORD = "export.json"
Report = Callable[[str], None]
DENSE = "the network before pruning, with fresh weights: latency depends on shapes, not on values"
_FP32_ONLY = (
    "note: bf16 is too coarse for this network and not timed; on this CPU OpenVINO takes it unless it is told "
    "INFERENCE_PRECISION_HINT=f32"
)


@dataclass(frozen=True)
class Plan:
    """The options of the command line."""

    out: Path
    formats: Sequence[str]
    left_out: dict[str, str]
    """format -> why, known before any work"""
    is_chosen: bool
    """the formats were requested by name: one that cannot be written is an error instead of left out"""
    precisions: Sequence[str] | None
    """of OpenVINO; None: fp32, and bf16 if the CPU supports it"""
    tolerances: dict[str, float]
    """precision -> largest difference, relative to the scale of the reference"""
    batches: Sequence[int]
    """empty: latency is not measured"""
    rounds: int
    threads: int | None


def export(run: FinishedRun, original: dict[str, Any], plan: Plan, report: Report) -> tuple[dict[str, Any], list[str]]:
    """Write the network of `run` in the formats of the plan; return the record of all findings, and rejections.

    Args:
        original: description of the run's initial network, before any removal.

    Raises:
        UserError: the network's outputs are unusable, or a requested format needs a graph or a 2:4 network that the
            run does not have.
    """
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    torch.set_flush_denormal(True)  # denormal numbers are slow, and which network has them is random
    work = _Export(run, original, plan, report)
    plan.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=plan.out) as temporary:
        work.write_all(Path(temporary))
        return work.record(), work.refused


class _Export:
    """The networks, and the findings about them so far."""

    def __init__(self, run: FinishedRun, original: dict[str, Any], plan: Plan, report: Report) -> None:
        self._run, self._plan, self._report = run, plan, report
        self._precisions = _precisions(plan)
        self._machine = machine(torch.get_num_threads())  # before this process loads it
        self._left_out: dict[str, str] = {}
        self._leave_out(plan.left_out)
        model = load_model(run.directory).requires_grad_(False)
        if "semi_structured" in plan.formats:
            packed.check(model)
        self._network = self._with_graph(model)
        self._reference = agreement.make_reference(self._network.model, self._network.image_size)
        self._dense = self._make_dense(original)
        self._label = "dense" if self._dense is None else "pruned"
        self._written: dict[str, dict[str, Any]] = {}
        self._engines: list[Runtime] = []
        self._latency: dict[str, Any] | None = None
        self.refused: list[str] = []

    def _leave_out(self, reasons: Mapping[str, str]) -> None:
        self._left_out |= reasons
        for reason in dict.fromkeys(reasons.values()):
            names = [name for name in reasons if reasons[name] == reason]
            self._report(f"left out: {', '.join(names)}: {reason}")

    def _with_graph(self, model: nn.Module) -> Network:
        """Return the network with its graph; without one, graph formats are left out, or an error if requested."""
        description = self._run.network
        graphs = [name for name in self._plan.formats if FORMATS[name].is_graph]
        if not graphs:
            return Network(model, description)
        try:
            return Network(model, description, formats.trace(model, description["image_size"]))
        except formats.NotExportable as error:
            if self._plan.is_chosen:
                raise
            self._leave_out(dict.fromkeys(graphs, str(error)))
            return Network(model, description)

    def _make_dense(self, original: dict[str, Any]) -> Network | None:
        """Return the network before pruning, None if the run pruned nothing."""
        summary = self._run.summary
        if summary.get("macs/inference") == summary.get("macs/dense", -1):
            return None
        model = models.from_description(original).eval().requires_grad_(False)
        has_graph = self._network.program is not None
        return Network(model, original, formats.trace(model, original["image_size"]) if has_graph else None)

    def write_all(self, temporary: Path) -> None:
        """Write, check and time; files of the dense network stay in the folder `temporary`."""
        (self._plan.out / RECORD).unlink(missing_ok=True)  # it would describe older files
        aside, beside = temporary / "new", temporary / "dense"
        for folder in (aside, beside):
            folder.mkdir()
        for name in self._plan.formats:
            if name not in self._left_out:
                self._write(name, aside, beside)
        if self._plan.batches:
            self._latency = self._time(beside)

    def _write(self, name: str, aside: Path, beside: Path) -> None:
        """Write one format, and keep it if every runtime agrees with the run's network."""
        files.remove(name, self._plan.out)  # of an earlier export: nothing unchecked lies there
        try:
            files.write(name, self._network, aside)
        except formats.NotExportable as error:
            if self._plan.is_chosen:
                self.refused.append(str(error))
            else:
                self._leave_out({name: str(error)})
            return
        engines = runtimes_of(name, self._precisions)
        checks = files.check(engines, aside, self._reference, self._plan.tolerances, threads=torch.get_num_threads())
        for check in checks:
            self._report(check_line(check.record(), FORMATS[name].files))
        failed = [check for check in checks if not check.is_within]
        # bf16 was not requested: a file that is correct in fp32 is kept, only bf16 is not timed.
        fatal = [check for check in failed if check.runtime.precision == "fp32" or self._plan.precisions is not None]
        if fatal:
            self.refused += [_refusal(check) + self._sensitivity(check) for check in fatal]
            return
        if failed:
            self._report(_FP32_ONLY)
        files.move(name, aside, self._plan.out)
        sizes = {self._label: files.sizes(name, self._plan.out)}
        if self._dense is not None:
            files.write(name, self._dense, beside)
            sizes["dense"] = files.sizes(name, beside)
        records = [check.record() for check in checks]
        self._written[name] = {"files": list(FORMATS[name].files), "checks": records, "size": sizes}
        self._engines += [check.runtime for check in checks if check.is_within]

    def _sensitivity(self, check: files.Check) -> str:
        """Return a note in brackets if the network's own rounding is near the tolerance; else an empty text."""
        rounding = self._reference.rounding
        if rounding <= check.tolerance / 10:
            return ""
        return f" (the network amplifies rounding: PyTorch in fp32 is itself {rounding:.2g} from float64)"

    def _time(self, beside: Path) -> dict[str, Any]:
        model, plan = self._network.model, self._plan
        networks = {self._label: timing.Timed(model, plan.out)}
        if self._dense is not None:
            networks = {"dense": timing.Timed(self._dense.model, beside), **networks}
        engines = [engine for engine in self._engines if FORMATS[engine.format].is_graph]
        setting = timing.Setting(
            plan.batches, plan.rounds, torch.get_num_threads(), self._network.image_size, plan.tolerances
        )
        return timing.measure(
            networks, engines, setting,
            try_sparse=self._has_zeros_only(), try_kernels=self._can_use_kernels(), report=self._report,
        )  # fmt: skip

    def _can_use_kernels(self) -> bool:
        """Return whether the network was written as 2:4 and a GPU can compute it so; report why not."""
        if "semi_structured" not in self._written or self._label == "dense":
            return False
        reason = tensor_cores.left_out()
        if reason is not None:
            self._report(f"2:4 kernels are left out: {reason}")
        return reason is None

    def _has_zeros_only(self) -> bool:
        """Return whether weights are zero and the shapes those of the dense network."""
        if self._dense is None:
            return False
        model = self._network.model
        is_same = _shapes(model) == _shapes(self._dense.model)
        return is_same and any(sparse.can_be_csr(module) for module in model.modules())

    def record(self) -> dict[str, Any]:
        """Return the content of export.json."""
        run, summary = self._run, self._run.summary
        counts = ("params/dense", "params/total", "params/nonzero", "params/kept", "macs/dense", "macs/inference",
                  "final/top1")
        return {
            "run": run.name,
            "run/id": summary.get("run/id"),
            **{key: summary.get(key) for key in counts},
            "network": run.network,
            "input": {
                "name": formats.INPUT, "shape": ["batch", 3, *[self._network.image_size] * 2], "dtype": "float32",
                "pixels": "RGB in [0, 1], minus mean, over std", "mean": run.dataset.mean, "std": run.dataset.std,
            },
            "output": {"name": formats.OUTPUT, "shape": ["batch", run.network["num_classes"]]},
            "machine": self._machine,
            "versions": versions(),
            "checked_on": f"random images in batches of {', '.join(map(str, agreement.BATCHES))}",
            "largest_output": self._reference.largest,
            "scale_of_outputs": self._reference.scale,
            "fp32_rounding": self._reference.rounding,
            "formats": self._written,
            "left_out": self._left_out,
            "refused": self.refused,
            "dense": None if self._dense is None else DENSE,
            "latency": self._latency,
        }  # fmt: skip


def _shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in model.parameters()]


def _precisions(plan: Plan) -> Sequence[str]:
    """Return the number formats that OpenVINO is checked and timed in."""
    if "openvino" not in plan.formats:
        return ("fp32",)
    has_bf16 = runtimes.openvino_has_bf16()
    if plan.precisions is None:
        return ("fp32", "bf16") if has_bf16 else ("fp32",)
    if "bf16" in plan.precisions and not has_bf16:
        raise UserError("--precision bf16: this CPU has no bf16 instructions, OpenVINO would compute in fp32")
    return plan.precisions


def _refusal(check: files.Check) -> str:
    option = "--tolerance-bf16" if check.runtime.precision == "bf16" else "--tolerance"
    return (
        f"{check.runtime.title} differs from the run's network by {check.agreement.relative:.2g} of the spread of its "
        f"outputs, above {option} {check.tolerance:g}; {' and '.join(FORMATS[check.runtime.format].files)} removed"
    )
