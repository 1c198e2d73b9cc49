"""Expert placement and load balancing for mixture-of-experts models.

The names below are the public interface. Importing the package costs numpy and the value types;
solvers, readers and the command line are imported where they are first used.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eplb.check import check_plan as check_plan
    from eplb.engines.convert import export_plan as export_plan
    from eplb.engines.convert import import_plan as import_plan
    from eplb.errors import EplbError as EplbError
    from eplb.load_profile import LoadProfile as LoadProfile
    from eplb.load_profile import merge_profiles as merge_profiles
    from eplb.metrics import Balance as Balance
    from eplb.metrics import evaluate as evaluate
    from eplb.model import MoEModel as MoEModel
    from eplb.model import model_preset as model_preset
    from eplb.placement.drop_in import rebalance_experts as rebalance_experts
    from eplb.placement.solve import solve as solve
    from eplb.plan import Plan as Plan
    from eplb.plan_file import read_plan as read_plan
    from eplb.plan_file import write_plan as write_plan
    from eplb.problem import Problem as Problem
    from eplb.problem import Solution as Solution
    from eplb.profiles import read_profile as read_profile
    from eplb.slots import Placement as Placement
    from eplb.topology import Topology as Topology
    from eplb.topology import topology_preset as topology_preset

__version__ = "0.1.0"

_HOME = {
    "Balance": "eplb.metrics",
    "EplbError": "eplb.errors",
    "LoadProfile": "eplb.load_profile",
    "MoEModel": "eplb.model",
    "Placement": "eplb.slots",
    "Plan": "eplb.plan",
    "Problem": "eplb.problem",
    "Solution": "eplb.problem",
    "Topology": "eplb.topology",
    "check_plan": "eplb.check",
    "evaluate": "eplb.metrics",
    "export_plan": "eplb.engines.convert",
    "import_plan": "eplb.engines.convert",
    "merge_profiles": "eplb.load_profile",
    "model_preset": "eplb.model",
    "read_plan": "eplb.plan_file",
    "read_profile": "eplb.profiles",
    "rebalance_experts": "eplb.placement.drop_in",
    "solve": "eplb.placement.solve",
    "topology_preset": "eplb.topology",
    "write_plan": "eplb.plan_file",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604

# In a checkout the subpackages lie beside this folder. An installation maps them; started from
# the checkout's root, Python finds this folder first and needs to be told.
_checkout = Path(__file__).parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
