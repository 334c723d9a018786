"""Ranks that die, fail, hang or are told to end: one line names the right one, and nothing is left behind."""
import faulthandler
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dist import run_ranks

from fusewire import launch as launcher
from fusewire.consensus import agree
from fusewire.errors import InputError, MismatchError, StrictError
from fusewire.launch import launch

pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]

PHASES = {
    "starting": None, "loading": "loading model.layers.3", "compiling": "compiling", "decoding": "decoding 12", "idle": "idle",
}


class Run:
    """A launcher in a process of its own, as a command would be; its ranks, its output, its end."""

    def __init__(self, folder: Path, main, world: int, *args, **options):
        self.folder, self.world = folder, world
        (folder / "tmp").mkdir(exist_ok=True)
        for old in folder.glob("rank*.json"):
            old.unlink()
        self.start = time.monotonic()
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(main, world, args, options))
        self.process.start()

    def _run(self, main, world, args, options):
        dist.set_debug_level(options.pop("debug", dist.DebugLevel.OFF))  # torch's own lines on stderr are not ours
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(self.folder / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND, 0o600), fd)
        faulthandler.disable()  # pytest's, which would tell its own stderr of a rank that aborts
        if (devices := options.pop("cuda", "")) is not None:  # ranks on CPUs, however many GPUs there are
            os.environ["CUDA_VISIBLE_DEVICES"] = devices
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
        launcher.tempfile.tempdir = str(self.folder / "tmp")
        os._exit(launch(self._main, world, main, self.folder, *args, **options))

    @staticmethod
    def _main(ctx, main, folder, *args):
        said(folder, ctx.rank)
        main(ctx, folder, *args)

    def pids(self, file: str = "rank") -> list[int]:
        """The ranks' process ids, once all have come that far."""
        deadline = time.monotonic() + 60
        while len(found := sorted(self.folder.glob(f"{file}?.json"))) < self.world:
            assert time.monotonic() < deadline, (found, self.err())
            time.sleep(0.01)
        return [json.loads(p.read_text()) for p in found]

    def end(self, within: float) -> int:
        """The exit code; everything is gone."""
        start = time.monotonic()
        self.process.join(within)
        assert self.process.exitcode is not None, f"the launcher runs after {within} s: {self.err()}"
        self.seconds = time.monotonic() - start
        if self.process.exitcode != -signal.SIGKILL:
            assert not [p for p in self.folder.glob("rank?.json") if alive(json.loads(p.read_text()))]
            assert not list((self.folder / "tmp").iterdir())
        return self.process.exitcode

    def out(self) -> str:
        return (self.folder / "out").read_text()

    def err(self) -> str:
        return (self.folder / "err").read_text()


