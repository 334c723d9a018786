"""Formats against a slow oracle written from their docstrings, in numpy, and against compressed-tensors. Bytes, not tolerances."""
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode

from fusewire import formats
from fusewire.errors import FormatError, InputError
from fusewire.formats import codes
from fusewire.formats.layout import relayout, swizzle, unswizzle

F32 = np.float32
INF, NAN = float("inf"), float("nan")
ALL = ["bf16", "fp8_tensor", "fp8_token", "fp8_block", "nvfp4", "mxfp8", "nvfp4:128x4", "mxfp8:128x4"]
QUANTIZED = ALL[1:]
ROWS = [0, 1, 2, 3, 31, 32, 33, 127, 128, 129, 255, 257]
COLUMNS = [1, 7, 15, 16, 17, 24, 32, 48, 64, 80, 96, 100, 127, 128, 129, 160, 192, 200, 256, 576]


# ---- the oracle ------------------------------------------------------------------------------------------------------

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3_VALUES = np.array([m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127])


def nearest(x: np.ndarray, values: np.ndarray, nan: int) -> np.ndarray:
    """Codes of finite-or-NaN x: the nearest of +-values, ties to the even code, the sign bit above; `nan` for NaN."""
    a = np.abs(x.astype(np.float64))
    middle = (values[1:] + values[:-1]) / 2
    code = np.searchsorted(middle, a, side="left")  # middles below a
    tie = np.isin(a, middle) & (code % 2 == 1)
    code = np.where(tie, code + 1, code) + np.where(np.signbit(x), 128 if len(values) > 8 else 8, 0)
    return np.where(np.isnan(x), nan, code).astype(np.uint8)


def exhaustive(x: float, values: np.ndarray) -> int:
    """The same for one x >= 0, by looking at every code."""
    distance = np.abs(values - np.float64(x))
    best = np.flatnonzero(distance == distance.min())
    return int(best[0] if len(best) == 1 else next(c for c in best if c % 2 == 0))


def e4m3(x: np.ndarray) -> np.ndarray:
    return nearest(np.clip(x, F32(-448), F32(448)), E4M3_VALUES, 0x7F)


def signed(values: np.ndarray, nan_after: bool) -> np.ndarray:
    v = np.append(values, NAN) if nan_after else values
    return np.concatenate((v, -v)).astype(F32)


E4M3_TABLE, E2M1_TABLE = signed(E4M3_VALUES, True), signed(E2M1_VALUES, False)


