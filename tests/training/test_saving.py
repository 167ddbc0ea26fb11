"""Checkpoints while training goes on: real copies, one write at a time, errors told, an interval that costs 1 %."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest
import torch

from prune_lab.foundations import checkpoint
from prune_lab.foundations.checkpoint import CheckpointPair, SaveError
from prune_lab.foundations.errors import UserError
from prune_lab.training import saving
from prune_lab.training.saving import Saves, next_save_s, snapshot
from tests.helpers.runs import TINY, compose

CPU = torch.device("cpu")


class SlowPair(CheckpointPair):
    """Writes only when told to."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, print)
        self.may_write = threading.Event()

    def save(self, state: dict) -> None:
        assert self.may_write.wait(20)
        super().save(state)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def take(saves: Saves, clock: Clock, state: dict, *, cost_s: float) -> None:
    with saves.timed():
        clock.now += cost_s
        saves.save(state)


@pytest.mark.parametrize(
    ("costs", "last_s", "due_s"),
    [
        ([], 0, 10),  # nothing known yet
        ([0.01], 10, 20),  # cheap: (0.01 + 0.01) / 0.01 = 2 s, but 10 s apart
        ([0.5], 10, 100),  # (0.5 + 0.5) / 0.01: the second ends 100 s of which checkpoints are one
        ([0.5, 0.5], 100, 150),  # from then on every 50 s
        ([0.5, 1.1], 100, 240),  # (1.6 + 0.8) / 0.01
        ([0.05] * 1999 + [60], 20000, 20010),  # 160 / 0.01 = 16 000 s: the cheap ones have left room for it
        ([60.0, 0.1, 0.1], 700, 1300),  # one slow write: 100 * (60.2 + 20.07) would be two hours
        ([20.0, 20.0], 4000, 6000),  # all are slow: 100 * 60, at most 100 * 20 = 2000 s after the last one
    ],
)
def test_the_interval_by_hand(costs, last_s, due_s):
    assert next_save_s(costs, last_s) == pytest.approx(due_s)


@pytest.mark.parametrize("cost", [0.001, 0.1, 0.7, 3.0, 15.0])
def test_the_share_is_kept_and_nearly_used(cost):
    """A thousand checkpoints of the same cost: beyond the first one, whose cost nobody knew, they are 1 %."""
    costs, now = [], 0.0
    for _ in range(1000):
        now = next_save_s(costs, now)
        costs.append(cost)
        assert sum(costs[1:]) <= 0.01 * now * 1.0001
    assert len(costs) >= min(0.01 * now / cost, now / 10) * 0.999


def test_a_snapshot_is_a_real_copy_of_everything():
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {"weight": weight, "list": [torch.ones(2), (3, None)], "mask": weight > 0, "step": 4, 7: torch.tensor(2.0)}
    copied = snapshot(state)
    before = weight.clone()
    for tensor in (weight, state["list"][0], state["mask"], state[7]):
        tensor.zero_()
    assert torch.equal(copied["weight"], before) and copied["weight"].stride() == before.stride()
    assert torch.equal(copied["mask"], before > 0)
    assert copied["list"][0].tolist() == [1, 1] and copied["list"][1] == (3, None)
    assert copied["step"] == 4 and copied[7] == 2


