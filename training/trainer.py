"""The training loop: a recipe's optimizer, warm-up, gradient accumulation, early stopping, stop requests, checkpoints.

Read it top to bottom: `train` runs epochs, `_train_epoch` runs groups of micro-batches, one optimizer step each. Does
not know Optuna, files of market data, or the scheduler; it talks to the outside through `progress`.

A *group* is the effective batch: `batch_size x accumulation_steps` samples, the last of an epoch may be shorter. The
loss of each micro-batch is the sum over its samples divided by the number of samples in its *group*, so that a group's
gradient is the mean over its samples however it is cut. (Dividing each micro-batch's mean by `accumulation_steps`, as
is often done, gives a short last group too small a step.)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import computing, optimizers
from training.errors import NonFiniteLoss, TrainingInputError
from training.progress import Progress, Silent
from training.recipe import FP32_ADAMW, Recipe
from training.saver import Saver

# Memory is flat once the second group is through: its backward pass meets gradients, moments and a used heap.
SETTLE_STEPS = 2

Samples = tuple[Tensor, Tensor]


class Trainer:
    """Trains a model of one logit on (windows, labels).

    train, val: tensors (n, ...) and (n,), already on the device; the first may be a view, batches are gathered from it.
    batch_size: samples per forward pass; accumulation_steps: passes per optimizer step.
    early_stopping_patience: epochs without an improvement of `early_stopping_min_delta`, None for never.
    warmup_steps: optimizer steps over which the learning rate rises to `lr`. max_steps: optimizer steps in all.
    saver: what is written, and when; default: nothing.
    recipe: types and optimizer; the model is prepared for it in place.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Samples,
        val: Samples | None = None,
        *,
        epochs: int,
        batch_size: int = 256,
        accumulation_steps: int = 1,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup_steps: int = 0,
        early_stopping_patience: int | None = None,
        early_stopping_min_delta: float = 0.001,
        max_steps: int | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        recipe: Recipe = FP32_ADAMW,
        progress: Progress | None = None,
        saver: Saver | None = None,
    ) -> None:
        for name, number in (
            ("epochs", epochs),
            ("batch_size", batch_size),
            ("accumulation_steps", accumulation_steps),
        ):
            if number < 1:
                raise TrainingInputError(f"{name} must be at least 1, not {number}")
        if len(train[0]) == 0:
            raise TrainingInputError("there are no training samples")
        self.device = torch.device(device)
        self.recipe = recipe
        self.model = computing.prepare(model, recipe).to(self.device)
        self.train_samples = train
        self.val_samples = val
        self.epochs = epochs
        self.batch_size = batch_size
        self.accumulation_steps = accumulation_steps
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.optimizer = optimizers.make(recipe, self.model, lr=lr, weight_decay=weight_decay)
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_min_delta = early_stopping_min_delta
        self.max_steps = max_steps
        self.seed = seed
        self.progress: Progress = progress or Silent()
        self.saver = saver or Saver()

        # Everything below is what a checkpoint keeps beside the tensors.
        self.epoch = 0  # epochs completed
        self.position = 0  # training samples used in the current epoch
        self.step = 0  # optimizer steps
        self._loss_sum = 0.0  # over the samples used in the current epoch
        self._best_val_loss = math.inf  # early stopping's own: moves only by min_delta or more
        self._epochs_without_improvement = 0
        self.best_value = math.inf
        self.best_epoch = 0
        self.train_losses: list[float] = []
        self.val_losses: list[float] = []

        self._steps_here = 0  # optimizer steps in this process
        self._settled = False
        self._saved_at: tuple[int, int] | None = None
        self._group_rng: dict[str, Tensor] | None = None

    # -- the loop -------------------------------------------------------------------------------------------------

    def train(self, verbose: bool = False) -> dict[str, Any]:
        """Train until done, stopped or not improving.

        Returns `value` (best validation loss, training loss without validation data), `epochs`, `best_epoch`,
        `stop_reason` (completed, early_stopping, max_steps, pruned, interrupted), `steps`, `train_losses`,
        `val_losses`. Raises NonFiniteLoss.
        """
        if self._patience_is_over():  # resumed from the checkpoint of the very epoch that ended it
            return self._result("early_stopping")
        while self.epoch < self.epochs and not (self._out_of_steps() and self.position == 0):
            train_loss = self._train_epoch(self.epoch)
            if reason := self._stop_requested():
                return self._leave(reason)
            val_loss = self._evaluate_val()
            if val_loss is None and (reason := self._stop_requested()):
                return self._leave(reason)
            value = train_loss if val_loss is None else val_loss
            self._finish_epoch(train_loss, value)
            stop_early = val_loss is not None and self._check_early_stopping(val_loss)
            self._settle()
            self.progress.report(self.epoch, value)
            if verbose:
                print(f"epoch {self.epoch}: train {train_loss:.6f} validation {value:.6f}", flush=True)
            if self.best_epoch == self.epoch:
                self.saver.save_model(self.model, self.epoch, self.best_value, self.progress)
            if self.saver.is_due(within_epoch=False) or stop_early:
                self._save_checkpoint()
            if stop_early:
                return self._result("early_stopping")
        return self._result("completed" if self.epoch >= self.epochs else "max_steps")

    def _stop_requested(self) -> str | None:
        return self.progress.stop_requested

    def _train_epoch(self, epoch: int) -> float:
        """One pass over the training samples in this epoch's own order; returns the mean loss per sample.

        Starts at `position`, which is not 0 when the attempt before was stopped within the epoch.
        """
        self.model.train()
        x, y = self.train_samples
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        group_size = self.batch_size * self.accumulation_steps
        while self.position < len(x) and not self._out_of_steps():
            group = order[self.position : self.position + group_size]
            self._group_rng = self._rng_state()
            loss_sum = torch.zeros((), device=self.device)
            for picked in group.to(x.device).split(self.batch_size):
                if self.progress.stop_requested:
                    self._drop_group()
                    return self._epoch_loss()
                logits = self._logits(x[picked])
                loss = F.binary_cross_entropy_with_logits(logits, y[picked].to(self.device), reduction="sum")
                (loss / len(group)).backward()
                loss_sum += loss.detach()
                del logits, loss  # or the next forward pass would run beside this one's graph
            self._add_loss(float(loss_sum), len(group))
            self._optimizer_step()
            self.position += len(group)
            if self.saver.is_due(within_epoch=True):
                self._save_checkpoint()
        return self._epoch_loss()

    def _logits(self, windows: Tensor) -> Tensor:
        """Return the model's answer for these windows, computed as the recipe has it, in fp32."""
        with computing.products(self.recipe, self.device):
            logits: Tensor = self.model(windows.to(self.device))
        return logits.float()

    def _optimizer_step(self) -> None:
        self.optimizer.lr = self._learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._steps_here += 1
        self.saver.stepped()
        self.progress.tick()
        if self._steps_here == SETTLE_STEPS and self.val_samples is not None and not self._settled:
            # One batch takes the memory that a whole validation pass takes; an epoch of a large model is hours away.
            self._evaluate(self.val_samples[0][: self.batch_size], self.val_samples[1][: self.batch_size])
            self.model.train()
            self._settle()

    def _learning_rate(self) -> float:
        return self.lr * min(1.0, (self.step + 1) / max(1, self.warmup_steps))

    def _evaluate_val(self) -> float | None:
        """Mean validation loss per sample; None without validation data or when asked to stop meanwhile."""
        if self.val_samples is None:
            return None
        value = self._evaluate(*self.val_samples)
        if value is not None and not math.isfinite(value):
            raise NonFiniteLoss(
                f"validation loss is {value} in epoch {self.epoch + 1}: lower learning_rate ({self.lr})"
            )
        return value

    @torch.no_grad()
    def _evaluate(self, x: Tensor, y: Tensor) -> float | None:
        self.model.eval()  # no dropout, so no random numbers: whether this ran is invisible to training
        total = torch.zeros((), device=self.device, dtype=torch.float32)
        for start in range(0, len(x), self.batch_size):
            if self.progress.stop_requested:
                return None
            logits = self._logits(x[start : start + self.batch_size])
            labels = y[start : start + self.batch_size].to(self.device)
            total += F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return float(total) / max(1, len(x))

    # -- when to stop ---------------------------------------------------------------------------------------------

    def _check_early_stopping(self, val_loss: float) -> bool:
        """Return True if val_loss has not improved by min_delta for patience epochs. Call once per epoch."""
        if self.early_stopping_patience is None:
            return False
        if val_loss < self._best_val_loss - self.early_stopping_min_delta:
            self._best_val_loss = val_loss
            self._epochs_without_improvement = 0
            return False
        self._epochs_without_improvement += 1
        return self._patience_is_over()

    def _patience_is_over(self) -> bool:
        patience = self.early_stopping_patience
        return patience is not None and self.epoch > 0 and self._epochs_without_improvement >= patience

    def _out_of_steps(self) -> bool:
        return self.max_steps is not None and self.step >= self.max_steps

    def _leave(self, reason: str) -> dict[str, Any]:
        if reason == "prune":
            return self._result("pruned")
        if self._saved_at != (self.epoch, self.position):
            self.saver.say(self.checkpoint_bytes, self.progress, leaving=True)
            self._save_checkpoint()
        return self._result("interrupted")

    def _drop_group(self) -> None:
        """Undo a group that is not complete: its gradients, and the random numbers it used."""
        self.optimizer.zero_grad()
        if self._group_rng is not None:
            self._set_rng_state(self._group_rng)

    # -- bookkeeping ----------------------------------------------------------------------------------------------

    def _add_loss(self, loss_sum: float, samples: int) -> None:
        if not math.isfinite(loss_sum):
            raise NonFiniteLoss(
                f"training loss is {loss_sum} in epoch {self.epoch + 1}, step {self.step + 1}: lower learning_rate "
                f"({self.lr})"
            )
        self._loss_sum += loss_sum

    def _epoch_loss(self) -> float:
        return self._loss_sum / max(1, self.position)

    def _finish_epoch(self, train_loss: float, value: float) -> None:
        self.epoch += 1
        self.position = 0
        self._loss_sum = 0.0
        self.train_losses.append(train_loss)
        self.val_losses.append(value)
        if value < self.best_value:
            self.best_value, self.best_epoch = value, self.epoch

    def _settle(self) -> None:
        if not self._settled:
            self._settled = True
            self.progress.settled()
            self.saver.say(self.checkpoint_bytes, self.progress)

    def _result(self, stop_reason: str) -> dict[str, Any]:
        return {
            "value": self.best_value if math.isfinite(self.best_value) else None,
            "epochs": self.epoch,
            "best_epoch": self.best_epoch,
            "stop_reason": stop_reason,
            "steps": self.step,
            "train_losses": self.train_losses,
            "val_losses": self.val_losses,
        }

    # -- checkpoints ----------------------------------------------------------------------------------------------

    SCALARS = (
        "epoch",
        "position",
        "step",
        "_loss_sum",
        "_best_val_loss",
        "_epochs_without_improvement",
        "best_value",
        "best_epoch",
        "train_losses",
        "val_losses",
    )

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one, but for its header."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def _save_checkpoint(self) -> None:
        """Write all it takes to go on as if nothing had happened."""
        if self.saver.path is None:
            return
        facts = {name: getattr(self, name) for name in self.SCALARS}
        facts["rng"] = {name: bytes(state.numpy()).hex() for name, state in self._rng_state().items()}
        if self.saver.save(self._tensors(), facts, self.epoch, self.progress):
            self._saved_at = (self.epoch, self.position)

    def _tensors(self) -> dict[str, Tensor]:
        model = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return model | {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint, bit-equal on CPU. Raises CheckpointRejected, with the trainer as it was."""
        facts = self.saver.load(path, self._tensors())
        for name in self.SCALARS:
            setattr(self, name, facts[name])
        generators = {name: bytearray.fromhex(state) for name, state in facts["rng"].items()}
        self._set_rng_state({name: torch.frombuffer(state, dtype=torch.uint8) for name, state in generators.items()})
        self.saver.take_over_model(path)
        self.progress.checkpoint(str(path), self.epoch)  # until we write one ourselves, this is the last good one

    def _rng_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            state["mps"] = torch.mps.get_rng_state()
        return state

    def _set_rng_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        elif self.device.type == "mps" and "mps" in state:
            torch.mps.set_rng_state(state["mps"])
