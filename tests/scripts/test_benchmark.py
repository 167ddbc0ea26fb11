"""scripts/benchmark: ratios, their intervals and verdicts by hand; the sections run through on tiny networks."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prune_lab.core.method import build_method
from tests.conftest import REPO
from tests.helpers.method_runs import option_names

sys.path.insert(0, str(REPO / "scripts"))
timing, report, workload, checkpoints, plain, gpu, main = (
    importlib.import_module(f"benchmarks.{name}")
    for name in ("timing", "report", "workload", "checkpoints", "plain", "gpu", "__main__")
)

TINY = ("model.width=0.25", "schedule.batch_size=4", "trainer.device=cpu", "trainer.precision=fp32")
CPU = torch.device("cpu")
Ratio = timing.Ratio


@pytest.fixture
def command(child_environment, tmp_path):
    """Return a function that runs scripts/benchmark's Python side and returns the finished process."""

    def call(*arguments: str) -> subprocess.CompletedProcess:
        environment = child_environment | {"PYTHONPATH": f"{REPO / 'scripts'}:{child_environment['PYTHONPATH']}"}
        return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=300)  # fmt: skip

    return call


# Arithmetic


def test_updates_are_spread_over_their_interval():
    """99 steps of 1 s and one of 3 s: 102 / 100; 3 of 2 s and one of 6 s: 12 / 4."""
    assert timing.amortised([1.0, 2.0], [3.0, 6.0], 100) == pytest.approx([1.02, 2.04])
    assert timing.amortised([2.0], [6.0], 4) == pytest.approx([3.0])


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (0.99, 1.01, "holds"),
        (1.0101, 1.012, "does not hold"),
        (1.003, 1.021, "cannot be told"),
        (0.98, 1.021, "cannot be told, the noise is larger than the goal"),
    ],
)
def test_a_verdict_needs_the_whole_interval(low, high, answer):
    assert timing.Goal(1.01).verdict(Ratio(1.005, low, high)) == f"<= 1.01: {answer}"


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [(2.0, 2.4, "holds"), (1.5, 1.99, "does not hold"), (1.9, 2.1, "cannot be told")],
)
def test_a_ratio_may_have_a_lower_bound(low, high, answer):
    assert timing.Goal(2, at_most=False).verdict(Ratio(2.0, low, high)) == f">= 2: {answer}"


def test_ratios_are_paired_round_by_round(capsys):
    """Ratios 1.1 1.2 ... 1.9: median 1.5, quartiles 1.3 and 1.7; of nine, 99 % lies between the ends (2 / 2^9)."""
    base = [1.0, 5.0, 2.0, 1.0, 3.0, 1.0, 7.0, 1.0, 1.0]
    values = [step * (1.1 + index / 10) for index, step in enumerate(base)]
    kept = report.Report("steps")
    kept.compare("masks", values, base, timing.Goal(1.01))
    (row,) = kept.rows
    assert row["median"] == pytest.approx(1.5)
    assert row["quartiles"] == pytest.approx([1.3, 1.7])
    assert row["interval_99"] == pytest.approx([1.1, 1.9])
    assert row["verdict"] == "<= 1.01: does not hold"
    assert row["rounds"] == 9
    assert "1.5000  [1.1000, 1.9000]" in capsys.readouterr().out


def test_few_rounds_give_no_interval_and_no_verdict(capsys):
    kept = report.Report("memory")
    kept.compare("peak", [1.0] * 7, [1.0] * 7, timing.Goal(1.05))
    assert "interval_99" not in kept.rows[0]
    assert "too few rounds" in capsys.readouterr().out


def test_functions_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.in_turn(calls, timing.Plan(8, 0.0), CPU)
    assert [len(values) for values in times.values()] == [8, 8]
    found = timing.in_turn_once({"a": lambda: order.append("A") or 1.0, "b": lambda: order.append("B") or 2.0}, 3)
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert order[-6:] == ["A", "B", "B", "A", "A", "B"]


def test_saves_take_their_share_of_an_hour():
    """Every 100 s 0.5 s: 0.5 %. auto, 0.5 s each: at 10, 100, 150, 200 ... 3600 s: 72 saves, 36 s of 3600."""
    assert checkpoints.share(0.5, 100.0) == pytest.approx(0.005)
    assert checkpoints.share(0.5, "auto") == pytest.approx(0.01)
    assert checkpoints.share(0.0, "auto") == 0


