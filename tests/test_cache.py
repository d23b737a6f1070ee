"""What classifiers answered is kept, and only used for what it was asked of."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from lib import cache, classify, config, paths
from lib.train.classifiers import build_table1

GRIDS = np.random.default_rng(0).random((3, 30, 30, 30)) < 0.1


class Counts(nn.Module):
    """Counts how often it is asked; its logits are weighted sums of voxels."""

    side = 30

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(30**3, 10)
        self.asked = 0

    def forward(self, x):
        self.asked += 1
        return self.linear(x.flatten(1))


@pytest.fixture
def network(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    torch.manual_seed(0)
    return Counts()


def test_logits_are_asked_once_and_are_those_of_classify(network):
    first = cache.logits("a", network, GRIDS)
    assert network.asked == 1
    assert (cache.logits("a", network, GRIDS) == first).all() and network.asked == 1
    np.testing.assert_array_equal(first, classify.logits(network, GRIDS))


@pytest.mark.parametrize(
    ("key", "grids"),
    [("b", GRIDS), ("a", GRIDS[:2]), ("a", ~GRIDS), ("a", GRIDS[:, ::-1]), ("a", GRIDS[::-1])],
)
def test_other_classifiers_and_other_shapes_are_asked_anew(network, key, grids):
    cache.logits("a", network, GRIDS)
    cache.logits(key, network, grids)
    assert network.asked == 2


def test_the_code_of_a_network_counts(monkeypatch):
    smoke = config.load("smoke")
    network = build_table1(smoke.baseline, smoke.data.side)
    before = cache.classifier_hash(smoke, "baseline", network)
    assert before == cache.classifier_hash(smoke, "baseline", network)
    cache._code.cache_clear()
    monkeypatch.setattr(cache, "code_hash", lambda module: "edited")
    assert before != cache.classifier_hash(smoke, "baseline", network)
    cache._code.cache_clear()


def test_comments_are_no_code(tmp_path):
    hashes = []
    for i, text in enumerate(("x = 1\n", "x = 1  # one\n", "x = 2\n")):
        module = ModuleType("module")
        module.__file__ = str(tmp_path / f"module{i}.py")
        Path(module.__file__).write_text(text)
        hashes.append(cache.code_hash(module))
    assert hashes[0] == hashes[1] != hashes[2]
