"""Certificates between the driver, a Dask scheduler and its workers.

Covers those of our own cluster (made anew for each start, in memory only) and those that `--cluster tls://…` needs,
from the settings or from Dask's own configuration. Does not connect: `cluster` does. Why: whoever can talk to a Dask
scheduler or worker can run code as its user, and on loopback that is every user of the machine.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from pathlib import Path

from distributed import Security

from scheduler.model import HeadroomError, UsageError

__all__ = ["Security", "explained", "given", "of_our_own"]

CONFIGURATION = "distributed.comm.tls.ca-file, .client.cert and .client.key in Dask's configuration"


def of_our_own() -> Security:
    """Make a key and certificate for one cluster on this machine; who has neither is not let in. Takes some 0.1 s."""
    try:
        security: Security = Security.temporary()
        return security
    except ImportError as error:
        raise HeadroomError(
            f"the workers on this machine cannot be kept to yourself ({error}): pip install cryptography, or start "
            "bin/schedule with its own .venv"
        ) from None


def given(address: str, files: Mapping[str, Path | None]) -> Security:
    """Return the credentials for an existing cluster: `files` (tls_ca_file, tls_cert, tls_key), else Dask's
    configuration.

    Raises UsageError: a tls:// address without them, or files that cannot be used.
    """
    named = {"tls_ca_file": "tls_ca_file", "tls_cert": "tls_client_cert", "tls_key": "tls_client_key"}
    chosen = {named[key]: str(path) for key, path in files.items() if path is not None}
    try:
        security = Security(**chosen, require_encryption=True if address.startswith("tls://") else None)
        found = security.get_connection_args("client")["ssl_context"]
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        said = (isinstance(error, OSError) and error.strerror) or error
        why = "not PEM, or they do not belong together" if isinstance(error, ssl.SSLError) else said
        where = " ".join(f"--{key.replace('_', '-')} {path}" for key, path in files.items() if path is not None)
        raise UsageError(f"{where or CONFIGURATION}: the certificates cannot be used ({why})") from None
    if address.startswith("tls://") and found is None:
        raise UsageError(
            f"--cluster {address} needs certificates: give --tls-ca-file, --tls-cert and --tls-key, or set "
            f"{CONFIGURATION}"
        )
    return security


NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "UNEXPECTED_MESSAGE")


def explained(error: BaseException) -> str:
    """Return the reason at the bottom of a failed connection, in a line; a hint where the two sides disagree
    about TLS."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, TimeoutError | asyncio.CancelledError):
        return "something is there and says nothing"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused: nothing listens there"
    said = f"{type(error).__name__}: {error}".splitlines()[0].rstrip()
    # Which of them depends on whether its own greeting, no TLS, was there before ours was sent.
    if any(words in said for words in ("cannot convert to SSL", *NO_TLS)):
        return "it does not speak TLS: say tcp://"
    if isinstance(error, ssl.SSLError) or "TLS certificate does not match" in said:
        return "it and we do not accept each other's certificates"
    if "reset by peer" in said:
        return f"{said.rpartition(': ')[2]}; if it speaks TLS, say tls://"
    return said