@pytest.fixture
def run(tmp_path):
    runs = []

    def start(main, world, *args, **options):
        runs.append(Run(tmp_path, main, world, *args, **options))
        return runs[-1]

    yield start
    for r in runs:
        if r.process.exitcode is None:
            r.process.kill()
            r.process.join()
    for pid in [json.loads(p.read_text()) for p in tmp_path.glob("rank?.json")]:  # of a test that failed
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether any thread of a process lives: its files, and with them its locks, stay open until the last has ended."""
    def state(thread: Path) -> str:
        try:
            return (thread / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "X"

    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(state(thread) not in "ZX" for thread in threads)


def said(folder: Path, rank: int, file: str = "rank", value=None) -> None:
    part = folder / f"part{rank}"
    part.write_text(json.dumps(os.getpid() if value is None else value))
    part.rename(folder / f"{file}{rank}.json")


def work(ctx, folder, phase: str) -> None:
    """A rank that gets to a phase and stays there."""
    if PHASES[phase]:
        ctx.phase(PHASES[phase])
    said(folder, ctx.rank, "there")
    while True:
        if phase == "decoding":
            dist.all_reduce(torch.ones(64))
        else:
            time.sleep(0.05)


def finish(ctx, folder) -> None:
    x = torch.tensor([ctx.rank + 1.0])
    dist.all_reduce(x)
    print(f"rank {ctx.rank} of {ctx.world_size} on {ctx.device}: {x.item():g}")


@pytest.mark.parametrize(("number", "what"), [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSTOP, "was stopped")])
def test_a_rank_that_is_lost_before_the_ranks_met(run, monkeypatch, number, what):
    def device(local_rank, *more):
        if local_rank == 1:
            os.kill(os.getpid(), number)
        return torch.device("cpu")

    monkeypatch.setattr(launcher, "_device", device)
    r = run(finish, 2, timeout_s=2.0)
    assert r.end(within=6) != 0
    assert re.fullmatch(rf"fusewire: rank 1 \(pid \d+\) {what} while starting; .*the other ranks were ended\n", r.err()), r.err()


KILLED = [(2, r, phase) for r in (0, 1) for phase in PHASES] + [(4, 0, "idle"), (4, 3, "decoding"), (4, 2, "starting")]


@pytest.mark.parametrize(("world", "rank", "phase"), KILLED)
def test_a_killed_rank_is_named_with_its_phase_and_all_end(run, world, rank, phase):
    r = run(work, world, phase)
    pids = r.pids("there")
    time.sleep(0.05)
    os.kill(pids[rank], signal.SIGKILL)
    assert r.end(within=5) == 128 + signal.SIGKILL
    assert r.err() == (
        f"fusewire: rank {rank} (pid {pids[rank]}) was killed by SIGKILL while {PHASES[phase] or 'starting'}; "
        "the other ranks were ended\n"
    )
    again = run(finish, world)
    assert again.end(within=20) == 0, again.err()


def test_ranks_meet_and_only_rank_0_prints(run):
    r = run(finish, 4)
    assert r.end(within=20) == 0
    assert r.out() == "rank 0 of 4 on cpu: 10\n" and r.err() == ""


def test_one_rank_alone(run):
    r = run(finish, 1)
    assert r.end(within=20) == 0 and r.out() == "rank 0 of 1 on cpu: 1\n"


def leave_early(ctx, folder) -> None:
    if ctx.rank == 1:
        time.sleep(0.5)
        assert alive(json.loads((folder / "rank0.json").read_text()))


def test_no_rank_leaves_before_all_are_done(run):
    r = run(leave_early, 2)
    assert r.end(within=20) == 0, r.err()


def fail(ctx, folder, kind: str) -> None:
    ctx.phase("loading\nmodel.layers.7")
    if ctx.rank == 1 and kind == "late":
        time.sleep(0.2)
    if ctx.rank == 1 or kind == "all":
        if kind == "refused":
            raise StrictError("one site was not fused")
        if kind == "all":
            raise InputError("no such file: weights.safetensors")
        if kind == "exit":
            sys.exit(7)
        if kind == "vanish":
            os._exit(0)
        if kind == "abort":
            os.abort()
        raise ZeroDivisionError("an original error")
    while kind == "abort":
        time.sleep(0.05)
    while True:
        dist.all_reduce(torch.ones(64))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["error", "late"])
def test_an_exception_of_one_rank_is_the_only_traceback(run, kind, world):
    r = run(fail, world, kind)
    pid = r.pids()[1]
    assert r.end(within=5) == 1
    assert r.err().startswith("Traceback") and r.err().count("Traceback") == 1 and "gloo" not in r.err()
    assert "in fail\n" in r.err() and "ZeroDivisionError: an original error\n" in r.err()
    last = f"fusewire: rank 1 (pid {pid}) failed with ZeroDivisionError while loading?model.layers.7; the other ranks were ended"
    assert r.err().splitlines()[-1] == last


@pytest.mark.parametrize(("kind", "code", "text"), [
    ("all", 2, "no such file: weights.safetensors"), ("refused", 3, "one site was not fused"),
])
def test_what_the_user_can_mend_is_said_once_and_alone(run, kind, code, text):
    r = run(fail, 2, kind)
    assert r.end(within=5) == code and r.err() == f"fusewire: {text}\n"


@pytest.mark.parametrize(("kind", "code", "what"), [
    ("exit", 7, "exited with code 7"), ("vanish", 1, "exited with code 0"), ("abort", 134, "was killed by SIGABRT"),
])
def test_a_rank_that_leaves_is_named(run, kind, code, what):
    r = run(fail, 2, kind)
    pid = r.pids()[1]
    assert r.end(within=5) == code
    assert r.err() == f"fusewire: rank 1 (pid {pid}) {what} while loading?model.layers.7; the other ranks were ended\n"


def consequence(ctx, folder) -> None:
    """Rank 1 fails in an ordinary way, but only after its peers' connections are gone and they have said so."""
    ctx.phase("decoding token 3")
    if ctx.rank == 1:
        dist.all_reduce(torch.ones(4))
        dist.destroy_process_group()
        time.sleep(0.15)
        raise ValueError("the cause")
    for _ in range(2):
        dist.all_reduce(torch.ones(4))


def test_a_lost_connection_is_not_mistaken_for_the_cause(run):
    r = run(consequence, 2)
    assert r.end(within=6) == 1
    assert "ValueError: the cause" in r.err() and "gloo" not in r.err()
    assert "rank 1" in r.err().splitlines()[-1]


def test_killing_the_launcher_leaves_no_orphan_and_the_next_run_cleans_up(run, tmp_path):
    r = run(work, 4, "idle")
    pids = r.pids("there")
    os.kill(r.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.02)
    r.process.join()
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    assert run(finish, 2).end(within=20) == 0  # and asserts that no folder is left


