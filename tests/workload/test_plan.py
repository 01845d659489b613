"""The plan: what fits, how much at once, and the one line that says why a study cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scheduler.model import DevicePool, UsageError, WorkerFacts
from scheduler.settings.load import load
from scheduler.settings.study_keys import RECIPES
from scheduler.units import GIB, MIB
from scheduler.workload import plan


def worker(gib: float, slots: int = 4, **extra: Any) -> WorkerFacts:
    """A worker on an otherwise empty host of this size."""
    size = int(gib * GIB)
    facts: dict[str, Any] = {
        "address": "tcp://a:1",
        "host": "a",
        "slots": slots,
        "total_bytes": size,
        "limit_bytes": size,
        "available_bytes": size,
        **extra,
    }
    return WorkerFacts(**facts)


def made(workers: list[WorkerFacts], **arguments: Any) -> plan.Plan:
    """The plan of these arguments for these workers, on the CPU, in fp32 where they name no recipe."""
    given = {"device": "cpu", "horizons": "1", "recipe": "fp32_adamw", **arguments}
    return plan.make(load(given, environ={}), workers)


def test_a_budget_that_cannot_fit_is_refused_and_the_others_run() -> None:
    """2B in fp32 on 24 GiB: one line with the smallest footprint, the largest capacity and what would help."""
    found = made([worker(24)])
    assert [spec.shown.labels["budget"] for spec in found.runnable] == ["2M", "20M", "200M"]
    (line,) = found.refusals
    assert "\n" not in line
    for words in (
        "phase6a_2B_h1",
        "--recipe ",
        "smallest trial",
        "needs 2",
        "21.6 GiB",
        "90% of 24.0 GiB",
        "a host with",
        "200M",
    ):
        assert words in line, line


# -- recipes --------------------------------------------------------------------------------------------------------


def test_auto_takes_the_most_faithful_recipe_that_holds_every_architecture() -> None:
    """fp32 AdamW where it fits; on 24 GiB a 2B study gets another, which the plan names with the reason."""
    found = made([worker(24)], recipe="auto")
    chosen = {study.spec.shown.labels["budget"]: study for study in found.studies}
    assert {budget: study.recipe for budget, study in chosen.items()} == {
        "2M": "fp32_adamw",
        "20M": "fp32_adamw",
        "200M": "fp32_adamw",
        "2B": "bf16_adam8bit",
    }
    large = chosen["2B"]
    assert large.refusal is None and large.never == 0 and large.fits == 75
    for name in RECIPES[: RECIPES.index("bf16_adam8bit")]:
        assert made([worker(24)], budgets="2B", recipe=name).studies[0].never > 0
    (line,) = [line for line in found.recipes if "2B" in line and "auto" in line]
    assert "phase6a_2B_h1: recipe bf16_adam8bit" in line and "fp32_adamw holds 0 of 75" in line
    data = large.to_json()
    assert data["recipe"] == "bf16_adam8bit" and data["recipe_why"].startswith("auto: ")


def test_a_named_recipe_is_taken_and_the_trials_hear_of_it() -> None:
    """What was asked for is in the study's context, also where a more faithful one fits."""
    (study,) = made([worker(24)], budgets="2M", recipe="bf16_autocast").studies
    assert study.recipe == study.spec.context["recipe"] == "bf16_autocast"


def test_a_refusal_names_the_recipe_that_would_fit() -> None:
    """What the line says helps: with that recipe the study can run."""
    (line,) = made([worker(24)], budgets="2B").refusals
    name = line.rsplit("--recipe ", 1)[1].split()[0]
    assert made([worker(24)], budgets="2B", recipe=name).runnable


def test_what_no_recipe_holds_is_refused_by_the_smallest() -> None:
    """On 2 GiB a 2B study names the least it would need under what auto may take, and no recipe that would not help."""
    (study,) = made([worker(2)], budgets="2B", recipe="auto").studies
    assert study.refusal is not None and "--recipe" not in study.refusal
    assert study.recipe == "bf16_adam8bit"


def test_auto_never_takes_another_optimizer() -> None:
    """On 9 GiB Adafactor alone holds a 2B study: it is refused all the same, in a line that names it, and runs then."""
    here = [worker(9)]
    (line,) = made(here, budgets="2B", recipe="auto").refusals
    assert "--recipe bf16_adafactor (" in line
    assert made(here, budgets="2B", recipe="bf16_adafactor").runnable


def test_a_large_host_hears_how_many_more_would_run_at_once() -> None:
    """On 128 GiB, where fp32 fits: the recipes under which more 2B trials run together."""
    found = made([worker(128, slots=64)], budgets="2B", recipe="auto")
    (study,) = found.studies
    assert study.recipe == "fp32_adamw" and study.at_once is not None
    assert study.others["bf16_adam8bit"][1] > study.at_once[1]
    assert any("with --recipe bf16_adam8bit" in line and "instead of" in line for line in found.recipes)


