"""3D-GAN at the resolution of its paper, and what doubled shapes do to it."""

import hashlib

import numpy as np
import pandas as pd
import pytest
import torch

from lib import config, data, evaluate, files, gan_ablation, metrics, paths, upsampling, voxel
from lib.errors import StudyError
from lib.train import gan64, runs

CPU = torch.device("cpu")
CHAIR = runs.Run("smoke", "gan64", "chair", 0)


@pytest.fixture(scope="module")
def chairs(smoke):
    return gan64.shapes(smoke.gan64, smoke.data, "chair")


def beds_profile():
    lite = config.load("lite")
    return lite.gan64, lite.data


# ---------------------------------------------------------------- shapes


def test_the_paper_has_these_parameters():
    """17 567 744 and 11 046 912 kernel weights, and the scales and shifts of batch norm."""
    assert gan64.published_size() == {
        "generator": 17_567_744 + 1_920,
        "discriminator": 11_046_912 + 1_792,
    }


def test_study_trains_the_network_of_the_paper():
    networks = gan64.MODEL.build(config.load("study"))
    size = {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}
    assert size == gan64.published_size()
    assert networks["generator"].side == networks["discriminator"].side == 64


def test_procedural_shapes_are_solid_and_fill_their_side(chairs, smoke):
    n, side = smoke.gan64.n_shapes, smoke.gan64.side
    assert chairs.voxels.shape == (n, side, side, side) and chairs.voxels.dtype == bool
    for grid in chairs.voxels:
        spans = [
            np.ptp(np.flatnonzero(grid.any(axis=axes))) + 1 for axes in ((1, 2), (0, 2), (0, 1))
        ]
        assert max(spans) == side
        assert (voxel.fill_interior(grid) == grid).all()
    assert 0 < chairs.validation.sum() < n / 4
    again = gan64.shapes(smoke.gan64, smoke.data, "chair")
    assert (again.voxels == chairs.voxels).all() and (again.validation == chairs.validation).all()


def test_near_duplicates_are_on_one_side(chairs, smoke, monkeypatch):
    first = chairs.voxels[0]
    monkeypatch.setattr(gan64, "_beds", lambda: np.stack([*chairs.voxels[:10], *[first] * 10]))
    gan, settings = beds_profile()
    found = gan64.shapes(gan, settings, "bed")
    same = found.validation[[0, *range(10, 20)]]
    assert len(set(same)) == 1
    assert (found.duplicate[[0, 10]] == 1).all()


def test_beds_are_checked_and_unpacked(workspace, tmp_path, monkeypatch, chairs):
    gan, settings = beds_profile()
    monkeypatch.setattr(paths, "RAW", tmp_path)
    with pytest.raises(
        StudyError, match="is missing; run `python -m lib fetch beds64 --from PATH`"
    ):
        gan64.shapes(gan, settings, "bed")
    files.save_npz(
        tmp_path / data.BEDS64, voxels=voxel.pack(chairs.voxels), shape=chairs.voxels.shape
    )
    with pytest.raises(StudyError, match="is damaged"):
        gan64.shapes(gan, settings, "bed")
    digest = files.sha256(tmp_path / data.BEDS64)
    monkeypatch.setitem(data.SOURCES, "beds64", (data.BEDS64, digest, None))
    assert (gan64.shapes(gan, settings, "bed").voxels == chairs.voxels).all()


@pytest.mark.parametrize("category", ["chair", "all"])
def test_beds_have_one_category(category):
    gan, settings = beds_profile()
    with pytest.raises(StudyError, match=f"no shapes of category {category}"):
        gan64.shapes(gan, settings, category)


def test_furniture_has_one_category_a_run(smoke):
    with pytest.raises(StudyError, match="no shapes of category all"):
        gan64.shapes(smoke.gan64, smoke.data, "all")


