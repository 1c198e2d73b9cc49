"""Addresses under which processes reach each other beside their process groups."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from eplb.errors import InvalidInput

__all__ = ["check_hosts", "no_address", "own_host"]


def own_host() -> str:
    """Return the address under which the group's first machine, MASTER_ADDR, sees this one."""
    toward = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: connecting a datagram socket only chooses a route.
            probe.connect((toward, 9))
        except OSError:
            return "127.0.0.1"
        host: str = probe.getsockname()[0]
        return host


def no_address(host: str, error: OSError) -> InvalidInput:
    """Return the error for an address that nothing can be opened at."""
    return InvalidInput(
        f"host {host!r} cannot be listened at ({error.strerror or error}); give host= an address "
        "of this machine, or leave it out"
    )


def check_hosts(hosts: Sequence[str]) -> None:
    """Raise where processes would look for another machine's on their own.

    A machine whose name is a loopback address in its own /etc/hosts finds that for itself.

    Raises
    ------
    InvalidInput
        Some addresses are of the loopback interface, and others are not.
    """
    local = [p for p, host in enumerate(hosts) if host.startswith("127.") or host == "localhost"]
    if 0 < len(local) < len(hosts):
        raise InvalidInput(
            f"process{'es' * (len(local) > 1)} {', '.join(map(str, local))} can be reached at "
            f"{hosts[local[0]]} only, which other machines take for themselves; give host= the "
            "address in their network, or make MASTER_ADDR an address and not a name"
        )
