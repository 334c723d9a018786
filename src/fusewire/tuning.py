"""What was measured on a machine: how fast each backend of an op is, by shapes and token count; and who chooses by it.

A tuning file is JSON: `version`, `gpu`, `world_size`, `loopback`, `torch`, `date`, `entries` of `call` (`Op.call`), `tokens`
(dim 0 of the call's activation), `candidate` and `us`, and `hash`, of all the rest.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import consensus
from . import group as groups
from .config import NVLINK, Link
from .errors import InputError
from .group import Group

VERSION = 1
PACKAGED = Path(__file__).parent / "tuned"


@dataclass(frozen=True, eq=False)
class Tuning:
    """The measurements of one machine; `us` is call -> tokens -> candidate -> microseconds, the candidates in order of trial."""

    gpu: str
    world_size: int
    loopback: bool
    torch: str
    date: str
    us: dict[str, dict[int, dict[str, float]]]

    def fastest(self, call: str, tokens: int, names: Sequence[str]) -> str | None:
        """Which of the candidates `names` was fastest, at the measured token count nearest in logarithm (the smaller of two as
        near); None if none of them was measured for this call."""
        measured = {m: found for m, us in self.us.get(call, {}).items() if (found := {n: us[n] for n in names if n in us})}
        if not measured:
            return None
        at = min(sorted(measured), key=lambda m: abs(math.log2(max(m, 1)) - math.log2(max(tokens, 1))))
        return min(measured[at], key=measured[at].__getitem__)

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self._body(), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"measured {self.date}, tuning {self.hash}{', loopback' if self.loopback else ''}"

    def _body(self) -> dict[str, Any]:
        entries = [{"call": call, "tokens": tokens, "candidate": name, "us": us} for call, sizes in self.us.items()
                   for tokens, found in sizes.items() for name, us in found.items()]
        return {"version": VERSION, "gpu": self.gpu, "world_size": self.world_size, "loopback": self.loopback, "torch": self.torch,
                "date": self.date, "entries": entries}

    def text(self) -> str:
        """As a file, an entry a line."""
        body = self._body()
        entries = ",\n".join(json.dumps(e) for e in body.pop("entries"))
        return f'{json.dumps(body | {"hash": self.hash})[:-1]}, "entries": [\n{entries}\n]}}\n'


def parse(text: str, where: str) -> Tuning:
    """The tuning in the text of a file called `where`; InputError if it is not one, or not as it was written."""
    again = "run `fusewire tune` again"
    data: Any
    try:
        data = json.loads(text)
        if (version := data["version"]) != VERSION:
            raise InputError(f"the tuning {where} is of version {version}, and this Fusewire reads version {VERSION}; {again}")
        us: dict[str, dict[int, dict[str, float]]] = {}
        for e in data["entries"]:
            us.setdefault(e["call"], {}).setdefault(int(e["tokens"]), {})[e["candidate"]] = float(e["us"])
        found = Tuning(**{k: data[k] for k in ("gpu", "world_size", "loopback", "torch", "date")}, us=us)
        given = data["hash"]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"the tuning {where} is not a file that `fusewire tune` wrote ({e!r}); {again}") from None
    if found.hash != given:
        raise InputError(f"the tuning {where} was changed after it was written (its hash is {found.hash}, not {given}); {again}")
    return found


def read(path: str | Path) -> Tuning:
    """The tuning in a file; InputError if it cannot be used."""
    return parse(_contents(path), str(path))


def _machine(gpu: str, world_size: int, loopback: bool, version: str) -> str:
    return f"{world_size} ranks on {gpu}{', in loopback' if loopback else ''}, torch {version}"


def earlier(path: Path, gpu: str, world_size: int, loopback: bool) -> Tuning | None:
    """What the file has already that measurements of this machine are to be written to; None if there is no such file. InputError
    if it is something else, or of another machine."""
    if not path.exists():
        return None
    try:
        found = read(path)
    except InputError:
        raise InputError(f"{path} exists and is not a tuning that can be added to; move it away, or give another -o") from None
    there = _machine(found.gpu, found.world_size, found.loopback, found.torch)
    here = _machine(gpu, world_size, loopback, torch.__version__)
    if there != here:
        raise InputError(f"{path} was measured with {there}, and this is {here}; give another -o")
    return found


def write(path: Path, found: Tuning, before: Tuning | None = None) -> None:
    """What was found, and of other calls what was in the file `before`; the file is whole, whenever this ends."""
    us = (before.us if before else {}) | found.us
    whole = path.with_name(f"{path.name}.new")
    whole.write_text(replace(found, us=us).text(), encoding="utf-8")
    whole.replace(path)


def gpu_name(device: torch.device) -> str:
    """By what a tuning names the machine: the CUDA device's name, or "cpu"; "cuda" where there is no such device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type


def asked_for(path: str | None) -> str | None:
    """The tuning file that a config's path or else the environment names."""
    return path or os.environ.get("FUSEWIRE_TUNING") or None


def load(path: str | None, group: Group, device: torch.device) -> Tuning | None:
    """The tuning for a group of ranks on devices like this: the file at `path`, or at $FUSEWIRE_TUNING, or a packaged one.

    Rank 0 reads, and all ranks use what it read. None if no file is named and none is packaged, or if it was measured with
    another number of ranks. A named one is an InputError, on every rank, if it cannot be read, was measured on another GPU, or
    was measured in loopback and the group is not.
    """
    gpu, loopback = gpu_name(device), groups.kind(group.name) == "loopback"

    def find() -> tuple[str, str]:
        if (named := asked_for(path)) is not None:
            found = read(named)
            if found.gpu != gpu:
                raise InputError(f"the tuning {named} was measured on {found.gpu}, and this is {gpu}; run `fusewire tune` here")
            if found.loopback and not loopback:
                raise InputError(f"the tuning {named} was measured in loopback; run `fusewire tune` without --loopback")
            return _contents(named), named
        for file in sorted(PACKAGED.glob("*.json")):
            found = read(file)
            if (found.gpu, found.world_size, found.loopback) == (gpu, group.world_size, False):
                return _contents(file), file.name
        return "", ""

    text, where = consensus.from_first(group, "tuning", find)
    found = parse(text, where) if text else None
    consensus.agree(group, "tuning", {"gpu": gpu, "hash": found.hash if found else ""})
    return found if found and found.world_size == group.world_size else None


@dataclass(frozen=True, eq=False)
class Chooser:
    """By what the ops of a group choose among their backends."""

    measured: Tuning | None
    link: Link


_DEFAULT = Chooser(None, NVLINK)
_used: dict[str, Chooser] = {}


def use(group: Group, measured: Tuning | None, link: Link) -> None:
    """Let the ops of a group choose by these measurements, and where there are none by a model of the cost over `link`."""
    old = _used.get(group.name)
    if old and old.link == link and (old.measured.hash if old.measured else "") == (measured.hash if measured else ""):
        return  # what was chosen by it is remembered
    if old is None:
        groups.on_close(group.name, lambda: forget(group.name))
    _used[group.name] = Chooser(measured, link)


def forget(group: str) -> None:
    """Let the ops of a group choose as if `use` had never been called."""
    _used.pop(group, None)


def of(group: str) -> Chooser:
    """By what the ops of the group called `group` choose."""
    return _used.get(group, _DEFAULT)


def _contents(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8"
        raise InputError(f"the tuning {path} cannot be read ({reason}); give a file that `fusewire tune` wrote") from None


