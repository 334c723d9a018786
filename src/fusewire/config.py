"""What the user may choose. Flag names follow vLLM's where vLLM has one."""
from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from .errors import InputError

CODEGENS = ("fx", "inductor")
PLANS = ("auto", "unfused", "replicated", "sharded")


@dataclass(frozen=True)
class Bounds:
    """A rule runs for token counts from `minimum` to `maximum` (None = no limit), both included."""

    minimum: int = 0
    maximum: int | None = None

    def holds(self, tokens: int) -> bool:
        return self.minimum <= tokens and (self.maximum is None or tokens <= self.maximum)


@dataclass(frozen=True)
class Link:
    """The wire between two ranks, for the cost model that decides where nothing was measured."""

    latency_s: float
    bytes_per_s: float


GLOO = Link(1.5e-3, 350e6)  # processes of one machine over loopback: 1-2 ms a message, 2-4 ms a MiB
NVLINK = Link(12e-6, 390e9)  # H200: NCCL's smallest all-reduce, and the copy engine
FLOPS_PER_S = 1.2e15  # H200: cuBLAS's FP8 matmuls of Llama-3-70B at 8,192 tokens; the model takes half of it for two-byte formats


@dataclass(frozen=True)
class Config:
    """How a model is compiled.

    rules    rule name -> the token counts it may run for; a rule that is not named runs for all
    plan     "auto" picks by token count; any other is forced (sharded still needs tokens that divide)
    codegen  "fx" runs the rewritten graph node by node, "inductor" compiles it
    link     the wire that the cost model assumes; None: gloo's for tensors on the CPU, else NVLink's
    strict   raise StrictError if a site that some enabled rule should fuse is not fused
    tuning   a file that `fusewire tune` wrote, by which ops choose among their backends; None: $FUSEWIRE_TUNING, or else what is
             packaged for this GPU; where nothing was measured a model of the cost decides
    pad_to   for ranks with tokens of their own: sizes, ascending, to which all pad their rows of tokens, in each step to the first
             that holds the longest row, above the last one to its next multiple; (): to powers of two, and only where the ranks
             hold different numbers of tokens
    max_tokens  how many tokens of one run, of all ranks together, the groups' workspaces are made for; a call with more runs by
             backends without one
    """

    rules: dict[str, Bounds] = field(default_factory=dict)
    plan: str = "auto"
    codegen: str = "fx"
    strict: bool = False
    link: Link | None = None
    tuning: str | None = None
    pad_to: tuple[int, ...] = ()
    max_tokens: int = 8192

    def __post_init__(self) -> None:
        for what, value, known in (("codegen", self.codegen, CODEGENS), ("plan", self.plan, PLANS)):
            if value not in known:
                raise InputError(f"unknown {what} {value!r}; known: {', '.join(known)}")
        if any(b <= a for a, b in itertools.pairwise((0, *self.pad_to))):
            raise InputError(f"pad_to is {self.pad_to}; give sizes of 1 or more, each larger than the one before")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}; give the most tokens of one run, 1 or more")

    def allows(self, rule: str, tokens: int) -> bool:
        return self.rules.get(rule, Bounds()).holds(tokens)
