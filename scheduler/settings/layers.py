"""Where settings come from: files, environment and arguments become one mapping, and each value remembers its source.

Covers reading YAML, laying one source over another, and the one-line error that names the source, the key, the value
seen and the fix. Knows nothing of any particular key: see `settings`.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from scheduler import masking
from scheduler.model import UsageError

KeyPath = tuple[str, ...]
ENVIRONMENT_PREFIX = "HEADROOM_"
# Read elsewhere (bin/_bootstrap, the host registry): not settings.
ENVIRONMENT_OTHERS = ("PYTHON", "VENV", "ROOT", "RUN_PYTHON", "HOST_DIR", "SETUP_VENV", "SETUP_PINS", "EXTRAS")

# What YAML's own constructors raise besides YAMLError: `2026-13-45`, `!!int x`, a number of 5,000 digits, brackets in
# brackets in brackets.
NO_VALUE = (ValueError, TypeError, AttributeError, RecursionError)

A_GROUP = "must be a group of `key: value` lines"
_TAGS = ("log_uniform", "uniform", "int", "categorical")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} is written twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file, {} for an empty one. Raises UsageError: unreadable, no YAML, no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"cannot read {path}: it is not UTF-8 text") from None
    except ValueError as error:  # NUL in its name
        raise UsageError(f"cannot read {str(path)!r}: {error}") from None
    try:
        data = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{path}{where}: not valid YAML: {problem}") from None
    except NO_VALUE as error:
        raise UsageError(f"{path}: a value in it means nothing: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{path}: must hold `key: value` lines, not {_kind(data)}")
    for key in data:
        if not isinstance(key, str):
            raise UsageError(f"{path}: the key {key!r} is not text; put it in quotes or correct it")
    return data


def parse_scalar(text: str) -> Any:
    """Parse a value of the environment: it means the same as in a file (`3`, `true`, `[1, 3]`, `90%`)."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, *NO_VALUE):
        return text  # `%`-leading and the like are no YAML, but text


@dataclass(slots=True)
class Layers:
    """One mapping made of several. `origin`: for each key path that was set, a label of who set it last."""

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[KeyPath, str] = field(default_factory=dict)

    def copy(self) -> Layers:
        return Layers({k: dict(v) if isinstance(v, dict) else v for k, v in self.values.items()}, dict(self.origin))

    def lay(self, label: str, values: Mapping[str, Any], *, groups: Iterable[str]) -> None:
        """Lay `values` over what is there. Keys in `groups` are mappings that merge key by key; others are replaced."""
        groups = set(groups)
        for key, value in values.items():
            if key in groups and isinstance(value, Mapping):
                self.values[key] = {**self.values.get(key, {}), **value}
                for inner in value:
                    self.origin[key, str(inner)] = label
            elif key in groups and value is None:
                continue  # `watchdog:` with all its keys commented out
            else:
                self.values[key] = value
            self.origin[key,] = label

    def source_of(self, path: KeyPath) -> str | None:
        for length in range(len(path), 0, -1):
            if path[:length] in self.origin:
                return self.origin[path[:length]]
        return None


