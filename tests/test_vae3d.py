"""3D-VAE and the autoencoder: closed forms, the bound term by term, no collapse."""

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

from lib import config, data, files, losses, paths, rng, samplers, voxel
from lib.models import gan3d, vae3d
from lib.train import autoencoder, engine, runs
from lib.train import vae3d as train_vae3d
from lib.train.checkpoint import load_weights, n_parameters, save_weights

MODELS = ("vae3d", "autoencoder")
CPU = torch.device("cpu")
N_CHAIRS = 22  # in the training part of smoke


def normal(*shape, name="x"):
    return torch.randn(*shape, generator=rng.torch_generator("test", "vae", name))


def task_of(smoke, model, n=None, **changes):
    profile = config.with_changes(smoke, **{model: changes})
    chairs = data.load_train(profile.data).category("chair")
    return runs.model(model).task(profile, chairs.where(np.arange(len(chairs.labels)) < n), 0, CPU)


def all_of(smoke, model, **changes):
    return task_of(smoke, model, 10**6, **changes)


# ---------------------------------------------------------------- closed forms


def test_divergence_is_that_of_torch():
    mean, logvar = normal(5, 7), 2 * normal(5, 7, name="logvar")
    prior = Normal(torch.zeros(5, 7), torch.ones(5, 7))
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), prior).sum(1)
    torch.testing.assert_close(losses.gaussian_divergence(mean, logvar).sum(1), expected)
    assert not losses.gaussian_divergence(torch.zeros(2, 3), torch.zeros(2, 3)).any()


def test_reconstruction_is_the_likelihood_of_bernoulli_voxels():
    logits = 3 * normal(4, 1, 6, 6, 6)
    x = (normal(4, 1, 6, 6, 6, name="grids") > 0).float()
    expected = -Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3, 4)).mean()
    torch.testing.assert_close(losses.voxel_cross_entropy(logits, x), expected)


def test_draws_of_the_posterior_have_its_moments():
    mean, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, -3.0]])
    z = samplers.reparameterise(mean, logvar, normal(40000, 2))
    torch.testing.assert_close(z.mean(0), mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z.var(0), logvar[0].exp(), atol=0.02, rtol=0)


@pytest.mark.parametrize("n", [6, 400])
def test_the_gaussian_is_that_of_numpy(n):
    """With fewer shapes than dimensions too."""
    codes = normal(n, 12, name="codes") @ normal(12, 12, name="mix") + 3
    gaussian = vae3d.CodeGaussian(z_dim=12)
    gaussian.fit(codes)
    covariance = np.cov(codes.numpy().T, ddof=0)
    np.testing.assert_allclose(gaussian.mean, codes.numpy().mean(0), atol=1e-5)
    np.testing.assert_allclose(gaussian.root @ gaussian.root, covariance, atol=1e-4)
    np.testing.assert_allclose(gaussian.root, gaussian.root.T, atol=1e-6)
    drawn = gaussian(normal(200000, 12, name="noise")).numpy()
    scale = np.abs(covariance).max()
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.02 * scale)


