"""torch.compile hands us one graph for each specialisation; we run the plan that fits the token count."""
from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import compat, tuning
from ..config import Config
from ..consensus import agree, library_facts
from ..errors import FusewireError, InputError
from ..group import resolve, workspaces
from ..op import op_of
from .lower import open_workspace
from .passes import check_rules
from .plan import Capture, Plan, capture

TOKEN_DIMS = {"input_ids": 1, "inputs_embeds": 1, "position_ids": 1, "cache_position": 0}  # of a Hugging Face decoder
INLINED_ON = ("cuda",)  # on a CPU, compiling what is in an op takes minutes


class _Captured(Exception):
    """Ends a call that was made for its capture alone."""


@dataclass
class Compiled:
    """A callable model; `captures` grows by one whenever torch compiles it for another specialisation."""

    model: Callable
    config: Config
    token_dims: dict[str, int]
    capture_only: bool = False  # a call compiles and returns None
    device: torch.device | None = None  # where a model that is captured on the meta device would run
    plan: str = ""  # the config's; may be changed between calls: all plans come from the same captures
    captures: list[Capture] = field(default_factory=list)
    last: tuple[Capture, int] | None = None  # what ran last: the capture and the token symbol's value
    used: Counter[tuple[int, int, str]] = field(default_factory=Counter)  # (index of the capture, the value, plan) -> runs

    def __post_init__(self) -> None:
        self.plan = self.config.plan
        self._prepared: set[str] = set()  # groups whose ops know by what to choose
        self._run = torch.compile(self.model, backend=self._backend, fullgraph=True)
        forward = self.model.forward if isinstance(self.model, torch.nn.Module) else self.model
        modules = self.model.modules() if isinstance(self.model, torch.nn.Module) else ()
        self._hooked = [m for m in modules if m._backward_hooks]
        self._signature = inspect.signature(forward)
        functools.update_wrapper(self, forward, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.capture_only or (ranks := getattr(self.model, "layout", None)) is None:
            return self.run(*args, **kwargs)
        step = ranks.begin_compiled(self._bound(args, kwargs), TOKEN_DIMS, self.config.pad_to, always=bool(self.config.pad_to))
        return step.cut(self.run(**step.given))

    def begin(self, *args: Any, **kwargs: Any) -> Any:
        """Before a step of ranks that hold tokens of their own (`parallelize` with dp): they say how many these are, a collective
        that no graph can hold, and pad them to a size that is the same on all (`Config.pad_to`), equal numbers too.

        -> a step: `step.given`, arguments for `run`, by name, and `step.cut`, which makes of what it returned the result. A call
           does the three; whoever puts `run` into CUDA graphs, one for each shape of `given`, does the first and the last
           around a replay.
        InputError for another model, different numbers of rows, and arguments that cannot be padded, such as a cache.
        """
        if (ranks := getattr(self.model, "layout", None)) is None:
            raise InputError("begin: the ranks of this model hold the same tokens; call the model instead")
        return ranks.begin_compiled(self._bound(args, kwargs), TOKEN_DIMS, self.config.pad_to, always=True)

    def _bound(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """Arguments by name."""
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        for name, p in self._signature.parameters.items():
            if p.kind is p.VAR_KEYWORD:
                bound |= bound.pop(name, {})
        return bound

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The compiled code alone. Every rank gives as many tokens."""
        bound = self._bound(args, kwargs)
        for name, dim in self.token_dims.items():
            t = bound.get(name)
            if isinstance(t, torch.Tensor) and t.shape[dim] > 1:  # torch treats sizes 0 and 1 as constants
                compat.mark_dynamic(t, dim)
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for m in self._hooked:  # training's business, which Dynamo refuses to trace
                stack.callback(setattr, m, "_backward_hooks", m._backward_hooks)
                m._backward_hooks = {}
            try:
                return self._run(*args, **kwargs)
            except _Captured:
                return None
            except torch._dynamo.exc.BackendCompilerFailed as e:  # a refusal of ours: it is a sentence already
                if isinstance(e.inner_exception, FusewireError):
                    raise e.inner_exception from None
                raise

    def _backend(self, gm: torch.fx.GraphModule, inputs: list) -> Callable:
        return compat.compile_aten(gm, inputs, self._compile)

    def _compile(self, gm: torch.fx.GraphModule, inputs: list) -> Callable:
        start = time.perf_counter()
        found = capture(gm, inputs, self.config, self.device)
        found.timings["total"] = time.perf_counter() - start
        self.captures.append(found)
        index = len(self.captures) - 1
        self._agree(found, f"graph {index}", {"sizes": str(found.tokens(1)), "codegen": self.config.codegen,
                                              "plan": self.config.plan, "pad_to": str(self.config.pad_to)})
        for name, nbytes in found.workspace_bytes(self.config.max_tokens).items():  # in the order of the graph
            if name not in self._prepared:
                group = resolve(name)
                tuning.use(group, tuning.load(self.config.tuning, group, found.device), found.link)
                self._prepared.add(name)
            if nbytes:
                open_workspace(name, nbytes, found.device)
        found.lower()
        self._agree(found, f"backends of graph {index}", {})
        if self.config.strict:
            from .explain import check_strict

            check_strict(found)
        return compat.boxed(functools.partial(self._dispatch, found, index))

    def _agree(self, found: Capture, topic: str, facts: dict[str, str]) -> None:
        """All ranks run the same graphs, or all say which differ: before the first collective that depends on it."""
        for r in found.ranges:
            for name, plan in r.plans.items():
                facts[f"{name} graph from {r.first} tokens"] = hashlib.sha256(program(plan).encode()).hexdigest()[:16]
        # in the order of the graph, which is the same on all ranks: names of groups that only some ranks are in are not
        for name in dict.fromkeys(op_of(n).group(*n.args) for n in found.unfused.calls()):
            agree(resolve(name), topic, facts)

    def _dispatch(self, found: Capture, index: int, inputs: list) -> Any:
        if self.capture_only:
            raise _Captured
        # Outside both graphs, on real sizes: decided on the captured fake values it would be a guard of both plans.
        size = found.size_of(inputs)
        plan = found.choose(size, self.plan)
        self.last = found, size
        self.used[index, size, self.plan] += 1
        if plan.call is None:
            code = self._code(plan, found.size_of)
            for name in sorted({op_of(n).group(*n.args) for n in plan.calls()} & workspaces.keys()):
                # kernels that wait for a rank which is still compiling would give up
                agree(resolve(name), "code is compiled", {}, timeout_s=1800.0)
            plan.call = code
        return plan.call(inputs)

    def _code(self, plan: Plan, size_of: Callable[[list], int]) -> Callable[[list], Any]:
        if self.config.codegen == "fx":
            return lambda inputs: plan.gm(*inputs)
        gm, multiple = torch.fx.GraphModule(plan.gm, copy.deepcopy(plan.gm.graph)), plan.multiple
        for n in gm.graph.nodes:
            o, settled = op_of(n), n.meta.get("choice")
            if o and o.tokens and not o.opaque and settled and settled.backend.run is o.reference and _device(n) in INLINED_ON:
                n.target = o.reference  # plain Python: Inductor sees what is in it, and fuses a norm with a quantization
        if bare := plan.symbol is not None and multiple > 1:
            # Inductor can read a size off an input only if it is a symbol of its own, and here all are multiples of one.
            with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
                gm.graph.placeholder("tokens").meta["val"] = compat.bare_size(plan.symbol, gm)
        gm.recompile()
        fakes = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
        code = compat.inductor(gm, fakes, cache_tag(plan, self.config))
        return lambda inputs: code([size_of(inputs) // multiple, *inputs] if bare else inputs)


def _device(n: torch.fx.Node) -> str:
    value = n.meta["val"]
    return (value if isinstance(value, torch.Tensor) else value[0]).device.type


def program(plan: Plan) -> str:
    """What all ranks must do alike: the calls of our ops in order, with their constants, and the shapes of what travels.

    Not the whole graph: a model that is parallel by other means may have a rank's own constants in it, such as where its
    part of the vocabulary starts.
    """
    def what_travels(a: torch.fx.Node) -> str:
        return f"{a.meta['val'].dtype}{list(a.meta['val'].shape)}"

    calls = [(n, o) for n in plan.gm.graph.nodes if (o := op_of(n)) is not None]
    shown = {True: what_travels, False: lambda a: "_"}
    groups = {name: f"group {i}" for i, name in enumerate(dict.fromkeys(  # rows and columns of ranks have names of their own
        o.group(*n.args) for n, o in calls if "group" in o.params))}

    def args(n: torch.fx.Node, o: Any) -> tuple:
        named = [groups[a] if p == "group" else a.type if isinstance(a, torch.device) else a  # each rank has its own GPU
                 for p, a in zip(o.params, n.args, strict=True)]
        return tuple(torch.fx.map_arg(named, shown["group" in o.params]))

    return "\n".join(f"{n.target} {args(n, o)}" for n, o in calls)


def cache_tag(plan: Plan, config: Config) -> str:
    """What compiled code must not be shared across: rank, world, groups, plan, choices, our own sources.

    Our graphs look ranks up when they run, so equal graphs are equal programs; the tag guards whatever else is in them.
    """
    names = {op_of(n).group(*n.args) for n in plan.calls()}
    groups = [(name, (g := resolve(name)).rank(), g.world_size) for name in sorted(names)]
    return f"fusewire {groups} {plan.name} {sorted(config.rules.items())} {library_facts()}"


def compile(model: Callable, config: Config | None = None, token_dims: dict[str, int] | None = None) -> Compiled:
    """Compile a tensor-parallel model: the same callable, with its communication fused.

    model       a module or function whose collectives are Fusewire's, functional collectives, or DTensor's
    token_dims  argument name -> the dimension that counts tokens; by default those of a Hugging Face decoder

    Sizes of 2 and more share one compilation; 1 has its own. No gradient is recorded.
    """
    if not callable(model):
        raise InputError(f"compile: {type(model).__name__} is not callable; give a module or a function")
    return Compiled(model, check_rules(config or Config()), TOKEN_DIMS if token_dims is None else token_dims)
