"""The modules that `parallelize` puts into a model: they hold one rank's weights and call our ops.

Each keeps, as plain data, which slice of the whole tensor it holds (`rows`, `cols`), so that a checkpoint reader can fill it.
Nothing in a forward depends on the rank as a Python value: every rank captures the same graph.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import formats
from ..errors import FormatError
from ..ops.collectives import all_gather, all_reduce, world_size
from ..ops.dense import amax, matmul, params_from_amax, quantize
from ..ops.norm import rms_norm
from .padding import zeroed
from .slices import Slice, cut, has_data, whole

if TYPE_CHECKING:
    from .moe import Layout


class ShardedLinear(nn.Module):
    """The part (rows, cols) of a weight (n, k), held in a format.

    Buffers: `weight_<part>` for each weight part and weight param of the format, `bias` (rows.size,) or None, and, when the
    activation's params are static, `input_<param>`, float32 scalars. `like`, the whole
    weight, gives device, dtype and kind (real, meta, fake) of what is made here; nothing is initialised.

    layout  of a model whose ranks hold tokens of their own
    """

    layout: Layout | None = None

    def __init__(self, name: str, rows: Slice, cols: Slice, fmt: str, group: str, like: Tensor, has_bias: bool):
        super().__init__()
        f = formats.get(fmt)
        if cols.size % f.k_multiple:
            raise FormatError(f"{name}.weight: {fmt} needs a multiple of {f.k_multiple} input features on every rank and this rank "
                              f"would have {cols.size}; use another number of ranks or another quantization")
        self.rows, self.cols, self.fmt, self.group = rows, cols, fmt, group
        self.whole_shape, self.dtype = tuple(like.shape), like.dtype
        shape = rows.size, cols.size
        for part in f.weight_parts:
            dtype = like.dtype if fmt == "bf16" else part.dtype
            self.register_buffer(f"weight_{part.name}", like.new_empty(part.shape(*shape), dtype=dtype))
        for param in f.weight_params:
            self.register_buffer(f"weight_{param}", like.new_empty((), dtype=torch.float32))
        self.weight_names = [f"weight_{p}" for p in (*(p.name for p in f.weight_parts), *f.weight_params)]
        for param in f.params:
            self.register_buffer(f"input_{param}", None)
        self.param_names = [f"input_{p}" for p in f.params]
        self.register_buffer("bias", like.new_empty(rows.size) if has_bias else None)

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Cut and quantize a whole weight (n, k) and bias (n,). Of meta and fake tensors only the shapes are kept."""
        if has_data(weight):
            self.set_weight(formats.get(self.fmt).quantize_weight(cut(weight, self.rows, self.cols)))
            if bias is not None:
                self.set_bias(cut(bias, self.rows))

    def set_weight(self, parts: list[Tensor]) -> None:
        """Take this rank's `[*weight_parts, *weight_params]`."""
        for name, part in zip(self.weight_names, parts, strict=True):
            setattr(self, name, part)

    def set_bias(self, bias: Tensor) -> None:
        self.bias = bias

    def set_params(self, params: list[Tensor]) -> None:
        """Take static params for the activation: float32 scalars."""
        for name, param in zip(self.param_names, params, strict=True):
            setattr(self, name, param)

    def weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.weight_names]

    def multiply(self, x: Tensor) -> Tensor:
        """(tokens, k) -> (tokens, n), both this rank's."""
        if self.fmt == "bf16":
            return matmul([x], [], self.weights(), self.bias, "bf16", x.dtype)
        params = [getattr(self, name) for name in self.param_names]
        if params and params[0] is None:
            padding = None if self.layout is None else self.layout.padding
            params = params_from_amax(amax(zeroed(x, padding)), self.fmt)
        return matmul(quantize(x, params, self.fmt), params, self.weights(), self.bias, self.fmt, x.dtype)

    def extra_repr(self) -> str:
        return f"{self.fmt}, rows {tuple(self.rows)}, cols {tuple(self.cols)}"


class ColumnParallelLinear(ShardedLinear):
    """(..., k) on every rank -> (..., n of this rank)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])


class WholeLinear(ColumnParallelLinear):
    """A linear that is not cut: every rank has all of it."""


class RowParallelLinear(ShardedLinear):
    """(..., k of this rank) -> (..., n), summed over the ranks; the bias is zero on all ranks but the first.

    `reduces` is False where whoever calls it adds something to this rank's share first, and sums then.
    """

    reduces = True

    def set_bias(self, bias: Tensor) -> None:
        # a rank without a bias would have another graph than the rank that adds it
        self.bias = bias if self.cols.start == 0 else torch.zeros_like(bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x.reshape(-1, x.shape[-1]))
        y = all_reduce(y, self.group) if self.reduces else y
        return y.view(*x.shape[:-1], y.shape[-1])


class GatheredLinear(nn.Module):
    """An unquantized linear cut by rows, its output gathered: (..., k) -> (..., n) on every rank. The lm_head."""

    def __init__(self, rows: Slice, n: int, k: int, group: str, weight: nn.Parameter, bias: Tensor | None):
        super().__init__()
        self.rows, self.cols, self.n, self.group = rows, whole(k), n, group
        self.world_size = world_size(group)  # torch.compile cannot look a process group up by name
        self.weight = weight
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[:-1]
        y = matmul([x.reshape(-1, x.shape[-1])], [], [self.weight], self.bias, "bf16", x.dtype)
        y = all_gather([y], self.group)[0].view(self.world_size, -1, y.shape[-1]).permute(1, 0, 2)
        return y.reshape(*lead, -1)[..., :self.n]


class VocabParallelEmbedding(nn.Module):
    """ids (...) -> (..., hidden): each rank looks up the rows it holds, times `scale` if the model has one, summed over ranks.

    Only one rank contributes more than zeros, so the sum is exact. An id outside the vocabulary gives zeros.
    """

    def __init__(self, rows: Slice, n: int, hidden: int, group: str, weight: nn.Parameter, first_row: Tensor, scale: Tensor | None):
        super().__init__()
        self.rows, self.cols, self.n, self.group = rows, whole(hidden), n, group
        self.weight = weight
        self.register_buffer("first_row", first_row)
        self.register_buffer("embed_scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        local = ids.reshape(-1) - self.first_row
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        y = nn.functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        if self.embed_scale is not None:
            y = y * self.embed_scale.to(y.dtype)
        y = all_reduce(y.masked_fill(elsewhere[:, None], 0), self.group)
        return y.view(*ids.shape, y.shape[-1])


class RMSNorm(nn.Module):
    """`ops.norm.rms_norm` with its constants (see there)."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float, cast_first: bool):
        super().__init__()
        self.weight, self.eps, self.offset, self.cast_first = weight, eps, offset, cast_first

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset, self.cast_first)
