"""Matrix products of the heads, by either library."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dskd.losses import products


@pytest.mark.parametrize("slow", [True, False])
@settings(max_examples=20)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 40),
    m=st.integers(1, 40),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_a_product_goes_into_part_of_a_larger_tensor(slow, n, k, m, transposed, dtype, seed):
    """As a chunk's logits (the head is transposed) and its gradient do."""
    torch.manual_seed(seed)
    left = torch.randn(n, k).to(dtype)
    right = torch.randn(m, k).to(dtype).T if transposed else torch.randn(k, m).to(dtype)
    whole = torch.full((n + 2, m), 7.0, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "mkl_is_slow", lambda: slow)
        products.multiply(left, right, whole[1:-1])
    exact = left.double() @ right.double()
    rounding = {torch.float32: 2**-24, torch.bfloat16: 2**-8}[dtype]
    # Each summand and each of k sums is rounded once.
    bound = (k + 1) * rounding * (left.double().abs() @ right.double().abs()) + 1e-30
    assert ((whole[1:-1].double() - exact).abs() <= bound).all()
    assert (whole[[0, -1]] == 7.0).all()


def test_what_is_not_finite_goes_through_in_silence(monkeypatch, recwarn):
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    out = torch.empty(1, 1)
    products.multiply(torch.tensor([[torch.inf, 1.0]]), torch.tensor([[0.0], [1.0]]), out)
    assert out.isnan().all()
    assert not recwarn
