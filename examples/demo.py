"""`make demo`: a small language model on sparse attention, on a CPU, from a pattern file to generated text.

1. Compiles patterns/streaming_llm.spat, prints the compile report and draws the mask.
2. Trains a byte-level model on the text of Python's own standard library, once with the generated attention and
   once with dense attention: same seed, same batches, same number of steps.
3. Generates text through `prefill` and `decode`, and checks it against `attention` over the whole text.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from torch import Tensor

import spdsl
from examples.byte_lm import Attend, ByteLM, Size, dense

PATTERN = Path(__file__).resolve().parent.parent / "patterns" / "streaming_llm.spat"
SINKS, WINDOW = 4, 64
SEED = 7
HELD_OUT = 20  # every 20th file is kept for the test loss
# The cached and the whole run add the same fp32 terms in another order; logits are of size 10.
LOGIT_TOLERANCE = 1e-4

console = Console()


@dataclass(frozen=True)
class Plan:
    """How much work to do; `generate` and `prompt` count bytes and together fit the model's length.

    Training ends after `steps` steps or, without that number, after `seconds` for both models together.
    """

    size: Size
    steps: int | None
    batch: int
    prompt: int
    generate: int
    seconds: float = 60.0

    def progress(self, step: int, seconds: float) -> float:
        """The part of the training that is done, 1 or more at its end."""
        return step / self.steps if self.steps else seconds / self.seconds


FULL = Plan(Size(), steps=None, batch=4, prompt=256, generate=200)
QUICK = Plan(Size(length=192), steps=6, batch=2, prompt=96, generate=40)


@dataclass
class Run:
    """One model in training: what it attends with, its losses in nats per byte, and the seconds it took."""

    name: str
    attend: Attend
    model: ByteLM
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)

    def step(self, text: Tensor) -> None:
        began = time.perf_counter()
        loss = self.model.loss(text, self.attend)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - began


def main() -> None:
    plan, out = arguments()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)

    console.rule("1  from a pattern to a module")
    console.print(PATTERN.read_text(encoding="utf-8").rstrip(), style="green", markup=False, highlight=False)
    sizes = ["-D", f"sinks={SINKS}", "-D", f"window={WINDOW}"]
    file = os.path.relpath(PATTERN)
    command_line("compile", file, "-o", str(out), *sizes, "--report")
    command_line("show", file, *sizes, "--length", str(plan.size.length), "-o", str(out / "mask.png"))
    module = spdsl.load(PATTERN, sinks=SINKS, window=WINDOW)

    console.rule("2  training, beside dense attention")
    train_text, test_text = library_text()
    runs = train(plan, module, train_text)
    show_losses(plan, runs, test_text, out / "loss.png")

    console.rule("3  prefill and decode")
    prompt = test_text[: plan.prompt][None]
    check_generation(plan, module, runs[0].model, prompt)


def arguments() -> tuple[Plan, Path]:
    parser = argparse.ArgumentParser(description="Train and run a small language model on generated attention.")
    parser.add_argument("--quick", action="store_true", help="short texts and six steps: a few seconds")
    parser.add_argument("--steps", type=int, help="training steps of each model (default: as many as fit in a minute)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the module and the pictures")
    given = parser.parse_args()
    if given.steps is not None and given.steps < 1:
        parser.error("--steps must be at least 1")
    plan = QUICK if given.quick else FULL
    return replace(plan, steps=given.steps or plan.steps), given.out


def command_line(*words: str) -> None:
    """Runs the `spdsl` command in a process of its own; kernels are compiled there, never interpreted."""
    console.print("\n$ spdsl " + " ".join(words), style="bold", markup=False, highlight=False, soft_wrap=True)
    code = "import sys; from spdsl.cli import main; sys.exit(main())"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code, *words], check=True, env=environment)


def library_text() -> tuple[Tensor, Tensor]:
    """The modules of Python's standard library as bytes, in order of their names: text to learn, text held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [file.read_bytes() for file in files]
    learn = b"".join(part for number, part in enumerate(parts) if number % HELD_OUT)
    test = b"".join(parts[::HELD_OUT])
    console.print(
        f"{len(files)} files of Python's standard library: {len(learn):,} bytes to learn, {len(test):,} held out"
    )
    return as_bytes(learn), as_bytes(test)


def as_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def train(plan: Plan, module: ModuleType, text: Tensor) -> tuple[Run, Run]:
    """Both models take every step on the same batch, in turn."""
    sparse = Run("streaming_llm", module.attention, ByteLM(plan.size))
    full = Run("dense", dense, ByteLM(plan.size))
    full.model.load_state_dict(sparse.model.state_dict())
    draw = torch.Generator().manual_seed(SEED)
    with Progress(TextColumn("{task.description}"), BarColumn(), console=console) as progress:
        task = progress.add_task("training", total=1.0)
        while not progress.finished:
            batch = windows(text, plan.batch, plan.size.length + 1, draw)
            for run in (sparse, full):
                run.step(batch)
            step, seconds = len(full.losses), sparse.seconds + full.seconds
            told = ", ".join(f"{run.name} {run.losses[-1]:.2f}" for run in (sparse, full))
            progress.update(task, completed=plan.progress(step, seconds), description=f"step {step}, loss: {told}")
    return sparse, full


