"""The model of a trial's best epoch as a file of its own, and the way back to a module: `load_model(path)`.

The weights lie in the safetensors format, so that any program can read them; beside them in the header stands what it
takes to build the module and to feed it: parameters, context, the features with their mean and deviation.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training import tensor_file
from training.errors import TrainingInputError

if TYPE_CHECKING:
    from torch import nn

NAME = "model.safetensors"
MAGIC = "headroom-model"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A model that can be used.

    module: on the CPU, in fp32 whatever it was trained in, in eval mode; from windows (batch, context_length,
    n_features) of normalised features to one logit each: that the price rises within `context["horizon"]` days. params,
    context: of the trial. features: names in the module's order; normalised is (raw - mean) / std, each (n_features,).
    epoch: whose weights these are, from 1; value: its validation loss.
    """

    module: nn.Module
    params: Mapping[str, Any]
    context: Mapping[str, Any]
    features: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epoch: int
    value: float


def save(path: Path, module: nn.Module, facts: Mapping[str, Any]) -> None:
    """Write a module's weights durably. facts: the other fields of TrainedModel, JSON-able. Raises OSError."""
    tensor_file.write(path, module.state_dict(), {"magic": MAGIC, "version": VERSION, **facts})


def load_model(path: str | os.PathLike[str]) -> TrainedModel:
    """Build the module of a `model.safetensors` and give it its weights.

    Raises TrainingInputError with one line when the file is missing, torn, or no model of this program.
    """
    from training.hpo import build_model

    path = Path(path)
    try:
        with path.open("rb") as file:
            found = tensor_file.contents(file)
            facts = found.facts
            if (facts.get("magic"), facts.get("version")) != (MAGIC, VERSION):
                raise TrainingInputError(f"{path}: is no model of this program (a checkpoint?): take {NAME} beside it")
            module = build_model(facts["params"], facts["context"], len(facts["features"]))
            tensor_file.verify(file, found)
            tensor_file.read_into(file, found, module.state_dict())
    except OSError as error:
        raise TrainingInputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except tensor_file.Damaged as error:
        raise TrainingInputError(f"{path}: {error}") from error
    return TrainedModel(
        module=module.float().eval(),
        params=facts["params"],
        context=facts["context"],
        features=tuple(facts["features"]),
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        epoch=facts["epoch"],
        value=facts["value"],
    )


def take_over(earlier: Path, path: Path) -> None:
    """Make an earlier attempt's best model this one's too, until it has a better one. Without a copy where possible."""
    if earlier == path or not earlier.is_file():
        return
    path.unlink(missing_ok=True)
    try:
        os.link(earlier, path)
    except OSError:  # another file system, or one without links
        import shutil

        with contextlib.suppress(OSError):
            shutil.copyfile(earlier, path)
