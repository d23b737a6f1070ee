"""Energies: samplers of 3DWINN, ours and DescriptorNet, and a critic, beside plain float32"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, leaky_relu

from benchmarks import harness
from lib import config, device, losses, rng
from lib.models import desnet3d, winn3d
from lib.train import beyond as train_beyond
from lib.train import desnet3d as train_desnet3d
from lib.train import winn3d as train_winn3d

CLIMB, WANDER, DESCENT = 20, 10, 10  # steps of one timed call
# Deviations of the weights: 3DWINN's own; so large for DescriptorNet that f pulls at the chains
# about as hard as the reference does.
SPREAD = {"critic": 0.02, "descriptor": 0.06}
# Tolerances: mean distance of two ends as a share of the way, and of gradients as a share of the
# norm. bfloat16 has 8 bits, and 3DWINN's kinks and Adam's near-signs enlarge what it loses; ours
# turns at once where a small gradient's sign does (in float32 ends agree to 2e-5 after 3 steps).
WAY = {"climb": 0.1, "wander": 0.3, "descend": 0.03}
GRADIENT = 0.06


class PlainCritic(winn3d.Critic):
    """The same network of torch's own modules, whatever the layout of its tensors."""

    def features(self, x: Tensor) -> Tensor:
        x = self.centred(x)
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = leaky_relu(norm(convolution(x)), self.slope)
            x = avg_pool3d(x, 2) if i > 0 else x
        return x.flatten(1)


def section(model: str, side: int) -> config.Winn3d | config.Beyond | config.Desnet3d:
    """The section of lite, of smoke below 16^3; both in the type and layout of lite.

    3DWINN goes without Table 1's last block below 32^3, for 24 can be halved three times only.
    """
    lite = getattr(config.load("lite"), model)
    source = lite if side >= 16 else getattr(config.load("smoke"), model)
    channels = source.channels[:4] if model != "desnet3d" and side < 32 else source.channels
    return dataclasses.replace(source, channels=channels, dtype=lite.dtype, layout=lite.layout)


def critic(kind: type[winn3d.Critic], side: int, layout: str) -> winn3d.Critic:
    """Random weights, the same ones for every kind and layout of a side."""
    network = kind(side=side, channels=section("winn3d", side).channels)
    draw = rng.torch_generator(0, "benchmark", "critic")
    winn3d.initialise(network, SPREAD["critic"], draw)
    network.mean.fill_(0.1)
    return network.to(memory_format=device.memory_format(layout))


def noise(side: int, batch: int) -> Tensor:
    """Voxels in [0, 1] around .1, where chains start."""
    draw = rng.torch_generator(0, "benchmark", "start")
    return (0.1 + torch.randn(batch, 1, side, side, side, generator=draw)).clamp(0, 1)


def climb(side: int, batch: int, plain: bool, where: str = "cpu") -> Callable[[], Tensor]:
    """``CLIMB`` Adam steps of the sampler; plain is the loop one would write first."""
    winn, x = section("winn3d", side), noise(side, batch).to(where)
    if not plain:
        network = critic(winn3d.Critic, side, winn.layout).to(where)
        never = torch.full((batch,), math.inf)
        steps = dict(stop=winn.stop, max_steps=CLIMB)
        return lambda: train_winn3d.climb(winn, network, x, never, **steps)[0]
    network = critic(PlainCritic, side, "contiguous").to(where)
    betas = winn.sampler_beta1, winn.sampler_beta2

    def ascend() -> Tensor:
        y = x.clone().requires_grad_()
        adam = torch.optim.Adam([y], winn.sampler_lr, betas, winn.sampler_epsilon, maximize=True)
        for _ in range(CLIMB):
            adam.zero_grad()
            network(y).mean().backward()
            adam.step()
            y.data.clamp_(0, 1)
        return y.detach()

    return ascend


def wander(side: int, batch: int, plain: bool) -> Callable[[], Tensor]:
    """``WANDER`` steps of our chains, with one draw of noise for all of them."""
    ours, x = section("beyond", side), noise(side, batch)
    push = torch.randn(x.shape, generator=rng.torch_generator(0, "benchmark", "push"))
    if not plain:
        network = critic(winn3d.Critic, side, ours.layout)
        return lambda: train_beyond.run_chains(ours, network, x, steps=WANDER, noise=lambda: push)
    network = critic(PlainCritic, side, "contiguous")

    def go() -> Tensor:
        y, momentum = x.clone().requires_grad_(), torch.zeros_like(x)
        for _ in range(WANDER):
            (gradient,) = torch.autograd.grad(network.energy(y).sum(), y)
            momentum = ours.momentum * momentum + (1 - ours.momentum) * gradient
            size = torch.maximum(gradient.abs(), ours.floor * momentum.abs()).clamp(min=1e-20)
            moved = y.detach() - ours.chain_lr * momentum / size + ours.sigma * push
            y = moved.clamp(-ours.margin, 1 + ours.margin).requires_grad_()
        return y.detach()

    return go


