"""The watchdog's policy on a simulated clock: verdicts, the host's level, who is killed and who is not, and replays."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.model import ExitReason, Pressure
from scheduler.model.samples import HostMemory, HostSample, TreeSample, TrialSample, host_sample_from_json, to_json
from scheduler.watchdog.policy.eviction import Decision, Evaluator, Over, State, Thresholds
from scheduler.watchdog.watchdog import main, replay

GIB = 2**30
MIB = 2**20
TRACES = Path(__file__).parents[1] / "traces"


def memory(at: float = 0.0, free: float = 0.5, **more: Any) -> HostMemory:
    """A 100 GiB Linux host without swap, `free` of it available."""
    fields: dict[str, Any] = {
        "total_bytes": 100 * GIB,
        "limit_bytes": 100 * GIB,
        "available_bytes": int(free * 100 * GIB),
        "swap_total_bytes": 0,
        "swap_free_bytes": 0,
        "paging_bytes": 0,
        "psi_some_avg10": 0.0,
        "psi_full_avg10": 0.0,
        "psi_full_avg60": 0.0,
    }
    return HostMemory(at=at, **{**fields, **more})


def trial(number: int = 0, *, held: int | None = 10 * GIB, cpu_s: float | None = 0.0, **more: Any) -> TrialSample:
    """A trial that has ticked at 0 and holds 10 GiB; `tree_…` go to its tree."""
    tree = {key[5:]: more.pop(key) for key in list(more) if key.startswith("tree_")}
    sample = TreeSample(
        **{
            "footprint_bytes": held,
            "swap_bytes": 0,
            "cpu_s": cpu_s,
            "io_bytes": 0,
            "major_faults": 0,
            "states": "S",
            "exact": True,
            "members": ((100 + number, 1.0),),
            **tree,
        }
    )
    fields: dict[str, Any] = {"launched": 0.0, "ticked_at": 0.0, "tree": sample}
    return TrialSample(attempt=f"s/{number}/1", pid=100 + number, start_time=1.0, **{**fields, **more})


def run(
    evaluator: Evaluator,
    until: float,
    *,
    start: float = 0.0,
    step: float = 5.0,
    host: Callable[[float], HostMemory] = memory,
    trials: Callable[[float], list[TrialSample]] = lambda at: [],
    stop_at_kill: bool = True,
) -> list[Decision]:
    """Feed samples at even steps."""
    decisions, at = [], start
    while at <= until:
        sample = HostSample(at=at, interval_s=step, host=host(at), trials=tuple(trials(at)), suspended_s=0.0)
        decisions.append(evaluator.observe(sample))
        if decisions[-1].kill is not None and stop_at_kill:
            break
        at += step
    return decisions


def ours(name: str, **more: Any) -> Callable[[float], HostMemory]:
    """`memory` with fixed fields, `at` filled in."""
    return lambda at: memory(at, **more)


# -- stalled --------------------------------------------------------------------------------------------------------


def test_no_cpu_and_no_tick_for_ten_minutes_is_stalled() -> None:
    """The kill comes at the limit, not before, and names the rule, the numbers and the first symptom."""
    decisions = run(Evaluator(), 2000.0, trials=lambda at: [trial(), trial(1, cpu_s=at, ticked_at=at)])
    last = decisions[-1]
    assert last.kill is not None and last.kill.victim.attempt == "s/0/1"
    assert 600.0 <= last.at <= 610.0
    assert (last.kill.rule, last.kill.reason, last.kill.grace_s, last.kill.since) == (
        "stalled",
        ExitReason.STALLED,
        15.0,
        0.0,
    )
    assert [c["why"][:7] for c in last.kill.candidates] == ["chosen:", "healthy"]


@pytest.mark.parametrize(
    ("name", "alive"),
    [
        ("ticks", lambda at: trial(ticked_at=at - at % 60)),
        ("cpu", lambda at: trial(cpu_s=0.02 * at)),
        ("short bursts of cpu", lambda at: trial(cpu_s=2.0 * (at // 300))),
        ("slow download", lambda at: trial(tree_io_bytes=int(70 * 1024 * at))),
        ("paused", lambda at: trial(tree_states="T")),
        ("frozen", lambda at: trial(tree_states="D", tree_frozen=True)),
        ("children come and go", lambda at: trial(cpu_s=5.0 if at % 300 < 150 else 4.0)),
        ("cpu unreadable", lambda at: trial(cpu_s=None)),
        ("tree unreadable", lambda at: dataclasses.replace(trial(), tree=None)),
    ],
)
def test_not_stalled(name: str, alive: Callable[[float], TrialSample]) -> None:
    """Whatever shows life, is a pause, or could not be measured keeps a trial alive for hours."""
    decisions = run(Evaluator(), 2 * 3600.0, trials=lambda at: [alive(at)])
    assert all(d.kill is None for d in decisions), name


def just_one(at: float, **fields: Any) -> list[TrialSample]:
    """The same trial at every instant."""
    return [trial(**fields)]


def test_first_tick_and_devices_get_the_longer_limit() -> None:
    """Before its first tick (import, compile) and on a device a trial has half an hour."""
    cases: list[dict[str, Any]] = [{"ticked_at": None}, {"uses_device": True}]
    for more in cases:
        last = run(Evaluator(), 4000.0, trials=functools.partial(just_one, **more))[-1]
        assert last.kill is not None and 1800.0 <= last.at <= 1840.0


def test_half_way_is_suspect() -> None:
    """At half of the limit a trial is suspect, so that it can be logged before it is killed."""
    states = {d.at: d.verdicts[0].state for d in run(Evaluator(), 500.0, trials=lambda at: [trial()])}
    assert states[290.0] is State.QUIET and states[305.0] is State.SUSPECT


def test_unreadable_samples_lose_nothing() -> None:
    """Counters are cumulative: with every second sample missing, a stall is found and work is seen."""

    def flaky(cpu: float) -> Callable[[float], list[TrialSample]]:
        return lambda at: [dataclasses.replace(t := trial(cpu_s=cpu * at), tree=None if at % 10 else t.tree)]

    assert run(Evaluator(), 2000.0, trials=flaky(0.0))[-1].kill is not None
    assert all(d.kill is None for d in run(Evaluator(), 4000.0, trials=flaky(0.05)))


@pytest.mark.parametrize("kind", ["late sample", "suspend"])
def test_gap_drops_the_windows(kind: str) -> None:
    """After a starved watchdog or a sleeping machine the ten minutes start anew."""
    evaluator = Evaluator()
    run(evaluator, 595.0, trials=lambda at: [trial()])
    later, slept = (1200.0, 0.0) if kind == "late sample" else (600.0, 519.0)
    sample = HostSample(at=later, interval_s=5.0, host=memory(later), trials=(trial(),), suspended_s=slept)
    decision = evaluator.observe(sample)
    assert decision.gap and decision.kill is None
    samples = [dataclasses.replace(sample, at=later + 5.0 * i, host=memory(later + 5.0 * i)) for i in range(1, 120)]
    assert all(evaluator.observe(each).kill is None for each in samples)


def test_orphan_is_killed_as_lost() -> None:
    """A trial whose agent is gone is nobody's: it is ended with the reason `lost`, which is not its fault."""
    decisions = run(Evaluator(), 100.0, trials=lambda at: [trial(ticked_at=at, cpu_s=at, owner_gone=at > 10)])
    kill = decisions[-1].kill
    assert kill is not None and (kill.rule, kill.reason) == ("orphaned", ExitReason.LOST)
    assert 40.0 <= decisions[-1].at <= 50.0


