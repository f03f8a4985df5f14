"""The records of the compiler and those of the library say the same of each pool and product."""

from __future__ import annotations

import inspect

import pytest
import torch

from spdsl.ir.pool import Closing
from spdsl.ir.product import DOT
from spdsl.primitives import pools
from spdsl.primitives.registry import WORDS
from spdsl.runtime.entries.close_kernel import close_by_pool
from spdsl.runtime.entries.close_mlp import close_mlp
from spdsl.runtime.entries.close_streamed import close_streamed
from spdsl.runtime.pools.table import POOLS
from spdsl.runtime.select.products import PRODUCTS

WAYS = {Closing.STREAMED: close_streamed, Closing.NETWORK: close_mlp, Closing.CELLS: close_by_pool}


def test_there_are_as_many_of_each() -> None:
    assert list(pools.POOLS) == list(POOLS)
    assert {DOT.name} <= set(PRODUCTS) <= set(WORDS)


@pytest.mark.parametrize("name", POOLS)
def test_two_records_of_a_pool(name: str) -> None:
    ours, theirs = pools.POOLS[name], POOLS[name]
    assert (ours.name, theirs.name) == (name, name)
    assert bool(ours.backward) == (theirs.streamed is not None)
    assert theirs.close is WAYS[ours.closing]
    assert (theirs.closed is None) == (ours.closing is not Closing.STREAMED)
    assert (theirs.learn is not None) == bool(ours.weights and theirs.streamed)
    given = list(inspect.signature(theirs.entries).parameters)[2 + ours.weighs :]
    assert given == [role for role, _ in ours.weights], "the weights come in the order of the compiler's record"


@pytest.mark.parametrize("field", ["streamed", "closed"])
def test_device_functions_have_names_of_their_own(field: str) -> None:
    """A binary is found by them: two functions with one name would be taken for each other."""
    parts = [part for pool in POOLS.values() for part in (getattr(pool, field) or ())]
    functions = {id(part): part.__name__ for part in parts if hasattr(part, "__name__")}
    assert len(functions) > 5
    assert len(set(functions.values())) == len(functions)


@pytest.mark.parametrize("name", PRODUCTS)
def test_vectors_of_a_product_keep_their_shapes(name: str) -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    assert [x.shape[:-1] for x in PRODUCTS[name].vectors(q, k)] == [q.shape[:-1], k.shape[:-1]]
