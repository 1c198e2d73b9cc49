"""What processes make sure of before they serve under a plan: that it is theirs, and one plan."""

from __future__ import annotations

from collections.abc import Callable

from eplb.errors import InvalidInput
from eplb.model import UNKNOWN_MODEL, MoEModel
from eplb.plan import Plan
from eplb.runtime.ep.group import EPGroup

__all__ = ["agree_on_plan", "check_plan_of_group", "check_plan_of_model", "gather_sound"]

_ERROR = "error: "


def check_plan_of_model(plan: Plan, model: MoEModel) -> None:
    """Raise unless a plan is for the model that is served.

    Names and revisions are compared where both are known; two checkpoints of one shape are two
    models.

    Raises
    ------
    InvalidInput
        The plan is for another model.
    """
    known = [
        (name, planned, served)
        for name in ("name", "revision", "num_experts", "top_k", "hidden_size", "expert_bytes")
        if (planned := getattr(plan.model, name)) is not None
        and (served := getattr(model, name)) is not None
        and UNKNOWN_MODEL not in {planned, served}
    ]
    for name, planned, served in known:
        if planned != served:
            raise InvalidInput(
                f"the plan is for a model whose {name} is {planned}, and {served} is served; plan "
                f"for the model {model.name}"
            )
    absent = sorted(set(model.layer_ids) - set(plan.model.layer_ids))
    if absent:
        raise InvalidInput(
            f"layer {absent[0]} of the model {model.name} is not in the plan, whose layers are "
            f"{plan.model.layer_ids[0]} to {plan.model.layer_ids[-1]}; plan for the whole model"
        )


def check_plan_of_group(plan: Plan, group: EPGroup) -> None:
    """Raise unless a plan is for the ranks and nodes of a group.

    Raises
    ------
    InvalidInput
        Ranks or nodes differ.
    """
    planned = plan.topology.num_ranks, plan.topology.ranks_per_node
    if planned != (group.num_ranks, group.ranks_per_node):
        raise InvalidInput(
            f"the plan is for {planned[0]} ranks, {planned[1]} a node, and this group has "
            f"{group.num_ranks}, {group.ranks_per_node} a node; plan for this group"
        )


def gather_sound(group: EPGroup, own: Callable[[], str]) -> list[str]:
    """Return what every process has to say, in order. Collective, on the host.

    A process that cannot say it makes all of them raise, so that none is left waiting.

    Raises
    ------
    InvalidInput
        ``own`` raised it on some process; the message says on which.
    ServingFailed
        A process did not take part.
    """
    try:
        text = own()
    except InvalidInput as error:
        text = f"{_ERROR}{error}"
    found = group.gather_text(text)
    for process, text in enumerate(found):
        if text.startswith(_ERROR):
            raise InvalidInput(f"process {process}: {text.removeprefix(_ERROR)}")
    return found


def agree_on_plan(plan: Plan, model: MoEModel, group: EPGroup) -> None:
    """Raise on every process unless all hold the same plan, and it is for this model and group.

    Collective, on the host. A process whose plan does not fit makes all of them raise.

    Raises
    ------
    InvalidInput
        Some process' plan does not fit, or plans differ; the message says whose.
    ServingFailed
        A process did not take part.
    """

    def own() -> str:
        check_plan_of_model(plan, model)
        check_plan_of_group(plan, group)
        return plan.digest()

    found = gather_sound(group, own)
    if len(set(found)) > 1:
        by_digest = {
            digest[:19]: [p for p, text in enumerate(found) if text == digest] for digest in found
        }
        held = "; ".join(f"{digest}... on {processes}" for digest, processes in by_digest.items())
        raise InvalidInput(f"processes hold different plans: {held}; give all of them the same one")
