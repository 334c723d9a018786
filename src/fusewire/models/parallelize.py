"""Module surgery: a stock Hugging Face decoder becomes one rank's shard of a tensor-parallel, quantized one."""
from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import compat, formats
from ..errors import InputError
from ..group import Group, of_process_group
from ..ops.norm import rms_norm
from . import moe, slices
from .layers import (
    ColumnParallelLinear,
    GatheredLinear,
    RMSNorm,
    RowParallelLinear,
    ShardedLinear,
    VocabParallelEmbedding,
    WholeLinear,
)
from .slices import Slice, cut, has_data, whole

COLUMN, ROW, GATHERED, EMBEDDING = "colwise", "rowwise", "colwise_gather_output", "embedding_rowwise"
WHOLE = "whole"  # our own: not cut
REPLICATED = ("replicated", "replicated_with_grad_allreduce")


def parallelize(model: nn.Module, group: Group | dist.ProcessGroup | DeviceMesh | None = None, quantization: str | None = None, *,
                dp: int | None = None, tp: int | None = None, ep: int | None = None, combine: str | None = None) -> nn.Module:
    """Cut a causal LM over `group`, in place, and quantize its linear layers on this rank.

    model         a Hugging Face decoder with a tensor-parallel plan and float weights; on the meta device, or made of fake
                  tensors, only shapes are made
    group         None is torch's default process group; modules keep only its name. A DeviceMesh has the dimensions "dp", "tp" or
                  both, and says both of these; with two it must be of all ranks, in order
    quantization  a format's name, "fp8" (= "fp8_tensor"), or None (= "bf16": weights keep their dtype). Scales of activations
                  are dynamic. Embedding, lm_head and routers are never quantized.
    dp, tp        the ranks are dp rows of tp consecutive ones: a row holds the same tokens and cuts heads and dense layers, the
                  rows have tokens of their own, which may differ in number (none too). None: dp = 1, or whatever the ranks
                  leave of the other
    ep            over how many ranks experts are spread: always all of them
    combine       the format in which experts' shares travel to the ranks that hold their tokens and add them, in float32: None
                  (= "bf16": their own dtype), or one that quantizes row by row, "fp8_token", "fp8_block" or "mxfp8". With tp alone
                  these are a rank's shares of the whole block, shared experts included; what a row of dp * tp ranks adds stays as
                  it is. `fusewire.models.combine_error` measures what that changes.
    -> the same model, in eval mode, without gradients; logits equal the whole model's up to the order of summation.
       `static_cache` makes its KV cache.

    InputError for an unknown quantization or combine, a combine where no shares travel, a model without a plan or with a style, an
    attention or a mixture of experts that is not known here, and sizes that do not divide; FormatError for a number of input
    features on a rank that the format cannot hold.
    """
    fmt = format_name(quantization)
    found, dp, tp = over_mesh(group, dp, tp) if isinstance(group, DeviceMesh) else (resolve(group), dp, tp)
    return shard(model, found, lambda name: fmt, moe.layout(found, dp, tp, ep, combine))


def format_name(quantization: str | None) -> str:
    """The format that a `quantization` argument means; InputError lists them."""
    name = {None: "bf16", "fp8": "fp8_tensor"}.get(quantization, quantization)
    known = [f.name for f in formats.FORMATS.values() if f.layout == "linear"]
    if name not in known:
        raise InputError(f"unknown quantization {quantization!r}; choose one of {', '.join(['fp8', *known])}")
    return name


def resolve(group: Group | dist.ProcessGroup | None) -> Group:
    """`parallelize`'s group argument as a Group."""
    if isinstance(group, Group):
        return group
    if group is None and not dist.is_initialized():
        raise InputError("no group was given and torch.distributed is not initialized; give a group or call "
                         "init_process_group first")
    return of_process_group(group or dist.group.WORLD)


