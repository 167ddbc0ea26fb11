"""scripts/projection.py: figures worked by hand, what each assumption moves, and that it calls itself a projection."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def projection():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import projection

        yield projection
    sys.modules.pop("projection", None)


@pytest.fixture(scope="module")
def network(projection):
    """Round numbers, so that every line can be worked in the head."""
    return projection.Network("toy", macs=10**9, parameters=10**7, norms=50, norm_channels=10_000)


@pytest.fixture(scope="module")
def rates(projection):
    return projection.Rates(
        peak_tflops=600, utilisation=0.1, nvlink_gb_s=100, network_gb_s=10, message_us=10, overlap=0.5,
        decode_rate=100, cached_rate=1000, file_kb=100, cores_per_node=80, disk_gb_s=1, host_gb_s=8, start_s=36,
        norm_wait_us=20, write_s_gb=1.5,
    )  # fmt: skip


def values(projection, network, rates, gpus: int, **sizes) -> dict[str, float]:
    plan = projection.Plan(**{"images": 100_000, "eval_images": 8000, "epochs": 10, "batch_per_gpu": 200} | sizes)
    return {name: line.value for name, line in projection.project(network, plan, rates, gpus).items()}


def test_one_gpu_by_hand(projection, network, rates):
    found = values(projection, network, rates, 1)
    assert (found["batch"], found["steps per epoch"], found["steps"]) == (200, 500, 5000)
    assert found["FLOPs per step"] == pytest.approx(2 * 3 * 200 * 1e9 / 1e12)  # 1.2 TFLOP
    assert found["computing per step"] == pytest.approx(20)  # ms: 1.2 TFLOP at 60 TFLOP/s
    assert found["all-reduce of gradients"] == found["messages of joined batch norm"] == 0
    assert found["images/s"] == pytest.approx(10_000)
    assert found["cores for JPEG files"] == pytest.approx(100)
    assert found["cores for cached_side=256"] == pytest.approx(10)
    assert found["slowdown with JPEG files"] == pytest.approx(10)  # a tenth of the node: 10 cores, 1000 images/s
    assert found["training"] == pytest.approx(100 / 3600)
    assert found["evaluation by GPUs"] == pytest.approx(30_000)  # a forward pass is a third of a step
    assert found["evaluation, JPEG files"] == pytest.approx(10 * 8000 / 1000 / 3600)  # the cores decode no faster
    assert found["evaluation, cached_side=256"] == pytest.approx(10 * 8000 / (1e6 / 262.656) / 3600)  # nor the disk
    assert found["checkpoint"] == pytest.approx(80)  # MB
    assert found["copy of a checkpoint"] == pytest.approx(10)  # ms
    assert found["writing of a checkpoint"] == pytest.approx(120)
    assert found["checkpoints"] == 7  # at 10, 26, 39 ... 91 s: n of 0.13 s are 1 % of n x 13 s
    assert found["cost of checkpoints"] == pytest.approx(7 * 0.13 / 3600)
    rest = 10 * 8000 / 1000 + 7 * 0.13 + 36 + 10 * (64 + 64) / 100
    assert found["total with JPEG files"] == pytest.approx((100 * 10 + rest) / 3600)


def test_checkpoints_are_placed_as_the_program_places_them(projection):
    assert projection.num_saves(0.01, 9.9) == 0
    assert projection.num_saves(0.01, 100) == 10  # every 10 s, however cheap
    assert projection.num_saves(8.0, 4000) == 5  # at 10 s, then every 800 s


def test_it_says_whether_cores_or_the_disk_set_the_limit(projection, network, rates):
    plan = projection.Plan()
    for changed, limit in (({}, "cores"), ({"cores_per_node": 8000}, "disk")):
        line = projection.project(network, plan, replace(rates, **changed), 1)["possible with JPEG files"]
        assert f"limited by {limit}, " in line.formula


def test_what_is_taken_too_lightly_is_said(projection, rates):
    plan = projection.Plan()
    assert projection.optimistic(plan, rates, 8) == []
    assert len(projection.optimistic(plan, rates, 16)) == 1
    assert "64 images per GPU" in projection.optimistic(plan, rates, 64)[0]


def test_gradients_and_messages_between_gpus_by_hand(projection, network, rates):
    node, two_nodes = (values(projection, network, rates, gpus) for gpus in (8, 16))
    assert node["all-reduce of gradients"] == pytest.approx(2 * 7 / 8 * 40e6 / 100e9 * 1e3)
    assert two_nodes["all-reduce of gradients"] == pytest.approx(2 * 15 / 16 * 40e6 / 10e9 * 1e3)
    assert node["messages of joined batch norm"] == 100 and node["waiting for them"] == pytest.approx(1)
    assert node["host waits of joined batch norm"] == pytest.approx(50 * 0.02)
    assert node["time per step"] == pytest.approx(20 + 0.5 * 0.7 + 1 + 1)
    assert two_nodes["images/s needed per node"] == pytest.approx(two_nodes["images/s"] / 2)


def test_the_batch_of_many_gpus_stays_below_its_limit(projection, network, rates):
    found = values(projection, network, rates, 64, images=1_281_167)
    assert found["batch"] == 4096 and found["steps per epoch"] == 312
    assert found["computing per step"] == pytest.approx(2 * 3 * 4096 * 1e9 / (64 * 60e12) * 1e3)


def test_faster_parts_never_make_a_run_longer(projection, network, rates):
    for gpus in (1, 8, 64):
        base = values(projection, network, rates, gpus)
        for better in ({"utilisation": 0.2}, {"decode_rate": 200}, {"network_gb_s": 20}, {"message_us": 5},
                       {"disk_gb_s": 2}, {"overlap": 0.9}, {"start_s": 1}, {"norm_wait_us": 10}):  # fmt: skip
            faster = values(projection, network, replace(rates, **better), gpus)
            for name in ("total with JPEG files", "total with cached_side=256"):
                assert faster[name] <= base[name] * 1.0000001, (gpus, better)


def test_every_assumption_has_a_reason_and_every_line_its_formula(projection, network, rates):
    assert set(projection.REASONS) == set(vars(rates))
    for line in projection.project(network, projection.Plan(), rates, 64).values():
        assert line.formula and line.unit is not None and line.formula in str(line)


def test_sizes_are_counted_by_the_program(projection):
    network, plan = projection.count("resnet50")
    assert (network.macs, network.parameters, network.norms) == (4_089_184_256, 25_557_032, 53)
    assert (plan.images, plan.eval_images) == (1_281_167, 50_000)


def test_it_says_that_nothing_is_measured(projection, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["projection.py", "--gpus", "8", "--epochs", "2"])
    projection.main()
    text = capsys.readouterr().out
    assert text.startswith("PROJECTION, NOT MEASURED: 2 epochs of resnet50")
    assert "8 GPUs (projection, not measured)" in text and "2 x 7/8 x 102.2 MB / 350 GB/s" in text
