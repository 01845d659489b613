"""Checkpoints: one file that is either the last complete one or not there.

Covers writing atomically and durably, and telling a torn, foreign or other task's file from a good one. What is in the
state is the trainer's business. Nothing here copies a tensor: on CPU a checkpoint does not raise the memory peak.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.errors import CheckpointRejected

MAGIC = "headroom-checkpoint"
VERSION = 1
# What may differ between two attempts of one trial: how it is computed, not what.
EXECUTION_KEYS = frozenset(
    {"micro_batch", "accumulation_steps", "threads", "allocator", "device", "max_steps", "training_search_space"}
)


def task_digest(params: Mapping[str, Any], context: Mapping[str, Any], data_fingerprint: str = "") -> str:
    """A short name for what a trial computes: its parameters, its context and its data."""
    kept = [{k: v for k, v in mapping.items() if k not in EXECUTION_KEYS} for mapping in (params, context)]
    text = json.dumps([*kept, data_fingerprint], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(path: Path, state: Mapping[str, Any], task: str) -> None:
    """Write a checkpoint durably; the former one stays in place until the new one is complete.

    Raises OSError (full disk, no permission) with the former file untouched.
    """
    import torch

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            try:
                torch.save({"magic": MAGIC, "version": VERSION, "task": task, **state}, file)
            except RuntimeError as error:  # torch's zip writer reports a full disk this way
                raise OSError(f"cannot write {temporary}: {error}") from error
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def load(path: Path, task: str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises CheckpointRejected when it is torn (checksums), foreign, of another version or of another task.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()  # reads in small pieces: costs time, not memory
        if torn is not None:
            raise CheckpointRejected(f"{path}: {torn} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointRejected(f"{path}: cannot be read: {error.strerror or error}") from error
    except CheckpointRejected:
        raise
    except Exception as error:  # a damaged file makes zipfile and torch raise almost anything
        raise CheckpointRejected(f"{path}: is torn or no checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("magic") != MAGIC:
        raise CheckpointRejected(f"{path}: is no checkpoint of this program")
    if state.get("version") != VERSION:
        raise CheckpointRejected(f"{path}: has version {state.get('version')}, this program writes {VERSION}")
    if state.get("task") != task:
        raise CheckpointRejected(f"{path}: belongs to another task ({state.get('task')}, not {task})")
    return state


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
