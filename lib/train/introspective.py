"""Supervised 3DWINN (Huang et al. 2019, Eq. 3): a classifier that synthesises its own negatives.

What the paper leaves open follows the supervised code of WINN (Lee et al. 2018): a critic on the
logits, negatives of the category of each real shape, new ones after every epoch.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lib import config, device, losses, rng, samplers
from lib.data import Split
from lib.models.classifiers import Winn3dClassifier
from lib.train.classifiers import (
    MODULES,
    N_CLASSES,
    ClassifierTask,
    adam,
    build_table1,
    started,
)
from lib.train.engine import Model
from lib.train.winn3d import describe, from_bytes, guard, to_bytes

SHOWN = 8  # epochs of which one pseudo-negative a category is kept for the figure


def build(settings: config.Introspective, side: int) -> Winn3dClassifier:
    """The network of an introspective section."""
    return build_table1(settings, side, settings.value)


def classification_loss(
    cross_entropies: Tensor, wasserstein: Tensor, penalty: Tensor, settings: config.Introspective
) -> Tensor:
    """Eq. 3, of means: CE + alpha (W + lambda GP), as WINN's code has it.

    Without ``penalty_in_alpha`` it is CE + alpha W + lambda GP, as printed.
    """
    weighted = settings.penalty * penalty
    if settings.penalty_in_alpha:
        return cross_entropies + settings.alpha * (wasserstein + weighted)
    return cross_entropies + settings.alpha * wasserstein + weighted


def synthesise(
    network: Winn3dClassifier,
    x: Tensor,
    labels: Tensor,
    threshold: float,
    settings: config.Introspective,
) -> tuple[Tensor, Tensor]:
    """Pseudo-negatives of given categories: Adam lowers |f - threshold| + w CE(labels) from x.

    x (B, 1, D, D, D) in [0, 1], labels (B,), w is ``label_weight``. A shape rests when its f comes
    within ``tolerance`` of the threshold or passes it. Every step is clipped to [0, 1] where
    ``clip``. Returns the shapes and the steps each took (B,). Source: WINN's supervised code.
    """
    lr, beta1, beta2 = settings.sampler_lr, settings.sampler_beta1, settings.sampler_beta2
    out, taken = x.clone(), torch.zeros(len(x), dtype=torch.long)
    rows, first = torch.arange(len(x)), None
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t in range(1, settings.max_steps + 1):
        gap, gradient = _climb(network, x, labels, threshold, settings)
        first = gap.sign() if first is None else first
        moving = gap * first > settings.tolerance
        if not moving.all():
            out[rows[~moving.cpu()]] = x[~moving]
            rows, first, labels = rows[moving.cpu()], first[moving], labels[moving]
            x, m, v, gradient = x[moving], m[moving], v[moving], gradient[moving]
        if len(rows) == 0:
            break
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = v.div(1 - beta2**t).sqrt_().add_(settings.sampler_epsilon)
        x = x.addcdiv(m, scale, value=-lr / (1 - beta1**t))
        x = x.clamp_(0, 1) if settings.clip else x
        taken[rows] = t
    out[rows] = x
    return out, taken


def _climb(network, x, labels, threshold, settings) -> tuple[Tensor, Tensor]:
    """f - threshold (B,) and the gradient of the synthesis loss by x."""
    x = x.detach().requires_grad_()
    with device.autocast(x.device, settings.dtype):
        logits = network(x).float()
        gap = network.value_of(logits) - threshold
    named = cross_entropy(logits, labels, reduction="none")
    (gradient,) = torch.autograd.grad((gap.abs() + settings.label_weight * named).sum(), x)
    return gap.detach(), gradient


class IntrospectiveTask(ClassifierTask):
    """An epoch of Eq. 3 against the pool, then new pseudo-negatives of every category for it.

    ``cascades`` divide the epochs. Shapes of the first start from N(0, 1) around the mean voxel,
    of a later one from what the last one synthesised. The pool only grows, alike in all
    categories: (categories, shapes, D, D, D).
    """

    def __init__(self, settings, network, split: Split, seed: int, where: torch.device):
        super().__init__("introspective", settings, network, adam(settings), split, seed, where)
        noise = self._noise("pool", settings.pool)
        self.buffers["pool"] = to_bytes(noise)
        self.buffers["shown"] = to_bytes(noise[:, :1])
        self.buffers["f_real"] = torch.zeros(0)

    def _noise(self, key: str | int, n: int) -> Tensor:
        """N(0, 1) around the mean, (categories, n, D, D, D); one named stream a shape."""
        side, mean = self.network.side, self.network.mean.item()
        draws = [
            samplers.gaussian_noise(side, rng.torch_generator(self.seed, self.name, key, c, k))
            for c in range(N_CLASSES)
            for k in range(n)
        ]
        x = torch.stack(draws).view(N_CLASSES, n, *(side,) * 3) + mean
        return x.clamp(0, 1) if self.settings.clip else x

    def loss(self, x: Tensor, y: Tensor, quarters: Tensor, step: int) -> tuple[Tensor, Tensor]:
        settings = self.settings
        n = min(settings.negatives or len(x), len(x))
        noise = rng.torch_generator(self.seed, self.name, "critic", step)
        negatives = self._negatives(y[:n], noise)
        logits, foreign = self.network(torch.cat([x, negatives])).float().split([len(x), n])
        named = cross_entropy(logits, y, label_smoothing=settings.smoothing)
        f_real, f_pool = self.network.value_of(logits[:n]), self.network.value_of(foreign)
        u = torch.rand(n, generator=noise).to(x.device)
        penalty = losses.gradient_penalty(self.network.critic, x[:n], negatives, u)
        distance = losses.wasserstein_loss(f_pool, f_real)
        mean = f_real.detach().mean().cpu()
        self.found = {
            "cross_entropy": named.item(),
            "f_real": mean.item(),
            "f_pool": f_pool.mean().item(),
            "penalty": penalty.item(),
        }
        guard(self.found, "introspective")
        self.buffers["f_real"] = torch.cat([self.buffers["f_real"], mean[None]])
        return classification_loss(named, distance, penalty, settings), logits

    def _negatives(self, y: Tensor, noise: torch.Generator) -> Tensor:
        """One of the category of every label, drawn with replacement from the whole pool."""
        pool = self.buffers["pool"]
        rows = torch.randint(pool.shape[1], (len(y),), generator=noise)
        x = from_bytes(pool[y.cpu(), rows])[:, None].to(self.where)
        return x.contiguous(memory_format=self.layout)

    def step(self, step: int) -> dict[str, float]:
        logged = super().step(step) | self.found
        epoch, place = divmod(step, self.per_epoch)
        if place < self.per_epoch - 1:
            return logged
        shapes, taken = self._synthesise(epoch)
        self.buffers["pool"] = torch.cat([self.buffers["pool"], to_bytes(shapes)], 1)
        if epoch in shown_epochs(self.settings.epochs):
            self.buffers["shown"] = torch.cat([self.buffers["shown"], to_bytes(shapes[:, :1])], 1)
        self.buffers["f_real"] = torch.zeros(0)
        capped = (taken == self.settings.max_steps).float().mean().item()
        made = {"sampler_steps": taken.float().mean().item(), "capped": capped}
        return logged | describe(shapes.flatten(0, 1)) | made

    def _synthesise(self, epoch: int) -> tuple[Tensor, Tensor]:
        """``new`` shapes of every category, (categories, new, D, D, D), and their steps."""
        settings = self.settings
        starts = self._starts(epoch).flatten(0, 1)[:, None]
        labels = torch.arange(N_CLASSES).repeat_interleave(settings.new)
        low, high = self.buffers["f_real"].min().item(), self.buffers["f_real"].max().item()
        shapes, steps = [], []
        with samplers.evaluating(self.network), samplers.frozen(self.network):
            for i in range(0, len(labels), settings.sampler_batch):
                noise = rng.torch_generator(self.seed, self.name, "threshold", epoch, i)
                threshold = low + (high - low) * torch.rand((), generator=noise).item()
                x = starts[i : i + settings.sampler_batch].to(self.where)
                x = x.contiguous(memory_format=self.layout)
                y = labels[i : i + settings.sampler_batch].to(self.where)
                x, taken = synthesise(self.network, x, y, threshold, settings)
                shapes.append(x.cpu())
                steps.append(taken)
        side = self.network.side
        return torch.cat(shapes).view(N_CLASSES, settings.new, *(side,) * 3), torch.cat(steps)

    def _starts(self, epoch: int) -> Tensor:
        """Where an epoch's shapes start, (categories, new, D, D, D)."""
        settings = self.settings
        length = -(-settings.epochs // settings.cascades)
        cascade = epoch // length
        if cascade == 0:
            return self._noise(epoch, settings.new)
        last = self.buffers["pool"][:, settings.pool + (cascade - 1) * length * settings.new :]
        last = last[:, : length * settings.new]
        noise = rng.torch_generator(self.seed, self.name, "start", epoch)
        return from_bytes(last[:, torch.randint(last.shape[1], (settings.new,), generator=noise)])

    def other_samples(self) -> dict[str, Tensor]:
        """``pseudo-negatives``: one a category from each of ``shown_epochs``, noise first."""
        return {"pseudo-negatives": from_bytes(self.buffers["shown"]).flatten(0, 1)}


def shown_epochs(epochs: int) -> list[int]:
    """The epochs whose pseudo-negatives the figure shows, evenly spread, the last among them."""
    return sorted({int(e) for e in np.linspace(0, epochs - 1, min(SHOWN, epochs)).round()})


def _task(profile: config.Profile, split: Split, seed: int, where) -> IntrospectiveTask:
    settings = profile.introspective
    network = build(settings, profile.data.side)
    network = started(network, settings, split, (seed, "introspective"))
    return IntrospectiveTask(settings, network, split, seed, where)


MODEL = Model(
    task=_task,
    build=lambda profile: {"classifier": build(profile.introspective, profile.data.side)},
    modules=(
        *MODULES,
        "lib/losses.py",
        "lib/models/gan3d.py",
        "lib/samplers.py",
        "lib/train/introspective.py",
        "lib/train/winn3d.py",
    ),
)
