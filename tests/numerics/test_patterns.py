"""Every pattern, forward and all gradients, in fp64 against the oracle to 1e-10."""

from __future__ import annotations

import pytest

from tests.numerics.cases import Shape, checked
from tests.numerics.conftest import Engine
from tests.numerics.patterns import CATALOGUE, NAMES
from tests.quick import quick


@pytest.mark.parametrize("name", quick(NAMES, (*CATALOGUE, "merge", "gate", "two_streams")))
def test_every_pattern(engine: Engine, name: str) -> None:
    checked(name, Shape(), module=engine(name))
