"""The words of the language. A new one is a file beside this one and a line here."""

from __future__ import annotations

from spdsl.primitives import (
    attend,
    cover,
    dilated,
    first,
    fixed,
    gate,
    given,
    last,
    merge,
    open,
    query,
    random,
    sink,
    sliding,
    stream,
    strided,
    tensor,
    where,
)
from spdsl.primitives.word import Word

WORDS: dict[str, Word] = {
    module.WORD.name: module.WORD
    for module in (
        sink, sliding, first, last, dilated, strided, fixed, random, where, open, cover, given,
        stream, query, tensor,
        attend, gate, merge,
    )
}  # fmt: skip
