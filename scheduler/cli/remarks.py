"""What of the settings will not be as it is written, said before anything starts: refused, or told in a line each.

Looks at this machine (its devices, its ports) and changes nothing. What is wrong with a value by itself, `settings` has
refused already.
"""

from __future__ import annotations

import errno
import os
import socket

from scheduler.model import UsageError
from scheduler.settings.schema import Settings
from scheduler.workload.plan import Plan


def check_device(settings: Settings) -> None:
    """Raise UsageError where a device is named that this machine has not: every trial would be turned away later."""
    from scheduler.host import facts

    why = facts.why_no_device(settings.device)
    if why is not None:
        raise UsageError(f"--device {settings.device}: {why}; --device auto (the default) takes what there is, or cpu")


def remarks(settings: Settings, plan: Plan) -> list[str]:
    """Return a line for each setting that will be followed otherwise than it reads.

    Raises UsageError for a dashboard on an address that this machine has not.
    """
    told = []
    most = max(room.facts.slots for room in plan.rooms)
    if settings.threads is not None and settings.threads > most:
        told.append(
            f"--threads {settings.threads}: the largest worker has {most} slots; a trial takes all of them, one runs "
            f"at a time, and its {settings.threads} threads share these cores"
        )
    address = None if settings.cluster is not None else settings.dashboard_address
    if address is not None and (line := _dashboard(address)) is not None:
        told.append(line)
    return told


def _dashboard(address: str) -> str | None:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_server((host, int(port))):
            return None
    except OSError as error:
        # Dask goes to another port for as long as it is the port that cannot be had. A name that is not known has a
        # number below zero.
        if error.errno is None or error.errno < 0 or error.errno == errno.EADDRNOTAVAIL:
            raise UsageError(
                f"--dashboard {address}: {host} is no address of this machine; give a port, which is loopback's, "
                "0.0.0.0:PORT for all of its addresses, or off"
            ) from None
        return (
            f"--dashboard {address} cannot be had ({os.strerror(error.errno)}): another free port is taken, and told "
            "once it is there"
        )
