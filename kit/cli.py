"""The `kit` command. Exit status: 0 done, 1 a stage failed, 2 the words or parameters are wrong."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kit import pipeline, report
from kit.errors import KitError, ParamError
from kit.estimate import rates, reference
from kit.estimate import table as cost
from kit.lake.store import Lake
from kit.params import (
    NOTEBOOKS,
    STAGES,
    Cores,
    Training,
    Tuning,
    check_paths,
    did_you_mean,
    for_stage,
    from_here,
    is_path,
    known_fields,
    load_recipe,
    validate_recipe,
)
from kit.show import Table, printable
from kit.train.models import load


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ParamError(f"{message} (kit --help shows the words)")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = _Parser(prog="kit", description="From Common Crawl to a fine-tuned language model.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def recipe(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("recipe", help="flat YAML, such as params/demo.yaml")
        sub.add_argument(
            "-p", dest="set", metavar="NAME=VALUE", action="append", default=[], help="override one parameter"
        )
        sub.add_argument("--lake", help="folder or s3://…")

    run = commands.add_parser("run", help="run the chain, skipping what is done")
    recipe(run)
    run.add_argument("--from", dest="first", metavar="NN", help="first stage")
    run.add_argument("--until", dest="last", metavar="NN", help="last stage")
    run.add_argument("--only", metavar="NN", help="one stage")
    run.add_argument("--force", action="store_true", help="run again what is done")
    status = commands.add_parser("status", help="one line a stage: done, stale, failed, missing")
    which = "name of the run, or its recipe; default: every run of the lake"
    status.add_argument("run", nargs="?", help=which)
    status.add_argument("--lake", help="folder or s3://…; default: lake/ of the checkout")
    trace = commands.add_parser("trace", help="from a row or document back to its bytes")
    trace.add_argument("id", help="row_id, pair_id or doc_id")
    trace.add_argument("--run", help="name of the run; default: every run of the lake")
    trace.add_argument("--lake", help="folder or s3://…; default: lake/ of the checkout")
    recipe(commands.add_parser("watch", help="refine what lands in the raw zone of a run, until Ctrl-C"))
    estimate = commands.add_parser("estimate", help="time, memory and dollars before anything runs")
    recipe(estimate)
    estimate.add_argument("--gpu", help="train on one of these instead of on this machine: h100, l40s, …")
    estimate.add_argument("--gpus", type=int, help="that many in a node: 60 under each parallel strategy")
    estimate.add_argument("--nodes", type=int, default=1, help="that many nodes")
    estimate.add_argument("--network-gbps", type=float, default=400.0, help="between nodes, Gb/s of a node")
    commands.add_parser("doctor", help="what this machine has, and what will work")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `kit` command; returns the exit status and never shows a traceback for a user's mistake."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and not words[0].startswith("-") and words[0] not in COMMANDS:
            hint = did_you_mean(words[0], list(COMMANDS))
            raise ParamError(f"no command '{words[0]}'{hint} (kit --help shows the words)")
        args = parser().parse_args(words)
        if args.command is None:
            parser().print_help()
            return 2
        return COMMANDS[args.command](args)
    except KitError as error:
        print(f"kit: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("kit: interrupted; what was committed stays, run again to go on", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def recipe_values(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe with `-p` and `--lake` on top, checked whole; paths given here start at the working directory."""
    values = {"run": Path(args.recipe).stem, **load_recipe(args.recipe)}
    for word in args.set:
        name, equals, value = word.partition("=")
        if not equals:
            raise ParamError(f"-p takes NAME=VALUE, got '{word}'")
        if name not in known_fields():
            raise ParamError(f"unknown parameter '{name}'{did_you_mean(name, known_fields())}")
        values[name] = from_here(name, value) if is_path(name) else value
    if args.lake:
        values["lake"] = from_here("lake", args.lake)
    validate_recipe(values)
    check_paths(values)
    return values


def _lake(given: str | None) -> Lake:
    """The lake of the command line, else the default one of the recipes."""
    return Lake(from_here("lake", given) if given else known_fields()["lake"].default)


def _run(args: argparse.Namespace) -> int:
    values = recipe_values(args)
    stages = pipeline.pick(args.first, args.last, args.only)
    lake = pipeline.run_stages(values, stages, args.force)
    stage_states = pipeline.states(lake, values)
    print(f"\n{report.stage_table(lake, values['run'], stage_states)}")
    if stages[-1] == list(STAGES)[-1]:
        for title, table in report.results(lake, values["run"]):
            print(f"\n{title}")
            # completions do not fit side by side on a terminal
            print(table.one_field_a_line() if len(table.columns) > 3 else table)
    print(f"\nreport: {report.write_report(lake, values['run'], stage_states)}")
    return 0


