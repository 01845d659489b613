"""Settings: resolved once, at the edge, from files, environment and arguments into one frozen value.

Covers every key there is, its type, range and default, and the studies that follow from them. How they are read
is `loading`; what of it fits the machine is `plan`; the folder of a run is `run_folder`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints
from urllib.parse import quote

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    create_model,
    field_validator,
)

from scheduler import masking
from scheduler.core.admission import MemoryBudget, parse_memory_budget
from scheduler.host.facts import cores
from scheduler.model import UsageError
from scheduler.settings import command
from scheduler.settings.study_keys import Frozen, Number, StudyKeys, Whole, listed
from scheduler.units import GIB, MIB, parse_duration, parse_size
from scheduler.watchdog.policy.thresholds import Thresholds

Value = TypeVar("Value")
PRUNERS = ("median", "hyperband", "none")  # of the built-in training
# What an objective's run has no use for, and nobody should look for in its settings.
BUILT_IN = StudyKeys.model_fields.keys() - {"trials", "seed"} | {"hpo", "warm_start"}


def configs_root() -> Path:
    """Where the shipped configuration files are: configs/ of the checkout, else inside the installed package."""
    here = Path(__file__).resolve().parents[1]
    checkout = here.parent / "configs"
    return checkout if checkout.is_dir() else here / "configs"


def _parsed(parse: Callable[[str], Value]) -> Callable[[Any], Value]:
    """Return a validator that reads a text or number as `parse` does, and leaves what is read already."""

    def read(value: Any) -> Value:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError("must be a text or a number")
        try:
            return parse(str(value))
        except UsageError as error:
            # The parser's own line starts with the key's name and the value, which the error line already has.
            raise ValueError(re.sub(r"^\w+ '[^']*' ", "", str(error))) from None

    return read


def _word(value: Any) -> Any:
    """YAML 1.1 reads on/off as true/false and null where the word `none` may be meant."""
    if value is None:
        return "none"
    return ("on" if value else "off") if isinstance(value, bool) else value


def _size_or_function(value: Any) -> Any:
    """Read a size, and leave the path of a function as it is: that is called with each trial's parameters."""
    if isinstance(value, str) and ":" in value:
        return value
    if not (size := _parsed(parse_size)(value)):
        raise ValueError("must be more than 0")
    if size < MIB:  # no process is that small: 3 of what?
        raise ValueError(f"is {size} bytes: write {value}GiB or {value}MiB" if str(value).isdigit() else "is too small")
    return size


Size = Annotated[int, BeforeValidator(_parsed(parse_size))]  # "1GiB" or a number of bytes
Seconds = Annotated[float, BeforeValidator(_parsed(parse_duration))]  # "12h" or a number of seconds
OwnSize = Annotated[int | str, BeforeValidator(_size_or_function)]  # of a trial: bytes, or module:function
Budget = Annotated[
    MemoryBudget,
    BeforeValidator(_parsed(parse_memory_budget)),
    PlainSerializer(lambda budget: budget.text, return_type=str),
]


