"""The hastened interpreter of the tests gives the bits of Triton's own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def digest() -> str:
    """Of results and gradients of patterns whose kernels use most operators, in a type each."""
    import torch

    from tests.library import launches
    from tests.numerics.cases import Shape, generated, inputs_of
    from tests.numerics.patterns import module_of, pattern_of
    from tests.numerics.selected import PUBLISHED

    found = hashlib.sha256()
    for body, dtype in (("drawn", torch.float16), ("dilated", torch.float64), (PUBLISHED["nsa"], torch.float32)):
        module, pattern = module_of(body), pattern_of(body)
        assert launches(module).KERNELS_ON_CPU
        results = generated(module, pattern, inputs_of(pattern, Shape(19, 19), dtype))
        for x in _flat([results.parts, results.grads.values()]):
            found.update(x.contiguous().numpy().tobytes())
    return found.hexdigest()


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        yield from [value] if hasattr(value, "numpy") else _flat(value)


@pytest.mark.interpret
def test_no_bit_changes() -> None:
    code = "from tests.test_interpreter import digest; print(digest())"
    own = subprocess.run(  # no conftest there: Triton's interpreter as it is
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert own.stdout.split()[-1] == digest()
