"""Adversarial training: attacked shapes stay in their ball, every step repeats, weights learn."""

import pytest
import torch

from lib import attacks, config, data
from lib.train import runs


@pytest.fixture(scope="module")
def task(workspace, smoke):
    split = data.load_train(smoke.data)
    return runs.model("hardened").task(smoke, split, 0, torch.device("cpu"))


def test_attacked_shapes_stay_in_ball_and_box_and_are_worse(task):
    x, y = task.tensor(task.voxels[:6]), torch.from_numpy(task.y[:6])
    found = task.attacked(x, y, 3)
    assert (found - x).abs().max() <= task.settings.attack_eps + 1e-6
    assert found.min() >= 0 and found.max() <= 1 and not found.requires_grad
    loss = [attacks.surprise(task.network(z), y).mean().item() for z in (x, found)]
    assert loss[1] > loss[0]
    assert torch.equal(found, task.attacked(x, y, 3))
    assert not torch.equal(found, task.attacked(x, y, 4))


def test_the_loss_is_that_of_the_attacked_shapes_and_reaches_every_weight(task):
    x, y = task.tensor(task.voxels[:6]), torch.from_numpy(task.y[:6])
    loss, logits = task.loss(x, y, torch.zeros(6, dtype=torch.long), 3)
    torch.testing.assert_close(logits, task.network(task.attacked(x, y, 3)).float())
    task.network.zero_grad()
    loss.backward()
    used = {n for n, p in task.network.named_parameters() if p.grad is not None}
    assert used == {n for n, _ in task.network.named_parameters()}


def test_a_step_is_named_by_its_number_alone(workspace, smoke):
    """What another step did before leaves no trace in the noise: steps can be taken up again."""
    split = data.load_train(smoke.data)
    first, second = (
        runs.model("hardened").task(smoke, split, 0, torch.device("cpu")) for _ in range(2)
    )
    x, y = first.tensor(first.voxels[:4]), torch.from_numpy(first.y[:4])
    second.attacked(x, y, 0)
    torch.rand(7)
    assert torch.equal(first.attacked(x, y, 5), second.attacked(x, y, 5))


def test_the_profiles_differ_from_the_baseline_by_the_attack_alone():
    for name in config.available():
        profile = config.load(name)
        base, hard = (config.section(profile, m) for m in ("baseline", "hardened"))
        own = {k: hard.pop(k) for k in ("attack_eps", "attack_steps", "attack_step")}
        assert hard == base and own["attack_eps"] > 0
