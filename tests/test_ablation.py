"""Ablations: one budget, one difference, and a divergence that is told rather than hidden."""

import numpy as np
import pytest

from lib import ablation, config, data, paths
from lib.errors import StudyError
from lib.train import winn3d


def test_readings_share_everything_but_what_they_name(workspace, smoke):
    log, shapes = ablation.compare(smoke, {"first": {}, "again": {}, "other": {"slope": 0.3}})
    curves = {name: rows.drop(columns="reading") for name, rows in log.groupby("reading")}
    assert len(curves["first"]) == smoke.ablation.iterations
    assert curves["first"].reset_index(drop=True).equals(curves["again"].reset_index(drop=True))
    assert (curves["first"]["f_real"].values != curves["other"]["f_real"].values).all()
    assert (shapes["first"] == shapes["again"]).all()
    assert shapes["first"].shape == (smoke.ablation.new, 24, 24, 24)
    assert log["nearest"].notna().sum() == 3 and log["nearest"].dropna().between(0, 1).all()


def test_sampler_and_stop_of_a_reading_are_the_ablations_not_the_runs(smoke):
    budget, _ = ablation._budget(smoke, "winn3d")
    assert (budget["sampler_beta2"], budget["stop"]) == (0.999, "batch")
    other = config.with_changes(smoke, winn3d={"sampler_beta2": 0.0, "stop": "never"})
    assert ablation._budget(other, "winn3d")[0] == budget


def test_the_nearest_training_shape_of_a_copy_is_itself(workspace, smoke, monkeypatch):
    chairs = data.load_train(smoke.data).category("chair")
    copies = data.model_grid(chairs.voxels[~chairs.validation][:2], 24)
    monkeypatch.setattr(ablation, "_newest", lambda *_: copies.astype(np.float32))
    log, shapes = ablation.compare(smoke, {"copies": {}})
    assert log["nearest"].iloc[-1] == 1 and (shapes["copies"] == copies).all()


def test_descriptors_chains_have_their_readings(workspace, smoke):
    log, shapes = ablation.compare(smoke, {"on": {}, "off": {"noise_until": 0}}, model="desnet3d")
    assert log["step"].max() == smoke.ablation.learning_steps
    assert shapes["on"].shape == (smoke.ablation.new, 24, 24, 24)
    last = log.groupby("reading").last()
    assert last["f_pool"]["on"] != last["f_pool"]["off"]
    assert (last["gap"] == last["f_real"] - last["f_pool"]).all()


def test_a_reading_that_diverges_says_why_and_the_others_go_on(workspace, smoke, monkeypatch):
    monkeypatch.setattr(winn3d, "LIMIT", 1e-9)
    log, _ = ablation.compare(smoke, {"wild": {"init_std": 0.5}})
    assert "the critic diverged: f_" in log["diverged"].iloc[-1]
    assert len(log) == 1 and log["gap"].isna().all()


def test_the_supervised_network_has_its_readings(workspace, smoke):
    readings = {"inside": {}, "outside": {"penalty_in_alpha": False}}
    log, shapes = ablation.compare(smoke, readings, model="introspective")
    inside, outside = (rows.set_index("step") for _, rows in log.groupby("reading"))
    assert len(inside) == len(outside) == smoke.ablation.epochs
    assert (inside["penalty"] != outside["penalty"]).iloc[-1]
    assert inside["validation_error"].between(0, 1).all()
    assert {grids.shape for grids in shapes.values()} == {(10, 24, 24, 24)}
    split = data.load_train(smoke.data)
    budget, few = ablation._budget(smoke, "introspective")
    counts = np.bincount(few.labels[~few.validation])
    assert (counts == smoke.ablation.shapes).all()
    assert few.validation.sum() == split.validation.sum()
    assert budget["epochs"] == smoke.ablation.epochs


def test_pictures_are_written(workspace, smoke):
    log, shapes = ablation.compare(smoke, {"first": {}, "other": {"clip": False}})
    assert len(ablation.pictures(log, shapes, paths.results("smoke") / "ablation/clip")) == 2
    folder = paths.results("smoke") / "ablation"
    assert {p.name for p in folder.iterdir()} == {"clip-curves.png", "clip-shapes.png"}


def test_an_unknown_key_is_refused(workspace, smoke):
    with pytest.raises(StudyError, match="winn3d has no parameter slop"):
        ablation.compare(smoke, {"typo": {"slop": 0.3}})