def update(side: int, batch: int, fused: bool, dtype: str) -> Callable[[], Tensor]:
    """The gradient of 3DWINN's loss by all parameters, flat, of ``batch`` real shapes and more.

    As many negatives meet them. In bfloat16 tensors lie channels last, as in training.
    """
    layout = "channels_last" if dtype == "bfloat16" else "contiguous"
    network = critic(winn3d.Critic if fused else PlainCritic, side, layout)
    weight, negatives = section("winn3d", side).penalty, noise(side, batch)
    draw = rng.torch_generator(0, "benchmark", "real")
    real = (torch.rand(negatives.shape, generator=draw) < 0.1).float()
    u = torch.rand(batch, generator=draw)

    def gradient() -> Tensor:
        with device.autocast(torch.device("cpu"), dtype):
            f_real, f_negatives = network(torch.cat([real, negatives])).float().chunk(2)
            penalty = losses.gradient_penalty(network, real, negatives, u)
        loss = losses.wasserstein_loss(f_negatives, f_real) + weight * penalty
        found = torch.autograd.grad(loss, list(network.parameters()))
        return torch.cat([g.flatten() for g in found])

    return gradient


def descend(side: int, batch: int, plain: bool) -> Callable[[], Tensor]:
    """``DESCENT`` Langevin steps of DescriptorNet; without noise, which would hide differences."""
    desnet, x = section("desnet3d", side), noise(side, batch)
    if plain:
        desnet = dataclasses.replace(desnet, dtype="float32", layout="contiguous")
    network = train_desnet3d.build(desnet, side)
    draw = rng.torch_generator(0, "benchmark", "descriptor")
    desnet3d.initialise(network, SPREAD["descriptor"], draw)
    return lambda: train_desnet3d.run_chains(desnet, network, x, steps=DESCENT, noise=None)


def share_of_way(start: Tensor) -> Callable[[Tensor, Tensor], float]:
    """How far two ends lie apart, as a share of how far the second lies from the start: means."""
    return lambda a, b: ((a - b).abs().mean() / (b - start).abs().mean()).item()


def share_of_norm(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()


def case(
    title: str,
    work: Callable,
    ours: tuple,
    plain: tuple,
    memory: bool = True,
    repeats: int = 3,
    **details,
) -> harness.Case:
    """``work(side, batch, ...)`` called with the arguments of either side."""
    peaks = [harness.peak(__name__, work.__name__, *given) for given in (ours, plain) if memory]
    return harness.timed_case(
        f"{title}, {ours[0]}^3, batch {ours[1]}",
        work(*ours),
        work(*plain),
        repeats=repeats,
        memory=tuple(peaks) or None,
        **details,
    )


def climb_case(side: int, batch: int, **details) -> harness.Case:
    """The sampler of 3DWINN: the same weights, the same start."""
    details |= {"tolerance": WAY["climb"], "difference": share_of_way(noise(side, batch))}
    sides = (side, batch, False), (side, batch, True)
    return case(f"{CLIMB} steps of 3DWINN's sampler", climb, *sides, repeats=2, **details)


def wander_case(side: int, batch: int, **details) -> harness.Case:
    """Our chains: the same weights, the same start, the same noise."""
    details |= {"tolerance": WAY["wander"], "difference": share_of_way(noise(side, batch))}
    sides = (side, batch, False), (side, batch, True)
    return case(f"{WANDER} steps of ours", wander, *sides, repeats=2, **details)


def update_case(side: int, batch: int, dtype: str = "float32", **details) -> harness.Case:
    """The critic of 3DWINN; ``dtype`` is the plain one's."""
    details |= {"tolerance": GRADIENT, "difference": share_of_norm, "note": f"plain: {dtype}"}
    sides = (side, batch, True, "bfloat16"), (side, batch, False, dtype)
    return case("gradient of 3DWINN's critic", update, *sides, **details)


def descend_case(side: int, batch: int, **details) -> harness.Case:
    """The chains of DescriptorNet: the same weights, the same start."""
    details |= {"tolerance": WAY["descend"], "difference": share_of_way(noise(side, batch))}
    sides = (side, batch, False), (side, batch, True)
    return case(f"{DESCENT} steps of DescriptorNet", descend, *sides, repeats=2, **details)


def cases(full: bool) -> list[harness.Case]:
    """Each at 32^3; in full also growing batches and growing sides."""
    found = [
        climb_case(32, 2),
        wander_case(32, 2),
        update_case(32, 4),
        update_case(32, 4, "bfloat16", memory=False),
        descend_case(32, 8),
    ]
    for build in (climb_case, wander_case, update_case, descend_case) if full else ():
        name = build.__name__.removesuffix("_case")
        found += [build(32, n, group=f"batch of {name}", size=n) for n in (2, 4, 8, 16)]
        found += [build(n, 4, group=f"side of {name}", size=n) for n in (16, 24, 32)]
    return found
