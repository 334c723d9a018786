"""The command, as its user starts it and in a copy of this process."""
from __future__ import annotations

import faulthandler
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

from fusewire.cli import main

FUSEWIRE = [sys.executable, "-m", "fusewire.cli"]


def fusewire(*args: object, timeout: float = 240) -> subprocess.CompletedProcess:
    return subprocess.run([*FUSEWIRE, *map(str, args)], capture_output=True, text=True, timeout=timeout)


def forked(folder: Path, *args: object, timeout: float = 240) -> subprocess.CompletedProcess:
    """The same in a copy of this process, which has imported everything already."""
    files = [folder / "stdout", folder / "stderr"]

    def run() -> None:
        for fd, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND, 0o600), fd)
        faulthandler.disable()  # pytest's
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
        code = main([*map(str, args)])
        sys.stdout.flush()
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"it runs after {timeout} s")
    return subprocess.CompletedProcess(args, process.exitcode, *(file.read_text() for file in files))
