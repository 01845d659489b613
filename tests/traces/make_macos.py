"""Writes the macOS traces beside it. Constructed from documented values, NOT recorded on a Mac.

What they rest on: kern.memorystatus_vm_pressure_level is 1 (normal), 2 (warn) or 4 (critical); the total of swap grows
with its use; there is no PSI and no cgroup; which part of a process is compressed or swapped is not told, but
phys_footprint includes it; MPS work needs little CPU; background programs run some 12 times slower. Run it again
after a change of the sample format: `python tests/traces/make_macos.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

GIB = 2**30
RAM = 128 * GIB
HERE = Path(__file__).parent
NOTE = "constructed from documented values, not recorded on a Mac"


def host(at: float, *, available: float, swap_used: float = 0.0, level: int = 1, paged: float = 0.0) -> dict[str, Any]:
    """One reading of a 128 GB Mac; sizes in GiB."""
    total = max(2.0, swap_used + 1.0)
    return {
        "at": at,
        "total_bytes": RAM,
        "limit_bytes": RAM,
        "available_bytes": int(available * GIB),
        "swap_total_bytes": int(total * GIB),
        "swap_free_bytes": int((total - swap_used) * GIB),
        "paging_bytes": int(paged * GIB),
        "level": level,
    }


def trial(number: int, held: float, *, cpu: float = 0.0, ticked: float | None = 0.0, **more: Any) -> dict[str, Any]:
    """One MPS trial; held in GiB."""
    tree = {
        "footprint_bytes": int(held * GIB),
        "cpu_s": cpu,
        "major_faults": more.pop("faults", 0),
        "states": more.pop("states", "S"),
        "exact": True,
        "members": [[500 + number, 1000.0 + number]],
    }
    ident = {"attempt": f"phase6a_2B_h1/{number}/1", "pid": 500 + number, "start_time": 1000.0 + number}
    return {**ident, "launched": 0.0, "uses_device": True, "ticked_at": ticked, "tree": tree, **more}


def write(name: str, expect: dict[str, Any], samples: Iterable[dict[str, Any]]) -> None:
    """The expectation first, then the samples, one a line."""
    with open(HERE / f"{name}.jsonl", "w") as file:
        file.write(json.dumps({"note": NOTE, **expect}) + "\n")
        file.writelines(json.dumps(sample, separators=(",", ":")) + "\n" for sample in samples)


def every(
    step: float, until: float, make: Callable[[float], dict[str, Any]], start: float = 0.0
) -> list[dict[str, Any]]:
    """Samples at even steps; `make` gives host and trials."""
    count = int((until - start) / step) + 1
    return [
        {"at": start + i * step, "interval_s": step, "suspended_s": 0.0, **make(start + i * step)} for i in range(count)
    ]


def main() -> None:
    """Write them all."""

    def growing(at: float) -> dict[str, Any]:
        # The case this project exists for: one trial takes 115 GB, swap grows by 0.5 GiB/s, the GPU waits, no tick.
        held, swap = min(115.0, 40.0 + at), max(0.0, min(40.0, (at - 60.0) * 0.5))
        level = 1 if at < 60 else 2
        memory = host(at, available=max(3.0, 80.0 - at), swap_used=swap, level=level, paged=swap)
        return {"host": memory, "trials": [trial(4, held, cpu=5.0 + at * 0.001, ticked=min(at, 50.0))]}

    write(
        "macos_swap_growth",
        {"kills": ["swap_threshold"], "highest": "SOFT", "last": "SOFT", "victim": "phase6a_2B_h1/4/1"},
        every(1.0, 112.0, growing),
    )

    def critical(at: float) -> dict[str, Any]:
        level = 1 if at < 10 else 4 if at < 16 else 2 if at < 30 else 1
        memory = host(at, available=2.0 if 10 <= at < 16 else 40.0, level=level, swap_used=6.0, paged=6.0)
        trials = [trial(1, 60.0, cpu=at, ticked=at), trial(2, 40.0, cpu=at, ticked=at, launched=5.0)]
        return {"host": memory, "trials": trials}

    # Both are in their first minute, so the larger of the two goes.
    write(
        "macos_level_critical",
        {"kills": ["level_critical"], "highest": "HARD", "last": "NORMAL", "victim": "phase6a_2B_h1/1/1"},
        every(1.0, 120.0, critical),
    )

    def warned(at: float) -> dict[str, Any]:
        memory = host(at, available=20.0, level=2, swap_used=3.0, paged=3.0)
        return {"host": memory, "trials": [trial(1, 60.0, cpu=at * 0.1, ticked=at)]}

    write("macos_level_warn", {"kills": [], "highest": "ELEVATED", "last": "ELEVATED"}, every(10.0, 600.0, warned))

    def throttled(at: float) -> dict[str, Any]:
        # In the background 12 times slower: a step takes two minutes, CPU stays under 1 % because the GPU works.
        memory = host(at, available=60.0, swap_used=1.0, paged=1.0)
        return {"host": memory, "trials": [trial(1, 30.0, cpu=at * 0.004, ticked=at - at % 120)]}

    write("macos_throttled", {"kills": [], "highest": "NORMAL", "last": "NORMAL"}, every(15.0, 5400.0, throttled))

    def hung(at: float) -> dict[str, Any]:
        memory = host(at, available=60.0)
        trials = [trial(1, 30.0, cpu=9.0, ticked=100.0), trial(2, 20.0, cpu=at * 0.003, ticked=at)]
        return {"host": memory, "trials": trials}

    write("macos_hung", {"kills": ["stalled"], "highest": "NORMAL", "last": "NORMAL", "victim": "phase6a_2B_h1/1/1"},
          every(10.0, 1960.0, hung))  # fmt: skip

    def foreign(at: float) -> dict[str, Any]:
        swap = min(30.0, at * 0.5)
        memory = host(at, available=2.0, swap_used=swap, level=4, paged=swap)
        return {"host": memory, "trials": [trial(1, 4.0, cpu=at, ticked=at)]}

    write("macos_foreign", {"kills": [], "highest": "HARD", "last": "HARD", "closed": ["not_ours"]},
          every(1.0, 60.0, foreign))  # fmt: skip

    def old(at: float) -> dict[str, Any]:
        # 30 GiB of swap were in use before we started and stay in use: growth counts, not the level.
        memory = host(at, available=50.0, swap_used=30.0)
        return {"host": memory, "trials": [trial(1, 30.0, cpu=at, ticked=at)]}

    write("macos_old_swap", {"kills": [], "highest": "NORMAL", "last": "NORMAL"}, every(10.0, 600.0, old))

    def before(at: float) -> dict[str, Any]:
        return {"host": host(at, available=60.0), "trials": [trial(1, 30.0, cpu=9.0, ticked=0.0)]}

    # The lid was shut for 519 s at 1700 s of silence: wall clock and boot clock moved, the monotonic clock did not.
    slept = every(10.0, 1700.0, before) + [
        {**sample, "suspended_s": 519.0} for sample in every(10.0, 3400.0, before, start=1710.0)
    ]
    write("macos_suspend", {"kills": [], "highest": "NORMAL", "last": "NORMAL"}, slept)


if __name__ == "__main__":
    main()