def test_the_loader_that_takes_least_time_is_found_by_its_second_use(monkeypatch):
    """Starting the workers, in the first use, does not count; one candidate is not timed."""
    now, used = [0.0], []

    def use(count: int) -> None:
        now[0] += {2: 3.0, 4: 1.0, 8: 2.0}[count] if count in used else 10.0 * count
        used.append(count)

    monkeypatch.setattr(plain.time, "perf_counter", lambda: now[0])
    assert plain.fastest(lambda count: count, use, [2, 4, 8]) == (4, 4)
    used.clear()
    assert plain.fastest(lambda count: count, use, [2]) == (2, 2) and used == []


def test_numbers_of_workers_stay_within_the_cores():
    assert [plain.worker_counts(cores) for cores in (1, 2, 4, 7, 96)] == [[2], [2], [2, 4], [2, 4], [2, 4, 8]]


def test_a_load_above_the_cores_is_warned_of():
    assert report.load_warning(2.0, 2) is None and report.load_warning(None, 2) is None
    assert report.load_warning(2.5, 2).startswith("WARNING: a load of 2.50 on 2 cores: ")


def test_quick_starts_few_processes():
    assert workload.Options(quick=True).num_starts() == 2
    assert workload.Options().num_starts() == 8
    assert workload.Options(rounds=12, quick=True).num_starts() == 12


def test_streams_are_timed_from_before_their_first_batch(monkeypatch):
    """Four batches of one image, a second each: with the clock at the first batch three seconds would be counted."""
    stream = importlib.import_module("benchmarks.stream")
    now = [0.0]

    def batches(epoch):
        for _ in range(4):
            now[0] += 1.0
            yield None, [0]

    monkeypatch.setattr(stream.time, "process_time", lambda: now[0])
    options = type("Options", (), {"workers": 0, "device": "cpu", "rounds": 2})
    assert stream._measure({"a": batches}, options, 1) == {"a": [1.0, 1.0]}


# What is timed


def test_steps_stay_where_they_are_in_the_schedule_and_updates_change_the_mask():
    work = workload.workload("rigl", (*workload.SMALL, *TINY))
    before = {name: mask.clone() for name, mask in work.training.context.masks.masks.items()}
    work.ordinary()
    work.ordinary()
    assert work.training.progress.step == 1
    assert all(torch.equal(mask, before[name]) for name, mask in work.training.context.masks.masks.items())
    work.update()
    assert work.training.progress.step == work.interval == 100
    assert any(not torch.equal(mask, before[name]) for name, mask in work.training.context.masks.masks.items())


SCHEDULED = [name for name in workload.methods() if option_names(name) & {"interval", "num_cuts"}]
"""methods whose options say when masks change"""


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", SCHEDULED)
def test_every_method_with_scheduled_masks_has_its_updates_found(name):
    work = workload.workload(name, (*workload.SMALL, *TINY))
    assert len(work.updates) > 1 and work.interval > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", workload.methods())
def test_every_method_that_trains_has_steps_to_time(name):
    config = workload.compose([f"method={name}", *workload.SMALL, *TINY])
    phases = {workload.stem(phase) for phase in build_method(config).chain() if phase.is_training and phase.active}
    works = list(workload.workloads(name, (*workload.SMALL, *TINY)))
    assert len(works) == (1 if name == "dense" else len(phases))
    for work in works:
        work.ordinary()
        work.check()


def test_only_training_phases_of_the_method_itself_count_and_repeated_ones_once():
    options = (*workload.SMALL, *TINY)
    assert [work.name for work in workload.workloads("lottery", options)] == ["lottery"]
    assert [work.name for work in workload.workloads("slimming", options)] == ["slimming, train", "slimming, finetune"]
    assert list(workload.workloads("haste", options)) == []


def test_bare_steps_are_those_of_the_loop():
    """The same network sees the same batch: batch norm's statistics agree after a step of each."""
    work = workload.workload("dense", (*workload.SMALL, *TINY))
    bare = workload.bare_steps(work)
    copied = next(cell.cell_contents for cell in bare.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
    before = work.training.context.model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied.state_dict().items())
    bare()
    work.ordinary()
    after = work.training.context.model.state_dict()
    statistics = [name for name in after if name.endswith("running_mean")]
    assert all(torch.equal(copied.state_dict()[name], after[name]) for name in statistics)


def test_typed_options_replace_those_of_a_section():
    options = workload.Options(("model=vgg16", "seed=3"))
    assert options.over(*workload.SMALL)[:2] == ("model=vgg16", "dataset=cifar10")
    assert options.over("model=resnet20")[-1] == "seed=3"
    assert workload.Options(quick=True).plan(200, 60) == timing.Plan(8, 5.0)
    assert workload.Options(rounds=30).plan(200, 60).rounds == 30


