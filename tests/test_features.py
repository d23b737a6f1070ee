"""Features: sizes as published, pooling on hand-made maps, and what extraction ignores."""

import numpy as np
import pytest
import torch
from torch import nn

from lib import config, data, features
from lib.errors import StudyError
from lib.models import desnet3d, gan3d, winn3d
from lib.train import runs

GAN64 = gan3d.GAN64_DISCRIMINATOR
GAN32 = gan3d.GAN32_DISCRIMINATOR


class Answering(nn.Module):
    """A stand-in for a network with given responses."""

    def __init__(self, *responses):
        super().__init__()
        self.given = responses

    def responses(self, x):
        return list(self.given)


class Encoder(nn.Module):
    """A stand-in for the encoder of an autoencoder: ``codes(x)`` (B, z)."""

    def __init__(self, side=32, z=7):
        super().__init__()
        self.layer = nn.Linear(side**3, z)

    def codes(self, x):
        return self.layer(x.flatten(1))


def grids(n, side=30, seed=0):
    return np.random.default_rng(seed).random((n, side, side, side)) < 0.2


# ---------------------------------------------------------------- the papers' features


@pytest.mark.parametrize("shape, side, size", [(GAN64, 64, 7168), (GAN32, 32, 3584)])
def test_3d_gan_has_the_published_number_of_features(shape, side, size):
    network = gan3d.Discriminator(**shape).eval()
    with torch.no_grad():
        found = features.gan3d_features(network, torch.rand(1, 1, side, side, side))
    assert found.shape == (1, size)


def test_3d_gan_pools_with_kernels_8_4_2_at_64():
    """conv 2, 3 and 4 of the paper: maps of 16^3, 8^3 and 4^3, windows end to end."""
    maps = [torch.zeros(1, 1, s, s, s) for s in (32, 16, 8, 4)]
    maps[0][0, 0, 1, 1, 1] = 9.0  # the first convolution is left out
    maps[1][0, 0, 7, 7, 7] = 1.0  # the last voxel of the first window of 8
    maps[1][0, 0, 8, 0, 15] = 2.0  # x in the second window, y in the first, z in the second
    maps[2][0, 0, 3, 4, 4] = 3.0  # windows of 4
    maps[3][0, 0, 0, 2, 1] = 4.0  # windows of 2
    found = features.gan3d_features(Answering(*maps), None)
    expected = torch.zeros(3, 2, 2, 2)
    expected[0, 0, 0, 0], expected[0, 1, 0, 1] = 1.0, 2.0
    expected[1, 0, 1, 1], expected[2, 0, 1, 0] = 3.0, 4.0
    assert (found == expected.flatten()[None]).all()


def test_3d_gan_pools_the_maximum_of_negative_responses_too():
    maps = [torch.full((2, 3, s, s, s), -5.0) for s in (16, 8, 4, 2)]
    maps[1][1, 2, 0, 0, 0] = -1.0
    found = features.gan3d_features(Answering(*maps), None)
    assert found.shape == (2, 3 * 3 * 8) and (found[0] == -5).all()
    assert (found[1] == -1).nonzero().flatten().tolist() == [2 * 8]


def test_3d_gan_orders_its_features_by_layer_and_channel():
    maps = [torch.zeros(1, 2, s, s, s) + s for s in (16, 8, 4, 2)]
    maps[3][0, 1] += 0.5
    found = features.gan3d_features(Answering(*maps), None)[0]
    assert found.tolist() == [8.0] * 16 + [4.0] * 16 + [2.0] * 8 + [2.5] * 8


def test_descriptornet_has_the_published_number_of_features():
    network = desnet3d.Descriptor(side=32, s=0.5, **desnet3d.RELEASED)
    with torch.no_grad():
        found = features.desnet3d_features(network, torch.rand(1, 1, 32, 32, 32))
    assert found.shape == (1, 5400 + 2700)


def test_descriptornet_pools_as_tensorflow_pads():
    """11 voxels in windows of 4: one voxel is added behind, and never wins."""
    first, second = torch.full((1, 1, 11, 11, 11), -2.0), torch.zeros(1, 1, 6, 6, 6)
    first[0, 0, 10, 0, 0], first[0, 0, 7, 8, 3] = -1.0, 3.0
    second[0, 0, 1, 2, 5] = 7.0
    found = features.desnet3d_features(Answering(first, second), None)[0]
    pooled, other = found[:27].view(3, 3, 3), found[27:].view(3, 3, 3)
    expected = torch.full((3, 3, 3), -2.0)
    expected[2, 0, 0], expected[1, 2, 0] = -1.0, 3.0
    assert (pooled == expected).all()
    assert other[0, 1, 2] == 7 and other.sum() == 7


def test_3dwinn_has_the_published_number_of_features():
    critic = winn3d.Critic(side=32)
    x = torch.rand(2, 1, 32, 32, 32)
    with torch.no_grad():
        found = features.winn3d_features(critic, x)
        several = features.layer_features(critic, x)
    assert found.shape == (2, 2048)
    # 4^3 boxes of 32, 64 and 128 channels, and the last block as it is: 3DWINN's own features.
    assert several.shape == (2, 64 * (32 + 64 + 128) + 2048)
    torch.testing.assert_close(several[:, -2048:], found)


