"""Patterns small enough that 50 tokens hit full, partial and empty 16 x 16 tiles, and how they become modules."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import spdsl
from spdsl.api import source_of
from spdsl.compiler import as_params
from spdsl.diagnostics import Report
from spdsl.ir.pattern import Pattern
from spdsl.passes.lower import lower
from spdsl.syntax.parse import parse

CATALOGUE: dict[str, dict[str, int]] = {
    "alibi": {},
    "big_bird": {"block": 16},
    "blasst": {"prefill_scale": 20, "decode_scale": 20, "rows": 16, "unit": 16, "restart": 32},
    "block_sparse": {"block": 16},
    "causal": {},
    "dilated": {"window": 5, "step": 3},
    "document": {},
    "longformer": {"window": 9},
    "prefix_lm": {},
    "sink_attention": {"window": 37},
    "sliding_window": {"window": 36},
    "sparse_transformer": {"stride": 7},
    "streaming_llm": {"sinks": 3, "window": 34},
}
TEXTS = {
    "window": "causal return attend(sliding(9))",
    "ahead": "return attend(sliding(3, ahead = 20))",
    "everything": "return attend(all)",
    "hole": "causal return attend(all - sliding(17))",
    "empty_rows": "return attend(where(k < 20) & where(q // 16 != 1))",
    "units": "causal return attend(first(1, unit = 12) | last(2, unit = 12))",
    "ahead_units": "return attend(last(2, unit = 8, ahead = 1) | where(k >= length - 3))",
    "fixed": "causal return attend(fixed(8, 2))",
    "strided": "causal return attend(strided(6) | sliding(4))",
    "drawn": "causal r = random(2, unit = 8, rows = 4, seed = 3) return attend(r | sliding(5))",
    "drawn_group": "r = random(2, unit = 16, rows = 16, seed = 1, share = group) return attend(r)",
    "modulo": "causal return attend(where((q + 2 * k) % 5 < 2))",
    "quotient": "return attend(where(q / 3 < k / 2) & where(k < length - 4))",
    "by_head": "causal return attend(sliding(20) & where(h % 2 == 0) | sink(18) & where(h % 2 == 1))",
    "kv_head": "causal broad = tensor(kv_head, bool) return attend(sliding(3) | where(broad[h] == 1))",
    "token_both": "doc = tensor(token, int) return attend(where(doc[k] <= doc[q]) & where(q - k < 40))",
    "constant_index": "causal b = tensor(3) return attend(where(b[0] * (q - k) < 20 * b[2]) | sliding(3))",
    "reach": "causal reach = tensor(token, int) return attend(where(q - k < reach[k]) | sink(2))",
    "softcap": "causal return attend(sliding(33), scale = 0.7, softcap = 1.5)",
    "softcap_sink": "causal s = tensor(head) return attend(all, softcap = 2, sink_logit = s)",
    "token_bias": "causal w = tensor(token) return attend(sliding(34), bias = w[k] - 0.125 * (q - k))",
    "two_streams": "causal far = stream() return attend(kv[sliding(9)] | far[all - sliding(9)])",
    "two_streams_sink": (
        "causal s = tensor(head) far = stream() return attend(kv[sink(20)] | far[all - sink(20)], sink_logit = s)"
    ),
    "value_is_key": "causal kv = stream(value = key, v = 16) return attend(sliding(35))",
    "gate": "causal return gate(attend(sliding(9)), attend(sink(18) - sliding(9)))",
    "merge": "causal return merge(attend(sliding(9)), attend(all - sliding(9)))",
    "own_query": "causal ask = query() return attend(sliding(35), query = ask)",
    "extras": "causal return attend(all), attend(sink(2))",
    "by_length": "causal return attend(all) if length < 20 return attend(sliding(9))",
    "by_tensor": "causal broad = tensor(bool) return attend(all) if broad == 1 return attend(sliding(9))",
    "given_to_all": "causal a = given(rows = 8, unit = 8, share = all) return attend(a | sliding(3))",
    "two_grains": (
        "causal a = given(rows = 16, unit = 16) b = given(rows = 8, unit = 4, share = group) return attend(a | b)"
    ),
    "without_given": "causal a = given(rows = 8, unit = 8, share = head) return attend(all - a)",
}
NAMES = (*CATALOGUE, *TEXTS)


def text_of(name: str) -> str:
    """The source of a case: the catalogue's file, the short text of that name, or the body given."""
    if name in CATALOGUE:
        return source_of(f"patterns/{name}.spat").text
    body = TEXTS.get(name, name)
    title = name if name in TEXTS else "written"
    return f"pattern {title} {{ {body.replace(' return', chr(10) + 'return')} }}"


@cache
def compiled(name: str, **params: int) -> spdsl.Module:
    return spdsl.compile(text_of(name), **{**CATALOGUE.get(name, {}), **params})


@cache
def module_of(name: str, **params: int) -> ModuleType:
    return compiled(name, **params).load()


def printed(name: str) -> str:
    """The text of the module, for changes of it."""
    return compiled(name).text


@cache
def pattern_of(name: str, **params: int) -> Pattern:
    report = Report(source_of(text_of(name)))
    found = lower(parse(report.source, report).patterns[0], report, as_params({**CATALOGUE.get(name, {}), **params}))
    report.check()
    assert found is not None
    return found


def mutated(text: str, old: str, new: str) -> str:
    """The text with every `old` replaced; the change must be real."""
    changed = text.replace(old, new)
    assert changed != text, f"{old!r} does not occur"
    return changed


def module_from(text: str, path: Path) -> ModuleType:
    """Imports changed text of a generated module from a file, under a namespace of its own."""
    name = f"{path.stem}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    path.write_text(re.sub(r'NAMESPACE = "\w+"', f'NAMESPACE = "{name}"', text), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
