"""The kill: one victim, from a durable intent to its memory being back.

INTENT -> RECHECK -> TERM (+CONT) -> grace -> KILL, the whole tree, again until nobody is left -> DEAD -> MEMORY BACK ->
RELEASED, then the evaluator's cool-down. Each step is in the journal before what it announces is done, so a watchdog
that takes over in the middle knows what may have happened. Escalation is by time. Whom to kill is `policy.eviction`.
"""

from __future__ import annotations

import enum
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from scheduler.host.attempt_folder import AttemptFolder
from scheduler.host.registry import HostRegistry, KillStory, boot_id
from scheduler.host.signals import Identity, StackRequest, failpoint, release_memory, send_all
from scheduler.model import Pressure
from scheduler.model.samples import HostMemory
from scheduler.watchdog.policy.eviction import Decision, Evaluator, HostSample, KillOrder

STACK_WAIT_S = 0.5  # faulthandler answers within milliseconds unless the process is swapped out
MEMORY_TAKEN_S = 1.0
_SMALL_BYTES = 64 << 20
_RELEASE_AFTER_S = 10.0


class Phase(enum.Enum):
    INTENT = "intent"
    TERM = "term"
    KILL = "kill"
    DEAD = "dead"
    RELEASED = "released"


class HostView(Protocol):
    """What the executor must be able to see; `watchdog.Sampler` on a real host."""

    def sample(self, now: float) -> HostSample: ...

    def host(self, now: float) -> HostMemory: ...

    def start_time(self, pid: int) -> float | None: ...

    def living(self, pid: int, start: float, known: set[Identity]) -> set[Identity]: ...


