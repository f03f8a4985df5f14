"""The words of the language. A new one is a file beside this one and a line here."""

from __future__ import annotations

from spdsl.primitives import (
    allow,
    antidiagonal,
    attend,
    below,
    cohesion,
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
    relative,
    sink,
    sliding,
    smooth,
    softmax,
    stream,
    strided,
    tail,
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
        stream, query, tail, tensor, compress,
        mass, dot, cosine, antidiagonal, cohesion, softmax, relative, smooth, top_k, top_p, threshold,
        attend, below, gate, merge,
        pool, kl, kept,
        expect, allow,
    )
}  # fmt: skip
