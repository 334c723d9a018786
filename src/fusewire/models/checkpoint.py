"""Loading a checkpoint folder: of every tensor a rank reads only its own slice."""
from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import formats
from ..errors import FormatError, InputError
from ..group import Group
from .files import FLOATS, Tensors, one_line, read_json
from .layers import ColumnParallelLinear, GatheredLinear, ShardedLinear, VocabParallelEmbedding, WholeLinear
from .moe import Experts, layout
from .parallelize import format_name, over_mesh, resolve, shard
from .slices import Slice, blocks, whole
from .stored import PLAIN, Scalar, Stored, stored_of

IGNORED = ("k_scale", "v_scale", "q_scale", "output_scale", "kv_scale", "inv_freq")  # ends of names of what is not used here
_building = threading.Lock()  # transformers sets torch's default dtype meanwhile, for all threads; ranks can be threads
TOGETHER = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa")
PLAUSIBLE = 1e-4, 1e3  # largest |weight| of a layer: a scale taken for its reciprocal is far outside


def load(path: str | Path, group: Group | dist.ProcessGroup | DeviceMesh | None = None,
         quantization: str | None = None, progress: Callable[[int, int, str], None] | None = None,
         device: str | torch.device = "cpu", *, dp: int | None = None, tp: int | None = None, ep: int | None = None,
         combine: str | None = None) -> nn.Module:
    """This rank's shard of the model in a folder, parallelized over `group`.

    path          a folder with config.json and *.safetensors, or the name of a model on the Hugging Face hub
    group         as for `parallelize`
    quantization  of a checkpoint of plain floats: as for `parallelize`, done while loading. A quantized checkpoint (FP8 per
                  tensor or per 128x128 block, compressed-tensors FP8 and NVFP4, ModelOpt FP8 and NVFP4) says its own.
    dp, tp, ep, combine    as for `parallelize`; of a mixture of experts a rank reads its own experts
    progress      called as (done, total, name) after each module that has weights
    -> the model on `device`. Its dtype is the config's. `bytes_read` of it is how many bytes of tensors were read.

    Everything that is wrong with the files is an InputError of one sentence with the file and the tensor in it; names,
    dtypes and shapes of all tensors are checked before the first one is read.
    """
    folder = folder_of(path)
    raw = read_json(folder / "config.json")
    tensors = Tensors(folder)
    config, quant_config, where = config_of(folder, raw, len(tensors))
    given = stored_of(quant_config, where)
    if quant_config is not None and quantization is not None:
        raise InputError(f"{where}: the checkpoint is quantized already; leave quantization={quantization!r} out")
    wanted = format_name(quantization)
    ranks, dp, tp = over_mesh(group, dp, tp) if isinstance(group, DeviceMesh) else (resolve(group), dp, tp)
    model = empty_model(config, folder)
    stored: dict[str, Stored] = {}

    def format_of(name: str) -> str:
        s = given(name)
        if s.optional and f"{name}.weight" in tensors and tensors.header(f"{name}.weight")[0] in FLOATS:
            s = PLAIN
        stored[name] = s
        return s.fmt if quant_config is not None else wanted

    shard(model, ranks, format_of, layout(ranks, dp, tp, ep, combine))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if quant_config is not None and all(s == PLAIN for s in stored.values()):
        raise InputError(f"{where} says the checkpoint is quantized but none of its layers is; "
                         "config and weights are of different exports")
    modules = _modules(model)
    for name, module in modules:
        if isinstance(module, Experts):
            _expect_experts(tensors, module, given)
        else:
            _expect(tensors, getattr(module, "stored", name), module, stored.get(name, PLAIN))
    _report_unused(tensors, modules, stored, tied)
    for i, (name, module) in enumerate(modules):
        if isinstance(module, Experts):
            _fill_experts(tensors, module, stored[module.stored(0, "gate")], device)
        else:
            _fill(tensors, getattr(module, "stored", name), module, stored.get(name, PLAIN), device)
        if progress:
            progress(i + 1, len(modules), name)
    if tied:
        head.weight = embedding.weight
    _share_inputs(model)
    unwritten = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if unwritten:
        raise InputError(f"{folder}: nothing in the checkpoint fills {unwritten[0]}; this model is not supported")
    model.bytes_read = tensors.bytes_read
    return model.to(device).requires_grad_(False).eval()