def _status(args: argparse.Namespace) -> int:
    lake = _lake(args.lake)
    runs, values = lake.runs(), {}
    if args.run and args.run.endswith((".yaml", ".yml")):
        values = load_recipe(args.run)
        args.run = values.get("run", Path(args.run).stem)
    if args.run and args.run not in runs:
        raise ParamError(f"no run '{args.run}' in {lake.uri}{did_you_mean(args.run, runs)}")
    for run in [args.run] if args.run else runs:
        # without a recipe, a run is compared with the parameters it was made with
        known = {k: v for m in lake.manifests(run) for k, v in m.params.items()}
        stage_states = pipeline.states(lake, {**known, **values, "run": run, "lake": lake.uri})
        print(f"run {run}\n{report.stage_table(lake, run, stage_states)}\n")
    if not runs:
        print(f"no run in {lake.uri} yet")
    return 0


def _trace(args: argparse.Namespace) -> int:
    from kit.data.trace import trace

    lake = _lake(args.lake)
    print(trace(lake, args.id, [args.run] if args.run else lake.runs()))
    return 0


def _watch(args: argparse.Namespace) -> int:
    from kit.launch.arrival.watch import watch

    p = for_stage(NOTEBOOKS["31_refine_on_arrival"], recipe_values(args))
    print(f"watching raw/{p.run}/ of {p.lake}", flush=True)
    for result in watch(p, Lake(p.lake)):
        print(f"{result['status']:12} {printable(result['path'])}", flush=True)
    return 0


def _estimate(args: argparse.Namespace) -> int:
    values = recipe_values(args)
    several = args.gpus is not None or args.nodes != 1
    if several and not (args.gpu and (args.gpus or 0) > 0 < args.nodes and args.network_gbps > 0):
        raise ParamError("for several GPUs give --gpu h100 --gpus 8 (a node) --nodes 4, all above 0")
    lake = Lake(for_stage(STAGES["10_explore_index"], values).lake)
    pages, which = _pages(values)
    planned, warnings = _planned(values, args.gpu)
    rows = []
    for cls in STAGES.values():
        p = for_stage(cls, values)
        rows.append(cost.estimate_stage(p, pages, lake.manifest(p.run, p.stage), planned.get(p.stage)))
        days = rows[-1].seconds / 86_400
        if days > 1 and p.stage < "60" and not isinstance(p, Cores):
            slow = f"{days:,.0f} days; take fewer pages"
            warnings.append(f"{p.stage} runs on one core whatever the cluster: {slow}")
    rows.append(cost.estimate_chain(rows, f"{pages:,} {which}"))
    table = [vars(row) | {"usd": f"{row.usd:.4f}"} for row in rows]
    recorded = reference.read("rates")
    print(Table(table))
    print(f"reference run: {recorded['machine']}, {recorded['date']}, commit {recorded['commit']}")
    for warning in warnings:
        print(f"warning: {warning}")
    if several:
        _print_scaled(for_stage(STAGES["60_finetune_sft"], values), args)
    return 0


