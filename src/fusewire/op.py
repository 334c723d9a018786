"""An op is declared once: its reference is its schema, its fake, its oracle and the pattern its rule must recognise."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, fx
from torch.library import infer_schema
from torch.utils._python_dispatch import TorchDispatchMode

from . import compat, tuning
from . import group as groups
from .config import FLOPS_PER_S, Link

LIB = torch.library.Library("fusewire", "DEF")
OPS: dict[str, Op] = {}
MOST_REMEMBERED = 1 << 16  # calls of an op whose backend is remembered

At = Callable[[Any], int]


class Usage(NamedTuple):
    """What the unfused program of a call needs, for the `seconds` of a backend.

    bytes, messages  that one rank sends, see `Op.wire`
    flops            of its matmuls, see `Op.flops`
    """

    bytes: int
    messages: int
    flops: int
    link: Link
    world_size: int

    @property
    def wire_s(self) -> float:
        return self.bytes / self.link.bytes_per_s

    @property
    def matmul_s(self) -> float:
        return self.flops / FLOPS_PER_S


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    supports  (*args) -> None for yes, or the reason why not. It does not look at token counts, which may be symbolic, nor at
              the workspace.
    nbytes    (*args) -> bytes of the group's workspace that a call needs; sizes may be symbolic. None: it needs no workspace.
    seconds   (usage) -> how long a call takes if nothing was measured; None: nobody knows
    wire      (*args) -> (bytes, messages) that one rank sends, where these are not the unfused program's
    asks      it asks the device for sizes, so a CUDA graph cannot hold it
    note      (*args) -> what a report should say of how it runs a call, "" for nothing
    """

    name: str
    run: Callable
    supports: Callable[..., str | None]
    target: torch._ops.OpOverload
    nbytes: Callable[..., int] | None = None
    seconds: Callable[[Usage], float] | None = None
    wire: Callable[..., tuple[int, int]] | None = None
    asks: bool = False
    note: Callable[..., str] | None = None


def seconds_of_program(u: Usage) -> float:
    """Messages one after the other, and nothing hidden: `seconds` of the reference."""
    return u.messages * u.link.latency_s + u.wire_s + u.matmul_s


class Choice(NamedTuple):
    """What `Op.select` decided: the backend, why others were refused, and how it chose among the rest: by measurements or by
    the model of the cost, or "" if there was nothing to choose."""

    backend: Backend
    refused: list[str]
    how: str = ""


