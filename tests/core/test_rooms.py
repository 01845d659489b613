"""The index of workers: what it says is what looking at all of them would say."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import admission
from scheduler.core.rooms import Rooms
from scheduler.model import Pressure, WorkerView
from tests.builders import worker

names = st.sampled_from("abcd")
views = st.builds(
    lambda name, taken, free, available, pressure, domain, limit: worker(
        name,
        capacity_bytes=30,
        reserved_bytes=taken,
        available_bytes=available,
        free_slots=free,
        slots=4,
        pressure=pressure,
        domain=domain,
        domain_headroom_bytes=20 if domain else None,
        limit_bytes=limit,
    ),
    names,
    st.integers(0, 30),
    st.integers(0, 4),
    st.none() | st.integers(0, 30),
    st.sampled_from([Pressure.NORMAL, Pressure.SOFT]),
    st.sampled_from(["", "host"]),
    st.integers(25, 30),
)


@settings(max_examples=60)
@given(st.lists(views | names, max_size=12), st.integers(0, 30), st.integers(1, 4))
def test_the_index_agrees_with_a_look_at_all(steps: list[WorkerView | str], need: int, slots: int) -> None:
    """After any changes each question has the answer that a walk through all workers gives."""
    rooms, here = Rooms(), dict[str, WorkerView]()
    for step in steps:
        if isinstance(step, str):
            rooms.drop(step)
            here.pop(step, None)
        else:
            rooms.put(step)
            here[step.address] = step
    opened = sorted((admission.room(view), view.address) for view in here.values() if admission.closed(view) is None)
    found = [(admission.room(view), view.address) for view in rooms.from_tightest(need, slots)]
    assert found == [place for place in opened if place[0] >= need and here[place[1]].free_slots >= slots]
    assert [(admission.room(view), view.address) for view in rooms.from_roomiest()] == opened[::-1]
    assert rooms.has_open_slot(slots) == any(here[name].free_slots >= slots for _, name in opened)
    assert rooms.has_slots(slots) == any(view.free_slots >= min(slots, view.slots) for view in here.values())
    largest = rooms.largest
    assert (largest and largest.limit_bytes) == max((view.limit_bytes or 0 for view in here.values()), default=None)
    assert rooms.views == here
    for view in here.values():
        mates = {v.address for v in here.values() if v.domain == view.domain != ""} | {view.address}
        assert rooms.together(view.address) == mates
