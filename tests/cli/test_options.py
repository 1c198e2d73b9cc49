"""The options, frozen: programs call them. A change here is a change of the interface."""

import click

from eplb.cli.main import COMMANDS, cli

DEPLOYMENT = (
    "--budget-tokens",
    "--cache",
    "--kv-tokens",
    "--max-bad-lines",
    "--max-requests",
    "--model",
    "--phase",
    "--ranks",
    "--token-skew",
    "--utilisation",
)
OPTIONS = {
    "demo": {"--json", "--output", "--report", "-o"},
    "diff": {"OLD", "NEW", "--expert-bytes", "--json", "--spare-slots", "--topology"},
    "evaluate": {
        "PLAN",
        "PROFILE...",
        "--json",
        "--phase",
        "--routings",
        "--split",
        "--tokens-per-step",
        "--windows",
    },
    "export": {"PLAN", "--json", "--moe-layers", "--output", "--to", "-o"},
    "import": {
        "FILE",
        "--from",
        "--json",
        "--model",
        "--moe-layers",
        "--nodes",
        "--output",
        "--ranks-per-node",
        "--split",
        "-o",
    },
    "plan": {
        "PROFILE...",
        "--groups",
        "--hierarchical",
        "--holdout",
        "--json",
        "--max-moves",
        "--model",
        "--nodes",
        "--objective",
        "--output",
        "--phase",
        "--previous",
        "--ranks-per-node",
        "--recorded-only",
        "--report",
        "--seed",
        "--shared-ranks",
        "--slots-per-rank",
        "--solver",
        "--split",
        "--sweeps",
        "--time-limit",
        "--topology",
        "--windows",
        "-o",
    },
    "repair": {
        "PLAN",
        "[PROFILE...]",
        "--dead-nodes",
        "--dead-ranks",
        "--json",
        "--max-moves",
        "--output",
        "--phase",
        "--topology",
        "--windows",
        "-o",
    },
    "resize": {
        "PLAN",
        "PROFILE...",
        "--back-in-service",
        "--json",
        "--max-moves",
        "--nodes",
        "--output",
        "--phase",
        "--ranks-per-node",
        "--seed",
        "--slots-per-rank",
        "--solver",
        "--spare-slots",
        "--time-limit",
        "--topology",
        "--windows",
        "--within",
        "-o",
    },
    "replan": {
        "PLAN",
        "PROFILE...",
        "--expert-bytes",
        "--horizon",
        "--json",
        "--max-moves",
        "--max-moves-per-layer",
        "--output",
        "--phase",
        "--seed",
        "--step-ms",
        "--topology",
        "--windows",
        "-o",
    },
    "replay": {
        "PROFILE",
        "--every",
        "--expert-bytes",
        "--false-alarms",
        "--fit-steps",
        "--groups",
        "--hierarchical",
        "--html",
        "--json",
        "--max-share",
        "--model",
        "--move-above",
        "--never-lift",
        "--nodes",
        "--phase",
        "--plans",
        "--plot",
        "--policy",
        "--ranks-per-node",
        "--rest-below",
        "--seed",
        "--shared-ranks",
        "--slots-per-rank",
        "--split",
        "--step-ms",
        "--time-limit",
        "--topology",
        "--warmup",
        "--windows",
    },
    "report": {
        "PLAN",
        "PROFILE...",
        "--json",
        "--output",
        "--phase",
        "--previous",
        "--replan",
        "--replay",
        "--routings",
        "--windows",
        "--without-quality",
        "-o",
    },
    "selftest": {
        "--backend",
        "--exchange",
        "--json",
        "--micro-batches",
        "--nodes",
        "--padded",
        "--payload",
        "--ranks",
        "--seed",
        "--steps",
        "--write-topology",
    },
    "profile convert": {
        "PROFILE...",
        "--json",
        "--model",
        "--moe-layers",
        "--output",
        "--phase",
        "--placement",
        "--scenario",
        "--windows",
        "-o",
    },
    "profile drift": {"NEW", "OLD", "--json"},
    "profile merge": {"PROFILE...", "--add", "--json", "--output", "--windows", "-o"},
    "profile scenarios": {
        "PROFILE...",
        "--by",
        "--clusters",
        "--hours",
        "--json",
        "--output",
        "--representatives",
        "--seed",
        "--utc-offset",
        "--windows",
        "-o",
    },
    "profile show": {"PROFILE...", "--html", "--json", "--windows"},
    "profile watch": {"FILE", "--interval", "--once"},
    "requests compare": {"TRACE", "--json", "--policies", "--seeds", *DEPLOYMENT},
    "requests replay": {
        "TRACE",
        "--abort",
        "--feedback-steps",
        "--json",
        "--lose-rank",
        "--lose-step",
        "--plot",
        "--policy",
        "--seed",
        "--slow-rank",
        "--slow-speed",
        *DEPLOYMENT,
    },
    "versions": {"--json"},
}


def commands(group, prefix=""):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def test_options_are_the_documented_ones():
    found = {
        name: {
            word
            for parameter in command.params
            for word in (
                parameter.opts
                if isinstance(parameter, click.Option)
                else [parameter.make_metavar(click.Context(command))]
            )
        }
        for name, command in commands(cli)
    }
    assert found == OPTIONS


def test_every_registered_command_can_be_imported():
    context = click.Context(cli)
    assert all(cli.get_command(context, name) is not None for name in COMMANDS)
