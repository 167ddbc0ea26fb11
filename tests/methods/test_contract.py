"""What every method must hold, found by its YAML file: a new method is tested without an edit here."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from prune_lab import models
from prune_lab.cli import command as cli
from prune_lab.compose.choices import own_options
from prune_lab.families import sparse_training
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import Range, parse
from prune_lab.pipeline import runner
from prune_lab.pipeline.dry_run import dry_run
from prune_lab.pruning.masks.distributions import num_keep_total
from prune_lab.training.loop import TrainState
from tests.helpers.method_runs import (
    CONF,
    NAMES,
    SHORT,
    brings,
    configure,
    finish,
    last_result,
    make,
    method_class,
    option_names,
    run_folder,
    summary,
    watch,
    yaml_node,
)

FAMILIES = {
    "resnet20": ("model.width=0.25",),
    "resnet18": ("model.width=0.0625",),
    "vgg16": ("model.width=0.0625",),
    "mobilenet_v2": ("model.width=0.25",),
    "mobilenet_v3_small": ("model.width=0.35",),
    "wrn_16_8": ("model.width=0.0625",),
}

WITH_SPARSITY = [name for name in NAMES if "sparsity" in option_names(name)]
WITH_MASKS = [
    name for name in NAMES
    if make(name, **({"sparsity": 0.5} if name in WITH_SPARSITY else {})).requested_sparsity() is not None
]


def choices(name: str, option: str) -> tuple[str, ...]:
    """Return the allowed values of a Literal option of a method."""
    return typing.get_args(hints(name).get(option))


def hints(name: str) -> dict[str, Any]:
    return typing.get_type_hints(method_class(name).Config, include_extras=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that gives the directory of an uninterrupted tiny run of a method, done once."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = finish(configure(tmp_path_factory.mktemp(name), name, *awkward(name)))
        return folders[name]

    return get


def awkward(name: str) -> tuple[str, ...]:
    """Return options that are easily forgotten, as far as the method leaves them open."""
    nesterov = () if brings(name, "optimizer") else ("optimizer.nesterov=true",)
    return (*nesterov, "trainer.ema_decay=0.8", "trainer.accumulate=2", "trainer.clip_norm=1")


def yaml_lines(file: str) -> list[str]:
    """Return the lines that set options in conf/method/FILE.yaml and in the files that it inherits from."""
    path = CONF / "method" / f"{file}.yaml"
    parents = [name for name in own_options(path).get("defaults", ()) if str(name).startswith("_") and name != "_self_"]
    own = [line for line in path.read_text().splitlines() if re.match(r"\w", line)]
    inherited = [line for name in parents for line in yaml_lines(name)]
    return [line for line in own if not line.startswith(("defaults:", "_target_:"))] + inherited


# Files and declarations


@pytest.mark.parametrize("name", NAMES)
def test_yaml_holds_exactly_the_options(name: str) -> None:
    node = yaml_node(name)
    assert node["name"] == name
    assert set(node) - {"_target_"} == option_names(name)
    own = own_options(CONF / "method" / f"{name}.yaml")
    assert [key for key in own if key != "defaults"][:2] == ["_target_", "name"]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_the_yaml_has_a_comment(name: str) -> None:
    lines = yaml_lines(name)
    assert len(lines) >= len(option_names(name))
    for line in lines:
        assert re.match(r"\w+: .*\S\s+# \S", line), line


@pytest.mark.parametrize("name", NAMES)
def test_literal_values_are_listed_in_the_comment(name: str) -> None:
    for line in yaml_lines(name):
        option, _, comment = line.partition(":")
        missing = [value for value in choices(name, option) if isinstance(value, str) and value not in comment]
        assert not missing, f"{line}: {missing}"


@pytest.mark.parametrize("name", NAMES)
def test_card_is_complete(name: str) -> None:
    card = method_class(name).card
    for field in fields(card):
        text = getattr(card, field.name)
        assert text and text == " ".join(text.split()) and text.isascii(), field.name


@pytest.mark.parametrize("name", NAMES)
def test_card_tells_where_an_option_departs_from_the_official_code(name: str) -> None:
    told = method_class(name).card.differences
    assert ("by_sign" in choices(name, "drop")) == (sparse_training.BY_SIGN in told)
    moves = set(choices(name, "redistribution")) - {"none"}
    assert bool(moves) == (sparse_training.PROPORTIONAL in told)


def test_modules_of_all_methods_import_no_torch() -> None:
    modules = sorted({yaml_node(name)["_target_"].rpartition(".")[0] for name in NAMES})
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONF.parent).returncode == 0


# Bad values


def bad_values(hint: Any) -> list[Any]:
    """Return values that the annotation of an option forbids."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # what the first type forbids; a word beside it is
        first, *_ = [part for part in typing.get_args(hint) if part is not type(None)]  # none of these
        return [value for value in bad_values(first) if value is not None or type(None) not in typing.get_args(hint)]
    if typing.get_origin(hint) is Annotated:
        base, *rules = typing.get_args(hint)
        if base is str:  # a name that becomes a directory
            return ["a/b", "", None, 3]
        (limits,) = [rule for rule in rules if isinstance(rule, Range)]
        step = 1 if base is int else 0.1
        low = [] if limits.low == -math.inf else [limits.low if limits.open_low else limits.low - step]
        high = [] if limits.high == math.inf else [limits.high if limits.open_high else limits.high + step]
        return [*low, *high, math.nan, math.inf, "much", None, True, [1]]
    if typing.get_origin(hint) is Literal:
        return ["nonsense", None, 7, True]
    if hint is bool:
        return ["maybe", 1, None]
    if typing.get_origin(hint) is list:
        return ["text", 3, None, [1]]
    return [3, [1]]


