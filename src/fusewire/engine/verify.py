"""Fused against unfused: logits, greedy tokens, perplexity."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..compiler.capture import Compiled, compile
from ..config import Config
from ..errors import InputError
from ..models import combine_error
from ..models.moe import CombineError
from .session import Session, run_text

CHUNK = 512  # tokens of a text that are read at once
# Read where no text is given: of a prompt's dozen tokens the perplexity moves by more than a percent if only roundings differ.
TEXT = """The harbour wakes before the town does. At four in the morning the first lamps are lit along the quay, and the men who
mend the nets sit down on upturned boxes with their backs to the wind. They talk about the price of diesel and about
the weather, which is never quite right. By five the boats have gone, one behind the other, past the lighthouse and
into the dark, and only the gulls are left to quarrel over what was dropped on the stones.

When the sun comes up, the market opens. Herring, cod and crab lie in rows on crushed ice; a bell is rung, and the
buyers walk from one table to the next with their hands in their pockets, because a hand that is raised costs money.
Most of them have known each other for twenty years. A restaurant takes the best of the turbot, a factory takes what
nobody else wants, and within an hour everything has been sold, loaded and driven away. The tables are washed down
with sea water, and children on their way to school jump over the puddles.

In the afternoon there is little to do but wait. An old engineer, who used to work on the ferries, explains to anyone
who will listen that a propeller is only a screw which has not found its wood. He is right, in a way: water is soft,
but it pushes back."""


@dataclass(frozen=True)
class Verified:
    """One plan against the unfused graph, with the same code generation.

    texts         how many pieces of text were read, and with how many tokens in all
    changed       logits whose bits differ, of `logits`
    max_error     largest |logit difference| over the largest |unfused logit|
    tokens_equal  greedy continuations
    margin        where the greedy continuations first differ: by how much the unfused logits prefer their token, over the largest
    combine       how far quantized combines are off on the texts, in both graphs alike; None where they are not quantized
    accepted      plain FX on a CPU: every bit equal. Inductor and GPU kernels round elsewhere: the perplexity within 1 % and greedy
                  tokens equal; on a GPU also if they first differ where that is no more than the logits' errors
    """

    plan: str
    codegen: str
    device: str
    texts: int
    tokens: int
    changed: int
    logits: int
    max_error: float
    tokens_equal: bool
    perplexity: float
    perplexity_unfused: float
    margin: float
    combine: CombineError | None = None

    @property
    def accepted(self) -> bool:
        if self.codegen == "fx" and self.device == "cpu":
            return self.changed == 0 and self.tokens_equal
        close = math.isnan(self.perplexity_unfused) or abs(self.perplexity / self.perplexity_unfused - 1) < 0.01
        tie = self.device != "cpu" and self.margin <= 2 * self.max_error  # of either of the two logits
        return (self.tokens_equal or tie) and close

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "accepted": self.accepted}

    def sentence(self) -> str:
        bits = (f"all {self.logits} logits bitwise equal" if self.changed == 0 else
                f"{self.changed} of {self.logits} logits differ, by at most {self.max_error:.2e} of the largest")
        ppl = "" if math.isnan(self.perplexity) else f"; perplexity {self.perplexity:.4f}, unfused {self.perplexity_unfused:.4f}"
        return (f"{self.plan} against unfused ({self.codegen} code, {self.texts} texts, {self.tokens} tokens): {bits}; "
                f"greedy tokens {'equal' if self.tokens_equal else 'DIFFER'}{ppl}")


def verify(session: Session, config: Config, prompt: str, max_tokens: int, texts: list[str],
           phase: Callable[[str], None]) -> list[Verified]:
    """Compare each plan that `config` allows with the unfused graph: the continuation of the prompt, and the logits and the
    perplexity of the texts, or else of TEXT."""
    ids = session.encode(prompt)
    batches = [piece for t in texts or [TEXT] for piece in session.encode(t).split(CHUNK, 1)]
    if all(b.shape[1] < 2 for b in batches):
        raise InputError("the text has a single token, and a perplexity needs two; give a longer one")
    plans = ("replicated", "sharded") if config.plan == "auto" else (config.plan,)
    compiled = compile(session.model, config)

    def answers(plan: str) -> tuple[Tensor, list[Tensor]]:
        phase(f"running the {plan} plan")
        compiled.plan = plan
        return run_text(session, compiled, ids, max_tokens, phase).tokens, [_logits(compiled, b) for b in batches]

    want_tokens, want = answers("unfused")
    found = []
    off = combine_error(session.model, batches)
    for plan in plans:
        tokens, got = answers(plan)
        changed = sum(int((~same_bits(a, b)).sum()) for a, b in zip(got, want, strict=True))
        scale = max(float(b.float().abs().max()) for b in want)
        worst = max(float((a.float() - b.float()).abs().max()) for a, b in zip(got, want, strict=True))
        found.append(Verified(plan, config.codegen, ids.device.type, len(batches), sum(b.shape[1] for b in batches), changed,
                              sum(a.numel() for a in got), worst / scale if scale else worst, torch.equal(tokens, want_tokens),
                              perplexity(got, batches), perplexity(want, batches),
                              preference(compiled, ids, want_tokens, tokens), off))
    return found


def preference(compiled: Compiled, ids: Tensor, want: Tensor, got: Tensor) -> float:
    """Where two greedy continuations of ids first differ, how much higher the unfused logit of the wanted token is than that of
    the one that came, over the largest; 0 if they are equal. `want` and `got` are (1, n); the one may end before the other."""
    n = min(want.shape[1], got.shape[1])
    differ = (want[0, :n] != got[0, :n]).nonzero()
    if not len(differ):
        return 0.0
    at, compiled.plan = int(differ[0]), "unfused"
    y = _logits(compiled, torch.cat([ids, want[:, :at]], 1))[0, -1].float()
    return float((y[want[0, at]] - y[got[0, at]]).abs() / y.abs().max())


def _logits(compiled: Compiled, ids: Tensor) -> Tensor:
    """(1, n) ids -> (1, n, vocab) logits."""
    return compiled(input_ids=ids, use_cache=False).logits


def perplexity(logits: list[Tensor], batches: list[Tensor]) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each (1, n) piece; NaN if there is none."""
    total, count = 0.0, 0
    for y, ids in zip(logits, batches, strict=True):
        total += float(torch.nn.functional.cross_entropy(y[0, :-1].float(), ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(total / count) if count else math.nan


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise: equal bits, NaNs included."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.contiguous().view(kind) == b.contiguous().view(kind)
