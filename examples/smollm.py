"""`make eval`: SmolLM2-135M, a pretrained Llama, with the attention of generated modules in the place of its own.

For each length and pattern: the loss of the last tokens, decoded one by one after the prompt, and how many of 32
needles are found. Beside it what the pattern leaves out of the attention of the dense model (`spdsl.diagnose`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save_file

from examples.llama.evaluate import Answered, Entry, answer, left_out
from examples.llama.model import Llama
from examples.llama.report import draw, read, written
from examples.llama.text import Context, context, digest, prose
from examples.llama.tokenizer import Tokenizer
from examples.llama.weights import Unavailable, load, path_of_model

DOCS = Path(__file__).resolve().parent.parent / "docs"
TOLERANCE = 1e-3  # of log-probabilities: two orders of the same sums, thirty layers deep

# What is compared: patterns that decode without trained weights. `dense` comes first, the others are beside it.
ENTRIES = (
    Entry("dense"),
    Entry("causal", "causal"),
    Entry("sliding_window", "sliding_window", {"window": 512}),
    Entry("streaming_llm", "streaming_llm", {"sinks": 4, "window": 508}),
    Entry("dilated", "dilated", {"window": 512, "step": 2}),
    Entry("sparse_transformer", "sparse_transformer", {"stride": 128}),
    Entry("blasst", "blasst"),
    Entry("moba", "moba", {"block": 256, "count": 3}, longest=1024),
)
# Not here: what is not causal (big_bird, longformer, prefix_lm), reads what the caller gives (block_sparse, document)
# or is trained with the model (alibi, sink_attention, seer_attention, nsa, msa_minimax); and infllm_v2, which is dense
# below 8,192 tokens.


@dataclass(frozen=True)
class Plan:
    lengths: tuple[int, ...]
    tail: int
    entries: tuple[Entry, ...]

    def of(self, length: int) -> list[Entry]:
        return [entry for entry in self.entries if entry.longest is None or length <= entry.longest]


FULL = Plan((1024, 4096, 8192), 256, ENTRIES)
SHORT = Plan((1024,), 64, tuple(entry for entry in ENTRIES if entry.name in ("dense", "causal", "streaming_llm")))
_ASKED = 1024  # tokens that the questions count as, on the bar


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parsed(arguments)
    console = Console(highlight=False)
    if given.draw is not None:
        _write_docs(read(given.draw))
        return 0
    try:
        model, tokenizer = load(path_of_model())
    except Unavailable as error:
        console.print(str(error))
        return 0 if given.if_there else 2
    torch.set_num_threads(given.threads)
    results = run(_plan(given), model, tokenizer, console, given.save)
    console.print(_shown(results))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {given.out}")
    if results["difference"] > TOLERANCE:
        console.print(f"causal is not dense: log-probabilities differ by {results['difference']:.1e}")
        return 1
    return 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="SmolLM2-135M with the attention of generated modules")
    parser.add_argument("--short", action="store_true", help="1,024 tokens, three attentions: within three minutes")
    parser.add_argument("--lengths", type=lambda text: tuple(map(int, text.split(","))), help="such as 1024,4096")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of attentions, beside dense")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--save", type=Path, help="a folder for q, k, v of some layers, as `spdsl diagnose` reads them")
    parser.add_argument("--draw", type=Path, help="only writes docs/smollm.md and its picture, from such a JSON file")
    parser.add_argument("--if-there", action="store_true", help="without the model says so, and is no error")
    return parser.parse_args(arguments)


def _plan(given: argparse.Namespace) -> Plan:
    plan = SHORT if given.short else FULL
    wanted = {"dense", "causal", *given.only} if given.only else None
    entries = plan.entries
    if wanted is not None:
        entries = tuple(replace(entry, longest=None) for entry in entries if entry.name in wanted)
    return Plan(given.lengths or plan.lengths, plan.tail, entries)


def run(plan: Plan, model: Llama, tokenizer: Tokenizer, console: Console, save: Path | None) -> dict[str, Any]:
    """All results, as JSON has them."""
    text = prose()
    tokens = tokenizer.encode(text[: 8 * max(plan.lengths)])
    rows: list[dict[str, Any]] = []
    difference = 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        work = sum((length + _ASKED) * len(plan.of(length)) for length in plan.lengths)
        task = bar.add_task("", total=work)
        for length in plan.lengths:
            given = context(tokenizer, tokens, length, plan.tail)
            dense: Answered | None = None
            for entry in plan.of(length):
                bar.update(task, description=f"{length} {entry.name}")
                share = (length + _ASKED) / (2 * model.size.layers)
                began = time.monotonic()
                found = answer(entry, model, given, lambda share=share: bar.advance(task, share))
                seconds = time.monotonic() - began
                dense = dense or found
                if entry.name == "causal":
                    difference = max(difference, (found.logs - dense.logs).abs().max().item())
                rows.append(_row(entry, given, found, dense, seconds))
            if save is not None and dense is not None:
                save.mkdir(parents=True, exist_ok=True)
                save_file(dense.vectors, save / f"smollm_{length}.safetensors")
    return {
        "rows": rows, "difference": difference, "threads": torch.get_num_threads(),
        "text": f"docstrings of the library of Python {sys.version.split()[0]} (digest {digest(text)})",
        "versions": f"torch {torch.__version__}",
    }  # fmt: skip


def _row(entry: Entry, given: Context, found: Answered, dense: Answered, seconds: float) -> dict[str, Any]:
    return {
        "name": entry.name, "title": entry.title, "length": len(given.prompt) + len(given.tail),
        "tail": len(given.tail), "loss": found.loss, "needles": found.by_depth, "seconds": round(seconds, 1),
        **left_out(entry, dense.vectors),
    }  # fmt: skip


def _shown(results: dict[str, Any]) -> Table:
    table = Table("tokens", "attention", "loss", "needles by depth", "sparsity", "mass kept", "seconds")
    for row in results["rows"]:
        depths = " ".join(map(str, row["needles"]))
        shares = (f"{100 * row[name]:.1f}%" for name in ("sparsity", "kept"))
        table.add_row(str(row["length"]), row["title"], f"{row['loss']:.4f}", depths, *shares, str(row["seconds"]))
    return table


def _write_docs(results: dict[str, Any]) -> None:
    page = DOCS / "smollm.md"
    page.write_text(written(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    draw(results, DOCS / "smollm.png")


if __name__ == "__main__":
    sys.exit(main())
