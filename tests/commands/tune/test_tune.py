"""Hyper-parameter search: the space, trials that end in every way, studies that go on, and what is refused."""

from __future__ import annotations

import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from prune_lab.cli import command as cli
from prune_lab.commands.tune import command as tune
from prune_lab.commands.tune import objectives, search, space, study
from prune_lab.commands.tune.watch import TrialWatch
from prune_lab.config.run import RunConfig
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.signals import STOPPED, StopFlag
from prune_lab.tracking import BaseSink, RunInfo
from tests.helpers.runs import TINY, assert_same_run, compose, execute, fork, run_dir, status, wait_for

optuna = pytest.importorskip("optuna")

RIGL = (*TINY, "method=rigl", "method.interval=2", "dataset.validation=0.25")
ALPHA = "method.alpha=interval(0.1,0.5)"
EPOCHS = 4


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Runs:
    """Stands in for the pipeline: what a run reaches is a formula, so that a search takes milliseconds."""

    def __init__(self) -> None:
        self.alphas: list[float] = []
        self.reached: Callable[[float], float] = lambda alpha: 80 - 100 * abs(alpha - 0.3)
        self.ending: Callable[[int], int] = lambda index: 0
        """exit code of the run that comes so many after the first one"""
        self.error = "no space left"
        self.asked: list[str] = []
        self.sparsity: Callable[[int], float] = lambda epoch: 0.9
        """after an epoch"""

    def run(self, config: RunConfig, *, observe: Callable[[StopFlag], BaseSink]) -> int:
        alpha, index = config.method.alpha, len(self.alphas)
        self.alphas.append(alpha)
        stop, code = StopFlag(), self.ending(index)
        sink = observe(stop)
        plan = [{"name": "train", "epochs": EPOCHS, "length": f"{EPOCHS} epochs"}]
        sink.start(RunInfo(Path("run"), "id", "name", "group", plan=plan))
        for epoch in range(1, EPOCHS + 1):
            sink.log({"phase": "train", "epoch": epoch, "sparsity": self.sparsity(epoch),
                      "eval/top1": self.reached(alpha) * epoch / EPOCHS})  # fmt: skip
            if stop():
                self.asked.append(stop.reason)
                return stop.exit_code
            if code > STOPPED and epoch == 2:
                return code
        sink.finish("failed" if code else "finished", self.error if code else None)
        if code == 0:
            sink.summary({"final/top1": self.reached(alpha), "macs/inference_ratio": alpha, "delta/top1": None})
        return code


compose_once = functools.cache(compose)


def composed(conf_dir: Path, overrides: list[str], *, sweep: bool) -> list[RunConfig]:
    """Return options as usual, but compose those of trials that differ in alpha once: it takes most of the time."""
    others = [line for line in overrides if not line.startswith("method.alpha=")]
    (alpha,) = (line.partition("=")[2] for line in overrides if line not in others)
    config = compose_once(*others)
    return [replace(config, method=replace(config.method, alpha=float(alpha)))]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    stand_in = Runs()
    monkeypatch.setattr(search, "runner", SimpleNamespace(run=stand_in.run))
    for module in (tune, search):
        monkeypatch.setattr(module, "compose_checked", composed)
    monkeypatch.setattr(tune, "_check_data", lambda config: "abcd")
    return stand_in


def find(*arguments: str) -> int:
    return cli.main(["tune", *RIGL, ALPHA, "--study", "s", *arguments])


def trials(name: str = "s") -> list:
    return optuna.load_study(study_name=name, storage=f"sqlite:///outputs/tune/{name}.db").trials


def states(name: str = "s") -> list[str]:
    return [trial.state.name for trial in trials(name)]


# The space


