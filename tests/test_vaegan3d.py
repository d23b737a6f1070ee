"""3D-VAE-GAN: the printed network, the order of the updates, what enters which, no collapse."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from lib import config, data, losses, paths, render, samplers, single_image, voxel
from lib.models import gan3d, vaegan3d
from lib.train import encoder_decoder, runs
from lib.train import vaegan3d as train_vaegan3d
from lib.train.checkpoint import n_parameters

CPU = torch.device("cpu")
MODELS = ("vaegan3d", "encoder_decoder")

pytestmark = pytest.mark.usefixtures("workspace")


def weights(network):
    return {name: t.clone() for name, t in network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def task_of(smoke, model, category="chair", **changes):
    profile = config.with_changes(smoke, **{model: changes})
    split = data.load_train(profile.data).category(category)
    return runs.model(model).task(profile, split, 0, CPU)


# ---------------------------------------------------------------- the networks


def test_the_printed_encoder():
    encoder = vaegan3d.Encoder(z_dim=200)
    convolutions = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 128, 256, 512, 400]
    assert [m.kernel_size[0] for m in convolutions] == [11, 5, 5, 5, 8]
    assert [m.stride[0] for m in convolutions] == [4, 2, 2, 2, 1]
    sides, x = [], torch.zeros(1, 3, 256, 256)
    with torch.no_grad():
        for layer in encoder.eval().layers:
            x = layer(x)
            if isinstance(layer, torch.nn.Conv2d):
                sides.append(x.shape[-1])
    assert sides == [64, 32, 16, 8, 1]
    # Kernels 23232 + 204800 + 819200 + 3276800 + 13107200, 400 shifts, two per norm of 960.
    assert n_parameters(encoder) == 17_431_232 + 400 + 2 * 960 == 17_433_552


def test_smaller_images_end_in_a_smaller_kernel():
    for side in (32, 64):
        encoder = vaegan3d.Encoder(z_dim=5, side=side, channels=(4, 4, 4, 4)).eval()
        mean, log_variance = encoder(torch.rand(2, 3, side, side))
        assert mean.shape == log_variance.shape == (2, 5)


def test_the_log_variance_is_bounded():
    encoder = vaegan3d.Encoder(z_dim=3, side=32, channels=(4, 4, 4, 4)).eval()
    torch.nn.init.constant_(encoder.layers[-1].bias, 1e4)
    assert (encoder(torch.rand(1, 3, 32, 32))[1] == vaegan3d.LOG_VARIANCE).all()


def test_kl_is_that_of_torch():
    mean, log_variance = torch.randn(7, 5), torch.randn(7, 5)
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    p = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    wanted = torch.distributions.kl_divergence(q, p)
    assert torch.allclose(losses.gaussian_divergence(mean, log_variance), wanted, atol=1e-6)


def test_codes_have_the_stated_mean_and_variance():
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    mean, logvar = torch.full_like(noise, 2.0), torch.full_like(noise, math.log(9))
    z = samplers.reparameterise(mean, logvar, noise)
    assert z.mean().item() == pytest.approx(2, abs=0.05)
    assert z.var().item() == pytest.approx(9, rel=0.02)


def test_reconstruction_errors_by_hand():
    logits = torch.randn(3, 1, 4, 4, 4)
    x = (torch.rand(3, 1, 4, 4, 4) > 0.5).float()
    p = torch.sigmoid(logits).double().numpy()
    square = (p - x.double().numpy()) ** 2
    wanted = {
        "sse": square.sum((1, 2, 3, 4)),
        "mse": square.mean((1, 2, 3, 4)),
        "l2norm": np.sqrt(square.sum((1, 2, 3, 4))),
        "bce_sum": -np.log(np.where(x > 0.5, p, 1 - p)).sum((1, 2, 3, 4)),
    }
    for form, value in wanted.items():
        found = vaegan3d.reconstruction_error(logits, x, form).numpy()
        assert found == pytest.approx(value, rel=1e-5), form


# ---------------------------------------------------------------- pictures and shapes


def test_a_batch_pairs_training_shapes_with_their_own_views_only(smoke, monkeypatch):
    split = data.load_train(smoke.data)
    drawn, draw = [], render.views

    def spy(grids, names, *rest):
        drawn.extend(zip(grids, names, strict=True))
        return draw(grids, names, *rest)

    monkeypatch.setattr(render, "views", spy)
    views = train_vaegan3d.Views(split, grid=24, n=3, picture=32, where=CPU)
    grids = {int(i): g for i, g in zip(split.ids, data.model_grid(split.voxels, 24), strict=True)}
    seen = set()
    for step in range(30):
        drawn.clear()
        pictures, shapes = views.batch(step, 8, 0)
        assert pictures.shape == (8, 3, 32, 32) and shapes.shape == (8, 1, 24, 24, 24)
        for (grid, (kind, shape, view)), x in zip(drawn, shapes, strict=True):
            assert kind == "training" and view in range(3)
            assert (grid == grids[shape]).all() and (x[0].numpy() == grids[shape]).all()
            seen.add(shape)
    assert seen == set(split.ids[~split.validation].tolist())
    drawn.clear()
    views.validation(100)
    names = [name for _, name in drawn]
    assert set(names) == {("validation", int(i)) for i in split.ids[split.validation]}


def test_views_of_a_shape_differ_and_repeat(smoke):
    split = data.load_train(smoke.data).category("chair")
    views = train_vaegan3d.Views(split, grid=24, n=2, picture=32, where=CPU)
    again = train_vaegan3d.Views(split, grid=24, n=2, picture=32, where=CPU)
    for a, b in zip(views.batch(3, 8, 0), again.batch(3, 8, 0), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(views.batch(3, 8, 0)[0], views.batch(4, 8, 0)[0])


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("model", MODELS)
def test_steps_teach_every_network_and_log_finite_numbers(smoke, model):
    task = task_of(smoke, model, steps=4)
    before = {name: weights(network) for name, network in task.networks.items()}
    for step in range(4):
        logged = task.step(step)
        assert all(math.isfinite(v) for v in logged.values())
    found = task.monitor(4)
    assert 0 <= found["iou_validation"] <= 1
    for name, network in task.networks.items():
        assert not same(before[name], weights(network)), name
    assert ("kl" in logged) == ("kl_validation" in found) == (model == "vaegan3d")


@pytest.mark.parametrize("model", MODELS)
def test_stopped_after_every_step_a_run_ends_with_the_same_bytes(
    smoke, model, checkpoints, tmp_path, monkeypatch
):
    run = runs.Run("smoke", model, "chair", 0)
    whole = content(runs.train(run, smoke, progress=False))
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path / "again")
    torch.manual_seed(123)
    calls = 1
    while (found := runs.train(run, smoke, progress=False, deadline=-math.inf)) is None:
        calls += 1
    assert calls == getattr(smoke, model).steps
    assert content(found) == whole


def test_the_three_updates_come_in_order_and_change_one_network_each(smoke, monkeypatch):
    task = task_of(smoke, "vaegan3d")
    order = []
    for name, optimizer in task.optimizers.items():

        def step(closure=None, name=name, before=optimizer.step):
            others = {n: weights(m) for n, m in task.networks.items() if n != name}
            own = [p.detach().clone() for p in task.networks[name].parameters()]
            before()
            order.append(name)
            now = {n: weights(m) for n, m in task.networks.items() if n != name}
            assert all(same(others[n], now[n]) for n in others)
            assert any(
                not torch.equal(a, b)
                for a, b in zip(own, task.networks[name].parameters(), strict=True)
            )

        monkeypatch.setattr(optimizer, "step", step)
    task.step(0)
    assert order == ["discriminator", "encoder", "generator"]


def gradients(task, name):
    return torch.cat([p.grad.flatten() for p in task.networks[name].parameters()])


def test_the_encoder_descends_the_stated_sum(smoke):
    """Its gradient is weight_kl KL + weight_recon error, by finite weights of either alone."""

    def gradient(**changes):
        task = task_of(smoke, "vaegan3d", **changes)
        y, x = task.views.batch(0, 8, 0)
        noise = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
        code = task._encode(y, noise)
        task._update_encoder(code, task._answers(task._latents(0), code[-1])[1], x)
        return gradients(task, "encoder")

    both = gradient(weight_kl=3.0, weight_recon=0.5)
    kl = gradient(weight_kl=1.0, weight_recon=1e-12)
    error = gradient(weight_kl=0.0, weight_recon=1.0)
    assert kl.abs().max() > 0 and error.abs().max() > 0
    assert torch.allclose(both, 3 * kl + 0.5 * error, rtol=1e-3, atol=1e-4 * both.abs().max())
    summed = gradient(weight_kl=1.0, weight_recon=1e-12, kl="sum")
    assert torch.allclose(summed, 16 * kl, rtol=1e-3, atol=1e-4 * summed.abs().max())


def test_the_generator_sees_the_error_but_not_the_kl(smoke):
    def gradient(**changes):
        task = task_of(smoke, "vaegan3d", **changes)
        y, x = task.views.batch(0, 8, 0)
        noise = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
        task._update_generator(y, x, task._latents(0), noise)
        assert task.networks["discriminator"].head.weight.grad is None
        assert task.networks["encoder"].layers[0].weight.grad is None
        return gradients(task, "generator")

    assert torch.equal(gradient(weight_kl=0.0), gradient(weight_kl=9.0))
    assert not torch.allclose(gradient(weight_recon=1e-6), gradient(weight_recon=1.0))
    assert not torch.allclose(gradient(saturating=True), gradient(saturating=False))


def test_the_generator_is_normalised_in_evaluation_as_in_training(smoke):
    """Its running variance is that of z and codes together, which is what training divides by.

    The codes are shifted, and the first layer adds them up, so that each half alone varies far less
    than the mixture. The rates are 0 and the batch stays: only the statistics move.
    """
    task = task_of(smoke, "vaegan3d", batch=16)
    for optimizer in task.optimizers.values():
        optimizer.param_groups[0]["lr"] = 0.0
    first, norm = task.networks["generator"].layers[:2]
    with torch.no_grad():
        task.networks["encoder"].layers[-1].bias[:16] = 4.0
        first.weight.fill_(0.1)
    y, x = task.views.batch(0, 16, 0)
    task.views.batch = lambda *_: (y, x)
    for step in range(25):
        task.step(step)
    z, noise = task._latents(25), torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = first(torch.cat([z, task._encode(y, noise)[-1]])[:, :, None, None, None])
    ratio = norm.running_var / together.transpose(0, 1).flatten(1).var(1)
    assert ratio.mean().item() == pytest.approx(1, abs=0.15)


def test_every_batch_of_the_generator_holds_z_and_codes(smoke):
    task, seen = task_of(smoke, "vaegan3d"), []
    hook = task.networks["generator"].register_forward_hook(lambda _, z, out: seen.append(z[0]))
    task.step(0)
    hook.remove()
    assert [len(z) for z in seen] == [16, 16]
    assert all(torch.equal(z[:8], task._latents(0)) for z in seen)
    assert not torch.equal(seen[0][8:], seen[1][8:])  # the encoder has learned between


def test_the_prior_of_training_is_that_of_sampling(smoke):
    task = task_of(smoke, "vaegan3d", batch=512)
    z = task._latents(0)
    assert z.mean().item() == pytest.approx(0, abs=0.05)
    assert z.std().item() == pytest.approx(1, abs=0.05)
    networks = runs.model("vaegan3d").build(smoke)
    draw = runs.model("vaegan3d").sample
    shapes = draw(smoke, networks, [0, 1, 2])
    assert shapes.shape == (3, 24, 24, 24)
    assert np.abs(shapes[1] - draw(smoke, networks, [1])[0]).max() < 1e-6
    assert runs.model("encoder_decoder").sample is None


def test_the_posterior_of_a_profile_does_not_collapse_on_twenty_shapes(smoke, monkeypatch):
    """The section of quick as it is buys nats: more than 1, and shapes nearer than the mean shape.

    Both are cut so that they fill as much as the shapes do: without a bias the generator holds its
    probabilities at .5 inside an object for long.
    """
    section = dataclasses.replace(config.load("quick").vaegan3d, batch=20)
    split = data.load_train(smoke.data).category("chair")
    task = train_vaegan3d.Vaegan3dTask(section, split, smoke.data.side, 0, CPU)
    y, x = task.views.batch(0, 20, 0)
    monkeypatch.setattr(task.views, "batch", lambda *_: (y, x))
    for step in range(80):
        logged = task.step(step)
    middle = x.mean(0)[0]
    found = train_vaegan3d.describe(task.networks, y, x, middle)
    with torch.no_grad():
        code = task.networks["encoder"].eval()(y)[0]
        back = task.networks["generator"].eval().voxels(code)
    overlaps = [
        voxel.mean_iou((p > np.quantile(p, 1 - x.mean())).numpy(), (x > 0.5).numpy())
        for p in (back, middle.expand(x.shape))
    ]
    assert found["kl_validation"] > 1 and logged["kl"] > 1
    assert found["active_units"] >= 2
    assert found["explained"] > 0.05
    assert overlaps[0] > overlaps[1]


def test_describe_by_hand():
    class Fixed(torch.nn.Module):
        def forward(self, y):
            mean = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
            return mean, torch.zeros(2, 2)

    class Full(torch.nn.Module):
        def forward(self, z):
            return self.voxels(z)

        def voxels(self, z):
            return torch.ones(len(z), 1, 2, 2, 2)

    x = torch.zeros(2, 1, 2, 2, 2)
    x[0] = 1
    x[1, 0, 0, 0, 0] = 1
    networks = {"encoder": Fixed(), "generator": Full()}
    found = train_vaegan3d.describe(networks, torch.zeros(2, 3, 4, 4), x, x.mean(0)[0])
    assert found == {
        "kl_validation": 0.5,
        "active_units": 1.0,
        "iou_validation": (1 + 1 / 8) / 2,
        "explained": pytest.approx(1 - 7 / (7 * 2 * 0.25)),
    }


@pytest.mark.parametrize("model", MODELS)
def test_runs_are_trained_stored_and_look_at_pictures(smoke, model, checkpoints, tmp_path):
    run = runs.Run("smoke", model, "chair", 0)
    final = runs.train(run, smoke, progress=False)
    networks = runs.load_networks(run, smoke, final)
    assert {"encoder", "generator"} <= set(networks)
    pictures = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    shapes = single_image.reconstruct(networks, pictures)
    assert shapes.shape == (3, 24, 24, 24) and 0 <= shapes.min() and shapes.max() <= 1
    assert (final / "samples-0.5.npz").is_file() == (model == "vaegan3d")


def test_the_comparison_has_the_same_networks(smoke):
    ours = train_vaegan3d._build(config.load("study"))
    plain = encoder_decoder._build(config.load("study"))
    for name in ("encoder", "generator"):
        shapes = [{k: v.shape for k, v in n[name].state_dict().items()} for n in (ours, plain)]
        assert shapes[0] == shapes[1]
    assert isinstance(ours["discriminator"], gan3d.Discriminator)
