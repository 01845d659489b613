"""What can go wrong in training and is not a bug: each message says what, the value seen, and the fix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class TrainingInputError(ValueError):
    """A wrong input file, parameter or context value. The message is one line for the user."""


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; training further would only hide it."""


class CheckpointRejected(Exception):
    """A checkpoint is torn, foreign or of another task. The attempt starts over and says so."""


class DoesNotFit(Exception):
    """No micro-batch of this architecture fits the limit: an answer of the sampler, not a failure.

    params: the sampled parameters, without a micro-batch. needed_bytes: footprint at micro-batch 1.
    limit_bytes: what there is, None where only the caller knows it.
    """

    def __init__(self, params: Mapping[str, Any], needed_bytes: int, limit_bytes: int | None = None) -> None:
        limit = "" if limit_bytes is None else f", the limit is {limit_bytes / 2**30:.2f} GiB"
        super().__init__(
            f"d_model={params.get('d_model')} n_layers={params.get('n_layers')} needs "
            f"{needed_bytes / 2**30:.2f} GiB at micro-batch 1{limit}: raise the memory budget or lower the model's"
        )
        self.params = dict(params)
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes


class OtherProtocol(Exception):
    """Whoever sent the task is of another version: no trial has begun, and none is to blame."""

    not_started = True


class ObjectiveNotImported(Exception):
    """The objective cannot be imported: no trial has begun, and none is to blame."""

    not_started = True


class AskedToLeave(BaseException):
    """The trial is asked to leave in the middle of a call: no `except Exception` of a user's may keep it."""
