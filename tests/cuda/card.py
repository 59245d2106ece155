"""What the tests on a CUDA device share."""

from collections.abc import Iterator

import pytest
import torch

CARD = torch.device("cuda")
CPU = torch.device("cpu")
ON_CARD = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


@pytest.fixture(autouse=True)
def full_products() -> Iterator[None]:
    """Begin with products in full single precision. A training in fp32 takes TF32, and leaves it set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
