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
from .cases import GATHER, NORM, SCATTER, Case

MORE_ERROR = 1.5
FAST_ERROR = 0.02  # of the largest value, instead, where sums are kept in the fast mode of FP8 tensor cores


def whole(case: Case, args: tuple) -> list[Tensor]:
    """The matmul's activation: gathered, if the op gathers it."""
    return all_gather.reference(args[0], case.group.name) if case.op.name == GATHER else args[0]


def fast_sums(fmt: str, device: torch.device) -> bool:
    """Do our backends add up FP8 products as tensor cores do by themselves, with about 14 bits? Then so do all we compare with."""
    return device.type == "cuda" and fmt in ("fp8_tensor", "fp8_token") and bool(getattr(aten, "FAST_ACCUMULATION", False))


def cublas(x: list[Tensor], params: list[Tensor], w: list[Tensor], fmt: str, fast: bool = False) -> Tensor:
    """The matmul op as PyTorch itself runs it, in bfloat16; without a GPU its reference."""
    if fmt not in ("fp8_tensor", "fp8_token") or not x[0].is_cuda:
        return matmul.reference(x, params, w, None, fmt, torch.bfloat16)
    a, b = (params[0], w[1]) if fmt == "fp8_tensor" else (x[1], w[1].t())
    return torch._scaled_mm(x[0], w[0].t(), scale_a=a, scale_b=b, out_dtype=torch.bfloat16, use_fast_accum=fast)


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
    """The errors that one set of arguments allows: `why_wrong(outputs, does, fast)` is None, or a sentence with the numbers."""

    def __init__(self, case: Case, args: tuple, device: torch.device):
        self.case, self.args, self.device = case, args, device
        if case.op.name == NORM:
            exact, rounded = args[0].double(), args[0]
        else:
            f, params, w = formats.get(case.fmt), args[1], args[2]
            x = whole(case, args)
            exact = f.dequantize(x, params).double() @ f.dequantize_weight(w).double().t()
            rounded = cublas(x, params, w, case.fmt, fast_sums(case.fmt, device))
        self.expected = {"op": [self._expect(exact, rounded, wire) for wire in wires(case)],
                         "alone": [self._expect(exact, rounded, lambda y: y)]}

    def _expect(self, exact: Tensor, rounded: Tensor, wire: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[float]]:
        """(the outputs in float64, the unfused program's largest error in each)."""
        want, unfused = [wire(exact)], [wire(rounded)]
        if self.case.op.name == NORM:
            _, residual, weight, eps, *_ = self.args
            total = want[0] + residual.double()
            want = [total, total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps) * weight.double()]
            unfused = after(unfused[0], self.args)
        return want, self._errors(unfused, want)

    def _errors(self, got: list[Tensor], want: list[Tensor]) -> list[float]:
        if self.case.op.name == NORM and self.case.fmt != "bf16":
            got = [got[0], formats.get(self.case.fmt).dequantize(got[1:], self.args[6])]
        if [y.shape for y in got] != [y.shape for y in want]:
            return [float("inf")] * len(want)
        return [float((g.double() - w).abs().amax()) if w.numel() else 0.0 for g, w in zip(got, want, strict=True)]

    def why_wrong(self, outputs: list[Tensor], does: str, fast: bool = False) -> str | None:
        """The same on every rank. `does`, `fast`: see `peers.Candidate`."""
        if does == "copy":
            return None
        whys = []
        for want, unfused in self.expected[does]:
            errors = timing.slowest(self._errors(outputs, want), self.case.group, self.device)
            limits = [FAST_ERROR * float(w.abs().amax()) if fast else MORE_ERROR * e for w, e in zip(want, unfused, strict=True)]
            limits = timing.slowest(limits, self.case.group, self.device)
            if all(e <= limit for e, limit in zip(errors, limits, strict=True)):  # never true of NaN
                return None
            whys.append(f"the largest errors are {', '.join(f'{e:.3g}' for e in errors)}, at most "
                        f"{', '.join(f'{limit:.3g}' for limit in limits)} are allowed")
        return " or ".join(whys)
