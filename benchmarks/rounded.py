"""bfloat16 on a CPU without instructions for it: rounded operands, beside torch's own way"""

import contextlib
from collections.abc import Callable

import numpy as np
import torch

from benchmarks import harness
from lib import device, rng

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


def cases(full: bool) -> list[harness.Case]:
    """Layers of 3DWINN's network; where there are instructions, they win and are used."""
    layers = [(16, 32), (32, 16), (64, 8), (128, 4)]
    return [case(channels, side, 8 if full else 2) for channels, side in layers]
