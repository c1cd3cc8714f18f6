"""The virtual clock: durations by hand, rounds with stragglers, batteries, and buffered asynchronous training."""

import json
from dataclasses import replace
from math import inf

import numpy as np
import pytest

from fedmm.config.devices import BufferConfig
from fedmm.engines.buffered import BufferedRun, staleness_weight
from fedmm.engines.clock import (
    Clock,
    Reading,
    Spent,
    Work,
    ask_count,
    attempt,
    check_in,
    level_j,
    ready_at,
    restore_clock,
    simulate_round,
    start_clock,
    task_seconds,
    time_to_accuracy,
)
from fedmm.engines.devices import Availability, Battery, DeviceProfile
from fedmm.errors import ConfigError, RunError

WORK = Work(samples=50, epochs=2, flops_sample=1e6, down_bytes=1000, up_bytes=400)
"""On `PLAIN`: 1000/500 + 50*2*1e6/1e7 + 400/100 = 2 + 10 + 4 seconds."""
PLAIN = DeviceProfile("plain", flops_s=1e7, memory_bytes=1, up_bytes_s=100.0, down_bytes_s=500.0)


def taking(seconds, **traits):
    """A device on which the work below takes as many seconds."""
    return replace(PLAIN, flops_s=1.0 / seconds, **traits)


UNIT = Work(samples=1, epochs=1, flops_sample=1.0, down_bytes=0, up_bytes=0)


def play(seconds, wanted, deadline_s=None, seed=0, round=1, start_s=0.0, **traits):
    fleet = [taking(s, **traits) for s in seconds]
    clock = replace(start_clock(fleet), now_s=start_s)
    return simulate_round(clock, fleet, dict.fromkeys(range(len(fleet)), UNIT), wanted, seed, round, deadline_s)


# -- one task -----------------------------------------------------------------------------------------------------


def test_a_task_takes_receiving_computing_and_sending():
    assert task_seconds(PLAIN, WORK) == pytest.approx(16)
    assert task_seconds(replace(PLAIN, flops_s=2e7), WORK) == pytest.approx(11)
    assert task_seconds(PLAIN, replace(WORK, samples=0, up_bytes=0)) == pytest.approx(2)


def test_a_task_waits_for_its_device_and_pauses_without_it():
    there = Availability(((5.0, 15.0),), period_s=100.0)
    fleet = [replace(PLAIN, availability=there)]
    done = attempt(start_clock(fleet), fleet, 0, WORK, 0, 1, 0.0)
    assert (done.end_s, done.fate) == (pytest.approx(111), "reply")
    assert done.spent == Spent(1000, 400, 0.0)
    fleet = [replace(PLAIN, availability=replace(there, resumes=False))]
    lost = attempt(start_clock(fleet), fleet, 0, WORK, 0, 1, 0.0)
    assert (lost.end_s, lost.fate) == (pytest.approx(15), "interrupted")
    assert lost.spent == Spent(1000, 0, 0.0)


def test_a_device_that_is_gone_for_good_never_answers():
    fleet = [replace(PLAIN, availability=Availability(((0.0, 14.0),)))]
    clock = start_clock(fleet)
    cut = attempt(clock, fleet, 0, WORK, 0, 1, 0.0)
    assert (cut.end_s, cut.fate, cut.spent) == (14, "interrupted", Spent(1000, 200, 0.0))
    gone = attempt(clock, fleet, 0, WORK, 0, 1, 20.0)
    assert (gone.end_s, gone.fate, gone.spent) == (20, "unavailable", Spent())


def test_a_late_task_has_used_what_it_used():
    fleet = [PLAIN]
    late = attempt(start_clock(fleet), fleet, 0, WORK, 0, 1, 100.0, 113.0)
    assert (late.end_s, late.fate, late.spent) == (113, "late", Spent(1000, 100, 0.0))