def windows(text: Tensor, count: int, length: int, draw: torch.Generator) -> Tensor:
    """`count` stretches of `length` bytes from random places: [count, length]."""
    starts = torch.randint(len(text) - length, (count, 1), generator=draw)
    return text[starts + torch.arange(length)]


@torch.no_grad()
def held_out_loss(plan: Plan, run: Run, text: Tensor) -> float:
    batch = windows(text, 2 * plan.batch, plan.size.length + 1, torch.Generator().manual_seed(SEED))
    return run.model.loss(batch, run.attend).item()


def show_losses(plan: Plan, runs: tuple[Run, Run], test_text: Tensor, picture: Path) -> None:
    table = Table(
        Column("attention", no_wrap=True), "keys", Column("loss, first to last", no_wrap=True), "held out", "seconds"
    )
    seen = (f"{SINKS + WINDOW}", f"{plan.size.length}")
    for run, keys in zip(runs, seen, strict=True):
        ends = f"{run.losses[0]:.2f} {sparkline(run.losses)} {run.losses[-1]:.2f}"
        table.add_row(run.name, keys, ends, f"{held_out_loss(plan, run, test_text):.3f}", f"{run.seconds:.1f}")
    console.print(table)
    console.print("Losses are in nats per byte; keys is the most that a query sees.")
    draw_losses(runs, picture)


def sparkline(values: list[float], width: int = 20) -> str:
    """One line of eighth blocks: the mean of each of `width` stretches, from 0 to the largest."""
    stretches = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in stretches if part]
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * mean / max(means)))] for mean in means)


def draw_losses(runs: tuple[Run, Run], picture: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("No picture of the losses: matplotlib is not installed (pip install 'spdsl[pictures]').")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        axes.plot(range(1, len(run.losses) + 1), run.losses, label=run.name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="The same model, the same batches")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)
    console.print(f"wrote {picture}")


@torch.no_grad()
def check_generation(plan: Plan, module: ModuleType, model: ByteLM, prompt: Tensor) -> None:
    """Generates with the cache, then asks `attention` for the logits of the whole text at once."""
    began = time.perf_counter()
    text, cached = generate(plan, module, model, prompt)
    seconds = time.perf_counter() - began
    whole = model(text[:, :-1], [module.attention] * plan.size.layers)[:, prompt.shape[1] - 1 :]
    written = text[:, prompt.shape[1] :]

    console.print(readable(prompt), style="dim", markup=False, highlight=False, end="")
    console.print(readable(written), style="cyan", markup=False, highlight=False)
    error = (cached - whole).abs().max().item()
    same = int((whole.argmax(-1) == written).sum())
    console.print(
        f"\n{plan.generate} bytes in {seconds:.2f} s through the cache; against attention over the whole text: "
        f"largest difference of a logit {error:.1e} (allowed {LOGIT_TOLERANCE:.0e}), "
        f"{same} of {plan.generate} bytes equal"
    )
    if error > LOGIT_TOLERANCE or same != plan.generate:
        raise SystemExit("prefill and decode do not agree with attention")


def generate(plan: Plan, module: ModuleType, model: ByteLM, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """The prompt and `plan.generate` most likely bytes [1, tokens], and the logits each was chosen from."""
    size = plan.size
    capacity = prompt.shape[1] + plan.generate
    shape = {"kv_heads": size.kv_heads, "qk_dim": size.head_dim, "v_dim": size.head_dim}
    caches = [module.Cache(1, capacity, **shape, device="cpu", dtype=torch.float32) for _ in range(size.layers)]
    prefill = [with_cache(module.prefill, cache) for cache in caches]
    decode = [with_cache(module.decode, cache) for cache in caches]

    logits = [model(prompt, prefill)[:, -1:]]
    text = torch.cat((prompt, logits[-1].argmax(-1)), dim=1)
    while len(logits) < plan.generate:
        logits.append(model(text[:, -1:], decode, start=text.shape[1] - 1))
        text = torch.cat((text, logits[-1].argmax(-1)), dim=1)
    return text, torch.cat(logits, dim=1)


def with_cache(step: Attend, cache: object) -> Attend:
    """`module.prefill` or `module.decode` as a function of q, k, v alone."""
    return lambda q, k, v: step(q, k, v, cache)


def readable(text: Tensor) -> str:
    return bytes(text[0].tolist()).decode("utf-8", errors="replace")


if __name__ == "__main__":
    main()