def block_max(x: np.ndarray, br: int, bc: int) -> np.ndarray:
    out = np.zeros((-(-x.shape[0] // br), -(-x.shape[1] // bc)), F32)
    for i in range(out.shape[0]) if br > 1 else [slice(None)]:
        for j in range(out.shape[1]):
            rows = slice(i * br, (i + 1) * br) if br > 1 else i
            out[i, j] = np.abs(x[rows, j * bc:(j + 1) * bc]).max(axis=(0, 1) if br > 1 else 1, initial=0)
    return out


def spread(scale: np.ndarray, br: int, bc: int, like: np.ndarray) -> np.ndarray:
    return scale.repeat(br, 0).repeat(bc, 1)[:like.shape[0], :like.shape[1]]


def fp8_scale(amax: np.ndarray) -> np.ndarray:
    return np.maximum(F32(amax) / F32(448), F32(2.0**-126))


def o_fp8(x, br, bc):
    bc = bc or x.shape[1]
    scale = fp8_scale(block_max(x, br, bc))
    wide = spread(scale, br, bc, x)
    data = e4m3(x / wide)
    return [data, scale], E4M3_TABLE[data] * wide


def o_fp8_tensor(x, scale):
    data = e4m3(x / scale)
    return [data], E4M3_TABLE[data] * scale


def global_scale(amax: float) -> np.float32:
    g = F32(2688) / F32(amax)
    g = F32(np.finfo(F32).max) if g > np.finfo(F32).max else g
    return F32(1) if g == 0 else g


def o_nvfp4(x, g):
    b = block_max(x, 1, 16)
    scale = e4m3(b * (g * (F32(1) / F32(6))))
    decoded = E4M3_TABLE[scale]
    encode = np.minimum(F32(1) / (decoded * (F32(1) / g)), np.finfo(F32).max).astype(F32)
    code = nearest(np.clip(x * spread(encode, 1, 16, x), F32(-6), F32(6)), E2M1_VALUES, 0)
    return [code[:, 0::2] | code[:, 1::2] << 4, scale], E2M1_TABLE[code] * spread(decoded / g, 1, 16, x)


def o_mxfp8(x):
    b = block_max(x, 1, 32)
    scale = np.zeros(b.shape, np.uint8)
    for at, amax in np.ndenumerate(b):
        if not np.isfinite(amax):
            scale[at] = 255
        elif amax:
            scale[at] = max(int(np.frexp(np.float64(amax))[1]) - 1 - 8 + 127, 0)
    power = np.where(scale == 255, NAN, 2.0 ** (scale.astype(np.float64) - 127)).astype(F32)
    data = e4m3(x / spread(power, 1, 32, x))
    return [data, scale], E4M3_TABLE[data] * spread(power, 1, 32, x)


def o_swizzle(scale: np.ndarray) -> np.ndarray:
    m, kb = scale.shape
    groups = -(-kb // 4)
    out = np.zeros((-(-m // 128) * 128, groups * 4), np.uint8)
    for j in range(kb):
        i = np.arange(m)
        out.reshape(-1)[((i // 128) * groups + j // 4) * 512 + i % 32 * 16 + i % 128 // 32 * 4 + j % 4] = scale[:, j]
    return out


def oracle(name: str, x: np.ndarray, params: list[np.float32], weight: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """(parts as bytes or float32, dequantized float32) of x."""
    base, _, layout = name.partition(":")
    parts, y = {
        "fp8_tensor": lambda: o_fp8_tensor(x, *params),
        "fp8_token": lambda: o_fp8(x, 1, 0),
        "fp8_block": lambda: o_fp8(x, 128 if weight else 1, 128),
        "nvfp4": lambda: o_nvfp4(x, *params),
        "mxfp8": lambda: o_mxfp8(x),
    }[base]()
    return ([parts[0], o_swizzle(parts[1])] if layout else parts), y


def o_params(name: str, amax: float) -> list[np.float32]:
    return {"fp8_tensor": lambda: [fp8_scale(amax)], "nvfp4": lambda: [global_scale(amax)]}.get(name.split(":")[0], lambda: [])()


# ---- helpers ---------------------------------------------------------------------------------------------------------


def bits(t: Tensor | np.ndarray) -> np.ndarray:
    """The bytes; a float32's NaNs are all one."""
    if isinstance(t, np.ndarray):
        t = torch.from_numpy(np.array(t, order="C"))
    if t.dtype == torch.float32:
        return t.nan_to_num(nan=NAN, posinf=INF, neginf=-INF).contiguous().view(torch.int32).numpy()
    if t.is_floating_point() and t.itemsize == 2:
        return t.contiguous().view(torch.int16).numpy()
    return t.contiguous().view(torch.uint8).numpy()


def same(a, b) -> bool:
    a, b = bits(a), bits(b)
    return a.shape == b.shape and bool((a == b).all())


def params_of(f: formats.Format, x: Tensor) -> list[Tensor]:
    return f.params_from_amax(codes.amax_of(x)) if f.params else []


def draw(rng: random.Random, rows: int, k: int) -> Tensor:
    """A random (rows, k) tensor, its values, strides and dtype drawn too; sometimes salted with special values."""
    gen = torch.Generator().manual_seed(rng.randrange(2**31))
    dtype = rng.choice([torch.bfloat16, torch.float16, torch.float32])
    strides = rng.choice(["contiguous", "transposed", "sliced", "stepped", "offset"])
    wide, tall = (k, rows)
    if strides == "transposed":
        wide, tall = rows, k
    elif strides == "sliced":
        wide, tall = k + 5, rows + 3
    elif strides == "stepped":
        wide, tall = 2 * k, 2 * rows
    elif strides == "offset":
        wide, tall = k, rows + 1
    x = torch.randn(tall, wide, generator=gen) * 10 ** rng.uniform(-6, 4)
    if rng.random() < 0.5:
        x *= torch.exp(2 * torch.randn(tall, 1, generator=gen))
    if rng.random() < 0.3 and x.numel():
        for special in rng.sample([0.0, -0.0, NAN, -NAN, INF, -INF, 3e38, -3e38, 1e-40, -1e-45, 65504.0, 2.0**-126, 448.0], 3):
            x[torch.rand(x.shape, generator=gen) < 2 / k / 3] = special
    if rng.random() < 0.1:
        x[: tall // 2] = 0
    x = x.to(dtype)
    return {"transposed": lambda: x.t(), "sliced": lambda: x[3:, 5:], "stepped": lambda: x[::2, 1::2],
            "offset": lambda: x[1:]}.get(strides, lambda: x)()


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_the_oracle_agrees_with_a_search_of_every_code():
    x = torch.arange(0, 0x7F80, 3, dtype=torch.int16).view(torch.bfloat16).float().numpy()
    for values in (E2M1_VALUES, E4M3_VALUES):
        points = np.concatenate((x, values, (values[1:] + values[:-1]) / 2, np.nextafter(F32(values), F32(-1))[1:]))
        points = np.minimum(points, values[-1]).astype(F32)
        assert nearest(points, values, 0).tolist() == [exhaustive(v, values) for v in points]


@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes_of_random_tensors(name):
    """286 cases for each of 7 formats: 2,002. Bit-exact parts and values, or a FormatError that names k."""
    rng, f, refused, ran = random.Random(name), formats.get(name), 0, 0
    with np.errstate(all="ignore"):
        for case in range(286):
            rows, k, weight = ROWS[case % len(ROWS)], rng.choice(COLUMNS), rng.random() < 0.25
            x = draw(rng, rows, k)
            assert x.shape == (rows, k)
            at = f"{name} case {case}: {tuple(x.shape)} {x.dtype} strides {x.stride()} {'weight' if weight else ''}"
            if k % f.k_multiple:
                for call in (f.quantize_weight, lambda x: f.quantize(x, [torch.ones(())] * len(f.params))):
                    with pytest.raises(FormatError, match=f"k = {k} of"):
                        call(x)
                refused += 1
                continue
            before, ran = x.clone(), ran + 1
            amax = float(x.float().abs().max()) if rows else 0.0
            params = o_params(name, amax)
            if weight:
                got = f.quantize_weight(x)
                values, spec = f.dequantize_weight(got), f.weight_parts
            else:
                given = params_of(f, x)
                if f.params and rng.random() < 0.3:  # a static scale, which the tensor may exceed
                    given = f.params_from_amax(torch.tensor(10 ** rng.uniform(-4, 3)))
                    params = [p.numpy()[()] for p in given]
                got = f.quantize(x, given) + given
                values, spec = f.dequantize(got[:len(f.parts)], given), f.parts
            parts, expected = oracle(name, x.float().numpy(), params, weight)
            assert [tuple(t.shape) for t in got] == [p.shape(rows, k) for p in spec] + [()] * len(params), at
            assert [t.dtype for t in got] == [p.dtype for p in spec] + [torch.float32] * len(params), at
            assert all(t.is_contiguous() for t in got), at
            names = [*(p.name for p in spec), *f.params]
            for t, o, what in zip(got, [*parts, *(np.asarray(p) for p in params)], names, strict=True):
                assert same(t, o), f"{at}: {what}"
            assert values.dtype == torch.float32 and same(values, expected), f"{at}: values"
            assert same(x, before), f"{at}: the input was written to"
    assert refused + ran == 286 and ran > 80 and (refused > 60) == (f.k_multiple > 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bf16_keeps_a_tensor_as_it_is(dtype):
    f, x = formats.get("bf16"), torch.randn(7, 5, dtype=dtype).t()
    for (part,), value in ((q := f.quantize(x, []), f.dequantize(q, [])), (q := f.quantize_weight(x), f.dequantize_weight(q))):
        assert part.is_contiguous() and same(part, x) and same(value, x.float())


# ---- special values --------------------------------------------------------------------------------------------------


def test_every_e4m3_code_decodes():
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    table = torch.from_numpy(E4M3_TABLE)
    assert same(codes.from_e4m3(x), table)
    # where two bytes at a time cannot be read: odd size, odd offset, strides
    assert same(codes.from_e4m3(x[:255]), table[:255]) and same(codes.from_e4m3(x[1:255]), table[1:255])
    assert same(codes.from_e4m3(x.view(16, 16).t()), table.view(16, 16).t())
    weight = [x.view(2, 128), torch.ones(())]
    assert same(formats.get("fp8_tensor").dequantize_weight(weight), table.view(2, 128))


def test_every_e2m1_code_decodes():
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    expected = np.stack((E2M1_TABLE[bits(packed) & 15], E2M1_TABLE[bits(packed) >> 4]), -1).reshape(16, 32)
    assert E2M1_TABLE.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6] and np.signbit(E2M1_TABLE[8])
    assert same(codes.from_e2m1(packed), expected)
    assert same(codes._e2m1_values(packed), expected)  # what other devices run
    assert same(codes.from_e2m1(packed.t()), np.stack((E2M1_TABLE[bits(packed.t()) & 15], E2M1_TABLE[bits(packed.t()) >> 4]), -1)
                .reshape(16, 32))


def test_every_bf16_to_e2m1_and_e4m3():
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float().view(4096, 16)
    with np.errstate(invalid="ignore"):
        code = nearest(np.clip(x.numpy(), -6, 6), E2M1_VALUES, 0)
        assert same(codes.to_e2m1(x), code[:, 0::2] | code[:, 1::2] << 4)
        assert same(codes.to_e4m3(x), e4m3(x.numpy()))


def test_e2m1_midpoints_and_signs():
    f, nudge = formats.get("nvfp4"), lambda v, to: float(np.nextafter(F32(v), F32(to)))
    ties = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6}
    want = {0.0: 0, 1e-45: 0, 6.0: 7, **ties}
    want |= {nudge(v, 9): -(-c // 2) * 2 + (1 if c in (0, 2, 4, 6) and v in (0.25, 1.25, 2.5, 5.0) else 0) for v, c in ties.items()}
    want |= {nudge(v, 0): c - (v in (0.75, 1.75, 3.5)) for v, c in ties.items()}
    assert {c for v, c in want.items()} == set(range(8))
    for sign in (0, 8):
        for value, code in want.items():
            x = torch.zeros(1, 16)
            x[0, 0], x[0, 15] = (-value if sign else value), 6.0  # the block's largest is 6, so its scale is 1
            data, scale = f.quantize(x, [torch.ones(())])
            assert scale.float().item() == 1.0 and data[0, 0].item() == code | sign, (value, sign)


def test_e4m3_overflow_underflow_and_signs():
    f = formats.get("fp8_tensor")
    table = {448.0: 0x7E, 464.0: 0x7E, 465.0: 0x7E, 480.0: 0x7E, 1e30: 0x7E, INF: 0x7E, -465.0: 0xFE, -INF: 0xFE,
             432.0: 0x7E, 400.0: 0x7C,
             2.0**-9: 1, 2.0**-10: 0, 1.5 * 2.0**-9: 2, 1.01 * 2.0**-10: 1, 1e-45: 0, -1e-45: 0x80, -0.0: 0x80, 1.0: 0x38}
    (data,) = f.quantize(torch.tensor([list(table)]), [torch.ones(())])
    assert bits(data).tolist() == [list(table.values())]
    nans = torch.tensor([0x7FC00000, 0x7FFFFFFF, -0x400000, -1, 0x7F800001], dtype=torch.int32).view(torch.float32).view(1, 5)
    assert bits(f.quantize(nans, [torch.ones(())])[0]).tolist() == [[0x7F] * 5]


@pytest.mark.parametrize("name", QUANTIZED)
def test_no_cast_to_e4m3_relies_on_saturation(name):
    """What is cast is within +-448: torch 2.11 makes NaN of the rest, so the bytes alone show nothing on a later torch."""
    casts = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.float8_e4m3fn:
                casts.append(float(args[0].abs().max()))
            return func(*args, **kwargs)

    f, x = formats.get(name), torch.full((2, 64), 511.0)  # the most that MXFP8's scale leaves
    with Watch():
        f.quantize(x, [torch.full((), 1e-3 if name == "fp8_tensor" else 1e3)] * len(f.params))
    assert len(casts) == 1 and casts[0] == 448.0


def test_scales_that_are_nan_are_one_nan():
    nans = torch.tensor([0x7FC00001, -1, -0x400000], dtype=torch.int32).view(torch.float32)
    for name in ("fp8_token", "fp8_block"):
        scale = formats.get(name).quantize(nans.view(3, 1).expand(3, 32), [])[1]
        assert scale.view(torch.int32).unique().tolist() == [0x7FC00000]
    for name in ("fp8_tensor", "nvfp4"):
        for nan in nans:
            assert formats.get(name).params_from_amax(nan)[0].view(torch.int32).item() == 0x7FC00000


@pytest.mark.parametrize(("name", "amax", "want"), [
    ("fp8_tensor", 448.0, 1.0), ("fp8_tensor", 0.0, 2.0**-126), ("fp8_tensor", 1e-45, 2.0**-126), ("fp8_tensor", INF, INF),
    ("fp8_tensor", NAN, NAN), ("nvfp4", 2688.0, 1.0), ("nvfp4", 0.0, float(np.finfo(F32).max)), ("nvfp4", INF, 1.0),
    ("nvfp4", 1e-36, float(np.finfo(F32).max)), ("nvfp4", NAN, NAN), ("nvfp4:128x4", 3.0, 896.0)])
def test_params_from_amax(name, amax, want):
    (p,) = formats.get(name).params_from_amax(torch.tensor(amax))
    assert p.shape == () and p.dtype == torch.float32 and same(p, np.asarray(want, F32))


def test_params_from_amax_are_divided_not_multiplied_by_a_reciprocal():
    amax = torch.rand(20000) * 100
    for name, want in (("nvfp4", F32(2688) / amax.numpy()), ("fp8_tensor", amax.numpy() / F32(448))):
        assert same(formats.get(name).params_from_amax(amax)[0], want)


SPECIAL = {  # name: (a row of 32, {format: (first scale, first two data bytes)}); params are 1
    "zero": ([0.0, -0.0] + [0.0] * 30, {
        "fp8_token": (2.0**-126, [0, 0x80]), "fp8_block": (2.0**-126, [0, 0x80]), "mxfp8": (0, [0, 0x80]),
        "nvfp4": (0, [0x80, 0])}),
    "nan": ([NAN, 1.0] + [1.0] * 30, {
        "fp8_token": (NAN, [0x7F, 0x7F]), "fp8_block": (NAN, [0x7F, 0x7F]), "mxfp8": (255, [0x7F, 0x7F]), "nvfp4": (0x7F, [0, 0])}),
    "infinite": ([-INF, 1.0] + [0.0] * 30, {
        "fp8_token": (INF, [0x7F, 0]), "fp8_block": (INF, [0x7F, 0]), "mxfp8": (255, [0x7F, 0x7F]), "nvfp4": (0x7E, [0x0F, 0])}),
    "subnormal": ([1e-40, -1e-40] + [0.0] * 30, {
        "fp8_token": (2.0**-126, [4, 0x84]), "fp8_block": (2.0**-126, [4, 0x84]), "mxfp8": (0, [9, 0x89]),
        "nvfp4": (0, [0x80, 0])}),
    "underflow": ([1e-5, -1e-7] + [0.0] * 30, {"nvfp4": (0, [0xF7, 0])}),  # the scale rounds to 0: flattened
    "outlier": ([3e38, 1.0] + [1.0] * 30, {
        "fp8_token": (float(F32(3e38) / F32(448)), [0x7E, 0]), "fp8_block": (float(F32(3e38) / F32(448)), [0x7E, 0]),
        "mxfp8": (127 + 127 - 8, [0x7E, 0]), "nvfp4": (0x7E, [0x07, 0])}),
}


@pytest.mark.parametrize("what", SPECIAL)
def test_special_blocks(what):
    row, want = SPECIAL[what]
    x = torch.tensor([row])
    for name, (scale, data) in want.items():
        f = formats.get(name)
        got = f.quantize(x, [torch.ones(())] if f.params else [])
        assert bits(got[0])[0, :2].tolist() == data, name
        assert same(got[1][:, :1], np.full((1, 1), scale, F32 if f.parts[1].dtype == torch.float32 else np.uint8)), name
        values = f.dequantize(got, [torch.ones(())] if f.params else [])[0]
        if what == "nan" or (what == "infinite" and name != "nvfp4"):
            assert values[:16].isnan().all(), name
        elif what == "infinite":
            assert values[0] == -2688 and values[1] == 0
        else:
            assert values.isfinite().all() and (what == "outlier" or bool((values.abs() <= 1.1e-40).all())), name


def test_nan_or_infinity_spoils_no_other_block():
    x = torch.randn(3, 256)
    for name in ("fp8_token", "fp8_block", "nvfp4", "mxfp8"):
        f = formats.get(name)
        given = params_of(f, x)
        clean = f.dequantize(f.quantize(x, given), given)
        width = 256 if f.parts[1].block[1] == formats.WHOLE else f.parts[1].block[1]
        for bad in (NAN, INF):
            y = x.clone()
            y[1, 0] = bad
            got = f.dequantize(f.quantize(y, given), given)
            assert same(got[[0, 2]], clean[[0, 2]]) and same(got[1, width:], clean[1, width:]), name
            assert got[1, 0].isnan() or (bad == INF and name == "nvfp4"), name


@pytest.mark.parametrize("name", ["nvfp4", "fp8_tensor"])
@pytest.mark.parametrize("bad", [NAN, INF, 0.0])
def test_weights_that_hold_nothing_finite(name, bad):
    f = formats.get(name)
    values = f.dequantize_weight(f.quantize_weight(torch.full((2, 32), bad)))
    assert (values == 0).all() if bad == 0 else values.isnan().all() or (name == "nvfp4" and bool((values == 2688).all()))


# ---- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_rows_are_quantized_on_their_own(name):
    """Quantizing rows [a:b) gives the slice of the parts, and dequantizing the slice gives the slice of the values."""
    rng, f, step = random.Random(name), formats.get(name), formats.get(name).token_multiple
    for rows, k in ((257, 96), (40, 576), (385, 64)):
        x = draw(rng, rows, k)
        x[rng.randrange(rows), rng.randrange(k)] = rng.choice([NAN, -NAN, INF])
        given = f.params_from_amax(torch.tensor(3.0)) if f.params else []
        whole = f.quantize(x, given)
        for _ in range(12):
            a, b = sorted(rng.sample(range(0, rows + step, step), 2))
            b = min(b, rows)
            part = f.quantize(x[a:b], given)
            for p, t, spec in zip(part, whole, f.parts, strict=True):
                cut = t[a:b] if spec.multiple == (1, 1) else t[a:a + spec.shape(b - a, k)[0]]
                assert same(p, cut), f"{name} [{a}:{b}) of {rows}: {spec.name}"
            assert same(f.dequantize(part, given), f.dequantize(whole, given)[a:b])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_returned_aliases_an_input(name, dtype):
    f = formats.get(name)
    for rows in (1, 128, 130):
        x = torch.randn(rows, 64, dtype=dtype)
        given = params_of(f, x)
        parts, weight = f.quantize(x, given), f.quantize_weight(x)
        calls = [([x, *given], parts), ([x], weight), ([*parts, *given], [f.dequantize(parts, given)]),
                 (weight, [f.dequantize_weight(weight)])]
        amax = torch.tensor(2688.0)
        calls += [([amax], f.params_from_amax(amax))] if f.params else []
        if name in ("nvfp4", "mxfp8"):
            other = formats.get(name + ":128x4")
            there = relayout(parts, f, other, rows, 64)
            calls += [(parts, there), (there, relayout(there, other, f, rows, 64)), (parts, relayout(parts, f, f, rows, 64))]
        for given_in, out in calls:
            memory = {t.untyped_storage().data_ptr() for t in given_in}
            assert not memory & {t.untyped_storage().data_ptr() for t in out}
            assert len({t.untyped_storage().data_ptr() for t in out}) == len(out)


@pytest.mark.parametrize("name", ALL)
def test_fresh_memory_is_never_read(name, monkeypatch):
    f, x = formats.get(name), draw(random.Random(1), 129, 96)

    def run() -> list[Tensor]:
        given, w = params_of(f, x), f.quantize_weight(x)
        parts = f.quantize(x, given)
        return [*parts, f.dequantize(parts, given), *w, f.dequantize_weight(w)]

    def poisoned(make: Callable) -> Callable:
        def empty(*args, **kwargs):
            t = make(*args, **kwargs)
            t.untyped_storage().fill_(0xFF)  # NaN in every float dtype
            return t
        return empty

    clean = run()
    for owner, attribute in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, attribute, poisoned(getattr(owner, attribute)))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # the same inside torch
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all() and all(same(a, b) for a, b in zip(clean, run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("k", [64, 576])
def test_symbolic_rows(name, k):
    """Fake tensors give the parts' shapes with no guard; a graph traced with 200 rows is right for other numbers of rows."""
    f = formats.get(name)

    def run(x: Tensor, given: list[Tensor]) -> list[Tensor]:
        parts = f.quantize(x, given)
        return [*parts, f.dequantize(parts, given)]

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.zeros(200, k, dtype=torch.bfloat16), source=ConstantSource("x"), symbolic_context=context)
    with mode:
        out = run(x, f.params_from_amax(torch.ones(())) if f.params else [])
        weight = f.quantize_weight(torch.zeros(200, k))
        assert f.dequantize_weight(weight).shape == (200, k)
    rows = x.shape[0]
    assert not isinstance(rows, int)
    assert [tuple(t.shape) for t in out] == [p.shape(rows, k) for p in f.parts] + [(rows, k)]
    assert [t.dtype for t in out] == [p.dtype for p in f.parts] + [torch.float32]
    assert [tuple(t.shape) for t in weight[:len(f.weight_parts)]] == [p.shape(200, k) for p in f.weight_parts]
    assert [str(g.expr) for g in env.guards] == []

    given = f.params_from_amax(torch.tensor(3.0)) if f.params else []
    graph = make_fx(run, tracing_mode="symbolic")(torch.randn(200, k), given)
    for rows in (2, 128, 131, 300):
        x = torch.randn(rows, k)
        assert all(same(a, b) for a, b in zip(graph(x, given), run(x, given), strict=True)), rows


def test_zero_rows_of_every_kind():
    for name in ALL:
        f = formats.get(name)
        for x in (torch.zeros(0, 64), torch.zeros(64, 0).t(), torch.zeros(9, 64)[9:]):
            given = params_of(f, x)
            parts, weight = f.quantize(x, given), f.quantize_weight(x)
            assert f.dequantize(parts, given).shape == f.dequantize_weight(weight).shape == (0, 64)
            assert formats.nbytes(f, 0, 64) == 0


def test_a_parameter_that_wants_gradients():
    for name in ALL:
        f, w = formats.get(name), torch.nn.Parameter(torch.randn(8, 64))
        got = f.quantize_weight(w)
        assert not any(t.requires_grad for t in got)
        assert all(same(a, b) for a, b in zip(got, f.quantize_weight(w.detach()), strict=True))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_refusals_name_the_dimension(name):
    f = formats.get(name)
    for x, match in [(torch.zeros(64), "1 dimensions"), (torch.zeros(2, 3, 64), r"3 dimensions, shape \(2, 3, 64\)"),
                     (torch.zeros(2, 64, dtype=torch.float64), "torch.float64"),
                     (torch.zeros(2, 64, dtype=torch.int8), "torch.int8"), (torch.zeros(2, 0), "k = 0 of"),
                     *([(torch.zeros(2, 72), "k = 72 of")] if f.k_multiple > 1 else [])]:
        with pytest.raises(FormatError, match=match + ".*x|.*x.*" + match):
            f.quantize(x, [torch.ones(())] * len(f.params))
        with pytest.raises(FormatError, match=match + ".*w|.*w.*" + match):
            f.quantize_weight(x)


def test_the_registry():
    assert set(ALL) <= set(formats.FORMATS)
    with pytest.raises(InputError, match=r"unknown format 'fp9'; known: .*nvfp4:128x4"):
        formats.get("fp9")
    for name, tokens, k, want in [("bf16", 33, 576, 33 * 1152), ("fp8_tensor", 33, 576, 33 * 576), ("fp8_token", 33, 576, 33 * 580),
                                  ("fp8_block", 33, 576, 33 * (576 + 20)), ("nvfp4", 33, 576, 33 * (288 + 36)),
                                  ("mxfp8", 33, 576, 33 * (576 + 18)), ("nvfp4:128x4", 33, 576, 33 * 288 + 128 * 36),
                                  ("mxfp8:128x4", 129, 576, 129 * 576 + 256 * 20)]:
        f = formats.get(name)
        assert formats.nbytes(f, tokens, k) == want
        parts = f.quantize(torch.zeros(tokens, k, dtype=torch.bfloat16), [torch.ones(())] * len(f.params))
        assert sum(t.nbytes for t in parts) == want


# ---- the 128x4 layout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_swizzle_and_back(dtype):
    gen = torch.Generator().manual_seed(0)
    for m in range(258):
        for kb in (1, 3, 4, 6) if m % 3 else (2, 5, 36):
            scale = torch.randint(1, 256, (m, kb), generator=gen, dtype=torch.uint8).view(dtype)
            there = swizzle(scale)
            assert there.dtype == dtype and same(there, o_swizzle(scale.view(torch.uint8).numpy())), (m, kb)
            assert int((there.view(torch.uint8) == 0).sum()) == there.numel() - m * kb  # only the padding is zero
            assert same(unswizzle(there, m, kb), scale), (m, kb)
    strided = torch.randint(1, 256, (6, 130), generator=gen, dtype=torch.uint8).view(dtype).t()
    assert same(swizzle(strided), swizzle(strided.contiguous()))
    assert same(unswizzle(swizzle(strided).t().contiguous().t(), 130, 6), strided)


def test_swizzle_by_hand():
    scale = torch.arange(129 * 5, dtype=torch.int32).remainder(251).to(torch.uint8).view(129, 5)
    flat = swizzle(scale).view(-1)
    for (m, j), at in {(0, 0): 0, (0, 3): 3, (1, 0): 16, (31, 0): 496, (32, 0): 4, (96, 2): 14, (127, 3): 511, (0, 4): 512,
                       (128, 0): 1024, (128, 4): 1536}.items():
        assert flat[at] == scale[m, j], (m, j)


def test_swizzled_shards_join_only_at_multiples_of_128_rows():
    gen = torch.Generator().manual_seed(0)
    for world in (2, 4):
        for local in range(1, 258):
            scale = torch.randint(1, 256, (world * local, 4), generator=gen, dtype=torch.uint8)
            joined = torch.cat([swizzle(s) for s in scale.split(local)])
            if local % 128 == 0:
                assert same(joined, swizzle(scale)) and same(unswizzle(joined, world * local, 4), scale)
                continue
            if joined.shape != swizzle(scale).shape:
                with pytest.raises(FormatError, match=f"m = {world * local} and kb = 4"):
                    unswizzle(joined, world * local, 4)
            # read as one tensor, all of the first shard is right and most of the rest is another row's
            read = unswizzle(joined[:swizzle(scale).shape[0]], world * local, 4)
            assert same(read[:local], scale[:local]) and (read != scale).any()


@pytest.mark.parametrize("base", ["nvfp4", "mxfp8"])
def test_relayout(base):
    linear, swizzled = formats.get(base), formats.get(base + ":128x4")
    assert (linear.layout, linear.token_multiple, swizzled.layout, swizzled.token_multiple) == ("linear", 1, "128x4", 128)
    for rows, k in ((1, 32), (128, 64), (129, 96), (300, 576)):
        x = torch.randn(rows, k)
        given = params_of(linear, x)
        a, b = linear.quantize(x, given), swizzled.quantize(x, given)
        assert not same(a[1], b[1])
        for have, f, g, want in ((a, base, base + ":128x4", b), (b, swizzled, linear, a), (a, base, base, a),
                                 (b, swizzled, swizzled, b)):
            assert all(same(p, q) for p, q in zip(relayout(have, f, g, rows, k), want, strict=True))
        assert same(linear.dequantize(a, given), swizzled.dequantize(b, given))
        wa, wb = linear.quantize_weight(x), swizzled.quantize_weight(x)
        assert all(same(p, q) for p, q in zip(relayout(wa, linear, swizzled, rows, k), wb, strict=True))
        assert same(linear.dequantize_weight(wa), swizzled.dequantize_weight(wb))
    with pytest.raises(InputError, match="differ in more than the layout"):
        relayout(a, base, "fp8_token", rows, k)
    with pytest.raises(FormatError, match="m = 428"):
        relayout(b, swizzled, linear, 428, k)


# ---- how far off the formats are -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "relative"), [("fp8_tensor", 0.028), ("fp8_token", 0.027), ("fp8_block", 0.027), ("nvfp4", 0.098),
                                                ("mxfp8", 0.031), ("nvfp4:128x4", 0.098), ("mxfp8:128x4", 0.031)])
def test_round_trip_error(name, relative):
    """Against float64: relative L2 of a Gaussian, and every element within half the distance of its neighbouring codes."""
    f, x = formats.get(name), torch.randn(200, 576, generator=torch.Generator().manual_seed(0)) * 3
    given = params_of(f, x)
    parts, weight = f.quantize(x, given), f.quantize_weight(x)
    linear = relayout(parts, f, base := formats.get(name.split(":")[0]), 200, 576) if f.layout != "linear" else parts
    for values in (f.dequantize(parts, given), f.dequantize_weight(weight)):
        error = (values.double() - x.double()).abs()
        assert error.norm() / x.double().norm() < relative
    if f.params and name == "fp8_tensor":
        scale = given[0].double()
    else:
        base = formats.get(name.split(":")[0])
        ones = base.dequantize([torch.full_like(linear[0].view(torch.uint8), 0x22 if base.name == "nvfp4" else 0x38)
                                .view(linear[0].dtype), linear[1]], given)
        scale = ones.double()  # what a code of 1 is worth
    values, v = f.dequantize(parts, given).double(), x.double().abs() / scale
    if "nvfp4" in name:
        half = torch.where(v <= 2, 0.25, torch.where(v <= 4, 0.5, torch.maximum(torch.ones(()), v - 6)))
    else:
        half = torch.maximum(torch.exp2(v.log2().floor().clamp(min=-6) - 4), v - 448)
    assert ((values - x.double()).abs() <= half * scale * (1 + 1e-5)).all()


# ---- compressed-tensors reads and writes the same weights ------------------------------------------------------------


def ct_scheme(name: str) -> QuantizationScheme:
    return preset_name_to_scheme(name, ["Linear"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 96), (129, 576), (1, 16)])
def test_nvfp4_weights_packed_by_compressed_tensors(shape, dtype):
    f, scheme, w = formats.get("nvfp4"), ct_scheme("NVFP4A16"), (torch.randn(shape) * 0.05).to(dtype)
    g = generate_gparam(w.amin(), w.amax())
    blocks = w.unflatten(1, (-1, 16))
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=g)
    state = NVFP4PackedCompressor.compress({"weight": w, "weight_scale": scale, "weight_global_scale": g}, scheme)
    mine = [state["weight_packed"], state["weight_scale"], state["weight_global_scale"].reshape(())]
    assert [(t.dtype, tuple(t.shape)) for t in mine] == [(t.dtype, tuple(t.shape)) for t in f.quantize_weight(w)]
    values = f.dequantize_weight(mine)
    theirs = NVFP4PackedCompressor.decompress(state, scheme)["weight"]
    assert (values.to(theirs.dtype).double() - theirs.double()).abs().max() == 0.0
    unrounded = ct_dequantize(codes.from_e2m1(mine[0]), mine[1].float(), args=scheme.weights, dtype=torch.float32,
                              global_scale=state["weight_global_scale"])
    assert (values.double() - unrounded.double()).abs().max() == 0.0
    assert (values - w.float()).norm() / w.float().norm() < 0.15


def test_nvfp4_weights_packed_here_are_read_by_compressed_tensors():
    f, w = formats.get("nvfp4"), torch.randn(96, 160)
    data, scale, g = f.quantize_weight(w)
    state = {"weight_packed": data, "weight_scale": scale, "weight_global_scale": g.reshape(1)}
    theirs = NVFP4PackedCompressor.decompress(state, ct_scheme("NVFP4A16"))["weight"]
    assert same(f.dequantize_weight([data, scale, g]).to(theirs.dtype), theirs)


@pytest.mark.parametrize(("name", "preset"), [("fp8_tensor", "FP8"), ("fp8_token", "FP8_DYNAMIC"), ("fp8_block", "FP8_BLOCK")])
@pytest.mark.parametrize("shape", [(64, 96), (130, 576)])
def test_fp8_weights_packed_by_compressed_tensors(name, preset, shape):
    f, scheme, w = formats.get(name), ct_scheme(preset), torch.randn(shape)
    mine = f.quantize_weight(w)
    scale = mine[1].reshape(1) if name == "fp8_tensor" else mine[1]
    state = FloatQuantizationCompressor.compress({"weight": w, "weight_scale": scale}, scheme)
    assert same(state["weight"], mine[0])
    loaded = [state["weight"], state["weight_scale"].reshape(mine[1].shape)]
    if name == "fp8_block" and shape[0] % 128:  # their reader wants whole blocks
        return
    theirs = FloatQuantizationCompressor.decompress(state, scheme)["weight"]
    assert (f.dequantize_weight(loaded).double() - theirs.double()).abs().max() == 0.0
    state["weight_scale"] = scale.bfloat16()  # what they save for a bf16 model: the product is rounded once to bf16
    theirs = FloatQuantizationCompressor.decompress(state, scheme)["weight"]
    loaded[1] = scale.bfloat16().float().reshape(mine[1].shape)
    assert theirs.dtype == torch.bfloat16 and same(f.dequantize_weight(loaded).bfloat16(), theirs)


def test_mxfp8_weights_packed_by_compressed_tensors():
    f, scheme, w = formats.get("mxfp8"), ct_scheme("MXFP8"), torch.randn(64, 96)
    data, scale = f.quantize_weight(w)
    state = {"weight": w, "weight_scale": torch.exp2(scale.float() - 127)}
    state = MXFP8QuantizationCompressor.compress(state, scheme)
    assert same(state["weight"], data) and same(state["weight_scale"], scale)
    theirs = MXFP8QuantizationCompressor.decompress(state, scheme)["weight"]
    assert (f.dequantize_weight([data, scale]).double() - theirs.double()).abs().max() == 0.0
