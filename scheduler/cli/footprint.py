"""`bin/footprint`: what one architecture, or a whole budget's, will need; by component, and the micro-batch that fits.

Covers arguments, the table, `--json`. Computes nothing itself: training/footprint.py has the formula,
core/reservation.py the correction. Starts no trial, imports no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from scheduler.cli import execution
from scheduler.cli.execution import NOTHING_FITS, OK
from scheduler.host import facts as host_facts
from scheduler.host import runtimes
from scheduler.host.registry import host_folder
from scheduler.model import UsageError
from scheduler.settings.study_keys import RECIPES
from scheduler.units import gib, parse_size
from training import arch_grid, batch_size, data, footprint, runtime
from training.errors import TrainingInputError

DEFAULT_MEMORY_SHARE = 0.9  # of this machine, as bin/schedule takes it by default
# What tests/benchmarks/footprint.py found on the groups draw and wide: 28 trials, peaks of 0.28 to 3.75 GiB.
SURENESS = {
    "cpu": "formula, none observed; of 28 trials that judged it none was above, it was 2 % over (median; worst 4.3)",
    "cuda": "formula, no trial observed on CUDA: not measured there; leave a margin until a study has observed peaks",
    "mps": "formula times 2, from the only observation there is (115 GB at d=1024, L=256, batch 128)",
}

EPILOG = """\b
Examples:
  bin/footprint --d-model 1024 --n-layers 256 --d-ff-ratio 2
  bin/footprint --budget 2B --memory 128GiB --device mps
  bin/footprint --d-model 64 --n-layers 4 --data bars.parquet
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 118})
@click.option("--d-model", type=click.IntRange(1), metavar="N", help="Width.")
@click.option("--n-layers", type=click.IntRange(1), metavar="N", help="Depth.")
@click.option("--n-heads", type=click.IntRange(1), default=8, metavar="N", show_default=True, help="Heads.")
@click.option("--d-ff-ratio", type=click.IntRange(1), default=4, metavar="N", show_default=True, help="d_ff / d_model.")
@click.option("--micro-batch", type=click.IntRange(1), metavar="N", help="Default: the largest that fits.")
@click.option("--budget", metavar="NAME", help="All architectures of a budget (2M, 20M, 200M, 2B) instead of one.")
@click.option("--memory", metavar="SIZE", help="What the trial may take, e.g. 100GiB (default: 90 % of this machine).")
@click.option("--device-memory", metavar="SIZE", help="The device's own pool (cuda), or Metal's cap (mps: 3/4).")
@click.option("--device", type=click.Choice(["cpu", "cuda", "mps"]), default="cpu", show_default=True)
@click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    metavar="NAME",
    default=RECIPES[0],
    show_default=True,
    help=f"What it is computed in: {', '.join(RECIPES)}.",
)
@click.option("--effective-batch", type=click.IntRange(1), default=256, show_default=True, metavar="N")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, metavar="N")
@click.option("--data", metavar="FILE", help="Of daily bars: its rows and columns count (default: built-in sample).")
@click.option("--n-features", type=click.IntRange(1), default=25, show_default=True, metavar="N")
@click.option("--context-length", type=click.IntRange(1), default=60, show_default=True, metavar="DAYS")
@click.option("--patch-length", type=click.IntRange(1), default=10, show_default=True, metavar="DAYS")
@click.option("--stride", type=click.IntRange(1), default=5, show_default=True, metavar="DAYS")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    d_model: int | None,
    n_layers: int | None,
    n_heads: int,
    d_ff_ratio: int,
    micro_batch: int | None,
    budget: str | None,
    memory: str | None,
    device_memory: str | None,
    as_json: bool,
    **context: Any,
) -> int:
    """Predict the peak memory of a training trial, by component, and the micro-batch that fits."""
    if context["patch_length"] > context["context_length"]:
        raise UsageError(
            f"--patch-length {context['patch_length']} is longer than --context-length {context['context_length']}"
        )
    context["target_effective_batch"] = context.pop("effective_batch")
    context |= _runtime() | _data(context["data"], context["context_length"])
    limits = Limits(context["device"], memory, device_memory)
    if budget is not None:
        if d_model is not None or n_layers is not None:
            raise UsageError(
                "--budget and --d-model/--n-layers exclude each other: a budget is a list of architectures"
            )
        return _budget(budget, context, limits, micro_batch, as_json)
    if d_model is None or n_layers is None:
        raise UsageError("name an architecture (--d-model and --n-layers) or a --budget")
    if d_model % n_heads:
        raise UsageError(f"--d-model {d_model} is not a multiple of --n-heads {n_heads}: choose another --n-heads")
    params = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": d_ff_ratio * d_model}
    return _one(params, context, limits, micro_batch, as_json)