# -- thrashing ------------------------------------------------------------------------------------------------------


def swapping(at: float) -> HostMemory:
    """A host with swap that pages 20 MiB/s, with memory left."""
    total, free = 50 * GIB, 30 * GIB
    return memory(at, 0.3, swap_total_bytes=total, swap_free_bytes=free, paging_bytes=int(20 * MIB * at))


def test_thrashing_needs_no_zero_cpu() -> None:
    """Paged out, host paging, no tick for ten minutes: evicted although it burns CPU in the kernel."""
    decisions = run(
        Evaluator(), 2000.0, host=swapping, trials=lambda at: [trial(cpu_s=0.9 * at, tree_swap_bytes=5 * GIB)]
    )
    kill = decisions[-1].kill
    assert kill is not None and (kill.rule, kill.reason) == ("thrashing", ExitReason.EVICTED)
    assert 600.0 <= decisions[-1].at <= 620.0


@pytest.mark.parametrize(
    ("name", "host", "one"),
    [
        ("it ticks", swapping, lambda at: trial(cpu_s=at, ticked_at=at - at % 120, tree_swap_bytes=5 * GIB)),
        ("old swap", lambda at: swapping(0.0).__class__(**{**to_json(swapping(0.0)), "at": at}),
         lambda at: trial(cpu_s=at, tree_swap_bytes=5 * GIB)),
        ("others page", swapping, lambda at: trial(cpu_s=at, tree_swap_bytes=MIB)),
    ],
)  # fmt: skip
def test_not_thrashing(name: str, host: Any, one: Any) -> None:
    """Progress, swap that merely stays used, or others' paging are no reason."""
    assert all(d.kill is None for d in run(Evaluator(), 7200.0, host=host, trials=lambda at: [one(at)])), name


