"""Convolutions by minimal filtering against torch's convolutions and finite differences."""

import numpy as np
import pytest
import torch
from torch.nn.functional import conv3d

from lib import rng
from lib.models import winograd


def noise(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=rng.torch_generator("winograd", *shape), dtype=dtype)


def correlation(x, w):
    """conv3d of x (B, C, n, n, n) with w (O, C, K, K, K) by minimal filtering."""
    n, kernel = x.shape[-1], w.shape[-1]
    values = winograd.values(w.permute(2, 3, 4, 1, 0), n)
    y = winograd.Correlation.apply(x.permute(2, 3, 4, 0, 1), values, n - kernel + 1)
    return y.permute(3, 4, 0, 1, 2)


@pytest.mark.parametrize("channels", [(2, 5), (5, 2), (3, 3)])
@pytest.mark.parametrize("n, kernel", [(8, 3), (7, 3), (5, 5), (4, 1), (2, 2), (1, 1)])
def test_a_correlation_is_that_of_conv3d(n, kernel, channels):
    c, o = channels
    x, w = noise(2, c, n, n, n), noise(o, c, kernel, kernel, kernel)
    torch.testing.assert_close(correlation(x, w), conv3d(x, w), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [3, 4])
def test_gradients_of_a_correlation_are_those_of_finite_differences(n):
    x = noise(n, n, n, 2, 3).requires_grad_()
    w = winograd.values(noise(2, 2, 2, 3, 2), n).requires_grad_()
    apply = winograd.Correlation.apply
    assert torch.autograd.gradcheck(lambda x, w: apply(x, w, n - 1), (x, w))


def test_a_line_of_four_by_three_is_that_of_lavin_and_gray():
    """F(2, 3) multiplies d0 - d2, d1 + d2, d2 - d1 and d1 - d3 by the filter's four values."""
    d, f = torch.tensor([3.0, -1.0, 4.0, 2.0]).double(), torch.tensor([0.5, -2.0, 1.0]).double()
    filters = winograd._powers(4, 3) @ f
    points = [f[0], f.sum(), f[0] - f[1] + f[2], f[0] + 2 * f[1] + 4 * f[2]]
    np.testing.assert_allclose(filters[:3], points[:3])
    assert filters[3] == f[2]
    data = winograd._coefficients(4).mT @ d
    assert (filters * data).shape == (4,)
    y = winograd._powers(4, 2).mT @ (filters * data)
    np.testing.assert_allclose(y, [3 * 0.5 + 2 + 4, -0.5 - 8 + 2], atol=1e-12)


def test_in_float32_rounding_stays_far_below_that_of_bfloat16():
    """The size of DescriptorNet's second layer: outputs of 1600 channels and 3^3 voxels."""
    x, w = noise(1, 1600, 8, 8, 8).relu().float(), noise(2, 1600, 3, 3, 3).float()
    exact = conv3d(x.double(), w.double())
    error = (correlation(x, w) - exact).abs().max() / exact.std()
    assert 1e-6 < error < 2**-9 / 4


def test_autocast_rounds_no_product():
    """Steps of chains differentiate by x inside autocast, steps of training by w outside."""
    x, w = noise(4, 4, 4, 2, 3, dtype=torch.float32), noise(2, 2, 2, 3, 5, dtype=torch.float32)
    x.requires_grad_(), w.requires_grad_()

    def run(half):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            y = winograd.Correlation.apply(x, winograd.values(w, 4), 3)
            (by_x,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        return y, by_x, *torch.autograd.grad(y.square().sum(), w)

    for found, expected in zip(run(True), run(False), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