@pytest.mark.parametrize("name", NAMES)
def test_values_outside_the_annotation_are_refused_by_name(name: str) -> None:
    cls = method_class(name)
    node = {key: value for key, value in yaml_node(name).items() if key != "_target_"}
    parse(cls.Config, node, "method")
    for option, hint in hints(name).items():
        for value in bad_values(hint):
            with pytest.raises(UserError, match=rf"method\.{option}\b") as caught:
                parse(cls.Config, node | {option: value}, "method")
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_and_missing_options_are_refused_by_name(name: str) -> None:
    cls = method_class(name)
    node = {key: value for key, value in yaml_node(name).items() if key != "_target_"}
    with pytest.raises(UserError, match=r"unknown option method\.sparsty"):
        parse(cls.Config, node | {"sparsty": 0.5}, "method")
    for option in node:
        with pytest.raises(UserError, match=rf"missing option method\.{option}$"):
            parse(cls.Config, {key: value for key, value in node.items() if key != option}, "method")


SLOW_VALUES = [pytest.param(text, marks=pytest.mark.slow) for text in ("1.5", "-0.1", "null", "[0.5]")]


@pytest.mark.thin(4)
@pytest.mark.parametrize("value", ["0", "1", "nan", "much", *SLOW_VALUES])
@pytest.mark.parametrize("name", WITH_SPARSITY)
def test_command_refuses_a_bad_sparsity(name: str, value: str, capsys: pytest.CaptureFixture) -> None:
    if value == "null" and type(None) in typing.get_args(hints(name)["sparsity"]):
        pytest.skip("has a meaning for this method")
    assert cli.main([f"method={name}", f"method.sparsity={value}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "method.sparsity" in line


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(WITH_SPARSITY)))
def test_method_without_a_target_refuses_one(name: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main([f"method={name}", "method.sparsity=0.5"]) == 1
    assert "unknown option method.sparsity" in capsys.readouterr().err


# Budgets


def budgets() -> list:
    """Return (method, distribution, sparsity) with sparsities that divide no layer evenly; every other one is slow."""
    levels = (0.5, 0.873, 0.9, 0.3337)
    rows = []
    for number, name in enumerate(WITH_MASKS):
        for index, distribution in enumerate(choices(name, "distribution") or ("",)):
            sparsity = 0.5 if distribution == "2:4" else levels[index % len(levels)]
            marks = [pytest.mark.slow] * ((number + index) % 2)
            rows.append(pytest.param(name, distribution, sparsity, marks=marks))
    return rows


def densities_file(path: Path, name: str, sparsity: float) -> Path:
    """Write a file of densities for resnet20, later layers sparser, that meets `sparsity` overall."""
    node = configure(path.parent, "dense").model
    method = make(name, distribution="file", densities=str(path))
    layers = method.layers(models.build(node, num_classes=10, image_size=16))
    layers = [layer for layer in layers if layer.eligible]
    raw = {layer.name: 1 - index / len(layers) / 2 for index, layer in enumerate(layers)}
    total = sum(layer.size for layer in layers)
    factor = (1 - sparsity) * total / sum(raw[layer.name] * layer.size for layer in layers)
    path.write_text(json.dumps({name: min(1.0, value * factor) for name, value in raw.items()}))
    return path


@pytest.mark.thin(2)
@pytest.mark.parametrize(("name", "distribution", "sparsity"), budgets())
def test_achieved_sparsity_is_the_requested_one(name: str, distribution: str, sparsity: float, tmp_path: Path) -> None:
    options = [f"method.sparsity={sparsity}", "schedule.train.epochs=2", "schedule.finetune.epochs=1"]
    if distribution:
        options.append(f"method.distribution={distribution}")
    if distribution == "2:4" and "none" in choices(name, "redistribution"):
        options.append("method.redistribution=none")
    if distribution == "file":
        options.append(f"method.densities={densities_file(tmp_path / 'densities.json', name, sparsity)}")
    config = configure(tmp_path / "outputs", name, *options)
    folder = finish(config)
    result = last_result(folder)
    eligible = sum(mask.numel() for mask in result["masks"].values())
    kept = sum(int(mask.sum()) for mask in result["masks"].values())
    off = 0 if make(name).budget_is_exact() else 9  # half a kernel per kind of kernel
    assert abs(kept - num_keep_total(eligible, sparsity)) <= off
    assert all(not result["model"][path][~mask].any() for path, mask in result["masks"].items())
    written = summary(folder)
    assert written["sparsity/requested"] == sparsity
    assert written["sparsity/achieved"] == 1 - kept / eligible
    assert written["params/nonzero"] == written["params/total"] - eligible + kept


# Every step

OPTIMIZERS = {
    "nesterov": ("optimizer=sgd", "optimizer.nesterov=true", "optimizer.weight_decay=0.1", "trainer.clip_norm=0.1"),
    "adam": ("optimizer=adam", "optimizer.weight_decay=0.1", "trainer.ema_decay=0.5", "schedule.train.lr=0.01"),
    "adamw": ("optimizer=adamw", "optimizer.weight_decay=0.3", "trainer.accumulate=2", "schedule.train.lr=0.01"),
}


# Each method with one of them; all with -m slow.
STEPPED = [
    pytest.param(name, optimizer, marks=[pytest.mark.slow] * ((i + j) % len(OPTIMIZERS) > 0))
    for i, name in enumerate(WITH_MASKS) for j, optimizer in enumerate(OPTIMIZERS)
]  # fmt: skip


@pytest.mark.thin(3)
@pytest.mark.parametrize(("name", "optimizer"), STEPPED)
def test_pruned_weights_are_zero_after_every_step(
    name: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def look(training: TrainState, step: int) -> None:
        context = training.context
        named = dict(training.evaluated.named_parameters()), context.parameters()
        for path, mask in ({} if context.masks is None else context.masks.masks).items():
            assert all(not parameters[path][~mask].any() for parameters in named), f"{path} after step {step}"
            assert context.parameters()[path].grad is None or context.parameters()[path].grad[~mask].any() or mask.all()
        seen.append(0 if context.masks is None else context.masks.num_weights - context.masks.num_kept)

    watch(monkeypatch, look)
    finish(configure(tmp_path, name, *OPTIMIZERS[optimizer]))
    assert len(seen) >= 9 and seen[-1] > 0


@pytest.mark.parametrize("name", ["rigl", "gmp", "lottery"])
def test_pruned_weights_stay_zero_within_a_frank_wolfe_loop(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner: list[int] = []

    def look(training: TrainState, step: int) -> None:
        masks = training.context.masks
        for path, mask in ({} if masks is None else masks.masks).items():
            assert not training.context.parameters()[path][~mask].any(), f"{path} after step {step}"
        inner.append(training.optimizer.calls)

    watch(monkeypatch, look)
    finish(configure(tmp_path, name, "optimizer=frank_wolfe_sgd", "optimizer.inner_steps=3"))
    assert {0, 1, 2} <= set(inner)


HALF = [pytest.param(name, marks=[pytest.mark.slow] * (index % 2)) for index, name in enumerate(NAMES)]
"""every other method; all with -m slow"""


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", HALF)
def test_layout_is_what_is_in_force_at_each_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []

    def look(training: TrainState, step: int) -> None:
        layout = training.method.layout(training.context)
        if layout is None:  # learned, so it must move; masks may come at the end only
            named = training.context.parameters()
            learned.add(tuple(int(named[layer.parameter].count_nonzero()) for layer in training.context.eligible()))
            return
        # After a step the masks of the next one are in place.
        in_force = [kept for start, kept in layout if start <= step + 1][-1]
        counts = {} if training.context.masks is None else training.context.masks.counts()
        sizes = {path: parameter.numel() for path, parameter in training.context.parameters().items()}
        assert counts == {path: in_force.get(path, sizes[path]) for path in counts}
        left = sizes | counts  # what was removed is under no mask
        assert in_force == {path: left[path] for path in in_force}
        checked.append(step)

    watch(monkeypatch, look)
    options = ["method.distribution=uniform"] if "uniform" in choices(name, "distribution") else []
    learned: set[tuple[int, ...]] = set()
    finish(configure(tmp_path, name, *options))
    assert checked or len(learned) > 1


# Dry run


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", HALF)
def test_dry_run_counts_what_the_run_spends(name: str, finished, tmp_path: Path) -> None:
    assert dry_run(configure(tmp_path, name, *awkward(name))) == 0
    (path,) = tmp_path.glob("*/dry_run.json")
    folder = finished(name)
    assert path.parent.name == folder.name
    planned, real = json.loads(path.read_text()), summary(folder)
    known = [key for key in planned if key.startswith(("macs/", "params/", "sparsity/")) and planned[key] is not None]
    assert {key: planned[key] for key in known} == {key: real[key] for key in known}
    learned = planned["sparsity/requested"] is None and any(row["kept"] is None for row in planned["layers"])
    assert {"macs/dense"} | (set() if learned else {"params/total", "params/kept"}) <= set(known)


# Resume


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_equals_an_uninterrupted_one(
    name: str, finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = finished(name)
    steps = [json.loads(line)["global_step"] for line in (straight / "metrics.jsonl").read_text().splitlines()]
    stops = set(random.Random(name).sample(range(max(steps)), 3))
    done: list[int] = []

    def look(training: TrainState, step: int) -> None:
        done.append(step)
        if len(done) - 1 in stops:
            monkeypatch.setattr(training, "stop", lambda: True)

    watch(monkeypatch, look)
    codes = []
    while not codes or codes[-1]:
        codes.append(runner.run(configure(tmp_path, name, *awkward(name))))
        assert len(codes) <= 4
    assert len(codes) == 4 and len(done) == max(steps)
    resumed = run_folder(configure(tmp_path, name))
    assert same_files(straight, resumed, "model.safetensors", "model.json", "layers.json")
    assert without_clock(resumed / "metrics.jsonl") == without_clock(straight / "metrics.jsonl")
    assert_equal(last_result(resumed), last_result(straight))
    ours, theirs = summary(resumed), summary(straight)
    for key in theirs:
        if not key.startswith("time/") and key not in ("phases", "run/command"):
            assert ours[key] == theirs[key], key


def same_files(one: Path, other: Path, *names: str) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def without_clock(path: Path) -> list[dict]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if "time" not in key} for record in records]


def assert_equal(one: Any, other: Any, where: str = "result") -> None:
    """Compare nested containers; tensors bit by bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif torch.is_tensor(one):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


# The finished network


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", NAMES)
def test_finished_networks_hold_no_negative_zero(name: str, finished) -> None:
    for tensors in (load_file(finished(name) / "model.safetensors"), last_result(finished(name))["model"]):
        floats = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
        assert [key for key, tensor in floats.items() if bool((tensor.signbit() & (tensor == 0)).any())] == []


@pytest.mark.parametrize("name", ["gmp", "rigl", "str", "autosparse_topk", "directional", "constrained_l0", "fpgm"])
def test_the_averaged_network_has_the_weights_that_are_reported(name: str, finished) -> None:
    tensors = load_file(finished(name) / "model.safetensors")
    for layer in json.loads((finished(name) / "layers.json").read_text()):
        weight = tensors[layer["name"] + ".weight"]
        assert int(torch.count_nonzero(weight)) == layer["kept"], layer["name"]


# Model families


# A sixth of the pairs, so that each method meets one family and each family a sixth of the methods; all with -m slow.
PAIRS = [
    pytest.param(name, family, marks=[pytest.mark.slow] * ((i + j) % len(FAMILIES) > 0))
    for i, name in enumerate(NAMES) for j, family in enumerate(FAMILIES)
]  # fmt: skip


@pytest.mark.thin(4)
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_works_on_each_model_family(name: str, family: str, tmp_path: Path) -> None:
    short = SHORT | {"sparsity": 0.6, "interval": 1, "num_cuts": 1}
    tiny = (
        f"model={family}", *FAMILIES[family], "dataset.image_size=32", "schedule.batch_size=4", "dataset.num_test=4",
        "schedule.train.epochs=1", "schedule.train.warmup_epochs=0", "schedule.finetune.epochs=1",
        "trainer.limit_train_batches=3",
    )  # fmt: skip
    folder = finish(configure(tmp_path, name, *tiny, short=short))
    written = summary(folder)
    assert math.isfinite(written["final/loss"])
    if written["sparsity/requested"] is not None:
        assert written["sparsity/achieved"] == pytest.approx(0.6, abs=1e-3)
