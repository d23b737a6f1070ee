"""Training of the judge: ``nin3d.Nin3d`` on all categories, chosen on validation."""

import math

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from lib import config, device, rng
from lib.data import Split
from lib.models import nin3d
from lib.train.engine import Model, Task


def build(judge: config.Judge, n_classes: int) -> nin3d.Nin3d:
    """The network of a judge section."""
    return nin3d.Nin3d(n_classes=n_classes, widths=judge.widths, hidden=judge.hidden)


def augment(voxels: np.ndarray, judge: config.Judge, generator: np.random.Generator) -> np.ndarray:
    """Shift each grid (B, D, D, D) by up to ``jitter`` voxels an axis; turn it by quarters; mirror.

    All three are exact: objects lie at least 3 voxels inside the grid, and quarter turns about z
    and the mirror image along x map voxels to voxels.
    """
    out = np.empty_like(voxels)
    shifts = generator.integers(-judge.jitter, judge.jitter + 1, (len(voxels), 3))
    quarters = generator.integers(0, 4 if judge.turns else 1, len(voxels))
    mirrored = generator.integers(0, 2 if judge.mirror else 1, len(voxels))
    for k, x in enumerate(voxels):
        x = x[::-1] if mirrored[k] else x
        out[k] = np.roll(np.rot90(x, quarters[k], axes=(0, 1)), shifts[k], axis=(0, 1, 2))
    return out


class JudgeTask(Task):
    """SGD with momentum and a cosine rate; after every epoch the validation part decides.

    The kept weights are those of the lowest validation loss: on some 400 shapes the error moves
    in steps of a quarter of a percent, and many epochs share the lowest.
    """

    def __init__(self, judge: config.Judge, split: Split, seed: int, where: torch.device):
        self.judge, self.seed, self.where = judge, seed, where
        kept = ~split.validation
        self.x, self.y = split.voxels[kept], split.labels[kept]
        self.x_val, self.y_val = split.voxels[~kept], split.labels[~kept]
        self.per_epoch = max(1, len(self.x) // judge.batch)
        self.n_steps, self.log_every = judge.epochs * self.per_epoch, self.per_epoch
        network = build(judge, len(config.CATEGORIES))
        nin3d.initialise(network, rng.torch_generator(seed, "judge", "weights"))
        self.network = network.to(where, memory_format=device.memory_format(judge.layout))
        self.networks = {"judge": self.network}
        sgd = torch.optim.SGD(
            self.network.parameters(),
            judge.lr,
            momentum=judge.momentum,
            weight_decay=judge.weight_decay,
        )
        self.optimizers = {"judge": sgd}
        self.counters = {"best_loss": float("inf"), "best_step": 0}
        self.buffers = {"best": {}}

    def step(self, step: int) -> dict[str, float]:
        judge = self.judge
        rows = rng.batch_indices(step, judge.batch, len(self.x), self.seed, "judge")
        noise = rng.numpy_generator(self.seed, "judge", "augment", step)
        x = self._tensor(augment(self.x[rows], judge, noise))
        y = torch.from_numpy(self.y[rows]).to(self.where)
        for group in self.optimizers["judge"].param_groups:
            group["lr"] = judge.lr * (1 + math.cos(math.pi * step / self.n_steps)) / 2
        # Dropout draws from the global stream; the step names it.
        torch.manual_seed(rng.seed_of(self.seed, "judge", "dropout", step))
        self.network.train()
        with device.autocast(self.where, judge.dtype):
            logits = self.network(x).float()
        loss = cross_entropy(logits, y)
        self.optimizers["judge"].zero_grad()
        loss.backward()
        self.optimizers["judge"].step()
        return {"loss": loss.item()}

    def monitor(self, step: int) -> dict[str, float]:
        """Validation error and loss; keeps the weights when the loss is the lowest so far."""
        error, loss = self._validate()
        if loss < self.counters["best_loss"]:
            self.counters |= {"best_loss": loss, "best_step": step}
            self.buffers["best"] = {
                n: t.detach().cpu().clone() for n, t in self.network.state_dict().items()
            }
        return {"validation_error": error, "validation_loss": loss}

    def finish(self) -> None:
        self.network.load_state_dict(self.buffers["best"])

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        self.network.eval()
        logits = [
            self.network(self._tensor(self.x_val[i : i + 128])).cpu()
            for i in range(0, len(self.x_val), 128)
        ]
        logits, y = torch.cat(logits).double(), torch.from_numpy(self.y_val)
        wrong = (logits.argmax(1) != y).double().mean().item()
        return wrong, cross_entropy(logits, y).item()

    def _tensor(self, voxels: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(voxels[:, None]).to(self.where, torch.float32)
        return x.contiguous(memory_format=device.memory_format(self.judge.layout))


MODEL = Model(
    task=lambda profile, split, seed, where: JudgeTask(profile.judge, split, seed, where),
    build=lambda profile: {"judge": build(profile.judge, len(config.CATEGORIES))},
    modules=("lib/models/nin3d.py", "lib/train/judge.py"),
)