def _data(path: str | None, context_length: int) -> dict[str, int]:
    """Return what a file of bars tells the context. Raises TrainingInputError."""
    if path is None:
        return {}
    facts = data.check(path, 1, context_length)
    return {"n_features": facts.n_features, "n_rows": facts.rows, "n_columns": facts.columns}


class Limits:
    """What there is: host bytes, and the device's own where it has a pool or a cap (None otherwise)."""

    def __init__(self, device: str, memory: str | None, device_memory: str | None) -> None:
        if memory is None:
            facts = host_facts.facts(device if device == host_facts.resolve_device("auto") else "cpu", 1)
            total = facts.limit_bytes
            self.host_bytes = int(DEFAULT_MEMORY_SHARE * total)
        else:
            total = self.host_bytes = parse_size(memory, "--memory")
        self.device_bytes = None if device_memory is None else parse_size(device_memory, "--device-memory")
        if device == "mps" and self.device_bytes is None:
            self.device_bytes = int(batch_size.METAL_SHARE * total)
        if self.host_bytes <= 0:
            raise UsageError(f"--memory {memory!r}: must be more than nothing")

    def hold(self, estimate: Mapping[str, Any]) -> bool:
        return estimate["host_bytes"] <= self.host_bytes and (
            self.device_bytes is None or estimate["device_bytes"] <= self.device_bytes
        )

    def fitting(self, params: Mapping[str, Any], context: Mapping[str, Any]) -> int | None:
        return batch_size.micro_batch(
            params,
            context,
            self.host_bytes,
            self.device_bytes,
            target_effective_batch=context["target_effective_batch"],
        )

    def __str__(self) -> str:
        device = "" if self.device_bytes is None else f", device {gib(self.device_bytes)}"
        return f"{gib(self.host_bytes)}{device}"


def _runtime() -> dict[str, Any]:
    """Return what a trial process holds before its first tensor, and whose number that is."""
    known = runtimes.known(host_folder(), runtimes.key(None, "auto"))
    if known is None:
        torch = runtime.installed_torch()
        whose = f"as known of torch {torch}" if torch else "as known of torch's CPU build: none is installed here"
        return {"runtime_of": f"{whose}; no trial process was measured here yet"}
    whose = f"{known.origin}, {known.name}"
    return {"runtime_of": whose, "runtime_bytes": known.runtime_bytes, "environments": [known.name]}


def _sureness(context: Mapping[str, Any]) -> str:
    if context["device"] == "cpu" and runtime.allocator(context) != runtime.STACK:
        return "formula and 15 % for a heap that was not measured; observed peaks narrow it"
    if not footprint.MEASURED_IN.issuperset(context.get("environments") or ()):
        return "formula, 4 MiB and 1 % for an environment that was not measured; observed peaks narrow it"
    return SURENESS[context["device"]]


def _one(params: dict[str, Any], context: dict[str, Any], limits: Limits, given: int | None, as_json: bool) -> int:
    fitting = limits.fitting(params, context)
    size = given or fitting or 1
    batch = batch_size.batch_config(size, context["target_effective_batch"])
    estimate = footprint.estimate({**params, **batch}, context)
    shape = {key: context[key] for key in ("n_features", "context_length", "patch_length", "stride")}
    count = arch_grid.param_count(params["d_model"], params["n_layers"], params["d_ff"], **shape)
    fits = limits.hold(estimate)
    sureness = _sureness(context)
    if as_json:
        _print_json(
            {
                "params": {**params, "param_count": count, **batch},
                **estimate,
                "limit_bytes": limits.host_bytes,
                "device_limit_bytes": limits.device_bytes,
                "fits": fits,
                "fitting_micro_batch": fitting,
                "source": "prior",
                "samples": 0,
                "sureness": sureness,
                "runtime_of": context["runtime_of"],
            }
        )
        return OK if fits else NOTHING_FITS
    table = Table(
        title=f"d_model {params['d_model']}, {params['n_layers']} layers, d_ff {params['d_ff']}, {count / 1e6:,.1f} M "
        f"parameters, micro-batch {size} x {batch['accumulation_steps']}",
        title_justify="left",
    )
    table.add_column("component")
    table.add_column("bytes", justify="right")
    table.add_column("", justify="right")
    table.add_column("share", justify="right")
    total = sum(estimate["components"].values())
    for name, part in estimate["components"].items():
        table.add_row(name, f"{part:,}", gib(part), f"{part / total:.1%}")
    table.add_section()
    table.add_row("host", f"{estimate['host_bytes']:,}", gib(estimate["host_bytes"]), "")
    if estimate["device_bytes"]:
        table.add_row("device", f"{estimate['device_bytes']:,}", gib(estimate["device_bytes"]), "")
    console = _console()
    console.print(table)
    answer = f"micro-batch {fitting} fits"
    if fitting is None:
        recipe = next((name for name in RECIPES if limits.fitting(params, {**context, "recipe": name})), None)
        answer = "nothing fits, not even micro-batch 1" + (f"; it would with --recipe {recipe}" if recipe else "")
    asked = "" if given is None else f"; {given} {'fits' if fits else 'does not'}"
    console.print(f"limit {limits}: {answer}{asked}", highlight=False)
    console.print(f"runtime: {gib(estimate['runtime_bytes'])}, {context['runtime_of']}", highlight=False)
    console.print(f"how sure: {sureness}", highlight=False)
    return OK if fits else NOTHING_FITS