def read(lines: list[str]) -> space.Space:
    return space.read(OverridesParser.create().parse_overrides(lines))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a=interval(0.1,0.5)", optuna.distributions.FloatDistribution(0.1, 0.5)),
        ("a=interval(1,10)", optuna.distributions.FloatDistribution(1.0, 10.0)),
        ("a=int(interval(1,10))", optuna.distributions.IntDistribution(1, 10)),
        ("a=tag(log,interval(1e-4,1e-1))", optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)),
        ("a=tag(log,int(interval(1,64)))", optuna.distributions.IntDistribution(1, 64, log=True)),
        ("a=range(1,10,2)", optuna.distributions.IntDistribution(1, 9, step=2)),
        ("a=range(1,9,2)", optuna.distributions.IntDistribution(1, 7, step=2)),
        ("a=range(3)", optuna.distributions.IntDistribution(0, 2)),
        ("a=range(10,1,-2)", optuna.distributions.IntDistribution(2, 10, step=2)),
        ("a=range(0.1,0.5,0.1)", optuna.distributions.FloatDistribution(0.1, 0.4, step=0.1)),
        ("a=x,1,null,true", optuna.distributions.CategoricalDistribution(("x", "1", "null", "True"))),
        ("a=choice([1,2],'b c')", optuna.distributions.CategoricalDistribution(("[1,2]", "b\\ c"))),
    ],
)
def test_sweep_grammar_is_read_as_distributions(line: str, expected) -> None:
    found = read(["fixed=1", line])
    assert found.searched == {"a": expected}
    assert found.lines == ["fixed=1", line]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a=1"], "nothing to search; give an option several values"),
        (["a=interval(2,1)"], r"a=interval\(2,1\): the interval ends before it starts"),
        (["a=tag(log,interval(0,1))"], "must start above 0, got 0"),
        (["a=tag(lin,interval(0,1))"], "the only tag is log"),
        (["a=tag(log,range(1,9))"], "the only tag is log, for an interval"),
        (["a=range(5,1)"], r"a=range\(5,1\) holds no values"),
        (["a=shuffle(1,2)"], "shuffle means nothing"),
        (["a=x,y,x"], "a=x,y,x names a value twice"),
        (["a=1,2", "a=3"], "a is given 2 times"),
    ],
)
def test_values_that_cannot_be_searched_are_refused(lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(lines)


def test_parameters_become_the_line_that_is_run() -> None:
    found = read(["method=rigl", "a=interval(0,1)", "+b=1,2", "c=range(1,9)", "d=interval(0,1)"])
    parameters = {"a": 0.123456789, "+b": "2", "c": 3, "d": 1e-05}
    assert found.command(parameters) == ["method=rigl", "a=0.123457", "+b=2", "c=3", "d=1e-05"]


def test_probes_reach_every_category_and_both_ends() -> None:
    found = list(read(["a=x,y,z", "b=interval(0,1)", "c=3"]).probes())
    assert found == [{"a": "x", "b": 0.0}, {"a": "y", "b": 0.0}, {"a": "z", "b": 0.0}, {"a": "x", "b": 1.0}]


def test_places_do_not_belong_to_what_is_searched() -> None:
    places = ["logger.wandb=disabled", "output_dir=x", "dataset.root=y", "dataset.cache_dir=z", "+dataset.workers=2",
              "trainer.device=cpu", "trainer.threads=1"]  # fmt: skip
    assert read([*places, "seed=1", "a=1,2"]).identity() == ["a=1,2", "seed=1"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a=x,y", "b=range(1,6,2)"], [("x", 1), ("x", 3), ("x", 5), ("y", 1), ("y", 3), ("y", 5)]),
        (["a=range(0.1,0.35,0.1)"], [(0.1,), (0.2,), (0.3,)]),
        (["a=x,y", "b=interval(0.5,0.5)"], [("x", 0.5), ("y", 0.5)]),
        (["a=tag(log,int(interval(2,4)))"], [(2,), (3,), (4,)]),
        (["a=x,y", "b=interval(0,1)"], None),
        (["a=int(interval(1,1000000000))"], None),
    ],
)
def test_points_of_a_finite_space(lines: list[str], expected: list[tuple] | None) -> None:
    found = read(lines)
    assert found.num_points == (None if expected is None else len(expected))
    points = [tuple(point.values()) for point in found.points()]
    assert points == [tuple(pytest.approx(value) for value in point) for point in expected or []]


def test_objectives_have_a_direction() -> None:
    found = objectives.parse("top1,macs,params/total")
    assert [goal.key for goal in found] == ["final/top1", "macs/inference_ratio", "params/total"]
    assert [goal.direction for goal in found] == ["maximize", "minimize", "minimize"]
    assert objectives.shown(found, [50.0, 0.25, 1000]) == "top1=50 macs=0.25 params/total=1000"


# A search


