"""Training of 3D-VAE-GAN (Wu et al. 2016): discriminator, encoder, generator, in this order."""

import numpy as np
import torch
from torch import Tensor

from lib import config, device, losses, render, rng, voxel
from lib.data import Split, model_grid
from lib.models import gan3d, vaegan3d
from lib.samplers import evaluating, frozen, reparameterise, sample_generator
from lib.train import gan3d as train_gan3d
from lib.train.engine import Model, Task

N_MONITOR = 32  # validation shapes that are reconstructed at every log line


class Views:
    """Training shapes, each with ``n`` pictures of it: pictures and shapes are paired here only.

    Validation shapes have pictures too, one each, which nothing is trained on.
    """

    def __init__(self, split: Split, *, grid: int, n: int, picture: int, where: torch.device):
        train, held_out = split.where(~split.validation), split.where(split.validation)
        self.voxels, self.ids = model_grid(train.voxels, grid), train.ids
        self.held_out = model_grid(held_out.voxels, grid), held_out.ids
        self.mean = torch.from_numpy(self.voxels.mean(0, dtype=np.float32)).to(where)
        self.n, self.picture, self.where = n, picture, where

    def batch(self, step: int, size: int, *key: str | int) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, S, S) and the shapes (B, 1, D, D, D) in them, of a step's batch."""
        rows = rng.batch_indices(step, size, len(self.voxels), *key)
        drawn = rng.numpy_generator(*key, "view", step).integers(self.n, size=size)
        grids = self.voxels[rows]
        names = [("training", int(i), int(k)) for i, k in zip(self.ids[rows], drawn, strict=True)]
        pictures = render.views(grids, names, self.picture, self.where)
        return pictures, torch.from_numpy(grids[:, None]).to(self.where, torch.float32)

    def validation(self, n: int) -> tuple[Tensor, Tensor]:
        """One picture each of at most n validation shapes, spread over them, and the shapes."""
        voxels, ids = self.held_out
        rows = np.unique(np.linspace(0, len(ids) - 1, n).astype(int))
        names = [("validation", int(i)) for i in ids[rows]]
        pictures = render.views(voxels[rows], names, self.picture, self.where)
        return pictures, torch.from_numpy(voxels[rows, None]).to(self.where, torch.float32)


def build_encoder(section: config.Vaegan3d | config.EncoderDecoder) -> vaegan3d.Encoder:
    """The image encoder of a section."""
    return vaegan3d.Encoder(
        z_dim=section.z_dim, side=section.image, channels=section.encoder_channels
    )


