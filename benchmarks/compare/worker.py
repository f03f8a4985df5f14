"""Results of one pattern in one checkout. A script: `worker.py` with PYTHONPATH at the checkout, a job on stdin.

The job is JSON: text, params, tokens, seeds, folder, reference. Each seed gives one file `<seed>.npz` there. Only the
public interface of a module is used, so that checkouts of different insides can be compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor

import spdsl

Tensors = dict[str, Tensor]
SIZES = {"heads": 4, "kv_heads": 2, "qk_dim": 32, "v_dim": 16}
DECODED = 5  # tokens that are generated after the prompt
CHUNK = 48  # tokens of the first part of a prompt: whole tiles of every pattern that is compared
PAGES = (16, None)


def main() -> None:
    job = json.load(sys.stdin)
    module = spdsl.load(job["text"], **job["params"])
    for seed in job["seeds"]:
        found = dict(results(module, job["tokens"], seed, job["reference"]))
        numpy.savez(Path(job["folder"]) / f"{seed}.npz", **{name: x.numpy() for name, x in found.items()})


def results(module: ModuleType, tokens: int, seed: int, reference: bool) -> Iterator[tuple[str, Tensor]]:
    """Every result of every phase: (name, tensor on the CPU)."""
    torch.manual_seed(seed)
    inputs: Tensors = module.example_inputs(2, tokens, **SIZES)
    if hasattr(module, "attention"):
        yield from trained("attention", module.attention, inputs)
        if reference:
            yield from trained("reference", module.reference, inputs)
    if hasattr(module, "choices"):
        yield from ((f"choices.{i}", x) for i, x in enumerate(flat(module.choices(**inputs))))
    for page in PAGES if hasattr(module, "decode") else ():
        yield from generated(module, inputs, tokens, page)


def trained(name: str, attend: Any, inputs: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Outputs and the gradients of the sum of their squares."""
    own = {key: x.clone().requires_grad_(learns(x)) for key, x in inputs.items()}
    outputs = flat(attend(**own, return_lse=True))
    yield from ((f"{name}.out.{i}", x.detach()) for i, x in enumerate(outputs))
    sum(x[x.isfinite()].square().sum() for x in outputs if x.requires_grad).backward()
    yield from ((f"{name}.grad.{key}", x.grad) for key, x in own.items() if x.grad is not None)


def learns(x: Tensor) -> bool:
    """Queries, keys, values, gates and weights do; tensors that a test or a bias reads have fewer axes."""
    return x.is_floating_point() and x.dim() >= 3


def generated(module: ModuleType, inputs: Tensors, tokens: int, page: int | None) -> Iterator[tuple[str, Tensor]]:
    """A prompt in two chunks, then single tokens."""
    shape = {name: SIZES[name] for name in ("kv_heads", "qk_dim", "v_dim")}
    cache = module.Cache(2, tokens + 7, page=page, **shape)
    ends = [CHUNK, tokens - DECODED, *range(tokens - DECODED + 1, tokens + 1)]
    for start, end in zip([0, *ends], ends, strict=False):
        call = module.decode if end - start == 1 else module.prefill
        found = call(**piece(inputs, tokens, start, end), cache=cache, return_lse=True)
        yield from ((f"cache.{page}.{start}.{i}", x) for i, x in enumerate(flat(found)))


def piece(inputs: Tensors, tokens: int, start: int, end: int) -> Tensors:
    """The rows [start, end) of all that has rows; lists of row tiles by their tiles."""
    cut = {}
    for name, x in inputs.items():
        if x.dim() == 4 and not x.is_floating_point():
            rows = -(-tokens // x.shape[2])
            cut[name] = x[:, :, start // rows : (end - 1) // rows + 1]
        elif x.dim() == 4 and x.shape[2] == tokens:
            cut[name] = x[:, :, start:end]
        else:
            cut[name] = x[:, start:end] if x.dim() == 2 and x.shape[1] == tokens else x
    return cut


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    parts = found.values() if isinstance(found, dict) else found
    return [x for part in parts for x in flat(part)]


if __name__ == "__main__":
    main()
