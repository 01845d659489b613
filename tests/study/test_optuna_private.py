"""What this project uses of Optuna's private parts does what the public API does; each test holds one of them."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.orm import Session

from scheduler.model import UsageError
from scheduler.study import optuna_private, statements, transactions
from scheduler.study.ask import BegunStorage, HeldStorage, Stored, begun_trial
from scheduler.study.optuna_private import StudyAttr, StudyRow, TrialAttr, TrialRow
from scheduler.study.transactions import Begun, Rdb

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    """An empty study on a real database."""
    return optuna.create_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db")


@pytest.fixture
def storage(study: optuna.Study, tmp_path: Path) -> Iterator[RDBStorage]:
    """That database by itself, uncached."""
    storage = RDBStorage(f"sqlite:///{tmp_path}/study.db")
    yield storage
    storage.engine.dispose()


def comparable(trial: FrozenTrial) -> dict[str, Any]:
    """All that a trial says but its id, number and times."""
    return {
        "state": trial.state,
        "values": trial.values,
        "params": trial.params,
        "distributions": trial.distributions,
        "user_attrs": trial.user_attrs,
        "intermediate_values": trial.intermediate_values,
        "constraints": trial.constraints,
        "fixed": trial.system_attrs.get(optuna_private.FIXED_PARAMS),
    }


TEMPLATES = [
    create_trial(state=TrialState.RUNNING, user_attrs={"run": "r"}),
    create_trial(
        state=TrialState.WAITING,
        user_attrs={"attempt": 2},
        system_attrs={optuna_private.FIXED_PARAMS: {"x": 1}},
        intermediate_values={1: 0.5, 2: 0.25},
    ),
    create_trial(
        state=TrialState.COMPLETE,
        value=0.5,
        params={"x": 3, "y": 0.25},
        distributions={"x": IntDistribution(0, 9), "y": FloatDistribution(0.1, 1.0, log=True)},
    ),
]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.state.name)
def test_add_trial_makes_what_add_trial_of_a_study_makes(
    study: optuna.Study, storage: RDBStorage, template: FrozenTrial
) -> None:
    """Number, state, parameters, attributes and reports are those that the public call would have written."""
    study.add_trial(template)
    with Session(optuna_private.engine(storage)) as session, session.begin():
        created = optuna_private.add_trial(storage, session, storage.get_study_id_from_name("s"), template)
        assert (optuna_private.number(created), cast(TrialState, created.state)) == (1, template.state)
        seen_inside = comparable(optuna_private.frozen(storage, created))
    public, ours = study.get_trials()
    assert ours.number == 1
    assert comparable(ours) == comparable(public) == seen_inside


def test_add_trial_is_undone_with_its_transaction(study: optuna.Study, storage: RDBStorage) -> None:
    """It commits nothing by itself: what fails afterwards takes the trial with it."""
    with Session(optuna_private.engine(storage)) as session:
        optuna_private.add_trial(storage, session, storage.get_study_id_from_name("s"), TEMPLATES[1])
        session.rollback()
    assert study.get_trials() == []


def test_frozen_is_what_the_study_shows(study: optuna.Study, storage: RDBStorage) -> None:
    """A trial read from its row equals the one that Optuna reads, in all that Optuna compares."""
    study.optimize(lambda t: t.suggest_float("x", 0, 1) + t.suggest_categorical("c", [1, 2]), n_trials=1)
    with Session(optuna_private.engine(storage)) as session:
        row = session.query(TrialRow).filter_by(number=0).one()
        assert optuna_private.frozen(storage, row) == study.trials[0]


def test_value_reports_and_constraint_are_read_back_by_optuna(study: optuna.Study, storage: RDBStorage) -> None:
    """Written by us or through `report`, `set_constraint` and `tell`, a trial looks the same."""
    public = study.ask()
    for step, value in {1: 0.75, 2: math.inf, 3: 0.5}.items():
        public.report(value, step)
    public.set_constraint("memory", 1.5)
    study.tell(public, 0.5)
    ours = study.ask()
    with Session(optuna_private.engine(storage)) as session, session.begin():
        row: Any = session.query(TrialRow).filter_by(number=ours.number).one()
        statements.put_reports(session, row.trial_id, {1: 9.0, 2: math.inf, 3: 0.5})
        statements.put_reports(session, row.trial_id, {1: 0.75})  # the later report wins
        optuna_private.set_constraint(storage, session, row, "memory", 1.5)
        statements.put_values(session, row.trial_id, [0.5])
        row.state, row.datetime_complete = TrialState.COMPLETE, datetime.now()  # noqa: DTZ005 - as Optuna
    first, second = study.get_trials()
    assert comparable(first) == comparable(second)
    assert second.constraints == {"memory": 1.5}
    assert second.duration is not None


@pytest.mark.parametrize("value", [0.5, math.inf, -math.inf])
def test_a_value_without_bound_is_kept_as_optuna_keeps_it(study: optuna.Study, storage: RDBStorage, value: Any) -> None:
    """Of a COMPLETE trial, too: the database has no number for it."""
    study.tell(study.ask(), value)
    ours = study.ask()
    with Session(optuna_private.engine(storage)) as session, session.begin():
        row: Any = session.query(TrialRow).filter_by(number=ours.number).one()
        statements.put_values(session, row.trial_id, [value])
        row.state, row.datetime_complete = TrialState.COMPLETE, datetime.now()  # noqa: DTZ005 - as Optuna
    assert [trial.value for trial in study.get_trials()] == [value, value]


def test_a_new_trial_is_what_ask_makes(study: optuna.Study, storage: RDBStorage) -> None:
    """RUNNING, begun now, with the study's next number; times as Optuna keeps them, whatever the time zone."""
    public = study.ask()
    with Session(optuna_private.engine(storage)) as session, session.begin():
        session.add(optuna_private.new_trial(storage.get_study_id_from_name("s"), 1))
    ours = study.get_trials()[1]
    assert comparable(ours) == comparable(study.get_trials()[0]) and ours.number == 1
    assert ours.datetime_start is not None and public.datetime_start is not None
    assert 0 <= (ours.datetime_start - public.datetime_start).total_seconds() < 600