def test_clients_drop_out_as_often_as_they_should_somewhere_in_the_task():
    fleet = [taking(10.0, dropout=0.2)] * 40
    clock = start_clock(fleet)
    tries = [attempt(clock, fleet, k, UNIT, 3, round, 0.0) for round in range(100) for k in range(40)]
    ends = [t.end_s for t in tries if t.fate == "dropout"]
    # 4000 draws: standard error 0.0063.
    assert len(ends) / len(tries) == pytest.approx(0.2, abs=0.025)
    assert np.mean(ends) == pytest.approx(5, abs=0.4)
    assert 0 <= min(ends) < 0.5 < 9.5 < max(ends) < 10
    again = attempt(clock, fleet, 7, UNIT, 3, 5, 0.0)
    assert again == tries[5 * 40 + 7], "a draw hangs on seed, round and client alone"


# -- batteries ----------------------------------------------------------------------------------------------------

CELL = Battery(capacity_j=100.0, compute_w=2.0, radio_j_byte=0.01, recharge_w=1.0, reserve_j=20.0, initial_j=100.0)
"""`WORK` on `PLAIN` takes 10 J for receiving, 20 J for computing and 4 J for sending."""


def test_a_task_takes_its_energy_from_the_battery():
    fleet = [replace(PLAIN, battery=CELL)]
    clock, timing = simulate_round(start_clock(fleet), fleet, {0: WORK}, 1, 0, 1)
    assert timing.spent.energy_j == pytest.approx(34)
    assert level_j(clock, fleet, 0, clock.now_s) == pytest.approx(66)


def test_an_empty_battery_ends_a_task():
    fleet = [replace(PLAIN, battery=replace(CELL, initial_j=25.0))]
    clock, timing = simulate_round(start_clock(fleet), fleet, {0: WORK}, 1, 0, 1)
    # 10 J for receiving in 2 s, then 15 J at 2 W.
    assert timing.failed == {0: "battery"}
    assert timing.end_s == pytest.approx(2 + 7.5)
    assert timing.spent == Spent(1000, 0, pytest.approx(25))
    assert level_j(clock, fleet, 0, clock.now_s) == pytest.approx(0)


def test_a_battery_charges_while_the_device_is_away_and_not_above_its_capacity():
    fleet = [replace(PLAIN, battery=CELL, availability=Availability(((0.0, 50.0),), period_s=100.0))]
    clock = Clock(0.0, {0: (30.0, 10.0)})
    assert level_j(clock, fleet, 0, 50.0) == pytest.approx(30)
    assert level_j(clock, fleet, 0, 80.0) == pytest.approx(60)
    assert level_j(clock, fleet, 0, 250.0) == pytest.approx(100)


def test_below_the_reserve_a_device_takes_no_task_until_it_has_charged():
    there = Availability(((0.0, 50.0),), period_s=100.0)
    fleet = [replace(PLAIN, battery=replace(CELL, recharge_w=0.2), availability=there)]
    assert ready_at(Clock(0.0, {0: (20.0, 0.0)}), fleet, 0, 10.0) == 10
    # 12 J are short: 60 s away, so it is full enough at 160, and there again at 200.
    assert ready_at(Clock(0.0, {0: (8.0, 0.0)}), fleet, 0, 10.0) == pytest.approx(200)
    dead = [replace(PLAIN, battery=replace(CELL, recharge_w=0.0))]
    assert ready_at(Clock(0.0, {0: (8.0, 0.0)}), dead, 0, 10.0) == inf


def test_the_server_waits_until_enough_devices_have_checked_in():
    fleet = [replace(PLAIN, availability=Availability(((begin, 1e6),))) for begin in (0.0, 30.0, 10.0, 30.0)]
    clock = start_clock(fleet)
    assert check_in(clock, fleet, range(4), 1) == (clock, [0])
    later, there = check_in(clock, fleet, range(4), 3)
    assert (later.now_s, there) == (30, [0, 1, 2, 3])
    assert check_in(clock, fleet, [1, 2], 5)[1] == [1, 2], "who never comes is not waited for"
    with pytest.raises(RunError, match="no device will ever be ready again"):
        check_in(replace(clock, now_s=2e6), fleet, range(4), 1)


