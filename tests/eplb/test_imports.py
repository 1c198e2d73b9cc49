from __future__ import annotations

import subprocess
import sys

import eplb

HEAVY = ("torch", "numba", "ortools", "scipy", "yaml", "click", "rich")
CORE = ("check", "files", "load_profile", "metrics", "model", "plan", "slots", "split", "topology")


def loaded_after(code: str) -> set[str]:
    """Top-level modules that are loaded once a fresh interpreter has run this."""
    printed = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return {name.partition(".")[0] for name in printed.split()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_after("import eplb")
    assert "eplb" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_importing_the_core_costs_numpy_only() -> None:
    loaded = loaded_after("".join(f"import eplb.{name}\n" for name in CORE))
    assert "numpy" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_public_names_are_listed_and_others_are_attribute_errors() -> None:
    assert {"LoadProfile", "Placement", "check_plan", "evaluate"} <= set(dir(eplb))
    assert eplb.check_plan.__module__ == "eplb.check"
    assert not hasattr(eplb, "no_such_name")
