"""Every private PyTorch API that Fusewire touches, for torch 2.11 to 2.13."""
from __future__ import annotations

import threading

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroup, _get_process_group_store, _resolve_process_group
from torch.fx._lazy_graph_module import _LazyGraphModule, _make_graph_module

OP_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def process_group(name: str) -> ProcessGroup:
    """The process group that torch registered under `name`."""
    return _resolve_process_group(name)


def process_group_store(pg: ProcessGroup) -> torch.distributed.Store:
    """The key-value store through which the ranks of `pg` met; keys are private to `pg` unless it is the default group."""
    return _get_process_group_store(pg)


def symmetric_memory(nbytes: int, group: str, device: torch.device) -> list[torch.Tensor]:
    """uint8 (nbytes,) on every rank of a process group, as seen from here; a kernel or a copy of any rank may write to each.

    A collective. Freed with this rank's own, which must therefore outlive every kernel of every rank that uses it. NVLink
    multicast is never used: on a shared host it can take GPUs out of service.
    """
    import os

    from torch._C._distributed_c10d import _SymmetricMemory

    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # read when memory is allocated
    memory = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)
    seen = _SymmetricMemory.rendezvous(memory, group)
    return [memory if r == seen.rank else seen.get_buffer(r, (nbytes,), torch.uint8) for r in range(seen.world_size)]


def symm_mem_ops():
    """torch's ops on symmetric memory; the fused ones are there once their module is imported."""
    import torch.distributed._symmetric_memory

    return torch.ops.symm_mem


def group_name(arg: object) -> str:
    """The group argument of a functional collective in a graph: a string, or in 2.13 a process group or a node."""
    if isinstance(arg, str):
        return arg
    if isinstance(arg, torch.fx.Node):  # compile_on_one_rank: _dtensor.mesh_get_process_group(mesh, dim)
        arg = arg.meta["val"]
    return arg.group_name  # type: ignore[attr-defined]


def functionalized(n: torch.fx.Node) -> tuple[torch._ops.OpOverload, dict, list[int]] | None:
    """A custom op that writes to arguments, as AOT wraps it: (the op, its arguments by name, where in the node's outputs its
    own returns and then those arguments are). None for other nodes, and where a written argument is only part of a tensor.
    """
    versions = [getattr(torch.ops.higher_order, name, None) for name in ("auto_functionalized", "auto_functionalized_v2")]
    if n.op != "call_function" or n.target not in versions or not isinstance(n.args[0], torch._ops.OpOverload):
        return None
    op, given = n.args[0], dict(n.kwargs)
    returns = len(op._schema.returns)
    at, first = list(range(returns)), max(1, returns)  # an op without returns has None as the first output
    written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    for i, name in enumerate(written):
        if n.target is versions[0] and given[name] is None:
            return None
        if n.target is versions[1]:
            if any(f"_{name}_{part}" in given for part in ("size", "slice_dim")):
                return None
            i = given.get(f"_{name}_base_index")
            if i is None:
                return None
            given[name] = given["_all_bases"][i]
        at.append(first + i)
    if len(set(at)) < len(at):
        return None
    defaults = {a.name: a.default_value for a in op._schema.arguments}
    return op, {name: given.get(name, default) for name, default in defaults.items()}, at


def known_true(condition: object) -> bool:
    """Is a comparison of sizes true whatever the sizes are? Never adds a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Have two (fake) tensors the same shape, whatever their sizes are?"""
    return a.dim() == b.dim() and all(known_true(i == j) for i, j in zip(a.shape, b.shape, strict=True))


