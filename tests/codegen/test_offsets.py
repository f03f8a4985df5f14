"""An index is 64 bits wide before it is multiplied by a stride: in the library and in what the templates print."""

from __future__ import annotations

from pathlib import Path

import pytest

import spdsl
from spdsl.api import source_of
from tests.codegen.offsets import narrow_products
from tests.codegen.renamed import STATIC

LIBRARY = sorted((Path(spdsl.__file__).parent / "runtime").rglob("*.py"))
WRITTEN = {
    "everything": STATIC,
    "rows of the call": """pattern p { causal
        m = tensor(head, query, token, bool)
        b = tensor(token, query, 4)
        return attend(where(m[h][q][k]), bias = b[k][q][k % 4])
    }""",
    "pairs": """pattern p { causal
        entries = compress(8, 4)
        rank = dot(entries)
        chosen = top_k(2, score = rank, share = head, unit = max(16))
        return attend(chosen)
    }""",
    "cut": """pattern p {
        coarse = attend(compress(16))
        chosen = top_k(300, score = mass(coarse))
        tiled = threshold(0.1, score = mass(coarse), share = head, unit = max(16), rows = max(16))
        return gate(attend(chosen), attend(tiled))
    }""",
}
PATTERNS = ["streaming_llm", "document", "nsa", "seer_attention", "msa_minimax"]


def together(*texts: str) -> str:
    """Files as one text, in which names of the library stand without `rt.`."""
    bodies = [text.partition("from __future__")[2].partition("\n")[2] for text in texts]
    return "\n".join(bodies).replace("rt.", "")


def library() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in LIBRARY]


def test_the_library() -> None:
    assert len(LIBRARY) > 50
    assert narrow_products(together(*library())) == []


@pytest.mark.parametrize("name", [*PATTERNS, *WRITTEN])
def test_generated_modules(name: str) -> None:
    source = WRITTEN.get(name) or source_of(f"patterns/{name}.spat").text
    assert narrow_products(together(spdsl.compile(source).text, *library())) == []


SEEDED = {
    "a row": "i = tl.arange(0, 16)\n    return tl.load(x.data + i * x.token)",
    "a row in parentheses": "row = tl.arange(0, 16)[:, None]\n    return x.data + (row * stride + row)",
    "a head": "return tl.load(t.level + h * t.level_0)",
    "a product made wide too late": "return x.data + (h * x.head).to(tl.int64)",
    "a map": "return tl.load(units + (h * tiles + i) * most)",
    "a page": "return pages + h * source.page_width",
    "a list": "entry = tl.program_id(0)\n    return lists.units + entry * lists.width",
    "a program": "return x + (h * tl.num_programs(1) + i)",
    "a slot": "return buffer + i * 64 * (C.QK_DIM + C.V_DIM)",
    "a name set anew": "i = i.to(tl.int64)\n    i = tl.program_id(0)\n    return x.data + i * x.token",
}


@pytest.mark.parametrize("name", SEEDED)
def test_a_narrow_product_is_seen(name: str) -> None:
    assert narrow_products(f"@jit\ndef f(x, h, i, stride, C):\n    {SEEDED[name]}\n")


def test_a_narrow_call_of_a_record_is_seen() -> None:
    """What a kernel passes to a field of a record is passed to all functions that stand there."""
    text = (
        "class Pool(NamedTuple):\n    start: Any\n    add: Any\n\n\n"
        "@jit\ndef f(x, i):\n    return x.data + i * x.token\n\n\n"
        "MAX = Pool(None, f)\n\n\n@jit\ndef g(x, i, C):\n    return C.POOL.add(x, i{})\n"
    )
    assert narrow_products(text.format(".to(tl.int64)")) == []
    assert narrow_products(text.format("")) == ["f:8: i * x.token"]


def test_one_narrow_call_is_seen() -> None:
    """A parameter is wide if all that is passed for it is."""
    text = "@jit\ndef f(x, i):\n    return x.data + i * x.token\n\n\n@jit\ndef g(x, i):\n    {}return f(x, i{})\n"
    assert narrow_products(text.format("", ".to(tl.int64)")) == []
    assert narrow_products(text.format("", "")) == ["f:3: i * x.token"]
    assert narrow_products(text.format("f(x, i.to(tl.int64))\n    ", "")) == ["f:3: i * x.token"]
