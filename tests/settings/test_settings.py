"""Settings: what is read from where, every bad input as one line with the value and the fix, and what a run means."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from scheduler.driver import run_folder
from scheduler.model import UsageError
from scheduler.settings import layers
from scheduler.settings.layers import as_yaml
from scheduler.settings.load import load, resolved
from scheduler.settings.schema import Settings, configs_root
from scheduler.settings.study_keys import RangeParameter
from scheduler.watchdog.policy.thresholds import Thresholds
from scheduler.workload.studies import studies

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = configs_root() / "schedule.yaml"


def write(path: Path, text: str) -> Path:
    """A file with this text."""
    path.write_text(text)
    return path


def refused(**given: Any) -> str:
    """The one line with which these settings are refused."""
    with pytest.raises(UsageError) as caught:
        load(**given)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- the shipped file ------------------------------------------------------------------------------------------------


def test_shipped_configuration_holds_exactly_the_defaults() -> None:
    """configs/schedule.yaml changes no default: with it and without it the settings are the same."""
    empty = Settings.model_validate({}).model_dump(mode="json")
    shipped = Settings.model_validate(layers.read_yaml(SHIPPED)).model_dump(mode="json")
    assert shipped == empty


def test_shipped_configuration_names_every_key() -> None:
    """Each key of the settings, the watchdog's too, stands in configs/schedule.yaml, and no other."""
    values = layers.read_yaml(SHIPPED)
    assert set(values) == set(Settings.model_fields)
    assert set(values["watchdog"]) == {"mode", *(field.name for field in dataclasses.fields(Thresholds))}
    assert set(values["training"]) == set(type(Settings().training).model_fields)


def test_shipped_configuration_comments_every_key() -> None:
    """Each key has a comment on its line or above it (a group of keys may share one)."""
    lines = SHIPPED.read_text().splitlines()
    silent = []
    commented = False
    for line in lines:
        text = line.strip()
        if not text:
            commented = False
        elif text.startswith("#"):
            commented = True
        elif "#" not in line and not commented and not text.endswith(":"):
            silent.append(text)
    assert silent == []


def test_thresholds_come_out_as_the_watchdog_knows_them() -> None:
    """The watchdog's section gives back its own dataclass, so nothing is typed twice."""
    values = load({"watchdog.stall_after_s": 30}, environ={}).watchdog.model_dump()
    values.pop("mode")
    assert Thresholds(**values) == Thresholds(stall_after_s=30.0)


def test_version_and_packages_agree() -> None:
    """pyproject.toml has the version the command prints, and lists every package there is."""
    import scheduler

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["version"] == scheduler.__version__
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("scheduler", "training")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert found | {"scheduler.configs"} == set(project["tool"]["setuptools"]["packages"])


def test_the_built_in_trainings_heap_is_its_own() -> None:
    """`auto` gives our heap to our training and the system's to any other; who asks for one gets it."""

    def heap(**given: object) -> str:
        return str(studies(load(given, environ={}))[0].context["allocator"])

    mine = {"training.objective": "mine:objective"}
    assert heap() == "auto"
    assert heap(**mine) == "default"
    assert heap(**mine, allocator="glibc-stack") == "glibc-stack"
    assert heap(allocator="default") == "default"
    assert "allocator" in refused(arguments={"allocator": "jemalloc"}, environ={})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"metric": "(x)"}, "--metric goes with --command"),
        ({"space": "space.yaml", "objective": "m:f"}, "--space goes with --command"),
        ({"memory": "3GiB"}, "--memory goes with --objective"),
        ({"sampler": "random", "budgets": "2M"}, "--sampler goes with --objective"),
    ],
)
def test_what_would_say_nothing_where_it_stands_is_refused(given: dict[str, Any], said: str) -> None:
    """Who forgets `--command` does not start twelve studies of days instead."""
    assert said in refused(arguments=given, environ={})


def test_a_default_is_shown_as_it_is_written() -> None:
    """No word of ours for a value."""
    assert refused(arguments={"memory_budget": "200%"}, environ={}).endswith("(default: 90%)")


