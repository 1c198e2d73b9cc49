"""The ``eplb`` command: finds subcommands, and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from eplb import __version__
from eplb.errors import EplbError, unknown_name

__all__ = ["cli", "main"]

# Imported when called, so that `eplb --help` and each command load only what they need.
COMMANDS = {
    "demo": "eplb.cli.demo",
    "diff": "eplb.cli.diff",
    "evaluate": "eplb.cli.evaluate",
    "export": "eplb.cli.export_plan",
    "import": "eplb.cli.import_plan",
    "plan": "eplb.cli.plan",
    "profile": "eplb.cli.profile",
    "repair": "eplb.cli.repair",
    "replan": "eplb.cli.replan",
    "replay": "eplb.cli.replay",
    "report": "eplb.cli.report.command",
    "requests": "eplb.cli.requests",
    "resize": "eplb.cli.resize",
    "selftest": "eplb.cli.selftest",
    "versions": "eplb.cli.versions",
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the help page."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, with a hint where the name is not quite right."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(str(unknown_name("command", args[0], COMMANDS)), ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="eplb")
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def cli(debug: bool) -> None:
    """Place the experts of a mixture-of-experts model on the ranks that serve it.

    Start with `eplb demo`. Results go to standard output, progress and errors to standard error.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    words = sys.argv[1:] if args is None else args
    if sys.stdout is None:
        # Closed by who started us, and no reason to fail.
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        sys.exit(_run(words, debug="--debug" in words))


def _run(words: list[str], *, debug: bool) -> int:
    try:
        result = cli.main(args=words, prog_name="eplb", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except (EplbError, click.ClickException) as error:
        if debug:
            traceback.print_exc()
        _error(error.format_message() if isinstance(error, click.ClickException) else str(error))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _error("interrupted")
        return 130
    except SystemExit:
        # click and rich end so, and only so, when who reads our output has seen enough, as head(1)
        # does. They leave quietly; this is the code that shells know.
        return 141
    except OSError as error:
        # Files have errors of their own, so this is our output.
        if debug:
            traceback.print_exc()
        sys.stdout = None
        _error(f"cannot write the output: {error.strerror or error}")
        return 2
    except Exception as error:  # noqa: BLE001
        # A bug of ours: still one line for who runs it, and how to get the rest.
        if debug:
            traceback.print_exc()
        _error(
            f"internal error: {type(error).__name__}: {error}; run with --debug (eplb --debug "
            "COMMAND) and report it with the output of `eplb versions`"
        )
        return 1
    return result if isinstance(result, int) else 0


def _error(message: str) -> None:
    click.echo(f"eplb: error: {' '.join(message.split())}", err=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"eplb: warning: {' '.join(str(message).split())}", err=True)
