"""Other programs made of a captured graph: without its collectives, and with the collective library's own."""
from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from .. import compat, formats
from ..compiler.plan import Plan
from ..op import op_of
from ..ops.collectives import world_size
from ..ops.dense import linear, matmul, matmuls_of_linear, quantize
from ..ops.norm import add_rms_norm, rms_norm

# What is left of an op without its wire, with the op's own arguments. A sum keeps this rank's part, a gather repeats it. Norms and
# quantization are called as references, as the graph's others are: Inductor does not look into an op that chooses when it runs.


def all_reduce(x: Tensor, group: str) -> Tensor:
    return x


def all_gather(x: list[Tensor], group: str) -> list[Tensor]:
    return [torch.cat([t.view(torch.uint8)] * world_size(group)).view(t.dtype) for t in x]


def reduce_scatter(x: Tensor, group: str) -> Tensor:
    return x.chunk(world_size(group))[0]


def all_gather_matmul(x, params, ws, biases, fmt, dtype, group):
    return matmuls_of_linear(all_gather(x, group), params, ws, biases, fmt, dtype)


def matmul_reduce_scatter(x, params, w, bias, fmt, dtype, group):
    return reduce_scatter(matmul(x, params, w, bias, fmt, dtype), group)


def all_reduce_norm_quant(x, residual, weight, eps, offset, cast_first, params, fmt, keep_norm, group):
    y, total = (rms_norm.reference(x, weight, eps, offset, cast_first), x) if residual is None else add_rms_norm.reference(
        x, residual, weight, eps, offset, cast_first)
    return [total, *([y] if keep_norm else []), *([] if fmt == "bf16" else quantize.reference(y, params, fmt))]


def norm_quant_all_gather_matmul(x, residual, weight, eps, offset, cast_first, keep_norm, params, ws, biases, fmt, dtype, group):
    keeps = keep_norm or fmt == "bf16"
    total, *rest = all_reduce_norm_quant(x, residual, weight, eps, offset, cast_first, params, linear(fmt), keeps, group)
    parts = rest[-1:] if fmt == "bf16" else rest[-len(formats.get(fmt).parts):]
    return [*([] if residual is None else [total]), *(rest[:1] if keep_norm else []),
            *all_gather_matmul(parts, params, ws, biases, fmt, dtype, group)]


# What a model without Fusewire would run: the process group's own collectives, whose sums are not in rank order.


def library_all_reduce(x: Tensor, group: str) -> Tensor:
    return compat.functional_all_reduce(x, group)


def library_all_gather(x: list[Tensor], group: str) -> list[Tensor]:
    return [compat.functional_all_gather(t.contiguous(), world_size(group), group) for t in x]


WITHOUT_WIRE = {f.__name__: f for f in (all_reduce, all_gather, reduce_scatter, all_gather_matmul, matmul_reduce_scatter,
                                        all_reduce_norm_quant, norm_quant_all_gather_matmul)} | {"all_reduce_max": all_reduce}
BY_LIBRARY = {"all_reduce": library_all_reduce, "all_gather": library_all_gather}


def without_wire(plan: Plan) -> Plan:
    """The plan with its collectives replaced by the identity: what it would take if all of them were hidden."""
    return replaced(plan, "floor", WITHOUT_WIRE)


def by_library(unfused: Plan) -> Plan:
    """The unfused plan with the process group's own collectives."""
    return replaced(unfused, "library", BY_LIBRARY)


def replaced(plan: Plan, name: str, functions: dict[str, Callable]) -> Plan:
    """A plan with other functions in the place of ops, by their names."""
    graph = copy.deepcopy(plan.gm.graph)
    for n in graph.nodes:
        if (o := op_of(n)) is not None and o.name in functions:
            n.target = functions[o.name]
    return Plan(name, compat.graph_module(plan.gm, graph), [], plan.symbol, plan.multiple)
