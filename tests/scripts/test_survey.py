"""scripts/survey_networks.py: what it says of small networks, and that it tells wrong counts and masks apart."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def survey():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import survey_networks

        yield survey_networks
    sys.modules.pop("survey_networks", None)


@pytest.mark.thin(3)
def test_small_networks_of_torchvision_are_right_in_all_three_ways(survey, capsys):
    assert survey.main(["squeezenet1_1@32", "mobilenet_v3_small@32", "shufflenet_v2_x0_5@32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in lines[:-1]] == [["MACs", "right"], ["mask", "right"], ["cut", "right"]] * 3
    assert lines[-1] == "3 networks, 9 looks: 9 right, 0 refused, 0 wrong"


def test_an_unknown_name_is_a_refusal(survey, capsys):
    assert survey.main(["resnet19"]) == 0
    assert "1 networks, 3 looks: 0 right, 3 refused, 0 wrong" in capsys.readouterr().out


def test_another_exception_is_wrong(survey, capsys, monkeypatch):
    def broken(*_: object) -> list:
        raise RuntimeError("not today")

    monkeypatch.setattr(survey, "profile", broken)
    assert survey.main(["squeezenet1_1@32"]) == 1
    out, err = capsys.readouterr()
    assert "wrong    RuntimeError: not today" in out and "Traceback" in err


def test_a_count_that_is_not_torchs_is_wrong(survey, monkeypatch):
    monkeypatch.setattr(survey, "dense_macs", lambda costs: sum(cost.macs for cost in costs) + 1)
    assert survey.counted("torchvision", "squeezenet1_1", 32).kind == "wrong"


def test_zeros_that_reach_no_product_are_wrong(survey):
    weight, other = torch.zeros(4, 4), torch.ones(4, 4)
    operands = survey._Operands({16})
    with operands:
        torch.ones(2, 4) @ other
    mask = torch.zeros(4, 4, dtype=torch.bool)
    assert not survey.reaches(weight, mask, operands)
    with operands:
        torch.ones(2, 4) @ weight.clone()
    assert survey.reaches(weight, mask, operands)
    assert not survey.reaches(other, mask, operands)