# -- synchronous rounds -------------------------------------------------------------------------------------------


def test_a_round_ends_with_the_slowest_when_all_are_wanted():
    clock, timing = play([3, 1, 7], 3, start_s=100.0)
    assert (timing.replies, timing.end_s, clock.now_s) == ((1, 0, 2), 107, 107)
    assert timing.arrival_s == {1: 101, 0: 103, 2: 107}
    assert timing.stragglers == ()


def test_over_selection_waits_for_the_wanted_replies_alone():
    assert ask_count(10, 1.3, 100) == 13
    assert ask_count(5, 1.3, 100) == 7
    assert ask_count(10, 1.3, 11) == 11
    assert ask_count(3, 1.0, 9) == 3
    _, timing = play([5, 1, 9, 2], 3)
    assert (timing.replies, timing.end_s, timing.stragglers) == ((1, 3, 0), 5, (2,))


def test_the_deadline_ends_a_round_that_falls_short():
    _, timing = play([3, 1, 7], 3, deadline_s=6.0)
    assert (timing.replies, timing.end_s, timing.stragglers) == ((1, 0), 6, (2,))
    _, punctual = play([3, 1, 6], 3, deadline_s=6.0)
    assert (punctual.replies, punctual.end_s) == ((1, 0, 2), 6)
    _, nobody = play([3, 4], 2, deadline_s=1.0)
    assert (nobody.replies, nobody.end_s, nobody.stragglers) == ((), 1, (0, 1))


def test_ties_go_to_the_lower_client():
    _, timing = play([2, 1, 2, 2], 2)
    assert (timing.replies, timing.end_s, timing.stragglers) == ((1, 0), 2, (2, 3))


def test_who_drops_out_is_missed_until_the_deadline():
    for seed in range(50):
        _, timing = play([1, 2, 3, 4], 4, deadline_s=9.0, seed=seed, dropout=0.5)
        assert set(timing.replies) | set(timing.failed) == {0, 1, 2, 3}
        assert set(timing.failed.values()) <= {"dropout"}
        assert timing.end_s == (9 if timing.failed else 4)
    assert timing == play([1, 2, 3, 4], 4, deadline_s=9.0, seed=49, dropout=0.5)[1]


def test_stragglers_stop_at_the_end_and_what_they_used_is_counted():
    fleet = [replace(PLAIN, battery=CELL), replace(PLAIN, flops_s=5e6, battery=CELL)]
    clock, timing = simulate_round(start_clock(fleet), fleet, {0: WORK, 1: WORK}, 1, 0, 1)
    # The slow one has received (10 J) and computed for 14 s (28 J) when the other's reply arrives.
    assert (timing.end_s, timing.stragglers) == (pytest.approx(16), (1,))
    assert timing.spent == Spent(2000, 400, pytest.approx(34 + 38))
    assert level_j(clock, fleet, 1, clock.now_s) == pytest.approx(62)


def test_the_clock_is_plain_values_between_rounds():
    fleet = [taking(2.0, dropout=0.3, battery=CELL), taking(3.0, dropout=0.3), taking(4.0, battery=CELL)]
    work = dict.fromkeys(range(3), UNIT)
    clock, straight = start_clock(fleet), []
    for round in range(1, 7):
        clock, timing = simulate_round(clock, fleet, work, 2, 5, round, 10.0)
        straight.append(timing)
    clock, resumed = start_clock(fleet), []
    for round in range(1, 7):
        clock = restore_clock(json.loads(json.dumps(clock.state())))
        clock, timing = simulate_round(clock, fleet, work, 2, 5, round, 10.0)
        resumed.append(timing)
    assert resumed == straight


# -- buffered asynchronous training -------------------------------------------------------------------------------


def buffered(seconds, size, concurrency, deadline_s=None, seed=0, config=None, **traits):
    fleet = [taking(s, **traits) for s in seconds]
    config = config or BufferConfig(size=size, concurrency=concurrency)
    return BufferedRun(fleet, dict.fromkeys(range(len(fleet)), UNIT), config, seed, deadline_s)


