"""What can be said of workspaces, loopback groups and the Triton backend without a GPU."""
from __future__ import annotations

import pytest
import torch

import fusewire.backends  # noqa: F401  (registers them)
from fusewire import group, tuning
from fusewire.backends import device, workspace
from fusewire.config import NVLINK
from fusewire.errors import FusewireError, InputError
from fusewire.ops.collectives import all_gather, all_reduce, reduce_scatter
from fusewire.ops.fused import all_reduce_norm_quant


def test_in_loopback_peers_send_what_this_rank_sends():
    g = group.loopback_group(4, rank=1)
    x = torch.arange(16.0).view(8, 2)
    assert torch.equal(all_gather([x], g.name)[0], x.repeat(4, 1))
    assert torch.equal(reduce_scatter(x, g.name), 4 * x[2:4])
    assert all_reduce(x, g.name).shape == x.shape
    group.close(g)


def test_closing_a_group_releases_what_was_kept_for_it():
    g, released = group.loopback_group(2), []
    group.on_close(g.name, lambda: released.append(1))
    group.close(g)
    group.close(g)
    assert released == [1]


def test_refusals_say_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    g = group.loopback_group(2)
    with pytest.raises(FusewireError, match=r"has no workspace; call workspace.open\(group, nbytes\) on every rank"):
        workspace.of(g.name)
    with pytest.raises(FusewireError, match="needs a CUDA device"):
        workspace.open(g.name, 100)
    with pytest.raises(InputError, match="0 bytes holds nothing"):
        workspace.open(g.name, 0)
    with pytest.raises(InputError, match="not one of processes"):
        workspace.open(group.fake_group(2).name, 100)


def test_on_a_cpu_the_reference_runs():
    g = group.loopback_group(2)
    x = torch.randn(3, 64).bfloat16()
    choice = all_reduce_norm_quant.select(x, None, torch.ones(64), 1e-6, 0.0, False, [], "bf16", True, g.name)
    assert choice.backend.name == "reference"
    assert choice.refused == [f"{name}: it runs on CUDA devices, not on cpu" for name in ("one_shot", "streamed", "two_shot")]
    group.close(g)


def test_a_report_is_a_sentence():
    none = torch.empty(0)
    space = workspace.Workspace("tp", 1, 4, 256, 64, 256, False, torch.device("cpu"), 3.0, (), none, none, None, [],
                                none, None, False)
    op = workspace.op_number("all_reduce_norm_quant")
    assert workspace.op_number("all_reduce_norm_quant") == op > 0
    said = workspace.sentence(space, [op, 17, 5, 15, 2, 0, 0, 0])
    assert said.startswith("rank 1 of group 'tp' waited 3 s in all_reduce_norm_quant, epoch 17, row 5, for rank 2, whose flag held")
    assert "for rank 2, of whose row words are missing;" in workspace.sentence(space, [op, 17, 5, -1, 2, 0, 0, 0])
    with pytest.raises(FusewireError, match=r"it needs 512 bytes .* which has 256"):
        space.need("an op", 512, 1)


def test_a_row_is_added_up_in_one_way_however_it_is_launched():
    from fusewire.backends.triton import all_reduce_norm_quant as ar

    for hidden in (64, 576, 1024, 4096, 7168, 8192, 16384):
        warps, resident = ar._many(hidden)
        assert 65536 // (32 * warps * resident) >= 64  # registers
        shapes = [ar._few(rows, hidden, 132) for rows in range(1, 266)]
        assert shapes[-1] is None and all(shapes[:-1])
        for rows, (pieces, few_warps, resident) in enumerate(shapes[:-1], 1):
            assert few_warps == warps and 65536 // (32 * warps * resident) >= 64
            assert rows * pieces <= resident * 132 and pieces <= max(1, hidden // 1024 * 2)
    assert [ar._few(rows, 8192, 132) for rows in (1, 32, 33, 132, 133, 264)] == [
        (4, 8, 1), (4, 8, 1), (1, 8, 1), (1, 8, 1), (1, 8, 2), (1, 8, 2)]
    assert ar._few(32, 8192, 100) == (2, 8, 1)


def test_where_nothing_was_measured_middle_sizes_are_streamed():
    g = group.loopback_group(2)
    backends = {b.name: b for b in all_reduce_norm_quant.backends}

    def best(rows: int) -> str:
        x = torch.empty(rows, 8192, dtype=torch.bfloat16, device="meta")
        usage = all_reduce_norm_quant.usage(x, None, x[0], 1e-6, 0.0, False, [], "bf16", True, g.name)
        usage = usage._replace(link=NVLINK, world_size=2)
        return min(backends.values(), key=lambda b: b.seconds(usage)).name

    assert [best(rows) for rows in (1, 128, 256, 264, 300, 512, 4096, 8192)] == ["one_shot"] * 4 + ["streamed"] * 3 + ["one_shot"]
    group.close(g)


def test_what_travels_nowhere_is_not_streamed(monkeypatch):
    monkeypatch.setattr(device, "why_not", lambda d: None)
    x = torch.empty(512, 8192, dtype=torch.bfloat16, device="meta")
    chosen = {}
    for g in (group.loopback_group(2), group.fake_group(2)):
        monkeypatch.setitem(group.workspaces, g.name, 1 << 30)
        tuning.use(g, None, NVLINK)
        chosen[group.kind(g.name)] = all_reduce_norm_quant.select(x, None, x[0], 1e-6, 0.0, False, [], "bf16", True, g.name)
        group.close(g)
    assert {kind: c.backend.name for kind, c in chosen.items()} == {"loopback": "one_shot", "fake": "streamed"}
    assert chosen["loopback"].refused == ["streamed: in a loopback group nothing travels, so programs that only push save nothing"]
    assert chosen["fake"].refused == []
