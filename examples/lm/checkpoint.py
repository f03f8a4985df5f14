"""One file per run: the tensors of model and optimizer, and a JSON text beside them.

A file is written whole or not at all, and read with `weights_only`, so that reading one runs no code.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**tensors, "state": json.dumps(state)}, buffer)
    replace(path, buffer.getvalue())


def load(path: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The states of the model, of the optimizer, and the JSON part."""
    kept = torch.load(path, map_location=device, weights_only=True)  # noqa: TID251 (weights_only refuses code)
    return kept["model"], kept["optimizer"], json.loads(kept["state"])


def replace(path: Path, contents: bytes) -> None:
    """Writes beside the file and renames, so that a reader sees the old or the new, and a crash leaves one of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    replace(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
