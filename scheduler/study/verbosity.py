"""Optuna's own log lines, kept back while ours say what they would."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import optuna


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let Optuna say warnings only ("A new study created" is no news); afterwards it logs as it did before."""
    optuna.logging.get_verbosity()  # sets its logger up, if nothing has yet
    logger = logging.getLogger("optuna")
    before = logger.level, logger.propagate, list(logger.handlers)
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.propagate, logger.handlers[:] = before[1], before[2]