def test_major_faults_count_as_thrashing() -> None:
    """Without a swap figure (macOS) heavy major faults under a raised pressure level tell the same."""
    host = ours("mac", free=0.2, level=2, swap_total_bytes=4 * GIB, swap_free_bytes=GIB)
    decisions = run(
        Evaluator(),
        2000.0,
        host=host,
        trials=lambda at: [trial(cpu_s=at, tree_swap_bytes=None, tree_major_faults=int(80 * at))],
    )
    assert decisions[-1].kill is not None and decisions[-1].kill.rule == "thrashing"


# -- the host -------------------------------------------------------------------------------------------------------


def healthy(n: int, held: int = 10 * GIB) -> Callable[[float], list[TrialSample]]:
    """n trials that work, launched a minute apart."""
    return lambda at: [trial(i, held=held, cpu_s=at, ticked_at=at, launched=60.0 * i - 3600.0) for i in range(n)]


@pytest.mark.parametrize(
    ("free", "level"),
    [(0.5, Pressure.NORMAL), (0.11, Pressure.NORMAL), (0.09, Pressure.ELEVATED), (0.07, Pressure.SOFT)],
)
def test_levels_without_swap(free: float, level: Pressure) -> None:
    """ELEVATED below 10 %, SOFT at 8 % where there is no swap to warn."""
    decisions = run(Evaluator(), 30.0, step=1.0, host=ours("", free=free), trials=healthy(8), stop_at_kill=False)
    assert decisions[-1].level is level


def test_soft_evicts_one_with_grace_and_hard_without() -> None:
    """SOFT must last 15 s and leaves 10 s of grace; HARD two seconds and none."""
    soft = run(Evaluator(), 60.0, step=1.0, host=ours("", free=0.07), trials=healthy(8))[-1]
    assert soft.kill is not None and soft.kill.grace_s == 10.0 and 11.0 <= soft.at <= 16.0
    hard = run(Evaluator(), 60.0, step=1.0, host=ours("", free=0.03), trials=healthy(8))[-1]
    assert hard.kill is not None and hard.kill.grace_s == 0.0 and hard.at == 2.0
    assert hard.kill.reason is ExitReason.EVICTED


def test_with_swap_low_memory_alone_is_not_soft() -> None:
    """A host with swap at 3 % available that does not page is left alone."""
    host = ours("", free=0.03, swap_total_bytes=50 * GIB, swap_free_bytes=50 * GIB)
    decisions = run(Evaluator(), 300.0, step=1.0, host=host, trials=healthy(8))
    assert decisions[-1].kill is None and decisions[-1].level is Pressure.ELEVATED


def test_our_swap_past_the_threshold_while_paging() -> None:
    """Our trials hold 12 GiB of swap (limit: the smaller of 25 % of swap and 10 % of RAM) and the host pages."""
    swapped = lambda at: [trial(i, held=15 * GIB, cpu_s=at, ticked_at=at, tree_swap_bytes=6 * GIB) for i in (0, 1)]  # noqa: E731
    last = run(Evaluator(), 60.0, step=1.0, host=swapping, trials=swapped)[-1]
    assert last.kill is not None and last.kill.rule == "swap_threshold"
    calm = run(Evaluator(), 600.0, step=1.0, host=lambda at: dataclasses.replace(swapping(0.0), at=at), trials=swapped)
    assert all(d.kill is None for d in calm) and calm[-1].level is Pressure.NORMAL


