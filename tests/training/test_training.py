"""The trainer: gradient accumulation, early stopping, stop requests, checkpoints and resuming."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from training import checkpoint
from training.adamw import AdamW
from training.errors import CheckpointRejected, NonFiniteLoss, TrainingInputError
from training.patchtst import PatchTST, PatchTSTConfig
from training.progress import Silent
from training.saver import Saver
from training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
Seen = TypeVar("Seen")

torch.set_num_threads(1)


def make_samples(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of noise with labels that a model can learn."""
    x = torch.randn(n, 20, 3, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, -5:, 0].mean(dim=1) > 0).float()


def make_model(dropout: float = 0.0, seed: int = 0) -> PatchTST:
    """A real model, tiny."""
    torch.manual_seed(seed)
    shape = {"n_features": 3, "context_length": 20, "patch_length": 5, "stride": 5}
    return PatchTST(PatchTSTConfig(**shape, d_model=8, n_layers=2, n_heads=2, d_ff=16, dropout=dropout))


def make_trainer(n: int = 64, *, dropout: float = 0.0, **arguments: Any) -> Trainer:
    """A trainer of that model on n samples, with 32 for validation."""
    defaults: dict[str, Any] = {"val": make_samples(32, seed=1), "epochs": 2, "batch_size": 16, "lr": 1e-2}
    return Trainer(make_model(dropout), make_samples(n), **(defaults | arguments))


def weights(trainer: Trainer) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def gradients_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of each parameter's gradient."""
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def before_step(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, look: Callable[[], Seen]) -> list[Seen]:
    """What `look` gives before each optimizer step from now on; the list grows."""
    seen: list[Seen] = []
    step = trainer.optimizer.step

    def look_and_step() -> None:
        seen.append(look())
        step()

    monkeypatch.setattr(trainer.optimizer, "step", look_and_step)
    return seen


class Flat(nn.Module):
    """A model that cannot learn, so that the validation loss is a plateau."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits that do not depend on the parameter's value."""
        return (self.bias * 0.0).expand(len(x))


class Stop(Silent):
    """A progress that asks to stop at the given look (one look per micro-batch) and records what it is told."""

    def __init__(self, reason: str, at_look: int) -> None:
        self.reason = reason
        self.left = at_look
        self.reports: list[tuple[int, float]] = []
        self.checkpoints: list[str] = []

    @property
    def stop_requested(self) -> str | None:  # type: ignore[override]  # a Silent's is never set
        """None until it is time."""
        self.left -= 1
        return self.reason if self.left < 0 else None

    def report(self, step: int, value: float) -> None:
        """Record it."""
        self.reports.append((step, value))

    def checkpoint(self, path: str, step: int = 0) -> None:
        """Record it."""
        self.checkpoints.append(path)


