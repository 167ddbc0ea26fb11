"""prune-lab list: every choice on one line with what it is."""

from __future__ import annotations

import pytest

from prune_lab.cli import command as cli
from prune_lab.cli.completion import LISTS
from prune_lab.compose import choices as compose_choices
from prune_lab.compose.choices import choices


@pytest.mark.parametrize("kind", LISTS)
def test_every_choice_is_listed_with_a_description(kind: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["list", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == choices(compose_choices.conf_dir(), kind.removesuffix("s"))
    assert all(len(line.split()) > 1 for line in lines)


def test_methods_show_their_paper(capsys: pytest.CaptureFixture) -> None:
    cli.main(["list", "methods"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rigl ")]
    assert "Rigging the Lottery" in line and "arXiv 1911.11134" in line