def _print_scaled(p: Tuning, args: argparse.Namespace) -> None:
    """Stage 60 on several GPUs under each parallel strategy: a table of memory, one of time, the model they follow."""
    from kit.train.plan import fit, scaling
    from kit.train.plan.machine import GPUS
    from kit.train.plan.setup import resolve_setup

    machine, ranks = GPUS[args.gpu.lower()], args.gpus * args.nodes
    work, reached = scaling.work_of(resolve_setup(p, machine=machine)), fit.EFFICIENCY["gpu"]
    inside, between = scaling.GB_PER_S[args.gpu.lower()], args.network_gbps / 8
    links = scaling.Links(inside, between, machine.flops_per_s * reached, args.gpus)
    # groups within a node, as large as the model's heads allow
    tensor = max((n for n in range(2, ranks) if math.gcd(args.gpus, work.heads) % n == 0), default=args.gpus)
    both = f"tensor {tensor} ×", ranks // tensor
    ways = {"DDP": "ddp", "FSDP2 (ZeRO-3)": "fsdp", "pipeline": "pipeline", "tensor": "tensor"}
    ways |= {"{} DDP {}".format(*both): "tensor_ddp", "{} FSDP2 {}".format(*both): "tensor_data"}
    memory, steps = [], []
    for name, way, n in [("one GPU", "ddp", 1), *((*words, ranks) for words in ways.items())]:
        predicted = scaling.predict(work, links, way, n, tensor)
        gb = {part: round(size / 2**30, 2) for part, size in predicted.memory.items()}
        gb |= {"all": round(sum(predicted.memory.values()) / 2**30, 2)} if gb else {}
        fits = predicted.why_not or ("yes" if gb["all"] * 1024 <= machine.memory_mb else "no")
        fits += f"; {predicted.idle} GPUs without a row" if predicted.idle else ""
        memory.append({"GB a GPU": name} | gb | {"fits": fits})
        row = {"ms a step": name, "GB sent": round(predicted.volume / 1e9, 2), "over": predicted.link}
        for part in ("compute", "exposed", "bubble", "step"):
            row[part] = round(getattr(predicted, f"{part}_seconds") * 1000, 1)
        row |= {"speed-up": round(predicted.speed_up, 2), "of ideal": round(predicted.efficiency, 2)}
        usd = rates.usd_per_million(predicted.step_seconds, work.tokens, p.usd_per_hour * n / args.gpus)
        row |= {"tokens/s": work.tokens / predicted.step_seconds, "$/M": f"{usd:.4f}"}
        steps += [row] if not predicted.why_not else []
    which = f"{args.nodes} × {args.gpus} {machine.name}"
    print(f"\n{p.stage}: {work.rows} rows of {p.max_tokens:,} tokens a step on {which}")
    print(f"{Table(memory, list(memory[0]))}\n\n{Table(steps)}\n{scaling.MODEL}")
    hidden = f"hidden: {links.overlap:.0%} at most (DDP, FSDP2)"
    print(f"{inside:g} GB/s a GPU in a node, {between:g} a node outside; {hidden}")
    price = f"$ per million tokens: usd_per_hour={p.usd_per_hour:g} a node"
    print(f"arithmetic: {reached:.0%} of the peak; {price}")


def _pages(values: dict[str, Any]) -> tuple[int, str]:
    """How many pages a recipe selects; an index that is far away is asked only where its answer has no known bound."""
    p = for_stage(STAGES["10_explore_index"], values)
    far = any("://" in path for path in p.archive_paths or [p.index_path])
    if far and p.max_pages:
        return p.max_pages, "pages at most (max_pages)"
    if far and not (p.archive_paths or p.domains or p.index_files):
        crawl = for_stage(NOTEBOOKS["81_benchmark_data"], values).crawl_pages
        return crawl, "pages at most, the whole crawl (crawl_pages)"
    from kit.data.select.index import Index

    return Index(p).reasons()["kept"], "pages selected"


def _planned(
    values: dict[str, Any], gpu: str | None
) -> tuple[dict[str, tuple[float, float, str]], list[str]]:
    """(seconds, MB, from what) of training stages that the reference run says nothing of; which of them do not fit."""
    stages = [for_stage(cls, values) for cls in STAGES.values() if issubclass(cls, Training)]
    usual = [rates.measured_by_reference(p) for p in stages]
    if not gpu and all(usual):
        return {}, []
    from kit.train.plan import fit
    from kit.train.plan import machine as machines

    known_gpus = list(machines.GPUS)
    if gpu and gpu.lower() not in known_gpus:
        hint = did_you_mean(gpu, known_gpus)
        raise ParamError(f"unknown GPU '{gpu}'{hint}; known: {', '.join(known_gpus)}")
    planned, warnings = {}, []
    for p, known in zip(stages, usual, strict=True):
        here = None if gpu else machines.this_machine(load.pick_dtype(p.dtype))
        machine = here or machines.GPUS[gpu.lower()]
        estimated, wrong = fit.foresee(p, machine)
        if estimated and (gpu or not known):
            planned[p.stage] = (estimated.seconds, estimated.memory_mb, f"plan for {machine.name}")
            warnings += [f"{p.stage}: {wrong}"] if wrong else []
    return planned, warnings


def _doctor(args: argparse.Namespace) -> int:
    from kit.doctor import examine

    findings = examine()
    print(Table([vars(f) | {"ok": "ok" if f.ok else "no"} for f in findings]))
    return 0 if all(f.ok for f in findings) else 1


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "status": _status,
    "trace": _trace,
    "watch": _watch,
    "estimate": _estimate,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())
