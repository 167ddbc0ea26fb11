"""Defects of public sparse-training code that show in whole runs: each as a test that ours does not share it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_lab.cli import command as cli
from prune_lab.foundations import checkpoint
from prune_lab.foundations.errors import UserError
from prune_lab.optim.learning_rate import learning_rate
from prune_lab.pipeline import runner
from prune_lab.training import evaluation, loop
from prune_lab.training.loop import TrainState
from tests.helpers.method_runs import SHORT, configure, finish, last_result, option_names, run_folder, summary, watch

# Resume


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the checkpoint of a RigL run stopped after five of nine steps, its initial masks beside it."""
    first: dict[str, torch.Tensor] = {}

    def look(training: TrainState, step: int) -> None:
        if step == 0:  # the first update, at step 0, is left out by method.begin
            first.update({name: mask.clone() for name, mask in training.context.masks.masks.items()})
        if step == 4:
            monkeypatch.setattr(training, "stop", lambda: True)

    with monkeypatch.context() as patch:
        watch(patch, look)
        assert runner.run(configure(tmp_path, "rigl", "method.begin=1")) != 0
    (path,) = tmp_path.glob("phases/*/checkpoint.pt")
    return {"initial masks": first} | checkpoint.load(path)


@pytest.fixture
def resumed(stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the state with which the same command goes on, before its first step, and that step's learning rate."""
    state: dict[str, Any] = {}
    original = loop.train_step

    def step(training: TrainState, images: torch.Tensor, labels: torch.Tensor) -> None:
        if not state:
            # Through a file, so that nothing is compared with itself.
            checkpoint.save(training.state_dict(), tmp_path / "seen.pt")
            state.update(checkpoint.load(tmp_path / "seen.pt"))
            state["moved fraction"] = training.method.moved_fraction(training.context, training.progress.step)
        original(training, images, labels)
        state.setdefault("lr", training.context.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(loop, "train_step", step)
    config = configure(tmp_path, "rigl", "method.begin=1")
    assert runner.run(config) == 0
    state["schedule"] = config.schedule.train
    return state


def test_a_resumed_run_goes_on_with_its_masks(stopped, resumed) -> None:
    """rigl-reproducibility draws new random masks: 107,548 weights before, 22,029 after the first application."""
    for name, mask in stopped["masks"].items():
        assert torch.equal(resumed["masks"][name], mask)
        assert torch.equal(resumed["model"][name], stopped["model"][name])
    moved = [name for name, mask in stopped["masks"].items() if not torch.equal(mask, stopped["initial masks"][name])]
    assert moved  # they are not the masks a fresh run would draw


def test_a_resumed_run_goes_on_with_optimizer_learning_rate_and_drop_fraction(stopped, resumed) -> None:
    """rigl-reproducibility restores none of the three, and its test compares an object with itself."""
    for index, entry in stopped["optimizer"]["state"].items():
        assert entry["momentum_buffer"].any()
        assert torch.equal(resumed["optimizer"]["state"][index]["momentum_buffer"], entry["momentum_buffer"])
    assert resumed["progress"] | {"wall_s": 0} == stopped["progress"] | {"wall_s": 0}
    assert resumed["lr"] == learning_rate(resumed["schedule"], 5, 3) != learning_rate(resumed["schedule"], 0, 3)
    assert resumed["method"]["churn"]["updates"] == stopped["method"]["churn"]["updates"] == 2
    assert 0 < resumed["moved fraction"] < 0.3


# Options


# Another value for each option; None: needs a file or is solved before the run (tests of its own).
OTHER = {
    "sparsity": 0.7, "distribution": "er", "first_layer": "dense_compensated", "power": 0.5, "include": None,
    "exclude": "[conv1]", "alpha": 0.6, "interval": 3, "begin": 1, "end": 0.5, "decay": "linear", "drop": "by_sign",
    "regrown": "zero", "skip_step_on_update": "false", "reset_state": "false", "grow_batches": 2,
    "initial_sparsity": 0.4, "num_cuts": 2, "densities": None, "match": None, "match_to": None, "match_by": None,
    "floor": 0.5, "redistribution": "gradient", "c": 10.0, "eps": 0.01, "time": "round", "normalize": "layer_rms",
    "growth": "random_unfired", "apportion": "official", "min_per_layer": 100, "control": "shuffle",
    "samples_per_class": 1, "scoring_batch": 7, "bn_mode": "eval", "augment_scoring": "true",
    "combine": "sum_of_abs", "temperature": 1.0, "rounds": 2, "split": "class_sorted", "hvp_mode": "per_batch",
    "reinit_linear": "true", "low_memory": None,
}  # fmt: skip
# What must be set beside an option, in the run it is compared with as well.
WITH = {
    "eps": ("method.c=0.01",), "time": ("method.c=0.01",), "min_per_layer": ("method.distribution=global",),
    "combine": ("method.scoring_batch=7",), "hvp_mode": ("method.scoring_batch=7",),
    "split": ("method.scoring_batch=7",),
    "rounds": ("method.samples_per_class=1",),
}  # fmt: skip
# Between them they have every option of the methods with masks; each is tried on the first that has it.
VARIED = ("rigl", "gmp", "set", "dst_ee", "snfs", "snip", "grasp")


def variants() -> list[tuple[str, str, Any]]:
    rows, tried = [], {"name"}
    for name in VARIED:
        for option in sorted(option_names(name) - (tried - {"begin", "end"})):
            value = OTHER[option]
            if name == "gmp":
                value = {"begin": 0.1, "end": 1.0}.get(option, value)
            if value is not None and (name in ("rigl", "gmp") or option not in tried):
                rows.append((name, option, value))
        tried |= option_names(name)
    return rows


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that gives the final weights of a run with some options, done once."""
    known: dict[tuple, dict] = {}

    def get(name: str, *options: str) -> dict:
        if (name, options) not in known:
            known[name, options] = final_weights(tmp_path_factory.mktemp(name), name, *options)
        return known[name, options]

    return get


def final_weights(folder: Path, name: str, *options: str) -> dict[str, torch.Tensor]:
    config = configure(folder, name, "method.distribution=erk", *options, short=SHORT | {"alpha": 0.9})
    return last_result(finish(config))["model"]


@pytest.mark.thin(4)
@pytest.mark.parametrize(("name", "option", "value"), variants())
def test_every_option_changes_the_run(name: str, option: str, value: Any, usual, tmp_path: Path) -> None:
    """GraNet accepts --growth and --prune and ignores them: its users believe an ablation was run."""
    beside = WITH.get(option, ())
    changed = final_weights(tmp_path, name, *beside, f"method.{option}={value}")
    assert any(not torch.equal(changed[key], usual(name, *beside)[key]) for key in changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method.distribution=uniform", "method.power=2"], r"method\.power=2 is for er and erk"),
        (["method.densities=a.json"], r"method\.densities=FILE goes with method\.distribution=file"),
        (["method.distribution=file"], r"method\.densities=FILE goes with method\.distribution=file"),
        (["method.distribution=file", "method.densities=a.json", "method.first_layer=dense_compensated"],
         r"method\.first_layer=dense_compensated: give density 1"),
        (["method=gmp", "method.distribution=global", "method.first_layer=dense_compensated"],
         r"method\.first_layer=dense_compensated needs a budget per layer"),
        (["method.growth=random"], r"unknown option method\.growth"),
    ],
)  # fmt: skip
def test_an_option_that_would_have_no_effect_is_refused(options, message, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["method=rigl", *options]) == 1
    assert_matches(message, capsys.readouterr().err)


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(UserError, match=pattern):
        raise UserError(text)


def test_a_compensated_first_layer_needs_a_first_layer_in_the_budget(tmp_path: Path) -> None:
    """Otherwise the second layer would silently be the one that stays dense."""
    config = configure(tmp_path, "static", "method.first_layer=dense_compensated", "method.exclude=[conv1]")
    with pytest.raises(UserError, match="conv1 has no budget, kept dense by method.exclude"):
        if runner.run(config) == 1:
            raise UserError(json.loads((run_folder(config) / "status.json").read_text())["error"])


def test_an_unknown_method_ends_the_command(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    """TurboPrune prints a message and trains on, unpruned."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["method=rigel", "dataset=fake"]) == 1
    assert "did you mean 'rigl'?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Training


def test_momentum_of_pruned_weights_is_not_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ITOP masks the buffers each step, so that growth by momentum only brings back what was dropped."""
    seen: list[float] = []

    def look(training: TrainState, step: int) -> None:
        context = training.context
        for name, mask in context.masks.masks.items():
            buffer = context.optimizer.state[context.parameters()[name]]["momentum_buffer"]
            seen.append(float((buffer[~mask] != 0).float().mean()))

    watch(monkeypatch, look)
    finish(configure(tmp_path, "static"))
    assert min(seen) > 0.5


@pytest.mark.parametrize("num_cuts", [1, 5])
def test_the_ramp_ends_at_its_target_and_not_next_to_it(num_cuts: int, tmp_path: Path) -> None:
    """STR and ITOP divide by end - start + 1 and stop at 0.899970 of 0.9 with 30 cuts."""
    options = ("method.sparsity=0.5", "method.begin=0", f"method.num_cuts={num_cuts}", "method.distribution=global")
    written = summary(finish(configure(tmp_path, "gmp", *options)))
    assert written["sparsity/achieved"] == 0.5  # the number of eligible weights is even


def test_held_out_images_are_never_augmented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rigl-reproducibility passes validation images through the training augmentation."""
    images: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
    watch(monkeypatch, lambda training, step: None)
    step, measure = loop.train_step, evaluation.measure

    def keep_training(training: TrainState, batch: torch.Tensor, labels: torch.Tensor) -> None:
        images["train"].append(batch.clone())
        step(training, batch, labels)

    def keep_evaluation(model, dataset, split, **options) -> dict[str, float]:
        assert split == "val"
        images["eval"].append(torch.cat([batch for batch, _ in dataset.eval_batches(split, 4, rank=0, world_size=1)]))
        return measure(model, dataset, split, **options)

    monkeypatch.setattr(loop, "train_step", keep_training)
    monkeypatch.setattr(loop, "measure", keep_evaluation)
    finish(configure(tmp_path, "dense", "dataset.num_train=40", "dataset.validation=0.25"))
    first, *later = images["eval"]
    assert len(first) == 10 and len(later) == 2
    assert all(torch.equal(first, other) for other in later)
    epochs = [torch.cat(images["train"][index : index + 3]).flatten(1) for index in (0, 3, 6)]
    assert all((torch.cdist(first.flatten(1), epoch) > 0).all() for epoch in epochs)  # disjoint from training


def test_a_diverged_run_says_so_at_an_update_too(tmp_path: Path) -> None:
    """A NaN meets the ranking of weights before anybody looks at the loss; the message must be about the loss."""
    options = ("method.interval=1", "method.skip_step_on_update=false", "schedule.train.lr=1e30")
    config = configure(tmp_path, "rigl", *options)
    assert runner.run(config) == 1
    status = json.loads((run_folder(config) / "status.json").read_text())
    assert status["status"] == "failed"
    assert_matches("loss is not finite in phase train", status["error"])