def test_a_search_finds_the_best_and_shows_how_to_repeat_it(runs: Runs, capsys: pytest.CaptureFixture) -> None:
    assert find("--trials", "20", "--pruner", "none") == 0
    out = capsys.readouterr().out
    assert states() == ["COMPLETE"] * 20 and len(runs.alphas) == 20
    best = max(runs.alphas, key=runs.reached)
    assert abs(best - 0.3) < 0.02
    lines = out.splitlines()
    number = runs.alphas.index(best)
    shown = f"trial {number}: method.alpha={best:.6g}  top1={runs.reached(best):.6g}  finished"
    assert shown in lines and f"best: {shown}" in lines
    command = lines[lines.index(f"best: {shown}") + 1].strip()
    assert command == shlex.join(["prune-lab", *RIGL, f"method.alpha={best:.6g}"])
    assert compose(*shlex.split(command)[1:]).method.alpha == best
    assert lines[-1] == "importance for top1: method.alpha 1.00"


def test_the_same_command_goes_on_and_a_finished_study_is_shown(runs: Runs, capsys: pytest.CaptureFixture) -> None:
    assert find("--trials", "12", "--study", "whole") == 0
    whole, runs.alphas = runs.alphas, []
    assert find("--trials", "5") == 0
    assert find("--trials", "12") == 0
    assert runs.alphas == whole, "what is tried does not depend on where the search was stopped"
    capsys.readouterr()
    assert find("--trials", "12") == 0
    out = capsys.readouterr().out
    assert runs.alphas == whole
    assert sum(line.startswith("trial ") for line in out.splitlines()) == 12 and "best: trial" in out
    assert "study s: " in out and "outputs/tune/s.db" in out


def test_without_a_name_the_study_belongs_to_the_options(runs: Runs) -> None:
    for options in ([], ["seed=1"], []):
        assert cli.main(["tune", *RIGL, ALPHA, *options, "--trials", "2"]) == 0
    assert len(runs.alphas) == 4
    assert len(list(Path("outputs/tune").glob("fake-resnet20-rigl-*.db"))) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_search_and_the_same_command_resumes_the_trial(
    runs: Runs, capsys: pytest.CaptureFixture, number: int
) -> None:
    assert find("--trials", "4", "--study", "whole") == 0
    whole, runs.alphas = runs.alphas, []
    runs.ending = lambda index: 128 + number if index == 2 else 0
    assert find("--trials", "4") == 128 + number
    assert "stopped; the same command goes on with trial 2" in capsys.readouterr().out
    assert states() == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert find("--trials", "4") == 0
    assert runs.alphas == [*whole[:3], *whole[2:]]
    assert states() == ["COMPLETE"] * 4
    assert [trial.params for trial in trials()] == [trial.params for trial in trials("whole")]
    assert [trial.values for trial in trials()] == [trial.values for trial in trials("whole")]
    assert [trial.intermediate_values for trial in trials()] == [trial.intermediate_values for trial in trials("whole")]


