"""The ablation of 3D-GAN: one difference a reading, pairs by seed, and sentences that can fall."""

import dataclasses
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lib import config, data, gan_ablation, losses, paths
from lib.errors import StudyError
from lib.models.gan3d import Discriminator
from lib.train import engine, gan3d, gan_variant

CPU = torch.device("cpu")
READINGS = {"base": {}, "again": {}, "every": {"gan_ablation": {"every": 2}}}


def task_of(smoke, gan=None, **variant):
    profile = config.with_changes(smoke, gan3d=gan or {}, gan_ablation=variant)
    budget = {key: getattr(profile.gan_ablation, key) for key in gan_ablation.OVERRIDES}
    chairs = data.load_train(smoke.data).category("chair")
    section = dataclasses.replace(profile.gan3d, **budget)
    return gan_variant.VariantTask(section, profile.gan_ablation, chairs, 24, 0, CPU)


def weights(task):
    return [p.detach().clone() for net in task.networks.values() for p in net.parameters()]


def moved(task, name, step):
    before = [p.detach().clone() for p in task.networks[name].parameters()]
    task.step(step)
    after = [p.detach() for p in task.networks[name].parameters()]
    return not all(map(torch.equal, before, after)), before, after


# ---------------------------------------------------------------- the switches


def test_the_base_reading_is_3d_gan(workspace, smoke):
    variant = task_of(smoke)
    chairs = data.load_train(smoke.data).category("chair")
    plain = gan3d.Gan3dTask(variant.gan, chairs, 24, 0, CPU)
    plain.voxels = variant.voxels
    logs = [[task.step(s) for s in range(4)] for task in (variant, plain)]
    assert logs[0] == logs[1]
    assert all(map(torch.equal, weights(variant), weights(plain)))


@pytest.mark.parametrize(
    "switch",
    [
        {"labels": "noisy"},
        {"norm": "layer"},
        {"norm": "layer", "loss": "wasserstein"},
        {"updates": 2},
        {"every": 2},
        {"cap": 0.01},
        {"optimizer": "sgd"},
        {"decay": 0.1},
        {"latent_std": 0.33},
        {"latent": "uniform"},
        {"batch": 9},
    ],
)
def test_every_switch_changes_what_is_trained(workspace, smoke, switch):
    base, other = task_of(smoke, {"gate": 1.0}), task_of(smoke, {"gate": 1.0}, **switch)
    for step in range(4):
        base.step(step), other.step(step)
    generators = [list(task.networks["generator"].parameters()) for task in (base, other)]
    assert not all(map(torch.equal, *generators))


def test_the_discriminator_is_updated_every_nth_step(workspace, smoke):
    task = task_of(smoke, {"gate": 1.0}, every=3)
    assert [moved(task, "discriminator", s)[0] for s in range(6)] == [1, 0, 0, 1, 0, 0]
    assert moved(task, "generator", 7)[0]
    task = task_of(smoke, {"gate": 1.0}, updates=3)
    assert [task.step(s)["updates"] for s in range(2)] == [3, 6]


def test_a_critic_has_no_gate(workspace, smoke):
    task = task_of(smoke, {"gate": 0.6}, norm="layer", loss="wasserstein")
    task.counters["accuracy"] = 1.0
    assert moved(task, "discriminator", 0)[0]
    task = task_of(smoke, {"gate": 0.6})
    task.counters["accuracy"] = 1.0
    assert not moved(task, "discriminator", 0)[0]


def test_capped_gradients_move_a_plain_descent_by_at_most_the_cap(workspace, smoke):
    change = {}
    for cap in (0.0, 1e-3):
        task = task_of(smoke, {"gate": 1.0}, optimizer="sgd", cap=cap)
        _, before, after = moved(task, "discriminator", 0)
        change[cap] = torch.cat([(b - a).flatten() for a, b in zip(before, after, strict=True)])
    rate = smoke.gan_ablation.lr_discriminator
    assert change[1e-3].norm().item() == pytest.approx(rate * 1e-3, rel=1e-2)
    assert change[0.0].norm() > 2 * change[1e-3].norm()