@dataclass(eq=False)
class Op:
    """A torch custom op `fusewire::NAME`, and what the compiler must know about it.

    reference  the meaning, in terms of aten and of other ops; never returns an input or a view of one
    tokens     names of the args whose dim 0 is tokens; non-empty means: works token by token, so cutting these args and
               then running it equals running it and then cutting every output, bit for bit
    rows       names of the args whose dim 0 counts tokens, where the op has backends to choose among by token count
    wire       (*args) -> bytes this rank sends; only primitive collectives say, a fused op costs what is inside it
    flops      (*args) -> floating-point operations of a matmul, those of two-byte elements counted twice; likewise
    fake       shapes only, where the reference cannot run on fake tensors (the primitive collectives)
    inside     (*args) -> calls, (op, args) each, of ops with backends of their own that every backend of this one makes, for
               reports: with shapes of no token
    opaque     Inductor cannot look into the reference, whose Python depends on the number of tokens

    Every backend is an overload of its own, `fusewire::NAME.BACKEND`, so a lowered graph shows what will run.
    The default overload picks at run time.
    """

    reference: Callable
    tokens: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    wire: Callable[..., int] | None = None
    flops: Callable[..., int] | None = None
    fake: Callable | None = None
    inside: Callable[..., list[tuple[Op, tuple]]] | None = None
    opaque: bool = False
    backends: list[Backend] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.reference.__name__
        self.schema = infer_schema(self.reference, mutates_args=())
        self.target = self._define("", self._run)
        self.params = [a.name for a in self.target._schema.arguments]
        self._reference = Backend("reference", self.reference, lambda *args: None, self._define("reference", self.reference),
                                  seconds=seconds_of_program)
        self._remembered: dict[Any, Callable] = {}
        if self.name in OPS:
            raise TypeError(f"the op {self.name} is declared twice")
        OPS[self.name] = self

    def _define(self, overload: str, run: Callable) -> torch._ops.OpOverload:
        name = f"{self.name}.{overload}" if overload else self.name
        LIB.define(name + self.schema, tags=compat.OP_TAGS)
        LIB.impl(name, run, "CompositeExplicitAutograd")
        LIB._register_fake(name, self.fake or self.reference)
        return getattr(getattr(torch.ops.fusewire, self.name), overload or "default")

    def __call__(self, *args):
        return self.target(*args)

    def _run(self, *args):
        if not self.backends:
            return self.reference(*args)
        group = self.group(*args)
        key = groups.workspaces.get(group), tuning.of(group), _facts(args)  # all that a choice depends on
        if (run := self._remembered.get(key)) is None:
            if len(self._remembered) >= MOST_REMEMBERED:
                self._remembered.clear()
            run = self._remembered[key] = self.select(*args).backend.run
        return run(*args)

    def backend(self, name: str, supports: Callable[..., str | None] = lambda *args: None,
                nbytes: Callable[..., int] | None = None,
                seconds: Callable[[Usage], float] | None = None,
                wire: Callable[..., tuple[int, int]] | None = None, asks: bool = False,
                note: Callable[..., str] | None = None) -> Callable[[Callable], Callable]:
        """Register an implementation, see `Backend`; its schema must equal the reference's."""

        def register(run: Callable) -> Callable:
            if (schema := infer_schema(run, mutates_args=())) != self.schema:
                raise TypeError(f"{self.name}.{name}: {schema} is not {self.schema}")
            self.backends.append(Backend(name, run, supports, self._define(name, run), nbytes, seconds, wire, asks, note))
            self._remembered.clear()
            return run

        return register

    def group(self, *args) -> str:
        """The name of the group among the args of a call, "" if the op has none."""
        return args[self.params.index("group")] if "group" in self.params else ""

    def candidates(self, *args, at: At = int) -> tuple[list[Backend], list[str]]:
        """The backends that can run these args (real or fake), the reference last; and why the others cannot.

        at  (size) -> its value, where sizes are symbolic
        """
        able, refused = [], []
        for b in self.backends:
            why = b.supports(*args)
            if why is None and b.nbytes is not None:
                why = _no_room(b.nbytes, self.group(*args), args, at)
            if why is None:
                able.append(b)
            else:
                refused.append(f"{b.name}: {why}")
        return [*able, self._reference], refused

    def select(self, *args, at: At = int) -> Choice:
        """Of the backends that can run these args, the one that was measured fastest. Where nothing was measured, the one that
        should be fastest by its `seconds`; the first, if one of them does not say. Ties go to the earlier one."""
        able, refused = self.candidates(*args, at=at)
        if len(able) == 1:
            return Choice(able[0], refused)
        used = tuning.of(group := self.group(*args))
        by_name = {b.name: b for b in able}
        if used.measured and (best := used.measured.fastest(*self.call(*args, at=at), list(by_name))):
            return Choice(by_name[best], refused, str(used.measured))
        if any(b.seconds is None for b in able):
            return Choice(able[0], refused)
        usage = self.usage(*args, at=at)._replace(link=used.link, world_size=groups.resolve(group).world_size if group else 1)
        shapes = _map_tensors(lambda t: _shape_of(t, at), args)

        def seconds(b: Backend) -> float:
            sent, messages = b.wire(*shapes) if b.wire else (usage.bytes, usage.messages)
            return b.seconds(usage._replace(bytes=sent, messages=messages))  # type: ignore[misc]

        return Choice(min(able, key=seconds), refused, "modelled")

    def settle(self, *args) -> Choice | None:
        """The choice for args that may be fake, if it is the same for all values of symbolic sizes; else None, and the op's
        default overload chooses when it runs."""
        if not any(isinstance(n, torch.SymInt) for t in _tensors(args) for n in t.shape):
            return self.select(*args)
        able, refused = self.candidates(*args, at=_known)
        measured = tuning.of(self.group(*args)).measured
        by_size = (any(b.nbytes for b in able) or all(b.seconds for b in able)
                   or (measured is not None and self.call(*args, at=_known)[0] in measured.us))
        return None if len(able) > 1 and by_size else Choice(able[0], refused)

    def call(self, *args, at: At = int) -> tuple[str, int]:
        """(a text that is the same for equal calls with any number of tokens on any group, the tokens)."""
        named = dict(zip(self.params, args, strict=True))
        words = [f"{k}={_text(v, k in self.rows)}" for k, v in named.items() if k != "group" and not isinstance(v, float)]
        first = next(iter(_tensors([named[k] for k in self.rows])), None)
        return " ".join([self.name, *words]), at(first.shape[0]) if first is not None else 0

    def usage(self, *args, at: At = int) -> Usage:
        """What the reference needs for these args, but for `link` and `world_size`."""
        with Meter() as meter:
            self.target(*_map_tensors(lambda t: _shape_of(t, at), args))
        return Usage(meter.bytes, meter.messages, meter.flops, Link(0.0, 1.0), 1)