@pytest.mark.parametrize(
    "objective", ["pickled:" + "QUJD" * 50_000, "pickle-file:/x/o.pkl", 'command:{"command": "x"}']
)
def test_an_objective_without_a_name_is_read_back_from_the_runs_folder(tmp_path: Path, objective: str) -> None:
    """The report reads it; a function that travels as text is not kept there, whoever goes on with the run has it."""
    settings = load({"objective": "m:f"}, environ={}).model_copy(update={"objective": objective})
    path = write(tmp_path / "settings.yaml", as_yaml(settings.resolved()))
    kept = resolved(path).objective
    assert kept == ("pickled:" if objective.startswith("pickled:") else objective)
    assert path.stat().st_size < 20_000


# -- precedence ------------------------------------------------------------------------------------------------------


def test_arguments_go_before_environment_before_experiment_before_file(tmp_path: Path) -> None:
    """Each source overrides the ones after it, key by key."""
    config = write(tmp_path / "c.yaml", "trials: 1\nseed: 1\nslots: 1\nmax_epochs: 1\n")
    experiment = write(tmp_path / "e.yaml", "trials: 2\nseed: 2\nslots: 2\n")
    settings = load(
        {"trials": 4}, config=config, experiments=(experiment,), environ={"HEADROOM_SEED": "3", "HEADROOM_TRIALS": "3"}
    )
    keys = settings.experiments[0]
    assert (keys.trials, keys.seed, settings.slots, keys.max_epochs) == (4, 3, 2, 1)


def test_nested_keys_are_set_one_by_one(tmp_path: Path) -> None:
    """A file that sets one threshold leaves the others; a variable reaches a nested key."""
    config = write(tmp_path / "c.yaml", "watchdog:\n  stall_after_s: 60\n")
    settings = load(config=config, environ={"HEADROOM_WATCHDOG_SAMPLE_S": "2", "HEADROOM_WATCHDOG_MODE": "off"})
    watchdog = settings.watchdog
    assert (watchdog.stall_after_s, watchdog.sample_s, watchdog.mode) == (60, 2, "off")
    assert watchdog.over_factor == Thresholds().over_factor


def test_an_empty_group_means_its_defaults(tmp_path: Path) -> None:
    """`watchdog:` with everything below it commented out is no error."""
    config = write(tmp_path / "c.yaml", "watchdog:\ntrials: 2\n")
    assert load(config=config, environ={}).watchdog.mode == "on"


def test_yaml_words_mean_what_people_mean(tmp_path: Path) -> None:
    """YAML reads off as false, 1e-4 as text and none as text: settings understand all three."""
    config = write(
        tmp_path / "c.yaml",
        "watchdog:\n  mode: off\npruner: none\ntraining_search_space:\n"
        "  learning_rate: {type: log_uniform, low: 1e-4, high: 1e-3}\n",
    )
    settings = load(config=config, environ={})
    assert settings.watchdog.mode == "off"
    assert settings.pruner == "none"
    assert settings.training_search_space is not None
    rate = settings.training_search_space["learning_rate"]
    assert isinstance(rate, RangeParameter) and rate.low == 1e-4


def test_the_search_comes_from_the_hpo_file_unless_said_otherwise(tmp_path: Path) -> None:
    """Search space and early stopping are those of configs/hpo; single early-stopping keys may be overridden."""
    shipped = yaml.safe_load((configs_root() / "hpo" / "architectural_search.yaml").read_text())
    settings = load(config=write(tmp_path / "c.yaml", "early_stopping:\n  patience: 3\n"), environ={})
    context = studies(settings)[0].context
    assert set(context["training_search_space"]) == set(shipped["training_search_space"])
    assert context["early_stopping"] == {"patience": 3, "min_delta": shipped["early_stopping"]["min_delta"]}


