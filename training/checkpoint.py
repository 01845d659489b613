"""Checkpoints: one file that is either the last complete one or not there.

Covers writing atomically and durably, reading back in place, and telling a torn, foreign or other task's file from a
good one. What is in the state is the trainer's business.

The file is a plain zip: `facts.json` and one entry of raw bytes per tensor. `torch.save` would do for writing, but
`torch.load` holds a second copy of everything, 12 bytes a parameter on top of a trial that is already as large as it
was promised to be (measured: 57 million parameters, 1,166 MiB before, 1,746 after). Here neither direction copies.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import CheckpointRejected

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = "headroom-checkpoint"
VERSION = 1
FACTS = "facts.json"
CHUNK_BYTES = 2**24
# What may differ between two attempts of one trial: how it is computed, not what.
EXECUTION_KEYS = frozenset(
    {"micro_batch", "accumulation_steps", "threads", "allocator", "device", "max_steps", "training_search_space"}
)


def task_digest(params: Mapping[str, Any], context: Mapping[str, Any], data_fingerprint: str = "") -> str:
    """A short name for what a trial computes: its parameters, its context and its data."""
    kept = [{k: v for k, v in mapping.items() if k not in EXECUTION_KEYS} for mapping in (params, context)]
    text = json.dumps([*kept, data_fingerprint], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], task: str) -> None:
    """Write a checkpoint durably; the former one stays in place until the new one is complete.

    facts: what is not a tensor, JSON-able. Raises OSError (full disk, no permission) with the former file untouched.
    """
    shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    head = {"magic": MAGIC, "version": VERSION, "task": task, "tensors": shapes, "facts": dict(facts)}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr(FACTS, json.dumps(head))
                for name, tensor in tensors.items():
                    with archive.open(name, "w", force_zip64=True) as entry:
                        entry.write(_bytes_of(tensor.detach().cpu().contiguous()))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def load(path: Path, tensors: Mapping[str, Tensor], task: str) -> dict[str, Any]:
    """Read a checkpoint into these tensors and return its facts.

    Raises CheckpointRejected when it is torn (checksums), foreign, of another version or task, or has other tensors;
    nothing is changed then: everything is read once to verify it before it is read into place.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            facts = _verify(path, archive, tensors, task)
            for name, tensor in tensors.items():
                _read_into(archive, name, tensor)
            return facts
    except OSError as error:
        raise CheckpointRejected(f"{path}: cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, KeyError) as error:
        # what zipfile and json make of a damaged file
        raise CheckpointRejected(f"{path}: is torn or no checkpoint ({type(error).__name__}: {error})") from error


def _verify(path: Path, archive: zipfile.ZipFile, tensors: Mapping[str, Tensor], task: str) -> dict[str, Any]:
    if FACTS not in archive.namelist():
        raise CheckpointRejected(f"{path}: is no checkpoint of this program")
    torn = archive.testzip()  # reads in small pieces: costs time, not memory
    if torn is not None:
        raise CheckpointRejected(f"{path}: {torn} is damaged")
    head = json.loads(archive.read(FACTS))
    if not isinstance(head, dict) or head.get("magic") != MAGIC:
        raise CheckpointRejected(f"{path}: is no checkpoint of this program")
    if head.get("version") != VERSION:
        raise CheckpointRejected(f"{path}: has version {head.get('version')}, this program writes {VERSION}")
    if head["task"] != task:
        raise CheckpointRejected(f"{path}: belongs to another task ({head['task']}, not {task})")
    if head["tensors"] != {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}:
        raise CheckpointRejected(f"{path}: has other tensors than the model")
    return dict(head["facts"])


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_into(archive: zipfile.ZipFile, name: str, tensor: Tensor) -> None:
    import torch

    in_place = tensor.device.type == "cpu" and tensor.is_contiguous()
    target = tensor.detach() if in_place else torch.empty(tensor.shape, dtype=tensor.dtype)
    view = _bytes_of(target)
    with archive.open(name) as entry:
        filled = 0
        while filled < len(view):
            piece = entry.read(min(CHUNK_BYTES, len(view) - filled))
            if not piece:
                raise EOFError(f"{name} ends early")
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
    if not in_place:
        with torch.no_grad():
            tensor.copy_(target)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
