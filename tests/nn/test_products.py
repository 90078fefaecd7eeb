"""Products by oneDNN's private operators and by `mm`: the same."""

from __future__ import annotations

import pytest
import torch

from gfrnn.nn import products
from gfrnn.nn.products import packed, product, product_transposed

SIZES = [(1, 1, 1), (2, 3, 1), (33, 17, 5), (64, 7, 64), (130, 257, 31), (700, 96, 3), (1100, 64, 64)]  # M, K, N


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(params=["onednn", "mm", "without AVX-512"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "mm":
        monkeypatch.setattr(products, "_MKLDNN", None)
    else:  # a torch that no longer has them is slower, not wrong; but someone should know
        assert products._MKLDNN is not None
        monkeypatch.setattr(products, "_AVX2", request.param != "onednn")
    return str(request.param)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_product(path: str, size: tuple[int, int, int], added: bool, narrow: torch.dtype) -> None:
    M, K, N = size
    left, right = random(M, K, dtype=narrow), random(K, N, dtype=narrow)
    add = random(M, N) if added else None
    before = None if add is None else add.clone()
    got = product(left, right, torch.float32, add)
    want = left.double() @ right.double() + (0 if add is None else add.double())
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    scale = want.abs().max()
    bound = 2e-6 if narrow == torch.float32 else 2**-8
    assert ((got - want).abs() <= bound * scale).all()
    if add is not None and before is not None:
        assert torch.equal(add, before)  # a new tensor: what was added is kept for backward
        assert got.data_ptr() != add.data_ptr()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_product_transposed(path: str, size: tuple[int, int, int], narrow: torch.dtype) -> None:
    M, N, R = size
    left, right = random(M, R, dtype=narrow), random(N, R, dtype=narrow)
    want = left.double() @ right.double().T
    bound = 2e-6 if narrow == torch.float32 else 2**-8
    for operand in (right, packed(right)):
        got = product_transposed(left, operand, torch.float32)
        assert got.dtype == torch.float32
        assert ((got - want).abs() <= bound * want.abs().max()).all()


def test_float64_is_exact_enough_for_gradient_checks() -> None:
    left, right = random(30, 40, dtype=torch.float64), random(40, 5, dtype=torch.float64)
    assert torch.allclose(product(left, right, torch.float64), left @ right, rtol=0, atol=1e-13)
    assert torch.allclose(product_transposed(left, packed(right.T), torch.float64), left @ right, rtol=0, atol=1e-13)


def test_compiled_it_is_the_same() -> None:
    """torch.compile takes the private operator's second operand for a constant, and fails on any other."""
    left, right = random(1024, 1100), random(1100, 8)
    assert products._by_onednn(left)
    assert not products._by_mm(left, right)
    compiled = torch.compile(lambda left, right: product(left, right, torch.float32).tanh_(), fullgraph=True)
    torch.testing.assert_close(compiled(left, right), (left @ right).tanh(), atol=1e-5, rtol=1e-5)