def steps(run, count):
    return [next(run) for _ in range(count)]


def test_two_clients_and_a_buffer_of_two_by_hand():
    # Client 0 ends at 3, 6, 9, ...; client 1 at 4, 8, 12, ...; each starts again at once.
    run = buffered([3, 4], size=2, concurrency=2)
    got = [(a.version, a.at_s, [(e.client, e.start_version, e.staleness) for e in a.entries]) for a in steps(run, 4)]
    assert got == [
        (1, 4, [(0, 0, 0), (1, 0, 0)]),
        # Client 0 began its second task at 3, one second before version 1.
        (2, 8, [(0, 0, 1), (1, 1, 0)]),
        # Its third began at 6, before version 2; the next at 9, with version 2. Both at 12: the lower id first.
        (3, 12, [(0, 1, 1), (0, 2, 0)]),
        (4, 15, [(1, 2, 1), (0, 3, 0)]),
    ]


def test_with_a_buffer_of_one_staleness_counts_the_others_updates():
    run = buffered([10, 1], size=1, concurrency=2)
    got = [(e.client, e.staleness) for a in steps(run, 11) for e in a.entries]
    # Nine updates of client 1 come before client 0's first; at second 10 both arrive, client 0 first.
    assert got == [(1, 0)] * 9 + [(0, 9), (1, 1)]


@pytest.mark.parametrize("seed", range(5))
def test_the_queue_agrees_with_a_walk_through_every_second(seed):
    durations = np.random.default_rng(seed).integers(1, 9, 6).tolist()
    size, versions = 4, 60
    version, began, buffer, expected = 0, dict.fromkeys(range(6), (0, 0)), [], []
    for now in range(1, 1000):
        for k, seconds in enumerate(durations):
            start, since = began[k]
            if now - start < seconds:
                continue
            buffer.append((k, since, version - since))
            if len(buffer) == size:
                version += 1
                expected.append((version, now, buffer))
                buffer = []
            began[k] = (now, version)
    run = buffered(durations, size=size, concurrency=6)
    got = [
        (a.version, a.at_s, [(e.client, e.start_version, e.staleness) for e in a.entries]) for a in steps(run, versions)
    ]
    assert got == [(v, pytest.approx(at), entries) for v, at, entries in expected[:versions]]


def test_weights_of_stale_updates():
    def weights(**config):
        return [staleness_weight(tau, BufferConfig(**config)) for tau in (0, 3, 4, 6)]

    assert weights(staleness="constant") == [1, 1, 1, 1]
    assert weights() == pytest.approx([1, 1 / 2, 5**-0.5, 7**-0.5])
    assert weights(staleness="hinge", exponent=0.5, grace=4) == pytest.approx([1, 1, 1, 1 / 2])
    run = buffered([3, 4], size=2, concurrency=2)
    assert [e.weight for e in steps(run, 2)[1].entries] == pytest.approx([2**-0.5, 1])


def test_as_many_train_at_a_time_as_may_and_tasks_never_repeat():
    run = buffered([2, 3, 5, 7, 11], size=3, concurrency=3)
    tasks = [e.task for a in steps(run, 30) for e in a.entries]
    assert len(set(tasks)) == len(tasks) == 90
    flying = run.state()["flying"]
    # The place of the last arrival is filled when the run goes on, with the new version.
    assert len(flying) == 2
    assert len({outcome["client"] for _, _, outcome in flying}) == 2


def test_everybody_takes_part_and_the_fast_more_often():
    run = buffered([1.0, 1.0, 4.0, 4.0], size=4, concurrency=4)
    clients = [e.client for a in steps(run, 100) for e in a.entries]
    # In steady state 4 : 1, as all of them train all the time.
    assert clients.count(0) / clients.count(2) == pytest.approx(4, rel=0.05)


