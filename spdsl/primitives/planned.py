"""Words that the language specifies and this version does not build: refused by name, never misunderstood."""

from __future__ import annotations

PLANNED: dict[str, str] = {
    "quantize": "a stream in fewer bits",
    "hash": "a stream of hashed keys",
    "rotate": "a rotation of a query, a stream or a branch",
    "normalize": "a normalised stream",
    "tail": "the last n queries",
    "bound": "an upper bound of a cell's logits",
    "cohesion": "the self-similarity of a cell",
    "indexer": "a learned index score",
    "antidiagonal": "sums along antidiagonals",
    "diagonal": "a score per distance",
    "accumulated": "a score summed over steps",
    "sample": "units drawn with weights",
    "linear": "a learned linear map",
    "keep": "which entries stay in the cache",
    "tier": "where entries are stored",
    "reuse": "a result held from an earlier step",
}