def group_of(info: FieldInfo) -> type[BaseModel] | None:
    """Return the nested model of a field that is a group of keys (also an optional one), None for a plain key."""
    for kind in (info.annotation, *get_args(info.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def leaf_paths(model: type[BaseModel]) -> list[KeyPath]:
    """Every key path of a settings model; a nested model gives its keys, not itself."""
    paths: list[KeyPath] = []
    for name, info in model.model_fields.items():
        if (inner := group_of(info)) is not None:
            paths += [(name, *rest) for rest in leaf_paths(inner)]
        else:
            paths.append((name,))
    return paths


def check_keys(label: str, values: Mapping[str, Any], model: type[BaseModel]) -> None:
    """Raise UsageError for the first key that `model` does not have, with the closest one that exists."""
    _check_keys(label, values, model, (), [".".join(path) for path in leaf_paths(model)])


def _check_keys(label: str, values: Mapping[str, Any], model: type[BaseModel], at: KeyPath, leaves: list[str]) -> None:
    for key, value in values.items():
        path = (*at, str(key))
        info = model.model_fields.get(str(key))
        if info is None:
            close = closest(str(key), model.model_fields)
            suggestion = ".".join((*at, close)) if close else closest_leaf(str(key), leaves)
            known = ", ".join(model.model_fields)
            hint = f"did you mean {suggestion}?" if suggestion else f"known keys: {known}"
            raise UsageError(f"{label}: unknown key {'.'.join(path)} ({short(value)}); {hint}")
        if (inner := group_of(info)) is not None:
            if isinstance(value, Mapping):
                _check_keys(label, value, inner, path, leaves)
            elif value is not None:  # another source may lay keys of the group over it
                raise UsageError(f"{label}: {'.'.join(path)} {short(value)} {A_GROUP}")


def closest(word: str, known: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def closest_leaf(word: str, leaves: list[str]) -> str | None:
    """Find the full path whose last part is closest: `stall_after_s` at the top level means watchdog.stall_after_s."""
    by_last = {leaf.rsplit(".", 1)[-1]: leaf for leaf in leaves}
    found = closest(word, by_last)
    return by_last[found] if found else None


def from_environment(environ: Mapping[str, str], model: type[BaseModel]) -> dict[KeyPath, tuple[str, Any]]:
    """HEADROOM_… variables as {key path: (variable, value)}: HEADROOM_WATCHDOG_MODE is watchdog.mode.

    A variable that is nearly a key is a UsageError; one that resembles none is somebody else's and left alone.
    """
    names = {ENVIRONMENT_PREFIX + "_".join(path).upper(): path for path in leaf_paths(model)}
    found: dict[KeyPath, tuple[str, Any]] = {}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable[len(ENVIRONMENT_PREFIX) :] in ENVIRONMENT_OTHERS:
            continue
        if variable in names:
            found[names[variable]] = (variable, parse_scalar(text))
        elif close := difflib.get_close_matches(variable, names, n=1, cutoff=0.85):
            raise UsageError(f"environment: unknown setting {variable} ({short(text)}); did you mean {close[0]}?")
    return found


def explain(error: ValidationError, layers: Layers, model: type[BaseModel]) -> str:
    """Tell the first problem of a failed validation in one line: source, key, value seen, what it must be."""
    problems = error.errors(include_url=False)
    first = problems[0]
    loc = [part for part in first["loc"] if not (isinstance(part, str) and part.startswith(("function-", "literal[")))]
    if loc[0] == "training_search_space" and len(loc) > 2 and loc[2] in _TAGS:
        del loc[2]  # pydantic names the kind of parameter there, which is no key
    path = tuple(str(part) for part in loc)
    shown = ""
    for part in loc:
        shown += f"[{part}]" if isinstance(part, int) else f".{part}" if shown else str(part)
    source = layers.source_of(path)
    default = _default_of(model, path)
    fix = _requirement(first)
    hint = f" (default: {default})" if default is not None else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if source is not None and source.startswith("--"):
        start, shown = source, ""  # the flag says which key it is
    else:
        start = f"{source}: " if source else ""
    seen = f" {short(_shown(path, first['input']))}" if first["type"] != "missing" else ""
    return f"{start}{shown}{seen} {fix}{hint}{more}"


def _shown(path: KeyPath, value: Any) -> Any:
    # Whatever is wrong with such a value, a password may be in it.
    return masking.masked(value) if path[-1:] == ("storage",) and isinstance(value, str) else value


def short(value: Any) -> str:
    """Return the value as an error line shows it: without passwords, and cut."""
    text = masking.scrubbed(repr(value)[:1000])  # a function of 200 kB took minutes
    return text if len(text) <= 60 else text[:57] + "…"


def _requirement(problem: Mapping[str, Any]) -> str:
    context = problem.get("ctx", {})
    match problem["type"]:
        case "int_type" | "int_parsing" | "int_from_float":
            return "must be a whole number"
        case "float_type" | "float_parsing" | "finite_number":
            return "must be a number"
        case "string_type" | "path_type":
            return "must be text"
        case "bool_type" | "bool_parsing":
            return "must be true or false"
        case "list_type" | "tuple_type":
            return "must be a list"
        case "dict_type" | "model_type" | "model_attributes_type" | "mapping_type":
            return A_GROUP
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "greater_than":
            return f"must be more than {context['gt']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "less_than":
            return f"must be less than {context['lt']}"
        case "literal_error":
            return f"must be one of {context['expected'].replace(chr(39), '')}"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"needs a type: one of {', '.join(_TAGS)}"
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return "is an unknown key; a search parameter has type, low and high, or type and choices"
        case "value_error":
            return str(context["error"])
        case _:
            return str(problem["msg"])


def _default_of(model: type[BaseModel], path: KeyPath) -> str | None:
    info = model.model_fields.get(path[0]) if path else None
    if info is None:
        return None
    if (inner := group_of(info)) is not None and path[1:]:
        return _default_of(inner, path[1:])
    default = info.get_default(call_default_factory=False)
    if default is None or isinstance(default, dict | BaseModel) or repr(default) == "PydanticUndefined":
        return None
    if isinstance(default, tuple):
        return ",".join(str(part) for part in default)
    return str(getattr(default, "text", default))  # a budget as it is written


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "text" if isinstance(value, str) else repr(value)


def content_hash(path: Path) -> str:
    """Which data this is, wherever it lies: 16 hex digits of its SHA-256. Raises UsageError when it cannot be read."""
    try:
        stat = path.stat()
        return _hash(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UsageError(f"cannot read the data file {path}: {error.strerror or error}") from None


@functools.lru_cache(maxsize=32)
def _hash(path: Path, size: int, changed_ns: int) -> str:
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()[:16]


def as_yaml(data: Mapping[str, Any]) -> str:
    """Return plain data as YAML text, in its own order, so that a person may read it and `--config` take it."""
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=110)