def test_rates_fall_to_the_stated_share(workspace, smoke):
    task = task_of(smoke, decay=0.1)
    rates = []
    for step in range(task.n_steps):
        task.step(step)
        rates.append(task.optimizers["generator"].param_groups[0]["lr"])
    assert rates[0] == smoke.gan_ablation.lr_generator
    assert rates[-1] == pytest.approx(0.1 * rates[0])
    assert rates == sorted(rates, reverse=True)


def test_noisy_labels_are_those_of_the_report(workspace, smoke):
    """At logits 0 the loss is log 4 whatever the labels; far out it has no lower bound."""
    task = task_of(smoke, labels="noisy")
    zero = task._discriminator_loss(torch.zeros(64), torch.zeros(64), 0)
    assert zero.item() == pytest.approx(np.log(4), abs=1e-6)
    far = torch.full((4096,), 1e3)
    # softplus(l) - t l with E[t] = .95, and softplus(-l) + t l with E[t] = .15.
    loss = task._discriminator_loss(far, -far, 0).item()
    assert loss == pytest.approx(1e3 * (1 - 0.95) + 1e3 * 0.15, rel=0.05)
    sure = torch.full((1,), 1e4)
    single = [task._discriminator_loss(sure, torch.zeros(1), draw) for draw in range(20)]
    assert min(single) < 0
    assert losses.discriminator_loss(far, -far, 0.9) >= 0


def test_layer_normalisation_sees_one_shape_at_a_time():
    torch.manual_seed(0)
    network = gan_variant.layer_normalised(Discriminator(base=3, channels=(4, 8, 8)))
    assert not [m for m in network.modules() if isinstance(m, nn.BatchNorm3d)]
    x = torch.rand(3, 1, 24, 24, 24)
    torch.testing.assert_close(network(x)[:1], network(x[:1]))


def test_latents_are_narrowed(workspace, smoke):
    base, narrow = task_of(smoke), task_of(smoke, latent_std=0.33)
    torch.testing.assert_close(narrow._latents(3), 0.33 * base._latents(3))


def test_shapes_are_pooled(workspace, smoke):
    assert task_of(smoke).voxels.shape[1:] == (12, 12, 12)
    assert task_of(smoke).samples(3).shape == (3, 12, 12, 12)


# ---------------------------------------------------------------- the comparison


@pytest.fixture(scope="module")
def compared(workspace, smoke):
    return gan_ablation.compare(smoke, READINGS)


def test_readings_share_everything_but_what_they_name(compared, smoke):
    results, log, samples = compared
    n, seeds = smoke.gan_ablation.n_samples, smoke.gan_ablation.seeds
    assert results.groupby("reading")["seed"].apply(list).to_dict() == {
        name: list(seeds) for name in READINGS
    }
    assert samples["base"].shape == (n * len(seeds), 12, 12, 12)
    assert (samples["base"] == samples["again"]).all()
    assert (samples["base"][:n] != samples["base"][n:]).any()
    of = {name: rows.drop(columns="reading").values for name, rows in log.groupby("reading")}
    assert (of["base"] == of["again"]).all() and (of["base"] != of["every"]).any()
    assert log.groupby(["reading", "seed"])["step"].max().eq(smoke.gan_ablation.steps).all()


def test_complete_runs_are_taken_up_as_they_are(compared, smoke, monkeypatch):
    monkeypatch.setattr(gan_variant.VariantTask, "step", None)
    again = gan_ablation.compare(smoke, READINGS)
    assert again[0].equals(compared[0]) and again[1].equals(compared[1])
    assert not list(paths.CHECKPOINTS.glob("gan-ablation-*/state*"))


