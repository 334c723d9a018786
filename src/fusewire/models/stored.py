"""How a checkpoint holds its linear layers: the quantization configs of four exporters, as one description."""
from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

from ..errors import InputError
from .files import FLOATS

REFUSE_WEIGHT_ONLY = ("only its weights are quantized and Fusewire's matmuls need quantized activations too; export it with "
                      "activation scales, or load the unquantized original with a quantization")


class Scalar(NamedTuple):
    """A scalar tensor of the checkpoint, by the end of its name; `reciprocal`: our format holds 1 / it."""

    name: str
    reciprocal: bool = False


class Stored(NamedTuple):
    """One linear layer of a checkpoint.

    fmt      the format whose parts the tensors are; "bf16" = a plain float weight
    parts    for each weight part of the format, the end of the tensor's name
    dtypes   for each part, the safetensors dtypes it may have
    scalars  for each weight param, likewise
    inputs   for each param of a static activation; empty: dynamic
    expand   the scale part is stored as one scalar for the whole weight
    optional a plain float weight there instead is no contradiction: this exporter does not list all that it leaves out
    """

    fmt: str
    parts: tuple[str, ...] = ("weight",)
    dtypes: tuple[tuple[str, ...], ...] = (tuple(FLOATS),)
    scalars: tuple[Scalar, ...] = ()
    inputs: tuple[Scalar, ...] = ()
    expand: bool = False
    optional: bool = False


PLAIN = Stored("bf16")
FP8 = ("F8_E4M3",)


def _fp8_tensor(static: bool) -> Stored:
    return Stored("fp8_tensor", ("weight",), (FP8,), (Scalar("weight_scale"),), (Scalar("input_scale"),) if static else ())


def _fp8_token(expand: bool) -> Stored:
    return Stored("fp8_token", ("weight", "weight_scale"), (FP8, tuple(FLOATS)), expand=expand)


def _fp8_block(scale: str) -> Stored:
    return Stored("fp8_block", ("weight", scale), (FP8, tuple(FLOATS)))


NVFP4 = Stored("nvfp4", ("weight_packed", "weight_scale"), (("U8",), FP8), (Scalar("weight_global_scale"),),
               (Scalar("input_global_scale"),))
MODELOPT_NVFP4 = Stored("nvfp4", ("weight", "weight_scale"), (("U8",), FP8), (Scalar("weight_scale_2", True),),
                        (Scalar("input_scale", True),))


def stored_of(config: dict | None, where: str) -> Callable[[str], Stored]:
    """The meaning of a `quantization_config` (or of a whole hf_quant_config.json): module name -> Stored.

    None, as of an unquantized checkpoint, makes everything plain. InputError, starting with `where`, for what is not known.
    """
    if config is None:
        return lambda name: PLAIN
    if not isinstance(config, dict):
        raise InputError(f"{where}: the quantization config is a {type(config).__name__}, not an object; download it again")
    method = config.get("quant_method")
    if method == "fp8":
        return _fp8(config, where)
    if method == "compressed-tensors":
        return _compressed_tensors(config, where)
    if method in ("modelopt", "modelopt_fp4") or (method is None and ("quantization" in config or "quant_algo" in config)):
        return _modelopt(config, where)
    raise InputError(f"{where}: quant_method {method!r} is not known; known are fp8, compressed-tensors and modelopt")


def _names(config: dict, where: str, *keys: str) -> list[str]:
    """The module names under the first of these keys that is there."""
    names: object = next((config[key] for key in keys if config.get(key) is not None), [])
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InputError(f"{where}: {keys[0]} is not a list of module names; download it again")
    return names


def _named(name: str, entry: str, where: str) -> bool:
    """Does an entry (a whole dotted name, some part of one at its dots, or `re:` and a regular expression) name the module?"""
    if not entry.startswith("re:"):
        return f".{entry}." in f".{name}."
    try:
        return re.match(entry[3:], name) is not None
    except re.error as e:
        raise InputError(f"{where}: {entry!r} is not a regular expression ({e}); correct it") from None


