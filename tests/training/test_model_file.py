"""Models as files: what a trial leaves is its best epoch's model, which anybody's safetensors reads and ours builds."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

import training
from tests.training.test_hpo import SMALL, make_context
from training import data, hpo, model_file, table
from training.errors import TrainingInputError
from training.progress import Silent
from training.saver import Saver
from training.trainer import Trainer

PARAMS = {
    **SMALL,
    "learning_rate": 3e-3,
    "weight_decay": 0.0,
    "warmup_steps": 1,
    "epochs": 3,
    "dropout": 0.1,
    "micro_batch": 256,
    "accumulation_steps": 1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A trial's folder and result."""
    folder = tmp_path_factory.mktemp("trial")
    return folder, hpo.objective({"params": PARAMS, "context": make_context(), "folder": str(folder)}, Silent())


def test_a_loaded_model_has_the_loss_that_the_trial_reported(trained: tuple[Path, dict[str, Any]]) -> None:
    """Built from the file alone, on the validation part: the value in the study, to float precision."""
    folder, result = trained
    model = training.load_model(folder / "model.safetensors")
    dataset = data.load(None, model.context["horizon"], model.context.get("context_length", 60))
    windows, labels = hpo.samples(dataset, dataset.validation, "cpu")
    with torch.no_grad():
        logits = torch.cat([model.module(part) for part in windows.split(256)])
    loss = float(F.binary_cross_entropy_with_logits(logits, labels))
    assert math.isclose(loss, result["value"], rel_tol=1e-5)
    assert math.isclose(model.value, result["value"]) and model.epoch == result["best_epoch"]
    assert model.params == PARAMS and model.features == dataset.names and not model.module.training
    assert result["model"] == str(folder / "model.safetensors")


def test_the_features_mean_and_deviation_are_those_of_the_data(trained: tuple[Path, dict[str, Any]]) -> None:
    """A raw close, less the mean and by the deviation in the file, is the normalised one that was trained on."""
    model = training.load_model(trained[0] / "model.safetensors")
    dataset = data.load(None, 1, 60)
    close = torch.from_numpy(table.read(None).columns["close"])
    place = model.features.index("close")
    ours = (close - model.mean[place]) / model.std[place]
    known = slice(dataset.train.first, None)
    assert torch.allclose(ours[known].float(), torch.from_numpy(dataset.features[known, place]), atol=1e-5)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.safetensors"])
def test_the_safetensors_library_reads_what_we_write(trained: tuple[Path, dict[str, Any]], name: str) -> None:
    """Names, shapes and numbers as another program sees them."""
    model = training.load_model(trained[0] / "model.safetensors").module.state_dict()
    with safe_open(trained[0] / name, "pt") as file:
        prefix = "model." if name.startswith("checkpoint") else ""
        assert {f"{prefix}{key}" for key in model} <= set(file.keys())
        found = {key: file.get_tensor(f"{prefix}{key}") for key in model}
        assert json.loads(file.metadata()["headroom"])["facts"]["magic"].startswith("headroom-")
    assert all(found[key].shape == model[key].shape for key in model)
    if name.startswith("model"):
        assert all(torch.equal(found[key], model[key]) for key in model)


class Step(torch.nn.Module):
    """A model of one weight, which training moves steadily: its validation loss has its least value under way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> Tensor:
        """The same logit for every sample."""
        return self.weight.expand(len(x))


def overfitting(folder: Path, epochs: int) -> Trainer:
    """Training labels are all 1, validation labels half: the best epoch is the one whose weight is nearest to 0."""
    ones, half = torch.ones(8), torch.tensor([0.0, 1.0] * 4)
    x = torch.zeros(8, 1)
    return Trainer(
        Step(),
        (x, ones),
        (x, half),
        epochs=epochs,
        lr=0.25,
        weight_decay=0.0,
        saver=Saver(folder / "checkpoint.safetensors", model_facts={"params": {}, "context": {}}),
    )


def weight_in(path: Path) -> float:
    """The one weight in a model file."""
    with safe_open(path, "pt") as file:
        return float(file.get_tensor("weight"))


def weight_of(trainer: Trainer) -> float:
    """The one weight of the model that is trained."""
    return float(trainer.model.get_parameter("weight").detach())


def test_the_best_epochs_weights_are_kept_not_the_last_ones(tmp_path: Path) -> None:
    """A trial that overfits in the end leaves the model it had at its best."""
    trainer = overfitting(tmp_path, 12)
    found = trainer.train()
    assert 1 < found["best_epoch"] < 12
    again = overfitting(tmp_path / "other", found["best_epoch"])
    again.saver.path = None
    again.train()
    assert weight_in(tmp_path / "model.safetensors") == weight_of(again)
    assert weight_in(tmp_path / "model.safetensors") != weight_of(trainer)


def test_a_resumed_attempt_keeps_the_best_model_of_the_one_before(tmp_path: Path) -> None:
    """The best epoch was before the interruption: its model lies in the new attempt's folder, also without the old."""
    first, second = tmp_path / "a1", tmp_path / "a2"
    first.mkdir()
    second.mkdir()
    best = overfitting(first, 8).train()["best_epoch"]
    kept = weight_in(first / "model.safetensors")
    later = overfitting(second, 12)
    later.resume(first / "checkpoint.safetensors")
    (first / "model.safetensors").unlink()
    assert later.train()["best_epoch"] == best < 8
    assert weight_in(second / "model.safetensors") == kept


def test_a_model_that_cannot_be_written_costs_a_note_and_no_stale_file(tmp_path: Path) -> None:
    """An earlier epoch's model would pass for the best one's."""
    notes: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    trainer = overfitting(tmp_path, 2)
    trainer.train()
    assert (tmp_path / "model.safetensors").exists()
    trainer.epochs, trainer.progress = 3, Noting()
    (tmp_path / f"model.safetensors.{os.getpid()}.tmp").mkdir()  # where it would be written first
    assert trainer.train()["best_epoch"] == 3
    assert len(notes) == 1 and "not written" in notes[0]
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("what", ["missing", "checkpoint", "torn", "text"])
def test_what_is_no_model_is_one_line(trained: tuple[Path, dict[str, Any]], tmp_path: Path, what: str) -> None:
    """Each wrong file is named, with what is wrong about it."""
    path, good = tmp_path / "m.safetensors", (trained[0] / "model.safetensors").read_bytes()
    match what:
        case "checkpoint":
            path = trained[0] / "checkpoint.safetensors"
        case "torn":
            path.write_bytes(good[:-100])
        case "text":
            path.write_text("not a model")
    with pytest.raises(TrainingInputError) as caught:
        training.load_model(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_any_flipped_byte_of_the_weights_is_noticed(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A model is what was trained, or an error."""
    good, path = (trained[0] / "model.safetensors").read_bytes(), tmp_path / model_file.NAME
    for place in range(len(good) - 1, len(good) // 2, -len(good) // 9):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(TrainingInputError, match="is damaged"):
            training.load_model(path)
