"""Checkpoints: one file that is either the last complete one or not there.

Covers telling a torn, foreign or other task's file from a good one. How tensors lie in a file is `tensor_file`'s, what
is in the state the trainer's business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training import tensor_file
from training.errors import CheckpointRejected

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = "headroom-checkpoint"
VERSION = 2  # 1 was a zip
# What may differ between two attempts of one trial: how it is computed, not what.
EXECUTION_KEYS = frozenset(
    {
        "micro_batch",
        "accumulation_steps",
        "threads",
        "allocator",
        "device",
        "max_steps",
        "training_search_space",
        "checkpoint_every_minutes",
        "drain_timeout_s",
    }
)


def task_digest(params: Mapping[str, Any], context: Mapping[str, Any], data_fingerprint: str = "") -> str:
    """Return a short name for what a trial computes: its parameters, its context and its data."""
    kept = [{k: v for k, v in mapping.items() if k not in EXECUTION_KEYS} for mapping in (params, context)]
    text = json.dumps([*kept, data_fingerprint], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], task: str) -> None:
    """Write a checkpoint durably; the former one stays in place until the new one is complete.

    facts: what is not a tensor, JSON-able. Raises OSError (full disk, no permission) with the former file untouched.
    """
    head = {"magic": MAGIC, "version": VERSION, "task": task, "facts": dict(facts)}
    tensor_file.write(path, tensors, head)


def load(path: Path, tensors: Mapping[str, Tensor], task: str) -> dict[str, Any]:
    """Read a checkpoint into these tensors and return its facts.

    Raises CheckpointRejected when it is torn (checksums), foreign, of another version or task, or has other tensors;
    nothing is changed then: everything is read once to verify it before it is read into place.
    """
    try:
        with path.open("rb") as file:
            found = tensor_file.contents(file)
            _check(path, found.facts, task)
            if found.shapes() != tensor_file.shapes(tensors):
                raise CheckpointRejected(f"{path}: has other tensors than the model")
            tensor_file.verify(file, found)
            tensor_file.read_into(file, found, tensors)
            return dict(found.facts["facts"])
    except OSError as error:
        raise CheckpointRejected(f"{path}: cannot be read: {error.strerror or error}") from error
    except tensor_file.Damaged as error:
        raise CheckpointRejected(f"{path}: {error}") from error


def _check(path: Path, head: Mapping[str, Any], task: str) -> None:
    if head.get("magic") != MAGIC:
        raise CheckpointRejected(f"{path}: is no checkpoint of this program")
    if head.get("version") != VERSION:
        raise CheckpointRejected(f"{path}: has version {head.get('version')}, this program writes {VERSION}")
    if head.get("task") != task:
        raise CheckpointRejected(f"{path}: belongs to another task ({head.get('task')}, not {task})")
