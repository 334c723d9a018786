"""The examples run as a user would run them, and the README's commands are ones that the command takes."""
from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fusewire
from fusewire import cli
from fusewire.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 200  # seconds of one example, on a busy machine

SAYS = {
    "quickstart.py": ["4 of 6 collectives fused", "tokens equal to those of the unfused model: True"],
    "adopt_functional.py": ["4 of 5 collectives fused, sharded plan", "close to the model as it was written: True"],
    "custom_op.py": ["0: fused, into all_gather_matmul; into matmul_reduce_scatter; 16384 bytes before, 10240 after",
                     "largest difference from the library's own ops: "],
}


def test_every_example_is_tested():
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == set(SAYS)


@pytest.mark.dist
@pytest.mark.parametrize("name", SAYS)
def test_example(name, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}
    with subprocess.Popen([sys.executable, ROOT / "examples" / name], cwd=tmp_path, env=env, text=True, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        try:
            out, err = p.communicate(timeout=LIMIT_S)
        except BaseException:
            os.killpg(p.pid, signal.SIGKILL)  # its ranks too
            raise
    assert p.returncode == 0, f"{out}\n{err}"
    for sentence in SAYS[name]:
        assert sentence in " ".join(out.split()), f"{out}\n{err}"


def commands(text: str) -> list[list[str]]:
    """The arguments of every `fusewire ...` line in the code blocks of a Markdown text; a line may go on behind a backslash."""
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)).replace("\\\n", " ")
    lines = re.findall(r"^ *(?:\$ )?(?:\w+=\S+ )*(?:torchrun .* )?fusewire +(.*)$", blocks, re.M)
    return [shlex.split(line, comments=True) for line in lines]


def test_commands_are_found():
    text = ("```\n$ fusewire run --demo \\\n    -tp 2  # two\nOMP_NUM_THREADS=1 fusewire explain --no-such\nthe fusewire run\n```\n"
            "fusewire run\n")
    assert commands(text) == [["run", "--demo", "-tp", "2"], ["explain", "--no-such"]]
    cli.parser().parse_args(commands(text)[0])
    with pytest.raises((SystemExit, InputError)):
        cli.parser().parse_args(commands(text)[1])


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_documented_commands_parse(file):
    found = commands((ROOT / file).read_text())
    assert found or file != "README.md", "the README shows no command"
    for args in found:
        parsed = cli.parser().parse_args(args)
        if hasattr(parsed, "rule"):
            parsed.tuning = None  # a file that the reader's own `fusewire tune` writes
            cli.config_of(parsed)  # also knows the rules that it names


def test_documented_make_targets_exist():
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for file in ("README.md", "CONTRIBUTING.md"):
        blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", (ROOT / file).read_text(), re.S | re.M))
        assert set(re.findall(r"^(?:\$ )?make ([a-z-]+)", blocks, re.M)) <= made, file


def test_documented_paths_exist():
    for file in ("README.md", "CONTRIBUTING.md", "docs/architecture.md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / file).read_text()):
            assert (ROOT / file).parent.joinpath(link).exists(), f"{file}: {link}"


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_documented_python_parses_and_its_names_exist(file):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / file).read_text(), re.S | re.M)
    assert blocks
    for block in blocks:
        ast.parse(block)
        for name in re.findall(r"\bfusewire\.(\w+)\(", block):
            assert getattr(fusewire, name), name
        for module, names in re.findall(r"^from (fusewire[\w.]*) import (.+)$", block, re.M):
            for name in names.split(","):
                assert hasattr(importlib.import_module(module), name.strip()), (module, name)