def drawn(trial: Any) -> dict[str, Any]:
    """Of each kind of parameter one."""
    return {
        "x": trial.suggest_float("x", 1e-3, 1.0, log=True),
        "n": trial.suggest_int("n", 0, 9, step=3),
        "c": trial.suggest_categorical("c", ["a", None, 3]),
    }


@pytest.mark.parametrize("startup", [0, 10])
def test_a_trial_drawn_at_once_is_the_one_that_optuna_draws(tmp_path: Path, startup: int) -> None:
    """Read once and written once or step by step: the same proposals, and the same in the database."""
    studies = []
    for held in (False, True):
        url = f"sqlite:///{tmp_path}/{held}.db"
        rdb = Rdb(url)
        cached = optuna.storages.get_storage(rdb.storage)
        study = optuna.create_study(study_name="s", storage=cached)
        known: dict[str, BaseDistribution] = {}
        for number in range(8):
            begun = rdb.begin(1, run="r", owner="o", quota=99, delivered=range(number))
            assert isinstance(begun, Begun)
            sampler = optuna.samplers.TPESampler(
                seed=number, multivariate=True, constant_liar=True, n_startup_trials=startup
            )
            stored = Stored(id=1, directions=study.directions)
            seen = HeldStorage(cached, begun, stored, known) if held else BegunStorage(cached, begun.trial_id)
            trial = begun_trial("s", cached, begun, sampler=sampler, pruner=study.pruner, seen=seen)
            asked = drawn(trial)
            trial.set_user_attr("said", number)
            if isinstance(seen, HeldStorage):
                assert study.get_trials()[number].params == {}
                rdb.annotate(1, number, "r", {}, seen.drawn)
            assert study.get_trials()[number].params == asked == trial.params
            if number % 3:  # some are still running when the next is drawn
                rdb.finish(1, number, "r", TrialState.COMPLETE, [asked["x"]], {}, None)
        studies.append([(comparable(t), t.system_attrs) for t in study.get_trials()])
        rdb.close()
    assert studies[0] == studies[1]


def test_a_parameter_may_not_change_its_kind_in_a_study(tmp_path: Path) -> None:
    """As Optuna refuses it, also where the first trial that had it was another driver's."""
    rdb = Rdb(f"sqlite:///{tmp_path}/study.db")
    cached = optuna.storages.get_storage(rdb.storage)
    study = optuna.create_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db")
    study.ask().suggest_categorical("c", ["a", "b"])
    begun = rdb.begin(1, run="r", owner="o", quota=9, delivered=())
    assert isinstance(begun, Begun)
    held = HeldStorage(cached, begun, Stored(id=1, directions=study.directions), {})
    trial = begun_trial("s", cached, begun, sampler=study.sampler, pruner=study.pruner, seen=held)
    with pytest.raises(ValueError, match="CategoricalDistribution does not support dynamic value space"):
        trial.suggest_categorical("c", ["a", "z"])
    rdb.close()


