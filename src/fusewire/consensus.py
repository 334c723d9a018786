"""Every rank decides the same: facts are compared before the first collective that depends on them.

Ranks that differ would otherwise hang, abort without a traceback, or return wrong numbers.
"""
from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import __version__, compat, group
from .errors import FusewireError, InputError, MismatchError

_SHOWN = 120  # characters of a value that a sentence shows
_calls: Counter[tuple[str, str]] = Counter()


def agree(over: group.Group | dist.ProcessGroup, topic: str, facts: Mapping[str, object], timeout_s: float = 60.0) -> None:
    """Return when every rank of the group holds the same `facts`; a group that is not of processes agrees with itself.

    over       a Group or a torch process group
    topic      what the ranks agree on, for example "plan"; ranks meet in their n-th call with the same topic
    facts      what must be the same, each value something that JSON holds; compared as JSON text
    timeout_s  how long to wait for a rank that does not come

    Raises MismatchError on every rank, with the key and the values; FusewireError, naming the ranks that did not come.
    """
    if isinstance(over, group.Group):
        if over.name in group._made:
            return
        over = compat.process_group(over.name)
    if over.size() == 1 or dist.get_backend(over) == "fake":
        return
    _calls[over.group_name, topic] += 1
    # Through the store and not a collective: ranks that disagree on shapes or order crash or hang inside a collective.
    store = compat.process_group_store(over)
    ranks = dist.get_process_group_ranks(over)
    base = f"fusewire/agree/{topic}/{_calls[over.group_name, topic]}/"
    keys = [f"{base}{r}" for r in ranks]
    store.set(f"{base}{dist.get_rank()}", json.dumps({k: _canonical(v) for k, v in facts.items()}))
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as e:
        if missing := [r for r, key in zip(ranks, keys, strict=True) if not store.check([key])]:
            store.set(f"{base}gave_up", str(dist.get_rank()))
            raise FusewireError(f"{topic}: {_ranks(missing)} did not come within {timeout_s:g} s") from e
    if difference := _difference(topic, {r: json.loads(store.get(key)) for r, key in zip(ranks, keys, strict=True)}):
        raise MismatchError(difference)
    if store.check([f"{base}gave_up"]):  # a rank that comes late must not go on alone
        by = store.get(f"{base}gave_up").decode()
        raise FusewireError(f"{topic}: rank {by} gave up waiting, after {timeout_s:g} s, for a rank that came too late")


def from_first(over: group.Group, topic: str, make: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """What `make` returned on rank 0 of the group, plain JSON values, on every rank; an InputError of its on every rank too.

    In a group that is not of processes every rank makes its own.
    """
    if over.world_size == 1 or over.name in group._made or dist.get_backend(compat.process_group(over.name)) == "fake":
        return make()
    pg = compat.process_group(over.name)
    _calls[over.name, f"from first: {topic}"] += 1
    store = compat.process_group_store(pg)
    key = f"fusewire/first/{topic}/{_calls[over.name, f'from first: {topic}']}"
    if dist.get_rank(pg) == 0:
        try:
            said = {"value": make()}
        except InputError as e:
            said = {"refused": str(e)}
        store.set(key, json.dumps(said))
    try:
        store.wait([key], timedelta(seconds=timeout_s))
    except RuntimeError as e:
        raise FusewireError(f"{topic}: rank 0 did not come within {timeout_s:g} s") from e
    said = json.loads(store.get(key))
    if "refused" in said:
        raise InputError(said["refused"])
    return said["value"]


def library_facts() -> dict[str, str]:
    """What must be the same on every rank before anything else: versions, a hash of Fusewire's own files, how FP8 is added up."""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": version("transformers"),
        "fusewire": __version__, "fusewire sources": _hash_of(Path(__file__).parent),
        "FP8 accumulation": os.environ.get("FUSEWIRE_FP8_ACCUMULATION", "fast"),
    }


def _hash_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:16]


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _difference(topic: str, facts: dict[int, dict[str, str]]) -> str | None:
    """The sentence about the first key whose value is not the same on all ranks."""
    differ = [k for k in sorted({k for f in facts.values() for k in f}) if len({f.get(k) for f in facts.values()}) > 1]
    if not differ:
        return None
    held: dict[str, list[int]] = {}
    for r, f in facts.items():
        held.setdefault(f.get(differ[0], "absent"), []).append(r)
    common = next(i for i, chars in enumerate(itertools.zip_longest(*held)) if len(set(chars)) > 1)
    values = " and ".join(f"{_excerpt(text, common)} on {_ranks(ranks)}" for text, ranks in held.items())
    more = f" ({len(differ) - 1} more differ: {', '.join(differ[1:6])})" if len(differ) > 1 else ""
    return f"{topic}: {differ[0]!r} is {values}{more}; start every rank with the same files, flags and versions"


def _excerpt(text: str, around: int) -> str:
    start = max(0, min(around - _SHOWN // 2, len(text) - _SHOWN))
    end = start + _SHOWN
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
