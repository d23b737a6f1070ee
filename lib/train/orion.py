"""Training of ORION (Sedaghat et al. 2016): VoxNet that must also name the pose.

The paper bins 12 azimuths of the meshes. Training grids can be turned exactly by quarters alone,
so poses are the quarter turns that augmentation applied, and their labels are known.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lib import config, rng
from lib.data import Split
from lib.models import voxnet
from lib.train.classifiers import ClassifierTask
from lib.train.engine import Model
from lib.train.voxnet import MODULES, build, descent


class OrionTask(ClassifierTask):
    """Cross-entropy of the category and, times ``orientation``, of the pose."""

    def loss(self, x: Tensor, y: Tensor, quarters: Tensor, step: int) -> tuple[Tensor, Tensor]:
        logits, pose = (head.float() for head in self.network.heads(x))
        named = cross_entropy(logits, y, label_smoothing=self.settings.smoothing)
        turned = cross_entropy(pose, voxnet.poses(y, quarters))
        return named + self.settings.orientation * turned, logits


def _task(profile: config.Profile, split: Split, seed: int, where: torch.device) -> OrionTask:
    settings = profile.orion
    network = build(settings, profile.data.side, voxnet.Orion)
    voxnet.initialise(network, rng.torch_generator(seed, "orion", "weights"))
    return OrionTask("orion", settings, network, descent(settings), split, seed, where)


MODEL = Model(
    task=_task,
    build=lambda profile: {"classifier": build(profile.orion, profile.data.side, voxnet.Orion)},
    modules=(*MODULES, "lib/train/orion.py"),
)
