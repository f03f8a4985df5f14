"""One training run: a model, its optimizer and what happened to them, under a budget that other runs share."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from examples.lm import checkpoint, curves
from examples.lm.attention import Module, Size
from examples.lm.data import Text
from examples.lm.model import LanguageModel

CHECKPOINT = "checkpoint.pt"
# Steps of each start that the speed leaves out: kernels are compiled and memory is found then.
FIRST = 3
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Budget:
    """What runs must have in common for their losses to compare; `length` and `batch` count bytes and sequences."""

    steps: int
    length: int
    batch: int
    rate: float
    size: Size
    text: str  # digest
    dtype: str

    def learning_rate(self, step: int) -> float:
        """Rises over the first tenth, then falls along a cosine to a tenth."""
        rise = max(1, self.steps // 10)
        if step < rise:
            return self.rate * (step + 1) / rise
        turn = math.pi * (step - rise) / max(1, self.steps - rise)
        return self.rate * (0.55 + 0.45 * math.cos(turn))


@dataclass(frozen=True)
class Pace:
    """How often a run looks at held-out text and saves itself, in steps, and the folder for that."""

    out: Path
    test_every: int
    save_every: int
    tests: int  # held-out sequences


@dataclass
class History:
    """What happened so far: the loss of every step, held-out losses by step, and the time of the timed steps."""

    losses: list[float] = field(default_factory=list)
    tests: dict[int, float] = field(default_factory=dict)
    timed_steps: int = 0
    seconds: float = 0.0

    @property
    def step(self) -> int:
        return len(self.losses)

    def lines(self) -> list[dict[str, float]]:
        steps = [{"step": step, "loss": loss} for step, loss in enumerate(self.losses, start=1)]
        return steps + [{"step": step, "test": loss} for step, loss in self.tests.items()]

    @classmethod
    def of(cls, kept: dict[str, Any]) -> History:
        return cls(**{**kept, "tests": {int(step): loss for step, loss in kept["tests"].items()}})


class Run:
    """One model in training: a pattern and a seed under a budget, in a folder of its own."""

    def __init__(self, name: str, module: Module, seed: int, budget: Budget, pace: Pace, device: torch.device) -> None:
        self.name, self.seed, self.budget, self.pace, self.device = name, seed, budget, pace, device
        self.folder = pace.out / f"{name.replace(' ', ',')},seed={seed}"
        self.model = LanguageModel(budget.size, module, seed).to(device)
        self.optimizer = optimizer_of(self.model, budget.rate)
        self.history = History()
        self.about = {"name": name, "module": module.MODULE.namespace, "seed": seed, "budget": asdict(budget)}

    @property
    def title(self) -> str:
        """For a line of the terminal: without parameters."""
        return f"{self.name.split()[0]}, seed {self.seed}"

    def train(self, text: Text, progress: Progress) -> None:
        """The steps that are left; saves at the end, too."""
        task = progress.add_task(self.title, total=self.budget.steps, loss="", speed="")
        timed_from = self.history.step + FIRST
        while self.history.step < self.budget.steps:
            began = time.perf_counter()
            loss = self.step(text)
            if self.history.step > timed_from:
                self.history.seconds += time.perf_counter() - began
                self.history.timed_steps += 1
            if not math.isfinite(loss):
                raise SystemExit(f"{self.title}: the loss of step {self.history.step} is {loss}")
            told = {"loss": f"loss {loss:.3f}", "speed": f"{self.tokens_per_second:,.0f} tokens/s"}
            progress.update(task, completed=self.history.step, **told)
            self._after_step(text, progress)

    def step(self, text: Text) -> float:
        """One step of training; returns its loss in nats per byte, which waits for the device."""
        number, budget = self.history.step, self.budget
        batch = text.batch(self.seed, number, budget.batch, budget.length + 1).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = budget.learning_rate(number)
        self.optimizer.zero_grad()
        with self._precision():
            loss = self.model.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.history.losses.append(loss.item())
        return self.history.losses[-1]

    @torch.no_grad()
    def test(self, text: Text) -> float:
        """The loss on held-out text, nats per byte."""
        stretches = text.held_out(self.pace.tests, self.budget.length + 1).split(self.budget.batch)
        with self._precision():
            losses = [self.model.loss(part.to(self.device)).item() * len(part) for part in stretches]
        return sum(losses) / self.pace.tests

    def save(self) -> None:
        state = {"about": self.about, "history": asdict(self.history)}
        checkpoint.save(self.folder / CHECKPOINT, self.model, self.optimizer, state)
        checkpoint.write_lines(self.folder / curves.CURVE, [self.about, *self.history.lines()])

    def resume(self) -> None:
        """Goes on where the checkpoint of this folder stands, if there is one; it must be of the same run."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        model, optimizer, state = checkpoint.load(path, self.device)
        if state["about"] != self.about:
            raise SystemExit(f"{path} is of another run: {differences(state['about'], self.about)}")
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.history = History.of(state["history"])

    @property
    def tokens_per_second(self) -> float:
        """Of training steps alone; 0 before there is one that counts."""
        tokens = self.history.timed_steps * self.budget.batch * self.budget.length
        return tokens / self.history.seconds if self.history.seconds else 0.0

    def result(self) -> dict[str, Any]:
        parameters = sum(weight.numel() for weight in self.model.parameters())
        loss = self.history.tests[self.budget.steps]
        speed = {"tokens_per_second": round(self.tokens_per_second, 1), "device": device_name(self.device)}
        return {**self.about, "loss": loss, **speed, "parameters": parameters, "torch": torch.__version__}

    def _after_step(self, text: Text, progress: Progress) -> None:
        step = self.history.step
        last = step == self.budget.steps
        if last or step % self.pace.test_every == 0:
            self.history.tests[step] = self.test(text)
            progress.console.print(
                f"{self.title}, step {step}: held-out loss {self.history.tests[step]:.4f}, "
                f"{self.tokens_per_second:,.0f} tokens/s",
                highlight=False,
            )
        if last or step % self.pace.save_every == 0:
            self.save()

    def _precision(self) -> AbstractContextManager[Any]:
        kind = TYPES[self.budget.dtype]
        return nullcontext() if kind == torch.float32 else torch.autocast(self.device.type, dtype=kind)


def optimizer_of(model: LanguageModel, rate: float) -> torch.optim.Optimizer:
    decaying = {id(weight) for weight in model.matrices().values()}
    groups = [
        {"params": [x for x in model.parameters() if id(x) in decaying], "weight_decay": 0.1},
        {"params": [x for x in model.parameters() if id(x) not in decaying], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def differences(kept: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The entries that differ, also inside the budget."""
    old, new = ({**one, **one["budget"], "budget": None} for one in (kept, wanted))
    return ", ".join(f"{key} {old.get(key)} there, {new[key]} here" for key in new if old.get(key) != new[key])


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
