"""GPU: 3DWINN's sampler, captured or compiled (ours), beside eager steps (plain), and Adam

Where torch sees no CUDA device nothing is measured, and the table says so. What runs here decides
how ``lib`` samples on a GPU; it samples by eager steps until a GPU has shown what they cost.
"""

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import energy, harness
from lib import config, device, samplers
from lib.models import winn3d

WARM = 3  # steps before a capture, which must find its kernels chosen and its memory claimed
WAYS = {  # name: (is the network compiled, is the step captured)
    "captured": (False, True),
    "compiled": (True, False),
    "compiled and captured": (True, True),
}
COMPILER = "inductor"
TOLERANCE_ADAM = 1e-5  # of the parameters after some steps


class Ascent:
    """``samplers.adam_ascent`` in place: tensors stay where they are, so a step can be captured.

    It has neither noise nor a stop rule. The step's number lives on the device, since a captured
    step is the same one every time.
    """

    def __init__(self, f: samplers.Function, x: Tensor, winn: config.Winn3d):
        self.f, self.x, self.winn = f, x, winn
        self.y, self.m, self.v = (torch.empty_like(x) for _ in "ymv")
        self.t = torch.zeros((), dtype=torch.float64, device=x.device)
        self.restart()

    def restart(self) -> None:
        """Back to the start, in the same memory."""
        self.y.copy_(self.x)
        for moment in (self.m, self.v, self.t):
            moment.zero_()

    def step(self) -> None:
        """One step of Adam, clipped to [0, 1]."""
        beta1, beta2 = self.winn.sampler_beta1, self.winn.sampler_beta2
        _, gradient = samplers.input_gradient(self.f, self.y)
        self.t += 1
        self.m.lerp_(gradient, 1 - beta1)
        self.v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = self.v.div(1 - beta2**self.t).sqrt_().add_(self.winn.sampler_epsilon)
        rate = self.winn.sampler_lr / (1 - beta1**self.t)
        self.y.add_(self.m.div(scale).mul_(rate)).clamp_(0, 1)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The same step as one CUDA graph: a launch instead of some hundred."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def finished(where: torch.device) -> None:
    """Wait for a GPU, which computes after the call that asked for it."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def eager(side: int, batch: int, where: torch.device, plain: bool = False) -> Callable[[], Tensor]:
    """``energy.CLIMB`` steps as `lib` takes them on this device, or in plain float32."""
    ascend = energy.climb(side, batch, plain, where.type)

    def climb() -> Tensor:
        y = ascend()
        finished(where)
        return y

    climb()
    return climb


def other(side: int, batch: int, where: torch.device, way: str) -> Callable[[], Tensor]:
    """The same steps in one of ``WAYS``, compiled and captured before it returns."""
    winn, (is_compiled, is_captured) = energy.section("winn3d", side), WAYS[way]
    network = energy.critic(winn3d.Critic, side, winn.layout).to(where)
    f = winn3d.Climber(network, device.dtype(winn.dtype)).critic
    f = torch.compile(f, fullgraph=True, backend=COMPILER) if is_compiled else f
    ascent = Ascent(f, energy.noise(side, batch).to(where), winn)
    advance = captured(ascent.step) if is_captured else ascent.step

    def climb() -> Tensor:
        ascent.restart()
        for _ in range(energy.CLIMB):
            advance()
        finished(where)
        return ascent.y.clone()

    climb()
    return climb


def peak(build: Callable, *arguments) -> float:
    """MiB of the GPU at the peak of building and of one call, beyond what is held before."""
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    build(*arguments)()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def bandwidth(where: torch.device, n_bytes: int) -> float:
    """Bytes a second of a copy, read and written, at the best of five."""
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=where)
    target, seconds = torch.empty_like(source), []
    for _ in range(6):
        finished(where)
        start = time.perf_counter()
        target.copy_(source)
        finished(where)
        seconds.append(time.perf_counter() - start)
    return 2 * n_bytes / min(seconds[1:])


def bytes_moved(winn: config.Winn3d, side: int, batch: int) -> int:
    """What a step must move where a convolution and what follows it are one pass over memory each.

    A block reads x and writes y, norm to pooling read y and write the next x; on the way back that
    gradient and y are read, y's is written and read, x's is written. Weights are read twice. Adam
    reads and writes three float32 tensors and reads a fourth.
    """
    wide, elements, d = device.dtype(winn.dtype).itemsize, 0, side
    for i, (c_in, c) in enumerate(zip((1, *winn.channels[:-1]), winn.channels, strict=True)):
        after = d // 2 if i > 0 else d
        elements += batch * ((2 * c_in + 5 * c) * d**3 + 2 * c * after**3) + 2 * 27 * c_in * c
        d = after
    elements += 2 * winn.channels[-1] * d**3
    return wide * elements + 7 * 4 * batch * side**3


def floor(side: int, batch: int, where: torch.device, n_bytes: int) -> float:
    """Seconds that ``energy.CLIMB`` steps take where nothing but the memory counts."""
    moved = bytes_moved(energy.section("winn3d", side), side, batch)
    return energy.CLIMB * moved / bandwidth(where, n_bytes)


def climb_case(
    title: str, ours: tuple, plain: tuple, least: float, where: torch.device, **details
) -> harness.Case:
    """Two ways to climb, each (builder, side, batch, where, ...); ``least`` is the floor."""
    _, side, batch = ours[:3]
    start = energy.noise(side, batch).to(where)
    sides = (ours, plain) if where.type == "cuda" else ()
    case = harness.timed_case(
        f"{energy.CLIMB} steps of 3DWINN's sampler, {side}^3, batch {batch}; {title}",
        ours[0](*ours[1:]),
        plain[0](*plain[1:]),
        difference=energy.share_of_way(start),
        tolerance=energy.WAY["climb"],
        clock=time.perf_counter,
        memory=tuple(peak(*given) for given in sides) or None,
        **details,
    )
    note = f"{case.note}; memory alone {least * 1000:.3g} ms, ours {case.ours / least:.1f} times"
    return dataclasses.replace(case, note=note)


def climb_cases(
    side: int, batch: int, where: torch.device, growing: str, n_bytes: int = 2**30
) -> list[harness.Case]:
    """Eager steps beside float32, then every other way beside eager steps.

    growing: ``side`` or ``batch``, whichever the caller varies. n_bytes: copied for the floor.
    """
    given, least = (side, batch, where), floor(side, batch, where, n_bytes)
    pairs = {"eager beside float32": ((eager, *given), (eager, *given, True))}
    pairs |= {f"{way} beside eager": ((other, *given, way), (eager, *given)) for way in WAYS}
    size = {"side": side, "batch": batch}[growing]
    return [
        climb_case(title, *pair, least, where, group=f"{growing}, {title}", size=size)
        for title, pair in pairs.items()
    ]


def adam(side: int, where: torch.device, fused: bool) -> Callable[[], Tensor]:
    """``energy.CLIMB`` steps of Adam on the critic's weights, whose gradients stay as they are."""
    network = energy.critic(winn3d.Critic, side, "channels_last").to(where)
    parameters = list(network.parameters())
    start = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = p.detach() - 0.01

    def steps() -> Tensor:
        for p, value in zip(parameters, start, strict=True):
            p.data.copy_(value)
        optimizer = torch.optim.Adam(parameters, 1e-3)
        device.fuse(optimizer, fused)
        for _ in range(energy.CLIMB):
            optimizer.step()
        finished(where)
        return torch.cat([p.detach().flatten() for p in parameters])

    return steps


def adam_case(side: int, where: torch.device) -> harness.Case:
    """One kernel for all weights, beside torch's choice."""
    return harness.timed_case(
        f"{energy.CLIMB} steps of Adam on 3DWINN's critic of {side}^3, fused beside unfused",
        adam(side, where, True),
        adam(side, where, False),
        difference=energy.share_of_norm,
        tolerance=TOLERANCE_ADAM,
        clock=time.perf_counter,
    )


def cases(full: bool) -> list[harness.Case]:
    """The batch of training at 32^3; in full also other batches and other sides."""
    if not torch.cuda.is_available():
        reason = "not run: torch sees no CUDA device"
        return [harness.Case("3DWINN's sampler on a GPU", note=reason)]
    where, found = device.pick(config.load("study").device), []
    for batch in (32, 128, 512) if full else (128,):
        found += climb_cases(32, batch, where, "batch")
    for side in (24, 32, 64) if full else ():
        found += climb_cases(side, 64, where, "side")
    return [*found, adam_case(32, where)]