def test_failed_trials_are_noted_and_the_search_goes_on(runs: Runs, capsys: pytest.CaptureFixture) -> None:
    runs.ending = lambda index: int(index in (1, 3))
    assert find("--trials", "3") == 0
    captured = capsys.readouterr()
    assert states() == ["COMPLETE", "FAIL", "COMPLETE"]
    assert trials()[1].user_attrs["error"] == "no space left"
    line = f"trial 1: method.alpha={runs.alphas[1]:.6g}  failed: no space left"
    assert line in captured.out.splitlines() and captured.err.splitlines() == [f"prune-lab: {line}"]
    assert "study s: 2 finished, 1 failed" in captured.out
    for num_runs in (4, 5):  # it fails once more
        assert find("--trials", "3") == 0 and len(runs.alphas) == num_runs
        captured = capsys.readouterr()
        assert f"trial {num_runs - 1} (3 of 3): method.alpha={runs.alphas[1]:.6g}" in captured.out
    assert states() == ["COMPLETE", "FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert captured.err == "" and "study s: 3 finished\n" in captured.out
    assert runs.alphas[1] == runs.alphas[3] == runs.alphas[4] and len(set(runs.alphas)) == 3
    assert find("--trials", "3") == 0 and len(runs.alphas) == 5


@pytest.mark.parametrize(("objective", "state"), [("top1", "PRUNED"), ("top1,macs", "FAIL")])
def test_a_trial_that_diverged_is_not_repeated(
    runs: Runs, capsys: pytest.CaptureFixture, objective: str, state: str
) -> None:
    runs.error, runs.ending = "loss is not finite in phase train", lambda index: int(index == 1)
    arguments = ("--trials", "3", "--objective", objective)
    assert find(*arguments) == 0
    captured = capsys.readouterr()
    assert states() == ["COMPLETE", state, "COMPLETE"]
    line = f"trial 1: method.alpha={runs.alphas[1]:.6g}  failed: loss is not finite in phase train"
    assert line in captured.out.splitlines() and captured.err.splitlines() == [f"prune-lab: {line}"]
    assert "study s: 2 finished, 1 failed" in captured.out
    assert find(*arguments) == 0 and len(runs.alphas) == 3


def test_a_finite_space_is_done_when_every_point_has_had_its_trial(runs: Runs, capsys: pytest.CaptureFixture) -> None:
    finite = [*RIGL, "method.alpha=0.1,0.2,0.3,0.4,0.5", "--study", "s"]
    assert cli.main(["tune", *finite, "--trials", "3"]) == 0
    assert len(set(runs.alphas)) == 3 and "combinations" not in capsys.readouterr().out
    for _ in range(2):
        assert cli.main(["tune", *finite, "--trials", "20"]) == 0
        assert sorted(runs.alphas) == [0.1, 0.2, 0.3, 0.4, 0.5]
        assert "all 5 combinations have had their trial" in capsys.readouterr().out
    assert states() == ["COMPLETE"] * 5


def test_a_search_without_a_finished_trial_fails(runs: Runs, capsys: pytest.CaptureFixture) -> None:
    def refuse(index: int) -> int:
        raise UserError("method.sparsity is out of reach")

    runs.ending = refuse
    assert find("--trials", "2") == 1
    assert states() == ["FAIL", "FAIL"]
    assert "prune-lab: error: method.sparsity is out of reach" in capsys.readouterr().err
    assert trials()[0].user_attrs["error"] == "method.sparsity is out of reach"


def test_an_objective_that_the_runs_do_not_have_ends_the_search(runs: Runs, capsys: pytest.CaptureFixture) -> None:
    for count in (1, 2):
        assert find("--trials", "5", "--objective", "delta") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (f"prune-lab: error: --objective delta: trial {count - 1} has finished with no delta/top1 in "
                        "its summary; give an objective that these runs have")  # fmt: skip
        assert states() == ["FAIL"] * count == ["FAIL"] * len(runs.alphas)


def test_a_run_below_the_median_is_given_up_with_its_reason(runs: Runs, capsys: pytest.CaptureFixture) -> None:
    runs.reached = lambda alpha: 80 if len(runs.alphas) <= 5 else 10
    assert find("--trials", "7") == 0
    assert states() == ["COMPLETE"] * 5 + ["PRUNED"] * 2
    assert [list(trial.intermediate_values) for trial in trials()] == [[1, 2, 3, 4]] * 5 + [[1, 2]] * 2
    assert runs.asked[0] == ("pruned by tune: top-1 of 5.00 after epoch 2 is below the median (study s, trial 5); "
                             "its command goes on")  # fmt: skip
    out = capsys.readouterr().out
    assert f"trial 5: method.alpha={runs.alphas[5]:.6g}  pruned" in out.splitlines()
    assert "study s: 5 finished, 2 pruned" in out


def test_runs_whose_sparsity_changes_are_given_up_only_if_asked(runs: Runs) -> None:
    runs.reached = lambda alpha: 80 if len(runs.alphas) <= 5 else 10
    runs.sparsity = lambda epoch: epoch / EPOCHS
    assert find("--trials", "6") == 0
    assert states() == ["COMPLETE"] * 6
    assert find("--trials", "7", "--pruner", "median") == 0
    assert states() == ["COMPLETE"] * 6 + ["PRUNED"]


def test_runs_are_compared_by_epoch_only_where_epochs_mean_the_same() -> None:
    def prunes(*others: tuple[str, ...], pruner: str | None = None, objective: str = "top1") -> bool:
        return tune._prunes(pruner, objectives.parse(objective), [compose_once(*RIGL, *other) for other in others])

    assert prunes((), ("method.sparsity=0.5",), ("optimizer.weight_decay=0",))
    assert not prunes((), objective="macs") and not prunes((), objective="top1,macs") and not prunes((), pruner="none")
    for other in (("schedule.train.lr=0.5",), ("schedule.batch_size=4",), ("trainer.limit_train_batches=2",)):
        assert not prunes((), other)
        assert prunes((), other, pruner="median")
    assert not prunes((), ("method=set",))


@pytest.mark.parametrize(
    ("num_epochs", "first"), [(3, 2), (4, 2), (6, 2), (7, 3), (9, 3), (160, 54), (2, None), (1, None), (None, None)]
)
def test_a_run_is_given_up_after_a_third_of_its_epochs(num_epochs: int | None, first: int | None) -> None:
    for epoch in range(1, (num_epochs or 9) + 1):
        watch = TrialWatch(lambda epoch, top1: "bad")
        plan = [{"name": "train", "epochs": num_epochs, "length": "some"}]
        watch.start(RunInfo(Path("run"), "id", "name", "group", plan=plan))
        watch.log({"phase": "train", "epoch": epoch, "eval/top1": 1.0})
        assert watch.stop() == (first is not None and first <= epoch < num_epochs)


def test_without_a_pruner_every_run_is_finished(runs: Runs) -> None:
    runs.reached = lambda alpha: 80 if len(runs.alphas) <= 5 else 10
    assert find("--trials", "7", "--pruner", "none") == 0
    assert states() == ["COMPLETE"] * 7


def test_nothing_is_given_up_after_its_last_epoch(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = optuna.pruners.ThresholdPruner(upper=-1, n_warmup_steps=EPOCHS)
    monkeypatch.setattr(study, "_pruner", lambda prune: pruner)
    assert find("--trials", "1") == 0
    assert states() == ["COMPLETE"]


def test_of_several_objectives_those_that_no_other_beats_are_listed(
    runs: Runs, capsys: pytest.CaptureFixture
) -> None:
    assert find("--trials", "12", "--objective", "top1,macs") == 0
    out = capsys.readouterr().out
    points = [(runs.reached(alpha), -alpha) for alpha in runs.alphas]
    front = {index for index, (top1, macs) in enumerate(points)
             if not any(a >= top1 and b >= macs and (a, b) != (top1, macs) for a, b in points)}  # fmt: skip
    assert 1 < len(front) < 12
    _, listed = out.split("no other trial is better in top1 and macs than these:\n")
    assert {int(line.split()[1][:-1]) for line in listed.splitlines() if line.startswith("trial")} == front
    assert listed.count("  prune-lab dataset=fake") == len(front)
    assert "importance for top1: " in listed and "importance for macs: " in listed


def test_no_trial_begins_after_the_timeout(runs: Runs) -> None:
    runs.ending = lambda index: time.sleep(0.6) or 0
    assert find("--trials", "9", "--timeout", "0.5") == 0
    assert states() == ["COMPLETE"]


def test_a_choice_by_test_images_is_warned_of_once(runs: Runs, capsys: pytest.CaptureFixture) -> None:
    plain = [*TINY, "method=rigl", ALPHA, "--trials", "2"]
    assert cli.main(["tune", *plain]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("prune-lab: warning: ") and "dataset.validation=0.1" in line
    for quiet in (["dataset.validation=0.25"], ["--objective", "macs"]):
        assert cli.main(["tune", *plain, *quiet]) == 0
        assert capsys.readouterr().err == ""


# What is refused

MISTAKES = {
    "nothing": ([], "the following arguments are required: OPTIONS"),
    "nothing to search": (["method=rigl"], "nothing to search"),
    "trials": (["--trials", "0", ALPHA], "--trials must be 1 or more, got 0"),
    "timeout": (["--timeout", "-1", ALPHA], "--timeout must be seconds above 0, got -1"),
    "study": (["--study", "a/b", ALPHA], "--study a/b must be a file name of letters"),
    "pruner": (["--pruner", "best", ALPHA], "invalid choice: 'best'"),
    "objective": (["--objective", "top2", ALPHA], "--objective top2 is not a choice (did you mean 'top1'?)"),
    "objective twice": (["--objective", "top1,final/top1", ALPHA], "names final/top1 twice"),
    "pruning two": (["--objective", "top1,macs", "--pruner", "median", ALPHA], "needs one objective that is a top-1"),
    "pruning costs": (["--objective", "macs", "--pruner", "median", ALPHA], "needs one objective that is a top-1"),
    "sweep flag": (["-m", "method=rigl", ALPHA], "unrecognized arguments: -m"),
    "misspelt option": (["method=rigl", "method.alhpa=interval(0.1,0.5)"], "(did you mean 'method.alpha'?)"),
    "misspelt choice": (["method=rigl,rgl"], "method=rgl is not a choice (did you mean 'rigl'?)"),
    "no match": (["method=glob(zz*)"], "method=glob(zz*) matches nothing"),
    "end out of range": (["method=rigl", "method.sparsity=interval(0.5,1)"], "method.sparsity must lie in (0, 1)"),
    "option of one method": (["method=rigl,magnitude", ALPHA], "unknown option method.alpha: method=magnitude has"),
    "dry run": (["dry_run=true", "method=rigl", ALPHA], "dry_run=true trains nothing"),
    "searched place": (["method=rigl", "output_dir=a,b"], "output_dir does not change results"),
    "searched device": (["method=rigl", "trainer.device=cpu,cuda"], "trainer.device does not change results"),
    "seed": (["method=rigl", "seed=0,1"], "seed cannot be searched: the best of several seeds is luck"),
    "evaluated images": (["method=rigl", "trainer.limit_eval_batches=1,2"], "trainer.limit_eval_batches cannot be"),
    "trained images": (["method=rigl", "trainer.limit_train_batches=range(1,3)"], "it decides which images a trial"),
    "held-out images": (["method=rigl", "dataset.validation=interval(0.1,0.2)"], "dataset.validation cannot be"),
    "validation seed": (["method=rigl", "dataset.validation_seed=range(3)"], "dataset.validation_seed cannot be"),
    "method's seed": (["method=haste", "method.hash_seed=0,1"], "method.hash_seed cannot be searched"),
    "test without validation": (["method=rigl", "dataset=fake", "--objective", "test", ALPHA], "needs dataset.valid"),
}
CHILD = """
import contextlib, io, json, sys
from prune_lab import cli
results = {}
for name, arguments in json.load(sys.stdin).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["tune", *arguments])
    results[name] = [code, out.getvalue(), err.getvalue(), "torch" in sys.modules]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory, child_environment: dict[str, str]) -> dict:
    folder = tmp_path_factory.mktemp("refused")
    cases = json.dumps({name: arguments for name, (arguments, _) in MISTAKES.items()})
    child = subprocess.run(
        [sys.executable, "-c", CHILD], input=cases, capture_output=True, text=True, cwd=folder, env=child_environment
    )
    assert child.returncode == 0, child.stderr
    assert list(folder.iterdir()) == []
    return json.loads(child.stdout)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_before_torch_is_imported(refused: dict, name: str) -> None:
    code, out, err, torch_loaded = refused[name]
    assert (code, out, torch_loaded) == (1, "", False)
    assert err.startswith("prune-lab: error: ") and err.count("\n") == 1
    assert MISTAKES[name][1] in err


def test_a_study_is_not_continued_with_other_options(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert find("--trials", "1") == 0
    capsys.readouterr()
    other = "method.alpha=interval(0.1,0.6)"
    for arguments, message in (
        ([*RIGL, "seed=1", ALPHA], "begun with nothing else, this command has seed=1; give another --study"),
        ([*RIGL, other], f"begun with {ALPHA}, this command has {other}; give another --study"),
        ([*RIGL, ALPHA, "--objective", "macs"], "has the objectives final/top1, not macs/inference_ratio;"),
        ([*RIGL, ALPHA, "--objective", "top1,macs"], "not final/top1,macs/inference_ratio; give another --study"),
    ):
        assert cli.main(["tune", *arguments, "--study", "s", "--trials", "2"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("prune-lab: error: --study s ") and message in line
    places = ["logger.project=other", "trainer.threads=1"]
    assert find("--trials", "2", *places) == 0, "where results are shown changes nothing"
    assert len(runs.alphas) == 2
    monkeypatch.setattr(tune, "_check_data", lambda config: "ef01")
    assert find("--trials", "2") == 1
    assert "was begun with images=abcd, this command has images=ef01" in capsys.readouterr().err


def test_a_file_that_is_no_study_is_refused_and_kept(runs: Runs, capsys: pytest.CaptureFixture) -> None:
    path = Path("outputs/tune/s.db")
    path.parent.mkdir(parents=True)
    path.write_text("this is a note, no data base. " * 20)
    assert find("--trials", "1") == 1
    assert "--study s: outputs/tune/s.db cannot be used as a study" in capsys.readouterr().err
    assert path.read_text().startswith("this is a note")


def test_several_processes_of_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find() == 1
    assert "prune-lab tune runs in one process" in capsys.readouterr().err


def test_without_optuna_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(tune.importlib.util, "find_spec", lambda name: None)
    assert find() == 1
    assert capsys.readouterr().err == "prune-lab: error: prune-lab tune needs Optuna: pip install optuna\n"


def test_missing_data_is_refused_before_a_trial_is_used_up(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["tune", "method=rigl", "dataset=cifar10", "dataset.root=nowhere", ALPHA]) == 1
    assert "nowhere" in capsys.readouterr().err and not Path("outputs").exists()


# Real runs


def test_a_trial_is_an_ordinary_run_and_a_pruned_one_goes_on_by_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    pruner = optuna.pruners.ThresholdPruner(upper=-1)  # gives up everything it sees
    monkeypatch.setattr(study, "_pruner", lambda prune: pruner if prune else optuna.pruners.NopPruner())
    longer = "schedule.train.epochs=3"
    assert find("--trials", "1", longer) == 1
    assert states() == ["PRUNED"]
    reason = status(Path("outputs"))
    assert reason["status"] == "interrupted" and reason["error"].startswith("pruned by tune: top-1 of ")
    assert list(Path("outputs/phases").glob("*/checkpoint*")), "it can go on"
    command = [*RIGL, longer, f"method.alpha={trials()[0].params['method.alpha']:.6g}"]
    assert cli.main(command) == 0
    assert "resumed at step" in capsys.readouterr().out
    assert execute(tmp_path / "uninterrupted", *command) == 0
    assert_same_run(Path("outputs"), tmp_path / "uninterrupted")
    assert find("--trials", "1", longer, "--study", "again", "--pruner", "none") == 0
    assert "done already: outputs/" in capsys.readouterr().out
    found = json.loads((run_dir(Path("outputs")) / "summary.json").read_text())
    assert trials("again")[0].values == [found["final/top1"]]


def test_a_loss_that_is_not_finite_and_a_changing_sparsity_are_seen_in_real_runs() -> None:
    diverging = [*TINY, "method=dense", "optimizer.weight_decay=1e35,1e36", "--study", "s", "--trials", "1"]
    assert cli.main(["tune", *diverging]) == 1
    (trial,) = trials()
    assert trial.state.name == "PRUNED" and trial.user_attrs["diverged"]
    for method, option, changes in (("gmp", "num_cuts=3", {"sparsity changes": True}), ("rigl", "interval=2", {})):
        options = [*TINY, f"method={method}", f"method.{option}", "schedule.train.epochs=4", "method.sparsity=0.5,0.6"]
        assert cli.main(["tune", *options, "--trials", "1", "--study", method]) == 0
        assert trials(method)[0].user_attrs == changes


def test_a_control_is_compared_after_the_run_it_belongs_to() -> None:
    arguments = [*TINY, "method=snip", "method.samples_per_class=3", "method.control=shuffle",
                 "method.sparsity=0.8,0.9", "--trials", "1", "--study", "s"]  # fmt: skip
    assert cli.main(["tune", *arguments]) == 0
    summaries = [json.loads(path.read_text()) for path in Path("outputs").glob("*/summary.json")]
    assert len(summaries) == 2
    (control,) = [found for found in summaries if found.get("control/kind") == "shuffle"]
    assert trials()[0].values == [control["final/top1"]]


@pytest.mark.thin(3)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_search_resumes_its_run(number: int) -> None:
    often = "trainer.checkpoint_interval_s=1e-9"
    long = [*RIGL, "schedule.train.epochs=8", often, ALPHA, "--study", "s", "--trials", "1"]
    log = Path("first.log").absolute()
    child = fork(log, lambda: cli.main(["tune", *long]))
    deadline = time.monotonic() + 60
    while "train 2/8" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    os.kill(child, number)
    assert wait_for(child) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    (before,) = trials()
    assert before.state.name == "RUNNING" and before.intermediate_values
    again = Path("again.log").absolute()
    assert wait_for(fork(again, lambda: cli.main(["tune", *long]))) == 0
    assert "phase train: resumed at step" in again.read_text()
    (after,) = trials()
    assert after.state.name == "COMPLETE" and after.params == before.params
    assert list(after.intermediate_values) == list(range(1, 9))
