"""Which cases the suite has, the most telling first: where time runs out, the rest is listed as not reached."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.configs import candidates
from benchmarks.gpu.patterns import NAMES, Case

STATIC: list[tuple[str, dict[str, int]]] = [
    ("causal", {}),
    ("sliding_window", {"window": 1024}),
    ("streaming_llm", {"window": 1020, "sinks": 4}),
    ("document", {}),
    ("sliding_window", {"window": 4096}),
    ("prefix_lm", {}),
    ("alibi", {}),
    ("block_sparse", {}),
]
DECODED: list[tuple[str, dict[str, int]]] = [
    ("causal", {}), ("sliding_window", {"window": 4096}), ("streaming_llm", {"window": 1020, "sinks": 4}),
]  # fmt: skip
STEPS = ((64, 8192), (32, 32768), (16, 65536))  # batch, tokens
PATTERN_STEPS = ((64, 8192), (16, 65536))
SHAPE = {"batch": 1, "heads": 16, "kv_heads": 4, "dtype": "bfloat16"}


def numeric(quick: bool, tiny: bool) -> list[list[Case]]:
    """A group for each process."""
    tokens = 160 if tiny else 4096 + 67
    groups = []
    for name in NAMES:
        group: list[Case] = []
        for dim, dtype in (
            ((64, "bfloat16"), (128, "float16"))
            if quick
            else ((64, "bfloat16"), (64, "float16"), (128, "bfloat16"), (128, "float16"))
        ):
            shape: Case = SHAPE | {
                "pattern": name,
                "dim": dim,
                "tokens": tokens,
                "dtype": dtype,
                "params": params(name, tiny),
            }
            group += [shape | {"kind": "numerics"}, shape | {"kind": "cached"}]
        groups.append(group)
    graph = SHAPE | {"kind": "graph", "batch": 4, "dim": 128, "tokens": tokens, "page": 64}
    groups.append([graph | {"pattern": name, "params": own} for name, own in DECODED])
    return groups


def params(name: str, tiny: bool) -> dict[str, int]:
    """Windows that a tiny run has rows outside of."""
    small = {"sliding_window": {"window": 60}, "streaming_llm": {"window": 60}, "longformer": {"window": 30}}
    return small.get(name, {}) if tiny else {}


def timed(quick: bool, tiny: bool) -> list[Case]:
    cases: list[Case] = [{"kind": "ceilings"}]
    lengths = (256,) if tiny else (32768,) if quick else (32768, 8192, 65536)
    dims = (128,) if quick or tiny else (128, 64)
    cases += steps(quick, tiny)
    for tokens in lengths:
        for dim in dims:
            shape: dict[str, Any] = SHAPE | {"dim": dim, "tokens": tokens}
            for name, own in STATIC:
                cases += [shape | {"kind": kind, "pattern": name, "params": own} for kind in ("ours", "flex")]
            cases += [
                shape | {"kind": "sdpa", "pattern": "causal", "params": {}, "backend": b} for b in ("flash", "cudnn")
            ]
    return cases


def steps(quick: bool, tiny: bool) -> list[Case]:
    cases: list[Case] = []
    for dim in (128,) if quick or tiny else (128, 64):
        for batch, tokens in ((2, 128),) if tiny else STEPS[:1] if quick else STEPS:
            shape: dict[str, Any] = SHAPE | {"batch": batch, "dim": dim, "tokens": tokens}
            for page in (64, None):
                cases += [
                    shape | {"kind": "decode", "pattern": name, "params": own, "page": page}
                    for name, own in DECODED
                    if name == "causal" or page
                ]
            cases += [
                shape | {"kind": "sdpa_decode", "pattern": "causal", "params": {}, "backend": b}
                for b in ("flash", "cudnn")
            ]
    return cases


def warmed(cases: list[Case]) -> list[list[Case]]:
    """The cases that compile something, once each, in groups that share little."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        if case["kind"] in ("ours", "decode", "config"):
            names = ("kind", "pattern", "params", "dim", "kernel", "config")
            own = " ".join(str(case.get(name)) for name in names)
        elif case["kind"] == "flex":
            own = f"flex {case['pattern']} {case['params']} {case['dim']} {case['tokens']}"
        else:
            continue
        groups.setdefault(own, []).append(case | {"once": True})
    return list(groups.values())


def tried(pattern: str, params: dict[str, int], dim: int, tokens: int, kernels: list[str]) -> list[Case]:
    """Every candidate of every kernel, and first what the module has."""
    shape = SHAPE | {"kind": "config", "pattern": pattern, "params": params, "dim": dim, "tokens": tokens}
    return [
        shape | {"kernel": kernel, "config": config} for kernel in kernels for config in [None, *candidates(kernel)]
    ]
