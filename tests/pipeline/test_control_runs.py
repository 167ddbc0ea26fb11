"""method.control: the method's own run first, then the control, both side by side."""

from __future__ import annotations

import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from prune_lab.cli import command as cli
from prune_lab.config.run import as_mapping
from prune_lab.core.method import build_method
from prune_lab.families.initial_pruning import InitialPruning
from prune_lab.pipeline import control_runs, runner
from prune_lab.training import loop, phases
from tests.helpers.runs import METHODS, TINY, compose, fork_pair, wait_for

SNIP = (*TINY, *METHODS["snip"])


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def summaries() -> dict[str, dict]:
    """Return the finished runs' summaries by directory name."""
    return {path.parent.name: json.loads(path.read_text()) for path in Path("outputs").glob("*/summary.json")}


def control_and_own(kind: str) -> tuple[dict, dict]:
    """Return the summaries of a control and of the run that it names as the method's own."""
    found = summaries()
    (control,) = (summary for summary in found.values() if summary.get("control/kind") == kind)
    return control, found[control["control/method_run"]]


def test_a_control_is_done_after_the_method_and_shown_beside_it(capsys: pytest.CaptureFixture) -> None:
    assert cli.main([*SNIP, "method.control=shuffle"]) == 0
    control, own = control_and_own("shuffle")
    assert len(summaries()) == 2 and not [key for key in own if key.startswith("control/")]
    assert control["control/method_top1"] == own["final/top1"]
    assert control["control/method_minus_control"] == own["final/top1"] - control["final/top1"]
    assert control["params/nonzero"] == own["params/nonzero"]
    assert "method.control=shuffle" in control["run/command"]
    assert own["run/command"].endswith("method.control=none") and "shuffle" not in own["run/command"]
    printed = capsys.readouterr().out
    assert printed.index(f"run {control['control/method_run']}\n") < printed.index("control shuffle of ")
    (line,) = (line for line in printed.splitlines() if line.startswith("top-1") and line.count("%") == 2)
    assert [word for word in line.split() if word != "%"][1:4] == [
        f"{own['final/top1']:.2f}", f"{control['final/top1']:.2f}", f"{control['control/method_minus_control']:+.2f}",
    ]  # fmt: skip
    logs = [path.read_text() for path in Path("outputs").glob("*/log.txt")]
    assert sorted(line in log for log in logs) == [False, True]


@pytest.mark.parametrize(
    ("own", "control", "told"),
    [(97.49, 98.89, "-1.40 (the method is worse)"), (98.0, 90.5, "+7.50 (the method is better)"),
     (9.0, 9.0, "+0.00 (no difference)")],
)  # fmt: skip
def test_the_difference_is_the_method_minus_its_control(own: float, control: float, told: str) -> None:
    costs = {"sparsity/achieved": None, "macs/inference": 10}
    lines = control_runs.comparison({"final/top1": control, **costs}, {"final/top1": own, **costs}, "shuffle")
    assert lines[0].split() == ["method", "control", "shuffle", "method", "-", "control"]
    assert lines[1] == f"top-1           {own:.2f} %".ljust(26) + f"  {control:.2f} %".ljust(17) + f"  {told}"
    summary, baseline = {"final/top1": control}, {"final/top1": own}
    found = control_runs.figures("shuffle", "top1", summary, baseline=baseline, baseline_name="r")
    assert found["control/method_minus_control"] == own - control


def test_accuracies_of_a_part_of_the_images_are_marked() -> None:
    summary = {"final/top1": 9.0, "final/images": 2000, "data/num_eval": 10000}
    told = control_runs.comparison(summary, summary, "shuffle")[1]
    assert told.endswith("+0.00 (no difference; of 2,000 of 10,000 images)")


def test_the_baseline_run_is_the_one_without_the_option(capsys: pytest.CaptureFixture) -> None:
    assert cli.main([*SNIP]) == 0
    (alone,) = summaries()
    capsys.readouterr()
    assert cli.main([*SNIP, "method.control=reinit"]) == 0
    assert f"done already: outputs/{alone}" in capsys.readouterr().out
    control, _ = control_and_own("reinit")
    assert control["control/method_run"] == alone and len(summaries()) == 2


