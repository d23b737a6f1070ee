"""Training of VoxNet (Maturana and Scherer 2015): stochastic gradient descent with momentum."""

from collections.abc import Callable

import torch

from lib import config, rng
from lib.data import Split
from lib.models import voxnet
from lib.train.classifiers import N_CLASSES, ClassifierTask
from lib.train.engine import Model

MODULES = (
    "lib/models/classifiers.py",
    "lib/models/voxnet.py",
    "lib/models/winn3d.py",
    "lib/train/classifiers.py",
    "lib/train/voxnet.py",
)


def build(settings: config.Voxnet, side: int, kind: type = voxnet.VoxNet) -> voxnet.VoxNet:
    """The network of a voxnet or orion section."""
    sizes = {"channels": settings.channels, "hidden": settings.hidden}
    return kind(side=side, n_classes=N_CLASSES, **sizes)


def descent(settings: config.Voxnet) -> Callable:
    """Stochastic gradient descent with momentum and an L2 penalty."""

    def make(parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters,
            settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )

    return make


def _task(profile: config.Profile, split: Split, seed: int, where) -> ClassifierTask:
    settings = profile.voxnet
    network = build(settings, profile.data.side)
    voxnet.initialise(network, rng.torch_generator(seed, "voxnet", "weights"))
    return ClassifierTask("voxnet", settings, network, descent(settings), split, seed, where)


MODEL = Model(
    task=_task,
    build=lambda profile: {"classifier": build(profile.voxnet, profile.data.side)},
    modules=MODULES,
)
