"""Runs on text: every method that can, exact budgets, resume within a carried state, several processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from prune_lab.foundations import checkpoint
from prune_lab.foundations.errors import UserError
from prune_lab.training import loop
from tests.helpers.method_runs import NAMES, SHORT, brings, method_class, option_names
from tests.helpers.runs import assert_same_run, execute, fork_pair, summary, wait_for
from tests.helpers.text import options, write_text

REFUSED = [name for name in NAMES if method_class(name).needs_images]
WORKING = [name for name in NAMES if name not in (*REFUSED, "small_dense") and not brings(name, "optimizer")]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text")


def of(name: str) -> list[str]:
    short = [f"method.{key}={value}" for key, value in SHORT.items() if key in option_names(name)]
    return [f"method={name}", *short]


@pytest.mark.parametrize("name", WORKING)
def test_a_method_trains_on_text_to_its_sparsity(name: str, text: Path, tmp_path: Path) -> None:
    assert execute(tmp_path / "out", *options(text), *of(name)) == 0
    found = summary(tmp_path / "out")
    assert found["final/bpc"] == pytest.approx(found["final/loss"] / 0.6931471805599453)
    assert found["task/headline"] == "bpc" and "final/top1" not in found
    wanted = found["sparsity/requested"]
    assert wanted is None or found["sparsity/achieved"] == pytest.approx(wanted, abs=2e-3)  # some 300 weights
    assert found["macs/train"] > 0


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_for_images_is_refused_by_name(name: str, text: Path, tmp_path: Path) -> None:
    extra = ["optimizer=sgd_plain"] if brings(name, "optimizer") else []
    with pytest.raises(UserError, match=rf"method={name} needs a data set of images: it"):
        execute(tmp_path / "out", *options(text), *extra, *of(name))
    assert not list((tmp_path / "out").glob("*/summary.json"))


def test_images_and_text_are_not_mixed(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model=resnet20 reads images, dataset=text holds text"):
        execute(tmp_path, "dataset=text", f"dataset.root={text}", f"dataset.cache_dir={tmp_path}", "model=resnet20")
    with pytest.raises(UserError, match="model=gru_lm reads text, dataset=digits holds images"):
        execute(tmp_path, "dataset=digits", "model=gru_lm")


def test_dense_training_costs_three_passes_over_every_symbol(text: Path, tmp_path: Path) -> None:
    assert execute(tmp_path / "out", *options(text), "method=dense") == 0
    found = summary(tmp_path / "out")
    steps = 2 * (found["data/num_train_sequences"] // 8)
    assert found["macs/train"] == 3 * found["macs/dense"] * steps * 8 * 12 == found["macs/train_dense"]


@pytest.mark.parametrize("model", ["gru_lm", "lstm_lm"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stop_within_the_text_resumes_bit_for_bit(
    model: str, accumulate: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*options(text, model=model), *of("rigl"), f"trainer.accumulate={accumulate}")
    assert execute(tmp_path / "whole", *command) == 0
    real, left = loop.train_step, [7]

    def train_step(*arguments) -> None:
        real(*arguments)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "train_step", train_step)
    assert execute(tmp_path / "cut", *command) == 143
    (saved,) = (tmp_path / "cut").glob("phases/*/checkpoint.pt")
    assert set(checkpoint.load(saved)["carried"]) == set(range(accumulate))
    assert execute(tmp_path / "cut", *command) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_the_state_is_carried_over_or_not(text: Path, tmp_path: Path) -> None:
    losses = []
    for carried in ("true", "false"):
        assert execute(tmp_path / carried, *options(text), "method=dense", f"dataset.carry_state={carried}") == 0
        losses.append(summary(tmp_path / carried)["final/loss"])
    assert losses[0] != losses[1]


def test_words_have_a_perplexity(text: Path, tmp_path: Path) -> None:
    assert execute(tmp_path / "out", *options(text, model="lstm_lm", unit="word"), "method=dense") == 0
    found = summary(tmp_path / "out")
    assert 1 < found["final/perplexity"] < 12 and found["data/num_symbols"] == 11 and "final/bpc" not in found


def test_two_processes_equal_one(text: Path, tmp_path: Path) -> None:
    command = (*options(text), *of("rigl"))
    assert execute(tmp_path / "one", *command) == 0
    log = tmp_path / "pair.log"
    codes = [wait_for(child) for child in fork_pair(log, lambda: execute(tmp_path / "two", *command))]
    assert codes == [0, 0], log.read_text()
    one, two = summary(tmp_path / "one"), summary(tmp_path / "two")
    assert two["final/loss"] == pytest.approx(one["final/loss"], abs=1e-4) and two["macs/train"] == one["macs/train"]