@pytest.mark.parametrize(("sent", "phase"), [(signal.SIGINT, "decoding"), (signal.SIGINT, "starting"), (signal.SIGTERM, "idle"),
                                             (signal.SIGHUP, "compiling")])
def test_a_signal_to_the_launcher_ends_it_quietly(run, sent, phase):
    r = run(work, 2, phase)
    pids = r.pids("there")
    for pid in pids if sent != signal.SIGTERM else []:  # a terminal's signal comes to every process, in any order
        os.kill(pid, sent)
    time.sleep(0.7)
    os.kill(r.process.pid, sent)
    assert r.end(within=5) == 128 + sent and r.err() == ""


def stubborn(ctx, folder) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    work(ctx, folder, "idle")


def test_ranks_that_ignore_sigterm_are_killed(run):
    r = run(stubborn, 2)
    pids = r.pids("there")
    os.kill(pids[0], signal.SIGKILL)
    assert r.end(within=5) == 137 and "rank 0" in r.err()


def stall(ctx, folder, kind: str, lag_s: float) -> None:
    dist.all_reduce(torch.ones(4))
    ctx.phase(f"decoding token {ctx.rank}")
    said(folder, ctx.rank, "there")
    if ctx.rank == 1:
        if kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "agree":
            time.sleep(30)
        while True:
            time.sleep(0.01)
    time.sleep(lag_s * (ctx.rank == 0))
    if kind == "agree":
        agree(dist.group.WORLD, "plan", {"x": 1}, timeout_s=1.5)
    dist.all_reduce(torch.ones(4))


@pytest.mark.parametrize(("kind", "world", "lag_s", "what"), [
    ("stopped", 2, 0, "was stopped while decoding token 1; rank 0 gave up waiting"),
    ("busy", 2, 0, "did not answer while decoding token 1; rank 0 gave up waiting"),
    ("stopped", 4, 1.0, "was stopped while decoding token 1; rank"),
    ("busy", 4, 0.5, "did not answer while decoding token 1; rank"),
    ("agree", 2, 0, "did not answer while decoding token 1; rank 0 gave up waiting: plan: rank 1 did not come within 1.5 s"),
])
def test_a_stuck_rank_is_named_by_the_time_out(run, kind, world, lag_s, what):
    r = run(stall, world, kind, lag_s, timeout_s=2.0)
    pids = r.pids("there")
    assert r.end(within=5) == 1
    assert r.seconds < 2 + lag_s + 2
    assert r.err().startswith(f"fusewire: rank 1 (pid {pids[1]}) {what}") and r.err().count("\n") == 1, r.err()


def test_a_stuck_rank_is_named_in_debug_mode(run):
    r = run(stall, 2, "busy", 0, timeout_s=2.0, debug=dist.DebugLevel.DETAIL)
    pid = r.pids("there")[1]
    assert r.end(within=5) == 1
    assert r.err().splitlines()[-1].startswith(f"fusewire: rank 1 (pid {pid}) did not answer while decoding token 1; rank 0")


def listeners(pids: list[int]) -> list[str]:
    """The local addresses, in hex, on which these processes listen."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            if (target := os.readlink(fd)).startswith("socket:["):
                inodes.add(target[8:-1])
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{pids[0]}/net/{name}").read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


def test_nothing_listens_beyond_loopback(run):
    r = run(work, 2, "decoding")
    pids = r.pids("there")
    found = listeners([r.process.pid, *pids])
    os.kill(r.process.pid, signal.SIGTERM)
    assert found and set(found) <= {"0100007F", "00000000000000000000000001000000"}, found
    assert r.end(within=5) == 143


def test_the_folder_of_a_run_is_private(run, tmp_path):
    r = run(work, 2, "idle")
    r.pids("there")
    (folder,) = (tmp_path / "tmp").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    os.kill(r.process.pid, signal.SIGINT)
    assert r.end(within=5) == 130


def differ(ctx, folder) -> None:
    try:
        agree(dist.group.WORLD, "plan", {"tuner": ["a", "b"][ctx.rank]}, timeout_s=20)
    except MismatchError as e:
        said(folder, ctx.rank, "heard", str(e))
        raise


def test_ranks_that_differ_end_with_one_sentence(run):
    r = run(differ, 2)
    assert r.end(within=10) == 1
    assert r.pids("heard") == [r.err()[len("fusewire: "):-1]] * 2 and '"a" on rank 0 and "b" on rank 1' in r.err()


def test_fewer_than_one_rank_is_refused():
    with pytest.raises(InputError, match="0 ranks"):
        launch(finish, 0)


def spawned(ctx, folder) -> None:
    said(folder, ctx.rank, "there", multiprocessing.get_start_method())
    finish(ctx, folder)


def test_ranks_are_spawned_when_cuda_runs_already(run, monkeypatch):
    monkeypatch.setattr(launcher, "_cuda_started", lambda: True)
    r = run(spawned, 2)
    assert r.end(within=50) == 0, r.err()
    assert r.out() == "rank 0 of 2 on cpu: 3\n" and r.pids("there") == ["spawn"] * 2


TORCHRUN = """
import sys
from fusewire.errors import InputError
from fusewire.launch import launch
import torch, torch.distributed as dist
def main(ctx, how):
    x = torch.ones(1)
    dist.all_reduce(x)
    if how == "refuse":
        raise InputError("no such file")
    ctx.phase("decoding token 3")
    if how == "fail" and ctx.rank == 1:
        raise ValueError("boom")
    print(f"rank {ctx.rank} of {ctx.world_size}: {x.item():g}", flush=True)