def test_the_gaussian_stays_one_when_it_is_stored(tmp_path):
    gaussian, again = vae3d.CodeGaussian(z_dim=12), vae3d.CodeGaussian(z_dim=12)
    gaussian.fit(normal(50, 12) * 20)
    save_weights(tmp_path / "w", gaussian)
    load_weights(tmp_path / "w", again)
    MultivariateNormal(again.mean, again.root @ again.root.T)  # refuses what is no covariance
    torch.testing.assert_close(again.root, gaussian.root, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("profile", ["smoke", "quick", "lite", "study"])
def test_codes_and_shapes_fit_each_other(profile):
    settings = config.load(profile)
    side = settings.data.side
    x = torch.rand(2, 1, side, side, side, generator=rng.torch_generator("test", profile))
    for model in MODELS:
        section = getattr(settings, model)
        networks = runs.model(model).build(settings)
        encoder, decoder = networks["encoder"].eval(), networks["decoder"].eval()
        with torch.no_grad():
            mean, logvar = encoder(x)
            assert mean.shape == (2, section.z_dim) and decoder(mean).shape == x.shape
            assert torch.equal(encoder.codes(x), mean)
        assert (logvar is None) == (model == "autoencoder")
        assert logvar is None or logvar.shape == mean.shape


@pytest.mark.parametrize("profile", ["lite", "study"])
def test_weights_are_small_enough_to_travel(profile):
    """Kernels in half precision; 3D-GAN's generator alone has 14.5 MB."""
    for model in MODELS:
        networks = runs.model(model).build(config.load(profile))
        size = 2 * sum(n_parameters(networks[name]) for name in ("encoder", "decoder"))
        assert size < 4e6, (model, size)


def test_the_log_variance_is_bounded():
    encoder = vae3d.Encoder(z_dim=4, base=3, channels=(4, 4, 4), variational=True)
    gan3d.initialise(encoder, 50.0, rng.torch_generator("wild"))
    mean, logvar = encoder(torch.rand(8, 1, 24, 24, 24, generator=rng.torch_generator("w")) * 9)
    assert logvar.abs().max() == vae3d.LOGVAR and mean.abs().max() > 2 * vae3d.LOGVAR


def test_the_decoder_starts_from_the_mean_shape(workspace, smoke):
    task = all_of(smoke, "vae3d")
    decoder, n = task.networks["decoder"], len(task.voxels)
    expected = (n * task.voxels.mean(0) + 0.5) / (n + 1)
    np.testing.assert_allclose(torch.sigmoid(decoder.bias[0, 0]).detach(), expected, atol=1e-6)
    plain = gan3d.Generator(z_dim=16, base=3, channels=(16, 8, 8)).eval()
    plain.load_state_dict({k: v for k, v in decoder.state_dict().items() if k != "bias"})
    z = normal(2, 16)
    torch.testing.assert_close(decoder.eval()(z), plain(z) + decoder.bias)


# ---------------------------------------------------------------- training


def test_the_loss_is_the_bound_term_by_term(workspace, smoke):
    """-ELBO of Kingma and Welling, Eq. 3 with one draw, from torch's own distributions."""
    task = all_of(smoke, "vae3d", beta=1.0)
    x = torch.from_numpy(task.voxels[:8, None]).float()
    loss, terms = task.objective(x, 3)
    q = Normal(*(f(t) for f, t in zip((lambda m: m, lambda v: (v / 2).exp()),
                                      task.networks["encoder"](x), strict=True)))  # fmt: skip
    noise = torch.randn(q.mean.shape, generator=rng.torch_generator(0, "vae3d", "noise", 3))
    logits = task.networks["decoder"](q.mean + q.stddev * noise)
    likelihood = Bernoulli(logits=logits).log_prob(x).sum() / 8
    prior = Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean))
    kl = kl_divergence(q, prior).sum() / 8
    torch.testing.assert_close(loss, kl - likelihood)
    assert terms["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert terms["reconstruction"] == pytest.approx(-likelihood.item(), rel=1e-5)
    heavy = all_of(smoke, "vae3d", beta=4.0).objective(x, 3)[0]
    torch.testing.assert_close(heavy, 4 * kl - likelihood)


def test_the_autoencoder_pays_for_reconstruction_alone(workspace, smoke):
    task = all_of(smoke, "autoencoder")
    x = torch.from_numpy(task.voxels[:8, None]).float()
    loss, terms = task.objective(x, 0)
    logits = task.networks["decoder"](task.networks["encoder"].codes(x))
    expected = -Bernoulli(logits=logits).log_prob(x).sum() / 8
    torch.testing.assert_close(loss, expected)
    assert list(terms) == ["reconstruction"]


@pytest.mark.parametrize("model", MODELS)
def test_training_sees_no_validation_shape(workspace, smoke, model):
    task = all_of(smoke, model)
    chairs = data.load_train(smoke.data).category("chair")
    grids = data.model_grid(chairs.voxels, smoke.data.side)
    np.testing.assert_array_equal(task.voxels, grids[~chairs.validation])
    held_out = {g.tobytes() for g in grids[chairs.validation]}
    assert {g.tobytes() for g in task.watched["iou_validation"]} <= held_out and held_out


@pytest.mark.parametrize("model", MODELS)
def test_a_short_run_learns_more_than_the_mean_shape(workspace, smoke, model):
    """About twenty shapes, 100 steps: the posterior has not collapsed, codes say which shape."""
    changes = {"z_dim": 16, "decoder_channels": [32, 16, 8], "encoder_channels": [8, 16, 32]}
    task = all_of(smoke, model, lr=0.003, batch=8, steps=100, **changes)
    logged = [task.step(step) for step in range(100)][-1]
    found = task.monitor(100)
    assert found["iou_train"] > found["iou_mean_shape"] + 0.1 and not found["warning"]
    if model == "vae3d":
        assert logged["kl"] > 1 and found["active_units"] >= 2


def test_a_posterior_that_collapses_is_said(workspace, smoke):
    task = all_of(smoke, "vae3d")
    torch.nn.init.zeros_(task.networks["encoder"].head.weight)
    found = task.monitor(1)
    assert found["active_units"] == 0 and "the posterior collapsed" in found["warning"]
    assert "no nearer than the mean shape" in found["warning"]


def test_the_mean_shape_is_cut_where_it_fits_best(workspace, smoke):
    grids = all_of(smoke, "vae3d").voxels

    def overlap(shape):
        return np.mean([voxel.intersection_over_union(shape, g) for g in grids])

    best = overlap(autoencoder.mean_shape(grids))
    assert best == pytest.approx(max(overlap(grids.mean(0) > t / 10) for t in range(1, 10)))


def test_reconstruction_iou_by_hand(workspace, smoke):
    task = all_of(smoke, "vae3d")
    x, networks = task.voxels[:5], task.networks
    for network in networks.values():
        network.eval()
    with torch.no_grad():
        codes = networks["encoder"](torch.from_numpy(x[:, None]).float())[0]
        again = torch.sigmoid(networks["decoder"](codes))[:, 0].numpy() > 0.5
    both, either = (again & x).sum((1, 2, 3)), (again | x).sum((1, 2, 3))
    assert autoencoder.reconstruction_iou(networks, x) == pytest.approx((both / either).mean())


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module", params=MODELS)
def complete(request, workspace, smoke, tmp_path_factory):
    """A smoke run of each model, published in a place of this file."""
    folder = tmp_path_factory.mktemp("vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "WORKSPACE", folder)
        patch.setattr(paths, "CHECKPOINTS", folder / ".ckpt")
        run = runs.Run("smoke", request.param, "chair", 0)
        final = runs.train(run, smoke, progress=False)
        runs.publish(run, final)
        yield run, final


def test_samples_come_from_the_stored_weights(complete, smoke):
    run, _ = complete
    networks = runs.load_networks(run, smoke, run.weights)
    assert set(networks) == set(runs.model(run.model).sampling) >= {"encoder", "decoder"}
    probabilities = runs.sample(run, smoke, networks, list(range(16)))
    for threshold in (0.5, 0.1):
        stored = files.load_npz(run.samples / f"samples-{threshold:g}.npz")["voxels"]
        np.testing.assert_array_equal(voxel.pack(probabilities > threshold), stored)
    alone = runs.sample(run, smoke, networks, [7])
    np.testing.assert_allclose(alone[0], probabilities[7], atol=1e-6)
    assert (probabilities[7] != probabilities[8]).any()


def test_samples_are_decoded_from_the_prior_or_from_the_gaussian_of_the_codes(complete, smoke):
    run, _ = complete
    networks = runs.load_networks(run, smoke, run.weights)
    z = rng.latents([3], smoke.vae3d.z_dim, "normal")
    if run.model == "autoencoder":
        check_gaussian(networks, smoke)
        z = networks["gaussian"](z)
    expected = autoencoder.decode(networks["decoder"], z)
    np.testing.assert_array_equal(runs.sample(run, smoke, networks, [3]), expected)


def check_gaussian(networks, smoke):
    """Mean and covariance of the codes of all training shapes, as far as half precision goes."""
    chairs = data.load_train(smoke.data).category("chair")
    grids = data.model_grid(chairs.voxels[~chairs.validation], smoke.data.side)
    codes = autoencoder.encode(networks["encoder"], grids).numpy()
    covariance, root = np.cov(codes.T, ddof=0), networks["gaussian"].root.numpy()
    scale = np.abs(covariance).max()
    np.testing.assert_allclose(root @ root, covariance, atol=0.02 * scale)  # half precision
    np.testing.assert_allclose(networks["gaussian"].mean, codes.mean(0), atol=0.02 * scale**0.5)


@pytest.mark.parametrize("model", MODELS)
def test_stopped_and_resumed_it_ends_with_the_same_bytes(workspace, smoke, tmp_path, model):
    tasks = [all_of(smoke, model) for _ in range(3)]
    assert engine.fit(tasks[0], tmp_path / "whole", name="whole", progress=False)
    assert not engine.fit(tasks[1], tmp_path / "cut", name="cut", progress=False, deadline=0)
    assert engine.fit(tasks[2], tmp_path / "cut", name="cut", progress=False)
    for name, network in tasks[0].networks.items():
        again = tasks[2].networks[name].state_dict()
        assert all(torch.equal(t, again[n]) for n, t in network.state_dict().items()), name
    assert (tmp_path / "whole/log.csv").read_text() == (tmp_path / "cut/log.csv").read_text()


def test_active_units_are_counted_over_shapes(workspace, smoke, monkeypatch):
    task = all_of(smoke, "vae3d")
    half = torch.zeros(N_CHAIRS, 16)
    half[::2, :3] = torch.tensor([0.19, 0.21, 5.0])  # variances .009, .011 and 6.25
    monkeypatch.setattr(train_vae3d.autoencoder, "encode", lambda _, grids: half[: len(grids)])
    assert len(task.watched["iou_train"]) == N_CHAIRS
    assert task.monitor(1)["active_units"] == 2