def test_an_interrupted_run_goes_on(compared, checkpoints, smoke, monkeypatch):
    step = gan_variant.VariantTask.step
    calls = []

    def interrupted(self, k):
        calls.append(k)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, k)

    monkeypatch.setattr(gan_variant.VariantTask, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gan_ablation.compare(smoke, READINGS)
    results, log, _ = gan_ablation.compare(smoke, READINGS)
    assert results.equals(compared[0]) and log.equals(compared[1])


def test_a_reading_that_diverges_says_so_and_the_others_go_on(checkpoints, smoke, monkeypatch):
    real = gan_variant.VariantTask.step

    def step(self, k):
        if self.variant.every == 2 and k == 2:
            raise engine.Diverged("too far")
        return real(self, k)

    monkeypatch.setattr(gan_variant.VariantTask, "step", step)
    results, log, samples = gan_ablation.compare(smoke, READINGS)
    wild = results[results["reading"] == "every"]
    assert (wild["collapse"] == "diverged").all() and wild["occupancy"].isna().all()
    assert not samples["every"].any()
    assert set(results[results["reading"] == "base"]["collapse"]) != {"diverged"}
    assert "every" not in set(gan_ablation.differences(results)["reading"])
    assert gan_ablation.summary(results).loc["every", "collapsed"] == "2 of 2 (diverged 2)"
    assert "every: collapsed in 2 of 2" in " ".join(gan_ablation.verdicts(results))


def test_the_base_comes_first(workspace, smoke):
    with pytest.raises(StudyError, match="the first reading must be 'base'"):
        gan_ablation.compare(smoke, {"other": {}})
    with pytest.raises(StudyError, match="gan_ablation has no parameter evry"):
        gan_ablation.compare(smoke, {"base": {}, "typo": {"gan_ablation": {"evry": 2}}})


def test_pictures_are_written(compared, smoke, tmp_path):
    assert len(gan_ablation.pictures(*compared, tmp_path / "readings", n=2)) == 2
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        "readings-occupancy.png",
        "readings-samples.png",
        "readings-samples.csv",
    }


# ---------------------------------------------------------------- measures and words


def test_measures_of_known_shapes():
    validation = np.zeros((2, 4, 4, 4), bool)
    validation[0, :2], validation[1, 2:] = True, True
    found = gan_ablation.measures(validation, validation[[0, 0]])
    # The second validation shape overlaps no sample, and none is nearest to it.
    assert found == {"occupancy": 0.5, "likeness": 1.0, "distance": 0.5, "coverage": 0.5}
    found = gan_ablation.measures(validation, validation)
    assert found == {"occupancy": 0.5, "likeness": 0.0, "distance": 0.0, "coverage": 1.0}


@pytest.mark.parametrize(
    "occupancy, likeness, kind",
    [(0.51, 0.1, "full"), (0.009, 1.0, "empty"), (0.2, 0.96, "one shape"), (0.2, 0.95, "")],
)
def test_kinds_of_collapse(occupancy, likeness, kind):
    assert gan_ablation.collapse_of(occupancy, likeness) == kind