class Meter(TorchDispatchMode):
    """Counts bytes and messages on the wire, and the matmuls' operations, of the ops that run under it; a fused op needs what
    is inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Any = 0
        self.messages = 0
        self.flops: Any = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        o = OPS.get(func._opname) if func.namespace == "fusewire" else None
        if o is None:
            return func(*args, **(kwargs or {}))
        if o.wire:
            self.bytes += o.wire(*args)
            self.messages += 1
        if o.flops:
            self.flops += o.flops(*args)
        if o.fake:
            return o.fake(*args)
        with self:
            return o.reference(*args)


@overload
def op(reference: Callable, /) -> Op: ...


@overload
def op(**facts: Any) -> Callable[[Callable], Op]: ...


def op(reference=None, **facts):
    """Declare an op from its reference; `facts` are `Op`'s fields."""
    return Op(reference, **facts) if reference else lambda f: Op(f, **facts)


def op_of(n: object) -> Any:
    """The op that a graph node calls, whichever backend it names; None for anything else."""
    if isinstance(n, fx.Node) and isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == "fusewire":
        return OPS[n.target._opname]
    return None


def _no_room(nbytes: Callable[..., int], group: str, args: tuple, at: At) -> str | None:
    """Why the workspace of a group cannot take a call, None if it can."""
    room = groups.workspaces.get(group)
    if room is None:
        return f"the group {group!r} has no workspace; call workspace.open(group, nbytes) on every rank"
    if isinstance(room, str):
        return room
    need = at(nbytes(*args))
    return f"it needs {need} bytes of a workspace of {room}" if need > room else None


def _tensors(values: Any) -> list[Tensor]:
    return [t for v in values for t in ([v] if isinstance(v, Tensor) else _tensors(v) if isinstance(v, (list, tuple)) else [])]


def _map_tensors(f: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    return [_map_tensors(f, v) for v in value] if isinstance(value, (list, tuple)) else value


def _facts(value: Any) -> Any:
    """What of real arguments a choice may depend on."""
    if isinstance(value, Tensor):
        return value.dtype, value.device, value.shape, value.stride()
    return tuple(map(_facts, value)) if isinstance(value, (list, tuple)) else value


def _text(value: Any, rows: bool) -> str:
    if isinstance(value, Tensor):
        shape = ["*", *value.shape[1:]] if rows and value.dim() else value.shape
        return f"{_text(value.dtype, False)}[{','.join(map(str, shape))}]"
    if isinstance(value, (list, tuple)):
        return ";".join(_text(v, rows) for v in value)
    return str(value).removeprefix("torch.")


def _shape_of(t: Tensor, at: At) -> Tensor:
    return torch.empty_strided([at(n) for n in t.shape], [at(n) for n in t.stride()], dtype=t.dtype, device="meta")


def _known(size: Any) -> int:
    return size if isinstance(size, int) else 0
