"""prune-lab hessian-projection: does the step between two networks avoid the directions of high curvature?"""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

from prune_lab.commands.analysis.output import ResultFolder
from prune_lab.commands.analysis.runs import FinishedRun, data_options, read_run, require_comparable
from prune_lab.commands.arguments import Arguments
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import Count, Index, OpenFraction, coerce
from prune_lab.tracking.lines import to_ascii

_DESCRIPTION = (
    "Project d = w_sgd - w_other, over all trainable parameters, on the eigenvectors of the largest eigenvalues of the "
    "training loss's Hessian at w_sgd. Prints rho = |P d| / |d| beside the level sqrt(k / D) of a random direction."
)


def main(argv: list[str]) -> int:
    """Compute, or read a stored result, and print it.

    Raises:
        UserError: wrong option, or runs that cannot be compared.
    """
    options = parse_options(argv)
    runs = read_run(options.run_sgd), read_run(options.run_other)
    require_comparable(*runs)
    data_options(*runs, options.data)
    if runs[0].digest == runs[1].digest:
        raise UserError(f"{runs[0].directory} and {runs[1].directory} hold the same network: nothing to project")
    from prune_lab.commands.analysis.bench import open_bench  # torch is imported only once the options are valid

    setting = open_bench(*runs, root=options.data, device=options.device, seed=options.seed)
    try:
        _project(options, runs, setting)
    finally:
        setting.dataset.close()
    return 0


def _project(options: Namespace, runs: tuple[FinishedRun, FinishedRun], setting: Any) -> None:
    from prune_lab.commands.analysis import projection

    plan = projection.Plan(
        eigenvectors=options.eigenvectors,
        images=min(options.images, setting.dataset.info.num_train),
        batch_size=options.batch_size,
        iterations=options.iterations,
        tolerance=options.tolerance,
        random_directions=options.random_directions,
    )
    inputs = {
        "plan": vars(plan),
        "seed": options.seed,
        "data": setting.dataset.fingerprint,
        "device_config": setting.device_config.in_fp32().identity(),
    }
    folder = ResultFolder.of("hessian-projection", runs, inputs, chosen=options.output)
    _say(f"w_sgd:   {runs[0].directory}")
    _say(f"w_other: {runs[1].directory}")
    result, _ = folder.settle(runs, lambda: projection.project(setting, runs, plan, report=_say), report=_say)
    for line in summary_lines(result, runs, plan):
        _say(line)
    _say(f"written: {folder.directory}")


def _say(line: str) -> None:
    print(to_ascii(line), flush=True)


def parse_options(argv: list[str]) -> Namespace:
    """Return the checked options.

    Raises:
        UserError: unknown or out of range.
    """
    parser = Arguments("hessian-projection", _DESCRIPTION)
    parser.add_argument("run_sgd", metavar="RUN_SGD", help="directory of a finished run: the Hessian is taken here")
    parser.add_argument("run_other", metavar="RUN_OTHER", help="of another one with the same network and data set")
    parser.add_argument("--eigenvectors", type=int, default=10, help="how many, of the largest eigenvalues; default 10")
    parser.add_argument(
        "--images", type=int, default=1000,
        help="training images of the loss, drawn from the seed; default 1000 (published: all)",
    )  # fmt: skip
    parser.add_argument(
        "--iterations", type=int, default=60,
        help="Hessian-vector products at most; default 60. Each one keeps a vector of all parameters in memory",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=0.01,
        help="ends when every residual is below this times its eigenvalue; default 0.01",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=125, help="images per graph in memory; default 125")
    parser.add_argument("--random-directions", type=int, default=5, help="to compare with; default 5")
    parser.add_argument("--data", metavar="ROOT", help="where the data lie; default: dataset.root of the runs")
    parser.add_argument("--seed", type=int, default=0, help="draws images and start vector; default 0")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default auto")
    parser.add_argument("--output", metavar="FOLDER", help="default outputs/analysis/hessian-projection-RUNS-HASH")
    options = parser.parse_args(argv)
    for name in ("eigenvectors", "images", "iterations", "batch_size", "random_directions"):
        coerce(Count, getattr(options, name), f"--{name.replace('_', '-')}")
    coerce(Index, options.seed, "--seed")
    coerce(OpenFraction, options.tolerance, "--tolerance")
    if options.iterations < options.eigenvectors:
        raise UserError(f"--iterations must be at least --eigenvectors={options.eigenvectors}, "
                          f"got {options.iterations}")
    return options


def summary_lines(result: dict[str, Any], runs: tuple[FinishedRun, FinishedRun], plan: Any) -> list[str]:
    """Return rho beside that of a random direction, the eigenpairs, and the spread of the weights."""
    level, drawn = result["random_level"], result["random_rho"]
    size, count = result["parameters"], plan.eigenvectors
    lines = ["   i  eigenvalue  residual  (e_i . d) / |d|"]
    for index, (value, residual, share) in enumerate(
        zip(result["eigenvalues"], result["residuals"], result["cosines"], strict=True), start=1
    ):
        lines.append(f"{index:4}  {value:10.4g}  {residual:8.2g}  {share:15.3e}")
    outcome = "converged" if result["converged"] else "NOT CONVERGED: raise --iterations"
    norms, spreads = result["norm"], result["spread"]
    lines += [
        f"eigenpairs           {outcome} ({result['products']} products)",
        f"rho = |P d| / |d|    {result['rho']:.4e}, {result['rho'] / level:.2f} times the level of a random direction",
        f"random direction     {level:.4e} = sqrt({count} / {size}); {len(drawn)} drawn ones: "
        f"{min(drawn):.4e} to {max(drawn):.4e}",
        f"|d|                  {result['distance']:.4f}; |w_sgd| {norms[0]:.4f}, |w_other| {norms[1]:.4f}",
        f"|w|_2 / |w|_1        {spreads[0]:.4e} w_sgd, {spreads[1]:.4e} w_other; "
        f"{1 / math.sqrt(size):.4e} = 1/sqrt(D) if all weights were of one size",
        f"loss of the Hessian  mean cross-entropy over {plan.images} training images, eval mode, no augmentation: "
        f"{result['loss']:.4f}",
    ]
    seeds = [run.seed for run in runs]
    if seeds[0] != seeds[1]:
        lines.append(f"note: the runs have seeds {seeds[0]} and {seeds[1]}; published values are for runs that share "
                     "initial weights and order of batches")
    return lines
