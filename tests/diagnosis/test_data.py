"""Data that does not fit, and what is told of it; a call of one layer at 8k in bounded memory."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import spdsl
from spdsl.diagnosis.data import File, Layer, layers_of

PATTERNS = Path(__file__).parents[2] / "patterns"


def data(**changed: Tensor) -> dict[str, Tensor]:
    return {"q": torch.ones(1, 4, 12, 8), "k": torch.ones(1, 2, 12, 8), "v": torch.ones(1, 2, 12, 8)} | changed


def broken() -> Tensor:
    x = torch.ones(1, 2, 12, 8)
    x[0, 1, 3, 2], x[0, 1, 5, 2] = math.nan, -math.inf
    return x


BAD = {
    "q: the data holds none, it holds k, v": ("q", None),
    "v: the data holds none": ("v", None),
    r"k: expected \[batch, heads, tokens, dim\], none of them 0, got \[2, 12, 8\]": ("k", torch.ones(2, 12, 8)),
    r"q: expected \[batch, heads, tokens, dim\], none of them 0, got \[1, 4, 0, 8\]": ("q", torch.ones(1, 4, 0, 8)),
    "k: expected float16, bfloat16, float32 or float64, got int64": ("k", torch.ones(1, 2, 12, 8).long()),
    "v: expected float16, bfloat16, float32 or float64, got list": ("v", [1.0]),
    r"k: 2 numbers are NaN or infinite, the first at \[0, 1, 3, 2\]": ("k", broken()),
    "k: expected the batch of q, 1, got 2": ("k", torch.ones(2, 2, 12, 8)),
    "v: expected the 12 tokens of k, got 11": ("v", torch.ones(1, 2, 11, 8)),
    "q: 15 queries and 12 keys, but the last query stands at the last key, so the first 3 would see nothing": (
        "q", torch.ones(1, 4, 15, 8),
    ),
    "k: expected heads that divide the 4 of q, got 3": ("k", torch.ones(1, 3, 12, 8)),
    "k: .*16": ("k", torch.ones(1, 2, 12, 16)),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit(message: str):
    name, x = BAD[message]
    given = {key: value for key, value in data(**{name: x}).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        spdsl.diagnose(PATTERNS / "streaming_llm.spat", given)


def test_without_causal_each_key_has_its_query():
    with pytest.raises(ValueError, match="q: expected a query for each of the 12 keys, got 5"):
        spdsl.diagnose(PATTERNS / "prefix_lm.spat", data(q=torch.ones(1, 4, 5, 8)))


def test_weights_are_checked():
    sizes = {"q": torch.ones(1, 64, 40, 192), "k": torch.ones(1, 4, 40, 192), "v": torch.ones(1, 4, 40, 128)}
    params = {"width": 8, "stride": 4, "block": 16, "count": 3, "window": 12}
    wrong = {"entries_k_position": torch.ones(4, 7, 192)}
    with pytest.raises(ValueError, match="entries_k_position"):
        spdsl.diagnose(PATTERNS / "nsa.spat", sizes, weights=wrong, **params)


def test_phases_and_layers_are_those_that_there_are():
    with pytest.raises(
        ValueError, match="phase: expected one that a result covers, prefill or train or decode, got 'x'"
    ):
        spdsl.diagnose(PATTERNS / "causal.spat", data(), phase="x")
    with pytest.raises(ValueError, match="layers: the data holds 0, not 4"):
        spdsl.diagnose(PATTERNS / "causal.spat", data(), layers=[4])


def test_all_layers_have_one_shape():
    longer = {f"layers.1.{name}": torch.ones(1, x.shape[1], 13, 8) for name, x in data().items()}
    with pytest.raises(ValueError, match=r"layers\.1: expected the shape of the first layer"):
        spdsl.diagnose(PATTERNS / "causal.spat", {f"layers.0.{n}": x for n, x in data().items()} | longer)


def test_files(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({f"layers.{i}.q": torch.full((2,), i) for i in (10, 9)} | {"slope": torch.ones(4)}, path)
    file = File(path)
    assert layers_of(file) == [9, 10]
    layer = Layer(file, 9)
    assert sorted(layer) == ["q", "slope"]
    assert layer["q"].tolist() == [9, 9]
    assert "k" not in layer
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        File(path)
    with pytest.raises(FileNotFoundError):
        File(tmp_path / "none")


def test_half_precision_is_read_as_it_is():
    """bfloat16 of a model: the same numbers in float32."""
    torch.manual_seed(0)
    given = {name: torch.randn(x.shape).bfloat16() for name, x in data().items()}
    found = spdsl.diagnose(PATTERNS / "moba.spat", given, block=4, count=2)
    wide = spdsl.diagnose(PATTERNS / "moba.spat", {name: x.float() for name, x in given.items()}, block=4, count=2)
    assert found.heads == wide.heads


# Of 512 queries and 8,192 keys of 9 heads a dense map in float64 has 302 MB, and its sort as much again twice.
MEMORY = """
import resource, sys, torch, spdsl
torch.set_num_threads(1)
torch.manual_seed(0)
given = {"q": torch.randn(1, 9, 512, 64), "k": torch.randn(1, 3, 8192, 64), "v": torch.randn(1, 3, 8192, 64)}
def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
spdsl.diagnose(sys.argv[1], {name: x[:, :, :64] for name, x in given.items()}, block=256, count=4)
before = most()
found = spdsl.diagnose(sys.argv[1], given, block=256, count=4)
print(most() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB there")
def test_memory_is_bounded():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, PATTERNS / "moba.spat"], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 250
