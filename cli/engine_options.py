"""What ``eplb export`` and ``eplb import`` share."""

from __future__ import annotations

import re
from typing import Any

import click

__all__ = ["ENGINE_NAMES", "moe_layers_option", "print_remarks"]

# Named here so that `eplb --help` need not import the converters; a test compares.
ENGINE_NAMES = ("sglang", "vllm", "tensorrt-llm", "vllm-ascend", "omni")


class Layers(click.ParamType[tuple[int, ...]]):
    """Decoder layers, ``START:STOP`` or ``START:STOP:STEP`` as Python counts."""

    name = "START:STOP[:STEP]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the ids."""
        match = re.fullmatch(r"(\d{1,5}):(\d{1,5})(?::([1-9]\d{0,3}))?", str(value))
        layers = range(int(match[1]), int(match[2]), int(match[3] or 1)) if match else ()
        if not layers:
            self.fail(f"{value!r} is no range of layers such as 3:61 or 1:48:2", param, ctx)
        return tuple(layers)


moe_layers_option = click.option(
    "--moe-layers",
    type=Layers(),
    help="Decoder layers with experts, as 3:61 or 1:48:2, where the model is not a preset.",
)


def print_remarks(remarks: tuple[str, ...]) -> None:
    """Print what an engine or a file cannot tell."""
    for remark in remarks:
        click.echo(f"- {remark}")
