"""bfloat16 on a CPU without instructions for it: rounded operands, beside torch's own way"""

import contextlib
import functools
from collections.abc import Callable

import numpy as np
import torch

from benchmarks import energy, harness
from lib import device, rng, samplers
from lib.models import desnet3d
from lib.train import desnet3d as train_desnet3d

TOLERANCE = 2e-2  # the gradient's last of 8 bits


def gradient(channels: int, side: int, batch: int, rounded: bool) -> Callable[[], np.ndarray]:
    """The gradient by the weights of a 3^3 convolution, as in 3DWINN's critic, channels last."""
    generator = rng.torch_generator(0, "benchmark", "rounded")
    form = torch.channels_last_3d
    x = torch.randn(batch, channels, *(side,) * 3, generator=generator).to(memory_format=form)
    layer = torch.nn.Conv3d(channels, 2 * channels, 3, padding=1).to(memory_format=form)
    torch.nn.init.normal_(layer.weight, generator=generator)
    torch.nn.init.zeros_(layer.bias)

    def compute() -> np.ndarray:
        layer.zero_grad()
        ours = device.rounded_operands() if rounded else contextlib.nullcontext()
        with torch.autocast("cpu", torch.bfloat16), ours:
            y = layer(x)
        y.float().square().mean().backward()
        return layer.weight.grad.numpy()

    return compute


def case(channels: int, side: int, batch: int) -> harness.Case:
    """One convolution of table 1 and its gradient."""
    own = "with" if device.has_bfloat16() else "without"
    return harness.timed_case(
        f"{channels} to {2 * channels} channels, {side}^3, batch {batch}, a CPU {own} instructions",
        gradient(channels, side, batch, True),
        gradient(channels, side, batch, False),
        tolerance=TOLERANCE,
        repeats=3,
    )


def by_voxels(side: int, batch: int, transformed: bool) -> Callable[[], torch.Tensor]:
    """The gradient of DescriptorNet's f by voxels, its weights laid out before."""
    desnet = energy.section("desnet3d", side)
    network = train_desnet3d.build(desnet, side).requires_grad_(False)
    draw = rng.torch_generator(0, "benchmark", "descriptor")
    desnet3d.initialise(network, energy.SPREAD["descriptor"], draw)
    x = energy.noise(side, batch)
    layers = network.layers(torch.bfloat16, transformed=transformed)

    def compute() -> torch.Tensor:
        with device.autocast(x.device, "bfloat16"):
            f = functools.partial(network, layers=layers)
            return samplers.input_gradient(f, x)[1]

    return compute


def transformed_case(side: int, batch: int) -> harness.Case:
    """A step of DescriptorNet's chains; decides where ``transformed`` pays."""
    own = "bfloat16" if device.has_bfloat16() else "rounded float32"
    return harness.timed_case(
        f"DescriptorNet's gradient by transforms, {side}^3, batch {batch}",
        by_voxels(side, batch, True),
        by_voxels(side, batch, False),
        tolerance=TOLERANCE,
        difference=energy.share_of_norm,
        repeats=3,
        note=f"plain: direct, {own}",
    )


def cases(full: bool) -> list[harness.Case]:
    """Layers of 3DWINN's network, whose own instructions win where there are any; DescriptorNet."""
    layers = [(16, 32), (32, 16), (64, 8), (128, 4)]
    found = [case(channels, side, 8 if full else 2) for channels, side in layers]
    return [*found, transformed_case(32, 16 if full else 4)]
