"""What the watchdog calls the state of a host that is short of memory, in words: for the views, and for `kill.txt`."""

from __future__ import annotations

HOST_IN_NEED = {
    "memory_low": "the host was short of memory and paging",
    "memory_low_no_swap": "the host was short of memory and has no swap",
    "memory_exhausted": "the host's memory was as good as used up",
    "running_out": "at the pace at which memory went the host had seconds left",
    "swap_threshold": "our trials held more swap than they may, and the host was paging",
    "swapping": "our trials were being swapped",
    "psi_full": "every task of the host was waiting for memory",
    "psi_some": "tasks of the host were waiting for memory",
    "level_critical": "the system reported critical memory pressure",
    "level_warn": "the system reported memory pressure",
}
