"""The sampler that keeps to a list: every proposal is in it, and Optuna stores and learns what was proposed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from scheduler.model import AskTrial, EnqueueRetry, FinalState, StudySpec, TellTrial, TrialAsked
from scheduler.study.grid_sampler import GridSampler, nearest
from scheduler.study.store import Functions, StudyStore
from training import batch_size, footprint, hpo, search_space

FIELDS = ("d_model", "n_layers", "n_heads", "d_ff_ratio")
CONTEXT = {
    "budget": "2M",
    "horizon": 1,
    "target_effective_batch": 256,
    "training_search_space": search_space.load()["training_search_space"],
}
GRID = hpo.candidates(CONTEXT)


def make_study(candidates: Any = GRID, seed: int = 0) -> optuna.Study:
    """A study in memory whose sampler keeps to these."""
    return optuna.create_study(sampler=GridSampler(optuna.samplers.TPESampler(seed=seed), candidates, seed=seed))


def suggested(trial: optuna.Trial) -> dict[str, Any]:
    """The architecture that the project's own `sample` finds, and that its parameters are in the study."""
    found = hpo.sample_architecture(trial, GRID)
    assert {name: found[name] for name in FIELDS} == {name: trial.params[name] for name in FIELDS}
    return found


def test_every_proposal_is_in_the_list_and_tpe_takes_over() -> None:
    """Random at first, learnt later, never a pair of fields that is not there; and TPE learns from the real values."""
    study = make_study()
    found = []
    for _ in range(40):
        trial = study.ask()
        found.append(suggested(trial))
        rate = trial.suggest_float("rate", 0, 1)
        study.tell(trial, abs(found[-1]["d_model"] - 256) / 100 + abs(found[-1]["n_heads"] - 8) / 10 + rate)
    assert all(a in GRID for a in found)
    assert len({a["d_model"] for a in found[:10]}) >= 3
    assert sum(a["d_model"] == 256 for a in found[-15:]) > sum(a["d_model"] == 256 for a in found[:15])
    assert any("relative_params" in key for key in study.trials[-1].system_attrs)


def test_what_is_first_drawn_at_random_is_drawn_from_the_whole_list() -> None:
    """Each of 80 architectures has its chance: of 200 random proposals most of them come up."""
    study = make_study()
    drawn = {tuple(suggested(study.ask()).values()) for _ in range(200)}
    assert len(drawn) > 60


def test_fields_that_are_given_are_kept() -> None:
    """A person enqueues a width: depth, heads and ratio are drawn among the architectures of that width."""
    study = make_study()
    for _ in range(5):
        study.enqueue_trial({"d_model": 384})
        assert (found := suggested(study.ask()))["d_model"] == 384 and found["n_layers"] == 2
    study.enqueue_trial({"d_model": 100})  # in no list: the nearest that there is
    trial = study.ask()
    assert hpo.sample_architecture(trial, GRID)["d_model"] in (64, 128)


def test_several_at_once_do_not_mix_their_fields() -> None:
    """Two trials are asked before either has suggested anything: each gets one architecture, not parts of two."""
    study = make_study(seed=3)
    for _ in range(20):
        both = [study.ask(), study.ask()]
        space = {name: (min(a[name] for a in GRID), max(a[name] for a in GRID)) for name in FIELDS}
        for name, (low, high) in space.items():
            for trial in both:
                trial.suggest_int(name, low, high, log=True)
        assert all(any(trial.params == {n: a[n] for n in FIELDS} for a in GRID) for trial in both)
        for trial in both:
            study.tell(trial, trial.params["n_heads"])


def test_nearest_weighs_each_field_by_its_range() -> None:
    """Widths of 64 to 2048 do not drown two to four heads; names agree or not; the first of equals wins."""
    grid = [{"d": d, "heads": h, "kind": k} for d in (64, 2048) for h in (2, 4) for k in ("a", "b")]
    assert nearest(grid, {"d": 300, "heads": 4}) == {"d": 64, "heads": 4, "kind": "a"}
    assert nearest(grid, {"d": 500, "heads": 2, "kind": "b"}) == {"d": 2048, "heads": 2, "kind": "b"}
    assert nearest([{"n": 0}, {"n": 10}], {"n": 6}) == {"n": 10}, "0 has no logarithm"
    assert nearest([{"n": 5}], {"n": 9}) == {"n": 5}, "a field without a range"


