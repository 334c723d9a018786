"""Start the ranks of one machine, watch them, and say in one line which rank failed first and what it was doing."""
from __future__ import annotations

import ctypes
import fcntl
import importlib
import json
import mmap
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import compat
from . import group as groups
from .errors import FusewireError, InputError

_HEAVY = ("transformers",)  # imported once, before the fork: 1 s a rank, and much more when all ranks import at once
_PHASE_BYTES = 256
_POLL_S = 0.2  # how late a signal to the launcher may be noticed
_REPORTS_S = 0.3  # how long other ranks may still report after the first failure
_SILENCE_S = 1.0  # the same while all that failed did so waiting for another rank
_GRACE_S = 1.5  # between SIGTERM and SIGKILL
_ENDED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
# NVLink multicast can take a shared host's GPUs out of service
NO_MULTICAST = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0", "NVSHMEM_DISABLE_NVLS": "1"}
_LOST = ("/gloo/", "Wait timeout", "failed to pass monitoredBarrier")  # in errors that have no type of their own


@dataclass(frozen=True)
class RankContext:
    """Who a rank is; phase(text) says what it is doing now ("loading model.layers.3", "idle"), for whoever reports its end.

    shared  other ranks run on the same CUDA device: their numbers are good, their times are not
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    phase: Callable[[str], object]
    shared: bool = False


@dataclass
class _Rank:
    """A rank as the launcher sees it."""

    process: BaseProcess
    line: connection.Connection
    report: dict = field(default_factory=dict)  # how it ended: done, refused (a FusewireError), failed (another exception) or died
    stopped: bool = False  # by SIGSTOP or a debugger, when another rank gave up waiting

    @property
    def failed(self) -> bool:
        return bool(self.report) and self.report["how"] != "done"


def launch(main: Callable[..., object], world_size: int, *args: object, timeout_s: float = 600.0, device: str | None = None) -> int:
    """Run `main(rank_context, *args)` on `world_size` ranks of this machine; the exit code for the command.

    Call it before any computation with torch, and do not ask for CUDA devices before. The ranks' default process group
    is ready when main starts. The first rank that fails ends all; the code is the FusewireError's own, 128 + signal
    for a rank (or this process) ended by a signal, else 1. Under torchrun nothing is started: main runs here, once.

    timeout_s  how long a rank waits in a collective for the others
    device     "cuda", "cpu", or None: CUDA devices if there are any. Ranks that have one each meet by NCCL, with gloo for
               tensors on the CPU; if there are fewer, ranks share them and meet by gloo.
    Raises InputError for a world_size below 1; under torchrun also what main raises, if that is not a FusewireError.
    """
    if world_size < 1:
        raise InputError(f"{world_size} ranks cannot be started; ask for 1 or more")
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return _join_torchrun(main, world_size, args, timeout_s, device)
    for module in _HEAVY:
        importlib.import_module(module)
    # Fork is safe here: modules were imported, but nothing was computed, so no OpenMP or autograd thread exists whose
    # locks a child could inherit, and no CUDA context, which cannot be forked; a process that has one spawns its ranks.
    ctx: Any = multiprocessing.get_context("spawn" if _cuda_started() else "fork")
    with _folder() as folder, _signals() as received:
        status = _status(folder, world_size)
        ranks: list[_Rank] = []
        try:
            for r in range(world_size):
                status(r, "starting")
                here, there = ctx.Pipe()
                process = ctx.Process(target=_rank, args=(main, args, r, world_size, folder, os.getpid(), timeout_s, there, device))
                process.start()
                there.close()
                ranks.append(_Rank(process, here))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDED_BY)
            _watch(ranks, received)
        finally:
            _end(ranks)
        if received:
            return 128 + received[0]
        return _tell(ranks, [status(r) for r in range(world_size)])


def _rank(
    main: Callable[..., object], args: tuple, rank: int, world_size: int, folder: Path, launcher: int, timeout_s: float,
    line: connection.Connection, wanted: str | None,
) -> None:
    """The whole life of a rank's process."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before prctl could tell
        os._exit(1)
    for s in (signal.SIGINT, signal.SIGHUP):  # a terminal sends these to every process; the launcher decides
        signal.signal(s, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDED_BY)
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # Neither library authenticates its connections, so neither may listen where another machine could reach it.
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    status = _status(folder, world_size)
    report: dict = {"how": "done"}
    try:
        device = _device(rank, world_size, wanted)
        shared = _shared(device, world_size)
        _init(device, shared, timeout_s, store=dist.FileStore(str(folder / "store"), world_size), rank=rank, world_size=world_size)
        main(RankContext(rank, world_size, rank, device, lambda text: status(rank, text), shared), *args)
    except SystemExit as e:
        if e.code:
            raise
    except FusewireError as e:
        report = {"how": "refused", "text": str(e), "code": e.exit_code, "follows": _follows(e)}
    except BaseException as e:
        report = {"how": "failed", "error": type(e).__name__, "text": traceback.format_exc(), "follows": _follows(e)}
    sys.stdout.flush()
    line.send_bytes(json.dumps(report | {"time": time.monotonic()}).encode())
    # A rank that left now would reset connections that others still use, and hide the first failure behind theirs.
    line.recv_bytes()
    if dist.is_initialized():
        _leave()


