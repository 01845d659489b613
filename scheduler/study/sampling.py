"""What the training side makes of a proposal: its parameters, the micro-batch that fits, and what it will need.

Covers the functions of the settings as the study calls them. Does not know of trials' states, or of the database.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scheduler.core.correction import correct
from scheduler.model import AskTrial, Correction, Footprint, Form
from scheduler.model.plain import plain

Fit = Callable[[Mapping[str, Any]], "int | None"]
# How the effective batch is cut says nothing of what is learnt: forms of a trial differ in these alone.
CUT = frozenset({"micro_batch", "accumulation_steps"})
# A quarter of the micro-batch: of 16 real trials in 3 GiB the simulated makespan was 146 s as asked, 110 with a half,
# 98 with a quarter, 110 with an eighth.
HALVINGS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Functions:
    """The training's side of sampling (dotted paths of the settings, resolved).

    sample(trial, context, architectures, fit) -> params. micro_batch(params, context, limit_bytes,
    device_limit_bytes=, target_effective_batch=) -> int | None, or None where there is no estimator.
    estimate(params, context) -> {"host_bytes", "device_bytes", "runtime_bytes", "components", "family"}, or None.
    context: the study's, with `runtime_bytes` (what a trial process holds when it is ready) and `environments` (names
    of what it may run in) where workers have said so. What `estimate` returns as runtime_bytes is the part of its
    host_bytes that is this; 0, or nothing, when it does not tell it apart.
    """

    sample: Callable[..., Mapping[str, Any]] | None = None  # None: no trial of the run is sampled here
    micro_batch: Callable[..., int | None] | None = None
    estimate: Callable[..., Mapping[str, Any]] | None = None


class Fits:
    """Which architectures of a study fit into how much, as far as that was asked: where one fits, it fits into more.

    Asking of all eighty for each trial was a fifth of the CPU that a trial takes of the driver.
    """

    def __init__(self) -> None:
        # Of the formula's answer: the runtime in it, and whether all of it is the device's.
        self.smallest: dict[Hashable, tuple[int, bool]] = {}
        self._fits: dict[Hashable, int] = {}  # into so much it did
        self._not: dict[Hashable, int] = {}

    def into(self, limit_bytes: int, key: Hashable, ask: Callable[[], bool]) -> bool:
        """Whether that which `key` names fits."""
        if limit_bytes >= self._fits.get(key, limit_bytes + 1):
            return True
        if limit_bytes <= self._not.get(key, limit_bytes - 1):
            return False
        found = ask()
        (self._fits if found else self._not)[key] = limit_bytes
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The functions, asked for one trial. context: the study's, and where it may run; fits: known of the study."""

    functions: Functions
    context: Mapping[str, Any]
    command: AskTrial
    fits: Fits = field(default_factory=Fits)

    @classmethod
    def of(
        cls, functions: Functions, context: Mapping[str, Any], command: AskTrial, fits: Fits | None = None
    ) -> Sampling:
        """For a trial of a study with this context."""
        runtime_bytes = command.correction.runtime_bytes
        where = {
            **context,
            **({"runtime_bytes": runtime_bytes} if runtime_bytes else {}),
            **({"environments": list(command.environments)} if command.environments else {}),
        }
        return cls(functions=functions, context=where, command=command, fits=fits or Fits())

    def form(self, trial: Any, architectures: Sequence[Mapping[str, Any]], fit: Fit) -> Form:
        """Draw the trial. What it has drawn before stays as it is: only the answer of `fit` may differ."""
        assert self.functions.sample is not None
        # Bounded JSON from here on: what a user's sampler draws (numpy's numbers, say) must travel to the trial.
        params = plain(dict(self.functions.sample(trial, self.context, architectures, fit)))
        return Form(params=params, footprint=self.footprint(params, self.command.correction))

    def smaller(self, asked: Form, trial: Any, architectures: Sequence[Mapping[str, Any]]) -> tuple[Form, ...]:
        """Return forms of the trial that need less memory and train the same: half the micro-batch, and a quarter.

        None where the training side does not say that they are the same: by equal parameters, `effective_batch` among
        them, all but for how that is cut.
        """
        batch, found = asked.params.get("micro_batch"), [asked]
        if self.functions.estimate is None or "effective_batch" not in asked.params or not isinstance(batch, int):
            return ()
        for half in (batch >> times for times in range(1, HALVINGS + 1)):
            if half < 1:
                break
            form = self.form(trial, architectures, lambda _, half=half: half)  # type: ignore[misc]
            differs = {key for key in {*form.params, *asked.params} if form.params.get(key) != asked.params.get(key)}
            if not differs <= CUT or form.footprint.host_bytes >= found[-1].footprint.host_bytes:
                break
            found.append(form)
        return tuple(found[1:])

    def micro_batch(self, params: Mapping[str, Any]) -> int | None:
        """Return the largest whose corrected footprint fits: said to the training side as a limit for its own
        answer."""
        if self.functions.micro_batch is None:
            return self.context.get("target_effective_batch")
        limit, device_limit = self._limits(params)
        return self.functions.micro_batch(
            params,
            self.context,
            limit,
            device_limit_bytes=device_limit,
            target_effective_batch=self.context.get("target_effective_batch", 256),
        )

    def _limits(self, params: Mapping[str, Any], key: Hashable = None) -> tuple[int, int | None]:
        """Return what the answer of the formula may be at most, on the host and on its device. key: names the params
        for a second time."""
        limit, device_limit = self.command.limit_bytes, self.command.device_limit_bytes
        if self.functions.estimate is None:
            return limit, device_limit
        if (known := self.fits.smallest.get(key)) is None:
            smallest = self.functions.estimate({**params, "micro_batch": 1}, self.context)
            known = int(smallest.get("runtime_bytes", 0)), smallest.get("device_bytes") == smallest["host_bytes"]
            if key is not None:
                self.fits.smallest[key] = known
        runtime_bytes, is_unified = known
        limit = self.command.correction.largest_prior(limit, runtime_bytes)
        if device_limit is not None and is_unified:
            device_limit = self.command.correction.largest_prior(device_limit, runtime_bytes)
        return limit, device_limit

    def footprint(self, params: Mapping[str, Any], correction: Correction) -> Footprint:
        """Return what it will need, corrected."""
        if self.functions.estimate is None:
            return Footprint.unknown()
        estimate = self.functions.estimate(params, self.context)
        prior = Footprint(
            host_bytes=int(estimate["host_bytes"]),
            device_bytes=int(estimate.get("device_bytes", 0)),
            runtime_bytes=int(estimate.get("runtime_bytes", 0)),
            components=dict(estimate.get("components", {})),
        )
        return correct(prior, correction)

    def family(self, params: Mapping[str, Any]) -> str:
        """Return the name of what shares one correction."""
        if self.functions.estimate is None:
            return f"unknown/{self.context.get('device', 'cpu')}"
        return str(self.functions.estimate(params, self.context)["family"])

    def fitting(
        self, architectures: Sequence[Mapping[str, Any]], params: Mapping[str, Any] | None = None
    ) -> list[Mapping[str, Any]]:
        """Return the architectures that fit with these other parameters (or none), each with its index."""
        indexed: list[Mapping[str, Any]] = [
            {"architecture": index, **architecture} for index, architecture in enumerate(architectures)
        ]
        if self.functions.micro_batch is None:
            return indexed
        if params is not None:
            return [each for each in indexed if self.micro_batch({**params, **each})]
        where = self.command.environments, self.command.correction.runtime_bytes
        return [each for each in indexed if self._fits(each, *where)]

    def _fits(self, architecture: Mapping[str, Any], *where: Any) -> bool:
        key = (architecture["architecture"], *where)
        limit, device_limit = self._limits(architecture, key)
        return self.fits.into(limit, (device_limit, *key), lambda: bool(self.micro_batch(architecture)))


def predicted(footprint: Footprint) -> dict[str, Any]:
    """Return the attributes that say what a trial was predicted to need."""
    return {
        "footprint.predicted_bytes": footprint.host_bytes if footprint.is_known else None,
        "footprint.prior_bytes": footprint.prior_bytes or None,
        "footprint.prior_runtime_bytes": footprint.runtime_bytes or None,
    }
