"""Measuring: turns, medians, the slower rank."""
import time

import pytest
import torch
from dist import run_ranks

from fusewire import group, timing


def sleeper(seconds, log=None, name=""):
    def call():
        if log is not None:
            log.append(name)
        time.sleep(seconds)
    return call


def test_the_slower_candidate_takes_longer():
    g = group.loopback_group(2)
    us = timing.measure({"slow": sleeper(0.01), "fast": sleeper(0.003)}, g, rounds=3)
    group.close(g)
    assert 10e3 <= us["slow"] < 20e3 and 3e3 <= us["fast"] < 8e3


def test_candidates_take_turns_in_other_orders():
    g, log = group.loopback_group(2), []
    timing.measure({name: sleeper(0.021, log, name) for name in "abc"}, g)  # long enough for one call in a round
    group.close(g)
    rounds = ["".join(log[i:i + 6:2]) for i in range(0, len(log), 6)]  # a call, then the same once more for the clock
    assert rounds[0] == "abc" and len(rounds) == 6  # how long each takes, then five rounds
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 2


def test_short_candidates_are_timed_in_more_rounds(monkeypatch):
    monkeypatch.setattr(timing, "_seconds", lambda run, device: run() or 0.021)  # whatever else the machine does
    g, log = group.loopback_group(2), []
    timing.measure({"a": sleeper(0.0, log, "a")}, g, seconds=0.4)
    timing.measure({"b": sleeper(0.0, log, "b")}, g, rounds=7, seconds=0.1)  # which is too little for 7
    group.close(g)
    assert (log.count("a") - 2) // 2 == 9 and (log.count("b") - 2) // 2 == 7  # but for the first call and the estimate


def test_a_candidate_may_settle_in_each_turn(monkeypatch):
    """It runs for settle_s before it is timed, and is timed for as long; the time is that of one call."""
    def seconds(run, device):
        before = len(log)
        run()
        return 0.01 * (len(log) - before)

    monkeypatch.setattr(timing, "_seconds", seconds)
    monkeypatch.setitem(timing.ROUND_S, "cpu", 0.02)  # two calls in a batch
    g, log = group.loopback_group(2), []
    us = timing.measure({name: sleeper(0.0, log, name) for name in "ab"}, g, rounds=3, settle_s=0.055)
    group.close(g)
    first, turns = log[:4], ["".join(log[i:i + 12]) for i in range(4, len(log), 12)]
    assert first == ["a", "a", "b", "b"] and sorted(turns) == ["a" * 12] * 3 + ["b" * 12] * 3  # 2 * 3 batches of 2
    assert us == {"a": pytest.approx(1e4), "b": pytest.approx(1e4)}


def test_the_median_forgets_one_bad_round():
    g, calls = group.loopback_group(2), []

    def call():
        calls.append(1)
        time.sleep(0.3 if len(calls) == 4 else 0.02)  # warm-up, estimate, round one's first, and its timed one

    us = timing.measure({"call": call}, g, rounds=3)["call"]
    group.close(g)
    assert 20e3 <= us < 100e3


@pytest.mark.dist
def test_every_rank_hears_of_the_slower_one():
    def program(rank):
        g = group.resolve(torch.distributed.group.WORLD.group_name)
        return [timing.measure({"a": sleeper(0.004 * (1 + rank))}, g, rounds=3)["a"]]

    a, b = run_ranks(program, 2)
    assert a == b and a[0] >= 8e3
