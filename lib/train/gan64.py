"""Training of 3D-GAN at the resolution of its paper, 64^3, on shapes of their own.

ModelNet10 comes at 30^3. Finer shapes are the beds of ``beds_64.npz``, or procedural meshes. The
beds mix training and test shapes of ModelNet10, so no table compares what is trained on them.
"""

import numpy as np
import torch

from lib import config, data, files, furniture, paths, voxel
from lib.data import Split
from lib.errors import StudyError
from lib.models.gan3d import GAN64, GAN64_DISCRIMINATOR, Discriminator, Generator
from lib.samplers import sample_generator
from lib.train import checkpoint, gan3d
from lib.train.engine import Model

NEAR_SIDE = 32  # near duplicates are looked for on a grid no finer than this


def shapes(gan: config.Gan64, settings: config.Data, category: str) -> Split:
    """The shapes of a section gan64: voxels bool (N, side, side, side), a part for validation.

    Of near duplicates all are on one side, as in ``lib.data``. Raises StudyError for beds that are
    not in ``data/raw``, for a category that the source does not have, and for all categories.
    """
    if category not in config.CATEGORIES or (gan.source == "beds" and category != "bed"):
        raise StudyError(f"gan64: source {gan.source} has no shapes of category {category}")
    label = config.CATEGORIES.index(category)
    if gan.source == "beds":
        voxels = _beds()
    else:
        streams = [np.random.default_rng([settings.seed, label, k]) for k in range(gan.n_shapes)]
        meshes = [furniture.mesh(category, stream) for stream in streams]
        voxels = np.stack([voxel.voxelize(*mesh, gan.side, fill=True) for mesh in meshes])
    labels = np.full(len(voxels), label)
    flat = voxel.max_pool(voxels, max(1, gan.side // NEAR_SIDE)).reshape(len(voxels), -1)
    pairs = data.overlaps(flat, flat, data.NEAR[0])
    pairs = tuple(part[pairs[0] != pairs[1]] for part in pairs)
    validation = data.split_validation(labels, pairs, settings.validation, settings.seed)
    highest = data.highest_overlap(len(labels), pairs)
    return Split(voxels, labels, np.arange(len(labels)), validation, highest)


def _beds() -> np.ndarray:
    """The 614 beds, bool (614, 64, 64, 64); StudyError when the file is missing or another."""
    file, expected, _ = data.SOURCES["beds64"]
    path = paths.RAW / file
    if not path.is_file():
        raise StudyError(
            f"{paths.relative(path)} is missing; run `python -m lib fetch beds64 --from PATH` "
            "with a copy"
        )
    if files.sha256(path) != expected:
        raise StudyError(f"{paths.relative(path)} is damaged; fetch it again")
    arrays = files.load_npz(path)
    return voxel.unpack(arrays["voxels"], tuple(arrays["shape"].tolist()))


class Gan64Task(gan3d.Gan3dTask):
    """3D-GAN on the shapes of a split as they are, whatever their side."""

    def __init__(self, gan: config.Gan64, split: Split, seed: int, where: torch.device):
        # At data.SIDE the constructor leaves grids without a margin.
        super().__init__(gan, split, data.SIDE, seed, where)

    def samples(self, n: int) -> np.ndarray:
        """Occupancy probabilities (n, D, D, D) of the seeds 0 to n - 1, in evaluation mode."""
        return _draw(self.networks["generator"], list(range(n)), self.gan.latent)


def _draw(generator: Generator, seeds: list[int], latent: str) -> np.ndarray:
    return sample_generator(generator, seeds, latent=latent, batch=16)


def _task(profile: config.Profile, split: Split, seed: int, where: torch.device) -> Gan64Task:
    labels = np.unique(split.labels)
    category = config.CATEGORIES[labels[0]] if len(labels) == 1 else "all"
    found = shapes(profile.gan64, profile.data, category)
    return Gan64Task(profile.gan64, found, seed, where)


def _build(profile: config.Profile) -> dict[str, torch.nn.Module]:
    return dict(zip(("generator", "discriminator"), gan3d.build(profile.gan64), strict=True))


def _sample(profile: config.Profile, networks: dict, seeds: list[int]) -> np.ndarray:
    return _draw(networks["generator"], seeds, profile.gan64.latent)


def published_size() -> dict[str, int]:
    """Parameters of the two networks of the paper at 64^3."""
    with torch.device("meta"):
        generator = Generator(z_dim=200, **GAN64)
        discriminator = Discriminator(**GAN64_DISCRIMINATOR)
    return {
        "generator": checkpoint.n_parameters(generator),
        "discriminator": checkpoint.n_parameters(discriminator),
    }


MODEL = Model(
    task=_task,
    build=_build,
    sample=_sample,
    sampling=("generator",),
    modules=(
        "lib/train/gan64.py",
        "lib/furniture.py",
        "lib/voxel.py",
        *gan3d.MODEL.modules,
    ),
)
