"""Training of 3D-VAE: Kingma and Welling 2014 on voxels, with the networks of 3D-GAN."""

import numpy as np
import torch
from torch import Tensor, nn

from lib import config, losses, rng, voxel
from lib.data import Split
from lib.samplers import reparameterise, sample_generator
from lib.train import autoencoder
from lib.train.engine import Model

N_SAMPLES = 32  # drawn from the prior at a log line


def build(vae: config.Vae3d) -> dict[str, nn.Module]:
    """Decoder and encoder of a vae3d section."""
    return autoencoder.build(vae, variational=True)


class Vae3dTask(autoencoder.AutoencoderTask):
    """One step up the evidence lower bound, with ``beta`` before its divergence."""

    name = "vae3d"

    def build(self) -> dict[str, nn.Module]:
        return build(self.section)

    def objective(self, x: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        """-log p(x | z) + beta KL(q(z | x) || p(z)), one draw of z a shape, and its terms."""
        mean, logvar = self.networks["encoder"](x)
        stream = rng.torch_generator(self.seed, self.name, "noise", step)
        noise = torch.randn(mean.shape, generator=stream).to(self.where)
        logits = self.networks["decoder"](reparameterise(mean, logvar, noise))
        reconstruction = losses.voxel_cross_entropy(logits.float(), x)
        kl = losses.gaussian_divergence(mean, logvar).sum(1).mean()
        terms = {"reconstruction": reconstruction.item(), "kl": kl.item()}
        return reconstruction + self.section.beta * kl, terms

    def monitor(self, step: int) -> dict[str, float | str]:
        """The overlaps, the active units, and occupancy and likeness of samples from the prior."""
        found = super().monitor(step)
        codes = autoencoder.encode(self.networks["encoder"], self.watched["iou_train"])
        found["active_units"] = losses.active_units(codes)
        seeds = list(range(N_SAMPLES))
        grids = sample_generator(self.networks["decoder"], seeds, latent="normal") > 0.5
        flat = grids.reshape(len(grids), -1).astype(np.float32)
        found |= {"occupancy": float(flat.mean()), "likeness": voxel.pairwise_iou(flat)}
        warnings = [found.pop("warning")]
        warnings += [] if found["active_units"] else ["no unit is active: the posterior collapsed"]
        return found | {"warning": "; ".join(filter(None, warnings))}

    def finish(self) -> None:
        """Nothing is fitted: samples come from the prior."""


def _task(profile: config.Profile, split: Split, seed: int, where: torch.device) -> Vae3dTask:
    return Vae3dTask(profile.vae3d, split, profile.data.side, seed, where)


def _build(profile: config.Profile) -> dict[str, nn.Module]:
    return build(profile.vae3d)


def _sample(profile: config.Profile, networks: dict, seeds: list[int]) -> np.ndarray:
    return sample_generator(networks["decoder"], seeds, latent="normal")


MODEL = Model(
    task=_task,
    build=_build,
    sample=_sample,
    # The encoder does not sample, but reconstruction, features and the latent study need it.
    sampling=("decoder", "encoder"),
    modules=(
        "lib/losses.py",
        "lib/models/gan3d.py",
        "lib/models/vae3d.py",
        "lib/samplers.py",
        "lib/train/autoencoder.py",
        "lib/train/vae3d.py",
    ),
)
