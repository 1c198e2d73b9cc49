"""Follow a page of the docs: write its files, run its commands, compare what they print.

``python tests/walkthrough.py docs/tutorial.md`` puts the real outputs into the page. Blocks of
``python`` that begin with ``# NAME`` are files; in blocks of ``console`` lines that begin with
``$`` are commands, and what follows is their output.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n", re.MULTILINE)

# What the folder is called in the page.
HOME = "/home/you"


def follow(page: str, folder: Path) -> str:
    """Return the page with the outputs that its commands have in this folder."""

    def done(match: re.Match[str]) -> str:
        kind, body = match.groups()
        if kind == "python":
            name = re.match(r"# ([\w.]+)\n", body)
            if name:
                (folder / name[1]).write_text(body[name.end() :])
            return match[0]
        text = "".join(
            f"$ {command[1]}\n{_output(command[1], folder)}" for command in COMMAND.finditer(body)
        )
        return f"```console\n{text}```"

    return BLOCK.sub(done, page)


def _output(command: str, folder: Path) -> str:
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": f"{_commands(folder)}:{os.environ['PATH']}",
             "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    shown = result.stdout.replace(str(folder), HOME)
    return "".join(f"{line.rstrip()}\n" for line in shown.splitlines())


def _commands(folder: Path) -> Path:
    """Return a folder with ``eplb`` and ``python`` of this interpreter."""
    found = folder / ".bin"
    if not found.exists():
        found.mkdir()
        start = f'exec "{sys.executable}"'
        run = "-c 'from eplb.cli.main import main; main()'"
        for name, words in (("python", ""), ("eplb", run)):
            (found / name).write_text(f'#!/bin/sh\n{start} {words} "$@"\n')
            (found / name).chmod(0o755)
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        path.write_text(follow(path.read_text(), Path(scratch)))