def test_an_interrupted_queue_goes_on_as_if_nothing_had_been():
    def fresh():
        there = Availability(((0.0, 30.0),), period_s=50.0)
        return buffered(
            [2, 3, 5, 7, 11, 13], 3, 4, deadline_s=40.0, seed=8, dropout=0.2, availability=there, battery=CELL
        )

    straight = steps(fresh(), 20)
    state, resumed = fresh().state(), []
    for _ in range(20):
        run = fresh()
        run.restore(json.loads(json.dumps(state)))
        resumed += steps(run, 1)
        state = run.state()
    assert resumed == straight
    assert any(a.failed for a in straight)
    assert [a.version for a in straight] == list(range(1, 21))
    assert steps(buffered([2, 3, 5, 7, 11, 13], 3, 4, seed=9), 5) != steps(buffered([2, 3, 5, 7, 11, 13], 3, 4), 5)


def test_versions_in_use_are_those_that_updates_to_come_started_from():
    run = buffered([10, 1], size=1, concurrency=2)
    for version in range(1, 9):
        next(run)
        assert run.versions_in_use() == {0, version}
    steps(run, 3)
    assert 0 not in run.versions_in_use()


def test_a_place_stays_free_until_a_device_comes():
    fleet = [taking(1.0, availability=Availability(((begin, begin + 10.0),), 100.0)) for begin in (20.0, 60.0)]
    run = BufferedRun(fleet, {0: UNIT, 1: UNIT}, BufferConfig(size=5, concurrency=2), 0)
    first, second, third = steps(run, 3)
    assert [(e.client, e.arrival_s, e.start_version) for e in first.entries] == [(0, 21.0 + i, 0) for i in range(5)]
    assert second.entries[-1].arrival_s == 30
    # Nobody is there from second 30 on; both places wait for client 1.
    assert [(e.client, e.arrival_s) for e in third.entries] == [(1, 61.0 + i) for i in range(5)]


def test_a_task_over_its_deadline_frees_its_place():
    run = buffered([1, 1, 1, 50], size=2, concurrency=2, deadline_s=5.0)
    got = steps(run, 40)
    assert all(e.client != 3 for a in got for e in a.entries)
    assert {pair for a in got for pair in a.failed} == {(3, "late")}


def test_a_run_in_which_nothing_arrives_is_given_up():
    with pytest.raises(RunError, match="tasks in a row came to nothing, the last one: late"):
        next(buffered([9, 9], size=1, concurrency=2, deadline_s=1.0))
    with pytest.raises(RunError, match="no device will ever be ready again"):
        steps(buffered([1, 1], size=1, concurrency=1, availability=Availability(((0.0, 3.5),))), 9)
    with pytest.raises(ConfigError, match="3 clients are to train at a time, but only 2"):
        buffered([1, 1], size=1, concurrency=3)


def test_bytes_and_energy_of_a_buffered_run_add_up():
    fleet = [replace(PLAIN, battery=replace(CELL, capacity_j=1e4, initial_j=1e4))] * 3
    run = BufferedRun(fleet, dict.fromkeys(range(3), WORK), BufferConfig(size=3, concurrency=3), 0)
    spent = sum((a.spent for a in steps(run, 4)), Spent())
    assert spent == Spent(12_000, 4_800, pytest.approx(12 * 34))
    assert sum(level_j(run.clock, fleet, k, run.clock.now_s) for k in range(3)) == pytest.approx(3e4 - 12 * 34)


# -- time to accuracy ---------------------------------------------------------------------------------------------


def test_time_to_accuracy_is_the_first_reading_that_reaches_it():
    readings = [Reading(30, 300, 0.7), Reading(10, 100, 0.4), Reading(20, 200, 0.8), Reading(40, 400, 0.9)]
    assert time_to_accuracy(readings, [0.4, 0.7, 0.9, 0.95]) == {
        0.4: Reading(10, 100, 0.4),
        0.7: Reading(20, 200, 0.8),
        0.9: Reading(40, 400, 0.9),
        0.95: None,
    }
    assert time_to_accuracy([], [0.5]) == {0.5: None}
