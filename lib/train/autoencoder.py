"""Training of the volumetric autoencoder, and the Gaussian of its codes from which it samples.

3D-GAN's paper compares itself with such a model (Girdhar et al. 2016): an autoencoder leaves its
codes unrestricted, so a Gaussian is fitted to those of the training shapes.
"""

import numpy as np
import torch
from torch import Tensor, nn

from lib import config, device, losses, rng, samplers, voxel
from lib.data import Split, model_grid
from lib.models import gan3d, vae3d
from lib.train.engine import Model, Task

N_MONITOR = 64  # shapes of either part that are reconstructed at a log line
BATCH = 64  # shapes encoded or decoded at once; only memory depends on it


def build(section: config.Autoencoder, variational: bool = False) -> dict[str, nn.Module]:
    """Decoder and encoder of an autoencoder's or a vae3d section."""
    return {
        "decoder": vae3d.Decoder(
            z_dim=section.z_dim, base=section.base, channels=section.decoder_channels
        ),
        "encoder": vae3d.Encoder(
            z_dim=section.z_dim,
            base=section.base,
            channels=section.encoder_channels,
            variational=variational,
        ),
    }


class AutoencoderTask(Task):
    """Reconstruction of training shapes from their codes; at the end the Gaussian of the codes."""

    name = "autoencoder"

    def __init__(self, section: config.Autoencoder, split: Split, side: int, seed: int, where):
        self.section, self.seed, self.where = section, seed, where
        grids = model_grid(split.voxels, side)
        self.voxels = grids[~split.validation]
        self.n_steps, self.log_every = section.steps, max(1, min(50, section.steps // 4))
        self.layout = device.memory_format(section.layout)
        self.networks = self.build()
        for name in ("decoder", "encoder"):
            stream = rng.torch_generator(seed, self.name, name)
            gan3d.initialise(self.networks[name], section.init_std, stream)
        self.networks["decoder"].start_from(torch.from_numpy(self.voxels))
        for network in self.networks.values():
            network.to(where, memory_format=self.layout)
        learned = [p for n in ("decoder", "encoder") for p in self.networks[n].parameters()]
        adam = torch.optim.Adam(learned, section.lr, (section.beta1, section.beta2))
        self.optimizers = {"adam": adam}
        self.counters, self.buffers = {}, {}
        self.watched = {
            "iou_train": self._drawn(self.voxels),
            "iou_validation": self._drawn(grids[split.validation]),
        }
        self.mean_shape = mean_shape(self.voxels)

    def build(self) -> dict[str, nn.Module]:
        """The networks: decoder, encoder, and the Gaussian of the codes."""
        return build(self.section) | {"gaussian": vae3d.CodeGaussian(z_dim=self.section.z_dim)}

    def objective(self, x: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch (B, 1, D, D, D), nats a shape, and its terms."""
        logits = self.networks["decoder"](self.networks["encoder"].codes(x))
        loss = losses.voxel_cross_entropy(logits.float(), x)
        return loss, {"reconstruction": loss.item()}

    def step(self, step: int) -> dict[str, float]:
        for network in self.networks.values():
            network.train()
        rows = rng.batch_indices(step, self.section.batch, len(self.voxels), self.seed, self.name)
        x = torch.from_numpy(self.voxels[rows][:, None]).to(self.where, torch.float32)
        with device.autocast(self.where, self.section.dtype):
            loss, terms = self.objective(x.contiguous(memory_format=self.layout), step)
        self.optimizers["adam"].zero_grad()
        loss.backward()
        self.optimizers["adam"].step()
        return {"loss": loss.item()} | terms

    def _drawn(self, grids: np.ndarray) -> np.ndarray:
        """At most ``N_MONITOR`` of the grids, the same at every log line."""
        stream = rng.numpy_generator(self.seed, self.name, "monitor")
        return grids[stream.permutation(len(grids))[:N_MONITOR]]

    def monitor(self, step: int) -> dict[str, float | str]:
        """Overlap of reconstructions with training and validation shapes, and the mean shape's."""
        found = {name: reconstruction_iou(self.networks, x) for name, x in self.watched.items()}
        held_out = self.watched["iou_validation"]
        constant = np.broadcast_to(self.mean_shape, held_out.shape)
        found["iou_mean_shape"] = voxel.mean_iou(constant, held_out)
        low = found["iou_train"] <= found["iou_mean_shape"]
        sentence = "reconstructions are no nearer than the mean shape: the codes say nothing yet"
        return found | {"warning": sentence if low else ""}

    def finish(self) -> None:
        """Fit the Gaussian to the codes of all training shapes."""
        self.networks["gaussian"].fit(encode(self.networks["encoder"], self.voxels))


@torch.no_grad()
def encode(encoder: vae3d.Encoder, grids: np.ndarray) -> Tensor:
    """Codes (N, z_dim) of bool grids (N, D, D, D), in evaluation mode and single precision."""
    where = next(encoder.parameters()).device
    with samplers.evaluating(encoder):
        chunks = torch.from_numpy(np.ascontiguousarray(grids[:, None])).split(BATCH)
        return torch.cat([encoder.codes(c.to(where, torch.float32)) for c in chunks])


@torch.no_grad()
def decode(decoder: gan3d.Generator, codes: Tensor) -> np.ndarray:
    """Occupancy probabilities (N, D, D, D) float32 of codes (N, z_dim), in evaluation mode."""
    with samplers.evaluating(decoder):
        parts = [decoder.voxels(z)[:, 0].float().cpu() for z in codes.split(BATCH)]
    return torch.cat(parts).numpy()


def reconstruction_iou(networks: dict[str, nn.Module], grids: np.ndarray) -> float:
    """Mean overlap of bool grids (N, D, D, D) with their reconstructions above .5."""
    again = decode(networks["decoder"], encode(networks["encoder"], grids)) > 0.5
    return voxel.mean_iou(again, grids)


def mean_shape(grids: np.ndarray) -> np.ndarray:
    """One shape, bool (D, D, D), for all: the mean of grids (N, D, D, D), cut where it fits best.

    The cut is that of .1, .2 ... .9 with the highest mean overlap with the grids themselves.
    """
    flat = grids.reshape(len(grids), -1)
    mean, sizes = flat.mean(0), flat.sum(1)
    found = []
    for cut in np.arange(1, 10) / 10:
        shape = mean > cut
        both = flat[:, shape].sum(1)
        found.append((float((both / (sizes + shape.sum() - both)).mean()), shape))
    return max(found, key=lambda pair: pair[0])[1].reshape(grids.shape[1:])


def sample_gaussian(
    decoder: vae3d.Decoder, gaussian: vae3d.CodeGaussian, seeds: list[int]
) -> np.ndarray:
    """Occupancy probabilities (len(seeds), D, D, D) of codes drawn from the Gaussian, by seed."""
    noise = rng.latents(seeds, decoder.z_dim, "normal").to(gaussian.mean.device)
    return decode(decoder, gaussian(noise))


def _task(profile: config.Profile, split: Split, seed: int, where: torch.device) -> AutoencoderTask:
    return AutoencoderTask(profile.autoencoder, split, profile.data.side, seed, where)


def _build(profile: config.Profile) -> dict[str, nn.Module]:
    section = profile.autoencoder
    return build(section) | {"gaussian": vae3d.CodeGaussian(z_dim=section.z_dim)}


def _sample(profile: config.Profile, networks: dict, seeds: list[int]) -> np.ndarray:
    return sample_gaussian(networks["decoder"], networks["gaussian"], seeds)


MODEL = Model(
    task=_task,
    build=_build,
    sample=_sample,
    # The encoder does not sample, but reconstruction and the latent study need it.
    sampling=("decoder", "encoder", "gaussian"),
    modules=(
        "lib/losses.py",
        "lib/models/gan3d.py",
        "lib/models/vae3d.py",
        "lib/samplers.py",
        "lib/train/autoencoder.py",
    ),
)