def folder_of(path: str | Path, weights: bool = True) -> Path:
    """The folder itself, or that of a downloaded hub model (only its configs without `weights`)."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{name} is not a folder; give one that save_pretrained wrote, or the name of a model on the hub "
                         "(owner/name)")
    import huggingface_hub

    try:
        wanted = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja"] if weights else ["*config.json"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as e:  # its own errors, HTTP errors and OSErrors have no common base
        raise InputError(f"{name} is neither a folder nor a model that could be downloaded ({type(e).__name__}: {one_line(e)}); "
                         "check the name and the network, or give a folder") from None


def config_of(folder: Path, raw: dict, tensors: int | None = None):
    """-> (the transformers config, the quantization config or None, the file it stands in).

    raw      what config.json holds
    tensors  how many the checkpoint has, if that is known: a config cannot ask for more layers
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    layers = raw.get("num_hidden_layers")
    if tensors is not None and isinstance(layers, int) and layers > tensors:  # before transformers makes a list of them
        raise InputError(f"{file} asks for {layers} layers and the checkpoint has {tensors} tensors; "
                         "config and weights are of different models")
    if "auto_map" in raw:
        raise InputError(f"{file} has an auto_map, which asks to run Python code from the checkpoint, and Fusewire never does; "
                         "use a model that transformers itself knows")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers raises whatever its validators and its own code do
        raise InputError(f"{file} is not a config that transformers understands ({one_line(e)}); correct it") from None
    quant, where = raw.get("quantization_config"), str(file)
    if quant is None and (file := folder / "hf_quant_config.json").exists():
        quant, where = read_json(file), str(file)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers shall build plain layers
    return config, quant, where


def empty_model(config, folder: Path) -> nn.Module:
    """The model on the meta device, but for the buffers that no checkpoint holds."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = getattr(config, "dtype", None) or torch.bfloat16
    try:
        with _building, torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers and the model's own constructor raise whatever they do
        raise InputError(f"{folder / 'config.json'}: transformers cannot build this model ({one_line(e)}); correct it") from None
    for name, module in model.named_modules():
        made = [b for b in module._buffers if b in module._non_persistent_buffers_set and module._buffers[b] is not None]
        for b in made:
            old = module._buffers[b]
            module._buffers[b] = torch.full(old.shape, math.nan if old.is_floating_point() else -1, dtype=old.dtype)
        if made:
            model._init_weights(module)  # what from_pretrained itself calls for them
        if any(module._buffers[b].isnan().any() for b in made):
            raise InputError(f"{name}: {type(module).__name__} does not initialize its buffers; this model is not supported")
    return model


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules with weights of their own; a tied lm_head is its embedding."""
    seen: set[int] = set()
    out = []
    for name, module in model.named_modules():
        own = [id(t) for t in [*module._parameters.values(), *module._buffers.values()] if t is not None and t.is_meta]
        if set(own) - seen:
            out.append((name, module))
        seen.update(own)
    return out


def _plain_tensors(module: nn.Module) -> dict[str, tuple[tuple[int, ...], tuple[Slice, ...]]]:
    """Name -> (whole shape, slices) of everything in a module that is neither quantized nor made up."""
    if isinstance(module, GatheredLinear | VocabParallelEmbedding):
        wholes: dict[str, tuple[int, ...]] = {"weight": (module.n, module.cols.stop)}
        if getattr(module, "bias", None) is not None:
            wholes["bias"] = (module.n,)
        return {n: (shape, (module.rows, *map(whole, shape[1:]))) for n, shape in wholes.items()}
    tensors = {**module._parameters, **{n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}}
    return {n: (tuple(t.shape), tuple(map(whole, t.shape))) for n, t in tensors.items() if t is not None and t.is_meta}


