"""Training of our own row: 3DWINN's network and loss, with chains that are never thrown away.

Not a published method. It spends the same budget differently: persistent chains (Tieleman 2008) of
bounded, sign-like steps replace the growing pool, the thresholds and the cascades, and the weights
that sample are a running mean.
"""

import copy

import numpy as np
import torch
from torch import Tensor

from lib import config, device, losses, rng, samplers
from lib.data import Split, model_grid
from lib.models import winn3d
from lib.train.engine import Model, Task
from lib.train.winn3d import describe, guard


def build(beyond: config.Beyond, side: int) -> winn3d.Critic:
    """The network of a beyond section."""
    return winn3d.Critic(side=side, channels=beyond.channels, slope=beyond.slope)


def run_chains(beyond: config.Beyond, critic: winn3d.Critic, x: Tensor, *, steps, noise) -> Tensor:
    """Preconditioned Langevin steps of voxels x (B, 1, D, D, D) on the critic's energy."""
    with device.arithmetic(x.device, beyond.dtype):
        return samplers.preconditioned_langevin(
            winn3d.Climber(critic, device.dtype(beyond.dtype)).energy,
            x,
            lr=beyond.chain_lr,
            momentum=beyond.momentum,
            floor=beyond.floor,
            sigma=beyond.sigma,
            steps=steps,
            noise=noise,
            box=(-beyond.margin, 1 + beyond.margin),
        )


def start(beyond: config.Beyond, critic: winn3d.Critic, seeds: list[tuple]) -> Tensor:
    """N(mean, start_std^2), (n, 1, D, D, D), one named stream a chain."""
    noise = [samplers.gaussian_noise(critic.side, rng.torch_generator("start", *s)) for s in seeds]
    x = torch.stack(noise) * beyond.start_std + critic.mean.cpu()
    return x.clamp(-beyond.margin, 1 + beyond.margin)


class BeyondTask(Task):
    """A few chains go on, some of them start anew, then one update of the critic against them."""

    gradients = "mean"

    def __init__(self, beyond: config.Beyond, split: Split, side: int, seed: int, where):
        self.beyond, self.seed, self.where = beyond, seed, where
        self.voxels = model_grid(split.voxels[~split.validation], side)
        self.n_steps, self.log_every = beyond.steps, max(1, min(10, beyond.steps // 4))
        self.layout = device.memory_format(beyond.layout)
        critic = build(beyond, side)
        winn3d.initialise(critic, beyond.init_std, rng.torch_generator(seed, "beyond", "weights"))
        critic.mean.fill_(float(self.voxels.mean()))
        self.critic = critic.to(where, memory_format=self.layout)
        self.average = copy.deepcopy(critic).requires_grad_(False)
        self.networks = {"critic": self.critic, "average": self.average}
        adam = torch.optim.Adam(critic.parameters(), beyond.lr, (beyond.beta1, beyond.beta2))
        self.optimizers = {"critic": adam}
        chains = start(beyond, critic, [(seed, "chain", k) for k in range(beyond.chains)])
        self.counters, self.buffers = {}, {"chains": chains.half()}

    def step(self, step: int) -> dict[str, float]:
        beyond = self.beyond
        noise = rng.torch_generator(self.seed, "beyond", "step", step)
        chains = self._advance(step, noise)
        rows = rng.batch_indices(step, beyond.advanced, len(self.voxels), self.seed, "beyond")
        real = torch.from_numpy(self.voxels[rows][:, None]).to(torch.float32)
        real = real + beyond.data_noise * torch.randn(real.shape, generator=noise)
        u = torch.rand(len(real), generator=noise)
        real, u = (self.ranks.share(v).to(self.where) for v in (real, u))
        real = real.contiguous(memory_format=self.layout)
        with device.autocast(self.where, beyond.dtype):
            f_real, f_chains = self.critic(torch.cat([real, chains])).float().chunk(2)
            penalty = losses.gradient_penalty(self.critic, real, chains, u)
        loss = losses.wasserstein_loss(f_chains, f_real) + beyond.penalty * penalty
        self.optimizers["critic"].zero_grad()
        loss.backward()
        self.optimizers["critic"].step()
        self._average(step)
        found = {"f_real": f_real.mean().item(), "f_chains": f_chains.mean().item()}
        found = self.ranks.mean(found)
        guard(found, "beyond")
        return found | self.ranks.mean({"penalty": penalty.item()})

    def _advance(self, step: int, noise: torch.Generator) -> Tensor:
        """``advanced`` chains in turn, a share of them from new noise, ``chain_steps`` further."""
        beyond, chains = self.beyond, self.buffers["chains"]
        rows = rng.batch_indices(step, beyond.advanced, len(chains), self.seed, "chains")
        x = chains[rows].float()
        anew = torch.rand(len(rows), generator=noise) < beyond.restart
        fresh = [(self.seed, "restart", step, int(k)) for k in anew.nonzero()[:, 0]]
        if fresh:
            x[anew] = start(beyond, self.critic, fresh)
        whole, share = x.shape, self.ranks.share
        x = share(x).to(self.where).contiguous(memory_format=self.layout)
        x = run_chains(
            beyond,
            self.critic,
            x,
            steps=beyond.chain_steps,
            noise=lambda: share(torch.randn(whole, generator=noise)).to(self.where),
        )
        chains[rows] = self.ranks.gather(x.half().cpu())
        return x

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Running mean of the weights; its window grows with the steps, so it forgets the start."""
        share = max(1 - self.beyond.average, 1 / (1 + step))
        pairs = zip(self.average.parameters(), self.critic.parameters(), strict=True)
        for mean, value in pairs:
            mean.lerp_(value, share)

    def monitor(self, step: int) -> dict[str, float]:
        """Occupied share and likeness (mean pairwise IoU) of chains above .5."""
        return describe(self.buffers["chains"][:64].float())


def sample_chains(
    beyond: config.Beyond, critic: winn3d.Critic, seeds: list[int], steps: int
) -> np.ndarray:
    """Voxels (n, D, D, D) after ``steps`` chain steps from noise, one chain a seed."""

    def draw(chunk: list[int]) -> np.ndarray:
        x = start(beyond, critic, [(s,) for s in chunk]).to(critic.mean.device)
        keys = [("beyond", "sample", s) for s in chunk]
        noise = samplers.SeededNoise(keys, critic.side, x.device)
        x = run_chains(beyond, critic, x, steps=steps, noise=noise)
        return x[:, 0].float().cpu().numpy()

    return samplers.in_batches(draw, seeds)


def _task(profile: config.Profile, split: Split, seed: int, where: torch.device) -> BeyondTask:
    return BeyondTask(profile.beyond, split, profile.data.side, seed, where)


def _build(profile: config.Profile) -> dict[str, torch.nn.Module]:
    names = ("critic", "average")
    return {name: build(profile.beyond, profile.data.side) for name in names}


def _sample(profile: config.Profile, networks: dict, seeds: list[int]) -> np.ndarray:
    beyond = profile.beyond
    return sample_chains(beyond, networks["average"], seeds, beyond.sample_steps)


MODEL = Model(
    task=_task,
    build=_build,
    sample=_sample,
    restarts=2,
    sampling=("average",),
    modules=(
        "lib/losses.py",
        "lib/models/gan3d.py",
        "lib/models/winn3d.py",
        "lib/samplers.py",
        "lib/train/beyond.py",
        "lib/train/winn3d.py",
    ),
)
