"""Trains a small language model over bytes with the attention of a pattern, on a CPU or a GPU.

    python examples/train_lm.py --compare nsa,dense --seeds 0,1,2 -D width=16 -D stride=8 -D block=16 -D count=4

Every pattern gets the same seeds, batches in the same order and the same number of steps. See docs/training.md.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import spdsl
from examples.lm import attention, checkpoint, curves
from examples.lm.attention import Dense, Module, Size
from examples.lm.data import read_text
from examples.lm.run import TYPES, Budget, Pace, Run
from spdsl.cli.numbers import number, tokens

PATTERNS = Path(__file__).resolve().parent.parent / "patterns"

console = Console()


def load_patterns(names: list[str], given: dict[str, float]) -> dict[str, Module]:
    """The modules by the name of their runs. A parameter goes to the patterns that have it; one must."""
    modules, taken = {}, set()
    for name in names:
        path = Path(name) if name.endswith(".spat") else PATTERNS / f"{name}.spat"
        if name != "dense" and not path.is_file():
            known = ", ".join(["dense", *sorted(file.stem for file in PATTERNS.glob("*.spat"))])
            raise SystemExit(f"no pattern {name}: give a .spat file or one of {known}")
        source = "" if name == "dense" else any_size(path.read_text(encoding="utf-8"))
        module = spdsl.load(source) if source else Dense
        own = {key: value for key, value in given.items() if key in module.PARAMS}
        taken |= own.keys()
        shown = [f"{key}={value}" for key, value in own.items()]
        modules[" ".join([path.stem, *shown])] = spdsl.load(source, **own) if own else module
    if unknown := given.keys() - taken:
        raise SystemExit(f"-D {', '.join(sorted(unknown))}: no parameter of {', '.join(names)}")
    return modules


def any_size(source: str) -> str:
    """The pattern without the heads and dims of the published model: this one has its own. Lines keep their numbers."""
    return re.sub(r"^[ \t]*(heads|dim)\b.*$", "", source, flags=re.MULTILINE)


def main(words: list[str] | None = None) -> None:
    given = arguments(words)
    if given.plot:
        report(given.plot)
        return
    torch.set_num_threads(given.threads or torch.get_num_threads())
    if given.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # tf32, as is usual in training
    size = Size(given.layers, given.heads, given.kv_heads, given.head_dim)
    modules = load_patterns(given.compare, dict(given.D))
    try:
        text = read_text(given.text, given.length + 1)
        for module in modules.values():
            attention.arguments(module, size)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    budget = Budget(given.steps, given.length, given.batch, given.rate, size, text.digest, given.dtype)
    pace = Pace(given.out, given.test_every, given.save_every, given.tests)
    console.print(f"{len(text.learn):,} bytes to learn, {len(text.test):,} held out", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    columns += (TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, console=console) as progress:
        # Seeds outside: stopped early, the runs that are there still compare.
        for seed in given.seeds:
            for name, module in modules.items():
                run = Run(name, module, seed, budget, pace, torch.device(given.device))
                if given.resume:
                    run.resume()
                run.train(text, progress)
                checkpoint.write_lines(run.folder / "result.jsonl", [run.result()])
    report(given.out)


def report(folder: Path) -> None:
    """Gathers the results of all runs below `folder` into results.jsonl, a table and a picture."""
    results = [line for path in sorted(folder.glob("*/result.jsonl")) for line in checkpoint.read_lines(path)]
    if not results:
        raise SystemExit(f"{folder}: no finished run in it")
    checkpoint.write_lines(folder / "results.jsonl", results)
    console.print(curves.table(results))
    curves.draw(folder, console)


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small language model with the attention of a pattern.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--pattern", help="dense (PyTorch's own), the name of a file in patterns/, or a .spat file")
    what.add_argument("--compare", type=listed, help="several of these, separated by commas: the same runs for each")
    what.add_argument("--plot", type=Path, metavar="DIR", help="train nothing: table and picture of the runs in DIR")
    parser.add_argument("-D", action="append", default=[], type=assigned, metavar="NAME=VALUE", help="a parameter")
    parser.add_argument("--out", type=Path, default=Path("build/train_lm"), help="folder of the runs")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0)
    seeds.add_argument("--seeds", type=lambda text: [int(seed) for seed in listed(text)], help="0,1,2: a run for each")
    parser.add_argument("--text", type=Path, help="file to learn (default: the modules of Python's library)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=tokens, help="of a CPU run; 1 is faster where other work runs beside it")
    parser.add_argument("--dtype", choices=TYPES, default="float32", help="of the products; weights stay float32")
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate")
    size = Size()
    sizes = {"steps": 300, "length": 512, "batch": 4, "layers": size.layers, "heads": size.query_heads}
    sizes |= {"kv-heads": size.kv_heads, "head-dim": size.head_dim, "test-every": 50, "save-every": 50, "tests": 32}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=tokens, default=value, help=f"(default: {value})")
    given = parser.parse_args(words)
    given.seeds = given.seeds or [given.seed]
    given.compare = given.compare or [given.pattern or "dense"]
    if given.heads % given.kv_heads or given.head_dim % 2:
        parser.error("--kv-heads must divide --heads, and --head-dim must be even")
    return given


def listed(text: str) -> list[str]:
    return text.split(",")


def assigned(text: str) -> tuple[str, int | float]:
    name, _, value = text.partition("=")
    exact = number(value)
    return name, int(exact) if exact.denominator == 1 else float(exact)


if __name__ == "__main__":
    main()
