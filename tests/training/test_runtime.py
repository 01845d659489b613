"""What a trial process says of its heap and of torch, each in a real process started as a user might."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from training import footprint, runtime

ROOT = Path(__file__).resolve().parents[2]
GLIBC = pytest.mark.skipif(runtime.allocator({}) != runtime.STACK, reason="needs glibc")
SAY = "from training import runtime; print(runtime.in_force())"


def said(code: str = SAY, /, **variables: Any) -> str:
    """What such a process prints; none of this one's own heap settings reach it."""
    clean = {
        k: v for k, v in os.environ.items() if k not in runtime.ALIASES and k not in ("GLIBC_TUNABLES", "LD_PRELOAD")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in {**clean, **variables}.items() if v is not None},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@GLIBC
def test_our_own_heap_is_named_as_such() -> None:
    """With the environment a trial gets, also beside what Dask sets for its workers."""
    ours = runtime.environment({})
    assert said(**ours).split("/")[1] == runtime.STACK
    assert said(**ours, MALLOC_TRIM_THRESHOLD_="65536").split("/")[1] == runtime.STACK
    assert said(**runtime.environment({"allocator": "default"})).split("/")[1] == "glibc"


@GLIBC
def test_a_users_tunables_are_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user's GLIBC_TUNABLES or old variables change is no longer the heap that was measured."""
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=8:glibc.malloc.hugetlb=1")
    assert said(**runtime.environment({})).split("/")[1] == "glibc-stack(arena_max=8,hugetlb=1)"
    assert said(MALLOC_ARENA_MAX="2").split("/")[1] == "glibc(arena_max=2)"


@GLIBC
def test_a_preloaded_allocator_is_named(tmp_path: Path) -> None:
    """Whoever provides malloc is found by where malloc is, whatever the library is called."""
    source = tmp_path / "own.c"
    source.write_text(
        "#include <stddef.h>\nvoid *__libc_malloc(size_t);\nvoid *malloc(size_t n) { return __libc_malloc(n); }\n"
    )
    library = tmp_path / "libown.so.3"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a C compiler")
    assert said(**runtime.environment({}), LD_PRELOAD=str(library)).split("/")[1] == "libown.so.3"


def test_torch_is_named_with_its_build() -> None:
    """The build decides what a process holds before its first tensor; its version file tells it without an import."""
    pytest.importorskip("torch")
    assert said("import torch; " + SAY).split("/")[0] == f"torch-{runtime.installed_torch()}"
    assert said().split("/")[0] == "no-torch"
    found = said("import sys; from training import runtime; runtime.ready_bytes(); print('torch' in sys.modules)")
    assert found == "False"


def test_the_margin_is_wider_where_nothing_was_measured() -> None:
    """A preloaded allocator, other tunables or another torch: 2 % more, and a family of its own."""
    params = {"d_model": 256, "n_layers": 8, "n_heads": 8, "d_ff": 1024, "micro_batch": 64}
    known = sorted(name for name in footprint.MEASURED_IN if not name.endswith("/forked"))
    usual = footprint.estimate(params, {"environments": known})
    assert usual == footprint.estimate(params, {})
    for other in (
        "torch-2.13.0+cpu/libjemalloc.so.2",
        "torch-2.13.0+cpu/glibc-stack(arena_max=8)",
        "torch-9/glibc-stack",
    ):
        wider = footprint.estimate(params, {"environments": [*known, other]})
        if runtime.allocator({}) == runtime.STACK:
            assert wider["host_bytes"] - wider["runtime_bytes"] > 1.019 * (usual["host_bytes"] - usual["runtime_bytes"])
            assert wider["family"] != usual["family"]


def test_the_runtime_is_the_workers_own() -> None:
    """What a worker's processes were measured to hold takes the place of what is known of the installed build."""
    params = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 128, "micro_batch": 32}
    assumed, measured = footprint.estimate(params, {}), footprint.estimate(params, {"runtime_bytes": 777_000_000})
    assert measured["runtime_bytes"] == 777_000_000
    difference = measured["runtime_bytes"] - assumed["runtime_bytes"]
    assert measured["host_bytes"] - assumed["host_bytes"] == difference


def test_few_rows_cost_a_copy_of_the_widest_weight() -> None:
    """Below 16 rows, which at 11 patches is a micro-batch of 1, the kernels lay the weights out anew."""
    wide = {"d_model": 3072, "n_layers": 2, "n_heads": 8, "d_ff": 4 * 3072}
    one, two = (footprint.estimate({**wide, "micro_batch": size}, {})["components"] for size in (1, 2))
    assert one["few_rows"] == 4 * 3072 * 4 * 3072 and "few_rows" not in two