class Whole(NamedTuple):
    """A linear layer that is not cut, as the functions below look at a ShardedLinear."""

    whole_shape: tuple[int, int]
    fmt: str

    @property
    def rows(self) -> Slice:
        return whole(self.whole_shape[0])

    @property
    def cols(self) -> Slice:
        return whole(self.whole_shape[1])


def _expect_experts(tensors: Tensors, module: Experts, given: Callable[[str], Stored]) -> None:
    """InputError unless the checkpoint holds this rank's experts, all in one way, and the scales of every expert's input."""
    first = module.stored(0, "gate")
    for e in range(module.total):
        for projection, shape in module.shapes.items():
            name = module.stored(e, projection)
            if (stored := given(name)) != given(first):
                raise InputError(f"{name} is held as {stored.fmt} and {first} as {given(first).fmt}, and the experts of a layer "
                                 "are multiplied together; export them in one format")
            if module.mine.start <= e < module.mine.stop:
                _expect_weight(tensors, name, Whole(shape, module.fmt), stored)
            elif projection != "down":
                for scalar in stored.inputs:
                    tensors.expect(f"{name}.{scalar.name}", tuple(FLOATS), (), (1,))


def _fill_experts(tensors: Tensors, module: Experts, stored: Stored, device: str | torch.device) -> None:
    """Read this rank's experts; gate and up, which read the same tokens in every expert, share the widest of all input scales."""
    fmt, mine = formats.get(module.fmt), range(module.mine.start, module.mine.stop)
    for name, buffer in list(module._buffers.items()):
        if buffer is not None:
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    for i, e in enumerate(mine):
        for projection, shape in module.shapes.items():
            name, held = module.stored(e, projection), Whole(shape, module.fmt)
            if stored == PLAIN:
                w = _read_plain(tensors, f"{name}.weight", (held.rows, held.cols), module.dtype).to(device)
                module.set_expert(i, projection, fmt.quantize_weight(w))
            else:
                module.set_expert(i, projection, [p.to(device) for p in _read_quantized(tensors, name, held, stored)])
    if stored.inputs:
        shared, down = [], []
        for s in stored.inputs:
            each = torch.stack([_read_scalar(tensors, f"{module.stored(e, p)}.{s.name}", s)
                                for e in range(module.total) for p in ("gate", "up")])
            shared.append((each.amin() if stored.fmt == "nvfp4" else each.amax()).to(device))
            down.append(torch.stack([_read_scalar(tensors, f"{module.stored(e, 'down')}.{s.name}", s) for e in mine]).to(device))
        module.set_inputs(shared, down)


def _part_slices(module: ShardedLinear | Whole, i: int) -> tuple[Slice | None, Slice | None]:
    r, c = formats.get(module.fmt).weight_parts[i].block
    return blocks(module.rows, r), blocks(module.cols, c)


def _expect(tensors: Tensors, name: str, module: nn.Module, stored: Stored) -> None:
    """InputError, or FormatError, unless the checkpoint holds what `_fill` will read."""
    if not isinstance(module, ShardedLinear):
        for n, (shape, _) in _plain_tensors(module).items():
            tensors.expect(f"{name}.{n}", tuple(FLOATS), shape)
        return
    if module.bias is not None:
        tensors.expect(f"{name}.bias", tuple(FLOATS), module.whole_shape[:1])
    _expect_weight(tensors, name, module, stored)


def _expect_weight(tensors: Tensors, name: str, module: ShardedLinear | Whole, stored: Stored) -> None:
    if stored == PLAIN:
        tensors.expect(f"{name}.weight", tuple(FLOATS), module.whole_shape)
        return
    for i, part in enumerate(formats.get(stored.fmt).weight_parts):
        tensor, shape = f"{name}.{stored.parts[i]}", part.shape(*module.whole_shape)
        scalars = ((), (1,)) if i and stored.expand else ()
        tensors.expect(tensor, stored.dtypes[i], shape, *scalars)
        if None in _part_slices(module, i):
            raise FormatError(f"{tensors.where(tensor)}: this rank's rows {module.rows[:2]} and columns {module.cols[:2]} cut its "
                              f"blocks of {part.block[0]}x{part.block[1]}; use fewer ranks, or load an unquantized checkpoint with "
                              f"quantization={stored.fmt!r}")
    for scalar in (*stored.scalars, *stored.inputs):
        tensors.expect(f"{name}.{scalar.name}", tuple(FLOATS), (), (1,))


