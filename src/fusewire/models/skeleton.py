"""A model's shapes without its weights, and without most of its layers: what `explain` captures."""
from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError
from ..group import Group
from .checkpoint import config_of, empty_model, folder_of, same_inputs
from .files import read_json
from .layers import ShardedLinear
from .moe import Experts, is_moe, layout
from .parallelize import format_name, shard
from .stored import PLAIN, stored_of


@dataclass(frozen=True)
class Skeleton:
    """A parallelized model on the meta device that stands for a deeper one.

    layers   how many decoder layers the whole model has
    stands_for  kept layer -> the layers of the whole model that behave like it, ascending
    """

    model: nn.Module
    layers: int
    stands_for: dict[int, list[int]]


def skeleton(path: str | Path, group: Group, quantization: str | None = None, full: bool = False,
             combine: str | None = None) -> Skeleton:
    """The model of a folder or hub name, cut over a (fake) group; only config.json is read.

    Of a periodic stack of layer kinds (attention type, how each linear is held) it keeps the first layer, one period and the
    end, so that every layer of the whole has its like with neighbours of the same kinds; all layers if `full`.
    """
    folder = folder_of(path, weights=False)
    config, quant_config, where = config_of(folder, read_json(folder / "config.json"))
    given = stored_of(quant_config, where)
    if quant_config is not None and quantization is not None:
        raise InputError(f"{where}: the checkpoint is quantized already; leave quantization={quantization!r} out")
    wanted = format_name(quantization)
    n = config.get_text_config().num_hidden_layers
    names = [name for name, m in _cut(config, 1, folder).named_modules() if isinstance(m, nn.Linear) and ".layers.0." in name]
    types = getattr(config.get_text_config(), "layer_types", None) or [None] * n
    mixed = _mixed(config, n, folder)
    kinds = [(types[i], mixed[i], *(given(name.replace(".layers.0.", f".layers.{i}.")) for name in names)) for i in range(n)]
    period = next(p for p in range(1, n + 1) if kinds[p:] == kinds[:-p])
    kept = n if full else min(n, period + 2 + (n - period - 2) % period)
    model = _cut(config, kept, folder)
    stored = {}

    def format_of(name: str) -> str:
        stored[name] = given(name)
        return stored[name].fmt if quant_config is not None else wanted

    shard(model, group, format_of, layout(group, None, None, None, combine))
    for name, module in model.named_modules():
        if isinstance(module, ShardedLinear) and stored.get(name, PLAIN).inputs:
            for param in module.param_names:
                setattr(module, param, torch.empty((), device="meta"))
        if isinstance(module, Experts) and stored[module.stored(0, "gate")].inputs:
            module.set_inputs(*([torch.empty(shape, device="meta") for _ in module.params] for shape in ((), module.mine.size)))
    for _, layers in same_inputs(model):
        for _, module in layers:
            module.set_params([getattr(layers[0][1], param) for param in module.param_names])
    stands_for: dict[int, list[int]] = {i: [] for i in range(kept)}
    for i in range(n):  # the first layer and the last have neighbours of their own
        stands_for[i if kept == n or i == 0 else kept - 1 if i == n - 1 else 1 + (i - 1) % period].append(i)
    return Skeleton(model.to("meta"), n, stands_for)


def _mixed(config, layers: int, folder: Path) -> list[bool]:
    """Which layers choose among experts."""
    text = config.get_text_config()
    if not any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return [False] * layers
    found = _cut(config, layers, folder)
    names = [name for name, m in found.named_modules() if is_moe(m)]
    return [any(f".layers.{i}." in f"{name}." for name in names) for i in range(layers)]


def _cut(config, layers: int, folder: Path) -> nn.Module:
    """The model of a config with only its first layers, on the meta device."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return empty_model(small, folder)