def test_what_a_parameter_of_the_network_leaves_carries_no_graph():
    assert not snapshot([torch.nn.Parameter(torch.ones(2))])[0].requires_grad


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu_is_in_host_memory_and_real():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    tensor = torch.randn(4, 3, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    before, copied = tensor.cpu(), snapshot({"x": tensor})["x"]
    tensor.zero_()
    torch.cuda.synchronize()
    assert copied.device.type == "cpu" and copied.stride() == tensor.stride() and torch.equal(copied, before)


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_the_step(tmp_path):
    pair = SlowPair(tmp_path)
    saves, weight = Saves(pair, "auto", CPU), torch.zeros(3)
    saves.save({"weight": weight})
    weight.add_(1)  # the next step; nothing is written yet
    assert pair.last_good() is None
    pair.may_write.set()
    saves.wait()
    assert pair.load()["weight"].tolist() == [0, 0, 0]
    saves.close()


def test_one_write_at_a_time_and_the_next_one_waits(tmp_path):
    pair = SlowPair(tmp_path)
    saves = Saves(pair, "auto", CPU)
    saves.save({"step": 1})
    threading.Timer(0.2, pair.may_write.set).start()
    begun = time.monotonic()
    saves.save({"step": 2})
    assert time.monotonic() - begun > 0.15
    saves.close()
    assert pair.load()["step"] == 2 and checkpoint.load(pair.previous)["step"] == 1


def full(path, _fill):
    raise SaveError(errno.ENOSPC, f"cannot write {path}: No space left on device")


@pytest.mark.parametrize("occasion", ["due", "save", "wait"])
def test_a_full_disk_is_told_at_the_next_occasion(tmp_path, monkeypatch, occasion):
    saves = Saves(CheckpointPair(tmp_path, print), "auto", CPU)
    monkeypatch.setattr(checkpoint, "write_file", full)
    saves.save({"step": 1})
    saves._thread.submit(lambda: None).result()  # until it has failed
    with pytest.raises(SaveError, match="No space left"):
        {"due": saves.due, "save": lambda: saves.save({"step": 2}), "wait": saves.wait}[occasion]()
    monkeypatch.undo()
    saves.save({"step": 3})
    saves.close()
    assert saves.last_good() == tmp_path / "checkpoint.pt"


def test_the_end_hides_no_other_error(tmp_path, monkeypatch):
    saves = Saves(CheckpointPair(tmp_path, print), "auto", CPU)
    monkeypatch.setattr(checkpoint, "write_file", full)
    saves.save({"step": 1})
    saves.close()


def test_auto_follows_the_measured_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(saving.time, "thread_time", lambda: 3.0)
    clock, pair = Clock(), CheckpointPair(tmp_path, print)
    saves = Saves(pair, "auto", CPU, clock=clock)
    assert not saves.due()
    clock.now += 10
    assert saves.due()
    take(saves, clock, {"step": 1}, cost_s=0.5)
    saves.wait()
    clock.now = 1000 + 99.9
    assert not saves.due()
    clock.now = 1000 + 100.1
    assert saves.due()
    assert saves.costs == [0.5]
    saves.close()


def test_what_the_thread_computes_counts(tmp_path, monkeypatch):
    clock, pair = Clock(), CheckpointPair(tmp_path, print)
    monkeypatch.setattr(saving.time, "thread_time", iter([3.0, 3.25]).__next__)
    saves = Saves(pair, "auto", CPU, clock=clock)
    take(saves, clock, {"step": 1}, cost_s=0.5)
    saves.wait()
    assert saves.costs == [0.75]
    saves.close()


def test_a_number_is_the_interval(tmp_path):
    clock = Clock()
    saves = Saves(CheckpointPair(tmp_path, print), 3.0, CPU, clock=clock)
    clock.now += 2.9
    assert not saves.due()
    clock.now += 0.2
    assert saves.due()
    take(saves, clock, {"step": 1}, cost_s=50)
    clock.now += 2.9
    assert not saves.due()
    clock.now += 0.2
    assert saves.due()
    saves.close()


def test_another_process_than_the_main_one_neither_asks_nor_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(saving.distributed, "is_main", lambda: False)
    saves = Saves(CheckpointPair(tmp_path, print), 1e-9, CPU)
    assert not saves.due()
    saves.save({"step": 1})
    saves.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", ["0", "-1", "often", "null", "true"])
def test_a_wrong_interval_is_refused(given):
    allowed = "allowed: auto, a number of seconds above 0"
    with pytest.raises(UserError, match=f"trainer.checkpoint_interval_s={given} is not allowed; {allowed}"):
        compose(*TINY, f"trainer.checkpoint_interval_s={given}")


@pytest.mark.parametrize("given", ["auto", "2", "0.5"])
def test_an_interval_is_auto_or_a_number(given):
    found = compose(*TINY, f"trainer.checkpoint_interval_s={given}").trainer.checkpoint_interval_s
    assert found == (given if given == "auto" else float(given))