def _fill(tensors: Tensors, name: str, module: nn.Module, stored: Stored, device: str | torch.device) -> None:
    """Read this rank's part of one module."""
    if not isinstance(module, ShardedLinear):
        for n, (_, dims) in _plain_tensors(module).items():
            x = _read_plain(tensors, f"{name}.{n}", dims, getattr(module, n).dtype).to(device)
            setattr(module, n, nn.Parameter(x, False) if n in module._parameters else x)
        if isinstance(module, VocabParallelEmbedding):
            module.first_row = torch.tensor(module.rows.start, device=device)
            module.embed_scale = None if module.embed_scale is None else module.embed_scale.to(device)
        return
    fmt = formats.get(module.fmt)
    dtype = module.dtype
    if stored == PLAIN:
        w = _read_plain(tensors, f"{name}.weight", (module.rows, module.cols), dtype).to(device)
        module.set_weight(fmt.quantize_weight(w))
    else:
        module.set_weight([p.to(device) for p in _read_quantized(tensors, name, module, stored)])
        if stored.inputs:
            module.set_params([_read_scalar(tensors, f"{name}.{s.name}", s).to(device) for s in stored.inputs])
    if module.bias is not None:
        module.set_bias(_read_plain(tensors, f"{name}.bias", (module.rows,), dtype).to(device))


def _read_plain(tensors: Tensors, name: str, dims: tuple[Slice, ...], dtype: torch.dtype) -> Tensor:
    x = tensors.read(name, *dims)
    if not x.isfinite().all():
        raise InputError(f"{tensors.where(name)} holds NaN or infinity; the file is damaged, download it again")
    return x.to(dtype)


def _read_quantized(tensors: Tensors, name: str, module: ShardedLinear | Whole, stored: Stored) -> list[Tensor]:
    """`[*weight_parts, *weight_params]` of this rank's part of a linear layer."""
    parts = [_read_part(tensors, name, module, stored, i) for i in range(len(formats.get(module.fmt).weight_parts))]
    parts += [_read_scalar(tensors, f"{name}.{s.name}", s) for s in stored.scalars]
    _check_plausible(tensors, f"{name}.{stored.parts[0]}", stored, parts)
    return parts


def _read_part(tensors: Tensors, name: str, module: ShardedLinear | Whole, stored: Stored, i: int) -> Tensor:
    """One weight part: the codes, or scales that must be finite and not negative (and zero only where a format allows it)."""
    part, tensor = formats.get(stored.fmt).weight_parts[i], f"{name}.{stored.parts[i]}"
    if i and stored.expand and tensors.header(tensor)[1] in ((), (1,)):
        return _read_scalar(tensors, tensor, Scalar("")).expand(part.shape(module.rows.size, module.cols.size)).contiguous()
    rows, cols = _part_slices(module, i)
    assert rows and cols, tensor  # `_expect` has refused the others
    x = tensors.read(tensor, rows, cols)
    if x.dtype == torch.uint8:
        return x
    here = x[:rows.stop - rows.start, :cols.stop - cols.start]  # without the padding
    if (here.view(torch.uint8) & 127 == 127).any() if x.dtype == torch.float8_e4m3fn else here.isnan().any():
        raise InputError(f"{tensors.where(tensor)} holds NaN; the file is damaged, download it again")
    here = here.float() if i else here
    if i and (here.isinf().any() or (here < 0).any() or (part.dtype == torch.float32 and (here == 0).any())):
        wrong = here[here.isinf() | (here <= 0)][0].item()
        raise InputError(f"{tensors.where(tensor)} holds the scale {wrong}, which is not positive and finite; "
                         "export the model again")
    return x.to(part.dtype)