class TestTrainOneEpoch:
    """One epoch and gradient accumulation."""

    def test_gradient_accumulation_steps_1(self) -> None:
        """Without accumulation each batch is one step, as a plain loop with torch.optim.AdamW does it, to the bit."""
        trainer = make_trainer(64, epochs=1)
        trainer.train()
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-4, fused=True)
        x, y = make_samples(64)
        for picked in torch.randperm(64, generator=torch.Generator().manual_seed(0)).split(16):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(x[picked]), y[picked]).backward()
            optimizer.step()
        assert trainer.step == 4
        expected = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.testing.assert_close(weights(trainer), expected, rtol=0, atol=1e-6)

    def test_gradient_accumulation_steps_4(self) -> None:
        """The epoch's loss is the mean over its samples, however they are cut into micro-batches."""
        whole = make_trainer(60, batch_size=64)._train_epoch(0)
        cut = make_trainer(60, batch_size=16, accumulation_steps=4)._train_epoch(0)
        assert cut == pytest.approx(whole, rel=1e-6)

    @pytest.mark.parametrize(("batch_size", "accumulation_steps", "steps"), [(16, 1, 7), (16, 4, 2), (8, 3, 5)])
    def test_gradient_accumulation_optimizer_step_frequency(
        self, monkeypatch: pytest.MonkeyPatch, batch_size: int, accumulation_steps: int, steps: int
    ) -> None:
        """The optimizer steps once per group, and once for the rest of an epoch."""
        trainer = make_trainer(100, epochs=1, batch_size=batch_size, accumulation_steps=accumulation_steps)
        called = before_step(trainer, monkeypatch, lambda: None)
        trainer._train_epoch(0)
        assert len(called) == trainer.step == steps

    @pytest.mark.parametrize("samples", [512, 512 + 100, 512 + 3, 200])
    def test_accumulated_equals_whole_batch(self, samples: int) -> None:
        """Weights after an epoch of 8 x 32 equal those of 1 x 256, also when the last group is short."""
        cut = make_trainer(samples, epochs=1, batch_size=32, accumulation_steps=8)
        whole = make_trainer(samples, epochs=1, batch_size=256)
        cut.train()
        whole.train()
        assert cut.step == whole.step == math.ceil(samples / 256)
        torch.testing.assert_close(weights(cut), weights(whole), rtol=0, atol=2e-5)
        assert cut.val_losses == pytest.approx(whole.val_losses, rel=1e-4)

    @pytest.mark.parametrize("samples", [256, 200, 3])
    def test_accumulated_gradient_equals_whole_gradient(self, monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
        """The gradient itself is equal within float tolerance: AdamW's first step would hide a wrong scale."""
        gradients = []
        for batch_size, accumulation_steps in ((32, 8), (256, 1)):
            trainer = make_trainer(samples, batch_size=batch_size, accumulation_steps=accumulation_steps)
            gradients.append(before_step(trainer, monkeypatch, functools.partial(gradients_of, trainer)))
            trainer._train_epoch(0)
        (cut,), (whole,) = gradients
        for name, gradient in cut.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-7)

    def test_warm_up_rises_linearly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The learning rate reaches lr after warmup_steps optimizer steps and stays."""
        trainer = make_trainer(64, epochs=2, warmup_steps=4, lr=0.1)
        rates = before_step(trainer, monkeypatch, lambda: trainer.optimizer.lr)
        trainer.train()
        assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1])

    def test_validation_loss_is_exact_over_samples(self) -> None:
        """A short last validation batch weighs by its samples."""
        trainer = make_trainer(val=make_samples(37, seed=1))
        x, y = make_samples(37, seed=1)
        with torch.no_grad():
            expected = nn.functional.binary_cross_entropy_with_logits(trainer.model.eval()(x), y)
        assert trainer._evaluate_val() == pytest.approx(float(expected), rel=1e-6)

    def test_order_differs_between_epochs_and_seeds_repeat(self) -> None:
        """Same seed, same weights; another seed, another order."""
        runs = [make_trainer(64, dropout=0.2, seed=seed) for seed in (0, 0, 1)]
        for trainer in runs:
            torch.manual_seed(5)
            trainer.train()
        assert torch.equal(weights(runs[0]), weights(runs[1]))
        assert not torch.equal(weights(runs[0]), weights(runs[2]))

    def test_windows_may_be_a_view(self) -> None:
        """Training on overlapping windows of one array equals training on their copies."""
        days = torch.randn(80, 3, generator=torch.Generator().manual_seed(3))
        view = days.unfold(0, 20, 1).transpose(1, 2)
        labels = (torch.arange(len(view)) % 2).float()
        results = []
        for x in (view, view.contiguous()):
            trainer = Trainer(make_model(), (x, labels), epochs=1, batch_size=16)
            trainer.train()
            results.append(weights(trainer))
        assert torch.equal(*results)

    @pytest.mark.parametrize("where", ["train", "validation"])
    def test_nan_loss_is_an_error(self, where: str) -> None:
        """A loss that is not finite raises before it reaches the weights."""
        trainer = make_trainer()
        target = trainer.train_samples if where == "train" else trainer.val_samples
        assert target is not None
        target[0][3] = math.nan
        with pytest.raises(NonFiniteLoss, match=f"{'training' if where == 'train' else 'validation'} loss is nan"):
            trainer.train()
        assert torch.isfinite(weights(trainer)).all()

    @pytest.mark.parametrize("name", ["epochs", "batch_size", "accumulation_steps"])
    def test_zero_is_refused(self, name: str) -> None:
        """A count of zero is an error with the name and the value."""
        with pytest.raises(TrainingInputError, match=f"{name} must be at least 1, not 0"):
            make_trainer(**{name: 0})


class TestTrainerWithSplits:
    """Early stopping, and what `train` returns."""

    def test_early_stopping_disabled_by_default(self) -> None:
        """patience=None means that every epoch is trained."""
        result = Trainer(Flat(), make_samples(32), make_samples(16), epochs=30, batch_size=32).train()
        assert (result["epochs"], result["stop_reason"]) == (30, "completed")

    def test_early_stopping_triggers_after_patience(self) -> None:
        """A plateau ends training after the first epoch and `patience` more."""
        trainer = Trainer(
            Flat(), make_samples(32), make_samples(16), epochs=30, batch_size=32, early_stopping_patience=5
        )
        result = trainer.train()
        assert result["epochs"] == 6 and result["best_epoch"] == 1

    def test_early_stopping_resets_on_improvement(self) -> None:
        """An improvement sets the counter back."""
        trainer = make_trainer(early_stopping_patience=3)
        stops = [trainer._check_early_stopping(loss) for loss in (1.0, 1.0, 1.0, 0.5, 0.5, 0.5)]
        trainer.epoch = 6
        assert not any(stops) and trainer._epochs_without_improvement == 2
        assert trainer._check_early_stopping(0.5)

    def test_early_stopping_respects_min_delta(self) -> None:
        """Improvements below min_delta do not reset the counter, not even when they add up slowly."""
        trainer = make_trainer(early_stopping_patience=3, early_stopping_min_delta=0.1)
        trainer.epoch = 1
        assert [trainer._check_early_stopping(loss) for loss in (1.0, 0.95, 0.94, 0.93)] == [False, False, False, True]

    def test_early_stopping_result_includes_stop_reason(self) -> None:
        """The result says that it was early stopping."""
        trainer = Trainer(
            Flat(), make_samples(32), make_samples(16), epochs=30, batch_size=32, early_stopping_patience=2
        )
        assert trainer.train()["stop_reason"] == "early_stopping"

    def test_early_stopping_needs_validation(self) -> None:
        """Without validation data it is off."""
        trainer = Trainer(Flat(), make_samples(32), epochs=8, batch_size=32, early_stopping_patience=1)
        assert trainer.train()["stop_reason"] == "completed"

    def test_result_is_the_best_validation_loss(self) -> None:
        """`value` is the least validation loss, also where it improved by less than min_delta."""
        result = make_trainer(epochs=6, early_stopping_patience=50, early_stopping_min_delta=10.0).train()
        assert result["value"] == min(result["val_losses"])
        assert result["val_losses"][result["best_epoch"] - 1] == result["value"]

    def test_it_learns(self) -> None:
        """Learnable labels are learned: the loss falls well below that of guessing."""
        result = make_trainer(512, epochs=15, batch_size=64).train()
        assert result["value"] < 0.35

    def test_max_steps(self) -> None:
        """max_steps ends training within an epoch, with a validation loss all the same."""
        result = make_trainer(64, epochs=10, max_steps=6).train()
        assert (result["steps"], result["stop_reason"], result["epochs"]) == (6, "max_steps", 2)
        assert math.isfinite(result["value"])

    def test_settled_is_said_once_and_early(self) -> None:
        """`settled` comes after the second step of the first epoch, not hours later, and only once."""

        class Steps(Silent):
            """Counts."""

            def __init__(self) -> None:
                self.ticks = 0
                self.settled_at: list[int] = []

            def tick(self) -> None:
                """Count it."""
                self.ticks += 1

            def settled(self) -> None:
                """Remember when."""
                self.settled_at.append(self.ticks)

        progress = Steps()
        make_trainer(64, progress=progress).train()
        assert progress.settled_at == [2] and progress.ticks == 8


class TestCheckpoints:
    """Interrupt and go on."""

    @pytest.mark.parametrize("at_look", range(0, 40, 3))
    def test_resumed_run_is_bit_equal(self, tmp_path: Path, at_look: int) -> None:
        """Stopped at any micro-batch and resumed, a run ends with the same weights and losses, to the bit."""
        settings: dict[str, Any] = {
            "dropout": 0.2,
            "epochs": 3,
            "batch_size": 8,
            "accumulation_steps": 3,
            "warmup_steps": 5,
        }
        settings |= {"early_stopping_patience": 10}
        torch.manual_seed(7)
        whole = make_trainer(50, **settings)
        expected = whole.train()

        path = tmp_path / "checkpoint.safetensors"
        torch.manual_seed(7)
        first = make_trainer(50, **settings, progress=Stop("drain", at_look), saver=Saver(path, task="t"))
        stopped = first.train()
        if stopped["stop_reason"] == "completed":
            assert torch.equal(weights(first), weights(whole))
            return
        assert stopped["stop_reason"] == "interrupted"
        second = make_trainer(50, **settings, saver=Saver(task="t"))
        torch.manual_seed(99)
        second.resume(path)
        assert second.train() == expected
        assert torch.equal(weights(second), weights(whole))

    def test_killed_run_loses_at_most_an_epoch(self, tmp_path: Path) -> None:
        """The checkpoint of the last complete epoch is there without any stop request, and leads to the same end."""
        path = tmp_path / "checkpoint.safetensors"
        whole = make_trainer(dropout=0.2, epochs=4, saver=Saver(task="t"))
        torch.manual_seed(7)
        make_trainer(dropout=0.2, epochs=2, saver=Saver(path, task="t")).train()
        second = make_trainer(dropout=0.2, epochs=4, saver=Saver(task="t"))
        second.resume(path)
        assert second.epoch == 2
        resumed = second.train()
        torch.manual_seed(7)
        whole = make_trainer(dropout=0.2, epochs=4, saver=Saver(task="t"))
        assert resumed == whole.train()

    def test_resume_after_the_end_does_not_train(self, tmp_path: Path) -> None:
        """The checkpoint of a trial that had ended gives the same result at once."""
        path = tmp_path / "checkpoint.safetensors"
        arguments: dict[str, Any] = {"epochs": 30, "batch_size": 32, "early_stopping_patience": 3}
        first = Trainer(Flat(), make_samples(32), make_samples(16), **arguments, saver=Saver(path))
        expected = first.train()
        second = Trainer(Flat(), make_samples(32), make_samples(16), **arguments)
        second.resume(path)
        assert second.train() == expected and second._steps_here == 0

    def test_prune_leaves_without_a_checkpoint(self, tmp_path: Path) -> None:
        """A pruned trial is over: nothing is written for it."""
        path = tmp_path / "checkpoint.safetensors"
        result = make_trainer(progress=Stop("prune", 2), saver=Saver(path)).train()
        assert result["stop_reason"] == "pruned" and not path.exists()

    @pytest.mark.parametrize(
        "damage", ["truncated", "empty", "foreign", "other_task", "missing", "version", "other_model"]
    )
    def test_bad_checkpoint_is_rejected(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
        """Torn, foreign, another task's: each is told from a good one, and the trainer stays as it was."""
        path = tmp_path / "checkpoint.safetensors"
        make_trainer(saver=Saver(path, task="t")).train()
        data = bytearray(path.read_bytes())
        match damage:
            case "truncated":
                path.write_bytes(data[: len(data) // 2])
            case "empty":
                path.write_bytes(b"")
            case "foreign":
                torch.save({"model": {}}, path)
            case "version":
                monkeypatch.setattr(checkpoint, "VERSION", 99)
                make_trainer(saver=Saver(path, task="t")).train()
                monkeypatch.undo()
            case "other_task":
                make_trainer(saver=Saver(path, task="another")).train()
            case "other_model":
                Trainer(Flat(), make_samples(9), epochs=1, saver=Saver(path, task="t")).train()
            case "missing":
                path.unlink()
        trainer = make_trainer(saver=Saver(task="t"))
        before = weights(trainer)
        with pytest.raises(CheckpointRejected, match=r"checkpoint\.safetensors"):
            trainer.resume(path)
        assert torch.equal(weights(trainer), before) and trainer.epoch == 0

    def test_damaged_bytes_never_reach_the_weights(self, tmp_path: Path) -> None:
        """Whichever byte is flipped, the checkpoint is rejected, or the byte did not matter (a space in the header)."""
        path = tmp_path / "checkpoint.safetensors"
        first = make_trainer(saver=Saver(path, task="t"))
        first.train()
        good, rejected = path.read_bytes(), 0
        places = range(7, len(good), len(good) // 80)
        for place in places:
            path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
            trainer = make_trainer(saver=Saver(task="t"))
            before = weights(trainer)
            try:
                trainer.resume(path)
                assert torch.equal(weights(trainer), weights(first)) and trainer.val_losses == first.val_losses
            except CheckpointRejected:
                assert torch.equal(weights(trainer), before) and trainer.epoch == 0
                rejected += 1
        assert rejected > len(places) / 2

    def test_failed_write_keeps_the_last_good_one(self, tmp_path: Path) -> None:
        """A checkpoint that cannot be written costs neither the run nor the one before, and leaves no litter."""
        folder = tmp_path / "attempt"
        folder.mkdir()
        path = folder / "checkpoint.safetensors"
        notes: list[str] = []

        class Noting(Silent):
            """A progress that keeps what it is to pass on."""

            def note(self, text: str) -> None:
                """Keep it."""
                notes.append(text)

        trainer = make_trainer(epochs=1, saver=Saver(path), progress=Noting())
        trainer.train()
        assert notes == []
        good = path.read_bytes()
        trainer.epochs = 2
        trainer.saver.path = folder / "gone" / "checkpoint.safetensors"
        assert trainer.train()["stop_reason"] == "completed"
        assert len(notes) == 1 and "checkpoint not written" in notes[0]
        assert path.read_bytes() == good and list(folder.iterdir()) == [path]

    def test_neither_writing_nor_reading_copies_the_model(self, tmp_path: Path) -> None:
        """In a process of its own: a checkpoint of 90 MiB leaves the memory peak within a few MiB, in both directions.

        A resumed trial that needed more than the one before would break the promise its reservation makes.
        """
        code = """
import sys, torch
from pathlib import Path
from training.patchtst import PatchTST, PatchTSTConfig
from training.saver import Saver
from training.trainer import Trainer
from training.memory import peak_bytes
torch.set_num_threads(1)
model = PatchTST(PatchTSTConfig(d_model=512, n_layers=3, n_heads=8, d_ff=1024))
x, y = torch.randn(4, 60, 25), torch.ones(4)
trainer = Trainer(model, (x, y), epochs=1, batch_size=4, saver=Saver(Path(sys.argv[1]) / "c.pt"))
trainer.train_samples[0][:] = 0
trainer.epoch = 1
before = peak_bytes()
trainer._save_checkpoint()
saved = peak_bytes()
trainer.resume(Path(sys.argv[1]) / "c.pt")
print(saved - before, peak_bytes() - saved, (Path(sys.argv[1]) / "c.pt").stat().st_size)
"""
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        saving, resuming, size = map(int, run.stdout.split())
        assert size > 60 * 2**20
        # One chunk of reading and its copy is all there may be.
        assert saving < 8 * 2**20 and resuming < 40 * 2**20

    def test_task_digest(self) -> None:
        """How a trial is computed may differ between attempts, what it computes may not."""
        params, context = {"d_model": 8, "learning_rate": 1e-3, "micro_batch": 8}, {"seed": 0, "threads": 1}
        digest = checkpoint.task_digest(params, context, "data")
        assert digest == checkpoint.task_digest({**params, "micro_batch": 4}, {**context, "threads": 2}, "data")
        others = [
            checkpoint.task_digest({**params, "learning_rate": 2e-3}, context, "data"),
            checkpoint.task_digest(params, {"seed": 1}, "data"),
            checkpoint.task_digest(params, context, "other data"),
        ]
        assert digest not in others and len(set(others)) == 3


def test_adamw_is_torchs() -> None:
    """Our AdamW and torch.optim.AdamW (fused) give the same weights, to the bit."""
    models = [make_model(), make_model()]
    ours = AdamW(models[0].parameters(), lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    optimizers: list[AdamW | torch.optim.AdamW] = [ours, theirs]
    x, y = make_samples(16)
    for _ in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(x), y).backward()
            optimizer.step()
    for mine, torchs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, torchs)
