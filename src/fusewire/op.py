"""An op is declared once: its reference is its schema, its fake, its oracle and the pattern its rule must recognise."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import torch
from torch import fx
from torch.library import infer_schema

from . import compat

LIB = torch.library.Library("fusewire", "DEF")
OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Backend:
    """One way to run an op. `supports(*args)` returns None for yes, or the reason why not."""

    name: str
    run: Callable
    supports: Callable[..., str | None]
    target: torch._ops.OpOverload


class Choice(NamedTuple):
    """What `Op.select` decided: the backend, and why each earlier one was refused."""

    backend: Backend
    refused: list[str]


@dataclass(eq=False)
class Op:
    """A torch custom op `fusewire::NAME`, and what the compiler must know about it.

    reference  the meaning, in terms of aten and of other ops; never returns an input or a view of one
    tokens     names of the args whose dim 0 is tokens; non-empty means: works token by token, so cutting these args and
               then running it equals running it and then cutting every output, bit for bit
    wire       (*args) -> bytes this rank sends; only primitive collectives say, a fused op costs what is inside it
    fake       shapes only, where the reference cannot run on fake tensors (the primitive collectives)

    Every backend is an overload of its own, `fusewire::NAME.BACKEND`, so a lowered graph shows what will run.
    The default overload picks at run time.
    """

    reference: Callable
    tokens: tuple[str, ...] = ()
    wire: Callable[..., int] | None = None
    fake: Callable | None = None
    backends: list[Backend] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.reference.__name__
        self.schema = infer_schema(self.reference, mutates_args=())
        self.target = self._define("", lambda *args: self.select(*args).backend.run(*args))
        self.params = [a.name for a in self.target._schema.arguments]
        self._reference = Backend("reference", self.reference, lambda *args: None, self._define("reference", self.reference))
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

    def backend(self, name: str, supports: Callable[..., str | None] = lambda *args: None) -> Callable[[Callable], Callable]:
        """Register an implementation, tried in order of registration; its schema must equal the reference's."""

        def register(run: Callable) -> Callable:
            if (schema := infer_schema(run, mutates_args=())) != self.schema:
                raise TypeError(f"{self.name}.{name}: {schema} is not {self.schema}")
            self.backends.append(Backend(name, run, supports, self._define(name, run)))
            return run

        return register

    def select(self, *args) -> Choice:
        """The first backend that supports these args (real or fake), else the reference; and why the earlier ones do not."""
        refused: list[str] = []
        for b in self.backends:
            if (why := b.supports(*args)) is None:
                return Choice(b, refused)
            refused.append(f"{b.name}: {why}")
        return Choice(self._reference, refused)


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
