"""The short convolution is the library's, forward and gradient."""

import pytest
import torch

from palimpsest.layers.convolution import naive_convolution, short_convolution


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_it_is_the_librarys_convolution_with_silu(taps):
    torch.manual_seed(0)
    line = torch.randn(2, 6 + taps, 5, dtype=torch.float64, requires_grad=True)
    filters = torch.randn(5, 1, taps, dtype=torch.float64, requires_grad=True)
    naive, fast = naive_convolution(line, filters), short_convolution(line, filters)
    torch.testing.assert_close(fast, naive)
    weight = torch.randn_like(naive)
    for one, other in zip(
        *(torch.autograd.grad((weight * y).sum(), (line, filters)) for y in (naive, fast)), strict=True
    ):
        torch.testing.assert_close(other, one)
    assert torch.autograd.gradcheck(short_convolution, (line, filters))
