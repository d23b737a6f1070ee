"""3D-GAN with the switches of its ports and of the compression report, for the ablation.

With the switches of the base reading a step is that of ``lib.train.gan3d``, bit for bit.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from lib import config, device, losses, rng, voxel
from lib.data import Split
from lib.models.gan3d import Discriminator
from lib.samplers import evaluating
from lib.train import gan3d

MODULES = ("lib/train/gan_variant.py", *gan3d.MODEL.modules)
N_LINES = 10  # log lines a run
# The targets of the compression report. Above 1 the cross entropy has no lower bound.
NOISY_REAL, NOISY_FAKE = (0.7, 1.2), (0.0, 0.3)


class VariantTask(gan3d.Gan3dTask):
    """3D-GAN of the section gan3d, with the budget and the switches of ``variant``."""

    def __init__(
        self,
        gan: config.Gan3d,
        variant: config.GanAblation,
        split: Split,
        side: int,
        seed: int,
        where: torch.device,
    ):
        super().__init__(gan, split, side, seed, where)
        self.variant, self.log_every = variant, max(1, gan.steps // N_LINES)
        self.voxels = voxel.max_pool(self.voxels, variant.pool)
        discriminator = self.networks["discriminator"]
        if variant.norm == "layer":
            layer_normalised(discriminator).to(where)
        parameters = discriminator.parameters()
        if variant.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, gan.lr_discriminator)
        else:
            betas = (gan.beta1, gan.beta2)
            optimizer = torch.optim.Adam(parameters, gan.lr_discriminator, betas)
        self.optimizers["discriminator"] = optimizer

    def step(self, step: int) -> dict[str, float]:
        """``updates`` updates of the discriminator in every ``every``-th step, one of G in each."""
        variant, discriminator = self.variant, self.networks["discriminator"].train()
        self._set_rates(step)
        for k in range(variant.updates):
            draw = step * variant.updates + k
            fake = self._fake(draw)
            loss_d = self._update_discriminator(
                discriminator, self._real(draw), fake.detach(), draw, step % variant.every > 0
            )
        with device.autocast(self.where, self.gan.dtype):
            logits = discriminator(fake).float()
        if variant.loss == "wasserstein":
            loss_g = -logits.mean()
        else:
            loss_g = losses.generator_loss(logits, self.gan.saturating)
        self.optimizers["generator"].zero_grad()
        loss_g.backward()
        self.optimizers["generator"].step()
        return {
            "loss_generator": loss_g.item(),
            "loss_discriminator": loss_d,
            "accuracy": self.counters["accuracy"],
            "updates": self.counters["updates"],
        }

    def _fake(self, draw: int) -> torch.Tensor:
        """Generated shapes (B, 1, D, D, D) of one draw, with the generator's graph."""
        generator, z = self.networks["generator"].train(), self._latents(draw)
        with device.autocast(self.where, self.gan.dtype):
            return generator.voxels(z).contiguous(memory_format=self.layout)

    def _latents(self, step: int) -> torch.Tensor:
        return super()._latents(step) * self.variant.latent_std

    def _set_rates(self, step: int) -> None:
        """Rates fall geometrically from the first step to ``decay`` of it at the last."""
        share = self.variant.decay ** (step / max(self.n_steps - 1, 1))
        self.optimizers["generator"].param_groups[0]["lr"] = self.gan.lr_generator * share
        self.optimizers["discriminator"].param_groups[0]["lr"] = self.gan.lr_discriminator * share

    def _update_discriminator(self, discriminator, x, fake, draw=0, rests=False) -> float:
        """One update, unless it ``rests`` or the gate is shut; a critic has no gate."""
        gan, variant = self.gan, self.variant
        optimizer = self.optimizers["discriminator"]
        gated = variant.loss == "binary" and self.counters["accuracy"] > gan.gate
        rests = rests or gated
        with torch.set_grad_enabled(not rests), device.autocast(self.where, gan.dtype):
            real_logits, fake_logits = discriminator(x).float(), discriminator(fake).float()
        loss = self._discriminator_loss(real_logits, fake_logits, draw)
        if not rests:
            if variant.loss == "wasserstein":
                u = torch.rand(len(x), generator=self._stream("penalty", draw)).to(self.where)
                term = losses.gradient_penalty(discriminator, x, fake.float(), u)
                loss = loss + variant.penalty * term
            optimizer.zero_grad()
            loss.backward()
            if variant.cap > 0:
                nn.utils.clip_grad_norm_(discriminator.parameters(), variant.cap)
            optimizer.step()
            self.counters["updates"] += 1
        self.counters["accuracy"] = losses.discriminator_accuracy(real_logits, fake_logits)
        return loss.item()

    def _discriminator_loss(self, real: torch.Tensor, fake: torch.Tensor, draw: int):
        """What the discriminator lowers, of logits (B,), without the gradient penalty."""
        if self.variant.loss == "wasserstein":
            return losses.wasserstein_loss(fake, real)
        if self.variant.labels == "hard":
            return losses.discriminator_loss(real, fake, self.gan.label_real)
        stream = self._stream("labels", draw)
        targets = [
            torch.empty(len(logits)).uniform_(*span, generator=stream).to(self.where)
            for logits, span in ((real, NOISY_REAL), (fake, NOISY_FAKE))
        ]
        return binary_cross_entropy_with_logits(real, targets[0]) + (
            binary_cross_entropy_with_logits(fake, targets[1])
        )

    def _stream(self, use: str, draw: int) -> torch.Generator:
        return rng.torch_generator(self.seed, "gan3d", use, draw)

    @torch.no_grad()
    def samples(self, n: int) -> np.ndarray:
        """Occupancy probabilities (n, D, D, D) of the seeds 0 to n - 1, in evaluation mode."""
        generator = self.networks["generator"]
        z = rng.latents(list(range(n)), self.gan.z_dim, self.gan.latent) * self.variant.latent_std
        with evaluating(generator):
            return generator.voxels(z.to(self.where))[:, 0].float().cpu().numpy()

    def monitor(self, step: int) -> dict[str, float]:
        """Occupancy and likeness (mean pairwise IoU) of fixed latents in evaluation mode."""
        voxels = self.samples(gan3d.N_MONITOR) > 0.5
        likeness = voxel.pairwise_iou(voxels.reshape(len(voxels), -1).astype(np.float32))
        return {"occupancy": float(voxels.mean()), "likeness": likeness}


def layer_normalised(discriminator: Discriminator) -> Discriminator:
    """The discriminator itself, layer normalisation (GN(1, C)) in place of batch normalisation.

    A gradient penalty asks for it: batch normalisation would couple the shapes of a batch
    (Gulrajani et al. 2017, section 4).
    """
    for block in discriminator.blocks:
        for k, layer in enumerate(block):
            if isinstance(layer, nn.BatchNorm3d):
                block[k] = nn.GroupNorm(1, layer.num_features)
    return discriminator
