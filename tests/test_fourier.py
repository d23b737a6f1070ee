"""Convolutions in Fourier space against torch's transforms, convolutions and finite differences."""

import pytest
import torch
from torch.nn.functional import conv3d

from lib import rng
from lib.models import fourier


def noise(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=rng.torch_generator("fourier", *shape), dtype=dtype)


@pytest.mark.parametrize("n, k", [(8, 8), (8, 3), (7, 7), (7, 5), (4, 1), (2, 2)])
def test_the_spectrum_is_that_of_torch_and_its_inverse_the_voxels(n, k):
    x = noise(k, k, k, 2, 3)
    found = fourier.spectrum(x, n)
    wide = torch.zeros(n, n, n, 2, 3, dtype=torch.float64)
    wide[:k, :k, :k] = x
    expected = torch.fft.fftn(wide, dim=(0, 1, 2))[: n // 2 + 1].flatten(0, 2)
    torch.testing.assert_close(found, torch.stack([expected.real, expected.imag], 1))
    torch.testing.assert_close(fourier.voxels(found, n, n), wide)
    torch.testing.assert_close(fourier.voxels(found, n, k), x)


@pytest.mark.parametrize("channels", [(2, 5), (5, 2), (3, 3)])
@pytest.mark.parametrize("n, kernel", [(6, 3), (7, 3), (5, 5), (4, 1)])
def test_a_correlation_is_that_of_conv3d(n, kernel, channels):
    c, o = channels
    x, w = noise(2, c, n, n, n), noise(o, c, kernel, kernel, kernel)
    weights = fourier.spectrum(w.permute(2, 3, 4, 1, 0), n)
    y = fourier.Correlation.apply(x.permute(2, 3, 4, 0, 1), weights, n - kernel + 1)
    torch.testing.assert_close(y.permute(3, 4, 0, 1, 2), conv3d(x, w))


@pytest.mark.parametrize("c, o", [(1, 3), (3, 1)])
@pytest.mark.parametrize("n", [3, 4])
def test_gradients_of_a_correlation_are_those_of_finite_differences(n, c, o):
    x = noise(n, n, n, 2, c).requires_grad_()
    w = fourier.spectrum(noise(2, 2, 2, c, o), n).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: fourier.Correlation.apply(x, w, n - 1), (x, w))


def test_autocast_rounds_no_product():
    """Steps of chains differentiate by x inside autocast, steps of training by w outside."""
    x, w = noise(4, 4, 4, 2, 3, dtype=torch.float32), noise(2, 2, 2, 3, 5, dtype=torch.float32)
    x.requires_grad_(), w.requires_grad_()

    def run(half):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            y = fourier.Correlation.apply(x, fourier.spectrum(w, 4), 3)
            (by_x,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        return y, by_x, *torch.autograd.grad(y.square().sum(), w)

    for found, expected in zip(run(True), run(False), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