class Vaegan3dTask(train_gan3d.Gan3dTask):
    """One update of the discriminator, then of the encoder, then of the generator a step.

    The discriminator sees the generator's answers to z ~ N(0, I) and rests as that of 3D-GAN. The
    encoder lowers weight_kl KL + weight_recon error, the generator its adversarial loss +
    weight_recon error, through the encoder as it now is. The generator always meets z and codes in
    one batch: apart, each would be normalised by its own statistics, while evaluation normalises
    both by their running mean.
    """

    def __init__(self, section: config.Vaegan3d, split: Split, side: int, seed: int, where):
        self.gan, self.seed, self.where = section, seed, where
        self.n_steps, self.log_every = section.steps, max(1, min(50, section.steps // 4))
        self.layout = device.memory_format(section.layout)
        self.views = Views(split, grid=side, n=section.views, picture=section.image, where=where)
        encoder = build_encoder(section)
        vaegan3d.initialise(
            encoder, section.init_std, rng.torch_generator(seed, "vaegan3d", "encoder")
        )
        self.networks = {"encoder": encoder.to(where)}
        pair = train_gan3d.build(section)
        for name, network in zip(("generator", "discriminator"), pair, strict=True):
            gan3d.initialise(network, section.init_std, rng.torch_generator(seed, "vaegan3d", name))
            self.networks[name] = network.to(where, memory_format=self.layout)
        rates = {"encoder": section.lr_encoder, "generator": section.lr_generator}
        rates["discriminator"] = section.lr_discriminator
        betas = (section.beta1, section.beta2)
        self.optimizers = {
            name: torch.optim.Adam(network.parameters(), rates[name], betas)
            for name, network in self.networks.items()
        }
        self.counters, self.buffers = {"accuracy": 0.0, "updates": 0}, {}
        self.held_out = self.views.validation(N_MONITOR)

    def step(self, step: int) -> dict[str, float]:
        for network in self.networks.values():
            network.train()
        y, x = self.views.batch(step, self.gan.batch, self.seed, "vaegan3d")
        x, z = x.contiguous(memory_format=self.layout), self._latents(step)
        noise = rng.torch_generator(self.seed, "vaegan3d", "code", step)
        noise = torch.randn(z.shape, generator=noise).to(self.where)
        code = self._encode(y, noise)
        # The first two updates share these answers: no encoder or generator changes before both
        # have used them.
        with frozen(self.networks["generator"]):
            fake, logits = self._answers(z, code[-1])
        fake = fake.detach().contiguous(memory_format=self.layout)
        loss_d = self._update_discriminator(self.networks["discriminator"], x, fake)
        logged = self._update_encoder(code, logits, x)
        return {
            "loss_discriminator": loss_d,
            **logged,
            **self._update_generator(y, x, z, noise),
            "accuracy": self.counters["accuracy"],
            "updates": self.counters["updates"],
        }

    def _encode(self, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, log-variance and a draw of the codes of pictures y, (B, z_dim) each."""
        with device.autocast(self.where, self.gan.dtype):
            mean, log_variance = (v.float() for v in self.networks["encoder"](y))
        return mean, log_variance, reparameterise(mean, log_variance, noise)

    def _answers(self, z: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities from z and logits from codes, (B, 1, D, D, D) each, of one batch of G."""
        with device.autocast(self.where, self.gan.dtype):
            prior, posterior = self.networks["generator"](torch.cat([z, code])).chunk(2)
            return torch.sigmoid(prior), posterior.float()

    def _update_encoder(self, code: tuple, logits: Tensor, x: Tensor) -> dict[str, float]:
        section, kl = self.gan, losses.gaussian_divergence(*code[:2])
        kl_term = kl.mean() if section.kl == "mean" else kl.sum(1).mean()
        error = vaegan3d.reconstruction_error(logits, x, section.recon).mean()
        loss = section.weight_kl * kl_term + section.weight_recon * error
        _descend(self.optimizers["encoder"], loss)
        return {"kl": kl.sum(1).mean().item(), "reconstruction": error.item()}

    def _update_generator(self, y: Tensor, x: Tensor, z: Tensor, noise: Tensor) -> dict[str, float]:
        section, discriminator = self.gan, self.networks["discriminator"]
        with torch.no_grad():
            code = self._encode(y, noise)[-1]
        fake, logits = self._answers(z, code)
        with frozen(discriminator), device.autocast(self.where, section.dtype):
            judged = discriminator(fake)
        error = vaegan3d.reconstruction_error(logits, x, section.recon).mean()
        adversarial = losses.generator_loss(judged.float(), section.saturating)
        _descend(self.optimizers["generator"], adversarial + section.weight_recon * error)
        return {"loss_generator": adversarial.item()}

    def monitor(self, step: int) -> dict[str, float | str]:
        """Reconstructions of validation shapes, and what 3D-GAN watches on fixed latents."""
        found = describe(self.networks, *self.held_out, self.views.mean)
        return found | super().monitor(step)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def describe(networks: dict, y: Tensor, x: Tensor, middle: Tensor) -> dict[str, float]:
    """What codes carry and what comes back, in evaluation mode, of pictures y and their shapes x.

    kl_validation: KL in nats; active_units: dimensions whose mean varies over the pictures by more
    than .01; iou_validation: mean intersection over union of the shapes from the mean codes, cut
    at .5; explained: by how much their squared error is below that of the mean shape ``middle``
    (D, D, D), as a share of the latter.
    """
    encoder, generator = networks["encoder"], networks["generator"]
    with evaluating(encoder), evaluating(generator):
        mean, log_variance = encoder(y)
        back = generator.voxels(mean)
    kl = losses.gaussian_divergence(mean, log_variance).sum(1).mean()
    return {
        "kl_validation": kl.item(),
        "active_units": losses.active_units(mean),
        "iou_validation": voxel.mean_iou(*((v > 0.5).cpu().numpy() for v in (back, x))),
        "explained": 1 - ((back - x).square().sum() / (middle - x).square().sum()).item(),
    }


def _task(profile: config.Profile, split: Split, seed: int, where: torch.device) -> Task:
    return Vaegan3dTask(profile.vaegan3d, split, profile.data.side, seed, where)


def _build(profile: config.Profile) -> dict[str, torch.nn.Module]:
    generator, discriminator = train_gan3d.build(profile.vaegan3d)
    encoder = build_encoder(profile.vaegan3d)
    return {"generator": generator, "encoder": encoder, "discriminator": discriminator}


def _sample(profile: config.Profile, networks: dict, seeds: list[int]) -> np.ndarray:
    return sample_generator(networks["generator"], seeds, latent=profile.vaegan3d.latent)


MODEL = Model(
    task=_task,
    build=_build,
    sample=_sample,
    sampling=("generator", "encoder"),
    modules=(
        "lib/losses.py",
        "lib/models/gan3d.py",
        "lib/models/vaegan3d.py",
        "lib/render.py",
        "lib/samplers.py",
        "lib/train/gan3d.py",
        "lib/train/vaegan3d.py",
    ),
)
