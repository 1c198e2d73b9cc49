from __future__ import annotations

import pytest

from eplb import errors
from eplb.errors import EplbError, InvalidInput, unknown_name


def test_exit_codes_are_those_of_the_design() -> None:
    codes = {
        name: getattr(errors, name).exit_code for name in errors.__all__ if name != "unknown_name"
    }
    assert codes == {
        "EplbError": 1,
        "InvalidInput": 2,
        "InfeasibleProblem": 3,
        "SolverUnavailable": 4,
        "SolverFailed": 5,
        "PlacementInvalid": 6,
        "MigrationFailed": 7,
        "ServingFailed": 8,
    }


def test_every_error_is_an_eplb_error_and_bad_input_a_value_error() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__ if name != "unknown_name"]
    assert all(issubclass(kind, EplbError) for kind in kinds)
    assert issubclass(InvalidInput, ValueError)


@pytest.mark.parametrize(("name", "hint"), [("greedi", "did you mean 'greedy'? "), ("qqqqqq", "")])
def test_unknown_name_offers_the_nearest_and_lists_all(name: str, hint: str) -> None:
    error = unknown_name("solver", name, ["search", "greedy"])
    assert isinstance(error, InvalidInput)
    assert str(error) == f"unknown solver {name!r}; {hint}known: greedy, search"
