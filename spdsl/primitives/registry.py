"""The words of the language. A new one is a file beside this one and a line here."""

from __future__ import annotations

from spdsl.primitives import (
    allow,
    attend,
    below,
    compress,
    cosine,
    cover,
    dilated,
    dot,
    expect,
    first,
    fixed,
    gate,
    given,
    kept,
    kl,
    last,
    mass,
    merge,
    open,
    pool,
    query,
    random,
    sink,
    sliding,
    softmax,
    stream,
    strided,
    tensor,
    threshold,
    top_k,
    top_p,
    where,
)
from spdsl.primitives.word import Word

WORDS: dict[str, Word] = {
    module.WORD.name: module.WORD
    for module in (
        sink, sliding, first, last, dilated, strided, fixed, random, where, open, cover, given,
        stream, query, tensor, compress,
        mass, dot, cosine, softmax, top_k, top_p, threshold,
        attend, below, gate, merge,
        pool, kl, kept,
        expect, allow,
    )
}  # fmt: skip