def _fp8(config: dict, where: str) -> Callable[[str], Stored]:
    scheme, block = config.get("activation_scheme", "dynamic"), config.get("weight_block_size")
    if scheme not in ("static", "dynamic"):
        raise InputError(f"{where}: activation_scheme {scheme!r} is not known; known are static and dynamic")
    if block is not None and list(block) != [128, 128]:
        raise InputError(f"{where}: weight_block_size {block} is not supported, only [128, 128]; export it again")
    if block is not None and scheme == "static":
        raise InputError(f"{where}: activation_scheme static with weight_block_size is not supported; blocks need dynamic")
    stored = _fp8_block("weight_scale_inv") if block else _fp8_tensor(True) if scheme == "static" else _fp8_token(True)
    ignored = _names(config, where, "ignored_layers", "modules_to_not_convert")
    return lambda name: PLAIN if any(_named(name, e, where) for e in ignored) else stored


def _compressed_tensors(config: dict, where: str) -> Callable[[str], Stored]:
    for key in ("sparsity_config", "transform_config"):
        if (extra := config.get(key)) and extra.get("format", "") != "dense":
            raise InputError(f"{where}: {key} {extra} is not supported; export the model without it")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise InputError(f"{where}: config_groups is missing or empty; export the model again")
    schemes = [(_names(g, where, "targets"), _scheme(g, g.get("format") or config.get("format"), where)) for g in groups.values()]
    ignored = _names(config, where, "ignore")

    def of(name: str) -> Stored:
        if any(_named(name, e, where) for e in ignored):
            return PLAIN
        for narrow in (True, False):  # a name wins over the class
            for targets, stored in schemes:
                if any(t != "Linear" and _named(name, t, where) if narrow else t == "Linear" for t in targets):
                    return stored
        return PLAIN

    return of


def _scheme(group: dict, fmt: str | None, where: str) -> Stored:
    """One entry of config_groups."""
    w, a = group.get("weights") or {}, group.get("input_activations")
    bits, kind, strategy = w.get("num_bits"), w.get("type"), w.get("strategy")
    what = f"{where}: {fmt} with {bits}-bit {kind} weights by {strategy}"
    if kind != "float" or fmt not in ("float-quantized", "nvfp4-pack-quantized", "naive-quantized"):
        raise InputError(f"{what} is not supported; supported are float-quantized (FP8) and nvfp4-pack-quantized")
    if not a:
        raise InputError(f"{what}: {REFUSE_WEIGHT_ONLY}")
    if not w.get("symmetric", True) or not a.get("symmetric", True):
        raise InputError(f"{what} is asymmetric, and zero points are not supported; export it with symmetric scales")
    if a.get("num_bits") != bits or a.get("type") != "float":
        raise InputError(f"{what} and {a.get('num_bits')}-bit {a.get('type')} activations is not supported; both must be the same")
    if fmt == "nvfp4-pack-quantized":
        if bits != 4 or w.get("group_size") != 16:
            raise InputError(f"{what} and group_size {w.get('group_size')} is not NVFP4, whose groups are 16; export it again")
        return NVFP4
    dynamic = a.get("dynamic", False)
    if bits == 8 and strategy == "tensor" and a.get("strategy") == "tensor":
        return _fp8_tensor(not dynamic)
    if bits == 8 and strategy in ("tensor", "channel"):
        return _fp8_token(strategy == "tensor")
    if bits == 8 and strategy == "block" and w.get("block_structure") == [128, 128]:
        return _fp8_block("weight_scale")
    raise InputError(f"{what} is not supported; supported are tensor and channel, and blocks of 128x128")


def _modelopt(config: dict, where: str) -> Callable[[str], Stored]:
    config = config.get("quantization", config)
    if not isinstance(config, dict):
        raise InputError(f"{where}: quantization is not an object; download it again")
    algo, size = config.get("quant_algo"), config.get("group_size")
    if algo not in ("FP8", "NVFP4"):
        why = REFUSE_WEIGHT_ONLY if "A16" in str(algo) else "supported are FP8 and NVFP4"
        raise InputError(f"{where}: quant_algo {algo!r} is not supported: {why}")
    if algo == "NVFP4" and size not in (None, 16):
        raise InputError(f"{where}: NVFP4 with group_size {size} is not NVFP4, whose groups are 16; export it again")
    stored = (MODELOPT_NVFP4 if algo == "NVFP4" else _fp8_tensor(True))._replace(optional=True)
    excluded = _names(config, where, "exclude_modules", "ignore")
    # older exports name loose parts of names: there the weight's own dtype says it, which `optional` allows
    return lambda name: PLAIN if any(fnmatchcase(name, e) or _named(name, e, where) for e in excluded) else stored
