"""The command line as a user meets it: help, mistakes in one line, nothing written, no torch before a run starts."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prune_lab.cli import command as cli
from prune_lab.cli.completion import completions
from prune_lab.compose import choices
from prune_lab.foundations.version import __version__
from prune_lab.launch import sweep

CASES = {
    "unknown command": (["rn"], "unknown command 'rn' (did you mean 'run'?)"),
    "a word alone": (["method"], "unknown command 'method'"),
    "empty word": ([""], "unknown command ''"),
    "a word among options": (["method=rigl", "resnet20"], "cannot read 'resnet20'; options are written as name=value"),
    "unknown choice": (["method=rgl"], "method=rgl is not a choice (did you mean 'rigl'?); allowed: autosparse,"),
    "capitals": (["model=ResNet20"], "model=ResNet20 is not a choice (did you mean 'resnet20'?)"),
    "misspelt group": (["metod=rigl"], "unknown option metod (did you mean 'method'?)"),
    "misspelt key": (["method=rigl", "method.sparsty=0.9"], "sparsty (did you mean 'method.sparsity'?)"),
    "misspelt inner key": (["schedule.train.epoch=3"], "(did you mean 'schedule.train.epochs'?)"),
    "misspelt inner group": (["schedule.trian.epochs=3"], "(did you mean 'schedule.train.epochs'?)"),
    "key without group": (["method=rigl", "sparsity=0.9"], "unknown option sparsity (did you mean 'method.sparsity'?)"),
    "key of two groups": (["lr=0.1"], "(did you mean 'schedule.train.lr' or 'schedule.finetune.lr'?)"),
    "option of another method": (["method.sparsity=0.9"], "method=dense has none, only method="),
    "new key": (["+method.foo=1"], "unknown option method.foo"),
    "forced key": (["++method=rigl"], "++method=rigl: a choice is written method=NAME"),
    "forced top-level key": (["++x=1"], "unknown option x"),
    "added group": (["+experiment=demo_rigl"], "+experiment=demo_rigl: a choice is written experiment=NAME"),
    "deleted group": (["~method"], "~method: a run needs method=...; allowed: autosparse"),
    "deleted key": (["~seed"], "missing option seed"),
    "package": (["method@other=rigl"], "method@other=rigl: a choice is written method=NAME"),
    "two values": (["method=rigl,set"], "method=rigl,set gives several values: add -m"),
    "two numbers": (["method=rigl", "method.sparsity=0.8,0.9"], "gives several values: add -m"),
    "glob alone": (["method=glob(*)"], "gives several values: add -m"),
    "glob of nothing": (["-m", "method=glob(zz*)"], "matches nothing; allowed: autosparse"),
    "interval": (["-m", "method=rigl", "method.sparsity=interval(0,1)"], "has no end of values"),
    "list of choices": (["model=[resnet20,vgg16]"], "one choice at a time"),
    "one wrong job": (["-m", "method=rigl", "method.sparsity=0.9,1.5"], "method.sparsity must lie in (0, 1), got 1.5"),
    "one wrong choice": (["-m", "method=rigl,rgl"], "method=rgl is not a choice"),
    "above one": (["method=rigl", "method.sparsity=1.5"], "method.sparsity must lie in (0, 1), got 1.5"),
    "NaN": (["method=rigl", "method.sparsity=nan"], "method.sparsity must be a finite number, got nan"),
    "infinity": (["schedule.train.lr=inf"], "schedule.train.lr must be a finite number, got inf"),
    "null": (["method=rigl", "method.sparsity=null"], "method.sparsity must be a number, got null"),
    "empty value": (["method=rigl", "method.sparsity="], "method.sparsity must be a number, got ''"),
    "empty choice": (["method="], "method= is not a choice"),
    "empty name": (["=3"], "the name before = is missing"),
    "quoted number": (["method=rigl", "method.sparsity='0.9'"], "method.sparsity must be a number, got 0.9"),
    "open quote": (["method=rigl", "method.sparsity='0.9"], "cannot read"),
    "special characters": (["dataset.root=a&b"], """needs quotes of its own: 'dataset.root="a&b"'"""),
    "two equal signs": (["output_dir=a=b"], """needs quotes of its own: 'output_dir="a=b"'"""),
    "no recipe": (["experiment=null"], "leave experiment=... out to have none"),
    "misspelt recipe": (["experiment=demo_rgl"], "experiment=demo_rgl is not a choice (did you mean 'demo_rigl'?)"),
    "path as choice": (["method=../model/resnet20"], "method=../model/resnet20 is not a choice"),
    "missing interpolation": (["seed=${nothing}"], "Interpolation key 'nothing' not found"),
    "Hydra's own options": (["hydra.run.dir=x"], "Hydra's own options are fixed"),
    "Hydra's launcher": (["hydra/launcher=slurm"], "hydra/launcher=slurm is for sweeps: add -m"),
    "Hydra's sweeper": (["hydra/sweeper=basic"], "Hydra's own options are fixed"),
    "unknown flag": (["--sweep"], "unknown flag --sweep"),
    "misspelt flag": (["--multi-run"], "unknown flag --multi-run (did you mean '--multirun'?)"),
    "Hydra's flag": (["--config-dir=x"], "unknown flag --config-dir=x"),
    "flag without value": (["--cfg"], "--cfg needs one of job, hydra, all"),
    "flag with wrong value": (["--cfg", "jobs"], "--cfg needs one of job, hydra, all"),
    "flag out of place": (["--resolve"], "--resolve goes with --cfg job"),
    "flags against each other": (["-m", "--cfg", "job"], "--cfg shows one run"),
    "wrong choice shown": (["--cfg", "job", "method=rgl"], "method=rgl is not a choice"),
    "output_dir is a file": (["output_dir=occupied"], "occupied is a file, no folder"),
    "list of nothing": (["list"], "prune-lab list: give one of models, datasets, methods, schedules, experiments"),
    "list misspelt": (["list", "method"], "(did you mean 'methods'?)"),
    "list too much": (["list", "methods", "models"], "prune-lab list methods models: give one of"),
    "compare nothing": (["compare"], "the following arguments are required: RUNS"),
    "compare nowhere": (["compare", "nowhere"], "nowhere: no such run or folder"),
    "wandb-sync nothing": (["wandb-sync"], "the following arguments are required: RUN"),
}  # fmt: skip

CHILD = """
import contextlib, io, json, sys
from prune_lab import cli
results = {}
for name, arguments in json.load(sys.stdin).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    results[name] = [code, out.getvalue(), err.getvalue(), "torch" in sys.modules]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory, child_environment: dict[str, str]) -> dict:
    """Exit code, both streams and whether torch was loaded, of every case; and what lay in the folder afterwards."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "occupied").touch()
    cases = json.dumps({name: arguments for name, (arguments, _) in CASES.items()})
    child = subprocess.run(
        [sys.executable, "-c", CHILD], input=cases, capture_output=True, text=True, cwd=folder, env=child_environment
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout) | {"left": sorted(path.name for path in folder.iterdir())}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_ends_in_one_line_before_torch_is_imported(refused: dict, name: str) -> None:
    code, out, err, torch_loaded = refused[name]
    assert code == 1
    assert out == ""
    assert err.startswith("prune-lab: error: ") and err.endswith("\n") and err.count("\n") == 1
    assert CASES[name][1] in err
    assert not torch_loaded


def test_mistakes_leave_nothing_behind(refused: dict) -> None:
    assert refused["left"] == ["occupied"]


@pytest.mark.parametrize("arguments", [["method=rgl"], ["--help"], ["--cfg", "job", "method=rigl"]])
def test_the_command_answers_within_a_second_and_a_half_of_computing(prune_lab, arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = prune_lab(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == (1 if arguments == ["method=rgl"] else 0)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"], ["run", "--help"], ["list", "-h"]])
def test_help_names_every_command_and_choice(capsys: pytest.CaptureFixture, arguments: list[str]) -> None:
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert text.isascii() and "rigl" in text and "cifar_160" in text and "wandb-sync" in text
    assert max(len(line) for line in text.splitlines()) <= 115


@pytest.mark.parametrize("command", ["compare", "verdict", "connect", "hessian-projection", "wandb-sync"])
def test_sub_commands_have_help_of_their_own(capsys: pytest.CaptureFixture, command: str) -> None:
    assert cli.main([command, "--help"]) == 0
    assert f"usage: prune-lab {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"prune-lab {__version__}\n"


def test_cfg_job_shows_the_composed_options(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--cfg", "job", "method=rigl", "method.sparsity=0.75", "dataset=cifar10"]) == 0
    text = capsys.readouterr().out
    assert "sparsity: 0.75" in text and "name: cifar_short" in text and "hydra" not in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("prune-lab method=", {"method=rigl", "method=dense", "method=magnitude"}),
        ("prune-lab method=ri", {"method=rigl"}),
        ("prune-lab run schedule=cifar_1", {"schedule=cifar_160"}),
        ("prune-lab method=rigl method.sp", {"method.sparsity="}),
        ("prune-lab -m dataset=cifar", {"dataset=cifar10", "dataset=cifar100"}),
        ("prune-lab com", {"compare"}),
        ("prune-lab list me", {"methods"}),
        ("prune-lab compare out", set()),
    ],
)
def test_the_shell_completes_choices(capsys, monkeypatch, line: str, offered: set[str]) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert cli.main(["-sc", "query=bash"]) == 0
    found = set(capsys.readouterr().out.split())
    assert offered <= found
    assert offered or not found


def test_option_words_are_left_to_hydra() -> None:
    assert completions("prune-lab ") is None
    assert completions("prune-lab method=") is None
    assert completions("prune-lab list ") == ["models", "datasets", "methods", "schedules", "experiments"]


@pytest.fixture
def own_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ that the command uses."""
    folder = tmp_path / "own" / "conf"
    shutil.copytree(choices.conf_dir(), folder)
    monkeypatch.setattr(cli, "conf_dir", lambda: folder)
    monkeypatch.setattr(sweep, "run_all", lambda *arguments: pytest.fail("the mistake was accepted"))
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: {sparsty: 0.8}", "unknown option method.sparsty (did you mean 'sparsity'?)"),
        ("method: {sparsity: 1.5}", "method.sparsity must lie in (0, 1), got 1.5"),
        ("schedule: {train: {epoch: 3}}", "unknown option schedule.train.epoch (did you mean 'epochs'?)"),
        ("metod: {sparsity: 0.8}", "unknown option metod (did you mean 'method'?)"),
        ("sed: 3", "unknown option sed (did you mean 'seed'?)"),
        ("trainer: 3", "trainer"),
        ("method: [1", "x.yaml"),
        ("defaults: [{override /method: rgl}]", "rgl"),
        ("- 3", "x"),
    ],
)
@pytest.mark.parametrize("group", ["experiment", "debug"])
def test_a_mistake_in_a_recipe_file_is_refused(own_conf: Path, capsys, group: str, text: str, message: str) -> None:
    (own_conf / group / "x.yaml").write_text(f"# @package _global_\n{text}\n")
    assert cli.main([*(["method=rigl"] if "rgl" not in text else []), f"{group}=x"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("prune-lab: error: ") and message in captured.err
    if "unknown option" in message or "must lie" in message:
        assert f"(set in conf/{group}/x.yaml)" in captured.err


def test_the_command_line_is_blamed_for_what_it_overrides(own_conf: Path, capsys) -> None:
    (own_conf / "experiment" / "x.yaml").write_text("# @package _global_\nmethod: {sparsity: 0.8}\n")
    assert cli.main(["method=rigl", "experiment=x", "method.sparsity=2"]) == 1
    assert capsys.readouterr().err == "prune-lab: error: method.sparsity must lie in (0, 1), got 2\n"


def test_ctrl_c_before_a_run_starts_is_no_traceback(capsys, monkeypatch) -> None:
    def stop() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "help_text", stop)
    assert cli.main(["--help"]) == 130
    assert capsys.readouterr().err == "prune-lab: interrupted\n"


def test_a_closed_pipe_is_no_error_message(child_environment: dict[str, str]) -> None:
    command = f"{sys.executable} -m prune_lab list models | true; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", command], env=child_environment, capture_output=True, text=True)
    assert process.stderr == ""


def test_errors_of_the_system_name_the_file(capsys) -> None:
    assert cli.fail(FileNotFoundError(2, os.strerror(2), "gone")) == 1
    assert capsys.readouterr().err == "prune-lab: error: gone: No such file or directory\n"


def test_a_defect_shows_its_traceback_or_where_it_is(capsys) -> None:
    def raised(*notes: str) -> Exception:
        try:
            raise ZeroDivisionError("two\nlines")
        except ZeroDivisionError as error:
            for note in notes:
                error.add_note(note)
            return error

    assert cli.fail(raised()) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("prune-lab: error: ZeroDivisionError: two lines\n")
    assert cli.fail(raised("traceback in log.txt")) == 1
    assert capsys.readouterr().err == "prune-lab: error: ZeroDivisionError: two lines (traceback in log.txt)\n"
