"""The twelve experiment files agree with their template, and with what the scheduler reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from training import arch_grid, experiments, search_space

KEYS = {"name", "budgets", "horizons", "trials", "target_effective_batch", "training_search_space", "early_stopping"}


def test_generating_again_changes_nothing(tmp_path: Path) -> None:
    """The files in the repository are what the generator writes today, all twelve and no other."""
    fresh = {path.name: path.read_text() for path in experiments.generate(tmp_path)}
    kept = {path.name: path.read_text() for path in experiments.FOLDER.iterdir()}
    assert len(fresh) == 12
    assert kept == fresh, "run: python -m training.experiments"


@pytest.mark.parametrize("budget", arch_grid.BUDGETS)
@pytest.mark.parametrize("horizon", experiments.HORIZONS)
def test_each_file_is_complete(budget: str, horizon: int) -> None:
    """A file names its one study and repeats the search space and early stopping in full."""
    text = (experiments.FOLDER / f"hpo_{budget}_h{horizon}.yaml").read_text()
    config = yaml.safe_load(text)
    assert set(config) == KEYS
    assert (config["budgets"], config["horizons"]) == ([budget], [horizon])
    search = search_space.load()
    assert config["training_search_space"] == search["training_search_space"]
    assert config["early_stopping"] == search["early_stopping"]
    assert text.count("#") > 15, "commented"
