"""prune-lab export: the finished network of a run for other runtimes. Options are checked without torch."""

from __future__ import annotations

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Annotated, Any

from prune_lab.commands.analysis.runs import FinishedRun, read_run
from prune_lab.commands.arguments import Arguments
from prune_lab.commands.export import catalog, table
from prune_lab.commands.export.latency import MIN_ROUNDS
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import read_json, write_json
from prune_lab.foundations.schema import Count, Positive, Range, coerce
from prune_lab.tracking.lines import quantity, to_ascii

_DESCRIPTION = """\
Write the finished network of a run for other runtimes, check each file against the run's network, and
measure size and latency on this machine, beside the same network before pruning.

formats (--format; default: all but the last whose packages are installed):
  safetensors    model.safetensors, model.json: tensors and a description; prune_lab.load(FOLDER)
  torch_export   model.pt2: torch.export.load("model.pt2").module()
  onnx           model.onnx, checked with onnxruntime          pip install onnx onnxscript onnxruntime
  openvino       model.xml, model.bin, in fp32 and, on CPUs that have it, bf16    pip install openvino
  semi_structured  model_2_4.safetensors: a 2:4 network (method.distribution=2:4) without its zeros; timed with the
                 kernels for it where a GPU has them

Batch size is free in all of them; input "images" [batch, 3, size, size], normalised as export.json says.
A file is kept if its outputs on random images differ from those of the run's network in PyTorch (float64) by
no more than the tolerance, relative to the spread of the outputs over the images; otherwise it is removed, and
the exit code is 1.
(bf16 that --precision does not ask for is only measured: it never costs the file.)

Latency: all runtimes take turns, dense and pruned, in every round; medians with quartiles. A ratio is printed
where a 99 % interval of its median over rounds leaves out 1 and it exceeds 5 %, else "no difference".
Everything measured, machine and versions included, is written to export.json.
"""


def main(argv: list[str]) -> int:
    """Export, print the findings and return the exit code.

    Raises:
        UserError: wrong option, no finished run, or a network that the format cannot hold or that changed in it.
    """
    options = parse_options(argv)
    names, left_out = catalog.choose(options.format)
    if options.precision is not None and "openvino" not in names:
        raise UserError("--precision is of OpenVINO, which is not among the formats")
    run = read_run(options.run)
    out = _folder(options, run)
    _say(f"network: {_network_line(run)}")
    from prune_lab.commands.export import work  # torch is imported only once the options are valid

    plan = work.Plan(
        out=out, formats=names, left_out=left_out, is_chosen=options.format is not None,
        precisions=options.precision, tolerances={"fp32": options.tolerance, "bf16": options.tolerance_bf16},
        batches=[] if options.no_latency else options.batch, rounds=options.repeats, threads=options.threads,
    )  # fmt: skip
    record, refused = work.export(run, original_network(run), plan, _say)
    write_json(out / work.RECORD, record)
    _show(record)
    _say(f"written: {out}")
    if refused:
        raise UserError("; ".join(refused))
    return 0


def parse_options(argv: list[str]) -> Namespace:
    """Return the checked options.

    Raises:
        UserError: unknown, out of range, or without effect given the others.
    """
    parser = Arguments("export", _DESCRIPTION)
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("run", metavar="RUN", help="directory of a finished run")
    parser.add_argument("--format", metavar="NAMES", help="with commas between; default: all that are installed")
    parser.add_argument("--out", metavar="DIR", help="folder of the files; default RUN/export")
    parser.add_argument(
        "--tolerance",
        metavar="X",
        type=float,
        default=1e-4,
        help="in fp32: largest difference over spread of the outputs; default 1e-4",
    )
    parser.add_argument(
        "--tolerance-bf16", metavar="X", type=float, default=0.05, help="the same in bf16; default 0.05"
    )
    parser.add_argument(
        "--precision", metavar="NAMES", help="of OpenVINO: fp32, bf16 or fp32,bf16; default: what the CPU has"
    )
    parser.add_argument("--batch", metavar="SIZES", help="batch sizes to time; default 1,64")
    parser.add_argument(
        "--repeats", metavar="N", type=int, help=f"rounds, at least {MIN_ROUNDS}; default 15, fewer if they take long"
    )
    parser.add_argument("--threads", metavar="N", type=int, help="of every runtime; default: as PyTorch")
    parser.add_argument("--no-latency", action="store_true", help="time nothing")
    options = parser.parse_args(argv)
    _check(options)
    return options