class Training(Frozen):
    """The training side by dotted path, so that a user's own function can take its place."""

    objective: str = "training.hpo:objective"
    sample: str = "training.hpo:sample"
    candidates: str | None = "training.hpo:candidates"
    estimate: str | None = "training.footprint:estimate"
    micro_batch: str | None = "training.batch_size:micro_batch"
    check_data: str | None = "training.data:check"
    preload: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*$")], ...] | None = None
    fork: bool = True

    @property
    def functions(self) -> dict[str, str | None]:
        """The dotted paths by key."""
        return self.model_dump(exclude={"preload", "fork"})

    @property
    def is_own(self) -> bool:
        """Whether what draws or sizes a trial is the user's: it may fail in ways that nobody has tried."""
        built_in = Training().functions
        return any(self.functions[key] != built_in[key] for key in ("sample", "estimate", "micro_batch"))

    @field_validator("objective", "sample", "candidates", "estimate", "micro_batch", "check_data")
    @classmethod
    def _dotted(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", value):
            raise ValueError("must look like package.module:function")
        return value


class BeginWith(Frozen):
    """The first trial of a new study. params: as they were suggested. checkpoint: what it goes on from."""

    params: dict[str, Any]
    checkpoint: Path | None = None


def _watchdog_model() -> type[BaseModel]:
    """Make the watchdog's keys from `policy.thresholds.Thresholds` so that nothing is typed twice."""
    hints = get_type_hints(Thresholds)
    fields: dict[str, Any] = {}
    for each in dataclasses.fields(Thresholds):
        hint = hints[each.name]
        if hint is float:
            share = "_share" in each.name
            hint = Annotated[Number, Field(ge=0, le=1)] if share else Annotated[Number, Field(ge=0)]
        elif hint is int:
            hint = Annotated[Whole, Field(ge=0)]
        fields[each.name] = (hint, each.default)
    fields["mode"] = (Annotated[Literal["on", "observe", "off"], BeforeValidator(_word)], "on")
    return create_model("Watchdog", __base__=Frozen, __doc__="The watchdog's mode and thresholds.", **fields)


if TYPE_CHECKING:

    class Watchdog(Frozen):
        """What `_watchdog_model` makes, for the type checker; every field of `Thresholds` is an attribute."""

        mode: Literal["on", "observe", "off"] = "on"

        def __getattr__(self, threshold: str) -> float: ...
else:
    Watchdog = _watchdog_model()


class Settings(StudyKeys):
    """Every setting of a batch, resolved. `experiments`: one per --experiment file, none without any."""

    name: str = ""
    memory_budget: Budget = parse_memory_budget("90%")
    reserve_bytes: Size = GIB
    slots: Annotated[Whole, Field(ge=1, le=4096)] | None = None
    threads: Annotated[Whole, Field(ge=1, le=1024)] | None = None
    storage: str | None = None
    cluster: str | None = None
    tls_ca_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    objective: str | None = None
    command: str | None = None
    space: Path | None = None
    metric: str | None = None
    study: str | None = None
    direction: Annotated[tuple[Literal["minimize", "maximize"], ...], BeforeValidator(listed), Field(min_length=1)] = (
        "minimize",
    )
    sampler: str = "tpe"
    memory: OwnSize | None = None
    pruner: Annotated[str, BeforeValidator(_word)] = "median"
    warm_start: Annotated[Whole, Field(ge=0, le=100)] = 3
    begin_with: BeginWith | None = None
    device: Literal["auto", "cpu", "mps", "cuda"] = "auto"
    allocator: Literal["auto", "default", "glibc-stack"] = "auto"
    max_retries: Annotated[Whole, Field(ge=0, le=100)] = 3
    max_consecutive_failures: Annotated[Whole, Field(ge=1)] = 5
    runs_dir: Path = Path("runs")
    hpo: Path = Path("hpo/architectural_search.yaml")
    training: Training = Training()
    watchdog: Watchdog = Watchdog()
    trial_timeout: Seconds | None = None
    timeout: Seconds | None = None
    checkpoint_every_minutes: Annotated[Number, Field(gt=0)] | None = None
    drain_timeout_s: Annotated[Number, Field(gt=0)] = 20.0
    keep_checkpoints: Literal["best", "all", "none"] = "best"
    lease_s: Annotated[Number, Field(ge=1)] = 300.0
    away_timeout_s: Annotated[Number, Field(ge=5)] = 600.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    dashboard: str | None = ":8787"
    on_kill: str | None = None
    on_end: str | None = None

    @field_validator("objective")
    @classmethod
    def _function(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if value.startswith(command.HANDED_OVER):
            return value
        where, _, name = value.rpartition(":")
        if not where or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
            raise ValueError("must be FILE.py:NAME or package.module:NAME")
        return f"{os.path.abspath(os.path.expanduser(where))}:{name}" if where.endswith(".py") else value

    @field_validator("study")
    @classmethod
    def _study_name(cls, value: str | None) -> str | None:
        if value is not None and (not 0 < len(value) <= 200 or not value.isprintable() or "/" in value):
            raise ValueError("must be 1 to 200 printable characters without a slash")
        return value

    @field_validator("pruner")
    @classmethod
    def _pruner(cls, value: str) -> str:
        if value not in (*PRUNERS, "halving") and ":" not in value:
            raise ValueError(
                "must be one of median, hyperband or none; with --objective also halving or module:function"
            )
        return value

    @field_validator("name")
    @classmethod
    def _file_name(cls, value: str) -> str:
        if value and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", value):
            raise ValueError("must be letters, digits, dots, dashes and underscores, at most 80 (it names a folder)")
        return value

    @field_validator("cluster")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"(tcp|tls|ucx|ws|wss)://\S+:\d+", value):
            raise ValueError("must be an address such as tcp://host:8786")
        return value

    @field_validator("storage")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if "://" not in value:
            raise ValueError("must be a database URL such as sqlite:////abs/study.db or postgresql://host/name")
        if not masking.is_clear(value):
            raise ValueError(
                "cannot be read with certainty: in user and password write @ as %40, / as %2F, ? as %3F and : as %3A"
            )
        if f":{masking.MASK}@" in value:
            raise ValueError("has its password left out (***): give the whole URL, or one without it and PGPASSWORD")
        return value

    @field_validator("dashboard", mode="before")
    @classmethod
    def _dashboard(cls, value: Any) -> Any:
        if value is None or value is False or value == "off":
            return None
        # Dask would take a bare port to mean every interface of this machine: here that must be said.
        host, _, port = (str(value) if type(value) in (int, str) else "?").strip().rpartition(":")
        if not re.fullmatch(r"[\w.-]*", host) or not re.fullmatch(r"\d{1,5}", port) or int(port) > 65535:
            raise ValueError("must be a port (on this machine's loopback), host:port, or off")
        return f"{host}:{port}"

    @property
    def dashboard_address(self) -> str | None:
        """host:port of the dashboard of our own cluster; a port alone is loopback's. None: no dashboard."""
        if self.dashboard is not None and self.dashboard.startswith(":"):
            return f"127.0.0.1{self.dashboard}"
        return self.dashboard

    @property
    def tls_files(self) -> dict[str, Path | None]:
        """The certificates named for --cluster tls://, by key."""
        return {"tls_ca_file": self.tls_ca_file, "tls_cert": self.tls_cert, "tls_key": self.tls_key}

    # -- what follows from the keys --------------------------------------------------------------------------------

    _experiments: tuple[StudyKeys, ...] = ()

    @property
    def run_folder(self) -> Path:
        """runs/<name>, absolute."""
        return Path(os.path.abspath(self.runs_dir)) / self.name

    @property
    def storage_url(self) -> str:
        """The study database's URL; by default a SQLite file in the run folder."""
        return self.storage or f"sqlite:///{quote(str(self.run_folder / 'study.db'))}"

    def reserve_on(self, total_bytes: int) -> int:
        """Bytes kept free on a host of this size: on a small one a twentieth is enough."""
        return min(self.reserve_bytes, total_bytes // 20)

    @property
    def experiments(self) -> tuple[StudyKeys, ...]:
        """The study keys of each --experiment file; the settings' own without any."""
        return self._experiments or (self,)

    @property
    def heap(self) -> str:
        """The allocator trials get. The heap that suits the built-in training is its own affair: it keeps what is freed
        out of order, and an LSTM took 27 to 43 % more under it than under the system's."""
        ours = self.objective is None and self.training.objective == Training().objective
        return self.allocator if ours or self.allocator != "auto" else "default"

    @property
    def total_slots(self) -> int:
        """Slots of a worker on this machine: how many single-threaded trials it runs at once."""
        return self.slots or cores()

    def resolved(self) -> dict[str, Any]:
        """All keys with their values as plain data, without passwords: what the run folder keeps."""
        data = self.model_dump(mode="json")
        if self.objective is not None:
            data = {key: value for key, value in data.items() if key not in BUILT_IN}
        if (self.objective or "").startswith(command.PICKLED):
            data["objective"] = command.PICKLED  # whoever goes on with the run has the function
        if self.storage is not None:
            data["storage"] = masking.bare(self.storage)
        if self._experiments:
            data["experiments"] = [each.model_dump(mode="json") for each in self._experiments]
        return data