def test_paths_in_a_file_are_relative_to_it_and_arguments_to_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration file can be moved together with its data; an argument means what the shell means."""
    (tmp_path / "conf").mkdir()
    config = write(tmp_path / "conf" / "c.yaml", "data: bars.csv\n")
    monkeypatch.chdir(tmp_path)
    assert load(config=config, environ={}).data == tmp_path / "conf" / "bars.csv"
    assert load({"data": "bars.csv"}, environ={}).data == tmp_path / "bars.csv"


# -- studies and names -----------------------------------------------------------------------------------------------


def test_default_is_twelve_studies_of_fifty_trials() -> None:
    """4 budgets x 3 horizons, 50 trials each, named after run, budget and horizon."""
    found = studies(load(environ={}))
    assert len(found) == 12
    assert {study.quota for study in found} == {50}
    assert found[0].name == "phase6a_2M_h1"


def test_budgets_are_read_in_any_case() -> None:
    """`2m,20M,2b` are budgets; one named twice is one study."""
    assert load({"budgets": "2m,20M,2b,2B"}, environ={}).budgets == ("2M", "20M", "2B")


def test_a_single_horizon_and_budget_need_no_list(tmp_path: Path) -> None:
    """`budgets: 2M` and `horizons: 5` in a file are lists of one."""
    settings = load(config=write(tmp_path / "c.yaml", "budgets: 2M\nhorizons: 5\n"), environ={})
    assert [(s.context["budget"], s.context["horizon"]) for s in studies(settings)] == [("2M", 5)]


def test_runs_that_differ_in_length_or_data_have_names_of_their_own() -> None:
    """A two-epoch trial run must not fill the quota of the real one."""
    assert load({"max_epochs": 2, "max_steps": 9, "data": "x/My bars.csv"}, environ={}).name == "phase6a-e2-s9-My-bars"


def test_small_models_take_one_thread_and_large_ones_no_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads follow the budget and stay within the cores; slots follow the threads."""
    monkeypatch.setattr("scheduler.workload.phase6a.cores", lambda: 3)
    monkeypatch.setattr("scheduler.settings.schema.cores", lambda: 3)
    slots = {study.context["budget"]: (study.slots, study.context["threads"]) for study in studies(load(environ={}))}
    assert slots == {"2M": (1, 1), "20M": (1, 1), "200M": (2, 2), "2B": (3, 3)}


def test_each_experiment_file_has_its_own_studies(tmp_path: Path) -> None:
    """Two files with different trials and search spaces run side by side in one batch."""
    one = write(tmp_path / "1.yaml", "budgets: [2M]\nhorizons: [1]\ntrials: 3\n")
    two = write(tmp_path / "2.yaml", "budgets: [20M]\nhorizons: [3]\ntrials: 4\ntarget_effective_batch: 128\n")
    settings = load(experiments=(one, two), environ={})
    assert [(s.context["budget"], s.context["horizon"], s.quota) for s in studies(settings)] == [
        ("2M", 1, 3),
        ("20M", 3, 4),
    ]
    assert [s.context["target_effective_batch"] for s in studies(settings)] == [256, 128]


def test_experiments_that_disagree_on_the_batch_are_refused(tmp_path: Path) -> None:
    """One batch has one memory budget: two files with two of them are refused with both values."""
    one = write(tmp_path / "1.yaml", "budgets: [2M]\nmemory_budget: 80%\n")
    two = write(tmp_path / "2.yaml", "budgets: [20M]\nmemory_budget: 70%\n")
    message = refused(experiments=(one, two), environ={})
    assert "memory_budget" in message
    assert "'70%'" in message
    assert "'80%'" in message


