"""Compiled training steps: same results for every method, wrong options refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from prune_lab.foundations.errors import UserError
from prune_lab.training.device_config import _compiled, resolve_device_config
from tests.helpers.runs import METHODS, TINY, assert_same_network, compose, execute

NO_COMPILING = ("dep_l0", "dep_l0 dense")


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method not in NO_COMPILING])
def test_a_traced_step_is_the_step_itself(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing alone, without the compiler behind it, must change no bit: nothing a method does may be frozen in."""
    options = (*TINY, *METHODS[method], "trainer.ema_decay=0.5", "trainer.accumulate=2")
    assert execute(tmp_path / "eager", *options) == 0
    seen = []
    original = torch.compile

    def traced(forward, **given):
        seen.append(forward)
        return original(forward, backend="eager", dynamic=given["dynamic"])

    monkeypatch.setattr(torch, "compile", traced)
    assert execute(tmp_path / "traced", *options, "trainer.compile=true") == 0
    assert seen or method == "haste", "nothing was compiled"
    assert_same_network(tmp_path / "eager", tmp_path / "traced")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_run_ends_close_to_an_eager_one(tmp_path: Path) -> None:
    options = (*TINY, *METHODS["rigl"], "schedule.train.lr=0.001")
    for name, compile in (("eager", "false"), ("compiled", "true")):
        assert execute(tmp_path / name, *options, f"trainer.compile={compile}") == 0
    assert_same_network(tmp_path / "eager", tmp_path / "compiled", rtol=1e-3, atol=1e-4)


def test_auto_compiles_on_a_gpu_only() -> None:
    assert _compiled("auto", torch.device("cuda")) is True and _compiled("auto", torch.device("cpu")) is False
    assert resolve_device_config(compose(*TINY, "trainer.compile=auto", "trainer.device=cpu").trainer).compile is False
    assert compose("dataset=imagenet").trainer.compile == "auto"
    assert compose("dataset=imagenet", "trainer=default").trainer.compile is False


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"trainer\.compile=graphs needs a CUDA device, got cpu"):
        resolve_device_config(compose(*TINY, "trainer.compile=graphs", "trainer.device=cpu").trainer)
    with pytest.raises(UserError, match=r"trainer\.compile=graphs does not go with method=dep_l0"):
        compose("method=dep_l0", "trainer.compile=graphs")
    assert compose("method=dep_l0", "dataset=imagenet").trainer.compile == "auto"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"trainer\.compile=true needs a C\+\+ compiler"):
        resolve_device_config(compose(*TINY, "trainer.compile=true", "trainer.device=cpu").trainer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_replayed_as_graphs_ends_close_to_an_eager_one(tmp_path: Path) -> None:
    options = (*TINY, *METHODS["rigl"], "schedule.train.lr=0.001", "trainer.device=cuda")
    for name, compile in (("eager", "false"), ("graphs", "graphs")):
        assert execute(tmp_path / name, *options, f"trainer.compile={compile}") == 0
    assert_same_network(tmp_path / "eager", tmp_path / "graphs", rtol=1e-3, atol=1e-4)
