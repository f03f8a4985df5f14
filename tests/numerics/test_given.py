"""Given lists: order, padding and repeats mean nothing; shapes that do not fit are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.numerics.cases import Shape, assert_same, generated, inputs_of, meant
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of


def _permuted(x: Tensor) -> Tensor:
    return x.flip(-1)


def _padded(x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x, -1), x, torch.full_like(x, -1)], -1)


def _repeated(x: Tensor) -> Tensor:
    return torch.cat([x, x, x], -1)


def _int32(x: Tensor) -> Tensor:
    return x.int()


def _with_strangers(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full_like(x, 10**6), torch.full_like(x, -7)], -1)


@pytest.mark.parametrize("form", [_permuted, _padded, _repeated, _int32, _with_strangers])
@pytest.mark.parametrize("name", ["block_sparse", "two_grains"])
def test_lists_are_sets(engine: Engine, name: str, form: object) -> None:
    pattern, module = pattern_of(name), engine(name)
    inputs = inputs_of(pattern, Shape(37, 37))
    assert callable(form)
    formed = {key: form(x) if not x.is_floating_point() else x for key, x in inputs.items()}
    assert_same(generated(module, pattern, formed), meant(pattern, inputs))


@pytest.mark.parametrize("width", [0, 3])
def test_empty_lists(engine: Engine, width: int) -> None:
    pattern, module = pattern_of("block_sparse"), engine("block_sparse")
    inputs = inputs_of(pattern, Shape(37, 37))
    inputs["tiles"] = torch.full((1, 2, 3, width), -1)
    found = generated(module, pattern, inputs)
    ((out, lse),) = found.parts
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()
    assert all(grad.eq(0).all() for grad in found.grads.values())


def test_every_unit_is_dense(engine: Engine) -> None:
    pattern, module = pattern_of("block_sparse"), engine("block_sparse")
    inputs = inputs_of(pattern, Shape(37, 37))
    inputs["tiles"] = torch.arange(3).expand(1, 2, 3, 3)
    whole = {key: inputs[key] for key in "qkv"}
    assert_same(generated(module, pattern, inputs), meant(pattern_of("everything"), whole))


@pytest.mark.parametrize("shape", [(1, 2, 2, 3), (1, 3, 3, 3), (2, 2, 3, 3), (2, 3, 3)])
def test_a_wrong_shape_is_refused(cpu: Engine, shape: tuple[int, ...]) -> None:
    inputs = inputs_of(pattern_of("block_sparse"), Shape(37, 37))
    with pytest.raises(ValueError, match=r"^tiles: expected"):
        cpu("block_sparse").attention(**{**inputs, "tiles": torch.zeros(shape, dtype=torch.long)})