def _check(options: Namespace) -> None:
    if options.no_latency and (options.batch, options.repeats) != (None, None):
        raise UserError(f"--{'batch' if options.batch else 'repeats'} is of no effect with --no-latency")
    options.tolerance = coerce(Positive, options.tolerance, "--tolerance")
    options.tolerance_bf16 = coerce(Positive, options.tolerance_bf16, "--tolerance-bf16")
    sizes = catalog.split("1,64" if options.batch is None else options.batch, "--batch")
    options.batch = [coerce(Count, int(text) if text.isdecimal() else text, "--batch") for text in sizes]
    repeats = 15 if options.repeats is None else options.repeats
    options.repeats = coerce(Annotated[int, Range(MIN_ROUNDS)], repeats, "--repeats")
    if options.threads is not None:
        coerce(Count, options.threads, "--threads")
    if options.precision is not None:
        options.precision = catalog.split(options.precision, "--precision")
        for name in options.precision:
            if name not in catalog.PRECISIONS:
                raise UserError(f"--precision {name}: allowed are {', '.join(catalog.PRECISIONS)}")


def _folder(options: Namespace, run: FinishedRun) -> Path:
    """Return the folder of the files.

    Raises:
        UserError: it is a file, or a run directory, whose own files would be replaced.
    """
    out = run.directory / "export" if options.out is None else Path(options.out)
    if (out / "run.json").exists():
        raise UserError(f"--out {out} is a run directory, whose files stay as they are; choose another folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, no folder")
    return out


def original_network(run: FinishedRun) -> dict[str, Any]:
    """Return the description of the run's initial network, before any removal."""
    options = read_json(run.directory / "run.json")["config"]["model"]
    return {"model": options, "num_classes": run.network["num_classes"], "image_size": run.network["image_size"]}


def _network_line(run: FinishedRun) -> str:
    name, size = run.network["model"]["name"], run.network["image_size"]
    parts = [f"{name} of {run.name}, {run.network['num_classes']} classes, {size} px"]
    for what, count, dense in (
        ("parameters", "params/kept", "params/dense"), ("MACs per image", "macs/inference", "macs/dense"),
    ):  # fmt: skip
        if run.summary.get(count) and run.summary.get(dense):
            parts.append(f"{quantity(run.summary[count])} of {quantity(run.summary[dense])} {what}")
    return "; ".join(parts)


def _show(record: dict[str, Any]) -> None:
    """Print sizes and times."""
    if record["formats"]:
        sys.stdout.write("\n" + to_ascii(table.size_table(record["formats"])))
    latency, machine = record["latency"], record["machine"]
    if latency is not None:
        sys.stdout.write("\n" + to_ascii(table.latency_table(latency["rows"])))
        for line in [*table.sparse_lines(latency["sparse"]), *table.kernel_lines(latency["kernels"])]:
            _say(line)
        rounds = sorted({row["rounds"] for row in latency["rows"]})
        _say(
            f"medians (quartiles) of {' and '.join(map(str, rounds))} rounds on {machine['cpu']}, "
            f"{machine['threads']} of {machine['cores']} cores, load average {machine['load_average_1min']}"
        )
        if table.is_busy(machine):
            _say(
                "note: other work competes for the cores; short calls suffer less from it than long ones, so that "
                "ratios are distorted, between runtimes above all: repeat on an idle machine"
            )
    if record["dense"]:
        _say(f"dense: {record['dense']}")


def _say(line: str) -> None:
    print(to_ascii(line), flush=True)