def test_a_study_keeps_the_recipe_it_was_begun_with() -> None:
    """Resumed on a larger host, where auto would choose another."""
    settings = load({"device": "cpu", "horizons": "1", "budgets": "2B"}, environ={})
    (study,) = plan.make(settings, [worker(128)], {"phase6a_2B_h1": "bf16_adam8bit"}).studies
    assert study.recipe == "bf16_adam8bit" and study.recipe_why == "as the study was begun"


def test_somebody_elses_estimator_knows_no_recipe() -> None:
    """With a user's own the first recipe stands, and nothing is sized by others."""
    settings = load({"device": "cpu", "budgets": "2M", "horizons": "1"}, environ={"HEADROOM_TRAINING_ESTIMATE": "null"})
    (study,) = plan.make(settings, [worker(24)]).studies
    assert study.recipe == "fp32_adamw"


def test_small_trials_share_a_device_as_far_as_its_memory_goes() -> None:
    """An 80 GiB card with 16 slots: sixteen 2M trials at once, of 200M ones as many as the card holds, and the plan
    says so; a recipe that needs less lets more share it."""
    card = DevicePool(kind="cuda", total_bytes=80 * GIB, unified=False)
    here = [worker(512, slots=16, device=card)]
    found = made(here, budgets="2M,200M", device="cuda")
    small, large = found.studies
    assert small.at_once == (16, 16)
    assert large.at_once is not None and large.at_once[0] < 16
    assert large.at_once[0] * 4 * GIB < 80 * GIB
    (line,) = found.devices
    assert line.startswith("cuda of a, 76.0 GiB and 16 slots: trials share it, at once 16 of phase6a_2M_h1, ")
    assert made([worker(512, slots=16)], budgets="2M").devices == ()


def test_a_device_with_room_gets_larger_micro_batches() -> None:
    """The micro-batch of a 2B trial grows with the card."""
    sizes = []
    for gib in (48, 80):
        card = DevicePool(kind="cuda", total_bytes=gib * GIB, unified=False)
        (study,) = made([worker(512, device=card)], budgets="2B", device="cuda").studies
        assert study.micro_batch is not None
        sizes.append(study.micro_batch[0])
    assert sizes[0] < sizes[1]


# -- what does not fit ----------------------------------------------------------------------------------------------


def test_studies_refused_for_one_reason_share_a_line() -> None:
    """Three horizons of one budget are one line with three names."""
    (line,) = made([worker(24)], budgets="2B", horizons="1,3,5").refusals
    assert line.startswith("studies phase6a_2B_h1, phase6a_2B_h3 and phase6a_2B_h5 cannot run")


def test_the_help_of_a_refusal_helps() -> None:
    """With the memory that the line names the study can run: a budget on this host, or a larger host."""
    small = made([worker(24)], budgets="20M", memory_budget="300MiB")
    advice = small.refusals[0].rsplit("--memory-budget ", 1)[1].split()[0]
    assert made([worker(24)], budgets="20M", memory_budget=advice).runnable
    large = made([worker(24)], budgets="2B").refusals[0]
    gib = float(large.split("a host with ")[1].split()[0])
    assert made([worker(gib)], budgets="2B").runnable