def _join_torchrun(main: Callable[..., object], world_size: int, args: tuple, timeout_s: float, wanted: str | None) -> int:
    rank, size, local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    doing = ["starting"]
    try:
        if size != world_size:
            raise InputError(f"torchrun started {size} ranks where {world_size} were asked for; make the two numbers equal")
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        device = _device(local, ranks_here, wanted)
        shared = _shared(device, ranks_here)
        _init(device, shared, timeout_s, init_method="env://")
        main(RankContext(rank, size, local, device, lambda text: doing.__setitem__(0, text), shared), *args)
    except FusewireError as e:
        if _first_to_say(str(e), rank):
            print(f"fusewire: {e}", file=sys.stderr)
        return e.exit_code
    except Exception as e:
        e.add_note(f"fusewire: rank {rank} (pid {os.getpid()}) failed while {doing[0]}")
        raise
    _leave()
    return 0


def _leave() -> None:
    """Free what was kept for the ranks, and part."""
    assert dist.group.WORLD is not None
    groups.close(groups.of_process_group(dist.group.WORLD))
    dist.destroy_process_group()


def _first_to_say(text: str, rank: int) -> bool:
    """Whether no other rank under torchrun prints this sentence; before the ranks have met it is rank 0 that speaks."""
    if (pg := dist.group.WORLD) is None:
        return rank == 0
    try:
        return compat.process_group_store(pg).add(f"fusewire/said/{text}", 1) == 1
    except dist.DistError:  # the process that kept the store is gone: better said twice than not at all
        return True


def _device(local_rank: int, local_world_size: int, wanted: str | None) -> torch.device:
    os.environ |= NO_MULTICAST
    if wanted == "cpu" or not torch.cuda.is_available():
        if wanted != "cuda":
            return torch.device("cpu")
        raise InputError("the ranks were to run on CUDA devices, and none is visible here; leave --device out, or say cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    if _shared(device, local_world_size):
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    return device


def _shared(device: torch.device, local_world_size: int) -> bool:
    return device.type == "cuda" and torch.cuda.device_count() < local_world_size


def _init(device: torch.device, shared: bool, timeout_s: float, **how: Any) -> None:
    cuda: dict[str, Any] = {"device_id": device} if device.type == "cuda" and not shared else {}  # NCCL wants a device each
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **cuda, **how)


def _cuda_started() -> bool:
    """Whether this process has a CUDA context, by torch or by any other library (the driver then holds this device open)."""
    links = (os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd"))
    return torch.cuda.is_initialized() or any(os.path.islink(p) and os.readlink(p) == "/dev/nvidia-uvm" for p in links)


def _status(folder: Path, world_size: int) -> Callable[..., str]:
    """Read (rank) or write (rank, text) what a rank is doing: in shared memory, so that a killed rank's last words stay."""
    with open(folder / "status", "a+b") as f:
        f.truncate(world_size * _PHASE_BYTES)
        memory = mmap.mmap(f.fileno(), 0)

    def status(rank: int, text: str | None = None) -> str:
        here = slice(rank * _PHASE_BYTES, (rank + 1) * _PHASE_BYTES)
        if text is not None:
            memory[here] = text.encode()[:_PHASE_BYTES].ljust(_PHASE_BYTES, b"\0")
        words = memory[here].rstrip(b"\0").decode(errors="replace")
        return "".join(c if c.isprintable() else "?" for c in words)  # it goes into one line

    return status


@contextmanager
def _folder() -> Iterator[Path]:
    """A fresh folder of mode 0700, removed at the end; those that killed launchers left behind are removed at the start."""
    for old in Path(tempfile.gettempdir()).glob("fusewire-launch-*/lock"):
        try:
            with open(old, "r+b") as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if old.parent.lstat().st_uid == os.getuid():
                    shutil.rmtree(old.parent, ignore_errors=True)
        except OSError:  # still in use, somebody else's, or gone meanwhile
            continue
    folder = Path(tempfile.mkdtemp(prefix="fusewire-launch-"))
    try:
        with open(folder / "new", "wb") as lock:  # open here and in the ranks, so locked while any of them lives
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "new").rename(folder / "lock")
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a cleaner of temporary files may have been here first


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that asked this process to end, as they come; blocked until the ranks are started."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread alone
        yield received
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDED_BY)
    before = {s: signal.signal(s, lambda number, frame: received.append(number)) for s in _ENDED_BY}
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _watch(ranks: list[_Rank], received: list[int]) -> None:
    """Until all ranks reported, or one failed and the others had the time to say whether they failed before it."""
    first = None
    while not received:
        for r in ranks:
            _hear(r)
        failed = [r for r in ranks if r.failed]
        if all(r.report for r in ranks):
            return
        if failed:
            first = first or time.monotonic()
            if time.monotonic() > first + (_SILENCE_S if all(r.report["follows"] for r in failed) else _REPORTS_S):
                for r in ranks:
                    r.stopped = not r.report and _is_stopped(r.process.pid)
                return
        quiet = [r for r in ranks if not r.report]
        connection.wait([r.line for r in quiet] + [r.process.sentinel for r in quiet], timeout=0.05 if failed else _POLL_S)


