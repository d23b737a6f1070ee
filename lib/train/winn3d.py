"""Training of 3DWINN (Huang et al. 2019): a critic that is climbed for its own negatives.

The paper leaves cascades, pool, thresholds and stop rule open; they follow its two-dimensional
parent, WINN (Lee et al. 2018).
"""

import numpy as np
import torch
from torch import Tensor

from lib import config, device, losses, rng, samplers, voxel
from lib.data import Split, model_grid
from lib.models import winn3d
from lib.train.engine import Diverged, Model, Task

LIMIT = 1e6  # a critic whose values pass it has diverged


def build(winn: config.Winn3d, side: int) -> winn3d.Critic:
    """The network of a winn3d section."""
    return winn3d.Critic(
        side=side,
        channels=winn.channels,
        slope=winn.slope,
        norm_first=winn.norm_first,
        centre=winn.centre,
    )


def cascade_names(winn: config.Winn3d) -> tuple[str, ...]:
    """The networks of a run, in the order in which they are climbed."""
    return tuple(f"cascade_{c + 1}" for c in range(winn.cascades))


def climb(
    winn: config.Winn3d,
    critic: winn3d.Critic,
    x: Tensor,
    thresholds: Tensor,
    *,
    stop: str,
    max_steps: int | None = None,
    noise=None,
    mean=torch.mean,
) -> tuple[Tensor, Tensor]:
    """Climb one critic from x (B, 1, D, D, D); the shapes and the steps each took (B,)."""
    with device.arithmetic(x.device, winn.dtype):
        return samplers.adam_ascent(
            winn3d.Climber(critic, device.dtype(winn.dtype)),
            x,
            thresholds,
            lr=winn.sampler_lr,
            beta1=winn.sampler_beta1,
            beta2=winn.sampler_beta2,
            epsilon=winn.sampler_epsilon,
            max_steps=winn.max_steps if max_steps is None else max_steps,
            stop=stop,
            box=(0.0, 1.0) if winn.clip else None,
            noise=noise,
            sigma=winn.sigma,
            mean=mean,
        )


def start(winn: config.Winn3d, side: int, mean: float, seeds: list) -> Tensor:
    """Where the first cascade starts: (len(seeds), 1, D, D, D), one named stream a shape."""
    draw = samplers.network_noise if winn.start == "network" else samplers.gaussian_noise
    x = torch.stack([draw(side, rng.torch_generator("start", *_key(s))) for s in seeds])
    x = x if winn.start == "network" else x + mean
    return x.clamp(0, 1) if winn.clip else x


def _key(seed: int | tuple) -> tuple:
    return seed if isinstance(seed, tuple) else (seed,)


