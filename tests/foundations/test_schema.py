"""Checked options: every rule accepts what it should, and each rejection names the option in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.schema import (
    Count,
    Fraction,
    Index,
    Momentum,
    Name,
    NonNegative,
    OpenFraction,
    Positive,
    Range,
    coerce,
    parse,
    suggestion,
)

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Inner:
    depth: Count
    note: str | None

    def check(self, path: str) -> None:
        if self.note == "deep" and self.depth < 3:
            raise UserError(f"{path}.note=deep needs {path}.depth >= 3")


@dataclass(frozen=True)
class Outer:
    rate: OpenFraction
    inner: Inner


GOOD = {"rate": 0.5, "inner": {"depth": 2, "note": None}}


def refusal(hint: Any, value: Any) -> str:
    with pytest.raises(UserError) as caught:
        coerce(hint, value, "group.key")
    assert "\n" not in str(caught.value)
    assert caught.value.option.startswith("group.key")
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "group.key must lie in [1, inf), got 0; or auto"),
        (1.5, "group.key must be a whole number, got 1.5; or auto"),
        ("aut", "group.key must be a whole number, got aut (did you mean 'auto'?); or auto"),
    ],
)
def test_a_number_or_a_word_names_both(value: Any, said: str) -> None:
    assert refusal(Count | Literal["auto"] | None, value) == said
    for kept in (3, "auto", None):
        assert coerce(Count | Literal["auto"] | None, kept, "group.key") == kept


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Positive, 1e-12), (Positive, 3), (NonNegative, 0), (OpenFraction, 0.999), (Momentum, 0), (Momentum, 0.9),
        (Fraction, 0), (Fraction, 1), (Count, 1), (Index, 0), (int, -5), (bool, True), (bool, False), (str, ""),
        (str | None, None), (Count | None, None), (Count | None, 4), (bool | Literal["auto"], False),
        (bool | Literal["auto"], "auto"), (Literal["auto", 1, 2], 2), (Literal["auto", 1, 2], "auto"), (Any, {"a": 1}),
        (list[Positive], []), (list[Positive], [1.0, 2.5]), (dict[str, Any], {"a": None}), (Name, "wrn_16-8.b+c"),
    ],
)  # fmt: skip
def test_allowed_values_pass_unchanged(hint: Any, value: Any) -> None:
    assert coerce(hint, value, "group.key") == value


def test_whole_numbers_become_floats_where_a_number_is_wanted() -> None:
    assert isinstance(coerce(Positive, 3, "lr"), float)
    assert coerce(list[Positive], [1, 2], "milestones") == [1.0, 2.0]


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (Positive, 0, "must lie in (0, inf), got 0"),
        (Positive, -1e-9, "must lie in (0, inf), got -1e-09"),
        (NonNegative, -0.1, "must lie in [0, inf), got -0.1"),
        (OpenFraction, 0, "must lie in (0, 1), got 0"),
        (OpenFraction, 1, "must lie in (0, 1), got 1"),
        (OpenFraction, 1.5, "must lie in (0, 1), got 1.5"),
        (Momentum, 1, "must lie in [0, 1), got 1"),
        (Fraction, 1.01, "must lie in [0, 1], got 1.01"),
        (Count, 0, "must lie in [1, inf), got 0"),
        (Index, -1, "must lie in [0, inf), got -1"),
        (Annotated[float, Range(-1, 1)], 2, "must lie in [-1, 1], got 2"),
    ],
)
def test_values_out_of_range_are_refused_with_the_range(hint: Any, value: Any, message: str) -> None:
    assert refusal(hint, value) == f"group.key {message}"


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("hint", [float, Positive, OpenFraction, Fraction, Positive | None])
def test_numbers_that_are_not_finite_are_refused(hint: Any, value: float) -> None:
    assert "must be a finite number" in refusal(hint, value)


def test_whole_numbers_beyond_every_float_are_refused() -> None:
    assert "must be a finite number" in refusal(Positive, 10**400)


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (Count, True, "must be a whole number, got true"),
        (Positive, True, "must be a number, got true"),
        (Literal["auto", 1, 2], True, "=true is not allowed; allowed: auto, 1, 2"),
        (Literal["auto", 1, 2], 1.0, "=1.0 is not allowed; allowed: auto, 1, 2"),
        (Literal["auto", 0], False, "=false is not allowed; allowed: auto, 0"),
        (bool, 1, "must be true or false, got 1"),
        (bool, "yes", "must be true or false, got yes"),
        (bool, None, "must be true or false, got null"),
        (int, 1.0, "must be a whole number, got 1.0"),
        (int, "3", "must be a whole number, got 3"),
        (int, None, "must be a whole number, got null"),
        (float, "0.9", "must be a number, got 0.9"),
        (float, "", "must be a number, got ''"),
        (float, "a\nb", "must be a number, got 'a\\nb'"),
        (str, 1, "must be a text, got 1"),
        (str, None, "must be a text, got null"),
        (str | None, 1, "must be a text, got 1"),
        (Literal["cosine", "step"], "cosin", "=cosin is not allowed (did you mean 'cosine'?); allowed: cosine, step"),
        (Literal["cosine", "step"], None, "=null is not allowed; allowed: cosine, step"),
        (bool | Literal["auto"], "maybe", "=maybe is not allowed; allowed: true, false, auto"),
        (bool | Literal["auto"], 1, "=1 is not allowed; allowed: true, false, auto"),
        (list[Positive], 5, "must be a list such as [a,b], got 5"),
        (list[str], "ab", "must be a list such as [a,b], got ab"),
        (list[str], {"a": "b"}, "must be a list such as [a,b], got {'a': 'b'}"),
        (list[str], None, "must be a list such as [a,b], got null"),
        (dict[str, Any], 3, "must be a group of options, got 3"),
        (Inner, 3, "must be a group of options, got 3"),
        (Inner, None, "must be a group of options, got null"),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused(hint: Any, value: Any, message: str) -> None:
    text = refusal(hint, value)
    assert text == f"group.key{message if message.startswith('=') else ' ' + message}"


@pytest.mark.parametrize("value", ["", "a/b", "../a", ".hidden", "a b", "a\nb", "-a"])
def test_names_that_become_directories_hold_no_path(value: str) -> None:
    assert "must consist of letters, digits" in refusal(Name, value)


def test_an_entry_of_a_list_is_named_by_its_index() -> None:
    assert refusal(list[Positive], [1.0, -2]) == "group.key[1] must lie in (0, inf), got -2"


def test_parse_builds_nested_groups() -> None:
    assert parse(Outer, GOOD, "") == Outer(0.5, Inner(2, None))


@pytest.mark.parametrize(
    ("node", "message", "option"),
    [
        ({"rate": 0.5}, "missing option inner", "inner"),
        ({"rate": 0.5, "inner": {"depth": 2}}, "missing option inner.note", "inner.note"),
        (
            GOOD | {"rat": 1},
            "unknown option rat (did you mean 'rate'?); allowed under the top level: rate, inner",
            "rat",
        ),
        (
            GOOD | {"inner": {"depth": 2, "note": None, "dept": 3}},
            "unknown option inner.dept (did you mean 'depth'?); allowed under inner: depth, note",
            "inner.dept",
        ),
        (GOOD | {"inner": {"depth": 0, "note": None}}, "inner.depth must lie in [1, inf), got 0", "inner.depth"),
        (GOOD | {7: 1}, "unknown option 7; allowed under the top level: rate, inner", "7"),
    ],
)
def test_wrong_keys_are_refused_by_their_dotted_name(node: dict, message: str, option: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(Outer, node, "")
    assert str(caught.value) == message
    assert caught.value.option == option


def test_rules_across_fields_run_after_every_field_is_checked() -> None:
    with pytest.raises(UserError, match=r"^inner\.note=deep needs inner\.depth >= 3$"):
        parse(Outer, GOOD | {"inner": {"depth": 2, "note": "deep"}}, "")


def test_suggestion_names_the_nearest_or_nothing() -> None:
    assert suggestion("rgl", ["rigl", "set"]) == " (did you mean 'rigl'?)"
    assert suggestion("zzz", ["rigl", "set"]) == ""


def test_a_choice_that_yaml_reads_as_a_number_asks_for_quotes() -> None:
    with pytest.raises(UserError, match=r"x=124 is not allowed \(YAML reads 2:4 so; write it in quotes: '2:4'\)"):
        coerce(Literal["uniform", "2:4"], 124, "x")
    with pytest.raises(UserError, match=r"x=125 is not allowed; allowed: uniform, 2:4"):
        coerce(Literal["uniform", "2:4"], 125, "x")
