"""The command line and the configuration, fuzzed: whatever is given, one line that says what is wrong, or settings.

The real path from words to `Settings`: the command's own parser, YAML files, variables, validation. What comes after
it (the plan, a run) is left out. Seeded: a failure is found again by its number.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scheduler.cli import schedule
from scheduler.settings import layers, load
from scheduler.settings.schema import Settings
from scheduler.workload import studies

CASES, ROUNDS = 100, 20
TEXTS = [
    *("", " ", "0", "1", "-1", "3.5", "1e3", "1e400", "nan", "inf", "-0", "0x10", "1_000", "٣", "9" * 5000, "1:30"),
    *("2M", "2M,20M", "2M,2M", "3M", ",", "1,3,5", "1,,3", "90%", "100%", "-5%", "1000%", "100GiB", "5 XB", "1e30GiB"),
    *("true", "no", "~", "null", "off", "on", "observe", "auto", "cpu", "median", "none", "hyperband", "tpe", "8787"),
    *("65536", "0.0.0.0:8787", "[::1]:80", "host:", ":1", "tcp://h:1", "tls://h", "tcp://", "tcp://h:99999", "h:x:y"),
    *("30m", "12h", "1w", "-3h", "1e9h", "5 m", "2026-13-45", "2026-11-24", "12:99:99", "!!binary x", "!!int x", "&a"),
    *("*a", "[", "{", "[1, [2]]", "{a: 1}", "{[1]: 2}", "[" * 500, "&a [*a]", "- 1", "a: b: c", "'", "%TAG", "---"),
    *("x\0y", "\udcff", "\x1b[2J", "\n", "a\nb", "../..", "/", "~nobody/x", "a" * 300, "a b", "ü", "🙂", ".", "-"),
    *("sqlite:///x.db", "sqlite://", "postgresql://u:p@h/d", "mysql://[", "://", "x:y@z", "sqlite:////proc/x", "http://"),
    *("module:function", "module:", ":f", "a.py:b", "a.py:", "a b:c", "numpy:sum", "1:2", "maximize,minimize"),
]  # fmt: skip
WORDS = sorted({".".join(path) for path in layers.leaf_paths(Settings)} | {"type", "low", "high", "choices"})


def passed(chance: random.Random) -> str:
    """A text as a process can be given it: the kernel ends it at a NUL."""
    return chance.choice(TEXTS).replace("\0", "")


def anything(chance: random.Random, depth: int = 0) -> Any:
    """A value of any YAML type."""
    kind = chance.randrange(10 if depth < 3 else 7)
    match kind:
        case 0 | 1:
            return chance.choice(TEXTS)
        case 2:
            return chance.choice([0, 1, -1, 3, 2**31, 2**63, 10**400, True, False, None])
        case 3:
            return chance.choice([0.5, -0.5, 1e308, float("nan"), float("inf")])
        case 4:
            return chance.choice([b"\xff", yaml.safe_load("2026-11-24"), yaml.safe_load("2026-11-24 10:00:00")])
        case 5 | 6:
            return chance.choice(["2M", [1, 3], ["2M"], 5, "cpu", "none", "1h"])
        case 7:
            return [anything(chance, depth + 1) for _ in range(chance.randrange(4))]
        case _:
            keys = [chance.choice([*WORDS, chance.choice(TEXTS), 7, None, 2.5]) for _ in range(chance.randrange(4))]
            return {key: anything(chance, depth + 1) for key in keys}


def document(chance: random.Random) -> str | bytes:
    """A configuration file: keys that exist with values that may be any, nested as they should be, or rubbish."""
    if chance.random() < 0.2:
        whole = chance.choice([*TEXTS, anything(chance), b"\xff\xfe", b"\x00"])
        return whole if isinstance(whole, str | bytes) else dumped(whole)
    values: dict[Any, Any] = {}
    for path in chance.sample(layers.leaf_paths(Settings), chance.randrange(1, 4)):
        at = values
        for part in path[:-1]:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                break
        else:
            at[path[-1]] = anything(chance)
    if chance.random() < 0.2:
        values[chance.choice(["training", "watchdog", "early_stopping", "training_search_space"])] = anything(chance)
    if chance.random() < 0.2:
        space = {chance.choice(["d_model", "learning_rate", "x"]): anything(chance) for _ in range(2)}
        values["training_search_space"] = space
    return dumped(values)


def dumped(value: Any) -> str | bytes:
    """YAML of it; a surrogate has no UTF-8, so it is written as the byte it stands for."""
    return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogateescape")


class Case:
    """Arguments, variables and files drawn from one seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        chance = random.Random(seed)
        self.arguments: list[str] = []
        self.environ: dict[str, str] = {}
        flags = [option for option in schedule.command.params if option.param_type_name == "option"]
        for option in chance.sample(flags, chance.randrange(3)):
            flag = option.opts[0]
            if flag in ("--config", "--experiment", "--dry-run", "--json", "--version"):
                continue
            self.arguments.append(f"{flag}={passed(chance)}")
        for path in chance.sample(layers.leaf_paths(Settings), chance.randrange(2)):
            self.environ["HEADROOM_" + "_".join(path).upper()] = passed(chance)
        for flag in ("--config", "--experiment", "--experiment"):
            if chance.random() < 0.4:
                file = folder / f"{seed}-{len(self.arguments)}.yaml"
                content = document(chance)
                file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))
                self.arguments += [flag, str(file)]
        if chance.random() < 0.05:
            self.arguments.append(chance.choice(["--nonsense", "x", "--config=/", "--experiment=", "--trials"]))


