"""The command `fusewire`."""
from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .bench import flags
from .errors import FusewireError, InputError

OFF = (0, -1)  # bounds that no token count is within


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one sentence, as with everything else."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="fusewire",
                 description="Hide the communication of tensor-parallel models behind their matmuls.")
    top.add_argument("--version", action="version", version=f"fusewire {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="{run,explain,tune,verify,bench}")

    run = commands.add_parser("run", help="generate text on several ranks, and report what was fused")
    _model(run)
    run.add_argument("--prompt", default="The capital of France is", help="the text to continue")
    run.add_argument("--max-tokens", type=_positive, default=24, help="how many tokens to generate (default 24)")
    run.add_argument("--compare", action="store_true", help="run the unfused graph too and say whether the tokens are identical")
    _combine(run)
    run.add_argument("--timings", action="store_true", help="print the seconds of each compiler pass")
    _choices(run)
    run.set_defaults(main=run_command)

    explain = commands.add_parser("explain", help="say what would be fused, what not and why: no weights, no ranks")
    _model(explain)
    explain.add_argument("--tokens", type=_positive, default=4096, help="tokens of one run (default 4096)")
    _combine(explain)
    explain.add_argument("--json", action="store_true", help="print JSON instead of tables")
    explain.add_argument("--all-logits", action="store_true", help="logits of every token, not of the last alone")
    explain.add_argument("--timings", action="store_true", help="print the seconds of each compiler pass")
    _choices(explain)
    explain.set_defaults(main=explain_command)

    tune = commands.add_parser("tune", help="measure the backends of a model's ops on this machine, and write what ops choose by")
    _model(tune)
    tune.add_argument("--shape", help="instead of MODEL: llama-3-70b, llama-3-8b")
    tune.add_argument("--tokens", type=flags.counts, metavar="N,...", help="token counts of a run (default 1,2,4,...,8192)")
    tune.add_argument("--loopback", action="store_true",
                      help="one process plays all ranks: kernels and protocol without the wire; the file is marked, and serves "
                           "loopback runs only")
    tune.add_argument("--output", "-o", type=Path, default=Path("tuning.json"), metavar="FILE",
                      help="default tuning.json; other calls that it has already stay")
    tune.set_defaults(main=tune_command)

    verify = commands.add_parser("verify", help="compare the fused with the unfused model: logits, greedy tokens, perplexity")
    _model(verify)
    verify.add_argument("--text", type=Path,
                        help="whose logits and perplexity are compared: a text file, or JSON lines with a \"page\" or \"text\" "
                             "(default: half a page of ours)")
    verify.add_argument("--prompt", default="The capital of France is", help="the text whose greedy continuation is compared")
    verify.add_argument("--max-tokens", type=_positive, default=16, help="how many tokens to generate (default 16)")
    _combine(verify)
    verify.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _choices(verify)
    verify.set_defaults(main=verify_command)

    flags.add(commands)
    return top


def _positive(text: str) -> int:
    n = int(text)
    if n < 1:
        raise argparse.ArgumentTypeError(f"{n} is not a positive number")
    return n


def _model(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", nargs="?", metavar="MODEL", help="a folder with config.json and safetensors, or a hub name owner/name")
    p.add_argument("--demo", action="store_true", help="use the packaged SmolLM2-135M-Instruct instead of MODEL")
    p.add_argument("--tensor-parallel-size", "-tp", type=_positive, default=1, metavar="N", help="how many ranks (default 1)")
    p.add_argument("--device", choices=("cuda", "cpu"), help="where it runs (default: CUDA devices, if there are any)")
    p.add_argument("--quantization", "-q", metavar="FORMAT",
                   help="quantize a plain checkpoint while loading: fp8, fp8_token, fp8_block, nvfp4, mxfp8 (default: as it is)")


def _combine(p: argparse.ArgumentParser) -> None:
    p.add_argument("--combine", metavar="FORMAT",
                   help="of a mixture of experts: quantize experts' shares before they travel: fp8_token, fp8_block, mxfp8 "
                        "(default: bf16)")


def _choices(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("what is fused")
    g.add_argument("--plan", default="auto", choices=("auto", "unfused", "replicated", "sharded"), help="auto: by token count")
    g.add_argument("--codegen", default="fx", choices=("fx", "inductor"), help="run the graph node by node, or through Inductor")
    g.add_argument("--tuning", metavar="FILE", help="choose backends by what `fusewire tune` measured (default: $FUSEWIRE_TUNING)")
    g.add_argument("--max-num-batched-tokens", type=_positive, default=8192, metavar="N",
                   help="most tokens of a run that workspaces are made for (default 8192)")
    g.add_argument("--strict", action="store_true", help="fail where something that could be fused is not")
    g.add_argument("--disable-rule", action="append", default=[], metavar="RULE", help="switch a rule off; repeatable")
    g.add_argument("--rule", action="append", default=[], metavar="RULE=MIN:MAX",
                   help="let a rule run for MIN to MAX tokens only; either may be left out; repeatable")
    g.add_argument("--enable-sp", action=argparse.BooleanOptionalAction, default=True, help="sequence parallelism")
    g.add_argument("--sp-min-token-num", type=_positive, metavar="N", help="sequence parallelism from N tokens on")
    g.add_argument("--fuse-gemm-comms", action=argparse.BooleanOptionalAction, default=True,
                   help="all-gather and reduce-scatter with matmuls")
    g.add_argument("--fuse-allreduce-rms", action=argparse.BooleanOptionalAction, default=True,
                   help="all-reduce with norm and quantization")


def config_of(args: argparse.Namespace) -> Any:
    """The Config that the flags ask for; InputError for a rule that does not exist, bounds that are not numbers, or a tuning
    that cannot be used."""
    from . import tuning
    from .compiler.passes import all_reduce_norm, async_tp, check_rules
    from .config import Bounds, Config

    rules: dict[str, Bounds] = {}
    for text in args.rule:
        name, _, bounds = text.partition("=")
        low, colon, high = bounds.partition(":")
        try:
            rules[name] = Bounds(int(low) if low else 0, int(high) if high else None)
        except ValueError:
            colon = ""
        if not colon:
            raise InputError(f"--rule {text!r} is not RULE=MIN:MAX with whole numbers; write for example split_all_reduce=256:")
    off = list(args.disable_rule)
    off += ["split_all_reduce"] * (not args.enable_sp)
    off += [r.name for r in async_tp.rules] * (not args.fuse_gemm_comms)
    off += [r.name for r in all_reduce_norm.rules] * (not args.fuse_allreduce_rms)
    if args.sp_min_token_num:
        rules["split_all_reduce"] = Bounds(args.sp_min_token_num)
    rules.update({name: Bounds(*OFF) for name in off})
    if named := tuning.asked_for(args.tuning):  # before any rank is started
        found = tuning.read(named)
        if found.world_size != args.tensor_parallel_size:
            raise InputError(f"the tuning {named} was measured on {found.world_size} ranks, not on {args.tensor_parallel_size}; "
                             f"run `fusewire tune -tp {args.tensor_parallel_size}`")
    return check_rules(Config(rules=rules, plan=args.plan, codegen=args.codegen, strict=args.strict, tuning=args.tuning,
                              max_tokens=args.max_num_batched_tokens))


def model_of(args: argparse.Namespace) -> str:
    """The folder or hub name that the flags ask for."""
    if args.demo == bool(args.model):
        raise InputError("give a MODEL (a folder or a hub name) or --demo, one of the two")
    if args.demo:
        from .models.demo import demo_model

        return str(demo_model())
    return args.model


def checked_model_of(args: argparse.Namespace) -> str:
    """The model's folder, once its config and the quantization are known to be good: before any rank is started, which then
    need not import either what this has imported."""
    from .models.checkpoint import config_of as model_config_of
    from .models.checkpoint import folder_of
    from .models.files import read_json
    from .models.parallelize import format_name
    from .ops.moe import combine_format

    format_name(args.quantization)
    combine_format(getattr(args, "combine", None))
    folder = folder_of(model_of(args))
    model_config_of(folder, read_json(folder / "config.json"))
    return str(folder)


# --- run


def run_command(args: argparse.Namespace) -> int:
    from .launch import launch

    config = config_of(args)
    return launch(run_rank, args.tensor_parallel_size, checked_model_of(args), args, config, device=args.device)


def _progress(console: Any, rank: int) -> Any:
    """A progress bar on rank 0's terminal; (start, update, stop)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(TextColumn("loading"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=console,
                    transient=True, disable=rank != 0 or not console.is_terminal)


def _open(context: Any, model: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """(the loaded session, rank 0's console)."""
    from rich.console import Console

    from .engine.session import open_session

    console = Console(stderr=False, soft_wrap=True)
    with _progress(console, context.rank) as bar:
        task = bar.add_task("", total=None)
        session = open_session(model, args.quantization, context, lambda done, total, name: bar.update(
            task, completed=done, total=total, description=name), args.combine)
    return session, console


def run_rank(context: Any, model: str, args: argparse.Namespace, config: Any) -> None:
    """`fusewire run` on one rank."""
    import torch
    from tokenizers.decoders import DecodeStream

    from . import compile, screen
    from .engine.session import run_text
    from .models import combine_error

    session, console = _open(context, model, args)
    ids = session.encode(args.prompt)
    stream = DecodeStream(skip_special_tokens=True)

    def show(token: int) -> None:
        if context.rank == 0 and (text := stream.step(session.tokenizer.backend_tokenizer, token)):
            console.out(text, end="", highlight=False)
            sys.stdout.flush()

    if context.rank == 0:
        console.out(args.prompt, end="", style="dim", highlight=False)
    compiled = compile(session.model, config)
    try:
        run = run_text(session, compiled, ids, args.max_tokens, context.phase, show)
    except FusewireError:
        if context.rank == 0:
            console.out("")  # ends the prompt's line
        raise
    compiled.plan = "unfused"  # the same captured graphs, with nothing fused
    unfused = run_text(session, compiled, ids, args.max_tokens, context.phase) if args.compare else None
    off = None
    if args.combine:
        context.phase("comparing the combine with an unquantized one")
        off = combine_error(session.model, [torch.cat([ids, run.tokens[:, :-1]], 1)])
        context.phase("idle")
    if context.rank:
        return
    console.out("\n")
    rate = f"then {run.tokens_per_s:.1f} tokens/s" if run.rest_s else "tokens/s only from the third token on"
    how = args.quantization or session.model.config.to_dict().get("quantization_config", {}).get("quant_method") or "as stored"
    console.print(f"[bold]{context.world_size} ranks{screen.where(context)}, {how}, {config.codegen} code[/]; "
                  f"loaded in {session.load_s:.1f} s, "
                  f"first token after {run.first_s:.1f} s (with compilation), {rate}", highlight=False)
    screen.runs(console, run.reports())
    if off is not None:
        console.print(off.sentence(), highlight=False)
    if unfused is not None:
        same = torch.equal(run.tokens, unfused.tokens)
        exact = context.device.type == "cpu"  # elsewhere a kernel may round otherwise than the program that it replaces
        console.print("[green]identical to unfused[/]: the same tokens" if same
                      else "[red]not identical to unfused[/]: the tokens differ" if exact
                      else f"[yellow]the unfused tokens differ[/] from {screen.first_difference(run.tokens, unfused.tokens)} on: "
                           "kernels round otherwise, and `fusewire verify` says by how much", highlight=False)
    if args.timings:
        for r, _ in run.reports()[:1]:
            screen.timings(console, r)
    if unfused is not None and not same and exact:
        raise FusewireError("the fused model generated other tokens than the unfused one; run `fusewire verify` to see by how much")


# --- explain


def explain_command(args: argparse.Namespace) -> int:
    from rich.console import Console

    from . import screen
    from .engine.explain import explain_model

    report = explain_model(model_of(args), args.tensor_parallel_size, args.tokens, args.quantization, config_of(args),
                           args.all_logits, device=args.device, combine=args.combine)
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
        return 0
    console = Console(soft_wrap=False) if sys.stdout.isatty() else Console(width=200)
    screen.sites(console, report)
    if args.timings:
        screen.timings(console, report)
    return 0


# --- tune


def tune_command(args: argparse.Namespace) -> int:
    import tempfile

    from .bench import shapes
    from .launch import launch

    if sum(map(bool, (args.model, args.demo, args.shape))) != 1:
        raise InputError("give a MODEL (a folder or a hub name), --demo or --shape, one of the three")
    if not args.output.parent.is_dir():
        raise InputError(f"{args.output.parent} is not a folder, so no tuning can be written there; make it, or give another -o")
    with tempfile.TemporaryDirectory(prefix="fusewire-tune-") as folder:
        if args.shape:
            (Path(folder) / "config.json").write_text(json.dumps(shapes.config(args.shape)))
        model = folder if args.shape else checked_model_of(args)
        if not args.loopback:
            return launch(tune_rank, args.tensor_parallel_size, model, args, device=args.device)
        import torch

        from .launch import RankContext

        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        tune_rank(RankContext(0, 1, 0, device, lambda text: None), model, args)
        return 0


def tune_rank(context: Any, model: str, args: argparse.Namespace) -> None:
    """`fusewire tune` on one rank."""
    from rich.console import Console

    from . import group, screen, tuning
    from .engine.tune import TOKENS, tune
    from .models.parallelize import resolve

    if context.shared:
        raise InputError(f"{context.world_size} ranks would share a CUDA device, and their times would mean nothing; start as many "
                         "as there are devices, or use --loopback")
    before = tuning.earlier(args.output, tuning.gpu_name(context.device), args.tensor_parallel_size, args.loopback)
    over = group.loopback_group(args.tensor_parallel_size) if args.loopback else resolve(None)
    console = Console(soft_wrap=True)
    with console.status("capturing") if context.rank == 0 and console.is_terminal else nullcontext() as status:
        def tell(text: str) -> None:
            context.phase(f"measuring {text}")
            if status:
                status.update(f"measuring {text}")

        found = tune(model, over, args.quantization, context.device, args.tokens or TOKENS, tell)
    why = group.workspaces.get(over.name)
    if args.loopback:
        group.close(over)
    if context.rank:
        return
    screen.tuned(console, found)
    if isinstance(why, str):
        console.print(why, highlight=False)
    if not found.us:
        console.print(f"nothing to choose on {found.gpu}: every op has one backend here, its reference; no file was written",
                      highlight=False)
        return
    tuning.write(args.output, found, before)
    stay = ", where other calls stay" if before and before.us.keys() - found.us.keys() else ""
    console.print(f"written to {args.output}{stay}; use it with --tuning {args.output} or FUSEWIRE_TUNING={args.output}",
                  highlight=False)


# --- verify


def texts_of(path: Path | None) -> list[str]:
    """The texts of a file: lines of JSON with a string under "page" or "text", or else the whole file."""
    if path is None:
        return []
    try:
        raw = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read as text ({e}); give a UTF-8 text file") from None
    if path.suffix != ".jsonl":
        return [raw]
    texts = []
    for i, line in enumerate(filter(None, raw.splitlines()), 1):
        try:
            row = json.loads(line)
            texts.append(next(row[k] for k in ("page", "text") if isinstance(row.get(k), str)))
        except (json.JSONDecodeError, AttributeError, StopIteration):
            raise InputError(f'{path} line {i} is not JSON with a string under "page" or "text"; correct it') from None
    return texts


def verify_command(args: argparse.Namespace) -> int:
    from .launch import launch

    texts_of(args.text)
    config = config_of(args)
    return launch(verify_rank, args.tensor_parallel_size, checked_model_of(args), args, config, device=args.device)


def verify_rank(context: Any, model: str, args: argparse.Namespace, config: Any) -> None:
    """`fusewire verify` on one rank: fails if a plan's logits are not those of the unfused graph."""
    from .engine.verify import verify

    session, console = _open(context, model, args)
    results = verify(session, config, args.prompt, args.max_tokens, texts_of(args.text), context.phase)
    if context.rank:
        return
    if args.json:
        print(json.dumps([r.to_dict() for r in results], indent=1))
    else:
        for r in results:
            console.print(r.sentence(), highlight=False)
        if (off := results[0].combine) is not None:
            console.print(off.sentence(), highlight=False)
    if bad := [r.plan for r in results if not r.accepted]:
        raise FusewireError(f"the {' and '.join(bad)} plan is not as accurate as the unfused model")


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code: 0, 1 for a failure, 2 for bad input, 3 for --strict, 128 + signal."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than cores a rank make gloo ranks crawl
    try:
        args = parser().parse_args(argv)
        return args.main(args)
    except FusewireError as e:
        print(f"fusewire: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