def test_elevated_ends_with_hysteresis() -> None:
    """Admission opens again only after a minute above 1.25 x the threshold."""

    def free(at: float) -> float:
        return 0.09 if at < 10 else 0.11 if at < 100 else 0.2

    decisions = run(Evaluator(), 300.0, step=1.0, host=lambda at: memory(at, free(at)))
    levels = {d.at: d.level for d in decisions}
    assert levels[99.0] is Pressure.ELEVATED and levels[155.0] is Pressure.ELEVATED
    assert levels[165.0] is Pressure.NORMAL


def test_psi_with_free_memory_says_nothing() -> None:
    """PSI 85 with most memory free (seen with zram) neither closes admission nor kills."""
    host = ours("", free=0.9, psi_some_avg10=95.0, psi_full_avg10=85.0, psi_full_avg60=10.0)
    decisions = run(Evaluator(), 120.0, step=1.0, host=host, trials=healthy(2))
    assert decisions[-1].level is Pressure.NORMAL and decisions[-1].kill is None


def test_host_that_cannot_be_read_is_no_reason_to_kill() -> None:
    """None is not zero: no level from it, no kill."""
    unknown = dict.fromkeys(["total_bytes", "limit_bytes", "available_bytes", "swap_total_bytes", "swap_free_bytes"])
    decisions = run(Evaluator(), 120.0, step=1.0, host=ours("", **unknown), trials=healthy(2))
    assert all(d.kill is None and d.level is Pressure.NORMAL for d in decisions)


# -- victims --------------------------------------------------------------------------------------------------------


def victim(trials: Callable[[float], list[TrialSample]], evaluator: Evaluator | None = None, **host: Any) -> Decision:
    """The decision under HARD pressure that has lasted a while."""
    fields = {"free": 0.03, **host}
    return run(evaluator or Evaluator(), 40.0, step=1.0, host=ours("", **fields), trials=trials)[-1]


def test_least_work_lost_goes_first() -> None:
    """Among healthy trials the youngest dies, and each other one is told why not."""
    kill = victim(healthy(8)).kill
    assert kill is not None and kill.victim.attempt == "s/7/1"
    assert min(c["why"].split(":")[0] for c in kill.candidates) == "chosen"
    assert sum(c["why"].startswith("rank") for c in kill.candidates) == 7


def test_checkpoint_counts_as_saved_work() -> None:
    """An old trial that has just saved loses less than a younger one that never did."""
    trials = lambda at: [t if i else dataclasses.replace(t, saved_at=at) for i, t in enumerate(healthy(8)(at))]  # noqa: E731
    kill = victim(trials).kill
    assert kill is not None and kill.victim.attempt == "s/0/1"


def test_over_its_promise_goes_before_the_young() -> None:
    """The one most over its promise is chosen, once it has been so for 30 s."""
    trials = lambda at: [dataclasses.replace(t, promised_bytes=(7 if i == 2 else 12) * GIB)  # noqa: E731
                         for i, t in enumerate(healthy(8)(at))]  # fmt: skip
    evaluator = Evaluator()
    run(evaluator, 40.0, step=1.0, trials=trials)
    hard = run(evaluator, 60.0, start=41.0, step=1.0, host=ours("", free=0.03), trials=trials)[-1]
    assert hard.kill is not None and hard.kill.victim.attempt == "s/2/1"
    assert hard.kill.evidence["over_bytes"] == 3 * GIB


def test_stalled_goes_before_all() -> None:
    """A stalled trial has nothing to lose, so under pressure it is the victim, whatever the others hold."""
    trials = lambda at: [*healthy(7)(at), trial(9, held=GIB, launched=-9e4)]  # noqa: E731
    evaluator = Evaluator(dataclasses.replace(Thresholds(), stall_after_s=30.0, stall_bucket_s=5.0))
    run(evaluator, 29.0, step=1.0, trials=trials)
    last = run(evaluator, 80.0, start=30.0, step=1.0, host=ours("", free=0.03), trials=trials)[-1]
    assert last.kill is not None and last.kill.victim.attempt == "s/9/1"


