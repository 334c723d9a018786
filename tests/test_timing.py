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


def test_the_slower_candidate_takes_longer_and_they_take_turns():
    g, log = group.loopback_group(2), []
    us = timing.measure({"slow": sleeper(0.01, log, "slow"), "fast": sleeper(0.003, log, "fast")}, g, rounds=3)
    group.close(g)
    assert 10e3 <= us["slow"] < 20e3 and 3e3 <= us["fast"] < 8e3
    turns = [name for name, before in zip(log, ["", *log], strict=False) if name != before]
    assert turns == ["slow", "fast"] * 4  # one warm-up, three rounds


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
