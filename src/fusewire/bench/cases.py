"""What is measured: one op at one size, and its random inputs."""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .. import formats
from ..errors import InputError
from ..group import Group
from ..op import OPS, Meter, Op
from ..ops import fused  # noqa: F401  (declares the ops)
from ..ops.dense import linear
from . import shapes

GATHER, SCATTER, NORM, BOUNDARY = OPS_MEASURED = (
    "all_gather_matmul", "matmul_reduce_scatter", "all_reduce_norm_quant", "norm_quant_all_gather_matmul")
ROTATED_BYTES = 160 << 20  # of one input, over all its versions: well over an L2 cache
MOST_VERSIONS = 20
WEIGHTS = 4  # versions of a weight, or 2 of one that is large already
AMAX = 9.0  # from which static scales are made: no input is larger


@dataclass(frozen=True)
class Case:
    """One op at one size.

    what     which projection of the model, or "norm"
    M        tokens of all ranks
    K, N     the matmul's sizes on one rank; of all_reduce_norm_quant both are hidden
    """

    op: Op
    what: str
    fmt: str
    M: int
    K: int
    N: int
    group: Group

    @property
    def wire(self) -> int:
        """Bytes that a rank sends, as rings would."""
        with Meter() as meter:
            self.op.target(*inputs(self, 0, torch.device("meta")))
        return meter.bytes


def cases(ops: list[str], fmts: list[str], tokens: list[int], shape: shapes.Shape, group: Group) -> tuple[list[Case], list[str]]:
    """(the cases, neighbours with the same weights side by side; for each that is left out, why)."""
    found: list[Case] = []
    out: dict[str, None] = {}
    for fmt in fmts:
        formats.get(fmt)
        wanted = [(what, *p) for what, p in shapes.projections(shape, group.world_size).items()]
        wanted += [("norm", NORM, shape.hidden, shape.hidden)]
        wanted += [(what, BOUNDARY, k, n) for what, op, k, n in wanted if op == GATHER]
        for what, op, k, n in wanted:
            for m in tokens if op in ops else ():
                if op != NORM and m % group.world_size:
                    out[f"{op}: {m} tokens do not divide over {group.world_size} ranks"] = None
                elif k % formats.get(fmt).k_multiple or (op != NORM and formats.get(fmt).layout != "linear"):
                    out[f"{what} in {fmt}: the format does not take k = {k}, or is not one that travels"] = None
                else:
                    found.append(Case(OPS[op], what, fmt, m, k, n, group))
    if not found:
        raise InputError(f"nothing is left to measure: {'; '.join(out) or 'no op was asked for'}")
    return found, list(out)


def versions(case: Case, device: torch.device) -> int:
    """How many inputs there are, so that in turns they come from memory and not from a cache."""
    if device.type != "cuda":
        return 2
    return max(2, min(MOST_VERSIONS, ROTATED_BYTES // max(1, case.M * case.K)))


def params(fmt: str, device: torch.device) -> list[Tensor]:
    """The static params of an activation, the same on every rank."""
    make = formats.get(fmt).params_from_amax
    return make(torch.tensor(AMAX, device=device)) if make else []


def inputs(case: Case, version: int, device: torch.device) -> tuple:
    """The op's arguments: random, other ones for each version and, of what is not replicated, each rank. On the meta device only
    shapes."""
    g, same = (torch.Generator(device=device if device.type == "cuda" else "cpu") for _ in range(2))
    g.manual_seed(7919 * case.group.rank() + version)
    same.manual_seed(version + 15485863)

    def random(m: int, k: int, from_: torch.Generator = g) -> Tensor:
        if device.type == "meta":
            return torch.empty(m, k, dtype=torch.bfloat16, device=device)
        return torch.randn(m, k, generator=from_, device=device, dtype=torch.bfloat16)

    static = params(case.fmt, device)
    if case.op.name == NORM:
        weight = random(1, case.N, same)[0].sigmoid() + 0.5
        rows, residual = random(case.M, case.N), random(case.M, case.N, same)
        return rows, residual, weight, 1e-6, 0.0, False, static, case.fmt, case.fmt == "bf16", case.group.name
    heavy = device.type == "cuda" and case.K * case.N > ROTATED_BYTES // WEIGHTS
    w = _weight(case.fmt, case.N, case.K, device, case.group.rank(), version % (2 if heavy else WEIGHTS))
    m = case.M if case.op.name == SCATTER else case.M // case.group.world_size
    if case.op.name == BOUNDARY:
        weight = random(1, case.K, same)[0].sigmoid() + 0.5
        return (random(m, case.K), random(m, case.K), weight, 1e-6, 0.0, False, False, static, w, [None], case.fmt, torch.bfloat16,
                case.group.name)
    f = formats.get(linear(case.fmt) if case.op.name == GATHER else case.fmt)  # scales travel linear
    x = f.quantize(random(m, case.K), static)
    ws, bias = (w, [None]) if case.op.name == GATHER else (w, None)
    return x, static, ws, bias, case.fmt, torch.bfloat16, case.group.name


@lru_cache(maxsize=WEIGHTS)
def _weight(fmt: str, n: int, k: int, device: torch.device, rank: int, version: int) -> list[Tensor]:
    f = formats.get(fmt)
    if device.type == "meta":
        return f.quantize_weight(torch.empty(n, k, dtype=torch.bfloat16, device=device))
    g = torch.Generator(device=device)
    g.manual_seed(104729 * rank + version + 1299709)  # rows that are those of the activation would have large sums
    return f.quantize_weight(torch.randn(n, k, generator=g, device=device, dtype=torch.bfloat16) / k ** 0.5)

