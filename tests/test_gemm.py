"""The CUDA matmul without a GPU: its configurations, what it refuses, and that it builds."""
from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fusewire.backends import device, workspace
from fusewire.backends import matmul_reduce_scatter as scatters
from fusewire.backends.cuda import gemm
from fusewire.backends.transfer import Transfer
from fusewire.errors import FusewireError

CONFIGS = [config for choice in itertools.product(
               (True, False), gemm.COLUMNS, (1, 2), ("plain", "gather", "reduce"), (False, True), (False, True))
           if (config := gemm.Config(*choice)).possible()]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEWIRE_CACHE", str(tmp_path))
    return tmp_path / "cuda"


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration_fits_shared_memory(config):
    d = config.defines()
    piece_bytes = 64 * 2 * d["PIECE"]
    barriers = 2 * d["STAGES"] + 6 * d["RING"] + d["BUFFERS"] + 5
    used = (1024 + d["STAGES"] * (gemm.ROWS + config.columns) * 128 + 2 * d["RING"] * piece_bytes
            + d["BUFFERS"] * 4096 + 8 * barriers + 2 * 4 * config.columns)
    assert used <= gemm.SHARED_BYTES
    assert d["STAGES"] >= 3 and d["RING"] >= 2 and d["PIECE"] in (32, 64) and config.columns % d["PIECE"] == 0
    assert config.sums + 32 < d["REGISTERS"] <= 240  # and what is left of 504 for each pair and a mover: at least 24


