"""Ours: the Baseline trained on shapes attacked as it learns (Madry et al. 2018, Equation 2.1).

The yardstick of the adversarial study: what robustness costs and gives when it is trained for.
"""

import torch
from torch import Tensor

from lib import attacks, rng
from lib.train.classifiers import ClassifierTask, table1_model


class HardenedTask(ClassifierTask):
    """Cross-entropy on shapes attacked by PGD from a random start; nothing else differs."""

    def loss(self, x: Tensor, y: Tensor, quarters: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return super().loss(self.attacked(x, y, step), y, quarters, step)

    def attacked(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        """Shapes (B, 1, D, D, D) after PGD in the ball of ``attack_eps``, from U(-eps, eps)."""
        eps, n = self.settings.attack_eps, self.settings.attack_steps
        draw = rng.torch_generator(self.seed, self.name, "attack", step)
        noise = (2 * torch.rand(x.shape, generator=draw) - 1).to(x.device)
        start = (x + eps * noise).clamp(0, 1)
        size = self.settings.attack_step * eps / n
        return attacks.iterative_fgsm(self.network, x, y, size, n, ball=eps, start=start)


MODEL = table1_model(
    "hardened", lambda profile: profile.hardened, HardenedTask, ("lib/attacks.py",)
)