def over_mesh(mesh: DeviceMesh, dp: int | None, tp: int | None) -> tuple[Group, int, int]:
    """(the group of a mesh's ranks, dp, tp). InputError for other dimensions than `parallelize` takes, and for a `dp` or `tp`
    that is given beside it and is another."""
    names = mesh.mesh_dim_names or ()
    if names not in (("dp",), ("tp",), ("dp", "tp")):
        raise InputError(f"the device mesh has the dimensions {names}; name them dp, tp, or dp and tp in this order")
    sizes = {"dp": 1, "tp": 1, **dict(zip(names, mesh.shape, strict=True))}
    for name, given in (("dp", dp), ("tp", tp)):
        if given not in (None, sizes[name]):
            raise InputError(f"{name}={given} and the device mesh has {name}={sizes[name]}; leave {name} out")
    if len(names) == 1:
        return of_process_group(mesh.get_group()), sizes["dp"], sizes["tp"]
    if (held := mesh.mesh.flatten().tolist()) != list(range(dist.get_world_size())):
        raise InputError(f"the device mesh holds the ranks {held}; one of two dimensions must hold all "
                         f"{dist.get_world_size()} in order")
    return resolve(None), sizes["dp"], sizes["tp"]


def static_cache(model: nn.Module, batch: int, max_len: int):
    """A transformers StaticCache for `max_len` tokens of `batch` sequences, allocated, with this rank's key/value heads."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=max_len)
    latent = sorted((m for m in model.modules() if hasattr(m, "kv_lora_rank")), key=lambda m: m.layer_idx)
    for layer, m in zip(cache.layers, latent, strict=False):  # multi-head latent attention, which is whole on every rank
        if hasattr(m, "expand_kv"):  # transformers keeps the latents and expands them after the cache
            heads, k, v = 1, m.kv_lora_rank, m.qk_rope_head_dim
        else:
            heads, k, v = m.num_heads, m.qk_head_dim, m.v_head_dim
        layer.lazy_initialization(*(torch.empty(batch, heads, 0, d, dtype=model.dtype, device=model.device) for d in (k, v)))
    if latent:
        return cache
    attentions = sorted((m for m in model.modules() if hasattr(m, "local_kv_heads")), key=lambda m: m.layer_idx)
    cache.early_initialization(batch, [m.local_kv_heads for m in attentions], [m.head_dim for m in attentions],
                               model.dtype, model.device)
    return cache


def shard(model: nn.Module, ranks: Group, format_of: Callable[[str], str], over: moe.Layout | None = None) -> nn.Module:
    """`parallelize` with a format for each linear layer and each `experts`, by its module name."""
    over = over or moe.layout(ranks, None, None, None)
    model.requires_grad_(False).eval()
    blocks = moe.replace_blocks(model, over, format_of)
    if over.home != "bf16" and not blocks:
        raise InputError(f"combine={over.home!r}: {type(model).__name__} has no experts whose shares travel; leave combine out")
    group = over.tp or (ranks if over.dp is None else None)  # None: nothing but the experts is cut
    styles = _styles(model)
    if blocks or group is None:  # attention without a plan is whole on every rank, and quantized like the rest
        linears = [name for name, m in model.named_modules() if type(m) is nn.Linear and ".layers." in name]
        styles |= {name: WHOLE for name in linears if group is None or name not in styles}
    replaced = set() if group is None else _embeddings(model, group)
    if group is None:
        styles = {name: style for name, style in styles.items() if style == WHOLE}
    by_parent: dict[str, dict[str, str]] = {}
    for name, style in styles.items():
        parent, _, child = name.rpartition(".")
        if name not in replaced and style not in REPLICATED:
            by_parent.setdefault(parent, {})[child] = style
    for parent, children in by_parent.items():
        module = model.get_submodule(parent)
        if WHOLE in children.values():
            dims: dict[str, Slice] = {}
            if hasattr(module, "head_dim") and hasattr(module, "k_proj"):
                module.local_kv_heads = module.k_proj.out_features // module.head_dim
        else:
            assert group is not None, parent
            dims = _attention(parent, module, children, group) or {}
        for child, style in children.items():
            name = f"{parent}.{child}" if parent else child
            setattr(module, child, _linear(name, getattr(module, child), style, dims.get(child), group or ranks, format_of))
    for block in blocks:
        for m in model.get_submodule(block).modules():
            if isinstance(m, RowParallelLinear):  # of shared experts
                m.reduces = False
    _norms(model)
    if blocks and over.dp is not None:
        for m in (model, *(m for m in model.modules() if isinstance(m, ShardedLinear))):
            m.layout = over
        model.register_forward_pre_hook(_begin_step, with_kwargs=True)
    return model.requires_grad_(False)


def _begin_step(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before a step of ranks that may hold different numbers of tokens; one that is compiled is begun outside its graph."""
    if not torch.compiler.is_compiling():
        ids = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
        if not (tokens := ids.shape[0] * ids.shape[1]):
            raise InputError("this rank has no tokens in this step; call fusewire.models.idle(model) instead of the model")
        model.layout.begin(tokens)


