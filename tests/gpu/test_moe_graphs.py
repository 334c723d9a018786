"""A compiled model with experts in CUDA graphs, one for each size to which ranks that hold other numbers of tokens are padded."""
from __future__ import annotations

import copy

import dist as ranks
import pytest
import test_moe_padding as on_cpu
import torch
from test_moe import double, model
from test_moe_steps import Counted
from torch import Tensor

import fusewire
from fusewire.config import Config
from fusewire.models import idle
from fusewire.models.moe import layout
from fusewire.models.parallelize import resolve, shard

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]

STEPS = ((5, 0), (1, 3), (16, 9), (0, 0), (2, 2), (4, 1), (7, 16), (0, 12))
SIZES = (4, 16)


def captured(compiled, given: dict) -> tuple:
    """(what a graph of the compiled code reads, the graph, what it writes)."""
    own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()}
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = compiled.run(**own)
    return own, graph, out


def replays(rank: int) -> dict:
    """Each step by the compiled code, by a graph, and without padding by the model itself."""
    device, counted, group = ranks.use_device(), Counted(), resolve(None)
    whole = model("qwen3_moe", torch.bfloat16, heads=8, kv_heads=4, head_dim=64, moe_intermediate_size=256)
    whole.get_input_embeddings().weight[0] = 0  # a token of padding would have larger values than all others
    whole.get_input_embeddings().weight[0, :2] = 50
    # a scale of all own tokens in attention; experts whose tokens travel by kernels alone
    m = shard(copy.deepcopy(whole).to(device), group, lambda name: "fp8_block" if ".experts" in name else "fp8_tensor",
              layout(group, 2, None, None))
    whole = double(whole).to(device)
    compiled = fusewire.compile(m, Config(plan="sharded", pad_to=SIZES, max_tokens=64))
    graphs, found = {}, {"differ": [], "exchanges": [], "ignored": [], "ours": 0.0, "plain": 0.0}
    for step, counts in enumerate(STEPS):
        mine = on_cpu.tokens(counts, 2)[rank].clamp(min=2).to(device)
        counted.calls.clear()
        begun = compiled.begin(input_ids=mine, use_cache=False)
        want = compiled.run(**begun.given).logits.clone()
        size = want.shape[1]
        if size not in graphs:
            graphs[size] = captured(compiled, begun.given)
        given, graph, out = graphs[size]
        given["input_ids"].copy_(begun.given["input_ids"])
        out.logits.fill_(torch.nan)
        graph.replay()
        if not torch.equal(out.logits.view(torch.int16), want.view(torch.int16)):
            found["differ"].append(step)
        found["exchanges"].append(sum(counted.calls.values()))
        ours = begun.cut(out).logits.double()
        m.layout.own.fill_(size)  # as if nothing were padding
        graph.replay()
        if mine.shape[1] not in (0, size) and torch.equal(begun.cut(out).logits, ours):
            found["ignored"].append(step)
        if any(counts):
            plain = m(mine, use_cache=False).logits.double() if mine.shape[1] else idle(m)
            if plain is not None:
                exact = whole(mine, use_cache=False).logits
                found["ours"] += float((ours - exact).square().sum())
                found["plain"] += float((plain - exact).square().sum())
    found |= {"sizes": sorted(graphs), "captures": len(compiled.captures)}
    return found | {"backends": [b for s in fusewire.explain(compiled).sites for b in s.backends]}


def test_a_graph_for_each_size():
    """Replayed with other counts it gives the bits of the code that it holds, leaves padding out of scales, and is as close to
    float64 as steps without padding. Once a step something is exchanged beside it."""
    for found in ranks.run_ranks(replays, 2, timeout_s=250):
        assert found["differ"] == [] and found["ignored"] == []
        assert found["exchanges"] == [1] * len(STEPS)
        assert found["sizes"] == list(SIZES) and found["captures"] == 1
        assert "expert_parallel.pushed" in found["backends"]
        assert 0 < found["plain"] and found["ours"] <= 1.5**2 * found["plain"]
