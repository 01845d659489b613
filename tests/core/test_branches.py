"""What a study's next trial will ask: told by those before it, through branches and loops, and left open otherwise."""

from __future__ import annotations

from typing import Any

from scheduler.core.branches import Answered, Branches, Question


def question(name: str, is_discrete: bool = False) -> Question:
    """One suggest."""
    return Question(name, f"distribution of {name}", is_discrete)


def asked(*pairs: tuple[str, Any], discrete: str = "") -> list[Answered]:
    """A trial's answers; those whose names are in `discrete` can be counted."""
    return [(question(name, name in discrete.split()), value) for name, value in pairs]


def follow(branches: Branches, values: dict[str, Any]) -> list[str]:
    """All that is foreseen of a trial that would be answered so; what it is not told stops it."""
    found: list[Answered] = []
    while (following := branches.next(found)) is not None and following.name in values:
        found.append((following, values[following.name]))
    return [each.name for each, _ in found]


def test_nothing_is_known_before_the_first_trial() -> None:
    """An empty tree foresees nothing."""
    assert Branches().next([]) is None


def test_one_trial_tells_the_next_what_it_will_ask() -> None:
    """Without any branch seen, values do not matter, not even ones nobody had."""
    branches = Branches()
    branches.learn(asked(("x", 0.1), ("y", 0.2)), whole=True)
    assert follow(branches, {"x": 0.7, "y": 0.9}) == ["x", "y"]


def test_a_choice_leads_into_its_branch_and_a_new_option_leaves_it_open() -> None:
    """What was asked after an option is foreseen for that option alone."""
    branches = Branches()
    branches.learn(asked(("kind", "svc"), ("c", 1.0), discrete="kind"), whole=True)
    branches.learn(asked(("kind", "forest"), ("depth", 3), ("c", 2.0), discrete="kind depth"), whole=True)
    values = {"c": 0.5, "depth": 9}
    assert follow(branches, {"kind": "svc", **values}) == ["kind", "c"]
    assert follow(branches, {"kind": "forest", **values}) == ["kind", "depth", "c"]
    assert follow(branches, {"kind": "boosting", **values}) == ["kind"]


def test_a_loop_is_as_long_as_its_number_says() -> None:
    """`n_layers` tells how many units are asked for, whatever the units were."""
    branches = Branches()
    for layers in (1, 2, 3, 1, 3, 2):
        units = [(f"u{i}", 10 * layers + i) for i in range(layers)]
        branches.learn(asked(("n", layers), *units, ("lr", 0.1), discrete="n u0 u1 u2"), whole=True)
    for layers in (1, 2, 3):
        names = [f"u{i}" for i in range(layers)]
        assert follow(branches, {"n": layers, "u0": 99, "u1": 98, "u2": 97, "lr": 0.3}) == ["n", *names, "lr"]
    assert follow(branches, {"n": 4, "u0": 99, "u1": 98, "lr": 0.3}) == ["n", "u0"]  # it differs from there on


def test_a_trial_that_was_cut_short_says_nothing_of_its_end() -> None:
    """Pruned before it asked for y, it leaves y foreseen; a whole one that asked for no more is another way to go."""
    branches = Branches()
    branches.learn(asked(("x", 1), ("y", 2.0), discrete="x"), whole=True)
    branches.learn(asked(("x", 2), discrete="x"), whole=False)
    assert follow(branches, {"x": 2, "y": 0.0}) == ["x", "y"]
    branches.learn(asked(("x", 3), discrete="x"), whole=True)
    assert follow(branches, {"x": 3, "y": 0.0}) == ["x"]
    assert follow(branches, {"x": 1, "y": 0.0}) == ["x", "y"]


def test_true_and_one_are_two_options() -> None:
    """Python takes them for equal."""
    branches = Branches()
    branches.learn(asked(("k", True), ("a", 0.0), discrete="k"), whole=True)
    branches.learn(asked(("k", 1), ("b", 0.0), discrete="k"), whole=True)
    assert follow(branches, {"k": True, "a": 0.0, "b": 0.0}) == ["k", "a"]
    assert follow(branches, {"k": 1, "a": 0.0, "b": 0.0}) == ["k", "b"]


def test_another_distribution_is_another_question() -> None:
    """A range that depends on an earlier value is foreseen where that value can be told."""
    branches = Branches()
    wide, narrow = Question("y", "0..9", True), Question("y", "0..1", True)
    branches.learn([(question("x", True), 9), (wide, 3)], whole=True)
    branches.learn([(question("x", True), 1), (narrow, 1)], whole=True)
    assert branches.next([(question("x", True), 1)]) == narrow
    assert branches.next([(question("x", True), 5)]) is None