class Kill:
    """One kill under way. `step` is called often and never blocks for long."""

    def __init__(self, registry: HostRegistry, view: HostView, evaluator: Evaluator, log: Callable[..., None]) -> None:
        self._registry, self._view, self._evaluator, self._log = registry, view, evaluator, log
        self.kill_id = ""
        self.attempt = ""
        self.root: Identity = (0, 0.0)
        self.known: set[Identity] = set()
        self.phase = Phase.INTENT
        self.order: KillOrder | None = None
        self.stuck = False
        self._since = self._at = 0.0
        self._grace_s = 0.0
        self._footprint = self._lasting = 0
        self._free_before: int | None = None
        self._folder: AttemptFolder | None = None
        self._hard = False
        self._passes = 0
        self._released = False
        self._stack: StackRequest | None = None
        self._story: dict[str, Any] = {}

    @property
    def over(self) -> bool:
        return self.phase is Phase.RELEASED

    # -- beginnings ---------------------------------------------------------------------------------------------

    def begin(self, order: KillOrder, folder: AttemptFolder, slug: str, sample: HostSample, past: list[Any]) -> bool:
        """Make the intent durable; False when that failed, and then nothing happens (the journal is the token)."""
        now, victim = sample.at, order.victim
        self.order, self._since, self._grace_s, self._folder = order, order.since, order.grace_s, folder
        self.attempt, self.root = victim.attempt, (victim.pid, victim.start_time)
        self.kill_id = f"{slug}.{victim.pid}.{int(now * 1000)}"
        self.known = set(victim.tree.members) if victim.tree else set()
        self._footprint = (victim.tree.footprint_bytes if victim.tree else None) or 0
        self._lasting = victim.tree.lasting_bytes if victim.tree else 0
        self._hard = order.level is Pressure.HARD
        self._free_before = _free(sample.host)
        intent = {
            "attempt": victim.attempt,
            "pid": victim.pid,
            "start_time": victim.start_time,
            "boot_id": boot_id(),
            "rule": order.rule,
            "reason": order.reason.value,
            "level": order.level.name,
            "since": round(order.since, 3),
            "grace_s": order.grace_s,
            "folder": os.fspath(folder.path),
            "footprint_bytes": self._footprint,
            "lasting_bytes": self._lasting,
            "promised_bytes": victim.promised_bytes,
            "within_promise": order.evidence.get("within_promise"),
            "free_before_bytes": self._free_before,
            "evidence": dict(order.evidence),
            "members": sorted(self.known),
        }
        try:
            # Only HARD may use the last room on a full disk: without a durable intent nobody is killed.
            self._record("intent", now, **intent)
        except OSError as error:
            self._log("kill.not_durable", attempt=self.attempt, error=str(error))
            return False
        self._story.update(candidates=list(order.candidates), samples=past)
        self._log("kill.intent", kill_id=self.kill_id, attempt=self.attempt, pid=victim.pid, rule=order.rule)
        failpoint("intent")
        if not self._hard:
            self._stack = StackRequest(self.root, folder.log, self._view.start_time)
        self._at = now + (STACK_WAIT_S if self._stack is not None and self._stack.asked else 0.0)
        self._write_story()
        return True

    def resume(self, story: KillStory, now: float) -> None:
        """Take over a kill that another watchdog left: called off before any signal, else carried on."""
        first = story.records[0]
        self.kill_id, self.attempt, self.root = story.kill_id, story.attempt, (story.pid, story.start_time)
        self._since, self._grace_s = float(first.get("since", now)), 0.0
        self._footprint, self._free_before = int(first.get("footprint_bytes", 0)), first.get("free_before_bytes")
        self._lasting = int(first.get("lasting_bytes", 0))
        self._folder = AttemptFolder(Path(where)) if (where := first.get("folder")) else None
        self._hard = first.get("level") == "HARD"
        for line in story.records:
            self.known.update((int(pid), float(start)) for pid, start in line.get("members", ()))
        told = {} if self._folder is None else self._folder.kill_story()
        self._story = {k: told[k] for k in ("candidates", "samples", "stack", "kernel") if k in told}
        self._log("kill.resumed", kill_id=self.kill_id, attempt=self.attempt, last=story.steps[-1][0])
        if story.boot_id != boot_id():
            self.phase, self._at = Phase.DEAD, now
            self._try_record("dead", now, other_boot=True)
            self._release(now, gained=None, why="the machine was started again")
        elif not story.signalled:
            self._abort(now, "its watchdog ended before any signal: judged again from new samples")
        elif story.has("dead"):
            self.phase, self._at = Phase.DEAD, now
        else:
            self.phase, self._at = Phase.KILL, now
            self.stuck = story.has("unkillable")
            if self.stuck:
                self._evaluator.unkillable(self.attempt, True)
            if not story.has("kill"):
                self._try_record("kill", now, members=sorted(self.known), resumed=True)

    # -- steps --------------------------------------------------------------------------------------------------

    def step(self, now: float) -> Decision | None:
        """Do what is due; returns the decision of a fresh look, when one was taken."""
        if self.phase is Phase.INTENT and now >= self._at:
            try:
                return self._recheck(now)
            except OSError as error:  # the journal takes no more: nothing was sent yet, so nothing is
                self._abort(now, f"the step could not be made durable: {error}")
        if self.phase is Phase.TERM:
            self._await_exit(now)
        elif self.phase is Phase.KILL:
            self._kill(now)
        elif self.phase is Phase.DEAD:
            self._await_memory(now)
        return None

    def _recheck(self, now: float) -> Decision | None:
        if self._stack is not None:
            self._story.update(stack=self._stack.answer(), kernel=self._stack.kernel)
        failpoint("recheck")
        decision = self._evaluator.observe(self._view.sample(now))
        if (why := self._no_longer(decision)) is not None:
            self._abort(now, why)
            return decision
        assert decision.kill is not None
        self._grace_s = decision.kill.grace_s  # SOFT may have become HARD meanwhile
        self._record("recheck", now, evidence=dict(decision.kill.evidence))
        if self._grace_s <= 0.0:
            self._start_kill(now)
            return decision
        self._spread()
        self._record("term", now, members=sorted(self.known))
        self._evaluator.kill_started(now)
        failpoint("term")
        send_all(self._targets(), signal.SIGTERM, self._view.start_time)
        send_all(self._targets(), signal.SIGCONT, self._view.start_time)  # a stopped process does not die of SIGTERM
        failpoint("term_sent")
        self.phase, self._at = Phase.TERM, now
        return decision

    def _no_longer(self, decision: Decision) -> str | None:
        """Why the kill is not due any more, None if it is: the last look before the first signal."""
        if self._view.start_time(self.root[0]) != self.root[1]:
            return "its process has ended by itself"
        if decision.kill is None:
            return f"the reason is gone ({decision.held_back or 'recovered'})"
        victim = decision.kill.victim
        if (victim.pid, victim.start_time) != self.root:
            return f"another trial comes first now: {victim.attempt}"
        return None

    def _spread(self) -> set[Identity]:
        """Who of the tree lives now; whoever was ever seen in it stays known."""
        living = self._view.living(*self.root, self.known)
        self.known |= living
        return living

    def _targets(self) -> list[Identity]:
        return sorted(self.known | {self.root})

    def _await_exit(self, now: float) -> None:
        if not self._spread():
            self._dead(now)
        elif now - self._at >= self._grace_s:
            self._start_kill(now)

    def _start_kill(self, now: float) -> None:
        self._spread()
        if self.phase is Phase.TERM:
            self._try_record("kill", now, members=sorted(self.known))
        else:
            self._record("kill", now, members=sorted(self.known))
            self._evaluator.kill_started(now)
        failpoint("kill")
        self.phase, self._at = Phase.KILL, now
        self._kill(now)
        failpoint("kill_sent")

    def _kill(self, now: float) -> None:
        # Stop all first: what cannot run cannot fork, so the second look is complete.
        send_all(self._spread() | {self.root}, signal.SIGSTOP, self._view.start_time)
        living = self._spread()
        if not living:
            self._dead(now)
            return
        send_all(living, signal.SIGKILL, self._view.start_time)
        self._passes += 1
        waited = now - self._at
        if waited >= _RELEASE_AFTER_S and not self._released:
            self._released = True
            done = [release_memory(identity, self._view.start_time) for identity in living]
            self._log("kill.memory_released_early", kill_id=self.kill_id, processes=sum(done))
        if waited >= self._evaluator.thresholds.unkillable_after_s and not self.stuck:
            self.stuck = True
            self._evaluator.unkillable(self.attempt, True)
            self._try_record("unkillable", now, members=sorted(living))
            self._log("kill.unkillable", kill_id=self.kill_id, attempt=self.attempt, processes=len(living))
            self._write_story()

    def _dead(self, now: float) -> None:
        if self.stuck:
            self._evaluator.unkillable(self.attempt, False)
            self.stuck = False
        self._try_record("dead", now, seconds=round(now - self._since, 3), passes=self._passes)
        failpoint("dead")
        self.phase, self._at = Phase.DEAD, now
        self._await_memory(now)

    def _await_memory(self, now: float) -> None:
        t = self._evaluator.thresholds
        free = _free(self._view.host(now))
        gained = None if free is None or self._free_before is None else free - self._free_before
        expected = self._footprint - self._lasting
        back = gained is not None and gained >= t.memory_back_share * expected
        # Nothing worth waiting for: what it held stays, in files on a tmpfs that have a name.
        back = back or (self._lasting > 0 and expected <= _SMALL_BYTES and now - self._at >= MEMORY_TAKEN_S)
        # What a dead process held is free within the second. If the host still runs out, somebody else takes it, and
        # the token must not be held meanwhile: it may be another of ours.
        taken = now - self._at >= MEMORY_TAKEN_S and self._evaluator.host.left_s is not None
        taken = taken and (self._evaluator.host.left_s or 0.0) <= t.run_out_s
        if back or taken or now - self._at >= t.memory_back_after_s:
            self._try_record("memory_back", now, gained_bytes=gained, in_time=back)
            failpoint("memory_back")
            why = "memory is back" if back else "others take it" if taken else "waited long enough"
            self._release(now, gained, why)

    def _release(self, now: float, gained: int | None, why: str) -> None:
        # The file first: whoever is told that the kill is over finds its story complete.
        self._write_story(step="released", at=round(now, 3), gained_bytes=gained, why=why)
        self._try_record("released", now, gained_bytes=gained, why=why)
        failpoint("released")
        self.phase = Phase.RELEASED
        self._evaluator.kill_ended(now)
        self._log("kill.released", kill_id=self.kill_id, attempt=self.attempt, gained_bytes=gained, why=why)

    def _abort(self, now: float, why: str) -> None:
        self._write_story(step="aborted", at=round(now, 3), why=why)
        self._try_record("aborted", now, why=why)
        self.phase = Phase.RELEASED
        self._log("kill.aborted", kill_id=self.kill_id, attempt=self.attempt, why=why)

    # -- records ------------------------------------------------------------------------------------------------

    def _record(self, step: str, now: float, **data: Any) -> None:
        self._registry.record(self.kill_id, step, now, last_resort=self._hard, **data)

    def _try_record(self, step: str, now: float, **data: Any) -> None:
        """After the first signal there is no way back: a full disk must not hold the memory."""
        try:
            self._record(step, now, **data)
        except OSError as error:
            self._log("kill.not_recorded", kill_id=self.kill_id, step=step, error=str(error))

    def _write_story(self, **last: Any) -> None:
        """Write the whole story into the attempt's folder, for people. last: a step that is about to be recorded."""
        story = next((s for s in reversed(self._registry.kills()) if s.kill_id == self.kill_id), None)
        if story is None or self._folder is None:
            return
        records = (*story.records, last) if last else story.records
        write_story(self._folder, records, self._evaluator, self._story, self._log)


def write_story(
    folder: AttemptFolder,
    records: tuple[Mapping[str, Any], ...],
    evaluator: Evaluator,
    more: Mapping[str, Any],
    log: Callable[..., None],
    *,
    would_have: bool = False,
) -> None:
    """Write `records` (the first is the intent) with thresholds, samples and candidates into the attempt's folder."""
    thresholds = {n: getattr(evaluator.thresholds, n) for n in evaluator.thresholds.__dataclass_fields__}
    first = {k: v for k, v in records[0].items() if k not in ("step", "at")}
    data = {**first, "steps": [dict(r) for r in records], "thresholds": thresholds, **more}
    try:
        folder.write_kill(data, would_have=would_have)
    except OSError as error:
        log("kill.story_not_written", path=str(folder.path), error=str(error))


def _free(host: HostMemory) -> int | None:
    """Return what may still be taken, swap included: a victim's swapped part comes back there."""
    if host.available_bytes is None:
        return None
    return host.available_bytes + (host.swap_free_bytes or 0)