# -- through the store -------------------------------------------------------------------------------------------------


def opened(file: Path, candidates: Any = GRID, owner: str = "driver") -> StudyStore:
    """The product's functions on a database."""
    functions = Functions(sample=hpo.sample, micro_batch=batch_size.micro_batch, estimate=footprint.estimate)
    store = StudyStore(f"sqlite:///{file}", owner=owner, run="run", functions=functions)
    store.open(StudySpec(name="s", quota=99, slots=1, context=CONTEXT), candidates)
    return store


def ask(store: StudyStore, limit_bytes: int = 2**40) -> TrialAsked:
    """Ask, and insist on a trial."""
    asked = store.ask(AskTrial(study="s", limit_bytes=limit_bytes))
    assert isinstance(asked, TrialAsked)
    return asked


def limit_for(share: float) -> int:
    """Bytes that this share of the architectures can do with."""
    needs = sorted(footprint.estimate({**a, "micro_batch": 1}, CONTEXT)["host_bytes"] for a in GRID)
    return int(needs[int(share * (len(needs) - 1))])


def test_the_study_holds_real_parameters_of_architectures_that_fit(tmp_path: Path) -> None:
    """What a person plots: d_model, n_layers, n_heads, d_ff_ratio beside the rate; half the list does not fit and is
    never proposed, so that nothing is told infeasible."""
    store, limit = opened(tmp_path / "study.db"), limit_for(0.5)
    for _ in range(25):
        asked = ask(store, limit)
        store.tell(TellTrial(trial=asked.trial, state=FinalState.COMPLETE, value=asked.params["learning_rate"]))
        assert {key: asked.params[key] for key in GRID[0]} in GRID
        assert asked.footprint.host_bytes <= limit
    trials = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db").trials
    assert {t.state.name for t in trials} == {"COMPLETE"} and len(trials) == 25
    for trial in trials:
        assert set(trial.params) == {*FIELDS, *CONTEXT["training_search_space"]}
        assert any(all(trial.params[n] == a[n] for n in FIELDS) for a in GRID)
        assert trial.user_attrs["d_ff"] == trial.params["d_model"] * trial.params["d_ff_ratio"]
        assert trial.user_attrs["d_model"] == trial.params["d_model"], "as in studies searched by an index"


def test_a_retry_runs_the_same_architecture(tmp_path: Path) -> None:
    """Fields and all: what is queued again is not drawn again, though half of the list fits no longer."""
    store = opened(tmp_path / "study.db")
    before = [ask(store) for _ in range(6)]
    for asked in before:
        store.enqueue_retry(EnqueueRetry(trial=asked.trial, attempt=2, resume_from=None, reason="lost"))
    after = [ask(store) for _ in range(6)]
    assert [a.params for a in after] == [b.params for b in before]


def test_a_person_who_enqueues_what_is_not_there_reads_what_was_run(tmp_path: Path) -> None:
    """The nearest architecture is run, and results say its width, not the one that was wished for."""
    store = opened(tmp_path / "study.db")
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db")
    study.enqueue_trial({"d_model": 100})
    asked = ask(store)
    assert asked.params["d_model"] in (64, 128)
    assert store.rows("s")[0]["d_model"] == asked.params["d_model"]


@pytest.mark.parametrize("limit", [2**40, None])
def test_a_study_of_an_earlier_release_goes_on(tmp_path: Path, limit: int | None) -> None:
    """Created with a list without the ratio, it is searched by the index as before, and also keeps to what fits."""
    limit = limit_for(0.5) if limit is None else limit
    earlier = [{key: a[key] for key in a if key != "d_ff_ratio"} for a in GRID]
    first = opened(tmp_path / "study.db", earlier)
    first.close()
    store = opened(tmp_path / "study.db", GRID, owner="later")
    for _ in range(15):
        asked = ask(store, limit)
        store.tell(TellTrial(trial=asked.trial, state=FinalState.COMPLETE, value=asked.params["learning_rate"]))
        assert {key: asked.params[key] for key in earlier[0]} in earlier
        assert asked.footprint.host_bytes <= limit
    trials = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db").trials
    assert all(set(t.params) == {"architecture", *CONTEXT["training_search_space"]} for t in trials)
