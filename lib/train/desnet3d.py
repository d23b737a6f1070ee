"""Training of 3D DescriptorNet (Xie et al. 2018): maximum likelihood with persistent chains."""

import functools

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lib import config, device, metrics, rng, samplers, voxel
from lib.data import Split, model_grid
from lib.errors import StudyError
from lib.models import desnet3d
from lib.train.engine import Diverged, Model, Task

LIMIT = 10.0  # no chain of a sound model leaves this range
FILLED = 0.5  # a voxel of a chain above this counts as filled
CEILING = 1e8  # of |f|: sound runs stay below 1e6, and clipped chains cannot reach LIMIT


def build(desnet: config.Desnet3d, side: int) -> desnet3d.Descriptor:
    """The network of a desnet3d section."""
    return desnet3d.Descriptor(
        side=side,
        s=desnet.s,
        channels=desnet.channels,
        kernels=desnet.kernels,
        strides=desnet.strides,
        blocked=desnet.layout == "blocked",
    )


class Desnet3dTask(Task):
    """One learning step: every batch of chains goes on, then one Adam step for all batches.

    Where ``restart`` is 1 every chain is a short one from noise (Nijkamp et al. 2019), and what is
    learned is the sampler that draws the samples; the paper's chains are never restarted.

    The gradient is that of mean f(synthesised) - mean f(observed), summed over the batches as in
    the released code. Where ``observed`` is 0 a learning step is an epoch of the paper.
    """

    gradients = "sum"

    def __init__(self, desnet: config.Desnet3d, split: Split, side: int, seed: int, where):
        self.desnet, self.seed, self.where, self.side = desnet, seed, where, side
        grids = model_grid(split.voxels, side)
        self.voxels, self.held_out = grids[~split.validation], grids[split.validation]
        if len(self.held_out) < 2:
            raise StudyError(
                f"data.validation leaves {len(self.held_out)} of {len(grids)} shapes to choose "
                "desnet3d.sample_steps by; two are needed"
            )
        self.n_steps, self.log_every = desnet.steps, max(1, min(10, desnet.steps // 4))
        self.observed = min(desnet.observed or len(self.voxels), len(self.voxels))
        self.n_batches = -(-self.observed // desnet.batch)
        network = build(desnet, side)
        stream = rng.torch_generator(seed, "desnet3d", "weights")
        desnet3d.initialise(network, desnet.init_std, stream)
        network.mean.fill_(float(self.voxels.mean()))
        self.network = network.to(where)
        self.networks = {"descriptor": self.network}
        adam = torch.optim.Adam(network.parameters(), desnet.lr, (desnet.beta1, desnet.beta2))
        self.optimizers = {"descriptor": adam}
        seeds = [(seed, "chain", k) for k in range(self.n_batches * desnet.chains)]
        self.counters, self.buffers = {}, {"chains": start(network, seeds)}

    def step(self, step: int) -> dict[str, float]:
        desnet, network, adam = self.desnet, self.network, self.optimizers["descriptor"]
        adam.zero_grad()
        own, found = self.ranks.turns(self.n_batches), torch.zeros(self.n_batches, 3).double()
        for k in own:
            x = self._advance(step, k)
            rows = self._observed_rows(step, k)
            observed = torch.from_numpy(self.voxels[rows][:, None]).to(self.where, torch.float32)
            with device.autocast(self.where, desnet.dtype):
                f = functools.partial(network, layers=_layers(desnet, network))
                f_chains, f_observed = f(x).float().mean(), f(observed).float().mean()
            (f_chains - f_observed).backward()
            reach = (x - network.mean).abs().max()
            found[k] = torch.stack([f_chains, f_observed, reach]).detach()
        adam.param_groups[0]["lr"] = desnet.lr * _share_of_rate(desnet, step)
        adam.step()
        self._exchange(found, own)
        f_chains, f_observed = (float(v) for v in np.mean(found.numpy(), axis=0)[:2])
        reach = found[:, 2].max().item()
        _check(step, reach, max(abs(f_chains), abs(f_observed)))
        return {"f_chains": f_chains, "f_observed": f_observed, "reach": reach}

    def _exchange(self, found: Tensor, own: list[int]) -> None:
        """Chains and findings of the batches that other processes advanced."""
        mine = torch.zeros(self.n_batches, dtype=torch.bool)
        mine[own] = True
        self.ranks.exchange(found, mine)
        chains = self.buffers["chains"]
        self.ranks.exchange(chains, mine.repeat_interleave(self.desnet.chains))

    def _advance(self, step: int, k: int) -> Tensor:
        """The chains of batch k, a share of them from new noise, ``langevin_steps`` further."""
        desnet, chains = self.desnet, self.buffers["chains"]
        part = slice(k * desnet.chains, (k + 1) * desnet.chains)
        self._restart(step, k, chains[part])
        noise = rng.torch_generator(self.seed, "desnet3d", "langevin", step, k)
        x = chains[part].to(self.where)
        x = run_chains(
            desnet,
            self.network,
            x,
            steps=desnet.langevin_steps,
            noise=(lambda: torch.randn(x.shape, generator=noise).to(self.where))
            if step < desnet.noise_until
            else None,
        )
        chains[part] = x.cpu()
        return x

    def _restart(self, step: int, k: int, chains: Tensor) -> None:
        """Draw some of the chains (n, 1, D, D, D) anew, in place; the released code draws none."""
        stream = rng.torch_generator(self.seed, "desnet3d", "restart", step, k)
        anew = torch.rand(len(chains), generator=stream) < self.desnet.restart
        if anew.any():
            rows = anew.nonzero()[:, 0].tolist()
            chains[anew] = start(self.network, [(self.seed, "restart", step, k, r) for r in rows])

    def _observed_rows(self, step: int, k: int) -> np.ndarray:
        """Fixed pairs of batch and chains where all shapes are observed, else random batches."""
        batch = self.desnet.batch
        if self.observed == len(self.voxels):
            return np.arange(k * batch, min((k + 1) * batch, len(self.voxels)))
        return rng.batch_indices(
            step * self.n_batches + k, batch, len(self.voxels), self.seed, "desnet3d"
        )

    def monitor(self, step: int) -> dict[str, float]:
        """Occupied share and likeness (mean pairwise IoU) of chains above .5."""
        grids = (self.buffers["chains"][:64] > FILLED).flatten(1).float().numpy()
        return {"occupancy": float(grids.mean()), "likeness": voxel.pairwise_iou(grids)}

    def finish(self) -> None:
        """Choose how many Langevin steps draw a sample: those nearest to validation shapes."""
        found = distances_by_steps(self.desnet, self.network, self.held_out)
        self.network.sample_steps.fill_(min(found, key=found.get))
        self.distances = {steps: round(value, 4) for steps, value in found.items()}

    def facts(self) -> dict:
        chosen = int(self.network.sample_steps)
        return {"sample steps": chosen, "distance by sample steps": self.distances}


def _share_of_rate(desnet: config.Desnet3d, step: int) -> float:
    """Of the learning rate, in (0, 1]: all of it until ``lr_until``, then linearly less."""
    return min(1.0, (desnet.steps - step) / max(1, desnet.steps - desnet.lr_until))


def _check(step: int, reach: float, size: float) -> None:
    """Raises Diverged where chains leave every sound range, or f (``size`` is |f|) does."""
    if not reach < LIMIT:
        raise Diverged(
            f"the chains diverged: |Y| reaches {reach:.3g} at step {step}",
            "Lower desnet3d.lr or set desnet3d.clip in params",
        )
    if not size < CEILING:
        raise Diverged(
            f"the network diverged: |f| reaches {size:.3g} at step {step}",
            "Lower desnet3d.lr in params",
        )


def start(network: desnet3d.Descriptor, seeds: list[tuple]) -> Tensor:
    """N(0, I) around the mean voxel, (n, 1, D, D, D), one named stream a chain."""
    noise = [samplers.gaussian_noise(network.side, rng.torch_generator("start", *s)) for s in seeds]
    return torch.stack(noise) + network.mean.cpu()


def _layers(desnet: config.Desnet3d, network: desnet3d.Descriptor) -> desnet3d.Layers:
    """The layers of the weights as they are, computed as suits the machine."""
    rounds = device.rounds(network.mean.device, desnet.dtype)
    return network.layers(device.dtype(desnet.dtype), transformed=rounds)


def run_chains(desnet: config.Desnet3d, network, x: Tensor, *, steps: int, noise) -> Tensor:
    """Langevin dynamics of voxels x (B, 1, D, D, D) on the network's energy."""
    box = (0.0, 1.0) if desnet.clip else None
    with samplers.frozen(network), device.autocast(x.device, desnet.dtype):
        energy = functools.partial(network.energy, layers=_layers(desnet, network))
        return samplers.langevin(energy, x, delta=desnet.delta, steps=steps, noise=noise, box=box)


def _noise(desnet: config.Desnet3d, network, keys: list[tuple]) -> samplers.SeededNoise | None:
    """The noise of chains from stored weights: none where training ended without."""
    if desnet.noise_until < desnet.steps:
        return None
    return samplers.SeededNoise(keys, network.side, network.mean.device)


def sample_chains(
    desnet: config.Desnet3d, network: desnet3d.Descriptor, seeds: list[int], steps: int
) -> np.ndarray:
    """Voxels (n, D, D, D) after ``steps`` Langevin steps from noise, one chain a seed."""

    def draw(chunk: list[int]) -> np.ndarray:
        x = start(network, [(s,) for s in chunk]).to(network.mean.device)
        noise = _noise(desnet, network, [("desnet3d", "sample", s) for s in chunk])
        x = run_chains(desnet, network, x, steps=steps, noise=noise)
        return x[:, 0].float().cpu().numpy()

    return samplers.in_batches(draw, seeds)


def distances_by_steps(
    desnet: config.Desnet3d, network: desnet3d.Descriptor, grids: np.ndarray
) -> dict[int, float]:
    """``metrics.overlap_distance`` of chains from noise to bool grids (N, D, D, D), by steps.

    ``n_validation`` chains, none of them an evaluation sample, after each of ``sample_steps``.
    Short chains learn a sampler of about their own length, and whether longer ones improve its
    shapes or empty them differs from run to run.
    """
    keys = [("desnet3d", "validation", k) for k in range(desnet.n_validation)]
    x, noise = start(network, keys).to(network.mean.device), _noise(desnet, network, keys)
    real, found, done = voxel.pack(grids), {}, 0
    for steps in tqdm(desnet.sample_steps, "validation", delay=2, leave=False, disable=None):
        x = run_chains(desnet, network, x, steps=steps - done, noise=noise)
        drawn, done = voxel.pack((x[:, 0] > FILLED).cpu().numpy()), steps
        found[steps] = metrics.overlap_distance(drawn, real)
    return found


def _task(profile: config.Profile, split: Split, seed: int, where: torch.device) -> Desnet3dTask:
    return Desnet3dTask(profile.desnet3d, split, profile.data.side, seed, where)


def _build(profile: config.Profile) -> dict[str, torch.nn.Module]:
    return {"descriptor": build(profile.desnet3d, profile.data.side)}


def _sample(profile: config.Profile, networks: dict, seeds: list[int]) -> np.ndarray:
    network = networks["descriptor"]
    return sample_chains(profile.desnet3d, network, seeds, int(network.sample_steps))


MODEL = Model(
    task=_task,
    build=_build,
    sample=_sample,
    restarts=2,
    modules=(
        "lib/metrics/kernel.py",
        "lib/metrics/neighbours.py",
        "lib/models/desnet3d.py",
        "lib/models/fourier.py",
        "lib/models/gan3d.py",
        "lib/models/winograd.py",
        "lib/samplers.py",
        "lib/train/desnet3d.py",
    ),
)
