"""Which runs a verdict needs, how runs become cases, what is printed and written; most runs are files by hand."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from prune_lab.commands.compare.runs import read_runs
from prune_lab.commands.verdict import command as verdict_runs
from prune_lab.commands.verdict.cases import find_cases, read_entries, sparsity_of
from prune_lab.commands.verdict.command import main
from prune_lab.commands.verdict.plan import PRESETS, plan, sharing, small_sparsity, with_preset
from prune_lab.compose.choices import conf_dir
from prune_lab.compose.overrides import compose_checked
from prune_lab.config.run import as_mapping
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline import runner
from tests.helpers.runs import TINY, compose

LOTTERY = {"name": "lottery", "arm": "LT-IMP", "levels": 8, "sparsity": None, "fraction": 0.2, "distribution": "global",
           "rewind_to": "0ep", "optimizer_state": "restore", "copy": 0, "include": [], "exclude": []}  # fmt: skip
DENSE_PARAMS, KEPT = 270_000, 46_000
WINNING = {"dense": (90.3, 92.4), "LT-IMP": (92.0, 91.5), "RR-IMP": (89.0, 91.3), "small_dense": (90.5, 91.0)}
LRS = (0.01, 0.1)


@pytest.fixture(scope="module")
def base():
    """Resolved options of a dense run on CIFAR-10."""
    return as_mapping(compose("dataset=cifar10", "schedule=cifar_160", "logger.wandb=disabled"))


@pytest.fixture
def write(base, tmp_path):
    """Return a function that writes the files of one run and returns its directory."""

    def call(arm, lr, seed, top1, *, status="finished", params=None, method=None, **options):
        config = copy.deepcopy(base) | {"seed": seed}
        small = {"name": "small_dense", "sparsity": 0.83, "match": "params"}
        known = {"dense": {"name": "dense"}, "small_dense": small}
        config["method"] = known.get(arm, LOTTERY | {"arm": arm}) | (method or {})
        config["schedule"]["train"]["lr"] = lr
        for key, value in options.items():
            *groups, last = key.split("__")
            node = config
            for group in groups:
                node = node[group]
            node[last] = value
        name = f"{arm}-{lr}-s{seed}-{len(list(tmp_path.glob('runs/*')))}"
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        (path / "run.json").write_text(json.dumps({"id": name, "group": "g", "config": config}))
        (path / "status.json").write_text(json.dumps({"status": status, "error": None}))
        if status == "finished":
            count = params or (DENSE_PARAMS if arm == "dense" else KEPT)
            summary = {"status": status, "run/id": name, "run/seed": seed, "final/top1": top1,
                       "params/dense": DENSE_PARAMS, "params/nonzero": count}  # fmt: skip
            (path / "summary.json").write_text(json.dumps(summary))
        return path

    return call


def write_all(write, table=WINNING, *, seeds=(0, 1), **options):
    return {arm: [write(arm, lr, seed, top1, **options) for lr, top1 in zip(LRS, values, strict=True) for seed in seeds]
            for arm, values in table.items()}  # fmt: skip


def judged(tmp_path, *arguments):
    """Return what `prune-lab verdict` writes about the runs in `tmp_path`."""
    file = tmp_path / "out.json"
    assert main([str(tmp_path / "runs"), "--json", str(file), *arguments]) == 0
    return json.loads(file.read_text())


def outcomes(content):
    return [(case["verdict"], case["reasons"]) for network in content["networks"] for case in network["sparsities"]]


def test_runs_in_a_folder_are_judged_and_the_verdict_is_written_beside_them(write, tmp_path, capsys):
    write_all(write)
    assert main([str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert "verdict at sparsity 0.8322: Jackpot winning ticket\n" in printed
    assert "resnet20 on cifar10, 160 epochs: has a Jackpot winning ticket at sparsity 0.8322\n" in printed
    assert "92.00 (lr=0.01) against 91.30 (lr=0.1): +0.70; satisfied at lr=0.01" in printed
    assert "condition 1 also asks for enough epochs" in printed
    (network,) = json.loads((tmp_path / "runs" / "verdict.json").read_text())["networks"]
    (case,) = network["sparsities"]
    assert case["verdict"] == "jackpot" and [entry["holds"] for entry in case["conditions"]] == [True] * 5
    assert case["arms"]["LT-IMP"]["top1"]["0.01"] == {"mean": 92.0, "std": 0.0, "n": 2, "values": [92.0, 92.0]}
    assert judged(tmp_path, "--same-lr")["networks"][0]["conclusion"].startswith("has a Jackpot")


def test_stricter_margins_change_the_verdict(write, tmp_path):
    write_all(write)
    found = [judged(tmp_path, *options)["networks"][0]["sparsities"][0]["verdict"]
             for options in (("--sim", "0.3"), ("--gap", "0.8"), ("--min-sparsity", "0.9"))]  # fmt: skip
    assert found == ["secondary prize", "none", "none"]


def test_a_gap_that_may_be_chance_is_pointed_out(write, tmp_path, capsys):
    table = {arm: values for arm, values in WINNING.items() if arm != "RR-IMP"}
    write_all(write, table)
    for lr, values in zip(LRS, ((88.0, 90.0), (90.3, 92.3)), strict=True):
        for seed, top1 in enumerate(values):
            write("RR-IMP", lr, seed, top1)
    judged(tmp_path)
    assert "may be chance: noise covers the gap of condition 3\n" in capsys.readouterr().out


def test_each_recipe_network_and_sparsity_is_a_case_of_its_own(write, tmp_path, capsys):
    write_all(write)
    write_all(write, {arm: (80.0, 80.0) for arm in WINNING}, schedule__multiplier=0.4875)
    write_all(write, {arm: (70.0, 70.0) for arm in WINNING}, model__width=2.0)
    write_all(write, {arm: (60.0, 60.0) for arm in ("LT-IMP", "RR-IMP", "LT-OMP")}, method={"levels": 2})
    content = judged(tmp_path)
    titles = {network["title"]: [round(case["sparsity"], 4) for case in network["sparsities"]]
              for network in content["networks"]}  # fmt: skip
    assert titles == {
        "resnet20 on cifar10, 160 epochs, model.width=1.0, schedule.train.milestones=[80.0, 120.0]": [0.36, 0.8322],
        "resnet20 on cifar10, 78 epochs, model.width=1.0, schedule.train.milestones=[39.0, 58.5]": [0.8322],
        "resnet20 on cifar10, 160 epochs, model.width=2.0, schedule.train.milestones=[80.0, 120.0]": [0.8322],
    }
    assert [network["conclusion"] for network in content["networks"]] == [
        "has a Jackpot winning ticket at sparsity 0.8322",
        *["has no winning ticket at any sparsity that was tried"] * 2,
    ]
    assert "sparsity 0.36: trivial, below 0.59; not judged" in capsys.readouterr().out


def test_one_shot_arms_are_shown_and_decide_nothing(write, tmp_path, capsys):
    write_all(write, WINNING | {"LT-OMP": (99.0, 99.0), "RR-OMP": (99.0, 99.0), "LR-rewinding-OMP": (99.0, 99.0)})
    content = judged(tmp_path)
    assert outcomes(content) == [("jackpot", [])]
    arms = content["networks"][0]["sparsities"][0]["arms"]
    assert {name: arm["condition"] for name, arm in arms.items()} == {
        **dict.fromkeys(WINNING, True), "LT-OMP": False, "RR-OMP": False, "LR-rewinding-OMP": False,
    }  # fmt: skip
    assert "| LT-OMP *" in capsys.readouterr().out


def test_rewound_tickets_get_a_verdict_of_their_own(write, tmp_path):
    write_all(write)
    rewound = {"RR-IMP": WINNING["RR-IMP"]}  # with the rewound ticket's mask; that of LT-IMP is another
    write_all(write, rewound | {"IMP-rewind": (90.0, 90.0)}, method={"rewind_to": "8ep"})
    zero = {"rewind_to": "500it", "optimizer_state": "zero"}
    write_all(write, rewound | {"IMP-rewind": (93.0, 93.0)}, method=zero)
    write_all(write, {"IMP-rewind": (93.0, 93.0)}, method={"rewind_to": "4ep"})
    write_all(write, {"IMP-rewind": (91.0, 91.0)})
    found = {network["title"]: network["sparsities"][0]["verdict"] for network in judged(tmp_path)["networks"]}
    assert found == {
        "resnet20 on cifar10, 160 epochs": "jackpot",
        "resnet20 on cifar10, 160 epochs, tickets rewound to 500it, momentum zero": "jackpot",
        "resnet20 on cifar10, 160 epochs, tickets rewound to 4ep": "incomplete",
        "resnet20 on cifar10, 160 epochs, tickets rewound to 8ep": "none",
        "resnet20 on cifar10, 160 epochs, tickets rewound to the start": "none",
    }


@pytest.mark.parametrize("arm", WINNING)
def test_an_arm_without_runs_is_named(write, tmp_path, capsys, arm):
    write_all(write, {name: values for name, values in WINNING.items() if name != arm})
    ((outcome, reasons),) = outcomes(judged(tmp_path))
    assert outcome == "incomplete" and f"{arm} is missing" in reasons
    assert "  5 open   similar to" in capsys.readouterr().out or arm in ("RR-IMP", "small_dense")


def test_runs_without_results_are_named(write, tmp_path, capsys):
    write_all(write, seeds=(0, 1))
    failed = write("RR-IMP", 0.1, 2, None, status="failed")
    ((outcome, reasons),) = outcomes(judged(tmp_path))
    assert (outcome, reasons) == ("incomplete", ["RR-IMP at lr=0.1, seed 2: failed"])
    printed = capsys.readouterr().out
    assert "  2 holds  clearly better" in printed
    assert f"failed: {failed}" in printed and "Jackpot" not in printed
    assert "resnet20 on cifar10, 160 epochs: no verdict at sparsity 0.8322" in printed


def test_one_seed_is_insufficient(write, tmp_path):
    write_all(write, seeds=(0,))
    ((outcome, reasons),) = outcomes(judged(tmp_path))
    assert outcome == "insufficient" and len(reasons) == 8


@pytest.mark.parametrize(
    ("arm", "options", "reason"),
    [
        ("LT-IMP", {"schedule__multiplier": 0.5}, "schedule.train.epochs differs: 160 in dense, 80 in LT-IMP,"),
        ("RR-IMP", {"schedule__batch_size": 64}, "schedule.batch_size differs: 128 in dense, 128 in LT-IMP, 64 in "),
        ("dense", {"optimizer__weight_decay": 1e-4}, "optimizer.weight_decay differs: 0.0001 in dense, 0.0005 in"),
        ("small_dense", {"trainer__ema_decay": 0.9}, "trainer.ema_decay differs: None in dense"),
        ("RR-IMP", {"method": {"exclude": ["fc"]}}, "method.exclude differs: [] in LT-IMP, ['fc'] in RR-IMP"),
    ],
)
def test_arms_of_different_recipes_are_not_compared(write, tmp_path, arm, options, reason):
    write_all(write, {name: values for name, values in WINNING.items() if name != arm})
    write_all(write, {arm: WINNING[arm]}, **options)
    ((outcome, reasons),) = outcomes(judged(tmp_path))
    assert outcome == "refused" and any(line.startswith(reason) for line in reasons), reasons


def test_options_that_change_no_result_do_not_matter(write, tmp_path):
    write_all(write, {name: values for name, values in WINNING.items() if name != "dense"})
    other = {"trainer__device": "cpu", "dataset__root": "elsewhere", "schedule__name": "mine"}
    write_all(write, {"dense": WINNING["dense"]}, **other)
    assert outcomes(judged(tmp_path)) == [("jackpot", [])]


@pytest.mark.parametrize("arm", ["dense", "small_dense"])
def test_arms_of_different_images_are_not_compared(write, tmp_path, capsys, arm):
    part = {"trainer__limit_eval_batches": 4, "trainer__eval_batch_size": 500}
    write_all(write, {name: values for name, values in WINNING.items() if name != arm}, **part)
    write_all(write, {arm: WINNING[arm]}, trainer__limit_eval_batches=4, trainer__eval_batch_size=250)
    ((outcome, reasons),) = outcomes(judged(tmp_path))
    assert outcome == "refused" and any("images evaluated at most differs: " in line for line in reasons)
    assert "on a part of the images: images evaluated at most 2,000\n" in capsys.readouterr().out


def test_a_verdict_on_a_part_of_the_images_says_so(write, tmp_path, capsys):
    write_all(write, trainer__limit_eval_batches=4, trainer__limit_train_batches=20)
    assert outcomes(judged(tmp_path))[0][0] == "jackpot"
    printed = capsys.readouterr().out
    assert "on a part of the images: images evaluated at most 2,000\n" in printed
    assert "on a part of the images: trainer.limit_train_batches 20\n" in printed


def test_the_small_network_is_the_one_with_as_many_parameters(write, tmp_path):
    write_all(write, {name: values for name, values in WINNING.items() if name != "small_dense"})
    write_all(write, {"small_dense": (95.0, 95.0)}, params=round(KEPT * 1.2), method={"sparsity": 0.79})
    ((outcome, reasons),) = outcomes(judged(tmp_path))
    assert (outcome, reasons) == ("incomplete", ["small_dense is missing"])
    write_all(write, {"small_dense": (94.0, 94.0)}, params=round(KEPT * 0.92), method={"sparsity": 0.84})
    assert outcomes(judged(tmp_path)) == [("none", [])]
    write_all(write, {"small_dense": WINNING["small_dense"]}, params=round(KEPT * 1.03), method={"sparsity": 0.82})
    assert outcomes(judged(tmp_path)) == [("jackpot", [])]


def test_accuracies_of_held_out_images_are_called_so(write, tmp_path, capsys):
    write_all(write, dataset__validation=0.1)
    assert outcomes(judged(tmp_path)) == [("jackpot", [])]
    assert "with dataset.validation the accuracies are those of held-out training images\n" in capsys.readouterr().out


def test_copies_repeats_and_other_comparisons_are_left_out(write, tmp_path):
    runs = write_all(write)
    again = write("RR-IMP", 0.1, 0, 99.0)
    by_macs = write("small_dense", 0.1, 0, 99.0, method={"match": "macs"})
    reordered = write("RR-IMP", 0.1, 1, 99.0, method={"copy": 1})
    content = judged(tmp_path)
    assert outcomes(content) == [("jackpot", [])]
    notes = "\n".join(content["notes"])
    assert f"{again} repeats seed 0 of {runs['RR-IMP'][2]}" in notes
    assert f"{by_macs} is left out: method.match=macs" in notes
    assert f"{reordered} is left out: method.copy=1" in notes


def test_a_run_whose_options_cannot_be_read_is_named(write, tmp_path):
    write_all(write)
    broken = write("dense", 0.1, 5, 99.0, schedule__batch_size="many")
    content = judged(tmp_path)
    assert outcomes(content) == [("jackpot", [])]
    assert content["notes"][0].startswith(f"{broken} is left out, its options cannot be read: schedule.batch_size")


def test_sparsity_is_the_target_or_what_the_rounds_leave():
    assert sparsity_of(LOTTERY | {"levels": 14}) == pytest.approx(0.956, abs=1e-4)
    assert sparsity_of(LOTTERY | {"levels": None}) == pytest.approx(0.5904)
    assert sparsity_of(LOTTERY | {"levels": None, "sparsity": 0.9}) == 0.9


def test_a_target_and_the_rounds_that_reach_it_are_one_sparsity(write, tmp_path):
    write_all(write, {name: values for name, values in WINNING.items() if name != "RR-IMP"})
    write_all(write, {"RR-IMP": WINNING["RR-IMP"]}, method={"levels": None, "sparsity": 0.83222784})
    (case,) = find_cases(read_entries(read_runs([tmp_path / "runs"]))[0])
    assert case.cells("RR-IMP") == {0.01: [89.0, 89.0], 0.1: [91.3, 91.3]}


def test_nothing_to_judge_and_no_margin_end_in_one_line(write, tmp_path):
    runs = str(tmp_path / "runs")
    write_all(write, {"dense": WINNING["dense"]})
    with pytest.raises(UserError, match="no run of method=lottery with method.arm=LT-IMP"):
        main([runs])
    write_all(write, dataset__name="mine")
    with pytest.raises(UserError, match="dataset=mine has no published margin .* --sim POINTS"):
        main([runs])
    assert not (tmp_path / "runs" / "verdict.json").exists()
    assert main([runs, "--sim", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name run directories, or options of new runs"),
        (["outputs", "seed=0,1"], "either run directories or options of new runs, got outputs among options"),
        (["outputs", "--preset", "width"], "either run directories or options"),
        (["outputs", "--dry-run"], "--dry-run goes with options of new runs"),
        (["outputs", "--sim", "-1"], "--sim must be points of top-1, 0 or more, got -1"),
        (["outputs", "--gap", "nan"], "--gap must be points of top-1"),
        (["outputs", "--min-sparsity", "1"], r"--min-sparsity must lie in \[0, 1\), got 1"),
        (["--preset", "depth"], "invalid choice: 'depth'"),
        (["outputs", "-m"], "unrecognized arguments: -m"),
        (["method=rigl", "seed=0,1"], "method=rigl: verdict chooses methods and arms itself"),
        (["method.arm=LT-OMP"], "method.arm=LT-OMP: verdict chooses"),
        (["schedule.train.lr=0.01,0.1"], "seed=0: a verdict needs two seeds or more"),
        (["seed=0,1"], "schedule.train.lr=0.1: a verdict needs two learning rates or more"),
        (["seed=0,1", "method.levls=3"], "unknown option method.levls .did you mean 'method.levels'"),
    ],
)  # fmt: skip
def test_wrong_arguments_end_in_one_line_before_any_run(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = list(TINY) if any("=" in argument for argument in arguments) and arguments[0] != "outputs" else []
    with pytest.raises(UserError, match=message):
        main([*tiny, *arguments])
    assert list(tmp_path.iterdir()) == []


SMALLEST = (*TINY, "schedule.train.epochs=1", "dataset.num_train=16", "schedule.train.lr=0.05,0.1", "seed=0,1",
            "method.levels=2", "method.tolerance=0.3")  # fmt: skip


@pytest.fixture(scope="module")
def smallest():
    """The planned runs of SMALLEST: 2 learning rates, 2 seeds, sparsity 0.36."""
    return plan(conf_dir(), SMALLEST)


@pytest.fixture
def planned(smallest, tmp_path, monkeypatch):
    """The same with their outputs in a folder of this test; every verdict is about these runs."""
    moved = [replace(entry, config=replace(entry.config, output_dir=str(tmp_path / "outputs")),
                     directory=tmp_path / entry.directory) for entry in smallest]  # fmt: skip
    monkeypatch.setattr(verdict_runs, "plan", lambda *_: moved)
    monkeypatch.chdir(tmp_path)
    return moved


def arm_of(entry):
    return entry.label.split()[0]


def test_the_runs_of_the_definition_and_how_many_trainings_they_share(smallest):
    arms = ("dense", "small_dense", "LT-IMP", "RR-IMP", "LT-OMP", "RR-OMP", "LR-rewinding-OMP")
    assert Counter(map(arm_of, smallest)) == dict.fromkeys(arms, 4)
    # per learning rate and seed: dense 1, LT-IMP 2 rounds more, every other arm one of its own;
    # alone: dense 1, small 1, LT-IMP and RR-IMP 3 each, one-shot arms 2 each
    assert sharing(smallest).startswith("32 trainings") and "; 56 without" in sharing(smallest)
    assert [arm_of(entry) for entry in smallest[:4]] == ["dense"] * 4
    assert len({entry.directory for entry in smallest}) == len(smallest)


def test_rewinding_adds_a_ticket_with_its_control_and_leaves_the_others_alone(smallest):
    rewound = plan(conf_dir(), [*SMALLEST, "method.rewind_to=0ep,2it"])
    before = {entry.directory for entry in smallest}
    added = [entry for entry in rewound if entry.directory not in before]
    assert len(rewound) - len(added) == len(before)
    places = Counter((arm_of(entry), entry.config.method.rewind_to) for entry in added)
    assert places == {("IMP-rewind", "0ep"): 4, ("IMP-rewind", "2it"): 4, ("RR-IMP", "2it"): 4}
    assert all("method.rewind_to=" in entry.label for entry in added)


def test_the_small_network_has_as_many_parameters_as_the_mask_keeps():
    ticket = compose(*TINY, "method=lottery", "method.levels=2", "method.exclude=[linear]")
    # of 17,224 parameters 16,812 are weights of convolutions, of which 36 % go
    assert small_sparsity(ticket) == pytest.approx(0.36 * 16812 / 17224, abs=1e-9)


def test_a_dry_run_lists_the_runs_and_leaves_nothing(planned, tmp_path, capsys):
    assert main([*SMALLEST, "--dry-run", "--sim", "1", "--min-sparsity", "0.3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("28 runs: 32 trainings") and len(printed) == 30
    assert printed[2].startswith("  dense schedule.train.lr=0.05 seed=0: fake-resnet20-dense-s0-")
    assert list(tmp_path.iterdir()) == []


def test_what_no_verdict_can_come_of_is_refused_before_any_run(planned, tmp_path):
    with pytest.raises(UserError, match="dataset=fake has no published margin"):
        main([*SMALLEST])
    with pytest.raises(UserError, match="every sparsity is trivial, the highest is 0.36; --min-sparsity is 0.59"):
        main([*SMALLEST, "--sim", "1"])
    assert list(tmp_path.iterdir()) == []


def fake_runs(monkeypatch, planned, codes):
    """Let runs leave files without training; `codes` maps arms to the exit codes of runs that do not finish."""
    done = []

    def run(config, *, tally):
        (entry,) = [known for known in planned if known.config is config]
        done.append(arm_of(entry))
        if done[-1] in codes:
            return codes[done[-1]]
        entry.directory.mkdir(parents=True)
        files = {"run.json": {"id": str(entry.directory), "config": as_mapping(config)},
                 "status.json": {"status": "finished"},
                 "summary.json": {"status": "finished", "run/id": str(entry.directory), "run/seed": config.seed,
                                  "final/top1": 50.0 + len(done) / 100, "params/nonzero": 1000}}  # fmt: skip
        for name, content in files.items():
            (entry.directory / name).write_text(json.dumps(content))
        return 0

    monkeypatch.setattr(runner, "run", run)
    return done


def test_a_failed_run_is_named_and_leaves_the_verdict_open(planned, monkeypatch, capsys):
    done = fake_runs(monkeypatch, planned, {"RR-IMP": 1})
    assert main([*SMALLEST, "--sim", "1", "--min-sparsity", "0.3"]) == 1
    assert len(done) == 28
    printed = capsys.readouterr().out
    assert "run 28 of 28: " in printed
    assert "verdict at sparsity 0.36: incomplete\n  RR-IMP at lr=0.05, seed 0: not started\n" in printed
    ((outcome, reasons),) = outcomes(json.loads(Path("outputs/verdict.json").read_text()))
    assert outcome == "incomplete" and len(reasons) == 5 and "RR-IMP is missing" in reasons


def test_a_signal_stops_everything(planned, monkeypatch):
    done = fake_runs(monkeypatch, planned, {"LT-IMP": 143})
    assert main([*SMALLEST, "--sim", "1", "--min-sparsity", "0.3"]) == 143
    assert done.count("LT-IMP") == 1 and done[-1] == "LT-IMP"
    assert not Path("outputs/verdict.json").exists()


def test_typed_options_win_over_those_of_a_preset():
    options = with_preset(["seed=5,6", "schedule=demo", "method.sparsity=0.9"], "epochs")
    assert options == ["schedule.train.lr=0.005,0.01,0.1", "schedule.multiplier=0.4875,1", "seed=5,6", "schedule=demo",
                       "method.sparsity=0.9"]  # fmt: skip
    assert with_preset(["seed=5"], None) == ["seed=5"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_consists_of_options_that_exist(preset):
    options = with_preset(["dataset=cifar10", "seed=0", "method.levels=4", "schedule.train.lr=0.1"], preset)
    configs = list(compose_checked(conf_dir(), [*options, "method=lottery"], sweep=True))
    found = [(config.schedule.phase("train").epochs, config.model.width) for config in configs]
    assert found == {
        "learning_rate": [(10, 1.0)], "epochs": [(78, 1.0), (160, 1.0)], "width": [(10, 1.0), (10, 2.0)],
    }[preset]  # fmt: skip


def test_judging_needs_no_torch():
    code = "import sys, prune_lab.commands.verdict.command; print({'torch', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.slow
def test_real_runs_end_in_a_verdict_and_a_second_call_trains_nothing(tmp_path, capsys):
    options = [*SMALLEST, f"output_dir={tmp_path}", "--sim", "1", "--min-sparsity", "0.3"]
    assert main(options) == 0
    first = capsys.readouterr().out
    assert first.rstrip().endswith("28 runs: 32 trainings, because equal phases are shared; 56 without sharing; "
                                   "32 done now")  # fmt: skip
    ((outcome, _),) = outcomes(json.loads((tmp_path / "verdict.json").read_text()))
    assert outcome in ("jackpot", "secondary prize", "none")
    assert main(options) == 0
    second = capsys.readouterr().out
    assert second.count("done already: ") == 28
    assert second.rstrip().endswith("; 0 done now")
    start, end = "resnet20 on fake", "written to"
    assert second[second.index(start) : second.index(end)] == first[first.index(start) : first.index(end)]
