"""Text as bytes: what to learn, what is held out, and which stretch comes at which step."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 20  # one file in 20 of the library, one byte in 20 of a file
STEPS = 1 << 20  # steps that one seed has batches for


@dataclass(frozen=True)
class Text:
    """`learn` and `test` are bytes, uint8."""

    learn: Tensor
    test: Tensor

    @property
    def digest(self) -> str:
        both = self.learn.numpy().tobytes() + b"\0" + self.test.numpy().tobytes()
        return hashlib.sha256(both).hexdigest()[:16]

    def batch(self, seed: int, step: int, count: int, length: int) -> Tensor:
        """`count` stretches from random places, int64 [count, length]; they depend on nothing but the arguments."""
        draw = torch.Generator().manual_seed(seed * STEPS + step)
        return stretches(self.learn, torch.randint(len(self.learn) - length + 1, (count,), generator=draw), length)

    def held_out(self, count: int, length: int) -> Tensor:
        """`count` stretches at equal distances, the same for every run: int64 [count, length]."""
        return stretches(self.test, torch.linspace(0, len(self.test) - length, count).long(), length)


def stretches(text: Tensor, starts: Tensor, length: int) -> Tensor:
    return text[starts[:, None] + torch.arange(length)].long()


def read_text(path: Path | None, length: int) -> Text:
    """A file, its end held out; without one the modules of Python's standard library, every 20th held out."""
    text = library() if path is None else divided(path.read_bytes())
    if min(len(text.learn), len(text.test)) < length:
        raise ValueError(f"{path or 'the library'}: too short for stretches of {length} bytes")
    return text


def library() -> Text:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [file.read_bytes() for file in files]
    learn = b"".join(part for number, part in enumerate(parts) if number % HELD_OUT)
    return Text(as_bytes(learn), as_bytes(b"".join(parts[::HELD_OUT])))


def divided(text: bytes) -> Text:
    border = len(text) - len(text) // HELD_OUT
    return Text(as_bytes(text[:border]), as_bytes(text[border:]))


def as_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
