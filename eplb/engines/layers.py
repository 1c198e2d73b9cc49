"""Which layers an engine's rows stand for, and back.

SGLang and TensorRT-LLM name layers by decoder id; vLLM, vLLM-Ascend and Omni count those that
have experts. Layers of multi-token prediction come after the last decoder layer, and most engines
place them on their own. Shape letters: L layers, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from eplb.engines.engine import DENSE, MOE_AND_MTP, MOE_ORDINALS
from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.model import MODEL_PRESETS, MoEModel
from eplb.slots import Placement, initial_placement

__all__ = ["for_engine", "from_engine", "with_decoder_ids"]

# More layers of multi-token prediction than any model has.
MAX_MTP_LAYERS = 8

_UNTOLD = {
    DENSE: "the file does not tell which layers are dense, and they are kept; leave them out with "
    "--model or --moe-layers",
    MOE_ORDINALS: "layers keep the numbers of the file, counted among those with experts; give "
    "--model or --moe-layers for decoder ids",
}


def _decoder_layers(model: MoEModel) -> tuple[int, ...]:
    """Return the decoder layers with experts, without those of multi-token prediction.

    A plan knows the layers that it was made for; which ones there are in all is known of presets.
    """
    if model.name in MODEL_PRESETS:
        return MODEL_PRESETS[model.name].layer_ids
    return tuple(i for i in model.layer_ids if model.num_layers is None or i < model.num_layers)


def for_engine(
    placement: Placement, model: MoEModel, rows: str, moe_layers: Sequence[int] | None = None
) -> tuple[Placement, tuple[str, ...]]:
    """Return a placement of the layers that an engine's file has rows for.

    Layers of the file that the plan lacks, dense ones among them, get the placement that engines
    start with; layers that the file has no place for are left out.

    Parameters
    ----------
    placement : Placement
    model : MoEModel
    rows : str
        ``DENSE``, ``MOE_AND_MTP`` or ``MOE_ORDINALS``.
    moe_layers : sequence of int, optional
        Decoder layers with experts, where the model is not a preset.

    Returns
    -------
    placement : Placement
    remarks : tuple of str
        What was added or left out.

    Raises
    ------
    InvalidInput
        The plan places experts in a decoder layer that has none.
    """
    known = tuple(moe_layers) if moe_layers is not None else _decoder_layers(model)
    num_layers = model.num_layers if model.num_layers is not None else known[-1] + 1
    planned = set(placement.layer_ids)
    strange = sorted(i for i in planned - set(known) if i < num_layers)
    if strange:
        raise InvalidInput(
            f"the plan places experts in layer {strange[0]}, which is not among the layers with "
            f"experts of {model.name}; correct --moe-layers, or plan for this model"
        )
    mtp = sorted(i for i in planned if i >= num_layers)
    remarks = []
    wanted: Sequence[int] = known
    if rows == DENSE:
        wanted = range(num_layers)
    if mtp and rows == MOE_AND_MTP:
        wanted = (*known, *mtp)
    elif mtp:
        remarks.append(
            f"layer {_listed(mtp)} of multi-token prediction is left out: the engine does not "
            "place it from this file"
        )
    missing = sorted(set(known) - planned)
    if missing:
        remarks.append(
            f"layer {_listed(missing)} is not in the plan and gets the placement that engines "
            "start with"
        )
    if moe_layers is None and model.name not in MODEL_PRESETS and rows != MOE_AND_MTP:
        last = "" if model.num_layers is not None else f", and layer {known[-1]} to be the last"
        remarks.append(
            f"{model.name} is not a preset: its layers with experts are taken to be those of the "
            f"plan{last}; say otherwise with --moe-layers"
        )
    start = initial_placement(wanted, placement.num_experts, placement.num_slots)
    filled_LS = start.phys_to_log_LS.copy()
    row_of = {layer_id: row for row, layer_id in enumerate(placement.layer_ids)}
    for row, layer_id in enumerate(wanted):
        if layer_id in row_of:
            filled_LS[row] = placement.phys_to_log_LS[row_of[layer_id]]
    complete = Placement(
        phys_to_log_LS=filled_LS, layer_ids=tuple(wanted), num_experts=placement.num_experts
    )
    return complete, tuple(remarks)


def from_engine(
    layer_ids: tuple[int, ...],
    rows: str,
    model: MoEModel | None,
    moe_layers: Sequence[int] | None = None,
) -> tuple[dict[int, int], tuple[str, ...]]:
    """Return the rows of an engine's file to keep, and the decoder layers they are.

    Parameters
    ----------
    layer_ids : tuple of int
        Of the rows, as the engine numbers them.
    rows : str
        ``DENSE``, ``MOE_AND_MTP`` or ``MOE_ORDINALS``.
    model : MoEModel, optional
        Where known.
    moe_layers : sequence of int, optional
        Decoder layers with experts, before those of the model.

    Returns
    -------
    row_of : dict
        Row of the file by decoder layer.
    remarks : tuple of str
        What the file could not tell.

    Raises
    ------
    InvalidInput
        The file has other layers than the model.
    """
    known = moe_layers if moe_layers is not None else model.layer_ids if model is not None else None
    if known is None:
        remark = _UNTOLD.get(rows)
        return {i: row for row, i in enumerate(layer_ids)}, (remark,) if remark else ()
    num_layers = known[-1] + 1
    if model is not None and model.num_layers is not None:
        num_layers = max(num_layers, model.num_layers)
    if rows == MOE_ORDINALS:
        # What is beyond the decoder layers is multi-token prediction.
        all_ids = (*known, *range(num_layers, num_layers + MAX_MTP_LAYERS))
        if len(layer_ids) > len(all_ids):
            raise InvalidInput(
                f"there are {len(layer_ids)} layers and the model has {len(known)} with experts; "
                "give the --model or --moe-layers that the file was made for"
            )
        layer_ids = all_ids[: len(layer_ids)]
    absent = sorted(set(known) - set(layer_ids))
    if absent:
        raise InvalidInput(
            f"there is no row for layer {absent[0]}, which has experts ({len(known)} layers do); "
            "give the --model or --moe-layers that the file was made for"
        )
    expected = set(known) | set(range(num_layers, num_layers + MAX_MTP_LAYERS))
    strange = sorted(set(layer_ids) - expected)
    if strange and rows != DENSE:
        raise InvalidInput(
            f"there is a row for layer {strange[0]}, where the model has no experts; give the "
            "--model or --moe-layers that the file was made for"
        )
    return {i: row for row, i in enumerate(layer_ids) if i in expected}, ()


def with_decoder_ids(profile: LoadProfile, moe_layers: Sequence[int]) -> LoadProfile:
    """Return loads with layers by decoder id, where they are counted among those with experts.

    Layers that have decoder ids already keep them: SGLang and TensorRT-LLM record those.

    Raises
    ------
    InvalidInput
        There are more layers than the model has.
    """
    counted = profile.metadata.get("layer_numbering") == MOE_ORDINALS
    if not counted and set(profile.layer_ids) <= set(moe_layers):
        return profile
    last = moe_layers[-1] + 1
    all_ids = (*moe_layers, *range(last, last + MAX_MTP_LAYERS))
    if profile.layer_ids[-1] >= len(all_ids):
        raise InvalidInput(
            f"{profile.source} has a layer {profile.layer_ids[-1]} and the model "
            f"{len(moe_layers)} with experts; choose the model the loads were recorded from"
        )
    metadata = {k: v for k, v in profile.metadata.items() if k != "layer_numbering"}
    return replace(
        profile, layer_ids=tuple(all_ids[i] for i in profile.layer_ids), metadata=metadata
    )


def _listed(ids: Sequence[int]) -> str:
    text = ", ".join(map(str, ids[:6]))
    return text if len(ids) <= 6 else f"{text}, ... ({len(ids)} in all)"