def test_a_study_in_two_experiment_files_is_refused(tmp_path: Path) -> None:
    """Two definitions of the same study cannot both be meant."""
    one = write(tmp_path / "1.yaml", "budgets: [2M]\n")
    two = write(tmp_path / "2.yaml", "budgets: [2M]\n")
    with pytest.raises(UsageError, match="phase6a_2M_h1 is in two experiment files"):
        studies(load(experiments=(one, two), environ={}))


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trails: 5\n", ["unknown key trails", "did you mean trials?"]),
        ("watchdog:\n  stall_afer_s: 5\n", ["watchdog.stall_afer_s", "did you mean watchdog.stall_after_s?"]),
        ("stall_after_s: 5\n", ["unknown key stall_after_s", "did you mean watchdog.stall_after_s?"]),
        ("trials: many\n", ["trials", "'many'", "whole number", "50"]),
        ("trials: 2.5\n", ["trials", "2.5", "whole number"]),
        ("trials: true\n", ["trials", "True", "whole number"]),
        ("trials: 0\n", ["trials", "0", "at least 1"]),
        ("trials: [1]\n", ["trials", "[1]", "whole number"]),
        ("budgets: [5M]\n", ["budgets", "'5M'", "2M, 20M, 200M, 2B"]),
        ("budgets: []\n", ["budgets"]),
        ("horizons: [0]\n", ["horizons", "0", "1 to 250"]),
        ("horizons: {a: 1}\n", ["horizons", "list"]),
        ("pruner: hyperbnd\n", ["pruner", "'hyperbnd'", "median, hyperband or none"]),
        ("memory_budget: 100G\n", ["memory_budget", "ambiguous", "GiB"]),
        ("memory_budget: 150%\n", ["memory_budget", "150%"]),
        ("memory_budget: lots\n", ["memory_budget", "lots"]),
        ("reserve_bytes: -1\n", ["reserve_bytes", "-1"]),
        ("cluster: localhost\n", ["cluster", "'localhost'", "tcp://host:8786"]),
        ("storage: study.db\n", ["storage", "'study.db'", "sqlite:///"]),
        ("name: ../up\n", ["name", "'../up'"]),
        ("training: 5\n", ["training", "5"]),
        ("training:\n  objective: my.module\n", ["training.objective", "module:function"]),
        ("watchdog:\n  sample_s: fast\n", ["watchdog.sample_s", "'fast'", "number"]),
        ("watchdog:\n  own_share: 2\n", ["watchdog.own_share", "2", "at most 1"]),
        ("early_stopping:\n  patienc: 2\n", ["early_stopping.patienc", "did you mean early_stopping.patience?"]),
        ("training_search_space:\n  droput: {type: uniform, low: 0, high: 1}\n", ["droput", "did you mean dropout?"]),
        ("training_search_space:\n  dropout: {type: normal, low: 0, high: 1}\n", ["dropout", "log_uniform, uniform"]),
        ("training_search_space:\n  dropout: {type: uniform, low: 1, high: 0}\n", ["dropout", "low 1 above high 0"]),
        ("training_search_space:\n  learning_rate: {type: log_uniform, low: 0, high: 1}\n", ["learning_rate", "low 0"]),
        ("training_search_space:\n  epochs: {type: categorical, choices: []}\n", ["epochs", "choices"]),
        ("training_search_space:\n  dropout: {type: uniform, lo: 1, high: 2}\n", ["training_search_space.dropout.lo"]),
        ("trials: 1\ntrials: 2\n", ["line 2", "'trials' is written twice"]),
        ("trials: [1\n", ["line", "not valid YAML"]),
        ("- trials\n", ["key: value", "a list"]),
        ("1: 2\n", ["key 1"]),
    ],
)
def test_bad_configuration_is_one_line_with_value_and_fix(tmp_path: Path, text: str, words: list[str]) -> None:
    """Every mistake names the file, the key, the value seen and what it should be."""
    config = write(tmp_path / "mine.yaml", text)
    message = refused(config=config, environ={})
    for word in words:
        assert word in message, message
    if "training_search_space: unknown" not in message:
        assert "mine.yaml" in message, message


def test_a_bad_argument_is_named_as_the_user_wrote_it() -> None:
    """The line starts with the flag, not with some internal name."""
    assert refused(arguments={"budgets": "5M"}, environ={}).startswith("--budgets")
    assert refused(arguments={"watchdog.mode": "maybe"}, environ={}).startswith("--watchdog")
    assert refused(arguments={"max_epochs": 0}, environ={}).startswith("--max-epochs")


