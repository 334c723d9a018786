"""Run a function on real gloo ranks: processes that meet through a file, under a hard time limit."""
from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fusewire.launch import _device, _follows

GRACE_S = 0.3  # how long the other ranks may still report after the first failure


def run_ranks(fn: Callable, world_size: int, *args, timeout_s: float = 120) -> list:
    """Run `fn(rank, *args)` on `world_size` gloo ranks; what they returned, in rank order.

    fn may return whatever `torch.load(weights_only=True)` takes: tensors, numbers, strings, and lists and dicts of them.
    The default process group is ready when fn starts. Ranks are forked, so fn may be a closure; only when this process has
    started CUDA or a process group of its own are they spawned, and fn must then be importable.

    Raises the first failing rank's error, of the same type where that can be made from a sentence, its text led by
    "rank N: " and its traceback as the cause; RuntimeError for a rank that died; TimeoutError, naming the ranks that were
    still running (their stacks go to stderr).
    """
    # A forked child must not use threads that only its parent had: ranks run on one thread, and CUDA and gloo cannot be forked.
    forked = not (torch.cuda.is_initialized() or dist.is_initialized())
    ctx = multiprocessing.get_context("fork" if forked else "spawn")
    release = ctx.Event()
    with tempfile.TemporaryDirectory(prefix="fusewire-test-") as d:
        procs = [ctx.Process(target=_rank, args=(fn, r, world_size, args, d, timeout_s, release)) for r in range(world_size)]
        try:
            for p in procs:
                p.start()
            _wait(procs, Path(d), timeout_s)
            release.set()
            return [torch.load(Path(d, f"result{r}"), weights_only=True) for r in range(world_size)]
        finally:
            for p in procs:
                if p.pid and not release.is_set():
                    p.kill()
                if p.pid:
                    p.join()


def use_device() -> torch.device:
    """Rank side: this rank's CUDA device, now the current one; ranks share devices by turns where there are fewer."""
    return _device(dist.get_rank(), dist.get_world_size(), "cuda")


def _wait(procs: list, d: Path, timeout_s: float) -> None:
    """Until every rank has a result; raise on the first that cannot have one any more."""
    deadline = time.monotonic() + timeout_s
    while True:
        running = [r for r in range(len(procs)) if not (d / f"result{r}").exists()]
        dead = {r: procs[r].exitcode for r in running if procs[r].exitcode is not None}
        if not running:
            return
        if any(d.glob("error*.json")) or dead:
            time.sleep(GRACE_S)
            _raise([json.loads(p.read_text()) for p in d.glob("error*.json")], dead)
        if time.monotonic() > deadline:
            for r in running:
                os.kill(procs[r].pid, signal.SIGUSR1)
            time.sleep(GRACE_S)
            raise TimeoutError(f"ranks {running} of {len(procs)} still ran after {timeout_s} s; their stacks are on stderr")
        time.sleep(0.005)


def _raise(errors: list[dict], dead: dict[int, int]) -> None:
    if not [e for e in errors if not e["consequence"]] and dead:
        rank, code = next(iter(dead.items()))
        raise RuntimeError(f"rank {rank}: died by {signal.Signals(-code).name if code < 0 else f'exit code {code}'}")
    e = min(errors, key=lambda e: (e["consequence"], e["time"]))
    text = f"rank {e['rank']}: {e['text']}"
    cause = RuntimeError(f"in rank {e['rank']}:\n{e['traceback']}")
    try:
        error = getattr(importlib.import_module(e["module"]), e["type"])(text)
    except Exception:  # a type that is local to a function, or that wants other arguments
        error = RuntimeError(f"{e['type']}: {text}")
    raise error from cause


def _rank(fn: Callable, rank: int, world_size: int, args: tuple, d: str, timeout_s: float, release) -> None:
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    torch.set_num_threads(1)
    gc.freeze()  # what is there stays: each capture of a CUDA graph looks for garbage
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if inductor := sys.modules.get("torch._inductor.config"):
        inductor.compile_threads = 1  # read from the environment before the fork
    try:
        store = dist.FileStore(str(Path(d, "store")), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
        _publish(d, f"result{rank}", lambda p: torch.save(fn(rank, *args), p))
    except BaseException as e:
        report = {
            "rank": rank, "module": type(e).__module__, "type": type(e).__qualname__, "text": str(e), "time": time.monotonic(),
            "traceback": traceback.format_exc(), "consequence": _follows(e),
        }
        _publish(d, f"error{rank}.json", lambda p: p.write_text(json.dumps(report)))
    # A rank that left now would reset the connections of ranks that are still in a collective.
    release.wait(timeout_s)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _publish(d: str, name: str, write: Callable[[Path], object]) -> None:
    """Write a file that nobody sees half written."""
    part = Path(d, "part-" + name)
    write(part)
    part.rename(Path(d, name))
