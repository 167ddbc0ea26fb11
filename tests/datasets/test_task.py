"""Figures of the tasks against the definitions."""

from __future__ import annotations

import math

import pytest
import torch

from prune_lab.datasets.task import IGNORED, Classification, LanguageModelling


def evaluated(task, outputs: torch.Tensor, targets: torch.Tensor, parts: int) -> dict[str, float]:
    sums = torch.zeros(task.num_evaluation_sums, dtype=torch.float64)
    for some, wanted in zip(outputs.tensor_split(parts), targets.tensor_split(parts), strict=True):
        task.add_evaluation(sums, some, wanted)
    return task.evaluation_figures(sums.tolist())


@pytest.mark.parametrize("parts", [1, 3])
def test_classification(parts: int) -> None:
    outputs = torch.tensor([[5.0, 4, 3, 2, 1, 0]]).repeat(3, 1)
    found = evaluated(Classification(), outputs, torch.tensor([0, 4, 5]), parts)
    assert found["top1"] == pytest.approx(100 / 3) and found["top5"] == pytest.approx(200 / 3)
    log_sum = math.log(sum(math.exp(value) for value in range(6)))
    assert found["loss"] == pytest.approx(log_sum - (5 + 1 + 0) / 3)


@pytest.mark.parametrize("parts", [1, 2])
def test_bits_per_character_of_a_uniform_guess_are_those_of_the_alphabet(parts: int) -> None:
    targets = torch.tensor([[0, 1, 2], [3, IGNORED, IGNORED]])
    found = evaluated(LanguageModelling("bytes"), torch.zeros(2, 3, 256), targets, parts)
    assert found == {"loss": pytest.approx(math.log(256)), "bpc": pytest.approx(8.0)}


def test_perplexity_of_a_uniform_guess_is_the_size_of_the_vocabulary() -> None:
    found = evaluated(LanguageModelling("words"), torch.zeros(2, 3, 50), torch.zeros(2, 3, dtype=torch.int64), 1)
    assert found["perplexity"] == pytest.approx(50)


def test_training_sums_weigh_batches_by_their_symbols() -> None:
    task, sums = LanguageModelling("bytes"), torch.zeros(2, dtype=torch.float64)
    for nats, shape in ((1.0, (2, 3)), (4.0, (1, 2))):
        task.add_training(sums, torch.tensor(nats), torch.zeros(*shape, 4), torch.zeros(shape, dtype=torch.int64))
    assert task.training_figures(sums.tolist())["loss"] == pytest.approx((6 * 1 + 2 * 4) / 8)


def test_an_overflowing_perplexity_is_infinite() -> None:
    assert LanguageModelling("words").training_figures([1e6, 1])["perplexity"] == math.inf


def test_the_headline_says_which_way_is_better() -> None:
    tasks = (Classification(), LanguageModelling("bytes"), LanguageModelling("words"))
    assert [(task.headline.key, task.headline.more_is_better) for task in tasks] == [
        ("top1", True), ("bpc", False), ("perplexity", False)]  # fmt: skip
    assert all(task.headline.key in task.figures and "loss" in task.figures for task in tasks)