@pytest.mark.parametrize("held", [4 * GIB, 2 * GIB])
def test_others_hold_the_memory(held: int) -> None:
    """Ours hold a few per cent of what is used: admission closes with the reason, nobody dies."""
    last = victim(healthy(3, held=held))
    assert last.kill is None and last.held_back == "not_ours"
    assert last.closed_reason is not None and last.closed_reason.startswith("not_ours")


def test_small_or_unknown_trials_are_no_victims() -> None:
    """Killing a tiny trial brings nothing, and one whose memory is unknown is not guessed at."""
    trials = lambda at: [trial(0, held=60 * GIB, cpu_s=at, ticked_at=at, launched=-9e4),  # noqa: E731
                         trial(1, held=17 * MIB, cpu_s=at, ticked_at=at),
                         trial(2, held=None, cpu_s=at, ticked_at=at)]  # fmt: skip
    kill = victim(trials).kill
    assert kill is not None and kill.victim.attempt == "s/0/1"
    whys = {c["attempt"]: c["why"] for c in kill.candidates}
    assert whys["s/1/1"].startswith("too small") and "could not be read" in whys["s/2/1"]


def test_one_at_a_time_with_cool_down_and_breaker() -> None:
    """No order while a kill is under way, none in the 15 s after it, and after three only HARD may kill."""
    evaluator = Evaluator()
    sample = HostSample(at=100.0, interval_s=5.0, host=memory(100.0, 0.03), trials=tuple(healthy(8)(100.0)))
    assert victim(healthy(8), evaluator).kill is not None
    later = [dataclasses.replace(sample, at=a, host=memory(a, 0.03), interval_s=60.0) for a in (41.0, 42.0, 56.0, 57.5)]
    assert evaluator.observe(later[0], busy=True).held_back == "kill_under_way"
    evaluator.kill_started(41.0)
    evaluator.kill_ended(42.0)
    assert evaluator.observe(later[1]).held_back == "cooldown"
    assert evaluator.observe(later[2]).held_back == "cooldown"
    assert evaluator.observe(later[3]).kill is not None
    evaluator.kill_started(58.0)
    evaluator.kill_started(59.0)
    soft = run(evaluator, 200.0, start=60.0, step=1.0, host=ours("", free=0.07), trials=healthy(8))[-1]
    assert soft.kill is None and soft.held_back == "breaker"
    assert soft.closed_reason is not None and soft.closed_reason.startswith("breaker")
    assert (
        run(evaluator, 300.0, start=201.0, step=1.0, host=ours("", free=0.03), trials=healthy(8))[-1].kill is not None
    )


def test_unkillable_closes_the_host_and_is_not_chosen_again() -> None:
    """While a victim cannot die the host is closed; only HARD may take another."""
    evaluator = Evaluator()
    evaluator.unkillable("s/7/1", True)
    soft = run(evaluator, 60.0, step=1.0, host=ours("", free=0.07), trials=healthy(8))[-1]
    assert soft.kill is None and soft.closed_reason == "unkillable: s/7/1"
    hard = run(evaluator, 120.0, start=61.0, step=1.0, host=ours("", free=0.03), trials=healthy(8))[-1]
    assert hard.kill is not None and hard.kill.victim.attempt == "s/6/1"


def test_overshoot_by_steps() -> None:
    """Over: reported after 10 s; far over: killed without pressure, but not on a sum that counts shared pages twice."""

    def grow(held: int, **more: Any) -> Callable[[float], list[TrialSample]]:
        return lambda at: [trial(held=held, promised_bytes=10 * GIB, cpu_s=at, ticked_at=at, **more)]

    last = run(Evaluator(), 100.0, trials=grow(11 * GIB))[-1]
    assert last.kill is None and last.verdicts[0].over is Over.OVER
    assert run(Evaluator(), 100.0, trials=grow(13 * GIB))[-1].verdicts[0].over is Over.FIRST
    kill = run(Evaluator(), 100.0, trials=grow(18 * GIB))[-1].kill
    assert kill is not None and (kill.rule, kill.reason) == ("overshoot", ExitReason.OVERSHOOT)
    two = {"tree_exact": False, "tree_members": ((100, 1.0), (101, 1.0))}
    assert run(Evaluator(), 100.0, trials=grow(18 * GIB, **two))[-1].kill is None
    unsized = lambda at: [trial(held=90 * GIB, promised_bytes=0, cpu_s=at, ticked_at=at)]  # noqa: E731
    assert run(Evaluator(), 100.0, trials=unsized)[-1].kill is None


