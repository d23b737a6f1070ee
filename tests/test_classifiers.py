"""Classifiers of table 5: networks, views, losses, synthesis, training, and how they are asked."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch.nn.functional import cross_entropy

from lib import (
    classify,
    cli,
    config,
    data,
    evaluate,
    heldout,
    metrics,
    paths,
    report,
    rng,
    supervised,
    voxel,
)
from lib.errors import StudyError
from lib.models import classifiers, voxnet, winn3d
from lib.train import checkpoint, introspective, runs, tuned
from lib.train import classifiers as training
from lib.train.checkpoint import n_parameters

CPU = torch.device("cpu")
SMALL = dict(side=24, channels=(4, 4, 8, 8))
MODELS = config.CLASSIFIERS


def network_of(**options):
    network = classifiers.Winn3dClassifier(**SMALL | options)
    classifiers.initialise(network, 0.3, rng.torch_generator("test", "classifier"))
    return network


def voxels_of(n, side=24, *name):
    return torch.rand(n, 1, side, side, side, generator=rng.torch_generator("test", *name))


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    "build, n",
    [
        (lambda: classifiers.Winn3dClassifier(side=32), 1_196_458 + 992),
        (lambda: classifiers.Winn3dClassifier(side=32, value="linear"), 1_196_458 + 992 + 11),
        (lambda: voxnet.VoxNet(side=32), 917_866),
        (lambda: voxnet.Orion(side=32), 917_866 + 2 * 2 * 32 + 129 * 35),
    ],
)
def test_parameter_counts(build, n):
    assert n_parameters(build()) == n


def test_the_networks_are_those_of_the_tables():
    assert voxnet.VoxNet(side=32).convolutions[10].in_features == 6912
    ours, critic = classifiers.Winn3dClassifier(side=32), winn3d.Critic(side=32)
    assert ours.head.in_features == critic.head.in_features == 2048
    assert sum(voxnet.QUARTERS) == 35


def test_the_critic_reads_the_logits():
    logits = torch.randn(5, 10, generator=rng.torch_generator("test", "logits"))
    linear = network_of(value="linear")
    torch.testing.assert_close(linear.value_of(logits), linear.value(logits)[:, 0])
    torch.testing.assert_close(network_of().value_of(logits), logits.exp().sum(1).log())
    x = voxels_of(3)
    torch.testing.assert_close(linear.critic(x), linear.value_of(linear(x)))
    torch.testing.assert_close(linear.energy(x), -linear.critic(x))


def test_the_mean_is_subtracted_inside():
    network, x = network_of(), voxels_of(2)
    before = network(x)
    network.mean.fill_(0.25)
    torch.testing.assert_close(network(x + 0.25), before, atol=1e-4, rtol=1e-4)


def test_a_shape_is_mirrored_to_the_side_where_it_fits_best():
    x = torch.zeros(2, 1, 6, 6, 6)
    x[0, 0, 1:5, 0:2] = 1  # symmetric in x alone
    x[1, 0, 0:2, 1:5] = 1  # symmetric in y alone
    x[0, 0, 1, 5, 0] = x[1, 0, 5, 1, 0] = 1
    out = classifiers.mirrored(x)
    torch.testing.assert_close(out[0], x[0].flip(1))
    torch.testing.assert_close(out[1], x[1].flip(2))
    torch.testing.assert_close(classifiers.mirrored(out), x)


def test_views_are_averaged_and_do_not_see_turns():
    network, x = network_of(), voxels_of(3)
    one = classifiers.Views(network)
    torch.testing.assert_close(one(x), network(x))
    four = classifiers.Views(network, votes=4)
    by_hand = sum(network(torch.rot90(x, k, (2, 3))) for k in range(4)) / 4
    torch.testing.assert_close(four(x), by_hand)
    torch.testing.assert_close(four(torch.rot90(x, 1, (2, 3))), four(x), atol=1e-5, rtol=1e-4)
    both = classifiers.Views(network, mirror=True)
    torch.testing.assert_close(both(x), (network(x) + network(classifiers.mirrored(x))) / 2)
    assert four.side == 24


def test_poses_are_what_can_be_told_apart():
    labels = torch.arange(10).repeat_interleave(4)
    found = voxnet.poses(labels, torch.arange(4).repeat(10)).view(10, 4)
    assert found.unique().tolist() == list(range(35))
    assert len(found[0].unique()) == 2 and found[0, 0] == found[0, 2]
    assert len(found[8].unique()) == 1
    assert all(len(found[k].unique()) == 4 for k in (1, 2, 9))


# ---------------------------------------------------------------- losses and synthesis


def settings_of(smoke, name="introspective", **changes):
    return getattr(config.with_changes(smoke, **{name: changes}), name)


def test_equation_3_with_the_penalty_in_and_out_of_alpha(smoke):
    parts = (torch.tensor(2.0), torch.tensor(-3.0), torch.tensor(0.5))
    inside = settings_of(smoke, alpha=0.1, penalty=10.0)
    assert introspective.classification_loss(*parts, inside).item() == pytest.approx(2.2)
    outside = settings_of(smoke, alpha=0.1, penalty=10.0, penalty_in_alpha=False)
    assert introspective.classification_loss(*parts, outside).item() == pytest.approx(6.7)


def test_synthesis_is_adam_on_the_stated_loss(smoke):
    settings = settings_of(smoke, max_steps=4, clip=True, sampler_lr=0.05, label_weight=0.5)
    # In double: Adam divides by a gradient's own size, which rounding decides where it is nearly 0.
    network, labels = network_of(value="linear").eval().double(), torch.tensor([2, 7])
    x, threshold = voxels_of(2).double(), 50.0
    found, taken = introspective.synthesise(network, x, labels, threshold, settings)
    y = x.clone().requires_grad_()
    adam = torch.optim.Adam([y], 0.05, (0.0, 0.9), eps=settings.sampler_epsilon)
    for _ in range(4):
        adam.zero_grad()
        logits = network(y)
        gap = (network.value_of(logits) - threshold).abs()
        (gap.sum() + 0.5 * cross_entropy(logits, labels, reduction="sum")).backward()
        adam.step()
        y.data.clamp_(0, 1)
    torch.testing.assert_close(found, y.detach(), atol=1e-4, rtol=1e-3)
    assert taken.tolist() == [4, 4] and 0 <= found.min() and found.max() <= 1


def test_shapes_rest_at_their_threshold_and_others_go_on(smoke):
    network, x, labels = network_of(value="linear").eval(), voxels_of(3), torch.arange(3)
    f = network.critic(x).detach()
    settings = settings_of(smoke, max_steps=3, sampler_lr=1e-4, label_weight=0.0)
    found, taken = introspective.synthesise(network, x, labels, f[1].item(), settings)
    assert taken[1] == 0 and torch.equal(found[1], x[1])
    assert not torch.equal(found[0], x[0])
    nearer = (network.critic(found) - f[1]).abs() < (f - f[1]).abs()
    assert nearer[0] and nearer[2]


def test_a_shape_that_passed_its_threshold_rests(smoke):
    network, x = network_of(value="linear").eval(), voxels_of(1)
    threshold = network.critic(x).item() + 1e-2
    settings = settings_of(smoke, max_steps=200, sampler_lr=0.05, tolerance=1e-4)
    _, taken = introspective.synthesise(network, x, torch.tensor([0]), threshold, settings)
    assert 0 < taken.item() < 200


@pytest.fixture(scope="module")
def split(workspace, smoke):
    return data.load_train(smoke.data)


def task_of(smoke, split, model="introspective", **changes):
    changed = config.with_changes(smoke, **{model: changes})
    return runs.model(model).task(changed, split, 0, CPU)


def test_negatives_are_of_the_category_of_the_real_shape(smoke, split):
    task = task_of(smoke, split)
    task.buffers["pool"] = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1, 1) * torch.ones(
        10, 3, 24, 24, 24, dtype=torch.uint8
    )
    y = torch.tensor([3, 0, 9, 3])
    x = task._negatives(y, rng.torch_generator("test"))
    assert x.shape == (4, 1, 24, 24, 24)
    torch.testing.assert_close(x[:, 0, 0, 0, 0] * 255, y.float())


def test_the_pool_grows_and_later_cascades_start_where_the_last_ended(smoke, split):
    task = task_of(smoke, split, pool=2, new=1, epochs=3, cascades=3)
    assert task.buffers["pool"].shape[:2] == (10, 2)
    noise = task._starts(0)
    assert noise.min() == 0 and noise.max() == 1 and 0.3 < noise.mean() < 0.6
    added = torch.randint(0, 256, (10, 1, 24, 24, 24), dtype=torch.uint8)
    task.buffers["pool"] = torch.cat([task.buffers["pool"], added], 1)
    torch.testing.assert_close(task._starts(1), added.float() / 255)
    task.buffers["pool"] = torch.cat([task.buffers["pool"], 255 - added], 1)
    torch.testing.assert_close(task._starts(2), (255 - added).float() / 255)


def test_an_epoch_synthesises_once_a_category(smoke, split, monkeypatch):
    task = task_of(smoke, split, pool=2, new=1, sampler_batch=5)
    monkeypatch.setattr(task, "per_epoch", 2)
    assert "sampler_steps" not in task.step(0)
    assert len(task.buffers["f_real"]) == 1
    logged = task.step(1)
    assert {"sampler_steps", "capped", "occupancy", "likeness", "f_real", "penalty"} <= set(logged)
    assert task.buffers["pool"].shape[:2] == (10, 3) and len(task.buffers["f_real"]) == 0
    assert all(p.requires_grad for p in task.network.parameters())
    assert task.other_samples()["pseudo-negatives"].shape == (20, 24, 24, 24)


def test_shown_epochs():
    assert introspective.shown_epochs(3) == [0, 1, 2]
    assert introspective.shown_epochs(100)[-1] == 99 and len(introspective.shown_epochs(100)) == 8


# ---------------------------------------------------------------- training


def test_augmentation_is_exact_and_says_its_turns(smoke, split):
    x = torch.from_numpy(data.model_grid(split.voxels[:12], 32)[:, None]).float()
    changed = settings_of(config.load("lite"), "tuned", jitter=4, turns=True, mirror=False)
    out, quarters = training.augment(x, changed, rng.numpy_generator("test", "augment"))
    assert torch.equal(out.flatten(1).sum(1), x.flatten(1).sum(1))
    assert set(quarters.tolist()) == {0, 1, 2, 3}

    def cut(v):
        where = v.nonzero()
        low, high = where.min(0).values, where.max(0).values + 1
        return v[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]

    for before, after, q in zip(x[:, 0], out[:, 0], quarters.tolist(), strict=True):
        assert torch.equal(cut(torch.rot90(before, q, (0, 1))), cut(after))
    still = settings_of(config.load("lite"), "tuned", jitter=0, turns=False, mirror=False)
    assert torch.equal(training.augment(x, still, rng.numpy_generator("test"))[0], x)
    flips = settings_of(config.load("lite"), "tuned", jitter=0, mirror=True)
    out, _ = training.augment(x, flips, rng.numpy_generator("test"))
    image = classifiers.mirrored(x)
    kinds = [torch.equal(o, i) for o, i in zip(out, image, strict=True)]
    plain = [torch.equal(o, v) for o, v in zip(out, x, strict=True)]
    assert all(a or b for a, b in zip(kinds, plain, strict=True)) and not all(plain)


def test_squeezing_loses_no_wall_and_nothing_at_scale_1(split):
    x = torch.from_numpy(data.model_grid(split.voxels[:6], 32)[:, None]).float()
    assert torch.equal(tuned.squeezed(x, torch.ones(6, 3)), x)
    scales = torch.tensor([1.0, 0.5, 0.75]).expand(6, 3)
    out = tuned.squeezed(x, scales)
    assert set(out.unique().tolist()) == {0.0, 1.0}
    # Shape by shape and voxel by voxel, as the words say.
    expected = torch.zeros_like(x)
    for b, _, *at in x.nonzero().tolist():
        to = [round(15.5 + s * (k - 15.5)) for k, s in zip(at, scales[b].tolist(), strict=True)]
        expected[(b, 0, *to)] = 1
    assert torch.equal(out, expected)
    for axis, s in ((3, 0.5), (4, 0.75)):
        others = tuple(k for k in range(1, 5) if k != axis)
        before, after = (v.amax(others).sum(1) for v in (x, out))
        assert ((after - s * before).abs() <= 1).all()  # no gap: a wall of one voxel stays one


def test_each_shape_is_squeezed_by_its_step_alone(smoke, split, monkeypatch):
    task, seen = task_of(smoke, split, "tuned"), []
    x, y = task.tensor(task.voxels[:4]), torch.from_numpy(task.y[:4])
    monkeypatch.setattr(task.network, "forward", lambda v: seen.append(v) or torch.ones(4, 10))
    for step in (3, 3, 4):
        task.loss(x, y, torch.zeros(4, dtype=torch.long), step)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], x) and 0 < seen[0].sum() < x.sum()


def test_rates(smoke):
    cosine = settings_of(smoke, "baseline", lr=0.1, schedule="cosine", warmup=4)
    assert training.rate(cosine, 0, 100) == pytest.approx(0.025)
    assert training.rate(cosine, 50, 100) == pytest.approx(0.05)
    constant = settings_of(smoke, "baseline", lr=0.1, schedule="constant", warmup=0)
    assert training.rate(constant, 0, 10) == training.rate(constant, 9, 10) == 0.1


@pytest.mark.parametrize("model", MODELS)
def test_a_step_teaches_every_weight_from_training_shapes(smoke, split, model):
    task = task_of(smoke, split, model)
    assert len(task.y) == (~split.validation).sum() and len(task.y_val) == split.validation.sum()
    before = {n: p.clone() for n, p in task.network.named_parameters()}
    for step in range(2):
        assert all(math.isfinite(v) for v in task.step(step).values())
    # A Wasserstein distance is blind to a constant, so the critic's bias stays.
    still = {n for n, p in task.network.named_parameters() if torch.equal(p, before[n])}
    assert still == ({"value.bias"} if model == "introspective" else set())


def test_the_mean_of_the_weights_is_asked_and_kept(smoke, split):
    task = task_of(smoke, split, "baseline", average=0.9)
    kept = []
    for step in range(3):
        task.step(step)
        kept.append(task.network.head.weight.detach().clone())
    torch.testing.assert_close(task.buffers["average"]["head.weight"], sum(kept) / 3)
    task.monitor(3)
    torch.testing.assert_close(task.measured.head.weight, sum(kept) / 3)
    task.finish()
    torch.testing.assert_close(task.network.head.weight.detach(), sum(kept) / 3)


def test_the_lowest_validation_error_keeps_its_weights(smoke, split, monkeypatch):
    task = task_of(smoke, split, "baseline")
    found = iter([(0.5, 1.0), (0.2, 2.0), (0.2, 1.5), (0.2, 1.7), (0.3, 0.1)])
    monkeypatch.setattr(task, "_validate", lambda: next(found))
    for k in range(5):
        torch.nn.init.constant_(task.network.head.bias, k)
        task.buffers["average"]["head.bias"] = task.network.head.bias.detach().clone()
        task.monitor(k)
    task.finish()
    assert task.counters["best_step"] == 2 and (task.network.head.bias == 2).all()


def test_half_a_run_and_the_other_half_are_a_run(smoke, split, tmp_path):
    """Through a checkpoint in the middle of the second epoch, with another global seed."""
    changes = dict(batch=72, negatives=2, new=1, max_steps=2)
    whole = task_of(smoke, split, **changes)
    assert (whole.per_epoch, whole.n_steps) == (3, 6)
    for step in range(6):
        whole.step(step)
        if step == 3:
            checkpoint.save(tmp_path / "state.safetensors", whole.state())
    other = task_of(smoke, split, **changes)
    other.load_state(checkpoint.load(tmp_path / "state.safetensors"))
    torch.manual_seed(5)
    for step in (4, 5):
        other.step(step)
    for a, b in zip(whole.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.buffers["pool"].shape[1] == smoke.introspective.pool + 2
    assert torch.equal(whole.buffers["pool"], other.buffers["pool"])
    assert torch.equal(whole.buffers["shown"], other.buffers["shown"])


def test_classifiers_are_of_all_categories():
    with pytest.raises(StudyError, match="tuned is trained on all categories: --category all"):
        runs.Run("smoke", "tuned", "chair", 0).checked()
    run = runs.Run("smoke", "orion", "all", 1)
    assert run.weights == paths.results("smoke") / "weights" / run.id
    assert run.samples == paths.results("smoke") / "classifiers" / run.id
    assert runs.run_group(run) == "orion_light"


# ---------------------------------------------------------------- stored classifiers


@pytest.fixture(scope="module")
def stored(workspace, smoke, smoke_judge):
    """A short run of each model, published in the shared workspace, and removed afterwards."""
    import shutil

    short = {m: {"epochs": 1} for m in MODELS}
    short["introspective"] = {"epochs": 1, "cascades": 1, "new": 1, "max_steps": 1}
    profile = config.with_changes(smoke, **short)
    found = {}
    for model in MODELS:
        run = runs.Run("smoke", model, "all", 0)
        runs.publish(run, runs.train(run, profile, progress=False))
        classify.store_validation(run, profile)
        found[model] = run
    yield profile, found | {"judge": smoke_judge}
    for run in found.values():
        shutil.rmtree(run.weights)
        shutil.rmtree(run.samples)


@pytest.mark.parametrize("model", [*MODELS, "judge"])
def test_a_stored_classifier_keeps_its_contract(stored, model):
    profile, found = stored
    network = classify.load_classifier(found[model].id, profile)
    assert not network.training and network.side == (30 if model == "judge" else 24)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())
    x = voxels_of(3, network.side).requires_grad_()
    logits = network(x)
    assert logits.shape == (3, 10) and logits.dtype == torch.float32
    (gradient,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([0, 1, 2])), x)
    assert gradient.abs().flatten(1).sum(1).min() > 0
    torch.testing.assert_close(network(x[:1]), logits[:1], atol=1e-4, rtol=1e-3)
    voting = network.votes, network.mirror
    if model == "judge":
        assert voting == (1, False)
    else:
        settings = getattr(profile, model)
        assert voting == (settings.votes, settings.test_mirror)


def test_classifiers_that_are_none(stored):
    profile, _ = stored
    with pytest.raises(StudyError, match="smoke-gan3d-chair-s0 is no classifier"):
        classify.load_classifier("smoke-gan3d-chair-s0", profile)
    with pytest.raises(StudyError, match="is of another profile"):
        classify.load_classifier("quick-baseline-all-s0", profile)
    with pytest.raises(StudyError, match="no weights here"):
        classify.load_classifier("smoke-baseline-all-s7", profile)


def test_the_best_is_that_of_validation(stored, monkeypatch):
    profile, found = stored
    assert set(classify.present(profile)) == set(found.values())
    errors = dict.fromkeys(found, 0.5) | {"introspective": 0.2, "tuned": 0.3}
    monkeypatch.setattr(classify, "chosen_epoch", lambda log, model: (errors[model], 1.0))
    assert classify.best(profile) == (found["introspective"], 0.2, len(found))


def test_a_classifier_without_weights_is_absent(stored):
    """The store carries its record, of which tables are made, and not always its weights."""
    profile, found = stored
    assert classify.absent(profile) == []
    run = found["orion"]
    aside = run.weights.rename(run.weights.with_name("aside"))
    try:
        assert classify.absent(profile) == [run]
        assert set(classify.present(profile)) == set(found.values()) - {run}
    finally:
        aside.rename(run.weights)


def test_the_chosen_epoch_is_read_as_it_was_chosen(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("step,validation_error,validation_loss\n1,0.2,0.9\n2,0.2,0.8\n3,0.3,0.1\n")
    assert classify.chosen_epoch(log, "baseline") == (0.2, 0.8)
    assert classify.chosen_epoch(log, "judge") == (0.3, 0.1)


@pytest.mark.parametrize(
    "text",
    [
        None,
        b"",
        b"step,validation_error,validation_loss\n",
        b"step,loss\n1,0.5\n",
        b"step,validation_error,validation_loss\n1,0.2\n",
        b"step,validation_error,validation_loss\n1,low,0.2\n",
        b"\xff\xfe\x00",
    ],
)
def test_a_log_without_epochs_is_said_in_one_line(tmp_path, text):
    log = tmp_path / "log.csv"
    if text is not None:
        log.write_bytes(text)
    with pytest.raises(StudyError, match="log.csv: missing or damaged, it names no epoch") as error:
        classify.chosen_epoch(log, "baseline")
    assert "\n" not in str(error.value)


def test_stored_validation_logits_are_those_of_the_classifier(stored, split):
    profile, found = stored
    kept = classify.validation_logits(found["orion"], profile)
    network = classify.load_classifier(found["orion"], profile)
    again = classify.logits(network, split.voxels[split.validation], batch=7)
    np.testing.assert_allclose(kept, again, atol=1e-4)


@pytest.mark.parametrize(
    "arrays",
    [
        {"found": np.zeros((5, 10))},
        {"logits": np.zeros((5, 10))},
        {"logits": np.zeros(10)},
        {"logits": None},  # of the right length, one of them no number
    ],
    ids=["another array", "wrong length", "one row", "not finite"],
)
def test_foreign_validation_logits_are_refused_by_name(
    stored, split, tmp_path, monkeypatch, arrays
):
    profile, found = stored
    if arrays.get("logits", 0) is None:
        logits = np.zeros((split.validation.sum(), 10))
        logits[3, 4] = np.nan
        arrays = {"logits": logits}
    monkeypatch.setattr(runs.Run, "samples", tmp_path)
    np.savez(tmp_path / classify.VALIDATION, **arrays)
    said = r"validation.npz: holds no array `logits` of shape \(\d+, 10\).* delete it"
    with pytest.raises(StudyError, match=said) as error:
        classify.validation_logits(found["orion"], profile)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["saved", "copy of smoke-voxnet-all-s0", "lite-voxnet-all-s0"])
def test_a_stray_folder_is_named(smoke, tmp_path, monkeypatch, name):
    monkeypatch.setattr(paths, "results", lambda profile: tmp_path / profile)
    folder = tmp_path / "smoke" / "classifiers" / name
    folder.mkdir(parents=True)
    assert classify.present(smoke) == []
    (folder / "run.json").write_text("{}")
    said = f"{name}: not the name of a run of profile smoke; rename it or move it elsewhere"
    with pytest.raises(StudyError, match=said) as error:
        classify.best(smoke)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_answers_say_how_sure_they_are():
    known = classify.Scale(2.0, np.array([-9.0, -5.0, -4.0, -1.0]))
    found = np.zeros((2, 10))
    found[0, 2] = 6
    first, second = classify.answers(found, known)
    p = softmax(found[0] / 2)
    assert first["category"] == "chair" and first["probability"] == pytest.approx(p[2], abs=1e-4)
    assert first["entropy"] == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-4)
    assert second["entropy"] == pytest.approx(math.log2(10), abs=1e-4)
    # Energies are about -6.02 and -2.30: one and three of the four lie below.
    assert (first["energy percentile"], second["energy percentile"]) == (25.0, 75.0)


def test_the_command_names_its_witness(stored, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.device, "apply_environment", lambda device: None)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    run, error, n = classify.best(stored[0])
    voxel.save_voxels(tmp_path / "a.npz", np.ones((2, 24, 24, 24), bool))
    assert cli.main(["classify", str(tmp_path / "a.npz"), "--profile", "smoke"]) == 0
    said = capsys.readouterr()
    assert said.err == (
        f"{run.id} answers: validation error {error:.3f}, the lowest of {n} classifiers in place\n"
    )
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["model"] == run.id and 0 <= row["energy percentile"] <= 100
        assert row["probability"] == row["probabilities"][row["category"]]


def test_pseudo_negatives_of_a_run(stored):
    profile, found = stored
    shown, heads = classify.pseudo_negatives(found["introspective"], profile)
    assert list(shown) == list(config.CATEGORIES) and heads == ["noise", "epoch 1"]
    assert all(s.shape == (2, 24, 24, 24) for s in shown.values())
    assert 0.2 < shown["chair"][0].mean() < 0.45  # N(0, 1) about the mean, above .5
    assert classify.pseudo_negatives(found["baseline"], profile) == ({}, [])


# ---------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def asked(stored):
    profile, found = stored
    material = supervised.gather(profile)
    return profile, material, [supervised.ask(profile, r, material) for r in found.values()]


def test_the_table_names_every_classifier_for_the_pipeline(stored):
    assert supervised.MODELS == {m: runs.model(m) for m in config.CLASSIFIERS}
    assert {r.id for r in supervised.listed(stored[0])} == {r.id for r in stored[1].values()}


def test_the_table_has_one_row_a_key_and_every_row_its_runs(asked):
    profile, material, answers = asked
    rows = supervised.table_rows(material, answers)
    ids = supervised.run_ids(answers)
    found = report.table("supervised", profile, rows, judge="abc", run_ids=ids)
    assert not found.duplicated(report.KEY).any()
    headline = found[found["headline"] == 1]
    titles = {"Baseline", "Baseline, tuned (ours)", "Baseline, hardened (ours)"}
    titles |= {"3DWINN", "VoxNet", "ORION"}
    assert set(headline["row"]) == {*titles, "3dnin_fc (judge)", supervised.ENSEMBLE}
    assert (headline["run_ids"].str.len() > 0).all()
    values = found[found["value"] != ""]
    assert len(values) == len(found)
    again = {(r.row, r.metric): r.value for r in values.itertuples()}
    error = (material.test.labels != answers[0].test.argmax(1)).mean()
    assert again["Baseline", "test error"] == pytest.approx(error, abs=1e-6)
    assert again["Baseline", "accuracy"] == pytest.approx(1 - error, abs=1e-6)
    assert "Wilson interval" in set(found["note"])


def test_f_detects_too_but_only_where_there_is_a_critic(asked):
    _, material, answers = asked
    rows = list(supervised.detection_rows(answers))
    of_f = {r["row"] for r in rows if "-f" in r["metric"]}
    assert of_f == {"3DWINN"}
    assert set(material.foreign) == {"noise", "Bernoulli", "PCA-Gaussian", "upside down"}
    assert len(rows) == 4 * (len(answers) + 1)


def test_departures_are_read_from_the_parameters(asked):
    profile, _, answers = asked
    lite = config.load("lite")
    found = supervised.departures(lite, answers)
    paper = config.load("paper").baseline
    assert lite.baseline.lr != paper.lr
    assert found.loc[("Baseline", "lr")].tolist() == [str(lite.baseline.lr), str(paper.lr)]
    assert ("Baseline", "batch") not in found.index and lite.baseline.batch == paper.batch
    assert set(found.index.get_level_values("row")) <= {"Baseline", "3DWINN", "VoxNet", "ORION"}
    same = supervised.departures(config.load("paper"), answers)
    assert same.empty and list(same.columns) == ["here", "paper"]


def test_foreign_shapes_stand_for_the_categories_of_those_they_are_told_from(asked, monkeypatch):
    """A profile that generates two categories still asks about all ten, on both sides."""
    profile, material, _ = asked
    train, seen = data.load_train(profile.data), []
    anchors = supervised.evaluate.anchor_shapes

    def watched(settings, category, split):
        seen.append(category)
        return anchors(settings, category, split)

    monkeypatch.setattr(supervised.evaluate, "anchor_shapes", watched)
    found = supervised._foreign(profile, train, material.test)
    known = {config.CATEGORIES[k] for k in material.test.labels}
    assert set(seen) == known == set(config.CATEGORIES) != set(profile.categories)
    n = len(known) * profile.evaluation.n_equal
    assert {len(grids) for grids in found.values()} == {n}


def test_several_seeds_are_averaged():
    labels = np.array([0, 1, 2, 3])
    a, b = np.array([1, 1, 0, 0], bool), np.array([1, 1, 1, 0], bool)
    found, note = supervised.share([a, b])
    assert found.value == pytest.approx(0.625) and "2 seeds" in note
    assert supervised.share([a])[0] == metrics.wilson_interval(2, 4)
    assert supervised.right(np.eye(10)[[0, 1, 1, 3]], labels).tolist() == [True, True, False, True]


def test_columns_leave_duplicates_out(asked):
    test = asked[1].test
    duplicate = np.zeros(len(test.labels), np.float32)
    duplicate[:4], duplicate[4:9] = 1, 0.96
    changed = data.Split(test.voxels, test.labels, test.ids, test.validation, duplicate)
    sizes = [keep.sum() for keep in supervised.columns(changed).values()]
    assert sizes == [len(duplicate), len(duplicate) - 4, len(duplicate) - 9]


def answers_of(model, correct, labels):
    """Answers of a run that is right exactly where ``correct`` says."""
    given = np.where(correct, labels, (labels + 1) % 10)
    run = runs.Run("smoke", model, "all", 0)
    return supervised.Asked(run, np.eye(10)[given], np.eye(10)[given] * 5.0, {}, {}, {})


def test_in_the_ensemble_rows_count_equally_however_many_seeds_they_have(asked):
    material = asked[1]
    labels = material.test.labels
    n = len(labels)
    always, never = np.ones(n, bool), np.zeros(n, bool)
    # Two seeds of a wrong row against a right one: a tie by rows, lost if seeds were counted.
    wrong, good = answers_of("voxnet", never, labels), answers_of("baseline", always, labels)
    p = supervised.ensemble([wrong, wrong, good], "test")
    np.testing.assert_allclose(p, supervised.ensemble([good, wrong], "test"))
    np.testing.assert_allclose(p.sum(1), 1)
    members = [wrong, good, answers_of("orion", always, labels)]
    told = dataclasses.replace(material, validation=labels)
    rows = {r["metric"]: r["estimate"].value for r in supervised.ensemble_rows(told, members)}
    assert rows["accuracy"] == 1 and rows["test error"] == 0 and rows["validation error"] == 0
    assert not list(supervised.ensemble_rows(told, [good, good]))


def test_the_comparison_is_paired(asked):
    material = asked[1]
    labels = material.test.labels
    n = len(labels)
    worse, better = np.arange(n) % 2 == 0, np.ones(n, bool)
    pair = [answers_of("introspective", better, labels), answers_of("baseline", worse, labels)]
    found = supervised.comparison(material, pair)
    assert found["difference"].value == pytest.approx(1 - worse.mean())
    assert found["p difference"] < 0.001 and found["p non-inferiority"] < 0.001
    assert "they differ" in supervised.in_words(found)
    back = [answers_of("introspective", worse, labels), answers_of("baseline", better, labels)]
    found = supervised.comparison(material, back)
    assert found["p difference"] < 0.001 and found["p non-inferiority"] > 0.99
    assert "is not shown to be non-inferior" in supervised.in_words(found)
    assert supervised.comparison(material, pair[:1]) is None
    assert list(supervised.comparison_rows(material, pair[1:])) == []
    assert "nothing is compared" in supervised.in_words(None)


def test_a_missing_file_is_an_empty_cell_with_the_reason(asked):
    profile, material, answers = asked
    with pytest.raises(StudyError, match="fetch rotations --from PATH"):
        heldout.load_rotations()
    with pytest.raises(StudyError, match="modelnet10_test_12rot.npz has no public address"):
        data.fetch(None, "rotations")
    found, missing = supervised._turned(config.load("lite"), material.test)
    assert found == {} and "is missing" in missing
    gone = supervised.Material(material.test, material.validation, {}, found, missing)
    rows = list(supervised.rotation_rows(gone, answers[:1]))
    table = report.table("supervised", profile, rows, judge="abc")
    assert table["value"].tolist() == [""] and "is missing" in table["note"].iloc[0]


def test_turned_volumes_are_put_in_order(workspace, tmp_path, monkeypatch):
    grids = rng.numpy_generator("test", "turned").random((2, 12, 30, 30, 30)) < 0.1
    order = np.array([0, 9, 10, 11, 1, 2, 3, 4, 5, 6, 7, 8])
    mirrored = grids.transpose(0, 1, 3, 2, 4)[:, order]
    path = tmp_path / "modelnet10_test_12rot.npz"
    np.savez(
        path,
        x=np.packbits(mirrored.reshape(24, -1), axis=1),
        y=np.repeat([3, 4], 12),
        rot=np.tile(order + 1, 2),
    )
    monkeypatch.setattr(paths, "RAW", tmp_path)
    with pytest.raises(StudyError, match="is damaged"):
        heldout.load_rotations()
    import hashlib

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(data.SOURCES, "rotations", (path.name, digest, None))
    found, labels = heldout.load_rotations()
    assert (found == grids).all() and labels.tolist() == [3, 4]


def test_quoted_rows_stand_in_every_profile_of_real_data(monkeypatch):
    found = report.table("supervised", config.load("lite"), [], judge="abc").set_index("row")
    assert found.loc["3DWINN", "published"] == 0.936 and found.loc["Baseline", "published"] == 0.931
    assert (found["value"] == "").all()
    assert found.loc["DeepPano", "note"] == "quoted: panoramic views, not voxels"
    assert found.loc["VoxNet", "note"] == "not run in this profile"


def test_generative_tables_do_not_take_classifiers_for_generators(stored, smoke):
    assert not [r for r in evaluate.trained_runs(smoke) if r.model in MODELS]


# ---------------------------------------------------------------- metrics


def test_reliability_by_hand():
    p = np.array([[0.95, 0.05], [0.85, 0.15], [0.35, 0.65], [0.4, 0.6]])
    bins = metrics.reliability(p, np.array([0, 1, 1, 1]), n_bins=2)
    assert bins["n"].tolist() == [0, 4] and math.isnan(bins["accuracy"][0])
    assert bins["confidence"][1] == pytest.approx(0.7625) and bins["accuracy"][1] == 0.75
    bins = metrics.reliability(p, np.array([0, 1, 1, 1]), n_bins=10)
    assert bins["n"].tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 1, 1]  # .6 is the end of its bin
    found = metrics.expected_calibration_error(p, np.array([0, 1, 1, 1]), n_bins=10)
    assert found == pytest.approx((0.4 + 0.35 + 0.85 + 0.05) / 4)


def test_the_temperature_makes_confidence_right():
    # Eight of ten right at logits (8, 0): log(4) = 8 / T.
    logits, labels = np.tile([8.0, 0.0], (10, 1)), np.array([0] * 8 + [1] * 2)
    found = metrics.temperature(logits, labels)
    assert found == pytest.approx(8 / math.log(4), rel=1e-3)
    assert metrics.expected_calibration_error(softmax(logits / found, 1), labels) < 1e-3


@pytest.mark.parametrize(
    "p, labels, said",
    [
        (np.ones((2, 3)), np.zeros(2, int), "sum to 1"),
        (np.full((2, 2), 0.5), np.zeros(3, int), "expected 2 whole numbers"),
        (np.full((2, 2), 0.5), np.array([0, 2]), "labels must lie in 0..1"),
        (np.full((2, 2), 0.5), np.zeros(2), "expected 2 whole numbers"),
    ],
)
def test_answers_that_are_none(p, labels, said):
    with pytest.raises(StudyError, match=said):
        metrics.reliability(p, labels)


def test_the_area_under_the_curve_is_the_share_of_pairs():
    noise = rng.numpy_generator("test", "auroc")
    known, foreign = noise.integers(0, 9, 40), noise.integers(2, 12, 30)
    pairs = np.subtract.outer(foreign, known)
    found = metrics.detection_auroc(known, foreign)
    assert found.value == pytest.approx((pairs > 0).mean() + 0.5 * (pairs == 0).mean())
    assert 0 <= found.low < found.value < found.high <= 1
    assert metrics.detection_auroc([0, 1], [2, 3]).value == 1
    assert metrics.detection_auroc([2, 3], [0, 1]).value == 0


def test_free_energy():
    np.testing.assert_allclose(metrics.free_energy(np.zeros((2, 10))), -math.log(10))


def test_non_inferiority_against_all_sign_patterns():
    a, b = np.array([1, 1, 0, 1, 0, 1.0]), np.array([1, 0, 0, 1, 1, 1.0])
    d = a - b + 0.05
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    exact = (signs @ d >= d.sum() - 1e-9).mean()
    generator = rng.numpy_generator("test", "permutations")
    found = metrics.non_inferiority_test(a, b, 0.05, 20_000, generator)
    assert found == pytest.approx(exact, abs=0.02)
    with pytest.raises(StudyError, match="margin must be above 0"):
        metrics.non_inferiority_test(a, b, 0.0, 10, generator)
    with pytest.raises(StudyError, match="pairs need equal lengths"):
        metrics.non_inferiority_test(a, b[:3], 0.1, 10, generator)