def _styles(model: nn.Module) -> dict[str, str]:
    """Module name -> style, by the model's own plan."""
    plan = dict(getattr(model, "tp_plan", None) or {})
    known = (COLUMN, ROW, GATHERED, EMBEDDING, *REPLICATED)
    styles = {}
    for name, module in model.named_modules():
        if isinstance(module, moe.Router | moe.Experts):
            continue
        style = plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))
        if style is None:
            continue
        if style not in known:
            raise InputError(f"{name}: the tensor-parallel style {style!r} of {type(model).__name__} is not supported; "
                             f"supported are {', '.join(known)}")
        if style in (COLUMN, ROW, GATHERED) and type(module) is not nn.Linear:
            raise InputError(f"{name}: {style} is planned for a {type(module).__name__} and only nn.Linear can be cut; "
                             "load the model unquantized and let parallelize quantize it")
        styles[name] = style
    if not any(style in (COLUMN, ROW) for style in styles.values()):
        raise InputError(f"{type(model).__name__} has no tensor-parallel plan; "
                         "choose a model whose config has a base_model_tp_plan")
    return styles


def _attention(name: str, module: nn.Module, children: dict[str, str], group: Group) -> dict[str, Slice] | None:
    """Child name -> the slice of its split dimension, for an attention module; its head counts become this rank's."""
    if not hasattr(module, "head_dim"):
        if "attention" in type(module).__name__.lower():
            raise InputError(f"{name}: {type(module).__name__} has no head_dim, so its heads cannot be found; "
                             "this model is not supported")
        return None
    head_dim = module.head_dim
    out = [getattr(module, child).in_features for child, style in children.items() if style == ROW]
    if len(out) != 1 or out[0] % head_dim:
        raise InputError(f"{name}: expected one rowwise output projection of heads of {head_dim}, found inputs {out}; "
                         "this model is not supported")
    n_q = out[0] // head_dim
    n_kv = n_q // getattr(module, "num_key_value_groups", 1)
    try:
        mine = slices.heads(n_q, n_kv, group.rank(), group.world_size)
    except InputError as e:
        raise InputError(f"{name}: {e}") from None
    dims = {}
    for child, style in children.items():
        linear = getattr(module, child)
        size = linear.in_features if style == ROW else linear.out_features
        if size not in (n_q * head_dim, n_kv * head_dim):
            raise InputError(f"{name}.{child}: {size} features are neither {n_q} query heads nor {n_kv} key/value heads of "
                             f"{head_dim}; this model is not supported")
        dims[child] = (mine.q if size == n_q * head_dim else mine.kv).times(head_dim)
    module.local_kv_heads = mine.kv.size
    local = {"num_key_value_groups": mine.q.size // mine.kv.size, "num_heads": mine.q.size, "num_attention_heads": mine.q.size,
             "num_key_value_heads": mine.kv.size}
    for attr, value in local.items():
        if isinstance(getattr(module, attr, None), int):
            setattr(module, attr, value)
    return dims


def _linear(name: str, linear: nn.Linear, style: str, dim: Slice | None, group: Group,
            format_of: Callable[[str], str]) -> nn.Module:
    """`linear` cut as its style says, along `dim` or evenly."""
    if style == GATHERED:
        return _gathered(linear, group, None)
    if style == WHOLE:
        return _filled(WholeLinear, name, whole(linear.out_features), whole(linear.in_features), linear, group, format_of)
    split, what = (linear.in_features, "input") if style == ROW else (linear.out_features, "output")
    if dim is None:
        if split % group.world_size:
            raise InputError(f"{name}.weight: {split} {what} features do not divide over {group.world_size} ranks; "
                             "use another number of ranks")
        dim = slices.even(split, group.rank(), group.world_size)
    rows, cols = (whole(linear.out_features), dim) if style == ROW else (dim, whole(linear.in_features))
    return _filled(RowParallelLinear if style == ROW else ColumnParallelLinear, name, rows, cols, linear, group, format_of)