class Winn3dTask(Task):
    """One iteration a step: passes of the critic, then new pseudo-negatives for the pool.

    A cascade is ``iterations`` steps. Its shapes start where the last cascade's ended, the first
    one's from noise; its critic starts from the last one's weights. The pool only grows.
    """

    def __init__(self, winn: config.Winn3d, split: Split, side: int, seed: int, where):
        self.winn, self.seed, self.where, self.side = winn, seed, where, side
        self.gradients = "mean" if winn.centre == "train" else None
        self.voxels = model_grid(split.voxels[~split.validation], side)
        self.n_steps, self.log_every = winn.cascades * winn.iterations, 1
        self.layout = device.memory_format(winn.layout)
        self.mean = float(self.voxels.mean())
        self.networks = {}
        for name in cascade_names(winn):
            critic = build(winn, side)
            winn3d.initialise(critic, winn.init_std, rng.torch_generator(seed, "winn3d", "weights"))
            critic.mean.fill_(self.mean)
            self.networks[name] = critic.to(where, memory_format=self.layout)
        # The network in training is the last cascade's; earlier ones keep copies of its past.
        self.critic = self.networks[cascade_names(winn)[-1]]
        rates = (winn.lr, (winn.beta1, winn.beta2))
        self.optimizers = {"critic": torch.optim.Adam(self.critic.parameters(), *rates)}
        noise = start(winn, side, self.mean, [(seed, "pool", k) for k in range(winn.pool)])
        self.joint = len(np.unique(split.labels)) > 1 and winn.snapshots > 0
        self.counters = {}
        self.buffers = {"pool": to_bytes(noise), "start": torch.zeros(0, dtype=torch.uint8)}

    def step(self, step: int) -> dict[str, float]:
        cascade, iteration = divmod(step, self.winn.iterations)
        last = iteration == self.winn.iterations - 1
        logged = {"cascade": cascade + 1} | self._critic_passes(step)
        quota = self.winn.new_last if last else self.winn.new
        shapes, taken = self._synthesise(step, cascade, quota)
        self.buffers["pool"] = torch.cat([self.buffers["pool"], to_bytes(shapes)])
        if last:
            self._end_cascade(cascade, shapes)
        if self.joint and self.n_steps - step <= self.winn.snapshots:
            self._draw_share(self.n_steps - step - 1)
        return (
            logged
            | describe(shapes)
            | {
                "sampler_steps": taken.float().mean().item(),
                "capped": (taken == self.winn.max_steps).float().mean().item(),
                "pool": len(self.buffers["pool"]),
            }
        )

    def _critic_passes(self, step: int) -> dict[str, float]:
        """``passes`` over the positives; the last one sets the thresholds (WINN)."""
        winn, half = self.winn, self.winn.batch // 2
        n = min(winn.positives or len(self.voxels), len(self.voxels))
        per_pass = max(1, n // half)
        found = []
        for k in range(winn.passes * per_pass):
            rows = rng.batch_indices(
                step * winn.passes * per_pass + k, half, len(self.voxels), self.seed, "winn3d"
            )
            noise = rng.torch_generator(self.seed, "winn3d", "critic", step, k)
            found.append(self._update(self._real(rows), self._negatives(half, noise), noise))
        positives = torch.tensor([f["f_real"] for f in found[-per_pass:]])
        self.critic.threshold.copy_(torch.stack([positives.min(), positives.max()]))
        return {name: float(np.mean([f[name] for f in found])) for name in found[0]}

    def _update(self, positives: Tensor, negatives: Tensor, noise: torch.Generator) -> dict:
        u = torch.rand(len(positives), generator=noise).to(self.where)
        positives, negatives, u = map(self.ranks.share, (positives, negatives, u))
        with device.autocast(self.where, self.winn.dtype):
            values = self.critic(torch.cat([positives, negatives])).float()
            f_real, f_pool = values.chunk(2)
            penalty = losses.gradient_penalty(self.critic, positives, negatives, u)
        loss = losses.wasserstein_loss(f_pool, f_real) + self.winn.penalty * penalty
        self.optimizers["critic"].zero_grad()
        loss.backward()
        self.optimizers["critic"].step()
        found = {"f_real": f_real.mean().item(), "f_pool": f_pool.mean().item()}
        found = self.ranks.mean(found)
        guard(found, "winn3d")
        return found | self.ranks.mean({"penalty": penalty.item()})

    def _synthesise(self, step: int, cascade: int, quota: int) -> tuple[Tensor, Tensor]:
        """``quota`` shapes, climbed in batches, each with a threshold of its own."""
        low, high = self.critic.threshold.tolist()
        shapes, taken = [], []
        for i in range(0, quota, self.winn.sampler_batch):
            n = min(self.winn.sampler_batch, quota - i)
            key = (self.seed, "winn3d", "climb", step, i)
            noise = rng.torch_generator(*key)
            threshold = low + (high - low) * torch.rand(1, generator=noise)
            x, used = climb(
                self.winn,
                self.critic,
                self.ranks.share(self._starts(cascade, n, key, noise)).to(self.where),
                self.ranks.share(threshold.expand(n)),
                stop=self.winn.stop,
                noise=self._chain_noise(n, noise),
                mean=self.ranks.mean_of,
            )
            shapes.append(self.ranks.gather(x))
            taken.append(self.ranks.gather(used))
        return torch.cat(shapes), torch.cat(taken)

    def _starts(self, cascade: int, n: int, key: tuple, noise: torch.Generator) -> Tensor:
        if cascade == 0:
            return start(self.winn, self.side, self.mean, [(*key, k) for k in range(n)])
        held = self.buffers["start"]
        return from_bytes(held[torch.randint(len(held), (n,), generator=noise)])

    def _chain_noise(self, n: int, noise: torch.Generator):
        shape = (n, 1, *(self.side,) * 3)
        share = self.ranks.share
        return lambda rows: share(torch.randn(shape, generator=noise))[rows].to(self.where)

    def _end_cascade(self, cascade: int, shapes: Tensor) -> None:
        """Keep the critic as it is, and go on with its weights and its shapes."""
        kept = self.networks[cascade_names(self.winn)[cascade]]
        kept.load_state_dict(self.critic.state_dict())
        self.buffers["start"] = to_bytes(shapes)

    def _draw_share(self, k: int) -> None:
        """Every ``snapshots``-th evaluation shape, by this iteration's critic (joint-multi)."""
        winn = self.winn
        seeds = list(range(k, winn.n_samples, winn.snapshots))
        shapes = sample_cascade(winn, list(self.networks.values()), seeds)[0]
        if "multi" not in self.buffers:
            empty = (winn.n_samples, *(self.side,) * 3)
            self.buffers["multi"] = torch.zeros(empty, dtype=torch.uint8)
        self.buffers["multi"][seeds] = to_bytes(torch.from_numpy(shapes))

    def other_samples(self) -> dict[str, Tensor]:
        """``multi``: equal shares of the critics of the last iterations, of a joint run only."""
        multi = self.buffers.get("multi")
        return {} if multi is None else {"multi": from_bytes(multi)}

    def _real(self, rows: np.ndarray) -> Tensor:
        x = torch.from_numpy(self.voxels[rows][:, None]).to(self.where, torch.float32)
        return x.contiguous(memory_format=self.layout)

    def _negatives(self, n: int, noise: torch.Generator) -> Tensor:
        """Drawn with replacement from the whole pool."""
        pool = self.buffers["pool"]
        x = from_bytes(pool[torch.randint(len(pool), (n,), generator=noise)])
        return x.to(self.where).contiguous(memory_format=self.layout)


def guard(values: dict[str, float], section: str) -> None:
    """Stop a critic that runs away, long before it overflows."""
    for name, value in values.items():
        if not abs(value) < LIMIT:
            raise Diverged(
                f"the critic diverged: {name} is {value:.3g}",
                f"Raise {section}.penalty or lower {section}.lr in params",
            )


def describe(shapes: Tensor) -> dict[str, float]:
    """Occupied share and likeness (mean pairwise IoU) of synthesised shapes above .5."""
    grids = (shapes > 0.5).flatten(1).float().cpu().numpy()
    return {"occupancy": float(grids.mean()), "likeness": voxel.pairwise_iou(grids)}


def to_bytes(x: Tensor) -> Tensor:
    """Voxels in [0, 1] in 256 levels, as WINN keeps its pool: a quarter of the memory."""
    return x.clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def from_bytes(x: Tensor) -> Tensor:
    """Voxels in [0, 1] of ``to_bytes``."""
    return x.float() / 255


def sample_cascade(
    winn: config.Winn3d, critics: list, seeds: list[int], *, max_steps: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Shapes (n, D, D, D) from noise through all critics in order, and the steps of each (n, C).

    A shape's start and thresholds are named by its seed, and it stops by itself or, where training
    climbs never stop, not before the last step; so it does not depend on the batch, unless
    ``centre`` is the batch mean. ``max_steps`` cuts every climb short.
    """
    steps, stop = [], "never" if winn.stop == "never" else "shape"

    def draw(chunk: list[int]) -> np.ndarray:
        x = start(winn, critics[0].side, float(critics[0].mean), chunk).to(critics[0].mean.device)
        taken = []
        for c, critic in enumerate(critics):
            keys = [("winn3d", "sample", s, c) for s in chunk]
            u = torch.stack([torch.rand((), generator=rng.torch_generator(*k)) for k in keys])
            low, high = critic.threshold.tolist()
            noise = samplers.SeededNoise([(*k, "noise") for k in keys], critic.side, x.device)
            thresholds = low + (high - low) * u
            x, used = climb(
                winn, critic, x, thresholds, stop=stop, max_steps=max_steps, noise=noise
            )
            taken.append(used)
        steps.append(torch.stack(taken, 1).numpy())
        return x[:, 0].float().cpu().numpy()

    return samplers.in_batches(draw, seeds), np.concatenate(steps)


def _task(profile: config.Profile, split: Split, seed: int, where: torch.device) -> Winn3dTask:
    return Winn3dTask(profile.winn3d, split, profile.data.side, seed, where)


def _build(profile: config.Profile) -> dict[str, torch.nn.Module]:
    names = cascade_names(profile.winn3d)
    return {name: build(profile.winn3d, profile.data.side) for name in names}


def _sample(profile: config.Profile, networks: dict, seeds: list[int]) -> np.ndarray:
    critics = [networks[name] for name in cascade_names(profile.winn3d)]
    return sample_cascade(profile.winn3d, critics, seeds)[0]


MODEL = Model(
    task=_task,
    build=_build,
    sample=_sample,
    restarts=2,
    modules=(
        "lib/losses.py",
        "lib/models/gan3d.py",
        "lib/models/winn3d.py",
        "lib/samplers.py",
        "lib/train/winn3d.py",
    ),
)