def _hear(r: _Rank) -> None:
    """Take a rank's report, or note its death."""
    if r.report:
        return
    try:
        if r.line.poll():
            r.report = json.loads(r.line.recv_bytes())
            return
    except (EOFError, ConnectionError):  # its end of the line closes a moment before it is dead
        r.process.join(1.0)
    if (code := r.process.exitcode) is not None:
        # A collective whose peer is gone may abort its process.
        r.report = {"how": "died", "code": code, "follows": code == -signal.SIGABRT, "time": time.monotonic()}


def _end(ranks: list[_Rank]) -> None:
    """Every rank is gone when this returns: by itself when all are done, else by SIGTERM and, after a grace, SIGKILL."""
    done = [bool(r.report) and not r.failed for r in ranks]
    for r in ranks:
        if all(done):
            with suppress(BrokenPipeError):  # killed after its work was done: nothing is lost
                r.line.send_bytes(b"end")
        elif r.stopped:  # it would not hear SIGTERM
            r.process.kill()
        elif r.process.exitcode is None:
            r.process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for r in ranks:
        r.process.join(max(0.0, deadline - time.monotonic()))
    for r in ranks:
        if r.process.exitcode is None:
            r.process.kill()
    for r in ranks:
        r.process.join()
        r.line.close()


def _tell(ranks: list[_Rank], doing: list[str]) -> int:
    """Print what ended the ranks, if it was a failure; the exit code."""
    failed = sorted((r for r in range(len(ranks)) if ranks[r].failed), key=lambda r: ranks[r].report["time"])
    if not failed:
        return 0
    blamed = _blame(ranks, failed)
    report = ranks[blamed[0]].report or {"how": "silent"}
    if report["how"] == "refused":
        print(f"fusewire: {report['text']}", file=sys.stderr)
        return report["code"]
    if report["how"] == "failed":
        print(report["text"], end="", file=sys.stderr)
    others = "; the other ranks were ended" if len(ranks) > len(blamed) else ""
    if report["how"] == "silent":
        first = ranks[failed[0]].report
        others = f"; rank {failed[0]} gave up waiting{': ' + first['text'] if first['how'] == 'refused' else ''}" + others
    print("fusewire: " + " and ".join(_sentence(ranks[r], r, doing[r]) for r in blamed) + others, file=sys.stderr)
    code = report.get("code", 1)
    return 128 - code if code < 0 else code or 1


def _blame(ranks: list[_Rank], failed: list[int]) -> list[int]:
    """The rank that failed first of its own; if all that failed had waited for others, the ranks they waited for."""
    own = [r for r in failed if not ranks[r].report["follows"]]
    silent = [r for r in range(len(ranks)) if not ranks[r].report]
    stopped = [r for r in silent if ranks[r].stopped]
    aborted = [r for r in failed if ranks[r].report["how"] == "died"]
    return own[:1] or stopped or aborted[:1] or silent or failed[:1]


def _sentence(r: _Rank, rank: int, doing: str) -> str:
    if not r.report:
        what = "was stopped" if r.stopped else "did not answer"
    elif r.report["how"] == "failed":
        what = f"failed with {r.report['error']}"
    elif r.report["code"] < 0:
        what = f"was killed by {_signal_name(-r.report['code'])}"
    else:
        what = f"exited with code {r.report['code']}"
    return f"rank {rank} (pid {r.process.pid}) {what} while {doing}"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _is_stopped(pid: int | None) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"


def _follows(e: BaseException | None) -> bool:
    """Whether an error only says that another rank is gone or late: gloo, NCCL or the store lost it, or waited in vain."""
    seen = []
    while e is not None and e not in seen:
        seen.append(e)
        if isinstance(e, dist.DistError) or (isinstance(e, RuntimeError) and any(words in str(e) for words in _LOST)):
            return True
        e = e.__cause__ or e.__context__
    return False
