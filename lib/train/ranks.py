"""One run on several devices: each process works on its share of every batch.

Random numbers are drawn for the whole batch and cut afterwards, and gradients are joined before
every optimizer step: so several processes train what one trains, up to rounding. Lightning Fabric
starts the processes and joins them; it is imported only then.
"""

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lib.errors import StudyError


class Alone:
    """The only process: all work is its own, and joining changes nothing."""

    rank, size = 0, 1
    where: torch.device | None = None  # the device of this process; None leaves the choice

    def share(self, x: Tensor) -> Tensor:
        """The rows of a batch (B, ...) that this process works on, B / size of them."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The whole batch (B, ...), from the rows of all processes in order."""
        return x

    def turns(self, n: int) -> list[int]:
        """Which of n pieces of work this process does."""
        return list(range(n))

    def exchange(self, x: Tensor, own: Tensor) -> None:
        """Give all processes the rows of x that each has renewed; ``own``: this one's (B,) bool."""

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The means of values over the processes, whose shares are equal."""
        return values

    def mean_of(self, values: Tensor) -> Tensor:
        """The mean of values (B / size,) over the whole batch."""
        return values.mean()

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag: does it stand in any process?"""
        return flags

    def agree(self, work: Callable) -> object:
        """What the first process gets from ``work``, or its StudyError, in all of them."""
        return work()

    def join_gradients(self, optimizer: torch.optim.Optimizer, how: str) -> None:
        """From now on join the gradients before each step; ``how``: ``mean`` or ``sum``."""


class Several(Alone):
    """One of several processes, joined by a launched Fabric."""

    def __init__(self, fabric):
        self.fabric, self.rank, self.size = fabric, fabric.global_rank, fabric.world_size
        self.where = fabric.device

    def share(self, x: Tensor) -> Tensor:
        if len(x) % self.size:
            raise StudyError(
                f"a batch of {len(x)} cannot be shared by {self.size} devices; choose a number of "
                "devices that divides it"
            )
        return x.chunk(self.size)[self.rank]

    def gather(self, x: Tensor) -> Tensor:
        whole = x.new_zeros(self.size * len(x), *x.shape[1:])
        whole[self.rank * len(x) :][: len(x)] = x
        return self._joined(whole, "sum")

    def turns(self, n: int) -> list[int]:
        return list(range(self.rank, n, self.size))

    def exchange(self, x: Tensor, own: Tensor) -> None:
        x[~own] = 0
        x.copy_(self._joined(x, "sum"))

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        joined = self._joined(torch.tensor(list(values.values()), dtype=torch.float64), "mean")
        return dict(zip(values, joined.tolist(), strict=True))

    def mean_of(self, values: Tensor) -> Tensor:
        return self._joined(values.mean(), "mean")

    def any(self, *flags: bool) -> tuple[bool, ...]:
        return tuple(v > 0 for v in self._joined(torch.tensor(flags, dtype=torch.int32), "sum"))

    def agree(self, work: Callable) -> object:
        outcome = None
        if self.rank == 0:
            try:
                outcome = work(), None
            except StudyError as error:
                outcome = None, error
        found, error = self.fabric.broadcast(outcome)
        if error is not None:
            raise error
        return found

    def join_gradients(self, optimizer: torch.optim.Optimizer, how: str) -> None:
        optimizer.register_step_pre_hook(lambda *_: self._join(list(_parameters(optimizer)), how))

    def _join(self, parameters: list[Tensor], how: str) -> None:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = self._joined(torch.cat([p.grad.flatten() for p in parameters]), how)
        parts = flat.split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.grad.copy_(part.view_as(p.grad))

    def _joined(self, x: Tensor, how: str) -> Tensor:
        return self.fabric.all_reduce(x.to(self.where, copy=True), reduce_op=how).to(x.device)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def start(devices: int, nodes: int = 1) -> Alone:
    """The processes of a run: on ``devices`` GPUs, or CPU processes, of each of ``nodes`` machines.

    Under torchrun its own numbers count. Without it and without SLURM this process starts the
    others, as copies of its own command. Raises StudyError when Fabric is not installed.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    if devices < 1 or nodes < 1:
        raise StudyError(f"--devices and --nodes must be 1 or more, not {devices} and {nodes}")
    if devices * nodes == 1:
        return Alone()
    try:
        from lightning_fabric import Fabric
    except ImportError:
        raise StudyError("more than one device needs `pip install lightning-fabric`") from None
    n_gpus = torch.cuda.device_count()
    if 0 < n_gpus < devices:
        raise StudyError(f"--devices {devices}: this machine has {n_gpus} GPUs")
    accelerator = "cuda" if n_gpus else "cpu"
    fabric = Fabric(accelerator=accelerator, strategy="ddp", devices=devices, num_nodes=nodes)
    fabric.launch()
    return Several(fabric)