def _budget(budget: str, context: dict[str, Any], limits: Limits, given: int | None, as_json: bool) -> int:
    shape = {key: context[key] for key in ("n_features", "context_length", "patch_length", "stride")}
    rows, seen = [], set()
    for a in arch_grid.architectures(budget, **shape):
        if (a.d_model, a.n_layers, a.d_ff) in seen:
            continue  # heads change some bytes in a thousand: one row for all of them
        seen.add((a.d_model, a.n_layers, a.d_ff))
        params = {"d_model": a.d_model, "n_layers": a.n_layers, "n_heads": a.n_heads, "d_ff": a.d_ff}
        fitting = limits.fitting(params, context)
        size = given or fitting or 1
        batch = batch_size.batch_config(size, context["target_effective_batch"])
        estimate = footprint.estimate({**params, **batch}, context)
        rows.append({**params, "param_count": a.param_count, **batch, **estimate, "fitting_micro_batch": fitting})
    holds = sum(limits.hold(row) for row in rows)
    if as_json:
        _print_json(
            {
                "budget": budget,
                "limit_bytes": limits.host_bytes,
                "device_limit_bytes": limits.device_bytes,
                "fitting": holds,
                "architectures": rows,
                "sureness": _sureness(context),
                "runtime_of": context["runtime_of"],
            }
        )
        return OK if holds else NOTHING_FITS
    console = _console()
    table = _listing(rows, limits, tuple(rows[0]["components"]))
    if (needed := console.measure(table).maximum) > console.width:
        table = _listing(rows, limits, ())
    console.print(table)
    if needed > console.width:
        console.print(f"by component: in a terminal of {needed} columns, in a pipe, or by --json", highlight=False)
    console.print(f"limit {limits}: {holds} of {len(rows)} architectures fit", highlight=False)
    console.print(f"runtime: {gib(rows[0]['runtime_bytes'])}, {context['runtime_of']}", highlight=False)
    console.print(f"how sure: {_sureness(context)}", highlight=False)
    return OK if holds else NOTHING_FITS


def _listing(rows: Sequence[Mapping[str, Any]], limits: Limits, parts: Sequence[str]) -> Table:
    """One line per architecture. parts: the components that have a column of their own."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    device = any(row["device_bytes"] for row in rows)
    names = ("d_model", "layers", "d_ff", "parameters", "fits", "shown", *parts, "host", *(["device"] * device), "")
    for name in names:
        table.add_column(name.replace("_", " ") if name in parts else name, justify="right", no_wrap=name not in parts)
    for row in rows:
        table.add_row(
            str(row["d_model"]),
            str(row["n_layers"]),
            str(row["d_ff"]),
            f"{row['param_count'] / 1e6:,.1f} M",
            str(row["fitting_micro_batch"] or "-"),
            f"{row['micro_batch']} x {row['accumulation_steps']}",
            *(gib(row["components"][name]) for name in parts),
            gib(row["host_bytes"]),
            *([gib(row["device_bytes"])] * device),
            "" if limits.hold(row) else "does not fit",
        )
    return table


def _console() -> Console:
    """As wide as the terminal; in a pipe or file as wide as the tables need."""
    return Console() if sys.stdout.isatty() else Console(width=300)


def _print_json(found: Mapping[str, Any]) -> None:
    click.echo(json.dumps(found, indent=2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs the command and ends the process with its exit code."""
    sys.exit(execute(sys.argv[1:] if arguments is None else arguments))


def execute(arguments: Sequence[str]) -> int:
    """Run the command; every expected error is one line on stderr and exit code 2."""
    return execution.execute(command, "bin/footprint", arguments, expected=(TrainingInputError,))


if __name__ == "__main__":
    main()
