"""What `fusewire.bench.moe` measures, where it can be run without a GPU."""
from __future__ import annotations

import torch

from fusewire.bench import moe
from fusewire.group import close, loopback_group


def test_lines_say_what_a_token_of_deepseek_r1_takes():
    group = loopback_group(2)
    lines = {line["what"]: line for line in moe.exchange_lines(group, torch.device("cpu"), 2)}
    close(group)
    assert {name: line["bytes_per_token"] for name, line in lines.items()} == {
        "gather bf16 and logits": 15360, "dispatch bf16": 14336 + 40, "dispatch fp8_block": 7168 + 224 + 40,
        "dispatch nvfp4": 3584 + 448 + 40, "combine": 14336}
    assert all(line["suite"] == "moe" and line["us"] > 0 and line["world_size"] == 2 for line in lines.values())


def test_skewed_experts_have_as_many_rows_in_all():
    for rows in moe.ROWS_AN_EXPERT:
        sizes = moe._sizes(rows, True)
        assert sum(sizes) == sum(moe._sizes(rows, False)) and sizes[0] > 3 * rows and len(sizes) == moe.LOCAL


def test_what_cannot_run_is_a_sentence():
    """Without a GPU every check of a kernel fails, and says so, instead of ending the others."""
    if not torch.cuda.is_available():
        wrong = moe.check(torch.device("cpu"))
        assert len(wrong) == 1 + 6 + len(moe.triton.TILE) and all(": " in line for line in wrong)