def test_the_plain_script_trains_and_counts_what_it_gets_right():
    """Two colours, learnt by a network of one linear layer: all right after a few batches."""
    labels = torch.arange(64) % 2
    pixels = (labels.view(-1, 1, 1, 1) * 255).expand(-1, 32, 32, 3).to(torch.uint8).numpy()
    arrays = type("Arrays", (), {"train_images": pixels, "train_labels": labels.numpy(), "test_images": pixels,
                                 "test_labels": labels.numpy()})  # fmt: skip
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    batches = plain.loader(arrays, [0.5] * 3, [0.5] * 3, 8, num_batches=6, workers=0)
    assert len(batches) == 6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    first = plain.train_epoch(model, batches, optimizer)
    for _ in range(4):
        last = plain.train_epoch(model, batches, optimizer)
    assert last < first
    assert plain.top1(model, arrays, [0.5] * 3, [0.5] * 3) == 100


def test_the_plain_script_trains_in_the_formats_that_it_is_given():
    seen = []

    class Seen(torch.nn.Linear):
        def forward(self, images):
            assert images.is_contiguous(memory_format=torch.channels_last)
            logits = super().forward(images.mean((2, 3)))
            seen.append(logits.dtype)
            return logits

    model = Seen(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))]
    plain.train_epoch(model, batches, optimizer, autocast=lambda: torch.autocast("cpu", torch.bfloat16),
                      memory_format=torch.channels_last)  # fmt: skip
    assert seen == [torch.bfloat16]


def test_the_figures_of_a_gpu_are_made_on_any_device(monkeypatch):
    """The arithmetic only: peak and steps are a CPU's here."""
    monkeypatch.setattr(gpu, "_SIDE", 32)
    work = workload.workload("dense", (*workload.SMALL, *TINY))
    kept = report.Report("gpu")
    gpu._one("resnet20", work, workload.Options(quick=True), kept)
    found = {row["name"]: row for row in kept.rows}
    rate, epoch = found["resnet20, batch 4: images/s"]["value"], found["resnet20: an epoch of CIFAR-10, steps only"]
    assert epoch["value"] == pytest.approx(50_000 / rate)
    assert found["resnet20: fraction of the bf16 peak"]["median"] > 0


@pytest.mark.gpu
def test_the_section_gpu_runs(command):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    done = command("gpu", "--quick")
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout


# The command


def test_a_section_runs_and_leaves_its_numbers(command, tmp_path):
    done = command("goals", "--quick", "--json", "found.json", *TINY)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"cpu", "threads", "torch", "date", "gpu"} <= set(found)
    goals = [row for row in found["rows"] if row.get("goal")]
    assert [row["rounds"] for row in goals] == [8, 8, 8]
    assert all(row["verdict"].startswith("<= 1.01: ") for row in goals)
    assert "not run: " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("section", ["data", "formats", "checkpoints", "scoring", "memory", "peer", "gpu", "startup"])
def test_every_section_runs_through(command, section):
    done = command(section, "--quick", "--batches", "2", *TINY)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["stpes"], "section stpes (did you mean 'steps'?); allowed: goals, steps"),
        (["steps", "model=resnet21"], "model=resnet21 is not a choice"),
        (["peer", "--accuracy"], "--accuracy needs real images: --root FILE"),
    ],
)
def test_wrong_words_end_in_one_line(words, line, capsys):
    assert main.main(words) == 1
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_a_failed_section_is_named_and_the_others_are_run(monkeypatch, capsys, tmp_path):
    def fail(options, report):
        raise RuntimeError("no such thing")

    sections = {"one": fail, "two": lambda options, report: report.figure("top-1", 71.5, "%")}
    monkeypatch.setattr(main.Section, "load", lambda self: sections[self.line])
    for name in sections:
        monkeypatch.setitem(main.SECTIONS, name, main.Section("", "0", name))
    assert main.main(["one", "two", "--json", str(tmp_path / "out.json")]) == 1
    out, error = capsys.readouterr()
    assert "failed: RuntimeError: no such thing" in out and "71.5 %" in out
    assert error.endswith("\nscripts/benchmark: failed: one\n")
    assert [row["section"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["one", "two"]


def test_every_section_is_there():
    for name, section in main.SECTIONS.items():
        assert callable(section.load()), name


def test_the_shell_entry_can_be_run():
    script = Path(REPO / "scripts" / "benchmark")
    assert script.stat().st_mode & 0o111
    assert not (REPO / "scripts" / "benchmark.py").exists()