def test_a_bad_variable_is_named() -> None:
    """A wrong value in the environment names its variable; a mistyped variable gets the closest one."""
    assert "HEADROOM_TRIALS" in refused(environ={"HEADROOM_TRIALS": "many"})
    assert "did you mean HEADROOM_TRIALS?" in refused(environ={"HEADROOM_TRIAL": "3"})


def test_foreign_variables_are_left_alone() -> None:
    """Variables of ours that are no settings, and others that resemble none, do no harm."""
    load(environ={"HEADROOM_VENV": "/x", "HEADROOM_HOST_DIR": "/y", "HEADROOM_ZZZ": "1"})


@pytest.mark.parametrize("name", ["missing.yaml", ""])
def test_an_unreadable_file_is_one_line(tmp_path: Path, name: str) -> None:
    """A file that is not there, or is a folder, is named with the system's reason."""
    assert f"cannot read {tmp_path / name}" in refused(config=tmp_path / name, environ={})


# -- the run folder --------------------------------------------------------------------------------------------------


def test_the_run_folder_keeps_the_resolved_settings(tmp_path: Path) -> None:
    """settings.yaml can be read back and gives the same settings."""
    settings = load({"runs_dir": str(tmp_path), "trials": 3, "budgets": "2M"}, environ={})
    folder = run_folder.prepare(settings)
    again = load(config=folder / "settings.yaml", environ={})
    assert again.resolved() == settings.resolved()
    assert again.name == "phase6a"


def test_passwords_stay_out_of_the_run_folder(tmp_path: Path) -> None:
    """A storage URL's password is not written to disk; the file says so, and still is one that can be given again."""
    settings = load({"runs_dir": str(tmp_path), "storage": "postgresql://me:secret@host/db?token=hush"}, environ={})
    path = run_folder.prepare(settings) / "settings.yaml"
    text = path.read_text()
    assert "secret" not in text and "hush" not in text
    assert "without its password: give it again" in text
    assert load(config=path, environ={}).storage == "postgresql://me@host/db"
    again = {"HEADROOM_STORAGE": "postgresql://me:secret@host/db"}
    assert load(config=path, environ=again).storage == "postgresql://me:secret@host/db"


