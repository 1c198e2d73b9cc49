"""``eplb versions``: what a bug report needs."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version

import click

from eplb.cli.options import as_json

__all__ = ["command"]

PACKAGES = (
    "eplb-toolkit", "numpy", "scipy", "numba", "ortools", "click", "jinja2", "pyyaml", "rich",
    "torch", "transformers",
)  # fmt: skip


@click.command("versions")
@as_json
def command(json_: bool) -> None:
    """Print the versions that a bug report needs."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: _version(package) for package in PACKAGES},
    }
    if json_:
        click.echo(json.dumps(found))
    else:
        for name, text in found.items():
            click.echo(f"{name:14} {text or 'not installed'}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
