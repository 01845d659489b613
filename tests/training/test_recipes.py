"""Every recipe: its name, what it computes, that it learns, and that it goes on from a checkpoint bit-equal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scheduler.settings import study_keys
from training import checkpoint, recipe, tensor_file
from training.errors import TrainingInputError
from training.recipe import RECIPES, Recipe, named

torch = pytest.importorskip("torch")

from training import adam8bit, computing, optimizers, rounding  # noqa: E402
from training.adamw import AdamW  # noqa: E402
from training.patchtst import PatchTST, PatchTSTConfig  # noqa: E402
from training.saver import Saver  # noqa: E402
from training.trainer import Trainer  # noqa: E402

CONFIG = PatchTSTConfig(d_model=64, n_layers=3, n_heads=4, d_ff=128, dropout=0.1)
each = pytest.mark.parametrize("made", RECIPES, ids=lambda made: made.name)


def built(made: Recipe, config: PatchTSTConfig = CONFIG) -> PatchTST:
    """The model as a trial builds it; the same weights each time, as far as the recipe holds them."""
    torch.manual_seed(0)
    return PatchTST(config, computing.storage(made))


def samples(count: int = 96) -> tuple[Any, Any]:
    """Windows whose label can be learnt: the sign of their mean."""
    x = torch.randn(count, 60, 25, generator=torch.Generator().manual_seed(1))
    x += torch.randn(count, 1, 1, generator=torch.Generator().manual_seed(2))
    return x, (x.mean((1, 2)) > 0).float()


def trainer(made: Recipe, **given: Any) -> Trainer:
    """A training of some steps; batch 32 as two micro-batches."""
    options: dict[str, Any] = {"epochs": 4, "batch_size": 16, "accumulation_steps": 2, "lr": 1e-3}
    options |= {"recipe": made, **given}
    return Trainer(built(made), samples(), samples(), **options)


# -- names ----------------------------------------------------------------------------------------------------------


def test_the_settings_know_the_same_recipes_in_the_same_order() -> None:
    """The scheduler imports nothing of training: its list is held to this one."""
    assert tuple(made.name for made in RECIPES) == study_keys.RECIPES


def test_an_unknown_recipe_is_refused_with_the_names_there_are() -> None:
    """One line with the value and the choices."""
    with pytest.raises(TrainingInputError, match="unknown recipe 'fp8': choose from fp32_adamw, "):
        named("fp8")


def test_a_recipe_is_named_without_torch() -> None:
    """The driver sizes by recipe, and never imports torch."""
    code = "import sys; from training import recipe, footprint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_recipe_imports_dynamo() -> None:
    """torch._dynamo is 72 MiB in each trial process, and comes with torch's optimizers; sympy 25."""
    code = (
        "import sys\n"
        "from tests.training import test_recipes as t\n"
        "for made in t.RECIPES: t.trainer(made, max_steps=1).train()\n"
        "sys.exit('torch._dynamo' in sys.modules or 'sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0


# -- what is computed -----------------------------------------------------------------------------------------------


def test_layers_that_run_again_give_the_same_losses_and_weights_to_the_bit() -> None:
    """Activation checkpointing changes memory and time, nothing else: dropout draws the same numbers again."""
    plain = trainer(named("fp32_adamw"))
    expected = plain.train()["val_losses"]
    again = trainer(named("fp32_recompute"))
    assert again.train()["val_losses"] == expected
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_layers_that_run_again_keep_their_inputs_alone() -> None:
    """Of a layer more, backward keeps one stream of fp32 numbers more, and no more."""

    def kept(layers: int) -> int:
        made = named("fp32_recompute")
        model = computing.prepare(built(made, PatchTSTConfig(d_model=64, n_layers=layers, n_heads=4, d_ff=128)), made)
        found: dict[int, Any] = {}

        def pack(tensor: Any) -> Any:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(samples(4)[0])
        return sum(storage.nbytes() for storage in found.values())

    assert kept(3) - kept(2) == 4 * 4 * 11 * 64


@each
def test_the_matrices_are_stored_as_the_recipe_says(made: Recipe) -> None:
    """Weights and gradients of the layers' matrices in its type, all else in fp32; the values fp32's own, rounded."""
    run = trainer(made)
    wide = built(named("fp32_adamw"))
    chosen = {id(matrix) for matrix in computing.matrices(run.model)}
    assert len(chosen) == 4 * CONFIG.n_layers
    for parameter, other in zip(run.model.parameters(), wide.parameters(), strict=True):
        expected = computing.storage(made) if id(parameter) in chosen else torch.float32
        assert parameter.dtype == expected and parameter.grad is not None and parameter.grad.dtype == expected
        assert torch.equal(parameter, other.to(expected))


@each
def test_it_learns(made: Recipe) -> None:
    """The validation loss falls well below that of guessing, to within a tenth of what fp32 AdamW reaches."""
    reached = trainer(made, epochs=12).train()["value"]
    best = trainer(named("fp32_adamw"), epochs=12).train()["value"]
    assert best < 0.45
    assert reached < best + 0.1


@each
def test_the_stream_between_the_layers_is_fp32(made: Recipe) -> None:
    """Hundreds of layers each add less to it than bf16 could tell apart."""
    run, seen = trainer(made), []
    for layer in run.model.get_submodule("layers").children():
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    run._logits(samples(4)[0])
    assert set(seen) == {torch.float32}


# -- checkpoints ----------------------------------------------------------------------------------------------------


@each
def test_it_resumes_bit_equal(made: Recipe, tmp_path: Path) -> None:
    """Stopped after two of four epochs and taken up by a new process's trainer: the same losses and weights."""
    whole = trainer(made)
    expected = whole.train()
    trainer(made, epochs=2, saver=Saver(tmp_path / "c")).train()
    torch.manual_seed(99)
    rest = trainer(made)
    rest.resume(tmp_path / "c")
    assert rest.train()["val_losses"] == expected["val_losses"]
    for name, tensor in whole._tensors().items():
        assert torch.equal(tensor, rest._tensors()[name]), name


@each
def test_a_checkpoint_is_readable_by_the_safetensors_library(made: Recipe, tmp_path: Path) -> None:
    """Also bf16 weights and 8-bit moments: the format's own types."""
    library = pytest.importorskip("safetensors.torch")
    run = trainer(made, epochs=1, saver=Saver(tmp_path / "c"))
    run.train()
    found = library.load_file(tmp_path / "c")
    assert set(found) == set(run._tensors())
    assert all(torch.equal(found[name], tensor) for name, tensor in run._tensors().items())


def test_a_checkpoint_of_another_recipe_is_rejected(tmp_path: Path) -> None:
    """The recipe is a part of what a trial computes."""
    params = {"d_model": 64}
    digests = {checkpoint.task_digest(params, {"recipe": made.name}) for made in RECIPES}
    assert len(digests) == len(RECIPES)


@each
def test_a_checkpoint_is_as_large_as_is_said(made: Recipe, tmp_path: Path) -> None:
    """The size that is named before the first one is written."""
    run = trainer(made, epochs=1, saver=Saver(tmp_path / "c"))
    run.train()
    with (tmp_path / "c").open("rb") as file:
        found = tensor_file.contents(file)
    tensors = sum(entry.end - entry.begin for entry in found.entries.values())
    parts = recipe.held(made, CONFIG.d_model, CONFIG.n_layers, CONFIG.d_ff, CONFIG.param_count)
    assert tensors == parts["weights"] + parts["optimizer_state"]


@each
def test_dropout_draws_the_same_numbers_under_every_recipe(made: Recipe) -> None:
    """What rounds by chance has a generator of its own: trainings of one seed are comparable across recipes."""
    trainer(made, epochs=2).train()
    after = torch.get_rng_state()
    trainer(named("fp32_adamw"), epochs=2).train()
    assert torch.equal(after, torch.get_rng_state())


# -- 8-bit moments --------------------------------------------------------------------------------------------------


def test_eight_bit_moments_follow_adamw() -> None:
    """Twenty steps on the same gradients: weights move as AdamW's do, to 5 % of the way they went."""
    torch.manual_seed(0)
    start = torch.randn(64, 64)
    exact, small = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    reference = AdamW([exact], lr=1e-2, weight_decay=1e-3)
    ours = adam8bit.Adam8bit([small], lr=1e-2, weight_decay=1e-3)
    spread = torch.logspace(-6, 0, 64)[:, None]  # rows of a block differ by orders of magnitude
    for _ in range(20):
        gradient = torch.randn(64, 64).add_(0.5).mul_(spread)
        exact.grad, small.grad = gradient.clone(), gradient.clone()
        reference.step()
        ours.step()
    moved, off = (exact - start).norm(), (exact - small).norm()
    assert off < 0.05 * moved


@pytest.mark.parametrize(("power", "levels"), [(2, adam8bit.FIRST_LEVELS), (4, adam8bit.SECOND_LEVELS)])
def test_rounding_to_eight_bits_is_right_on_average(power: int, levels: int) -> None:
    """Over many roundings the mean of what is read back is the number, also between two levels and near 0."""
    torch.manual_seed(0)
    values = torch.cat([torch.rand(200), torch.logspace(-4, 0, 56)])
    total, chance = torch.zeros(256), torch.Generator().manual_seed(0)
    for _ in range(4000):
        total += (rounding.to_power_(values.clone(), power, levels, chance) / levels) ** power
    step = power * values ** (1 - 1 / power) / levels  # between two neighbours
    assert ((total / 4000 - values).abs() < 0.05 * step + 1e-7).all()


def test_a_second_moment_decays_by_less_than_a_step() -> None:
    """Without gradients it shrinks as AdamW's does: rounded to the nearest, it would stay where it is."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    ours = adam8bit.Adam8bit([parameter], lr=0.0)
    parameter.grad = torch.rand(64, 64)
    ours.step()
    before = (ours.second[0].float() ** 4).view(-1, 256) * ours.second_scales[0][:, None]
    assert parameter.grad is not None
    parameter.grad.zero_()
    for _ in range(300):
        ours.step()
    after = (ours.second[0].float() ** 4).view(-1, 256) * ours.second_scales[0][:, None]
    assert float(after.sum() / before.sum()) == pytest.approx(0.999**300, rel=0.01)


def test_bf16_weights_take_updates_that_are_too_small_for_them() -> None:
    """A thousand steps of a hundredth of bf16's resolution each: their sum arrives."""
    torch.manual_seed(0)
    stored, chance = torch.ones(4096, dtype=torch.bfloat16), torch.Generator().manual_seed(0)
    for _ in range(1000):
        rounding.to_bf16_(stored, stored.float() + 2.0**-14, chance)
    assert float(stored.float().mean()) == pytest.approx(1 + 1000 * 2.0**-14, rel=2e-3)


# -- other devices --------------------------------------------------------------------------------------------------


@each
def test_it_is_built_on_a_device_without_memory(made: Recipe) -> None:
    """A 2B model, its gradients and its optimizer's state, as tensors that have shapes only: as many bytes as is
    said."""
    config = PatchTSTConfig(d_model=1024, n_layers=240, n_heads=8, d_ff=2048)
    with torch.device("meta"):
        model = computing.prepare(PatchTST(config, computing.storage(made)), made)
        optimizer = optimizers.make(made, model, lr=1e-4, weight_decay=0.0)
    held = sum(p.nbytes + (0 if p.grad is None else p.grad.nbytes) for p in model.parameters())
    held += sum(tensor.nbytes for tensor in optimizer.state().values())
    expected = recipe.held(made, config.d_model, config.n_layers, config.d_ff, config.param_count)
    assert sum(expected.values()) == held


@pytest.mark.gpu
@each
def test_it_trains_on_an_accelerator(made: Recipe, tmp_path: Path) -> None:
    """On CUDA or Metal: it learns, and resumes."""
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    if device is None:
        pytest.skip("needs CUDA or Metal")
    x, y = (part.to(device) for part in samples())
    run = Trainer(
        built(made), (x, y), (x, y), epochs=12, batch_size=16, accumulation_steps=2, device=device, recipe=made,
        saver=Saver(tmp_path / "c"),
    )  # fmt: skip
    assert run.train()["value"] < 0.6
    again = Trainer(
        built(made), (x, y), (x, y), epochs=13, batch_size=16, accumulation_steps=2, device=device, recipe=made
    )  # fmt: skip
    again.resume(tmp_path / "c")
    assert again.train()["epochs"] == 13