def test_the_call_is_laid_out_as_in_c(tmp_path):
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("there is no g++ here")
    text = gemm._SOURCE.read_text()
    struct = re.search(r"^struct Call \{.*?^\};", text, re.S | re.M).group()
    checks = "".join(f"static_assert(offsetof(Call, {name}) == {getattr(gemm.Call, name).offset});\n"
                     for name, *_ in gemm.Call._fields_)
    file = tmp_path / "call.cpp"
    file.write_text(f"#include <cstddef>\n#include <cstdint>\nconstexpr int MAX_WORLD = {gemm.MAX_WORLD}, "
                    f"MAX_WEIGHTS = {gemm.MAX_WEIGHTS};\n{struct}\n{checks}"
                    f"static_assert(sizeof(Call) == {ctypes.sizeof(gemm.Call)});\n")
    done = subprocess.run([compiler, "-std=c++17", "-fsyntax-only", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, value in (("MAX_WORLD", gemm.MAX_WORLD), ("MAX_WEIGHTS", gemm.MAX_WEIGHTS), ("BM", gemm.ROWS),
                        ("TILE_FLAGS", gemm.TILE_FLAGS)):
        assert re.search(rf"\b{name} = {value}\b", text), name


ORDER = r"""
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#define __device__
#define __forceinline__ inline
using std::max;
using std::min;
constexpr int BM = 128, BN = 128, GROUP = 8;
struct Params { int m, world, rank, n_tiles[4], ahead; const int* flags; int* flags_to[8]; };
%s
int main(int count, char** a) {
    Params p = {atoi(a[1]), atoi(a[2]), atoi(a[3]), {atoi(a[4])}, AHEAD};
    const int tm = tiles_of_rows(p), tn = p.n_tiles[0], step = atoi(a[5]);
    if (count > 6) p.flags = (int*)atoll(a[6]);
    for (int i = 7; i < count; i++) p.flags_to[i - 7] = (int*)atoll(a[i]);
    for (int t = 0; t < p.world * tm * tn; t++) {
        const Tile tile = tile_at(p, t, tm, tn, step, CLUSTER - 1);
        if (count == 6) {
            printf("%%d %%d %%d %%d\n", tile.shard, tile.row, tile.column, tile.index);
            continue;
        }
        for (int program = 0; program < CLUSTER; program++)
            for (int wg = 0; wg < (TURNS ? 1 : 2); wg++) {
                const Tile tile = tile_at(p, t, tm, tn, step, program);
                if (tile.shard != p.rank) printf("set %%lld\n", (long long)flag_to(p, tile, wg));
                else for (int source = 0; source < p.world; source++)
                    if (source != p.rank) printf("awaited %%lld\n", (long long)flag_from(p, tile, wg, source, tm * tn * CLUSTER));
            }
    }
}
"""


def order(tmp_path: Path, **defines: int) -> Path:
    """A program of gemm.cu's order of tiles, and of their flags."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("there is no g++ here")
    text = gemm._SOURCE.read_text()
    order = re.search(r"^struct Tile \{.*?(?=^// The tiles of a warp)", text, re.S | re.M).group()
    flags = re.search(r"^constexpr int TILE_FLAGS.*?$", text, re.M).group()
    file, made = tmp_path / "order.cpp", tmp_path / "order"
    file.write_text("".join(f"#define {name} {value}\n" for name, value in defines.items()) + ORDER % f"{flags}\n{order}")
    subprocess.run([compiler, "-std=c++17", "-o", str(made), str(file)], check=True)
    return made


@pytest.mark.parametrize(("reduce", "ahead"), [(0, 0), (1, 1), (1, 2), (1, 1 << 20)])
def test_every_tile_is_made_once_and_in_time(tmp_path, reduce, ahead):
    """All ranks make the same tiles, and none waits for one that a peer makes later: then the first that waits never waits for
    ever. From the start to near the end something is on its way."""
    made = order(tmp_path, REDUCE=reduce, AHEAD=ahead, TURNS=0, CLUSTER=2)
    for m, world, tn, step in itertools.product((1, 300, 2048, 5000), (1, 2, 4, 8), (1, 7, 43), (66, 132)):
        at = []
        for rank in range(world):
            said = subprocess.run([str(made), *map(str, (m, world, rank, tn, step))], capture_output=True, text=True, check=True)
            tiles = [tuple(map(int, line.split())) for line in said.stdout.splitlines()]
            at.append({(shard, index): t for t, (shard, _, _, index) in enumerate(tiles)})
            assert {(shard, row, column) for shard, row, column, _ in tiles} == set(itertools.product(
                range(world), range(128, -(-m // 256) * 256, 256), range(0, 128 * tn, 128)))
            assert len(at[-1]) == len(tiles) == world * -(-m // 256) * tn
        for (shard, index), t in at[0].items() if reduce and world > 1 else ():
            if shard == 0:
                late = [t - at[peer][0, index] for peer in range(1, world)]
                assert all(after > 0 for after in late)
                enough = ahead * step
                assert world > 2 or tn * -(-m // 256) < enough + 1 or min(late) >= enough - 1, (m, world, tn, step, index, late)


@pytest.mark.parametrize("loopback", [False, True])
@pytest.mark.parametrize(("turns", "cluster"), [(0, 1), (0, 2), (1, 1), (1, 2)])
def test_a_partial_sum_is_awaited_where_its_flag_is_set(tmp_path, monkeypatch, turns, cluster, loopback):
    """What the kernel makes of the addresses that the backend gives it, on every rank: each flag is set once, waited for once,
    and one of those that the call asked the workspace for. Tiles are fetched from where they were stored for that rank, within
    what the call asked for, and those for other ranks lie elsewhere."""
    made, n = order(tmp_path, REDUCE=1, AHEAD=1, TURNS=turns, CLUSTER=cluster), 1288
    launched, asked = [], []
    monkeypatch.setattr(gemm, "load", lambda config: None)
    monkeypatch.setattr(gemm, "launch", lambda config, call: launched.append(call))
    monkeypatch.setattr(device, "processors", lambda device: 132)
    monkeypatch.setattr(scatters, "prepare", lambda space, op, *needs: asked.append(needs) or Transfer(space, op, 1))
    for world, m, columns in itertools.product((2, 4, 8), (1, 64, 65, 128) if cluster == 1 else (129, 511), (64, 128, 192, 256)):
        config = gemm.Config(False, columns, cluster, "reduce", turns=bool(turns))
        monkeypatch.setattr(gemm, "configure", lambda *_, config=config: config)
        found, stored, fetched = {"set": [], "awaited": []}, {}, {}
        memories = [torch.empty(1 << 21, dtype=torch.uint8) for _ in range(world)]
        x, w = torch.empty(m * world, 64, dtype=torch.bfloat16), torch.empty(n, 64, dtype=torch.bfloat16)
        for rank in range(1 if loopback else world):
            space = workspace.Workspace(
                "g", rank, world, 1 << 18, 1 << 13, 0, loopback, x.device, 1.0, (), torch.empty(2), torch.empty(8), None,
                [memories[0]] * world if loopback else memories, torch.empty(2, 2, dtype=torch.int32), None, False)
            monkeypatch.setattr(workspace, "of", lambda group, space=space: space)
            scatters.epilogue([x], [], [w], None, "bf16", torch.bfloat16, "g")
            call = launched.pop()
            stored |= {(rank, peer): call.sent[peer] for peer in range(world) if peer != rank}
            fetched |= {(peer, rank): call.partial[peer] for peer in range(world) if peer != rank}
            given = (m, world, rank, -(-n // columns), 7, call.flags, *call.flags_to[:world])
            said = subprocess.run([str(made), *map(str, given)], capture_output=True, text=True, check=True).stdout
            for line in said.splitlines():
                found[line.split()[0]].append(int(line.split()[1]))
        assert sorted(found["set"]) == sorted(found["awaited"]) and len(set(found["set"])) == len(found["set"])
        assert len(found["set"]) == (1 if loopback else world) * (world - 1) * gemm.tiles(config, m, n) * (2 - turns)
        nbytes, flags = asked[-1]
        starts = [Transfer(space, "", 1).flags(rank) for rank in range(world)]
        assert all(any(0 <= at - start < 4 * flags for start in starts) for at in found["set"])
        size, halves = gemm.tiles(config, m, n) * 128 * columns * 2, [Transfer(space, "", 1).data(rank) for rank in range(world)]
        if loopback:  # a peer's tiles for this rank are those that it made for the peer
            assert [stored[0, peer] for peer in range(1, world)] == [fetched[peer, 0] for peer in range(1, world)]
        else:
            assert stored == fetched
        assert all(0 <= at - halves[rank] <= nbytes - size for (rank, _), at in stored.items())
        for rank in range(1 if loopback else world):
            assert all(b - a >= size for a, b in itertools.pairwise(sorted(at for (by, _), at in stored.items() if by == rank)))


def test_the_tile_wastes_no_wave():
    """With 132 programs, (2048, 5120) is 2 x 8 x 32 tiles of 160 columns, four waves, and 16 x 20 of 256, three that are longer."""
    def columns(m, n, k, world=1, mode="plain", precise=False):
        return gemm.fastest(True, m, (n,), k, world, 132, mode, precise, False).columns

    assert columns(2048, 5120, 8192) == 160
    assert columns(4096, 28672, 8192) >= 160
    assert columns(2048, 5120, 8192, precise=True) <= 128
    assert gemm.fastest(True, 64, (5120,), 8192, 2, 132, "gather", False, False).cluster == 1
    assert columns(512, 8192, 4096, 2, "reduce") % 64 == 0
    assert gemm.tiles(gemm.Config(True, 256, 2), 129, 257) == 4


def test_at_the_power_limit_a_tile_saves_copies(monkeypatch):
    """Tiles of 160 columns in turns take fewer cycles of (4096, 28672), those of 256 less energy, and on an H200 less time."""
    monkeypatch.setattr(device, "processors", lambda device: 132)

    def config(m, n, k, mode="plain", world=1, fmt="fp8_tensor"):
        rows = m * world if mode == "reduce" else m
        x, w = (torch.empty(count, k, dtype=torch.float8_e4m3fn, device="meta") for count in (rows, n))
        found = gemm.configure(x, [w], fmt, world, mode)
        return found.columns, found.turns

    assert config(2048, 28672, 8192) == (160, True) and config(4096, 28672, 8192) == (256, False)
    assert config(2048, 14336, 8192, "gather", 2) == config(2048, 8192, 14336, "reduce", 2) == (256, False)
    assert config(1024, 8192, 14336, "reduce", 2) == config(1024, 8192, 14336, "reduce", 4) == (128, True)
    assert config(4096, 8192, 4096) == (256, False) and config(2048, 8192, 4096, "reduce", 2) == (192, True)  # the end counts more
    assert config(4096, 28672, 8192, fmt="fp8_token") == (160, True)
    monkeypatch.setattr(gemm.aten, "FAST_ACCUMULATION", False)
    assert config(4096, 28672, 8192)[0] <= 128


def test_partial_sums_have_time_to_arrive():
    """Two waves of large tiles, or of those in turns as many as take 11 us: a wave of 128 columns takes 4 us where k = 2048."""
    def ahead(columns, turns, k):
        return gemm.ahead(gemm.Config(True, columns, 2, "reduce", turns=turns), k)

    assert [ahead(128, True, k) for k in (2048, 4096, 14336)] == [3, 2, 1]
    assert [ahead(*tile, k) for tile in ((256, False), (192, True)) for k in (2048, 14336)] == [2] * 4
    assert ahead(256, False, 64) > 2


def test_a_gather_has_no_tile_whose_registers_are_spilled():
    """The tile of 192 columns in turns, which those that send nothing have."""
    def config(mode):
        return gemm.fastest(True, 4096, (14336,), 4096, 2, 132, mode, False, False)

    assert (config("gather").columns, config("reduce").columns) == (160, 192) and config("gather").turns


def test_a_tile_may_be_given(monkeypatch):
    monkeypatch.setattr(device, "processors", lambda device: 132)
    x, w = (torch.empty(count, 8192, dtype=torch.float8_e4m3fn, device="meta") for count in (4096, 28672))

    def config():
        found = gemm.configure(x, [w], "fp8_tensor", 1)
        return found.columns, found.turns, found.mode, found.cluster

    assert config() == (256, False, "plain", 2)
    with gemm.tile(96, True):
        assert config() == (96, True, "plain", 2)
    with gemm.tile(256, True):  # for whose sums there are too few registers
        assert config() == (256, False, "plain", 2)
    with pytest.raises(FusewireError), gemm.tile(96, True):
        raise FusewireError("it was not built")
    assert config() == (256, False, "plain", 2)


@pytest.mark.parametrize(("change", "sentence"), [
    (dict(fmt="nvfp4"), "it multiplies bf16, fp8_tensor and fp8_token, not nvfp4"),
    (dict(dtype=torch.float16), "not torch.float16 of"),
    (dict(x=[torch.zeros(4, 64)]), "not torch.bfloat16 of torch.float32"),
    (dict(w=[torch.zeros(12, 64).bfloat16()]), "n = 12 a multiple of 8"),
    (dict(w=[torch.zeros(16, 60).bfloat16()]), "k = 60 must be whole units of 16 bytes"),
    (dict(w=[torch.zeros(64, 16).bfloat16().t()]), "contiguous along k"),
    (dict(bias=torch.zeros(16)), "its bias must be contiguous bfloat16, not torch.float32"),
    ({}, "it runs on CUDA devices, not on cpu"),
])
def test_what_it_cannot_take_it_refuses(change, sentence):
    args = dict(x=[torch.zeros(4, 64).bfloat16()], w=[torch.zeros(16, 64).bfloat16()], bias=None, fmt="bf16", dtype=torch.bfloat16)
    assert sentence in gemm.why_not(**(args | change))


def test_rows_may_be_apart_or_are_copied():
    x = torch.zeros(8, 96, dtype=torch.bfloat16)
    assert gemm.rows_apart(x[:, 16:80]).data_ptr() == x[:, 16:].data_ptr()
    for odd in (x[:, 3:67], x.t(), x[:, ::2], x[:1].expand(4, 96)):
        y = gemm.rows_apart(odd)
        assert y.is_contiguous() and torch.equal(y, odd)


def test_without_a_compiler_it_says_so(cache, monkeypatch):
    monkeypatch.setattr(gemm, "nvcc", lambda: None)
    with pytest.raises(FusewireError, match="nvcc is neither in CUDA_HOME nor on the PATH; install the CUDA toolkit"):
        gemm.build(gemm.Config(True, 128))


def test_a_compiler_that_fails_is_named(cache, monkeypatch, tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'gemm.cu(7): error: no such thing' >&2\nexit 2\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(gemm, "nvcc", lambda: str(compiler))
    with pytest.raises(FusewireError, match=f"could not be built with {compiler}: gemm.cu.7.: error: no such thing"):
        gemm.build(gemm.Config(True, 128))
    assert not list(cache.glob("*"))


@pytest.mark.skipif(gemm.nvcc() is None, reason="there is no nvcc here")
@pytest.mark.parametrize("config", [gemm.Config(True, 256, 2, "reduce"), gemm.Config(True, 160, 1, "gather"),
                                    gemm.Config(False, 96), gemm.Config(True, 128, 2, "gather", True)], ids=str)
def test_it_builds_once(cache, config):
    built = gemm.build(config)
    assert [built] == list(cache.glob("*"))
    changed = built.stat().st_mtime_ns
    assert gemm.build(config) == built and built.stat().st_mtime_ns == changed