def run(case: Case, monkeypatch: pytest.MonkeyPatch, found: Callable[[Settings], Any]) -> tuple[int, str]:
    """(exit code, what was printed) of the command, up to its settings."""
    for name, text in case.environ.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(schedule, "make_plan", found)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = schedule.execute(case.arguments)
    return code, said.getvalue()


def shipped(folder: Path) -> None:
    """Files of a few lines in place of those that come with us: reading them took two thirds of the time."""
    (folder / "hpo").mkdir(parents=True)
    (folder / "schedule.yaml").write_text("trials: 50\nwatchdog:\n  mode: 'on'\n")
    range_ = {"type": "log_uniform", "low": 1e-5, "high": 1e-2}
    space = {"training_search_space": {"learning_rate": range_}, "early_stopping": {"patience": 10}}
    (folder / "hpo" / "architectural_search.yaml").write_text(yaml.safe_dump(space))


class Enough(Exception):
    """Settings were made: all that follows is another test's."""


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_whatever_is_given_is_one_line_or_settings(
    round_: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a traceback: exit code 2 and one line, or settings that can be written down, and give studies."""
    monkeypatch.chdir(tmp_path)
    shipped(tmp_path / "configs")
    monkeypatch.setattr(load, "configs_root", lambda: tmp_path / "configs")
    valid = 0

    def found(settings: Settings) -> None:
        settings.resolved()
        yaml.safe_dump(settings.resolved())
        assert len(studies.studies(settings)) < 10_000
        raise Enough

    for seed in range(round_ * CASES, (round_ + 1) * CASES):
        case = Case(seed, tmp_path)
        with monkeypatch.context() as patch:
            try:
                code, said = run(case, patch, found)
            except Enough:
                valid += 1
                continue
            except Exception as error:
                raise AssertionError(f"case {seed}: {case.arguments} {case.environ}") from error
        *notes, last = said.rstrip("\n").split("\n")
        assert code == 2, f"case {seed}: {code} {said}"
        assert all(note.startswith("headroom: a password among") for note in notes), f"case {seed}: {said!r}"
        assert last.startswith("headroom: ") and len(last) > 25, f"case {seed}: {said!r}"
        assert last.isprintable() or "\ufffd" in last, f"case {seed}: {last!r}"
    assert valid > 0
