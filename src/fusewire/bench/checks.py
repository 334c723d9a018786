"""Are a candidate's numbers right? Its largest error against float64 may be 1.5 times that of the unfused program."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import formats, timing
from .. import group as groups
from ..backends import aten
from ..ops.collectives import all_gather, all_reduce, reduce_scatter
from ..ops.dense import matmul
from ..ops.norm import add_rms_norm
from .cases import BOUNDARY, GATHER, NORM, SCATTER, Case

MORE_ERROR = 1.5


def operands(case: Case, args: tuple) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(the parts of this rank's activation, its params, the weight) of an op's matmul."""
    if case.op.name == BOUNDARY:
        return after(args[0], tail(args))[1:], args[7], args[8]
    return args[0], args[1], args[2]


def whole(case: Case, x: list[Tensor]) -> list[Tensor]:
    """The matmul's activation: gathered, if the op gathers it."""
    return x if case.op.name == SCATTER else all_gather.reference(x, case.group.name)


def tail(args: tuple) -> tuple:
    """The arguments of norm_quant_all_gather_matmul as those of `after`."""
    x, residual, weight, eps, offset, cast_first, _, params, _, _, fmt, _, group = args
    return x, residual, weight, eps, offset, cast_first, params, fmt, fmt == "bf16", group


def fast_sums(fmt: str, device: torch.device) -> bool:
    """Do our backends add up FP8 products as tensor cores do by themselves, with about 14 bits? Then so do all we compare with."""
    return device.type == "cuda" and fmt in ("fp8_tensor", "fp8_token") and aten.FAST_ACCUMULATION


def cublas(x: list[Tensor], params: list[Tensor], w: list[Tensor], fmt: str, fast: bool = False) -> Tensor:
    """The matmul op as PyTorch itself runs it, in bfloat16; without a GPU its reference."""
    if fmt not in ("fp8_tensor", "fp8_token") or not x[0].is_cuda:
        return matmul.reference(x, params, w, None, fmt, torch.bfloat16)
    return torch._scaled_mm(x[0], w[0].t(), *aten.scales(x, params, w, fmt), out_dtype=torch.bfloat16, use_fast_accum=fast)


def after(total: Tensor, args: tuple) -> list[Tensor]:
    """What follows the sum in all_reduce_norm_quant, as the unfused program has it."""
    _, residual, weight, eps, offset, cast_first, params, fmt, keep_norm, _ = args
    y, total = add_rms_norm.reference(total, residual, weight, eps, offset, cast_first)
    return [total, *([y] if keep_norm else []), *([] if fmt == "bf16" else formats.get(fmt).quantize(y, params))]


def wires(case: Case) -> list[Callable[[Tensor], Tensor]]:
    """What the op's collective makes of a tensor. In loopback there are two meanings: the reference's, where a peer sent what this
    rank keeps, and that of kernels that push, where it sent what this rank sent to it."""
    name, w = case.group.name, case.group.world_size
    if case.op.name == GATHER:
        return [lambda y: y]  # the gather is before the matmul, and exact

    def sum_of(y: Tensor) -> Tensor:
        return y.to(torch.promote_types(y.dtype, torch.float32)).sum(0).to(y.dtype)

    if case.op.name == SCATTER:
        found: list[Callable[[Tensor], Tensor]] = [lambda y: reduce_scatter.reference(y, name)]
        pushed: Callable[[Tensor], Tensor] = lambda y: sum_of(y.view(w, -1, y.shape[1]))  # noqa: E731
    else:
        found, pushed = [lambda y: all_reduce.reference(y, name)], lambda y: sum_of(y.expand(w, *y.shape))
    return [*found, pushed] if name in groups._made else found


class Check:
    """The errors that one set of arguments allows: `why_wrong(outputs, does)` is None, or a sentence with the numbers."""

    def __init__(self, case: Case, args: tuple, device: torch.device):
        self.case, self.args, self.device = case, args, device
        self.expected: dict[str, list[tuple[list[Tensor], list[float]]]] = {}
        if case.op.name == NORM:
            for does, wanted in (("op", wires(case)), ("norm", [lambda y: y])):
                self.expected[does] = [self._normed(wire(args[0].double()), wire(args[0]), args) for wire in wanted]
            if case.group.name in groups._made:  # every owner of rows has this rank's first ones
                x, residual = (t[torch.arange(case.M, device=device) % -(-case.M // case.group.world_size)] for t in args[:2])
                wire = wires(case)[-1]
                self.expected["op"].append(self._normed(wire(x.double()), wire(x), (x, residual, *args[2:])))
            return
        f, fast = formats.get(case.fmt), fast_sums(case.fmt, device)
        parts, params, w = operands(case, args)
        x, weight = whole(case, parts), f.dequantize_weight(w).double().t()
        exact, rounded = f.dequantize(x, params).double() @ weight, cublas(x, params, w, case.fmt, fast)
        self.expected["gemm"] = [self._expect([exact], [rounded])]
        if case.op.name == BOUNDARY:
            [want, _] = normed = self._normed(args[0].double(), args[0], tail(args))
            self.expected["norm"] = [normed]
            y = all_gather.reference([want[1]], case.group.name)[0] @ weight
            self.expected["op"] = [self._expect([want[0], y], [after(args[0], tail(args))[0], rounded])]
        else:
            self.expected["op"] = [self._expect([wire(exact)], [wire(rounded)]) for wire in wires(case)]

    def _normed(self, exact: Tensor, rounded: Tensor, args: tuple) -> tuple[list[Tensor], list[float]]:
        """`_expect` of what `after` makes of a sum."""
        _, residual, weight, eps, *_ = args
        total = exact + residual.double()
        return self._expect([total, total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps) * weight.double()],
                            self._read(after(rounded, args)))

    def _read(self, outputs: list[Tensor]) -> list[Tensor]:
        """What `after` gives, with the norm dequantized."""
        if self.case.fmt == "bf16":
            return outputs
        params = self.args[7] if self.case.op.name == BOUNDARY else self.args[6]
        return [outputs[0], formats.get(self.case.fmt).dequantize(outputs[1:], params)]

    def _expect(self, want: list[Tensor], unfused: list[Tensor]) -> tuple[list[Tensor], list[float]]:
        """(the outputs in float64, the unfused program's largest error in each)."""
        return want, self._errors(unfused, want)

    def _errors(self, got: list[Tensor], want: list[Tensor]) -> list[float]:
        if [y.shape for y in got] != [y.shape for y in want]:
            return [float("inf")] * len(want)
        return [float((g.double() - w).abs().amax()) if w.numel() else 0.0 for g, w in zip(got, want, strict=True)]

    def why_wrong(self, outputs: list[Tensor], does: str) -> str | None:
        """The same on every rank. `does`: see `peers.Candidate`."""
        if does == "copy":
            return None
        whys = []
        if does == "norm" or (does == "op" and self.case.op.name == NORM):
            outputs = self._read(outputs)
        for want, unfused in self.expected[does]:
            errors = timing.slowest(self._errors(outputs, want), self.case.group, self.device)
            limits = timing.slowest([MORE_ERROR * e for e in unfused], self.case.group, self.device)
            if all(e <= limit for e, limit in zip(errors, limits, strict=True)):  # never true of NaN
                return None
            whys.append(f"the largest errors are {', '.join(f'{e:.3g}' for e in errors)}, at most "
                        f"{', '.join(f'{limit:.3g}' for limit in limits)} are allowed")
        return " or ".join(whys)