def test_a_sweep_over_controls_does_the_method_once(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["-m", *SNIP, "method.control=none,shuffle,invert"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("sweep: 3 of 3 runs finished\n") and captured.err == ""
    assert len(summaries()) == 3
    assert captured.out.count("done already") == 2
    assert cli.main(["compare", "outputs"]) == 0
    lines = [[cell.strip() for cell in line.strip("| \n").split("|")]
             for line in capsys.readouterr().out.splitlines() if line.startswith("|")]  # fmt: skip
    rows = [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]
    assert [row["control"] for row in rows] == ["none", "invert", "shuffle"]
    assert rows[0]["method - control"] == "-" and "options" not in rows[0]
    for row in rows[1:]:
        control, own = control_and_own(row["control"])
        assert float(row["method - control"]) == round(own["final/top1"] - control["final/top1"], 2)


def test_a_finished_control_shows_both_again(capsys: pytest.CaptureFixture) -> None:
    command = [*SNIP, "method.control=random"]
    assert cli.main(command) == 0
    assert "method      control random  method - control" in capsys.readouterr().out
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.count("done already") == 2 and "method      control random  method - control" in printed


def test_a_failed_baseline_run_ends_the_command_with_its_code(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(training) -> None:
        raise loop.NonFiniteLoss("the loss is not finite")

    monkeypatch.setattr(phases, "fit", diverge)
    assert cli.main([*SNIP, "method.control=shuffle"]) == 1
    assert "the loss is not finite" in capsys.readouterr().err
    assert len(list(Path("outputs").glob("*/status.json"))) == 1


def test_an_interrupted_baseline_run_ends_the_command_and_the_next_one_goes_on(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], loop.train_step

    def stop_at_seven(training, images, labels) -> None:
        real(training, images, labels)
        calls.append(training.progress.step)
        if len(calls) == 7:
            monkeypatch.setattr(training, "stop", lambda: True)

    monkeypatch.setattr(loop, "train_step", stop_at_seven)
    code = cli.main([*SNIP, "method.control=shuffle"])
    assert code != 0 and len(calls) == 7
    assert cli.main([*SNIP, "method.control=shuffle"]) == 0
    assert "resumed at step 7" in capsys.readouterr().out
    assert len(calls) == 24 and control_and_own("shuffle")


def test_a_dry_run_is_of_the_control_only(capsys: pytest.CaptureFixture) -> None:
    assert cli.main([*SNIP, "method.control=shuffle", "dry_run=true"]) == 0
    assert [path.name for path in Path("outputs").glob("*/*")] == ["dry_run.json"]
    assert "control shuffle: the real command first does the method's own run\n" in capsys.readouterr().out


def test_matched_controls_are_beside_the_matched_method() -> None:
    matched = ("method.distribution=erk", "method.match=macs", "method.match_to=0.4:uniform")
    assert cli.main([*SNIP, *matched, "method.control=shuffle"]) == 0
    control, own = control_and_own("shuffle")
    assert control["match/sparsity"] == own["match/sparsity"] != 0.9
    assert control["macs/inference"] == own["macs/inference"]


def test_epochs_that_were_solved_are_the_methods() -> None:
    """A random mask needs no scoring; solved alone it would train 20 epochs, beside 12 of the method."""
    matched = ("method.distribution=erk", "method.sparsity=0.95", "method.match=train_macs",
               "method.match_to=1:uniform", "method.match_by=epochs", "trainer.limit_train_batches=2")  # fmt: skip
    assert cli.main([*SNIP, *matched, "method.control=random"]) == 0
    control, own = control_and_own("random")
    assert control["match/epochs"] == own["match/epochs"]
    assert control["phases"][-1]["epochs"] == own["phases"][-1]["epochs"]
    assert control["macs/train_dense"] == own["macs/train_dense"] == own["match/target"]
    assert control["match/achieved"] == control["macs/train"] < own["macs/train"]


def test_two_processes_do_both_runs() -> None:
    log = Path("log")
    children = fork_pair(log, lambda: cli.main([*SNIP, "method.control=shuffle"]))
    assert [wait_for(child) for child in children] == [0, 0], log.read_text()
    control, own = control_and_own("shuffle")
    assert control["control/method_minus_control"] == own["final/top1"] - control["final/top1"]
    assert log.read_text().count("method      control shuffle  method - control") == 1


@pytest.mark.slow
def test_torchrun_does_both_runs(child_environment) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "prune_lab"]
    done = subprocess.run([*command, *SNIP, "method.control=shuffle"], env=child_environment, capture_output=True,
                          text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert control_and_own("shuffle")


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", METHODS)
def test_only_controls_have_a_run_beside_them(name: str) -> None:
    config = compose(*TINY, *METHODS[name])
    assert control_runs.in_order(config) == (config,)
    if not isinstance(build_method(config), InitialPruning):
        return
    allowed = typing.get_args(typing.get_type_hints(type(config.method))["control"])
    for kind in set(allowed) - {"none"}:
        control = compose(*TINY, *METHODS[name], f"method.control={kind}")
        own, last = control_runs.in_order(control)
        assert last is control
        assert build_method(own).identity() == build_method(config).identity()
        assert as_mapping(own) == as_mapping(config)


def test_the_pipeline_alone_leaves_out_what_it_does_not_know() -> None:
    assert runner.run(compose(*SNIP, "method.control=shuffle")) == 0
    (summary,) = summaries().values()
    assert not [key for key in summary if key.startswith("control/")]
