"""An objective that is not ours: an LSTM on windows of daily bars, written as Optuna's examples are.

It knows nothing of Headroom but the arguments it is given: reports a value per epoch, never says that its memory is
flat, has no estimator. Data are random: what it learns does not matter, what it takes does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Trial

    from training.progress import Progress

DAYS, FEATURES = 60, 25


def sample(
    trial: Trial,
    context: Mapping[str, Any],
    architectures: Sequence[Mapping[str, Any]],
    fit: Callable[[Mapping[str, Any]], int | None],
) -> dict[str, Any]:
    """Suggest what a trial trains."""
    return {
        "units": trial.suggest_categorical("units", [64, 96, 128]),
        "layers": trial.suggest_int("layers", 1, 2),
        "lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True),
        "batch_size": 128,
    }


def objective(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Train two epochs of a few steps; the metrics tell which heap it trained under."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, units: int, layers: int) -> None:
            super().__init__()
            self.lstm = nn.LSTM(FEATURES, units, layers, batch_first=True)
            self.head = nn.Linear(units, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.lstm(x)[0][:, -1])
            return logits.squeeze(-1)

    params = task["params"]
    torch.manual_seed(0)
    model = Net(params["units"], params["layers"])
    optimizer = torch.optim.SGD(model.parameters(), lr=params["lr"])
    x, y = torch.randn(512, DAYS, FEATURES), (torch.rand(512) > 0.5).float()
    value = 0.0
    for epoch in (1, 2):
        for batch in torch.randperm(len(x)).split(params["batch_size"]):
            loss = nn.functional.binary_cross_entropy_with_logits(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.tick()
        value = loss.item()
        progress.report(epoch, value)
    heap = {name: os.environ.get(name) for name in ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_")}
    return {"value": value, "epochs": 2, "metrics": {"heap": heap, "python": sys.version_info[:2]}}
