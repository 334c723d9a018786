"""The matmul of gemm.cu: built for each configuration when first used, and kept in a cache folder."""
from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import FusewireError
from .. import aten, device
from ..transfer import Transfer
from ..workspace import op_number

MAX_WORLD, MAX_WEIGHTS = 8, 4
ROWS = 128  # of a tile
MOST_UNIT = 8  # rows under one flag
TILE_FLAGS = 2  # of a partial sum
SHARED_BYTES = 232448  # that one program can have on sm_90
_SOURCE = Path(__file__).with_name("gemm.cu")
_loaded: dict[Config, Callable[..., int]] = {}
_given: dict[str, Any] = {}  # what `tile` says of a Config


@dataclass(frozen=True)
class Config:
    """One build of gemm.cu; its head says what these mean."""

    fp8: bool
    columns: int
    cluster: int = 2
    mode: str = "plain"  # or "gather", "reduce"
    precise: bool = False
    turns: bool = False

    def defines(self) -> dict[str, int]:
        piece = 32 if self.columns % 64 or (self.turns and self.columns > 128) else 64
        piece_bytes = 64 * piece * 2
        stage_bytes = (ROWS + self.columns) * 128
        room = SHARED_BYTES - 2048 - 8 * self.columns  # but for alignment, barriers and scales
        # With three, a tile of 256 columns has room for all that waits to be stored: between two H200s, over and over again, `qkv`
        # of Llama-3-70B took 2 % less time for 4,096 tokens, and `gate_up` 0.1 %.
        buffers = 0 if self.mode != "gather" else 3 if self.columns == 256 else 4
        room -= buffers * 4096
        spare = room - (3 if self.columns == 256 else 5 if self.turns and self.columns < 192 else 4) * stage_bytes
        ring = max(2, min(6 if self.mode == "reduce" else 4, spare // (2 * piece_bytes)))
        stages = min(8, (room - 2 * ring * piece_bytes) // stage_bytes)
        return {"FP8": int(self.fp8), "PRECISE": int(self.precise), "TURNS": int(self.turns), "BN": self.columns,
                "STAGES": stages, "PIECE": piece, "RING": ring, "BUFFERS": buffers, "CLUSTER": self.cluster,
                "GATHER": int(self.mode == "gather"), "REDUCE": int(self.mode == "reduce"),
                "REGISTERS": 232 if self.sums > 160 else 224 if self.sums > 128 else 208}

    @property
    def sums(self) -> int:
        """Registers of a thread in which it sums; the tensor core's own sums take as many again."""
        return self.columns * (2 if self.turns else 1) // 2 * (2 if self.precise else 1)

    def possible(self) -> bool:
        """Whether a tile's sums fit the registers, beside what else is there. Pieces of 32 columns would make adding the peers'
        partial sums slow. Tiles of 192 columns in turns spill registers: with them gathers took 1 to 7 % longer than with 160 in
        seven of eight sizes of Llama-3-70B and 8B."""
        return (self.sums <= ((160 if self.mode == "gather" else 192) if self.turns else 128) and self.fp8 >= self.precise
                and (self.mode != "reduce" or self.columns % 64 == 0))


# For the choice of a tile, from measurements on H200s; counted in columns of a tile times bytes of k, which take CYCLE_US each. A
# tile's end takes END more, or where peers' sums are added ADD_END; in turns, while the other warpgroup multiplies, less. A rank
# that sends and receives in the same wave waits EXCHANGE_US. Products of many rows, more than MANY, run at the GPU's power limit,
# and how fast its clock is depends on the energy of products (WORK_US) and of copies into shared memory (COPY_US, for a tile's rows
# and columns over their product): plain ones of 4,096 rows in FP8, with one of seven tiles and four shapes over and over again,
# took that within 4 %, and those between two ranks up to 8 % more. With scales of rows, whose use at a tile's end takes longer, the
# larger tiles that save energy were slower; in bf16 and among more ranks that was not measured.
CYCLE_US, WORK_US, COPY_US, EXCHANGE_US = 1.27e-5, 6.6e-6, 4.5e-4, 4.0
END, ADD_END, TURN_END, TURN_ADD_END = 150e3, 300e3, 55e3, 45e3
LEAD_US = 11.0  # between two H200s, k = 2048: 8 to 36 % less time than with 4 us, from 4,096 tokens up
MANY, LIMITED_WORLD, LIMITED_FORMAT = 2048, 2, "fp8_tensor"
COLUMNS = (64, 96, 128, 160, 192, 224, 256)  # multiples of 32, so that a piece of 32 or 64 columns divides them


class Call(ctypes.Structure):
    """`struct Call` of gemm.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a_own", "a_all")),
        ("b", ctypes.c_void_p * MAX_WEIGHTS), ("c", ctypes.c_void_p * MAX_WEIGHTS),
        *((name, ctypes.c_void_p * MAX_WORLD) for name in ("sent", "partial")),
        ("scale_own", ctypes.c_void_p), ("scale_all", ctypes.c_void_p), ("scale_b", ctypes.c_void_p * MAX_WEIGHTS),
        ("bias", ctypes.c_void_p * MAX_WEIGHTS),
        *((name, ctypes.c_void_p * MAX_WORLD) for name in ("rows_to", "scales_to", "flags_to", "entered_to")),
        *((name, ctypes.c_void_p) for name in ("flags", "epoch", "last", "state", "report")),
        *((name, ctypes.c_int64) for name in ("limit_ns", "k", "own_stride", "all_stride")),
        ("b_stride", ctypes.c_int64 * MAX_WEIGHTS), ("n", ctypes.c_int * MAX_WEIGHTS),
        *((name, ctypes.c_int) for name in ("weights", "world", "rank", "m", "row_scales", "begins", "gate", "half", "loopback",
                                            "unit", "ahead", "op", "programs")),
    ]


def configure(x: Tensor, ws: Sequence[Tensor], fmt: str, world: int, mode: str = "plain") -> Config:
    """The tile for a product. x: this rank's rows, or all rows to "reduce"."""
    fp8, m = x.dtype == torch.float8_e4m3fn, x.shape[0] // (world if mode == "reduce" else 1)
    precise = fp8 and not aten.FAST_ACCUMULATION
    limited = fmt == LIMITED_FORMAT and not precise and world <= LIMITED_WORLD and world * m > MANY
    found = fastest(fp8, m, tuple(w.shape[0] for w in ws), x.shape[1] * x.element_size(), world, device.processors(x.device), mode,
                    precise, limited)
    if _given and (given := replace(found, **_given)).possible():
        return given
    return found


@contextlib.contextmanager
def tile(columns: int, turns: bool) -> Iterator[None]:
    """Calls inside have tiles of so many columns, in turns or not, where that is possible, and not those that suit them: to measure
    others."""
    _given.update(columns=columns, turns=turns)
    try:
        yield
    finally:
        _given.clear()


@functools.cache
def fastest(fp8: bool, m: int, ns: tuple[int, ...], k_bytes: int, world: int, programs: int, mode: str, precise: bool,
            limited: bool) -> Config:
    """Which tile suits `world` times m rows and so many columns, if `programs` run at once: the one whose last wave wastes least,
    and at the power limit, `limited`, least energy too."""
    def us(config: Config) -> float:
        count = world * sum(tiles(config, m, n) for n in ns) // config.cluster
        waves = -(-count // (programs // config.cluster))
        taken = waves * wave_us(config, k_bytes) + (CYCLE_US * END if config.turns else 0.0)
        if limited:
            each = config.columns * k_bytes
            taken += count * config.cluster / programs * each * (WORK_US + COPY_US * (1 / ROWS + 1 / config.columns))
        return taken + (EXCHANGE_US if mode == "reduce" and waves == 1 else 0.0)

    tried = [Config(fp8, columns, 2 if m > ROWS else 1, mode, precise, turns) for columns in COLUMNS for turns in (False, True)]
    tried = [config for config in tried if config.possible()]
    return min(tried, key=us)


def unit(rows: int, programs: int) -> int:
    """How many of a rank's rows go under one flag: as few as let every program send, a power of two."""
    return next((n for n in (1, 2, 4) if rows <= n * programs), MOST_UNIT)


def ahead(config: Config, k_bytes: int) -> int:
    """How many times as many of the other ranks' tiles as are under way at once a rank makes before its own: what is added to these
    is then on its way for LEAD_US."""
    return max(1 if config.turns and config.columns < 192 else 2, math.ceil(LEAD_US / wave_us(config, k_bytes)))


def wave_us(config: Config, k_bytes: int) -> float:
    """What one tile of each program takes, with as much of its end as the other warpgroup's products do not hide."""
    end, turn_end = (ADD_END, TURN_ADD_END) if config.mode == "reduce" else (END, TURN_END)
    return CYCLE_US * (config.columns * k_bytes + (turn_end if config.turns else end))


def tiles(config: Config, m: int, n: int) -> int:
    """How many tiles the kernel makes of (m, n) outputs of one rank."""
    rows = ROWS * config.cluster
    return -(-m // rows) * config.cluster * -(-n // config.columns)


def most_tile_bytes(m: int, n: int) -> int:
    """Bytes of the bf16 tiles of (m, n) outputs, whatever the configuration; m may be symbolic."""
    rows = ROWS * 2
    return (m + rows - 1) // rows * rows * max(-(-n // columns) * columns for columns in COLUMNS) * 2


@functools.cache
def nvcc() -> str | None:
    """Where the CUDA compiler is: in CUDA_HOME, on the PATH, or where its installer puts it."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for at in (Path(home) / "bin" / "nvcc", Path(shutil.which("nvcc") or "/nowhere")):
        if at.is_file():
            return str(at)
    return None


def why_not(x: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot multiply these, None if it can. It does not look at token counts."""
    if fmt not in ("bf16", "fp8_tensor", "fp8_token"):
        return f"it multiplies bf16, fp8_tensor and fp8_token, not {fmt}"
    if x[0].dtype not in (torch.bfloat16, torch.float8_e4m3fn) or x[0].dtype != w[0].dtype or dtype != torch.bfloat16:
        return f"it makes bfloat16 of bfloat16 or float8_e4m3fn, not {dtype} of {x[0].dtype} and {w[0].dtype}"
    if bias is not None and (bias.dtype != torch.bfloat16 or bias.stride(0) != 1):
        return f"its bias must be contiguous bfloat16, not {bias.dtype}"
    n, k = w[0].shape
    if k * x[0].element_size() % 16 or n % 8 or k == 0 or n == 0:
        return f"k = {k} must be whole units of 16 bytes and n = {n} a multiple of 8"
    if w[0].stride(1) != 1 or w[0].stride(0) * w[0].element_size() % 16:
        return "the weight must be contiguous along k, its rows at multiples of 16 bytes"
    if (why := device.why_not(x[0].device, highest=device.HOPPER, triton=False)) is not None:
        return why
    return None if nvcc() else "there is no CUDA compiler: nvcc is neither in CUDA_HOME nor on the PATH"


def why_not_world(world: int) -> str | None:
    """Why the kernel cannot send among so many ranks, None if it can."""
    return f"it sends among {MAX_WORLD} ranks at most, not {world}" if world > MAX_WORLD else None


def rows_apart(x: Tensor) -> Tensor:
    """x (rows, k), or a copy, so that its rows are contiguous and lie at multiples of 16 bytes."""
    if x.dim() < 2:
        return x
    good = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 and x.stride(0) >= x.shape[1]
    return x if good else x.clone(memory_format=torch.contiguous_format)


def call(x: list[Tensor], all_x: int, all_scales: int, params: list[Tensor], ws: Sequence[list[Tensor]],
         biases: Sequence[Tensor | None], out: Sequence[Tensor], fmt: str, world: int, rank: int) -> Call:
    """A plain product of gathered rows: x are this rank's parts, all_x and all_scales where all rows are."""
    c = Call()
    size, rows = x[0].element_size(), x[0].shape[0]
    c.a_own, c.a_all, c.k, c.own_stride = x[0].data_ptr(), all_x, x[0].shape[1], x[0].stride(0) * size
    c.all_stride = c.own_stride if all_x == c.a_own else x[0].shape[1] * size
    c.weights, c.world, c.rank, c.m, c.row_scales = len(ws), world, rank, rows, int(fmt == "fp8_token")
    for i, (w, bias, y) in enumerate(zip(ws, biases, out, strict=True)):
        c.b[i], c.b_stride[i], c.n[i], c.c[i] = w[0].data_ptr(), w[0].stride(0) * size, w[0].shape[0], y.data_ptr()
        c.bias[i] = None if bias is None else _aligned(bias)
        c.scale_b[i] = None if fmt == "bf16" else _aligned(w[1])
    if fmt == "fp8_tensor":
        c.scale_own = c.scale_all = params[0].data_ptr()
    elif fmt == "fp8_token":
        c.scale_own, c.scale_all = x[1].data_ptr(), all_scales
    c.programs = device.processors(x[0].device)  # one on each
    return c


def _aligned(x: Tensor) -> int:
    """Its address, or that of a copy where the kernel's wide loads may be: what a stream has in use is not given away before."""
    return (x if x.data_ptr() % 16 == 0 else x.clone()).data_ptr()


def watch(call: Call, t: Transfer) -> None:
    """Have the kernel begin a transfer and wait for its flags."""
    space = t.space
    call.flags, call.epoch, call.report = t.flags(space.rank), t.epoch.data_ptr(), space.report.data_ptr()
    call.last, call.state, call.half, call.loopback = space.last.data_ptr(), space.state.data_ptr(), t.half, int(space.loopback)
    call.begins = call.gate = 1
    for rank in range(space.world_size):
        call.entered_to[rank] = t.entered(rank)
    call.limit_ns, call.op = space.limit_ns, op_number(t.op)


def source(config: Config) -> str:
    """gemm.cu with what it expects in front of it."""
    count = config.columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    kind, flags = ("k32.f32.e4m3.e4m3", "p, 1, 1") if config.fp8 else ("k16.f32.bf16.bf16", "p, 1, 1, 0, 0")
    mma = (f"__device__ __forceinline__ void mma(float (&d)[{count}], unsigned long long a, unsigned long long b, int add) {{\n"
           f'    asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{count + 2}, 0; "\n'
           f'                 "wgmma.mma_async.sync.aligned.m64n{config.columns}{kind} "\n'
           f'                 "{{{sums}}}, %{count}, %{count + 1}, {flags}; }}"\n'
           f'                 : {outputs} : "l"(a), "l"(b), "r"(add));\n}}\n')
    defines = "".join(f"#define {name} {value}\n" for name, value in config.defines().items())
    return f'{defines}{mma}#line 1 "gemm.cu"\n{_SOURCE.read_text()}'


def build(config: Config) -> Path:
    """The library of a configuration, compiled unless it is in FUSEWIRE_CACHE (default ~/.cache/fusewire) already."""
    text = source(config)
    compiler = nvcc()
    folder = Path(os.environ.get("FUSEWIRE_CACHE", "~/.cache/fusewire")).expanduser() / "cuda"
    built = folder / f"gemm-{hashlib.sha256(f'{compiler}{text}'.encode()).hexdigest()[:20]}.so"
    if built.exists():
        return built
    if compiler is None:
        raise FusewireError("the CUDA kernels cannot be built: nvcc is neither in CUDA_HOME nor on the PATH; install the CUDA "
                            "toolkit")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        at = Path(scratch) / "gemm.cu"
        at.write_text(text)
        command = [compiler, "-gencode=arch=compute_90a,code=sm_90a", "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC",
                   "-o", str(at.with_suffix(".so")), str(at)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:300])
            raise FusewireError(f"the CUDA kernels could not be built with {compiler}: {first}")
        os.replace(at.with_suffix(".so"), built)  # whole, whoever else builds it at the same time
    return built


def load(config: Config) -> Callable[..., int]:
    """The launcher of a configuration. It is loaded before anything spins, and never while a graph is captured."""
    if (found := _loaded.get(config)) is None:
        if torch.cuda.is_current_stream_capturing():
            raise FusewireError(f"a matmul kernel for tiles of {config.columns} columns would be loaded while a CUDA graph is "
                                "captured; run the model once before the capture")
        found = _loaded[config] = ctypes.CDLL(str(build(config))).launch
    return found


def product(x: list[Tensor], params: list[Tensor], w: list[Tensor], bias: Tensor | None, fmt: str) -> Tensor:
    """The matmul op by this kernel alone."""
    x = [rows_apart(part) for part in x]
    out = x[0].new_empty((x[0].shape[0], w[0].shape[0]), dtype=torch.bfloat16)
    if out.numel():
        launch(configure(x[0], [w[0]], fmt, 1), call(x, x[0].data_ptr(), x[-1].data_ptr(), params, [w], [bias], [out], fmt, 1, 0))
    return out


def launch(config: Config, call: Call) -> None:
    """Start the kernel on the current stream."""
    if error := load(config)(ctypes.byref(call), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)):
        what = f"a tensor map was refused (CUDA error {error - 1000})" if error >= 1000 else f"CUDA error {error}"
        raise FusewireError(f"the matmul kernel of {config.columns} columns for m = {call.m}, k = {call.k}, n = {call.n[0]} "
                            f"did not start: {what}")