def test_how_many_at_once_is_bounded_by_memory_and_by_slots() -> None:
    """Small trials fill the slots, large ones the memory; several workers add up."""
    slots = made([worker(1000, slots=3)], budgets="2M").studies[0]
    assert slots.at_once == (3, 3)
    memory = made([worker(24, slots=64)], budgets="20M").studies[0]
    assert memory.footprint_bytes is not None and memory.at_once is not None
    room = int(24 * GIB * 0.9)
    assert memory.at_once == (room // memory.footprint_bytes[1], room // memory.footprint_bytes[0])
    twice = made([worker(24, slots=64), worker(24, slots=64, address="tcp://b:1")], budgets="20M").studies[0]
    assert twice.at_once == (2 * memory.at_once[0], 2 * memory.at_once[1])


def test_two_workers_of_one_host_count_its_memory_once() -> None:
    """What shares a memory adds up to that memory; a worker's own limit bounds it besides, and is named."""
    one = made([worker(24, slots=64)], budgets="20M").studies[0]
    shared = [worker(24, slots=64, address=f"tcp://a:{n}", domain="a") for n in (1, 2)]
    assert made(shared, budgets="20M").studies[0].at_once == one.at_once
    limited = [
        worker(24, slots=64, address=f"tcp://a:{n}", domain="a", worker_limit_bytes=6 * GIB, limit_source="dask")
        for n in (1, 2)
    ]
    plan = made(limited, budgets="20M")
    most = plan.studies[0].footprint_bytes
    assert most is not None and plan.studies[0].at_once is not None
    assert plan.studies[0].at_once[1] == 2 * (int(6 * GIB * 0.9) // most[0])
    assert {w["limit_source"] for w in plan.to_json()["workers"]} == {"dask"}
    assert {w["limit_bytes"] for w in plan.to_json()["workers"]} == {6 * GIB}


def test_the_workers_own_processes_are_charged() -> None:
    """What the warm spare holds is not there for trials."""
    (room,) = made([worker(10, overhead_bytes=GIB)], budgets="2M", memory_budget="50%").rooms
    assert (room.capacity_bytes, room.trial_bytes) == (5 * GIB, 4 * GIB)


def test_architectures_that_never_fit_are_counted_and_left_out() -> None:
    """On a host that holds only part of a budget's grid the rest is not searched."""
    (study,) = made([worker(4)], budgets="200M").studies
    assert study.refusal is None
    assert study.fits > 0 and study.never > 0
    assert len(study.architectures) == study.fits


def test_a_smaller_host_gets_smaller_micro_batches() -> None:
    """The micro-batch gives way before the architecture does."""
    (roomy,) = made([worker(128)], budgets="200M").studies
    (tight,) = made([worker(8)], budgets="200M").studies
    assert roomy.micro_batch is not None and tight.micro_batch is not None
    assert tight.micro_batch[0] < roomy.micro_batch[0]


def test_metals_own_cap_counts() -> None:
    """On unified memory the device's cap refuses what RAM alone would take."""
    mps = DevicePool(kind="mps", total_bytes=8 * GIB, unified=True)
    found = made([worker(64, device=mps)], budgets="2B", device="mps")
    assert "the device is too small" in found.refusals[0] or "largest worker" in found.refusals[0]
    assert not found.runnable


def test_more_memory_than_there_is_is_refused() -> None:
    """A budget above what exists names both sizes."""
    with pytest.raises(UsageError, match=r"memory_budget 100GiB is more than a has: 100 GiB asked, 24.0 GiB usable"):
        made([worker(24)], memory_budget="100GiB")


def test_a_study_without_an_estimator_is_planned_as_unknown() -> None:
    """A user's own function without an estimator can run: it is measured alone first."""
    settings = load({"device": "cpu", "budgets": "2M", "horizons": "1"}, environ={"HEADROOM_TRAINING_ESTIMATE": "null"})
    (study,) = plan.make(settings, [worker(24)]).studies
    assert study.refusal is None
    assert study.footprint_bytes is None
    assert study.to_json()["footprint_bytes"] is None


def test_the_plan_is_json() -> None:
    """The same numbers for programs: bytes as integers with the unit in the name."""
    data = json.loads(json.dumps(made([worker(24)]).to_json()))
    assert [study["budget"] for study in data["studies"]] == ["2M", "20M", "200M", "2B"]
    assert data["workers"][0]["capacity_bytes"] == int(24 * GIB * 0.9)
    assert data["studies"][3]["refusal"]
    assert data["studies"][0]["footprint_bytes"]["min"] > 300 * MIB


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("no.such.module:f", "training.candidates: cannot find no.such.module:f"),
        ("training.hpo:nothing", "training.candidates: cannot find training.hpo:nothing"),
        ("scheduler:__version__", "is not a function"),
    ],
)
def test_a_function_that_is_not_there_is_one_line(function: str, words: str) -> None:
    """A dotted path that leads nowhere names its key and what was looked for."""
    with pytest.raises(UsageError) as caught:
        made([worker(24)], budgets="2M", **{"training.candidates": function})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_users_own_module_is_found_where_the_command_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file beside the user, not installed anywhere, can give the candidates."""
    source = "def list_them(context):\n    return [{'d_model': 64, 'n_layers': 2, 'n_heads': 2, 'd_ff': 128}]\n"
    (tmp_path / "my_space_for_plan.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    (study,) = made([worker(24)], budgets="2M", **{"training.candidates": "my_space_for_plan:list_them"}).studies
    assert study.fits == 1


def test_further_columns_of_the_data_are_features(tmp_path: Path) -> None:
    """A numeric column more in the user's file is a feature more in every study's context."""
    lines = ["date,open,high,low,close,volume,sentiment"]
    for day in range(900):
        close = 100 + day % 17 + day * 0.01
        date = f"{2000 + day // 336}-{day // 28 % 12 + 1:02d}-{day % 28 + 1:02d}"
        lines.append(f"{date},{close},{close + 1},{close - 1},{close},{1000 + day},{day % 5}")
    data = tmp_path / "bars.csv"
    data.write_text("\n".join(lines) + "\n")
    (study,) = made([worker(24)], budgets="2M", data=str(data)).studies
    assert study.spec.context["n_features"] == 26
    assert (study.spec.context["n_rows"], study.spec.context["n_columns"]) == (900, 7)
    assert study.spec.context["data"] == str(data)
