"""All kernels that a generated module launches, over its phases, dtypes and head dims."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spdsl.machine.launches import Launch, Workload
from spdsl.machine.record import record
from spdsl.runtime.tuning.trials import tensors_of
from spdsl.targets import Target

# Sizes whose strides have the residues of a real run: all but the dims are multiples of 16.
BATCH = 2
TOKENS = 256
CAPACITY = 4096  # of a cache; pages of 64 tokens then make a table with rows of 64 entries
HEADS = (8, 2)  # query and key heads where the pattern leaves them open

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class _Sizes:
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    dtype: torch.dtype


def survey(
    module: ModuleType,
    dtypes: Sequence[str] = ("bf16",),
    dims: Iterable[tuple[int, int]] = ((64, 64), (128, 128)),
    target: Target | None = None,
) -> list[Launch]:
    """The distinct launches of every phase in `module.PHASES`, each with the first workload that makes it.

    dims: (qk_dim, v_dim); what the pattern fixes takes their place. dtypes: `bf16`, `fp16`, `fp32`, `fp64`.
    target: the configurations are those for its architecture, the splits of a decode step those for its size.
    RuntimeError under TRITON_INTERPRET, ValueError for an unknown dtype or sizes the pattern does not take.
    """
    unknown = [name for name in dtypes if name not in _DTYPES]
    if unknown:
        raise ValueError(f"unknown dtype {unknown[0]!r}: known are {', '.join(_DTYPES)}")
    found: dict[str, Launch] = {}
    with _tables(module, target):
        for workload, call in _calls(module, dtypes, _open_dims(module, dims)):
            for launch in record(module, call):
                found.setdefault(launch.key, replace(launch, workload=workload))
    return list(found.values())


def _calls(
    module: ModuleType, dtypes: Sequence[str], dims: Iterable[tuple[int, int]]
) -> Iterator[tuple[Workload, Callable[[], object]]]:
    runs = {"train": _train, "prefill": _prefill, "decode": _decode}
    heads, kv_heads = _heads(module)
    for qk_dim, v_dim in dims:
        for dtype in dtypes:
            sizes = _Sizes(heads, kv_heads, qk_dim, v_dim, _DTYPES[dtype])
            for phase in module.PHASES:
                yield Workload(phase, dtype, qk_dim, v_dim), partial(runs[phase], module, sizes)


def _train(module: ModuleType, sizes: _Sizes) -> None:
    inputs = _inputs(module, TOKENS, sizes)
    for x in inputs.values():
        if x.dim() == 4 and x.dtype == sizes.dtype and x.shape[2:] in {(TOKENS, sizes.qk_dim), (TOKENS, sizes.v_dim)}:
            x.requires_grad_()  # queries, keys and values; of the rest some take no gradient
    for name in module.MODULE.learned:
        inputs[name].requires_grad_()
    outputs = [x for x in tensors_of(module.attention(**inputs)) if x.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def _prefill(module: ModuleType, sizes: _Sizes) -> None:
    module.prefill(**_inputs(module, TOKENS, sizes), cache=_cache(module, sizes))


def _decode(module: ModuleType, sizes: _Sizes) -> None:
    module.decode(**_inputs(module, 1, sizes), cache=_cache(module, sizes))


def _inputs(module: ModuleType, tokens: int, sizes: _Sizes) -> dict[str, Tensor]:
    inputs: Mapping[str, Tensor] = module.example_inputs(
        BATCH,
        tokens,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        qk_dim=sizes.qk_dim,
        v_dim=sizes.v_dim,
        dtype=sizes.dtype,
        device="cpu",
    )
    return dict(inputs)


def _cache(module: ModuleType, sizes: _Sizes) -> object:
    dims = {"kv_heads": sizes.kv_heads, "qk_dim": sizes.qk_dim, "v_dim": sizes.v_dim}
    return module.Cache(BATCH, CAPACITY, **dims, dtype=sizes.dtype, device="cpu")


def _heads(module: ModuleType) -> tuple[int, int]:
    """`module.HEADS`, or what `example_inputs` takes by default."""
    if hasattr(module, "HEADS"):
        heads, kv_heads = module.HEADS
        return int(heads), int(kv_heads)
    heads, kv_heads = (_default(module.example_inputs, name) for name in ("heads", "kv_heads"))
    return heads or HEADS[0], kv_heads or HEADS[1]


def _open_dims(module: ModuleType, dims: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The dims with those that the pattern fixes: the cache has a default for them, and for no others."""
    cache = getattr(module, "Cache", None)
    fixed = (None, None) if cache is None else (_default(cache, "qk_dim"), _default(cache, "v_dim"))
    return list(dict.fromkeys((fixed[0] or qk_dim, fixed[1] or v_dim) for qk_dim, v_dim in dims))


def _default(function: Callable[..., Any], name: str) -> int | None:
    parameter = inspect.signature(function).parameters.get(name)
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None


@contextmanager
def _tables(module: ModuleType, target: Target | None) -> Iterator[None]:
    """The launches of `module` are those for the target."""
    if target is None:
        yield
        return
    module.use_tables(target.architecture, target.sm_count)
    try:
        yield
    finally:
        module.use_tables(None)