def _filled(make: type[ShardedLinear], name: str, rows: Slice, cols: Slice, linear: nn.Linear, group: Group,
            format_of: Callable[[str], str]) -> ShardedLinear:
    new = make(name, rows, cols, format_of(name), group.name, linear.weight, linear.bias is not None)
    new.fill(linear.weight, linear.bias)
    return new


def _cut_rows(x: Tensor, rows: Slice) -> Tensor:
    return cut(x, rows) if has_data(x) else x.new_empty((rows.size, *x.shape[1:]))


def _gathered(linear: nn.Linear, group: Group, tied: nn.Parameter | None) -> GatheredLinear:
    rows = slices.even(linear.out_features, group.rank(), group.world_size)
    weight = nn.Parameter(_cut_rows(linear.weight, rows), False) if tied is None else tied
    bias = None if linear.bias is None else _cut_rows(linear.bias, rows)
    return GatheredLinear(rows, linear.out_features, linear.in_features, group.name, weight, bias)


def _embeddings(model: nn.Module, group: Group) -> set[str]:
    """Replace the token embedding and the lm_head, which share one tensor if they are tied; -> their names."""
    old, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(m): name for name, m in model.named_modules()}
    scale = getattr(old, "embed_scale", None)
    if not isinstance(old, nn.Embedding) or (type(old).forward is not nn.Embedding.forward and scale is None):
        raise InputError(f"{type(old).__name__} is not a plain or scaled token embedding; this model is not supported")
    rows = slices.even(old.num_embeddings, group.rank(), group.world_size)
    weight = nn.Parameter(_cut_rows(old.weight, rows), False)
    first_row = torch.tensor(rows.start, device=old.weight.device)
    scale = scale if scale is None or isinstance(scale, Tensor) else torch.tensor(scale, device=old.weight.device)
    new = VocabParallelEmbedding(rows, old.num_embeddings, old.embedding_dim, group.name, weight, first_row, scale)
    model.set_submodule(names[id(old)], new)
    if head is None:
        return {names[id(old)]}
    tied = weight if head.weight is old.weight else None
    model.set_submodule(names[id(head)], _gathered(head, group, tied))
    return {names[id(old)], names[id(head)]}


def _norms(model: nn.Module) -> None:
    """Replace every RMSNorm whose arithmetic is one of ours; leave the others alone."""
    known: dict[tuple, tuple[float, bool] | None] = {}
    for name, module in list(model.named_modules()):
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        weight = getattr(module, "weight", None)
        if not type(module).__name__.endswith("RMSNorm") or weight is None or not isinstance(eps, float):
            continue
        key = type(module), tuple(weight.shape), eps
        if key not in known:
            known[key] = _spelling(module, eps)
        if (spelling := known[key]) is not None:
            model.set_submodule(name, RMSNorm(weight, eps, *spelling))


def _spelling(module: nn.Module, eps: float) -> tuple[float, bool] | None:
    """The (offset, cast_first) with which our rms_norm equals this module's forward, bit for bit in bf16; None if there is none."""
    with compat.no_fake_mode(), torch.no_grad():
        generator = torch.Generator(device="cpu").manual_seed(0)
        width = min(module.weight.shape[0], 1 << 16)  # whatever a broken config says
        weight, *xs = (scale * torch.randn(*lead, width, generator=generator, device="cpu").bfloat16()
                       for lead, scale in (((), 1), ((16,), 1), ((16,), 1e-3)))  # small inputs show what eps does
        probe = type(module).__new__(type(module))
        probe.__dict__ = {**module.__dict__, "_parameters": {"weight": nn.Parameter(weight, False)}}
        want = [probe(x) for x in xs]
        for spelling in ((0.0, True), (1.0, False), (0.0, False), (1.0, True)):
            if all(torch.equal(y, rms_norm(x, weight, eps, *spelling)) for x, y in zip(xs, want, strict=True)):
                return spelling
    return None