class Shapes:
    """A ShapeEnv and a FakeTensorMode of our own, into which the fake values of a captured graph are carried over.

    multiples  captured symbol -> k: here it is k times a new symbol, so that dividing by k is exact
    device     where tensors are taken to lie that were captured on the meta device; None: there
    symbols    captured symbol -> new symbol (filled as sizes are met)

    Whatever is decided on values of these shapes cannot add a guard to the capture.
    """

    def __init__(self, multiples: dict, device: torch.device | None = None):
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.multiples = multiples
        self.device = device
        self.symbols: dict = {}
        self._sizes: dict = {}
        self._tensors: dict = {}

    def guards(self) -> list[str]:
        """The conditions that were decided from hints so far."""
        return [str(g.expr) for g in self.env.guards]

    def carry(self, value: object) -> object:
        """A captured value (tensor, size, constant) as one of these shapes, in new storage. Equal ones are made once: they
        are only looked at."""
        if isinstance(value, torch.Tensor):
            shape, stride = ([expression(i) for i in sizes] for sizes in (value.shape, value.stride()))
            device = self.device if self.device and value.device.type == "meta" else value.device
            key = (*shape, None, *stride, value.dtype, device)
            if key not in self._tensors:
                with self.mode:
                    self._tensors[key] = torch.empty_strided([self._size(i) for i in value.shape],
                                                             [self._size(i) for i in value.stride()],
                                                             dtype=value.dtype, device=device)
            return self._tensors[key]
        return self._size(value)

    def _size(self, value: object) -> object:
        if not isinstance(value, torch.SymInt):
            return value
        expr, old_env = value.node.expr, value.node.shape_env
        if expr not in self._sizes:
            hints = hints_of(old_env)
            for s in sorted(expr.free_symbols, key=str):
                if s not in self.symbols:
                    self.symbols[s] = self._new(f"{s}", max(2, int(hints.get(s, 64)) // self.multiples.get(s, 1)))
            new = expr.xreplace({s: self.multiples.get(s, 1) * self.symbols[s] for s in expr.free_symbols})
            mine = hints_of(self.env)
            self._sizes[expr] = self.env.create_symintnode(new, hint=int(new.xreplace({s: mine[s] for s in new.free_symbols})))
        return self._sizes[expr]

    def _new(self, name: str, hint: int):
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        return self.env.create_symbol(hint, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)


def hints_of(env: object) -> dict:
    """Symbol -> the size it had when a graph was captured (renamed in 2.13)."""
    return getattr(env, "backed_var_to_val", None) or env.var_to_val  # type: ignore[attr-defined]


def all_gather_into(out: torch.Tensor, x: torch.Tensor, group: ProcessGroup) -> None:
    """x (n,) of every rank -> out (world_size * n,); renamed in 2.13."""
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, x, group=group)


def reduce_scatter_into(out: torch.Tensor, x: torch.Tensor, group: ProcessGroup) -> None:
    """x (world_size * n, ...) of every rank -> out (n, ...), the library's own sum; renamed in 2.13."""
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(out, x, group=group)


def functional_all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    """The library's own sum over the ranks of a process group, as an op that can be traced."""
    c10d = torch.ops._c10d_functional
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", group))


def functional_all_gather(x: torch.Tensor, world_size: int, group: str) -> torch.Tensor:
    """x (n, ...) of every rank -> (world_size * n, ...), as an op that can be traced."""
    c10d = torch.ops._c10d_functional
    return c10d.wait_tensor(c10d.all_gather_into_tensor(x, world_size, group))


def functional_reduce_scatter(x: torch.Tensor, world_size: int, group: str) -> torch.Tensor:
    """x (world_size * n, ...) of every rank -> (n, ...), the library's own sum, as an op that can be traced."""
    c10d = torch.ops._c10d_functional
    return c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", world_size, group))


def expression(size: object) -> object:
    """A size as a sympy expression, or as the int that it is."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def compile_aten(gm: torch.fx.GraphModule, inputs: list, compile_graph) -> object:
    """Hand a captured torch.compile graph to AOT as inference and to `compile_graph(aten_graph, fake_inputs)` after it.

    Nothing is decomposed but what AOT must, and mutations of inputs (a KV cache) stay in the graph.
    """
    from torch._functorch.aot_autograd import aot_module_simplified

    def compile_outside(graph, fakes):
        with no_fake_mode():  # AOT's own fake mode is active here
            return compile_graph(graph, fakes)

    with torch.no_grad():
        return aot_module_simplified(gm, inputs, fw_compiler=compile_outside, inference_compiler=compile_outside,
                                     decompositions={}, keep_inference_input_mutations=True)


def bare_size(symbol: object, gm: torch.fx.GraphModule) -> torch.SymInt:
    """The size that a symbol in the fake values of a graph stands for, not multiplied by anything."""
    sizes = (i for n in gm.graph.nodes for i in getattr(n.meta.get("val"), "shape", ()) if isinstance(i, torch.SymInt))
    env = next(i.node.shape_env for i in sizes if symbol in i.node.expr.free_symbols)
    return env.create_symintnode(symbol, hint=int(hints_of(env)[symbol]))


def _of_its_own(x: torch.Tensor) -> torch.Tensor:
    """A fake tensor like a fake one."""
    with x.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def inductor(gm: torch.fx.GraphModule, inputs: list, cache_tag: str):
    """Inductor's code for an aten graph, as a function of the list of inputs. `cache_tag` becomes part of its cache keys.

    Each input is taken for a tensor of its own, whatever fake values they share: of one that is written to, Inductor would expect
    to be given it twice.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch.utils._python_dispatch import _disable_current_modes

    # At run time, where this is called, AOT watches the first call with a mode of its own, which compiling must not meet.
    with _disable_current_modes(), torch.compiler.config.patch(cache_key_tag=cache_tag), torch.no_grad():  # type: ignore[attr-defined]
        run = compile_fx(gm, [_of_its_own(x) if isinstance(x, torch.Tensor) else x for x in inputs])
    return lambda args: run(*args)


def module_name(path: str) -> str:
    """Dynamo's name of a module ("L['self'].model.layers[0].mlp", or with _modules['..']) as Python's qualified name."""
    import re

    path = re.sub(r"(?:\._modules)?\['([^']*)'\]|\[(\d+)\]", lambda m: f".{m[1] or m[2]}", path)
    return re.sub(r"^L?\.?(self|fn|mod)?\.?", "", path)


def boxed(f):
    """Mark a function of one list of inputs as AOT's calling convention wants it."""
    f._boxed_call = True
    return f


def tree_map(f, value: object) -> object:
    """f of every leaf of nested lists, tuples and dicts."""
    return torch.utils._pytree.tree_map(f, value)


def shape_key(value: object) -> object:
    """What of nested arguments decides shapes and sizes: tensors by shape and dtype, anything else by itself."""
    if isinstance(value, (list, tuple)):
        return tuple(map(shape_key, value))
    return (value.dtype, *map(expression, value.shape)) if isinstance(value, torch.Tensor) else value


def no_fake_mode():
    """A context in which tensors are real, whatever fake mode is active outside."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def mark_dynamic(x: torch.Tensor, dim: int) -> None:
    """torch.compile shall make no constant of this size."""
    torch._dynamo.mark_dynamic(x, dim)


def reset_compiler() -> None:
    """Forget what torch.compile compiled, so that the next call captures again."""
    torch._dynamo.reset()


class _Lazy(_LazyGraphModule):
    """A lazy GraphModule whose first calls may come from several threads. While torch writes the code the names in it are kept
    in the graph, so two threads that write at once each get a mixture."""

    _writing = threading.Lock()

    def _real_recompile(self) -> torch.fx.graph.PythonCode:
        with self._writing:
            return super()._real_recompile()


def graph_module(root: torch.nn.Module, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """A GraphModule whose Python code is made when it is first called, and not for every copy that is rewritten."""
    return _make_graph_module(root, graph, graph_module_cls=_Lazy)
