"""The command and compiled models on a GPU: ranks that share it, workspaces, CUDA graphs, measuring."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import dist as ranks
import pytest
import tiny
import torch
import torch.distributed as dist
from tiny import tokenizer

from fusewire import group, tuning
from fusewire.backends import workspace
from fusewire.compiler.capture import compile
from fusewire.compiler.explain import explain
from fusewire.config import Config
from fusewire.engine.tune import tune
from fusewire.errors import InputError
from fusewire.models import parallelize, static_cache
from fusewire.models.demo import demo_model
from fusewire.ops.collectives import all_gather, all_reduce, reduce_scatter

SHOTS = r"all_reduce_norm_quant\.(one_shot|streamed|two_shot)"
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(580),
              pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]


def fusewire(gpus: int, *args: object, timeout: float = 500) -> str:
    """The command's output, where it sees so many GPUs."""
    count = torch.cuda.device_count()
    if count < gpus:
        pytest.skip(f"there are {count} CUDA devices here, and it needs {gpus}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:gpus]
    done = subprocess.run([sys.executable, "-m", "fusewire.cli", *map(str, args)], capture_output=True, text=True, timeout=timeout,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(visible)})
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "tiny-llama"
    tiny.model("llama", torch.bfloat16, head_dim=16, heads=8, kv_heads=4, intermediate=256).save_pretrained(folder)
    tokenizer(folder, tiny.VOCAB)
    return folder


@pytest.fixture(scope="module")
def demo():
    try:
        return demo_model()
    except InputError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("q", ["fp8", "nvfp4"])
def test_run_and_verify(saved, q, gpus):
    """With both ranks on one GPU, and with one each."""
    how = (saved, "-tp", 2, "-q", q, "--device", "cuda", "--max-tokens", 6, "--prompt", "w5 w6 w7 w8 w9")
    said = fusewire(gpus, "run", *how, "--compare")
    assert ("so that their times mean nothing" in said) == (gpus == 1)
    assert re.search(SHOTS, said) and "no workspace" not in said
    found = json.loads(fusewire(gpus, "verify", *how, "--json"))
    assert [(v["plan"], v["device"], v["accepted"]) for v in found] == [("replicated", "cuda", True), ("sharded", "cuda", True)]


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("q", ["fp8", "nvfp4"])
def test_the_demo_model(demo, q, gpus):
    prompt = "The capital of France is Paris. The capital of Italy is"
    how = (demo, "-tp", 2, "-q", q, "--device", "cuda", "--max-tokens", 8, "--prompt", prompt)
    said = fusewire(gpus, "run", *how, "--compare")
    assert re.search(SHOTS, said) and "no workspace" not in said
    assert re.search(r"identical to unfused|the unfused tokens differ", said)
    found = json.loads(fusewire(gpus, "verify", *how, "--json"))
    assert [(v["plan"], v["accepted"]) for v in found] == [("replicated", True), ("sharded", True)]


@pytest.fixture
def g():
    made = group.loopback_group(2)
    yield made
    group.close(made)


def model(g, q="fp8"):
    sizes = dict(head_dim=16, heads=8, kv_heads=4, intermediate=256)
    return parallelize(tiny.model("llama", torch.bfloat16, device="cuda", **sizes), g, q)