sys.exit(launch(main, 2, sys.argv[1], timeout_s=20))
"""


@pytest.mark.parametrize(("how", "texts"), [
    ("finish", ["rank 0 of 2: 2", "rank 1 of 2: 2"]),
    ("refuse", ["fusewire: no such file"]),
    ("fail", ["ValueError: boom\n", "fusewire: rank 1 (pid "]),
])
def test_under_torchrun_the_program_runs_as_it_is(tmp_path, how, texts):
    (tmp_path / "program.py").write_text(TORCHRUN)
    env = os.environ | {"TMPDIR": str(tmp_path), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, tmp_path / "program.py", how], capture_output=True, text=True, timeout=50, env=env)
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == (how == "finish"), said
    for text in texts:
        assert said.count(text) == 1, said


THREADS = """
import sys
import torch
import fusewire.bench.model, fusewire.bench.moe, fusewire.bench.ops, fusewire.cli, fusewire.engine.session, fusewire.engine.tune
from fusewire.launch import launch

def main(ctx):
    print(float(torch.ones(1 << 20, dtype=torch.bfloat16).float().mul(2).sum()), flush=True)

if __name__ == "__main__":
    sys.exit(launch(main, 2, timeout_s=20))
"""


def test_ranks_that_compute_with_several_threads(tmp_path):
    """Nothing that is imported may have computed with them before the ranks are forked."""
    (tmp_path / "program.py").write_text(THREADS)
    env = os.environ | {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0 and done.stdout == "2097152.0\n", done.stdout + done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_with_another_number_of_ranks_is_refused_once(monkeypatch, capfd, rank):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert launch(finish, 3) == 2
    text = "fusewire: torchrun started 2 ranks where 3 were asked for; make the two numbers equal\n"
    assert capfd.readouterr().err == ("" if rank else text)


def test_the_helper_of_these_tests_raises_what_a_rank_raised():
    def rank(r):
        if r == 1:
            raise MismatchError("different")
        dist.barrier()

    with pytest.raises(MismatchError, match="rank 1: different"):
        run_ranks(rank, 2)


def test_the_helper_of_these_tests_sees_a_dead_rank():
    def rank(r):
        if r == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with pytest.raises(RuntimeError, match="rank 1: died by SIGKILL"):
        run_ranks(rank, 2)


def test_the_helper_of_these_tests_has_a_time_limit():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2"):
        run_ranks(lambda r: time.sleep(60 * r), 2, timeout_s=1)
    assert time.monotonic() - start < 4


# ---------------------------------------------------------------------------------------------- devices

@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that seems to have two CUDA devices; the device that was set."""
    set_to: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    for name in (*launcher.NO_MULTICAST, "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"):
        monkeypatch.setenv(name, "before")
    return set_to


@pytest.mark.parametrize(("rank", "ranks", "index", "backend"), [(1, 2, 1, "cpu:gloo,cuda:nccl"), (3, 4, 1, "gloo")])
def test_ranks_have_a_device_each_or_share(two_gpus, monkeypatch, rank, ranks, index, backend):
    device = launcher._device(rank, ranks, None)
    assert two_gpus == [device] == [torch.device("cuda", index)]
    assert {name: os.environ[name] for name in launcher.NO_MULTICAST} == launcher.NO_MULTICAST
    assert os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] == ("1" if ranks > 2 else "before")
    met: list[tuple] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **how: met.append((args, how.get("device_id"))))
    launcher._init(device, launcher._shared(device, ranks), 1.0)
    assert met == [((backend,), device if ranks == 2 else None)]


def test_the_device_can_be_asked_for(two_gpus, monkeypatch):
    assert launcher._device(0, 2, "cpu").type == "cpu" and two_gpus == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launcher._device(0, 2, None).type == "cpu"
    with pytest.raises(InputError, match="none is visible here; leave --device out, or say cpu"):
        launcher._device(0, 2, "cuda")
