"""A file of tensors in the safetensors format, written from the memory they lie in and read back into it.

Covers the layout (an 8-byte length, a JSON header, the tensors' bytes), checksums, and replacing a file as a whole.
What is in a file is its user's business: `checkpoint` keeps what a trainer goes on from, `model_file` a model to be
used.

Any program that reads safetensors reads these files. The library of that name is not used for it: it reads through a
mapping, whose pages count as the process's own (measured: 240 MiB of tensors read in place, peak 242 MiB higher), on
top of a trial that is already as large as it was promised to be; and it neither syncs a file to the disk nor knows
whether what it reads is what was written. Here neither direction copies, and damaged bytes never reach a tensor.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "headroom"  # the key of our own entry in the header's __metadata__, which holds strings only
CHUNK_BYTES = 2**24
TRIED_BYTES = 2**27
HEADER_LIMIT_BYTES = 100 * 10**6  # the format's own
DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


class Damaged(ValueError):
    """The file is torn or not of this format; the message says what is wrong, without the path."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: bytes begin..end behind the header, with the CRC-32 of what was written."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    crc: int


@dataclass(frozen=True, slots=True)
class Contents:
    """A file's header. start: offset of the first tensor's bytes. facts: what was written beside the tensors."""

    entries: dict[str, Entry]
    facts: dict[str, Any]
    start: int

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape by name."""
        return {name: (entry.dtype, entry.shape) for name, entry in self.entries.items()}


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Replace a file durably; the former one stays in place until the new one is complete.

    tensors: on any device, contiguous or not. facts: JSON-able. Raises OSError (full disk, no permission) with the
    former file untouched.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            checksums = dict.fromkeys(tensors, 0)
            file.write(_header(tensors, facts, checksums))
            for name, tensor in tensors.items():
                for piece in _pieces(tensor.detach().cpu().contiguous()):
                    checksums[name] = zlib.crc32(piece, checksums[name])
                    file.write(piece)
            file.seek(0)
            file.write(_header(tensors, facts, checksums))  # as long as before: checksums are of one width
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def contents(file: BinaryIO) -> Contents:
    """Read the header. Raises Damaged, OSError."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(HEADER_LIMIT_BYTES, size - 8):
        raise Damaged("is torn or no safetensors file")
    try:
        header = json.loads(file.read(length))
        ours = json.loads(header.pop("__metadata__")[METADATA])
        entries = {
            name: Entry(
                dtype=str(each["dtype"]),
                shape=tuple(map(int, each["shape"])),
                begin=int(each["data_offsets"][0]),
                end=int(each["data_offsets"][1]),
                crc=int(ours["crc32"][name], 16),
            )
            for name, each in header.items()
        }
        facts = dict(ours["facts"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"is torn or not written by this program ({type(error).__name__}: {error})") from error
    if size != 8 + length + max((entry.end for entry in entries.values()), default=0):
        raise Damaged("is torn: its tensors do not end where the file does")
    return Contents(entries, facts, 8 + length)


def verify(file: BinaryIO, found: Contents) -> None:
    """Read every tensor's bytes once, in small pieces. Raises Damaged where they are not those that were written."""
    for name, entry in found.entries.items():
        file.seek(found.start + entry.begin)
        left, crc = entry.end - entry.begin, 0
        while left > 0:
            piece = file.read(min(CHUNK_BYTES, left))
            if not piece:
                raise Damaged(f"is torn: {name} ends early")
            left, crc = left - len(piece), zlib.crc32(piece, crc)
        if crc != entry.crc:
            raise Damaged(f"is damaged: {name} is not what was written")


def read_into(file: BinaryIO, found: Contents, tensors: Mapping[str, Tensor]) -> None:
    """Fill these tensors, in place where they are contiguous and on the CPU. Raises Damaged when one does not match."""
    import torch

    there, wanted = found.shapes(), shapes(tensors)
    for name, tensor in tensors.items():
        if there.get(name) != wanted[name]:
            raise Damaged(f"has no {name} of {tensor.dtype} {tuple(tensor.shape)}")
        in_place = tensor.device.type == "cpu" and tensor.is_contiguous()
        target = tensor.detach() if in_place else torch.empty(tensor.shape, dtype=tensor.dtype)
        file.seek(found.start + found.entries[name].begin)
        for view in _pieces(target):
            if file.readinto(view) != len(view):  # type: ignore[attr-defined]  # a buffered file reads all there is
                raise Damaged(f"is torn: {name} ends early")
        if not in_place:
            with torch.no_grad():
                tensor.copy_(target)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape by name, as `Contents` has them."""
    return {name: (DTYPES[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in tensors.items()}


def _header(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], checksums: Mapping[str, int]) -> bytes:
    ours = {"crc32": {name: f"{crc:08x}" for name, crc in checksums.items()}, "facts": dict(facts)}
    head: dict[str, Any] = {"__metadata__": {METADATA: json.dumps(ours)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        dtype = DTYPES[str(tensor.dtype)]
        head[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)  # the tensors' bytes are aligned to 8
    return len(text).to_bytes(8, "little") + text


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the memory of a contiguous CPU tensor, in chunks."""
    import torch

    whole = tensor.reshape(-1).view(torch.uint8).numpy().data
    return (whole[at : at + CHUNK_BYTES] for at in range(0, len(whole), CHUNK_BYTES))


def try_disk(folder: Path) -> float:
    """Return the bytes a second that writing a file there takes, its checksum and the way to the disk included.

    Writes TRIED_BYTES. Raises OSError.
    """
    path, piece = folder / f"disk.{os.getpid()}.tmp", bytes(CHUNK_BYTES)
    began = time.monotonic()
    try:
        with path.open("wb") as file:
            for _ in range(TRIED_BYTES // CHUNK_BYTES):
                zlib.crc32(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return TRIED_BYTES / max(1e-6, time.monotonic() - began)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