# -- thresholds and traces ------------------------------------------------------------------------------------------


def test_thresholds_from_a_mapping() -> None:
    """Known keys are taken with the right type, unknown ones ignored, nonsense refused."""
    made = Thresholds.from_mapping({"stall_after_s": 5, "breaker_kills": 2.0, "mode": "on", "from_the_future": 1})
    assert made.stall_after_s == 5.0 and made.breaker_kills == 2
    with pytest.raises(ValueError, match="soon"):
        Thresholds.from_mapping({"stall_after_s": "soon"})


def test_samples_survive_json() -> None:
    """A recorded sample is the sample."""
    sample = HostSample(at=3.0, interval_s=1.0, host=memory(3.0), trials=(trial(), trial(1)), suspended_s=0.5)
    assert host_sample_from_json(json.loads(json.dumps(to_json(sample)))) == sample


def expectations() -> list[Any]:
    """The traces with what their first line says must come out."""
    found = []
    for path in sorted(TRACES.glob("*.jsonl")):
        with open(path) as file:
            found.append(pytest.param(path, json.loads(file.readline()), id=path.stem))
    return found


@pytest.mark.parametrize(("path", "note"), expectations())
def test_replayed_traces(path: Path, note: dict[str, Any]) -> None:
    """Linux and macOS samples lead to the decisions their first line names."""
    decisions = replay(str(path))
    kills = [d.kill for d in decisions if d.kill is not None]
    assert [k.rule for k in kills] == note["kills"]
    assert max(d.level for d in decisions).name == note["highest"]
    assert decisions[-1].level.name == note["last"]
    closed = {(d.closed_reason or "").split(":")[0] for d in decisions} - {""}
    assert closed == set(note.get("closed", []))
    if kills and "victim" in note:
        assert kills[0].victim.attempt == note["victim"]


def test_replay_command(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m scheduler.watchdog --replay FILE` prints each change of mind as a line of JSON."""
    assert main(["--replay", str(TRACES / "macos_swap_growth.jsonl")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["level"] == "NORMAL" and any(line["kill"] for line in lines)
    assert main(["--nonsense"]) == 2


maybe_int = st.none() | st.integers(0, 2**40)
maybe_psi = st.none() | st.floats(0, 100)


@settings(max_examples=60)
@given(st.data())
def test_evaluator_takes_anything(data: st.DataObject) -> None:
    """Whatever could or could not be read, the evaluator does not raise, and kills nobody it cannot name."""
    evaluator, at = Evaluator(), 0.0
    for _ in range(data.draw(st.integers(1, 25))):
        at += data.draw(st.floats(0.05, 700))
        host = HostMemory(
            at=at,
            **{n: data.draw(maybe_int) for n in ("limit_bytes", "available_bytes", "swap_total_bytes", "paging_bytes")},
            swap_free_bytes=data.draw(maybe_int),
            psi_full_avg10=data.draw(maybe_psi),
            psi_full_avg60=data.draw(maybe_psi),
            level=data.draw(st.sampled_from([None, 1, 2, 4])),
        )
        trees = [
            data.draw(
                st.none()
                | st.builds(
                    TreeSample,
                    footprint_bytes=maybe_int,
                    swap_bytes=maybe_int,
                    cpu_s=st.none() | st.floats(0, 1e6),
                    io_bytes=maybe_int,
                    major_faults=maybe_int,
                    states=st.sampled_from(["S", "T", "Z", "SD", ""]),
                )
            )
            for _ in range(2)
        ]
        trials = tuple(dataclasses.replace(trial(i, promised_bytes=GIB), tree=tree) for i, tree in enumerate(trees))
        sample = HostSample(at=at, interval_s=data.draw(st.floats(0.1, 700)), host=host, trials=trials)
        decision = evaluator.observe(sample)
        if decision.kill is not None:
            assert decision.kill.victim in trials
            assert decision.kill.rule