def _read_scalar(tensors: Tensors, name: str, scalar: Scalar) -> Tensor:
    """A positive, finite float32 scalar, inverted if our format keeps its reciprocal."""
    x = tensors.read(name).float().reshape(())
    y = x.reciprocal() if scalar.reciprocal else x
    if not (x > 0 and x.isfinite() and y > 0 and y.isfinite()):
        raise InputError(f"{tensors.where(name)} is the scale {x.item()}, which is not positive and finite; export the model again")
    return y


def _check_plausible(tensors: Tensors, name: str, stored: Stored, parts: list[Tensor]) -> None:
    """The largest magnitude that the scales allow must be one that weights have."""
    if stored.fmt == "nvfp4":
        largest = parts[1].float().amax().item() * 6 / parts[2].item()
    else:
        largest = parts[1].amax().item() * 448
    if parts[0].view(torch.uint8).any() and not PLAUSIBLE[0] <= largest <= PLAUSIBLE[1] and largest != 0:
        raise InputError(f"{tensors.where(name)}: its scales make weights of up to {largest:.3g}, outside {PLAUSIBLE[0]:g} to "
                         f"{PLAUSIBLE[1]:g}; a scale was probably stored as its reciprocal, export the model again")


def same_inputs(model: nn.Module) -> Iterator[tuple[str, list[tuple[str, ShardedLinear]]]]:
    """Layers that read one input and have a static scale for it: (the parent's name, the children and their names)."""
    for parent_name, parent in model.named_modules():
        same: dict[tuple, list[tuple[str, ShardedLinear]]] = {}
        for name, m in parent.named_children():
            if isinstance(m, ColumnParallelLinear) and m.param_names and getattr(m, m.param_names[0]) is not None:
                # of layers that are cut the plan says it: a column is followed by a row; of those that are not, their names
                one = next((names for names in TOGETHER if name in names), (name,)) if isinstance(m, WholeLinear) else ()
                same.setdefault((m.fmt, m.cols, one), []).append((name, m))
        for layers in same.values():
            yield parent_name, layers


def _share_inputs(model: nn.Module) -> None:
    """Layers that read one input get one activation scale, the widest, so that it is quantized once."""
    for parent_name, layers in same_inputs(model):
        values = [getattr(m, m.param_names[0]) for _, m in layers]
        # NVFP4's scale encodes: the widest range has the smallest
        widest = torch.stack(values).amin(0) if layers[0][1].fmt == "nvfp4" else torch.stack(values).amax(0)
        if any(v != widest for v in values):
            warnings.warn(f"{parent_name}: {', '.join(n for n, _ in layers)} read one input but have the activation scales "
                          f"{[v.item() for v in values]}; all use {widest.item()}, the widest", stacklevel=3)
        for _, m in layers:
            m.set_params([widest])  # one tensor: equal ones would be different inputs of a captured graph


def _report_unused(tensors: Tensors, modules: list[tuple[str, nn.Module]], stored: dict[str, Stored],
                   tied: bool) -> None:
    """Warn about tensors of the checkpoint that nothing reads."""
    used = {"lm_head.weight"} if tied else set()
    for name, module in modules:
        if isinstance(module, Experts):
            name = module.stored(0, "gate")
        s = stored.get(name, PLAIN)
        ends = [*s.parts, *(x.name for x in (*s.scalars, *s.inputs)), "bias", "input_scale", "input_global_scale"]
        if isinstance(module, Experts):
            layers = [module.stored(e, p) for e in range(module.total) for p in module.shapes]
            used.update(f"{layer}.{end}" for layer in layers for end in ends)
        else:
            own = ends if isinstance(module, ShardedLinear) else _plain_tensors(module)
            used.update(f"{getattr(module, 'stored', name)}.{end}" for end in own)
    unused = [n for n in tensors if n not in used]
    kv = [n for n in unused if n.endswith(IGNORED[:-1])]
    if kv:
        warnings.warn(f"{tensors.where(kv[0])} and {len(kv) - 1} more scales of a quantized KV cache are ignored: "
                      "the cache is not quantized", stacklevel=3)
    rest = [n for n in unused if not n.endswith(IGNORED)]
    if rest:
        warnings.warn(f"{tensors.where(rest[0])} and {len(rest) - 1} more tensors of the checkpoint are not used", stacklevel=3)
