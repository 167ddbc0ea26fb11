"""Checks for methods that optimise by dual averaging: plain SGD only, and a warning where its theory ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.foundations.errors import UserError

if TYPE_CHECKING:
    from prune_lab.config.run import RunConfig


def check_plain_sgd(config: RunConfig) -> None:
    """Reject any optimizer other than plain SGD.

    Raises:
        UserError: naming the option as typed.
    """
    chosen = config.optimizer
    wrong = None
    if chosen.name != "sgd":
        wrong = f"optimizer={chosen.name}"
    elif chosen.momentum or chosen.weight_decay:
        option = "momentum" if chosen.momentum else "weight_decay"
        wrong = f"optimizer.{option}={getattr(chosen, option):g}"
    if wrong:
        raise UserError(
            f"{wrong} does not go with method={config.method.name}: gRDA is SGD without momentum and weight "
            "decay; use optimizer=sgd_plain, which sets both to 0",
            wrong.partition("=")[0],
        )


def theory_note(mu: float) -> str | None:
    """Return a warning about an exponent that the theory does not cover; None if it does."""
    covered = 0.5 < mu < 1
    return None if covered else f"method.mu={mu:g} lies outside of (0.5, 1), which the theory of gRDA covers"
