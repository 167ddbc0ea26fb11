"""torch by its lazy name: always the real module, and imported by no sooner than its first use."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from prune_lab.foundations import lazy


def test_what_is_patched_after_the_first_use_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lazy.torch.compile is torch.compile and lazy.torch.nn is torch.nn
    monkeypatch.setattr(torch, "compile", "patched")
    assert lazy.torch.compile == "patched"


def test_nothing_is_kept_beside_the_module() -> None:
    with pytest.raises(AttributeError):
        lazy.torch.compile = None
    with pytest.raises(AttributeError, match="no_such_name"):
        lazy.torch.no_such_name  # noqa: B018


def test_a_function_is_computed_without_gradients() -> None:
    @lazy.no_grad
    def double(values: torch.Tensor, *, times: int = 2) -> torch.Tensor:
        """Return a multiple."""
        return times * values

    weight = torch.ones(1, requires_grad=True)
    assert not double(weight, times=3).requires_grad and (2 * weight).requires_grad
    assert (double.__name__, double.__doc__) == ("double", "Return a multiple.")


def test_torch_is_imported_at_the_first_use() -> None:
    code = """
import sys
from prune_lab.foundations.lazy import no_grad, torch
ones = no_grad(lambda: torch.ones(2))
assert "torch" not in sys.modules
ones()
assert "torch" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