def decode(compiled, m, prompt: torch.Tensor, steps: int, graph: bool) -> list[int]:
    """Greedy tokens; the steps after the second by one CUDA graph, if wanted."""
    cache = static_cache(m, 1, prompt.shape[1] + steps + 1)
    ids, position = torch.empty(1, 1, dtype=torch.int64, device="cuda"), torch.zeros(1, 1, dtype=torch.int64, device="cuda")

    def read(ids, positions):
        return compiled(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    with torch.no_grad():
        ids.copy_(read(prompt, torch.arange(prompt.shape[1], device="cuda")[None])[:, -1:].argmax(-1))
        position.fill_(prompt.shape[1])
        tokens, captured = [int(ids)], None
        for step in range(steps):
            if graph and step == 2:
                captured = torch.cuda.CUDAGraph()
                torch.cuda.synchronize()
                with torch.cuda.graph(captured, capture_error_mode="thread_local"):
                    logits = read(ids, position)
            if captured:
                captured.replay()
            else:
                logits = read(ids, position)
            ids.copy_(logits[:, -1:].argmax(-1))
            position.add_(1)
            tokens.append(int(ids))
    return tokens


@pytest.mark.parametrize("q", ["fp8", "nvfp4"])
def test_decoding_by_a_cuda_graph(g, q):
    torch._dynamo.reset()
    m = model(g, q)
    compiled = compile(m, Config(plan="replicated", max_tokens=64))
    prompt = tiny.ids(1, 5).cuda()
    want = decode(compiled, m, prompt, 8, graph=False)
    assert len(set(want)) > 2, "tokens that differ"
    assert isinstance(group.workspaces[g.name], int)
    assert any(re.search(SHOTS, s.backend) for s in explain(compiled).sites)
    assert decode(compiled, m, prompt, 8, graph=True) == want


def test_calls_above_max_tokens_run_the_reference(g):
    torch._dynamo.reset()
    compiled = compile(model(g), Config(plan="replicated", max_tokens=8))
    with torch.no_grad():
        few, many = (compiled(input_ids=tiny.ids(1, n).cuda(), use_cache=False).logits for n in (8, 40))
    assert few.isfinite().all() and many.isfinite().all()
    assert any(re.search(SHOTS, s.backend) for s in explain(compiled, 8).sites)
    over = explain(compiled, 40)
    assert not any(re.search(SHOTS, s.backend) for s in over.sites)
    assert any(re.search(r"one_shot: it needs \d+ bytes of a workspace of \d+", r) for s in over.sites for r in s.refused)


def test_a_compiled_model_opens_its_workspace_and_the_group_frees_it():
    torch._dynamo.reset()
    g = group.loopback_group(2)
    compiled = compile(model(g), Config(plan="replicated", max_tokens=64))
    with torch.no_grad():
        compiled(input_ids=tiny.ids(1, 12).cuda(), use_cache=False)
    assert workspace.find(g.name) is not None
    group.close(g)
    assert workspace.find(g.name) is None and g.name not in group.workspaces


def test_tune_measures_and_the_model_runs_by_it(g, tmp_path):
    torch._dynamo.reset()
    sizes = dict(head_dim=64, heads=8, kv_heads=4, intermediate=1024)
    config = json.loads(tiny.config("llama", **sizes).to_json_string(use_diff=False)) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = tune(tmp_path, g, "fp8", torch.device("cuda", 0), (1, 8, 64))
    print(found.text())
    assert found.loopback and found.gpu == torch.cuda.get_device_name(0)
    assert any(call.startswith("all_reduce_norm_quant ") and list(s) == [1, 8, 64] for call, s in found.us.items())
    assert all(us > 0 for sizes in found.us.values() for by in sizes.values() for us in by.values())
    (tmp_path / "tuning.json").write_text(found.text())
    torch._dynamo.reset()
    m = parallelize(tiny.model("llama", torch.bfloat16, device="cuda", **sizes), g, "fp8")
    compiled = compile(m, Config(plan="replicated", tuning=str(tmp_path / "tuning.json")))
    with torch.no_grad():
        compiled(input_ids=tiny.ids(1, 12).cuda(), use_cache=False)
    assert tuning.of(g.name).measured.hash == found.hash
    assert any(how.startswith(f"measured {found.date}, tuning {found.hash}") for s in explain(compiled).sites for how in s.chosen)


def exchanged(rank: int) -> list[torch.Tensor]:
    ranks.use_device()
    name, x = dist.group.WORLD.group_name, torch.arange(8.0, device="cuda").view(4, 2) + 100 * rank
    out = [*all_gather([x, x.half()], name), reduce_scatter(x, name), all_reduce(x, name)]
    assert all(t.is_cuda for t in out)
    return [t.cpu() for t in out]


def test_gloo_carries_what_lies_on_a_gpu():
    a, b = ranks.run_ranks(exchanged, 2)
    x = torch.arange(8.0).view(4, 2)
    whole, total = torch.cat([x, x + 100]), 2 * x + 100
    for out, part in ((a, total[:2]), (b, total[2:])):
        assert torch.equal(out[0], whole) and torch.equal(out[1], whole.half())
        assert torch.equal(out[2], part) and torch.equal(out[3], total)
