"""Ranks that hold different things are told so, on every rank, instead of hanging."""
import time

import pytest
import torch.distributed as dist
from dist import run_ranks

from fusewire import consensus, group
from fusewire.consensus import agree
from fusewire.errors import FusewireError, MismatchError

pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]

FACTS = {"plan": "a1b2", "tokens": 32, "formats": {"b": [1, 2.5], "a": None}}


def said(facts: dict, topic: str = "plan", timeout_s: float = 20.0) -> dict:
    """What agree said on this rank, and how long it took."""
    start = time.monotonic()
    try:
        agree(dist.group.WORLD, topic, facts, timeout_s)
        text, error = "", ""
    except FusewireError as e:
        text, error = str(e), type(e).__name__
    return {"text": text, "error": error, "seconds": time.monotonic() - start}


@pytest.mark.parametrize("world", [2, 4])
def test_equal_facts_agree_however_often_and_in_any_key_order(world):
    def rank(r):
        for i in range(20):
            order = reversed if r % 2 else list
            agree(dist.group.WORLD, "plan", dict(order((FACTS | {"i": i, "nested": dict(order([("b", 1), ("a", 2)]))}).items())))
        agree(group.of_process_group(dist.group.WORLD), "library", consensus.library_facts())
        return said(FACTS)

    assert all(o["error"] == "" for o in run_ranks(rank, world))


@pytest.mark.parametrize(("key", "other", "shown"), [
    ("plan", "c3d4", ['"a1b2"', '"c3d4"']),
    ("tokens", 31, ["32", "31"]),
    ("tokens", "32", ["32 on", '"32"']),
    ("formats", {"b": [1, 2.5]}, ['"a":null', '{"b":[1,2.5]}']),
    ("formats", {"b": [1.0, 2.5], "a": None}, ["[1,2.5]", "[1.0,2.5]"]),
    ("new", 1, ["absent", "1 on"]),
])
def test_a_difference_is_named_on_every_rank(key, other, shown):
    def rank(r):
        agree(dist.group.WORLD, "plan", FACTS)
        out = said(FACTS | ({key: other} if r == 1 else {}))
        agree(dist.group.WORLD, "plan", FACTS)  # a mismatch leaves the group usable
        return out

    out = run_ranks(rank, 2)
    assert [o["error"] for o in out] == ["MismatchError"] * 2
    assert out[0]["text"] == out[1]["text"]
    assert all(part in out[0]["text"] for part in ["plan: ", repr(key), "rank 0", "rank 1", *shown]), out[0]["text"]
    assert max(o["seconds"] for o in out) < 1


def test_four_ranks_of_which_one_differs_in_the_middle_of_a_long_value():
    out = run_ranks(lambda r: said({"a": 1, "order": "x" * 5000 + ("!" if r == 2 else "?") + "y" * 5000, "z": r}), 4)
    assert {o["text"] for o in out} == {out[0]["text"]} and out[0]["error"] == "MismatchError"
    text = out[0]["text"]
    assert "x?y" in text and "x!y" in text and "ranks 0, 1, 3" in text and "rank 2" in text and "1 more differ: z" in text
    assert len(text) < 500


def test_ranks_that_do_not_come_are_named_and_do_not_go_on_alone_later():
    def rank(r):
        if r in (1, 3):
            time.sleep(2)
        return said(FACTS, timeout_s=0.7)

    out = run_ranks(rank, 4)
    assert all("ranks 1, 3 did not come within 0.7 s" in out[r]["text"] and out[r]["seconds"] < 1.7 for r in (0, 2)), out
    assert all("gave up waiting" in out[r]["text"] for r in (1, 3)), out


def test_a_rank_that_never_comes_is_named():
    def rank(r):
        if r == 0:
            time.sleep(30)
        agree(dist.group.WORLD, "library", FACTS, timeout_s=0.5)

    with pytest.raises(FusewireError, match="rank 1: library: rank 0 did not come"):
        run_ranks(rank, 2)


def test_disjoint_and_overlapping_groups_do_not_see_each_other():
    def rank(r):
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        agree(pairs[r // 2], "plan", {"pair": r // 2})
        agree(dist.group.WORLD, "plan", {"all": 1})
        try:
            agree(pairs[r // 2], "plan", {"rank": r % 2})
        except MismatchError as e:
            return str(e)

    out = run_ranks(rank, 4)
    assert "0 on rank 2 and 1 on rank 3" in out[3] and "0 on rank 0 and 1 on rank 1" in out[0]


def test_groups_without_processes_agree_at_once():
    for g in (group.fake_group(4), group.simulated_group(4)):
        start = time.monotonic()
        agree(g, "plan", {"x": 1})
        assert time.monotonic() - start < 0.1
        group.close(g)


def test_library_facts_change_with_the_sources(tmp_path):
    facts = consensus.library_facts()
    assert set(facts) == {"python", "torch", "transformers", "fusewire", "fusewire sources", "FP8 accumulation"}
    assert facts == consensus.library_facts()
    hashes = set()
    for name, text in [("a.py", "x"), ("a.py", "y"), ("b.py", ""), ("b.py", "z"), ("__pycache__/a.pyc", "cached")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        hashes.add(consensus._hash_of(tmp_path))
    assert len(hashes) == 4


def test_a_library_version_that_differs_is_named():
    out = run_ranks(lambda r: said(consensus.library_facts() | ({"torch": "9.9"} if r else {}), "library"), 2)
    assert all("'torch'" in o["text"] and '"9.9" on rank 1' in o["text"] for o in out)