def test_fetch_takes_beds_from_a_copy_only(workspace, tmp_path, monkeypatch):
    with pytest.raises(StudyError, match="no public address.*fetch beds64 --from PATH"):
        data.fetch(name="beds64")
    with pytest.raises(StudyError, match="no source 'lamps'; choose one of modelnet10, "):
        data.fetch(name="lamps")
    content = b"pretend"
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(data.SOURCES, "beds64", (data.BEDS64, digest, None))
    monkeypatch.setattr(paths, "RAW", tmp_path / "raw")
    (tmp_path / data.BEDS64).write_bytes(content)
    assert data.fetch(tmp_path, "beds64").read_bytes() == content


# ---------------------------------------------------------------- training


def test_training_leaves_the_validation_part_out(chairs, smoke):
    task = gan64.Gan64Task(smoke.gan64, chairs, 0, CPU)
    np.testing.assert_array_equal(task.voxels, chairs.voxels[~chairs.validation])


def test_a_run_is_trained_and_sampled_and_not_judged(checkpoints, smoke, tmp_path, monkeypatch):
    final = runs.train(CHAIR, smoke, progress=False)
    found = voxel.load_voxels(final / "samples-0.5.npz")
    assert found.shape == (smoke.gan64.n_samples, *[smoke.gan64.side] * 3)
    networks = runs.load_networks(CHAIR, smoke, final)
    again = runs.sample(CHAIR, smoke, networks, [3, 5])
    # Batches may round differently; no voxel lies that close to the threshold.
    assert ((again > 0.5) == found[[3, 5]]).all()
    monkeypatch.setattr(paths, "WORKSPACE", tmp_path)
    runs.publish(CHAIR, final)
    assert evaluate.trained_runs(smoke) == [CHAIR]
    assert evaluate.judged_runs(smoke) == []


# ---------------------------------------------------------------- doubled shapes


def test_doubled_shapes_have_no_broken_block(chairs):
    twice = upsampling.doubled(chairs.voxels)
    assert twice.shape == chairs.voxels.shape
    assert (twice >= chairs.voxels).all()
    assert upsampling.broken_blocks(twice) == 0
    assert (upsampling.doubled(twice) == twice).all()
    assert upsampling.broken_blocks(chairs.voxels) > 0


def test_broken_blocks_are_counted():
    grid = np.zeros((1, 4, 4, 4), bool)
    assert upsampling.broken_blocks(grid) == 0
    grid[0, :2, :2, :2] = True
    assert upsampling.broken_blocks(grid) == 0
    grid[0, 3, 3, 3] = True
    assert upsampling.broken_blocks(grid) == 0.5


@pytest.fixture(scope="module")
def compared(workspace, smoke):
    return upsampling.compare(smoke, "chair")


def test_readings_differ_by_shapes_and_rates_alone(compared, smoke, monkeypatch):
    results, log, samples = compared
    names = ["base", "doubled", "published rates", "doubled, published rates"]
    names.append("doubled, the report's recipe")
    assert list(samples) == names and len(results) == len(names) * len(smoke.upsampling.seeds)
    monkeypatch.setattr(gan64.Gan64Task, "step", None)  # complete runs are not trained again
    again = upsampling.compare(smoke, "chair")
    pd.testing.assert_frame_equal(results, again[0])
    gan = upsampling._section(smoke, upsampling.PUBLISHED)
    own = upsampling._section(smoke, {})
    assert (gan.lr_generator, gan.lr_discriminator) == (0.0025, 1e-5)
    assert {f for f in vars(gan) if getattr(gan, f) != getattr(own, f)} == set(upsampling.PUBLISHED)


def test_the_report_has_narrow_latents_noisy_labels_and_its_rates(smoke, chairs):
    _, changes, switches = upsampling.PLAN["doubled, the report's recipe"]
    gan = upsampling._section(smoke, changes)
    task = upsampling._task(smoke, gan, switches, chairs, 0)
    assert task._latents(0).std().item() == pytest.approx(0.33, rel=0.2)
    assert task.variant.labels == "noisy" and task.variant.loss == "binary"
    rates = {name: o.param_groups[0]["lr"] for name, o in task.optimizers.items()}
    assert rates == {"generator": 0.0025, "discriminator": 1e-4}
    assert task.networks["generator"].layers[0].weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert task.voxels.shape[1:] == chairs.voxels.shape[1:]
    assert not isinstance(upsampling._task(smoke, gan, {}, chairs, 0), type(task))