def results_of(**readings):
    """Results in which all measures but occupancy stand still."""
    rows = [
        {"reading": name, "seed": seed, "occupancy": o, "likeness": 0.5, "distance": 0.5}
        | {"coverage": 0.1, "collapse": gan_ablation.collapse_of(o, 0.5)}
        for name, values in readings.items()
        for seed, o in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_differences_are_paired_by_seed():
    results = results_of(base=[0.1, 0.2, 0.3], other=[0.2, 0.31, 0.39])
    found = gan_ablation.differences(results.sample(frac=1, random_state=0).sort_index())
    row = found[found["measure"] == "occupancy"].iloc[0]
    difference = np.array([0.1, 0.11, 0.09])
    half = 4.302653 * difference.std(ddof=1) / np.sqrt(3)  # Student's t, two degrees of freedom
    assert row["value"] == pytest.approx(0.1)
    assert (row["low"], row["high"]) == pytest.approx((0.1 - half, 0.1 + half), rel=1e-5)
    assert gan_ablation.apart(found).tolist() == [True, False, False, False]


def test_the_verdict_falls_either_way():
    results = results_of(
        base=[0.1, 0.2, 0.3], full=[0.8, 0.91, 0.99], same=[0.1, 0.21, 0.28], none=[0, 0, 0]
    )
    said = gan_ablation.verdicts(results)
    assert said[0] == "full: collapsed in 3 of 3 seeds (base 0); fuller (+0.700)."
    assert said[1].endswith("not told apart from the base by any measure.")
    assert said[2].startswith("none: collapsed in 3 of 3 seeds (base 0);")
    text = gan_ablation.cures(results)
    assert "base collapses in 0 of 3" in text and "full (3 of 3), none (3 of 3)" in text
    turned = results_of(base=[0.8, 0.9, 0.95], fine=[0.1, 0.2, 0.3])
    assert "Less often: fine (0 of 3). More often: no reading." in gan_ablation.cures(turned)
    assert "Of 12 intervals 1 leave 0 out" in gan_ablation.power(results)
    table = gan_ablation.summary(results)
    assert table.loc["full", "collapsed"] == "3 of 3 (full 3)"
    assert table.loc["full", "occupancy"].startswith("0.900 (+0.700,")
    assert table.loc["full", "occupancy"].endswith("*")
    assert table.loc["base", "occupancy"] == "0.200"


def test_the_critic_has_the_rates_of_its_paper_in_the_notebook(smoke, monkeypatch):
    """1e-4 and (.5, .9) for both networks (3D-IWGAN), from normal and from uniform latents."""
    book = json.loads((paths.NOTEBOOKS / "30_gan_ablation.ipynb").read_text())
    asked = []
    monkeypatch.setattr(gan_ablation, "compare", lambda _, r: asked.append(r) or (None,) * 3)
    names = {"settings": smoke, "gan_ablation": gan_ablation}
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if re.search(r"^(readings|others) \|?= ", source, re.M):
            exec(source.split("display(")[0], names)
    assert len(asked) == 2
    for readings, latent in zip(asked, ("normal", "uniform"), strict=True):
        profile = config.with_changes(smoke, **readings["Wasserstein, penalty"])
        gan, variant = profile.gan3d, profile.gan_ablation
        assert (gan.beta1, gan.beta2, variant.latent) == (0.5, 0.9, latent)
        assert variant.lr_generator == variant.lr_discriminator == 1e-4


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("category", "lamp", "unknown name"),
        ("seeds", [], "seeds must be different"),
        ("seeds", [1, 1], "seeds must be different"),
        ("pool", 1, "pool must be data.side"),
        ("generator_channels", [8], "must be data.side"),
        ("discriminator_channels", [8], "as many as generator_channels"),
        ("batch", 7, "batch must be 8 or more"),
        ("n_samples", 1, "n_samples must be 2 or more"),
        ("loss", "hinge", "binary or wasserstein"),
        ("loss", "wasserstein", "norm must be layer"),
        ("labels", "soft", "hard or noisy"),
        ("norm", "none", "batch or layer"),
        ("optimizer", "rms", "adam or sgd"),
        ("cap", -1.0, "cap must be 0 or more"),
        ("penalty", -1.0, "penalty must be 0 or more"),
        ("latent", "cauchy", "uniform or normal"),
        ("decay", 0.0, "decay must be above 0"),
        ("every", 0, "every must be above 0"),
        ("updates", 0, "updates must be above 0"),
    ],
)
def test_parameters_that_cannot_be(smoke, key, value, said):
    with pytest.raises(StudyError, match=said):
        config.with_changes(smoke, gan_ablation={key: value})


def test_narrow_uniform_latents_are_refused(smoke):
    with pytest.raises(StudyError, match="latent_std must be 1"):
        config.with_changes(smoke, gan_ablation={"latent": "uniform", "latent_std": 0.33})
