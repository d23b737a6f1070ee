"""Training of 3D-GAN (Wu et al. 2016), with a discriminator gate that can re-open."""

import numpy as np
import torch

from lib import config, device, losses, rng, voxel
from lib.data import Split, model_grid
from lib.models import gan3d
from lib.samplers import sample_generator
from lib.train.engine import Model, Task

# Early warnings of the failures that users of 3D-GAN report most: full cubes, nothing, one shape.
FULL, EMPTY, ALIKE = 0.5, 0.01, 0.95
N_MONITOR = 32


def build(gan: config.Gan3d) -> tuple[gan3d.Generator, gan3d.Discriminator]:
    """The two networks of a gan3d section."""
    generator = gan3d.Generator(z_dim=gan.z_dim, base=gan.base, channels=gan.generator_channels)
    discriminator = gan3d.Discriminator(
        base=gan.base, channels=gan.discriminator_channels, norm_first=gan.norm_first
    )
    return generator, discriminator


class Gan3dTask(Task):
    """One discriminator update, unless the gate is shut, and one generator update a step.

    The gate of the paper: the discriminator rests while its accuracy on the last batch exceeds
    ``gate``. The accuracy is measured at rest too; else it could never fall and re-open the gate.
    """

    def __init__(self, gan: config.Gan3d, split: Split, side: int, seed: int, where: torch.device):
        self.gan, self.seed, self.where = gan, seed, where
        self.voxels = model_grid(split.voxels[~split.validation], side)
        self.n_steps, self.log_every = gan.steps, max(1, min(50, gan.steps // 4))
        self.layout = device.memory_format(gan.layout)
        networks = dict(zip(("generator", "discriminator"), build(gan), strict=True))
        rates = {"generator": gan.lr_generator, "discriminator": gan.lr_discriminator}
        for name, network in networks.items():
            gan3d.initialise(network, gan.init_std, rng.torch_generator(seed, "gan3d", name))
            network.to(where, memory_format=self.layout)
        self.networks = networks
        self.optimizers = {
            name: torch.optim.Adam(network.parameters(), rates[name], (gan.beta1, gan.beta2))
            for name, network in networks.items()
        }
        self.counters = {"accuracy": 0.0, "updates": 0}
        self.buffers = {}

    def step(self, step: int) -> dict[str, float]:
        gan, generator = self.gan, self.networks["generator"].train()
        discriminator = self.networks["discriminator"].train()
        x, z = self._real(step), self._latents(step)
        with device.autocast(self.where, gan.dtype):
            fake = generator.voxels(z).contiguous(memory_format=self.layout)
        loss_d = self._update_discriminator(discriminator, x, fake.detach())
        with device.autocast(self.where, gan.dtype):
            logits = discriminator(fake)
        loss_g = losses.generator_loss(logits.float(), gan.saturating)
        self.optimizers["generator"].zero_grad()
        loss_g.backward()
        self.optimizers["generator"].step()
        return {
            "loss_generator": loss_g.item(),
            "loss_discriminator": loss_d,
            "accuracy": self.counters["accuracy"],
            "updates": self.counters["updates"],
        }

    def _update_discriminator(self, discriminator, x, fake) -> float:
        gan, optimizer = self.gan, self.optimizers["discriminator"]
        rests = self.counters["accuracy"] > gan.gate
        with torch.set_grad_enabled(not rests), device.autocast(self.where, gan.dtype):
            real_logits, fake_logits = discriminator(x).float(), discriminator(fake).float()
        loss = losses.discriminator_loss(real_logits, fake_logits, gan.label_real)
        if not rests:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.counters["updates"] += 1
        self.counters["accuracy"] = losses.discriminator_accuracy(real_logits, fake_logits)
        return loss.item()

    def _real(self, step: int) -> torch.Tensor:
        rows = rng.batch_indices(step, self.gan.batch, len(self.voxels), self.seed, "gan3d")
        x = torch.from_numpy(self.voxels[rows][:, None]).to(self.where, torch.float32)
        return x.contiguous(memory_format=self.layout)

    def _latents(self, step: int) -> torch.Tensor:
        draw = torch.rand if self.gan.latent == "uniform" else torch.randn
        noise = rng.torch_generator(self.seed, "gan3d", "latents", step)
        return draw(self.gan.batch, self.gan.z_dim, generator=noise).to(self.where)

    @torch.no_grad()
    def monitor(self, step: int) -> dict[str, float | str]:
        """Occupancy and likeness (mean pairwise IoU) of fixed latents in evaluation mode."""
        generator = self.networks["generator"].eval()
        z = rng.latents(list(range(N_MONITOR)), self.gan.z_dim, self.gan.latent).to(self.where)
        voxels = (generator.voxels(z) > 0.5).flatten(1).float().cpu().numpy()
        occupancy, likeness = float(voxels.mean()), voxel.pairwise_iou(voxels)
        findings = {
            f"mean occupancy {occupancy:.2f}: shapes fill their box": occupancy > FULL,
            f"mean occupancy {occupancy:.3f}: shapes are almost empty": occupancy < EMPTY,
            f"mean pairwise IoU {likeness:.2f}: shapes are alike": likeness > ALIKE,
        }
        warning = "; ".join(sentence for sentence, holds in findings.items() if holds)
        return {"occupancy": occupancy, "likeness": likeness, "warning": warning}


def _task(profile: config.Profile, split: Split, seed: int, where: torch.device) -> Gan3dTask:
    return Gan3dTask(profile.gan3d, split, profile.data.side, seed, where)


def _build(profile: config.Profile) -> dict[str, torch.nn.Module]:
    return dict(zip(("generator", "discriminator"), build(profile.gan3d), strict=True))


def _sample(profile: config.Profile, networks: dict, seeds: list[int]) -> np.ndarray:
    return sample_generator(networks["generator"], seeds, latent=profile.gan3d.latent)


MODEL = Model(
    task=_task,
    build=_build,
    sample=_sample,
    sampling=("generator",),
    modules=("lib/models/gan3d.py", "lib/train/gan3d.py", "lib/losses.py", "lib/samplers.py"),
)