def test_samples_are_measured_against_shapes_of_their_kind(compared, smoke, chairs):
    results, _, samples = compared
    n = smoke.upsampling.n_samples
    validation = voxel.pack(upsampling.doubled(chairs.voxels)[chairs.validation])
    distances = 1 - metrics.iou_matrix(validation, voxel.pack(samples["doubled"][:n]))
    row = results[(results["reading"] == "doubled") & (results["seed"] == 0)].iloc[0]
    assert row["distance"] == metrics.minimum_matching_distance(distances)
    assert row["broken_blocks"] == upsampling.broken_blocks(samples["doubled"][:n])


def test_training_shapes_stand_beside(smoke, chairs):
    found = upsampling.real(smoke, "chair")
    native = chairs.voxels[~chairs.validation]
    assert found.loc["native", "occupancy"] == native.mean()
    assert found.loc["doubled", "occupancy"] > native.mean()
    assert found.loc["doubled", "broken_blocks"] == 0


def test_the_verdict_falls_either_way(compared, smoke):
    results, log, _ = compared
    shapes = upsampling.real(smoke, "chair")
    text = upsampling.verdict(results.assign(collapse=""), log, shapes)
    assert text.startswith("No run ends with more than half of the box filled.")
    full = results["reading"] == "doubled, published rates"
    changed = results.assign(
        collapse=np.where(full, "full", ""), occupancy=np.where(full, 0.9, 0.1)
    )
    text = upsampling.verdict(changed, log, shapes)
    assert "is filled by doubled, published rates in 2 of 2 seeds. " in text
    assert "doubling the shapes +0.000 (up in 0 of 2 seeds)" in text
    assert "both +0.800 (up in 2 of 2 seeds)" in text
    for far, near in (("doubled", "published rates"), ("published rates", "doubled")):
        distance = results["reading"].map({far: 0.9}).fillna(0.5)
        text = upsampling.verdict(results.assign(distance=distance), log, shapes)
        assert f"the reading '{far}' moves it by 0.40, '{near}' by 0.00" in text


def test_the_summary_counts_updates_and_collapses(compared, smoke):
    results, log, _ = compared
    shapes = upsampling.real(smoke, "chair")
    table = upsampling.summary(results.assign(collapse="empty"), log, shapes)
    assert (table["collapsed"] == "2 of 2").all()
    last = log.groupby(["reading", "seed"]).tail(1)
    share = (last["updates"] / last["step"]).groupby(last["reading"]).mean()
    assert table["updates"].to_dict() == share.to_dict()
    assert set(gan_ablation.MEASURES) < set(table)
    # Of doubled runs the filled share stands beside that of doubled shapes.
    mean = results.groupby("reading")["occupancy"].mean()
    assert table.loc["doubled", "times"] == mean["doubled"] / shapes.loc["doubled", "occupancy"]


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    "section, key, value, said",
    [
        ("gan64", "latent", "cauchy", "uniform or normal"),
        ("gan64", "batch", 7, "batch must be 8 or more"),
        ("gan64", "label_real", 1.2, "label_real must lie"),
        ("gan64", "side", 32, "2 .. layers must be side"),
        ("gan64", "source", "web", "furniture or beds"),
        ("gan64", "source", "beds", "side must be 64"),
        ("gan64", "discriminator_channels", [8], "as many layers"),
        ("gan64", "n_shapes", 0, "n_shapes must be above 0"),
        ("gan64", "layout", "blocked", "layout must be"),
        ("upsampling", "seeds", [0, 0], "seeds must be different"),
        ("upsampling", "side", 4, "gan64.side or half"),
        ("upsampling", "side", 8, "layers must be side"),
        ("upsampling", "batch", 7, "batch must be 8 or more"),
        ("upsampling", "n_samples", 1, "n_samples must be 2 or more"),
        ("upsampling", "steps", 0, "steps must be above 0"),
    ],
)
def test_parameters_that_cannot_be(smoke, section, key, value, said):
    with pytest.raises(StudyError, match=said):
        config.with_changes(smoke, **{section: {key: value}})