def test_what_a_run_writes_is_its_users_alone(tmp_path: Path) -> None:
    """The folder cannot be entered by others, and its files cannot be read by them wherever they are moved."""
    folder = run_folder.prepare(load({"runs_dir": str(tmp_path), "name": "r"}, environ={}))
    assert folder.stat().st_mode & 0o777 == 0o700
    files = [path for path in folder.iterdir() if path.is_file()]
    assert files and {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_a_run_folder_that_is_shared_stays_shared(tmp_path: Path) -> None:
    """Who has opened it to a group has meant it."""
    (tmp_path / "r").mkdir(mode=0o750)
    folder = run_folder.prepare(load({"runs_dir": str(tmp_path), "name": "r"}, environ={}))
    assert folder.stat().st_mode & 0o777 == 0o750


def test_a_resume_with_another_meaning_is_refused(tmp_path: Path) -> None:
    """The first key that differs is named with both values, and --name as the way out; nothing is rewritten."""
    base = {"runs_dir": str(tmp_path), "name": "r", "budgets": "2M"}
    folder = run_folder.prepare(load({**base, "max_epochs": 2}, environ={}))
    before = (folder / "settings.yaml").read_bytes()
    with pytest.raises(UsageError) as caught:
        run_folder.prepare(load({**base, "max_epochs": 3}, environ={}))
    assert "max_epochs = 2, now it is 3" in str(caught.value)
    assert "--name" in str(caught.value)
    assert (folder / "settings.yaml").read_bytes() == before


def test_a_resume_may_change_machine_quota_and_studies(tmp_path: Path) -> None:
    """More trials, other memory, threads or device, and further budgets do not change what a trial means."""
    base = {"runs_dir": str(tmp_path), "name": "r"}
    run_folder.prepare(load({**base, "budgets": "2M", "trials": 2}, environ={}))
    later = {**base, "budgets": "20M", "trials": 9, "memory_budget": "50%", "threads": 2, "device": "cpu"}
    run_folder.prepare(load(later, environ={}))
    with pytest.raises(UsageError, match="seed = 0, now it is 1"):
        run_folder.prepare(load({**base, "budgets": "2M", "seed": 1}, environ={}))


def test_a_study_keeps_its_recipe_when_it_is_left_to_auto(tmp_path: Path) -> None:
    """What the plan chose at the first start is kept, also by a start that cannot run it; another name is refused."""
    base = {"runs_dir": str(tmp_path), "name": "r", "budgets": "2M", "horizons": "1"}
    settings = load(base, environ={})
    assert run_folder.recipes(settings) == {}
    run_folder.prepare(settings, {"r_2M_h1": "adam8bit"})
    run_folder.prepare(settings)
    assert run_folder.recipes(settings) == {"r_2M_h1": "adam8bit"}
    run_folder.prepare(load({**base, "recipe": "adam8bit"}, environ={}))
    with pytest.raises(UsageError, match='recipe = "adam8bit", now it is "fp32_adamw"'):
        run_folder.prepare(load({**base, "recipe": "fp32_adamw"}, environ={}))


def test_a_study_that_no_recipe_was_chosen_for_may_get_any(tmp_path: Path) -> None:
    """Refused at its first start, it was never begun."""
    base = {"runs_dir": str(tmp_path), "name": "r", "budgets": "2M", "horizons": "1"}
    run_folder.prepare(load(base, environ={}))
    run_folder.prepare(load({**base, "recipe": "fp32_adamw"}, environ={}))
    assert run_folder.recipes(load(base, environ={})) == {"r_2M_h1": "fp32_adamw"}


def test_a_run_from_before_the_recipes_goes_on(tmp_path: Path) -> None:
    """It had one, under the names precision and optimizer."""
    base = {"runs_dir": str(tmp_path), "name": "r", "budgets": "2M", "horizons": "1"}
    path = run_folder.prepare(load(base, environ={})) / "meaning.json"
    known = json.loads(path.read_text())
    del known["r_2M_h1"]["recipe"]
    known["r_2M_h1"] |= {"precision": "fp32", "optimizer": "adamw"}
    path.write_text(json.dumps(known))
    assert run_folder.recipes(load(base, environ={})) == {"r_2M_h1": "fp32_adamw"}
    run_folder.prepare(load(base, environ={}))
    with pytest.raises(UsageError, match="recipe = "):
        run_folder.check(load({**base, "recipe": "bf16_autocast"}, environ={}))


def test_an_unknown_recipe_is_one_line_with_the_choices(tmp_path: Path) -> None:
    """The value seen, and the names there are."""
    with pytest.raises(UsageError, match=r"recipe.*'fp8'.*must be auto or one of fp32_adamw, "):
        load({"recipe": "fp8"}, environ={})


def test_data_counts_by_content(tmp_path: Path) -> None:
    """The same file elsewhere is the same data; a changed one is not."""
    first, moved = write(tmp_path / "a.csv", "x\n1\n"), write(tmp_path / "b.csv", "x\n1\n")
    base = {"runs_dir": str(tmp_path), "name": "r", "budgets": "2M"}
    run_folder.prepare(load({**base, "data": str(first)}, environ={}))
    run_folder.check(load({**base, "data": str(moved)}, environ={}))
    write(moved, "x\n2\n")
    with pytest.raises(UsageError, match="data = "):
        run_folder.check(load({**base, "data": str(moved)}, environ={}))


def test_settings_cannot_be_changed() -> None:
    """Resolved once, then frozen."""
    from pydantic import ValidationError

    with pytest.raises(ValidationError):
        load(environ={}).trials = 3
