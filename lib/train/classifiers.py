"""Training of the classifiers of table 5: one loop, in which only network and loss differ.

Every model trains on the same shapes, and the validation part of the training split decides which
weights are kept.
"""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lib import config, device, rng
from lib.data import Split, model_grid
from lib.models.classifiers import Views, Winn3dClassifier, initialise, mirrored
from lib.train.engine import Model, Task

N_CLASSES = len(config.CATEGORIES)
# Files that decide what every classifier of Table 1's network computes in training.
MODULES = ("lib/models/classifiers.py", "lib/models/winn3d.py", "lib/train/classifiers.py")


def augment(
    x: Tensor, settings: config.Classifier, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mirror shapes (B, 1, D, D, D), turn them by quarters about z, shift them by whole voxels.

    Each is exact: objects lie inside the grid with a margin that ``settings.jitter`` respects.
    Returns the shapes and the quarters (B,) by which each was turned.
    """
    n = len(x)
    flips = torch.from_numpy(generator.random(n) < (0.5 if settings.mirror else 0))
    quarters = generator.integers(0, 4 if settings.turns else 1, n)
    shifts = generator.integers(-settings.jitter, settings.jitter + 1, (n, 3))
    x = torch.where(flips.view(-1, 1, 1, 1, 1), mirrored(x), x)
    moved = [
        torch.roll(torch.rot90(v, int(q), (1, 2)), tuple(map(int, s)), (1, 2, 3))
        for v, q, s in zip(x, quarters, shifts, strict=True)
    ]
    return torch.stack(moved), torch.from_numpy(quarters)


class ClassifierTask(Task):
    """Cross-entropy on batches of training shapes; after every epoch the validation part decides.

    Kept are the weights of the lowest validation error and, among equals, of the lowest loss. They
    are the running mean of the weights where ``average`` is above 0. A subclass changes ``loss``.
    """

    def __init__(
        self,
        name: str,
        settings: config.Classifier,
        network: nn.Module,
        optimizer: Callable,
        split: Split,
        seed: int,
        where: torch.device,
    ):
        self.name, self.settings, self.seed, self.where = name, settings, seed, where
        kept = ~split.validation
        self.voxels, self.y = split.voxels[kept], split.labels[kept]
        self.x_val, self.y_val = split.voxels[~kept], split.labels[~kept]
        self.per_epoch = max(1, len(self.y) // settings.batch)
        self.n_steps, self.log_every = settings.epochs * self.per_epoch, self.per_epoch
        self.layout = device.memory_format(settings.layout)
        self.network = network.to(where, memory_format=self.layout)
        self.measured = copy.deepcopy(self.network).requires_grad_(False)
        self.networks = {"classifier": self.network}
        self.optimizers = {"classifier": optimizer(self.network.parameters())}
        self.counters = {"best_error": math.inf, "best_loss": math.inf, "best_step": 0}
        self.counters |= {"wrong": 0, "seen": 0}
        average = {n: p.detach().clone() for n, p in self.network.named_parameters()}
        self.buffers = {"average": average, "best": {}}

    def loss(self, x: Tensor, y: Tensor, quarters: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The loss of a batch and its logits (B, n_classes); ``quarters`` are its turns."""
        logits = self.network(x).float()
        return cross_entropy(logits, y, label_smoothing=self.settings.smoothing), logits

    def step(self, step: int) -> dict[str, float]:
        rows = rng.batch_indices(step, self.settings.batch, len(self.y), self.seed, self.name)
        noise = rng.numpy_generator(self.seed, self.name, "augment", step)
        x, quarters = augment(self.tensor(self.voxels[rows]), self.settings, noise)
        x = x.to(self.where).contiguous(memory_format=self.layout)
        y = torch.from_numpy(self.y[rows]).to(self.where)
        for group in self.optimizers["classifier"].param_groups:
            group["lr"] = rate(self.settings, step, self.n_steps)
        # Dropout draws from the global stream; the step names it.
        torch.manual_seed(rng.seed_of(self.seed, self.name, "dropout", step))
        self.network.train()
        with device.autocast(self.where, self.settings.dtype):
            loss, logits = self.loss(x, y, quarters.to(self.where), step)
        self.optimizers["classifier"].zero_grad()
        loss.backward()
        self.optimizers["classifier"].step()
        self._average(step)
        self.counters["wrong"] += int((logits.argmax(1) != y).sum())
        self.counters["seen"] += len(y)
        return {"loss": loss.item()}

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Running mean of the weights; its window grows with the steps, so it forgets the start."""
        share = max(1 - self.settings.average, 1 / (1 + step))
        for name, value in self.network.named_parameters():
            self.buffers["average"][name] = self.buffers["average"][name].to(self.where)
            self.buffers["average"][name].lerp_(value, share)

    def monitor(self, step: int) -> dict[str, float]:
        """Training error of the epoch, as it went; validation error and loss of the mean."""
        self.measured.load_state_dict(self.network.state_dict() | self.buffers["average"])
        error, loss = self._validate()
        if (error, loss) < (self.counters["best_error"], self.counters["best_loss"]):
            self.counters |= {"best_error": error, "best_loss": loss, "best_step": step}
            self.buffers["best"] = {
                n: t.detach().cpu().clone() for n, t in self.measured.state_dict().items()
            }
        wrong = self.counters["wrong"] / max(self.counters["seen"], 1)
        self.counters |= {"wrong": 0, "seen": 0}
        return {"training_error": wrong, "validation_error": error, "validation_loss": loss}

    def finish(self) -> None:
        self.network.load_state_dict(self.buffers["best"])

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        views = Views(self.measured, self.settings.votes, self.settings.test_mirror).eval()
        chunks = [self.x_val[i : i + 64] for i in range(0, len(self.x_val), 64)]
        logits = torch.cat([views(self.tensor(c).to(self.where)).cpu() for c in chunks]).double()
        y = torch.from_numpy(self.y_val)
        return (logits.argmax(1) != y).double().mean().item(), cross_entropy(logits, y).item()

    def tensor(self, voxels: np.ndarray) -> Tensor:
        """Grids bool (B, 30, 30, 30) as the network takes them, on the CPU."""
        return torch.from_numpy(model_grid(voxels, self.network.side)[:, None]).float()


def rate(settings: config.Classifier, step: int, n_steps: int) -> float:
    """The learning rate of a step: constant, or a cosine to 0 after a linear start."""
    warm = min(1.0, (step + 1) / max(settings.warmup, 1))
    if settings.schedule == "constant":
        return settings.lr * warm
    return settings.lr * warm * (1 + math.cos(math.pi * step / n_steps)) / 2


def build_table1(settings: config.Table1, side: int, value: str = "logsumexp") -> Winn3dClassifier:
    """The network of 3DWINN's Table 1 with ten outputs."""
    return Winn3dClassifier(
        side=side,
        n_classes=N_CLASSES,
        channels=settings.channels,
        slope=settings.slope,
        norm_first=settings.norm_first,
        dropout=settings.dropout,
        value=value,
    )


def started(
    network: Winn3dClassifier, settings: config.Table1, split: Split, key: tuple
) -> Winn3dClassifier:
    """The network with weights of a named stream and the mean voxel of the training shapes."""
    initialise(network, settings.init_std, rng.torch_generator(*key, "weights"))
    mean = model_grid(split.voxels[~split.validation], network.side).mean()
    network.mean.fill_(float(mean))
    return network


def adam(settings: config.Table1) -> Callable:
    """Adam with decoupled weight decay; without decay it is Adam."""
    betas = settings.beta1, settings.beta2

    def make(parameters) -> torch.optim.Optimizer:
        decay = settings.weight_decay
        return torch.optim.AdamW(parameters, settings.lr, betas, weight_decay=decay)

    return make


def table1_model(
    name: str,
    section: Callable[[config.Profile], config.Table1],
    learns: type[ClassifierTask] = ClassifierTask,
    modules: tuple[str, ...] = (),
) -> Model:
    """A classifier of Table 1's network, its section of a profile and the task that teaches it.

    modules: files that decide what is computed, beside ``MODULES`` and the model's own.
    """

    def build(profile: config.Profile) -> Winn3dClassifier:
        return build_table1(section(profile), profile.data.side)

    def task(profile: config.Profile, split: Split, seed: int, where: torch.device) -> Task:
        settings = section(profile)
        network = started(build(profile), settings, split, (seed, name))
        return learns(name, settings, network, adam(settings), split, seed, where)

    return Model(
        task=task,
        build=lambda profile: {"classifier": build(profile)},
        modules=(*MODULES, *modules, f"lib/train/{name}.py"),
    )
