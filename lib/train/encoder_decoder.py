"""Training of an encoder-decoder: 3D-VAE-GAN without its adversary and without its prior.

The comparison that the paper does not make: the same encoder and generator on the same pictures,
with the reconstruction as their only loss and the mean as the code.
"""

import torch

from lib import config, device, rng
from lib.data import Split
from lib.models import gan3d, vaegan3d
from lib.train.engine import Model, Task
from lib.train.vaegan3d import N_MONITOR, Views, build_encoder, describe

MONITORED = ("active_units", "iou_validation", "explained")


def build(section: config.EncoderDecoder) -> dict[str, torch.nn.Module]:
    """Encoder and generator of a section."""
    generator = gan3d.Generator(
        z_dim=section.z_dim, base=section.base, channels=section.generator_channels
    )
    return {"encoder": build_encoder(section), "generator": generator}


class EncoderDecoderTask(Task):
    """One update of both networks a step."""

    def __init__(self, section: config.EncoderDecoder, split: Split, side: int, seed: int, where):
        self.section, self.seed, self.where = section, seed, where
        self.n_steps, self.log_every = section.steps, max(1, min(50, section.steps // 4))
        self.layout = device.memory_format(section.layout)
        self.views = Views(split, grid=side, n=section.views, picture=section.image, where=where)
        self.networks = build(section)
        draws = {name: rng.torch_generator(seed, "encoder_decoder", name) for name in self.networks}
        vaegan3d.initialise(self.networks["encoder"], section.init_std, draws["encoder"])
        gan3d.initialise(self.networks["generator"], section.init_std, draws["generator"])
        self.networks["encoder"].to(where)
        self.networks["generator"].to(where, memory_format=self.layout)
        rates = {"encoder": section.lr_encoder, "generator": section.lr_generator}
        betas = (section.beta1, section.beta2)
        self.optimizers = {
            name: torch.optim.Adam(network.parameters(), rates[name], betas)
            for name, network in self.networks.items()
        }
        self.counters, self.buffers = {}, {}
        self.held_out = self.views.validation(N_MONITOR)

    def step(self, step: int) -> dict[str, float]:
        encoder, generator = (n.train() for n in self.networks.values())
        y, x = self.views.batch(step, self.section.batch, self.seed, "encoder_decoder")
        with device.autocast(self.where, self.section.dtype):
            logits = generator(encoder(y)[0])
        error = vaegan3d.reconstruction_error(logits.float(), x, self.section.recon).mean()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        error.backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
        return {"reconstruction": error.item()}

    def monitor(self, step: int) -> dict[str, float]:
        """Active units and reconstructions of validation shapes; a code without noise has no KL."""
        found = describe(self.networks, *self.held_out, self.views.mean)
        return {name: found[name] for name in MONITORED}


def _task(profile: config.Profile, split: Split, seed: int, where: torch.device) -> Task:
    return EncoderDecoderTask(profile.encoder_decoder, split, profile.data.side, seed, where)


def _build(profile: config.Profile) -> dict[str, torch.nn.Module]:
    return build(profile.encoder_decoder)


MODEL = Model(
    task=_task,
    build=_build,
    modules=(
        "lib/losses.py",
        "lib/models/gan3d.py",
        "lib/models/vaegan3d.py",
        "lib/render.py",
        "lib/samplers.py",
        "lib/train/encoder_decoder.py",
        "lib/train/gan3d.py",
        "lib/train/vaegan3d.py",
    ),
)
