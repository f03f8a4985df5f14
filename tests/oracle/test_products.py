"""Products of queries and keys by hand, and the same numbers of the library."""

from __future__ import annotations

import pytest
import torch

from spdsl.ir.product import Product
from spdsl.oracle.products import multiplied
from spdsl.runtime.select.products import PRODUCTS

Q = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
K = torch.tensor([[4.0, 3.0], [0.0, -2.0], [0.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "name, wanted", [("dot", [[24, -8, 0], [0, 0, 0]]), ("cosine", [[24 / 25, -4 / 5, 0], [0, 0, 0]])]
)
def test_products_by_hand(name: str, wanted: list[list[float]]) -> None:
    exact = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(multiplied(Product(name), Q, K), exact, rtol=0, atol=1e-15)
    q, k = PRODUCTS[name].vectors(Q, K)
    torch.testing.assert_close(q @ k.T, exact, rtol=0, atol=1e-15)


def test_a_vector_of_zeros_has_a_gradient_without_nan() -> None:
    q = Q.clone().requires_grad_()
    unit, _ = PRODUCTS["cosine"].vectors(q, K)
    unit.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_every_product_of_the_library_has_a_meaning() -> None:
    for name in PRODUCTS:
        assert multiplied(Product(name), Q, K).shape == (2, 3)
    with pytest.raises(ValueError, match="no product"):
        multiplied(Product("sum"), Q, K)
