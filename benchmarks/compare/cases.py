"""The published patterns in sizes that a hundred tokens fill."""

from __future__ import annotations

import re
from pathlib import Path

TOKENS = 101
PARAMS: dict[str, dict[str, int]] = {
    "big_bird": {"block": 16},
    "block_sparse": {"block": 16},
    "dilated": {"window": 5, "step": 3},
    "infllm_v2": {"block": 32, "count": 2, "local": 1},
    "longformer": {"window": 9},
    "moba": {"block": 16, "count": 2},
    "msa_minimax": {"block": 16, "count": 2},
    "nsa": {"width": 8, "stride": 4, "block": 16, "count": 3, "window": 9},
    "seer_attention": {"block": 16},
    "sink_attention": {"window": 37},
    "sliding_window": {"window": 36},
    "sparse_transformer": {"stride": 7},
    "streaming_llm": {"sinks": 3, "window": 34},
}


def text_of(path: Path) -> str:
    """The pattern with the heads of the worker, without its dims; `length < 8192` becomes 64."""
    text = re.sub(r"(\n\s*)heads .*", r"\1heads query = 4, kv = 2", path.read_text())
    text = re.sub(r"\n\s*dim .*|(?<=stream\(heads = 1), qk = \d+", "", text)
    return text.replace("query(heads = 4, dim = 128)", "query(heads = 2)").replace("8192", "64")