@pytest.mark.parametrize("reports", [{}, {1: 0.75, 2: 0.5}, {1: 0.75, 2: math.nan}, {2: math.inf}])
def test_a_pruned_trial_is_told_as_optuna_tells_it(study: optuna.Study, storage: RDBStorage, reports: Any) -> None:
    """The last report becomes the value, unless it is not a number; nothing of it differs from `Study.tell`."""
    public = study.ask()
    for step, value in reports.items():
        public.report(value, step)
    study.tell(public, state=TrialState.PRUNED)
    rdb = Rdb(str(storage.engine.url))
    begun = rdb.begin(storage.get_study_id_from_name("s"), run="r", owner="o", quota=9, delivered=())
    assert isinstance(begun, Begun)
    rdb.report(storage.get_study_id_from_name("s"), begun.number, "r", reports)
    rdb.finish(storage.get_study_id_from_name("s"), begun.number, "r", TrialState.PRUNED, (), {}, None)
    first, second = study.get_trials()
    assert (second.state, repr(second.values)) == (first.state, repr(first.values))
    assert repr(second.intermediate_values) == repr(first.intermediate_values)
    rdb.close()


def test_fixed_params_are_where_enqueue_trial_leaves_them(study: optuna.Study) -> None:
    """The key is Optuna's own; a trial that has it suggests what it says."""
    study.enqueue_trial({"x": 7})
    assert study.trials[0].system_attrs == {optuna_private.FIXED_PARAMS: {"x": 7}}
    study.add_trial(create_trial(state=TrialState.WAITING, system_attrs={optuna_private.FIXED_PARAMS: {"x": 5}}))
    assert [study.ask().suggest_int("x", 0, 9) for _ in range(2)] == [7, 5]


def test_tables_hold_what_the_public_api_writes(study: optuna.Study, storage: RDBStorage) -> None:
    """Studies, trials and their user attributes: the columns that our queries read and write."""
    study.set_user_attr("a", {"b": [1]})
    trial = study.ask()
    trial.set_user_attr("c", "d")
    with Session(optuna_private.engine(storage)) as session:
        assert session.query(StudyRow.study_id).all() == [(storage.get_study_id_from_name("s"),)]
        kept: list[Any] = session.query(StudyAttr).all()
        assert [(a.study_id, a.key, a.value_json) for a in kept] == [
            (storage.get_study_id_from_name("s"), "a", '{"b": [1]}')
        ]
        row: Any = session.query(TrialRow).one()
        assert (row.number, row.study_id, row.state) == (0, storage.get_study_id_from_name("s"), TrialState.RUNNING)
        assert row.datetime_start is not None and row.datetime_complete is None
        attr: Any = session.query(TrialAttr).one()
        assert (attr.trial_id, attr.key, attr.value_json) == (row.trial_id, "c", '"d"')


def test_a_release_that_lacks_something_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every name is there now; were one gone, the check before a run would say which, and what to install."""
    assert optuna_private.missing() == []
    monkeypatch.setattr(optuna_private, "METHODS", (*optuna_private.METHODS, "_gone"))
    monkeypatch.setattr(optuna_private, "COLUMNS", {TrialRow: ("number", "colour")})
    with pytest.raises(UsageError, match=r"no TrialModel.colour, RDBStorage._gone: pip install"):
        transactions.check(f"sqlite:///{tmp_path}/study.db")


def is_private(name: str) -> bool:
    """One underscore in front; two are Python's own names."""
    return name.startswith("_") and not name.startswith("__")


def private_uses(path: Path) -> Iterator[str]:
    """Private names a file takes from elsewhere: `import a._b`, or `x._y` where x is not self or cls."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if any(map(is_private, name.split("."))))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            yield from [] if own else [ast.unparse(node)]


def test_nothing_else_uses_a_private_part_of_optuna() -> None:
    """Of the files that import Optuna, or are given what is Optuna's, only one touches a private name."""
    files = [p for p in (*ROOT.glob("scheduler/**/*.py"), *ROOT.glob("training/*.py")) if "optuna" in p.read_text()]
    found = {path.name: list(private_uses(path)) for path in files}
    assert {name for name, uses in found.items() if uses} == {"optuna_private.py"}, found
    used = {use.rpartition(".")[2] for use in found["optuna_private.py"]} - {"models"}
    assert used == {*optuna_private.METHODS, *optuna_private.MEMBERS}


def test_a_study_and_a_trial_have_what_is_taken_of_them(study: optuna.Study) -> None:
    """Another release may call these otherwise; then this says which."""
    trial = study.ask()
    there = {name for each in (study, trial) for name in (*vars(each), *dir(type(each)))}
    assert set(optuna_private.MEMBERS) - there == set()
    assert trial._trial_id == study._storage.get_trial_id_from_study_id_trial_number(study._study_id, trial.number)


def test_stop_is_heard_as_the_loop_of_optimize_hears_it(study: optuna.Study) -> None:
    """`Study.stop` outside of `optimize` is refused by Optuna; once allowed it is heard."""
    with pytest.raises(RuntimeError):
        study.stop()
    optuna_private.allow_stop(study)
    assert not optuna_private.is_stopped(study)
    study.stop()
    assert optuna_private.is_stopped(study)