def test_layers_are_means_of_boxes_of_the_blocks():
    critic = winn3d.Critic(side=16, channels=(2, 3, 4)).eval()
    x, seen = torch.rand(1, 1, 16, 16, 16), []
    with torch.no_grad():
        y = critic.centred(x)
        for i, (convolution, norm) in enumerate(
            zip(critic.convolutions, critic.norms, strict=True)
        ):
            y = nn.functional.leaky_relu(norm(convolution(y)), critic.slope)
            y = nn.functional.avg_pool3d(y, 2) if i else y
            seen.append(y)
        found = features.layer_features(critic, x)[0]
    block = seen[1][0]  # (3, 8, 8, 8)
    boxes = block.reshape(3, 4, 2, 4, 2, 4, 2).mean((2, 4, 6))
    torch.testing.assert_close(found[: 3 * 64], boxes.flatten(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[3 * 64 :], seen[2].flatten(), atol=1e-5, rtol=1e-4)


def test_an_encoder_gives_its_codes():
    encoder, shapes = Encoder(), grids(3)
    found = features.extract(features.code_features, encoder, shapes, 32)
    x = torch.from_numpy(data.model_grid(shapes, 32)).float()[:, None]
    np.testing.assert_allclose(found, encoder.codes(x).detach().numpy(), atol=1e-5)
    assert found.shape == (3, 7)


# ---------------------------------------------------------------- extraction


@pytest.mark.parametrize("model", list(features.STARTS))
def test_extraction_is_at_rest_and_does_not_depend_on_the_batch(workspace, smoke, model):
    shapes = grids(9)
    feature = features.of_model(model, smoke)
    network = features.untrained(model, smoke, data.load_train(smoke.data)).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    whole = features.extract(feature.function, network, shapes, smoke.data.side, batch=9)
    pieces = features.extract(feature.function, network, shapes, smoke.data.side, batch=2)
    np.testing.assert_allclose(pieces, whole, atol=1e-5, rtol=1e-4)
    assert whole.dtype == np.float32 and len(whole) == 9 and np.isfinite(whole).all()
    assert not network.training
    # Batch normalisation has not moved: evaluation leaves its running means where they were.
    assert all((before[k] == v).all() for k, v in network.state_dict().items())
    assert np.ptp(whole, axis=0).max() > 0


def test_extraction_is_in_single_precision(workspace, smoke):
    network = features.untrained("winn3d", smoke, data.load_train(smoke.data))
    function = features.winn3d_features
    exact = features.extract(function, network, grids(4), 24)
    rounded = features.extract(function, network.to(torch.bfloat16), grids(4), 24)
    assert next(network.parameters()).dtype == torch.float32 and rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).max() < 0.2  # weights were rounded, arithmetic is not


def test_untrained_is_the_start_of_training(workspace, smoke):
    split = data.load_train(smoke.data)
    for model in features.STARTS:
        name = features.of_model(model, smoke).network
        start = runs.model(model).task(smoke, split, 0, torch.device("cpu")).networks[name]
        found = features.untrained(model, smoke, split)
        pairs = zip(start.parameters(), found.parameters(), strict=True)
        assert all((a == b).all() for a, b in pairs)
    critic = features.untrained("winn3d", smoke, split)
    inside = data.model_grid(split.voxels[~split.validation], smoke.data.side)
    assert critic.mean.item() == pytest.approx(inside.mean(), rel=1e-6)


def test_stored_networks(workspace, smoke, smoke_chair):
    feature = features.of_model("gan3d", smoke)
    assert not features.is_stored(smoke_chair, feature)  # its discriminator is not published
    assert features.is_stored(runs.Run("smoke", "gan3d", "all", 0), feature)
    chairs = runs.Run("smoke", "beyond", "chair", 0)
    assert features.is_stored(chairs, features.of_model("beyond", smoke))
    # 3DWINN samples with all of its critics: they are published for one category too.
    assert features.is_stored(
        runs.Run("smoke", "winn3d", "chair", 0), features.of_model("winn3d", smoke)
    )
    with pytest.raises(StudyError, match="smoke-winn3d-chair-s7 has no weights here"):
        features.load_network(runs.Run("smoke", "winn3d", "chair", 7), smoke, "cascade_2")
    assert features.of_model("judge", smoke) is None


def test_every_model_with_features_is_imported_for_the_pipeline(smoke):
    named = {m for m in runs.MODELS if features.of_model(m, smoke)}
    assert named == set(features.STARTS)
    assert all(f"lib.train.{m}" == module.__name__ for m, module in features.STARTS.items())


def test_the_last_critic_of_3dwinn_is_taken():
    for name in ("smoke", "study"):
        profile = config.load(name)
        taken = features.of_model("winn3d", profile).network
        assert taken == list(runs.model("winn3d").build(profile))[-1]


# ---------------------------------------------------------------- controls


def test_flat_voxels_lose_nothing_but_the_margin(workspace, smoke):
    voxels = data.load_train(smoke.data).voxels[:20]
    flat = features.flat_voxels(voxels)
    assert flat.shape == (20, 24**3) and flat.dtype == np.float32
    both = voxels.reshape(20, -1).astype(np.float32)
    np.testing.assert_array_equal(flat @ flat.T, both @ both.T)


def test_principal_components_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    generator = np.random.default_rng(0)
    train, test = (generator.normal(size=(n, 50)).astype(np.float32) for n in (30, 8))
    a, b = features.principal_components(train, test, 6)
    reference = PCA(6, svd_solver="full").fit(train)
    for found, x in ((a, train), (b, test)):
        expected = reference.transform(x)
        signs = np.sign((a * reference.transform(train)).sum(0))
        np.testing.assert_allclose(found * signs, expected, atol=1e-3)
    # 30 shapes have 29 directions about their mean.
    assert features.principal_components(train, test, 100)[0].shape == (30, 29)
