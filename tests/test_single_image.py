"""Shapes from one picture: grids, averages and intervals by hand, and the photographs' archive."""

import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lib import config, data, ikea, metrics, paths, report, single_image, voxel
from lib.errors import StudyError
from lib.train import runs

PLAIN, ALIGNED = single_image.PLAIN, single_image.ALIGNED


# ---------------------------------------------------------------- grids and pictures


@pytest.mark.parametrize("side", [24, 32])
def test_pooling_keeps_volume_and_place(side):
    stream = np.random.default_rng(0)
    margin = (side - 24) // 2
    shapes = np.zeros((3, side, side, side), np.float32)
    inner = slice(margin, side - margin)
    shapes[:, inner, inner, inner] = stream.random((3, 24, 24, 24))
    pooled = single_image.to_grid(shapes)
    assert pooled.shape == (3, 20, 20, 20)
    inside = shapes[:, inner, inner, inner]
    assert pooled.mean((1, 2, 3)) == pytest.approx(inside.mean((1, 2, 3)), rel=1e-5)
    # By a grid of 120: every voxel of 24 is 5 of its cells a side, every voxel of 20 is 6.
    fine = inside[0].repeat(5, 0).repeat(5, 1).repeat(5, 2)
    wanted = fine.reshape(20, 6, 20, 6, 20, 6).mean((1, 3, 5))
    assert pooled[0] == pytest.approx(wanted, abs=1e-5)


def test_a_box_that_fills_its_grid_fills_the_pooled_grid():
    box = np.zeros((1, 32, 32, 32), bool)
    box[0, 4:28, 4:28, 4:16] = True
    pooled = single_image.to_grid(box)[0]
    assert (pooled[:, :, :10] == 1).all() and (pooled[:, :, 10:] == 0).all()


@pytest.mark.parametrize("side", [24, 32])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_grid_comes_back_from_the_model_grid(side, axis):
    """Slabs across one axis, exactly: of every voxel of 20 the larger part is its own."""
    slabs = np.random.default_rng(axis).random((5, 20)) < 0.4
    truths = np.broadcast_to(
        slabs.reshape([5, *[20 if a == axis else 1 for a in range(3)]]), (5, 20, 20, 20)
    )
    on_grid = single_image._to_model_grid(truths, side)
    assert on_grid.shape == (5, side, side, side) and on_grid.dtype == bool
    assert ((single_image.to_grid(on_grid) >= 0.5) == truths).all()


def test_photographs_are_made_square_by_their_edge():
    picture = np.zeros((10, 20, 3), np.uint8)
    picture[0], picture[-1] = (200, 0, 0), (0, 0, 90)
    x = single_image.square(picture, 40)
    assert x.shape == (3, 40, 40) and x.dtype == torch.uint8
    assert (x[0, :10] == 200).all() and (x[2, 30:] == 90).all() and (x[:, 15:25] == 0).all()


def test_thumbnails_do_not_depend_on_brightness_and_contrast():
    x = torch.randint(0, 100, (2, 3, 32, 32), dtype=torch.uint8)
    a, b = single_image.thumbnails(x), single_image.thumbnails(2 * x + 30)
    assert a.shape == (2, 256)
    assert a == pytest.approx(b, abs=1e-5)


# ---------------------------------------------------------------- averages


def frame(rows):
    columns = ["row", "category", "model", "picture", PLAIN, ALIGNED]
    return pd.DataFrame(rows, columns=columns)


def test_averages_by_hand(smoke):
    found = frame(
        [
            ("a", "chair", 0, 0, 0.1, 0.2),
            ("a", "chair", 0, 1, 0.3, 0.4),
            ("a", "chair", 1, 2, 0.8, 0.9),
            ("a", "bed", 2, 3, 0.5, 0.6),
            ("a", "bookcase", 3, 4, 0.0, 0.1),
        ]
    )
    means = single_image.averages(found, ALIGNED, smoke)
    assert {c: e.value for c, e in means.items()} == pytest.approx(
        {"chair": 0.5, "bed": 0.6, "bookcase": 0.1, "all": 0.55}
    )
    assert np.isnan(means["bed"].low) and np.isnan(means["bookcase"].high)  # one model each
    # Two models of chairs: draws hold the first, the second, or both.
    assert 0.3 <= means["chair"].low <= means["chair"].value <= means["chair"].high <= 0.9
    assert means["all"].low == pytest.approx((means["chair"].low + 0.6) / 2)


def test_intervals_are_over_models_not_photographs(smoke):
    many = config.with_changes(smoke, single_image={"n_draws": 500})
    stream = np.random.default_rng(0)
    level = stream.random(4)
    rows = [("a", "chair", m, 0, v, v) for m, v in enumerate(level) for _ in range(200)]
    wide = single_image.averages(frame(rows), PLAIN, many)["chair"]
    assert wide.high - wide.low > 0.5 * level.std()


def test_rows_name_what_was_shown(smoke):
    found = frame([("a", "chair", k, k, 0.2, 0.3) for k in range(3)])
    rows = list(single_image.rows(smoke, {"photographs": found, "renderings": found}))
    headline = [r for r in rows if r["headline"]]
    assert {r["metric"] for r in headline} == {ALIGNED}
    assert {r["metric"] for r in rows} == {
        m + s for m in (PLAIN, ALIGNED) for s in ("", ", renderings")
    }
    assert all(r["note"] == "photographs; 3 models" for r in headline)
    table = report.table("ikea", smoke, rows, judge="")
    assert "photographs" in report.table_page(table)


def test_the_gap_is_told_step_by_step():
    """In the categories that all have: the bed, which the second lacks, is left out."""
    first = frame([("a", "chair", 0, 0, 0.0, 0.2), ("a", "bed", 1, 1, 0.0, 0.9)])
    second = frame([("a", "chair", 0, 0, 0.0, 0.5)])
    third = frame([("a", "chair", 0, 0, 0.0, 0.6), ("a", "bed", 1, 1, 0.0, 0.1)])
    gap = single_image.gap({"one": first, "two": second, "three": third}).loc["a"]
    assert gap.to_dict() == pytest.approx(
        {"one": 0.2, "two": 0.5, "three": 0.6, "two - one": 0.3, "three - two": 0.1}
    )


def test_words_count_the_categories_in_which_a_row_is_above_both(smoke):
    lines = []
    for row, chair, bed in (
        ("mean shape", 0.3, 0.5),
        ("nearest neighbour (pixels)", 0.4, 0.2),
        ("3D-VAE-GAN", 0.45, 0.4),
        (single_image.TOLD, 0.9, 0.9),
    ):
        lines += [(row, "chair", 0, 0, chair - 0.1, chair), (row, "bed", 1, 1, bed - 0.2, bed)]
        lines += [(row, "bookcase", 2, 2, 0.0, 1.0)]
    table = report.table(
        "ikea", smoke, list(single_image.rows(smoke, {"photographs": frame(lines)})), judge=""
    )
    said = single_image.in_words(table)
    assert "The oracle adds 0.150 to 0.150" in said
    assert "the better is the mean shape (0.400, aligned)" in said
    above = "1 of 2 categories aligned (chair) and in 1 of 2 categories as it is (chair)"
    assert f"3D-VAE-GAN is above both in {above}." in said
    assert single_image.TOLD not in said


# ---------------------------------------------------------------- a whole exam


@pytest.fixture(scope="module")
def small(smoke):
    return config.with_changes(
        smoke, single_image={"photographs": 2, "neighbours": 12, "shift": 0.05}
    )


def test_an_exam_of_renderings(workspace, small, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "results", lambda profile: tmp_path / "results" / profile)
    for model in single_image.MODELS:
        run = runs.Run("smoke", model, "all", 0)
        runs.publish(run, runs.train(run, small, progress=False))
    exam, other = single_image.photographs(small), single_image.rendered(small)
    assert exam.categories == ("chair", "chair", "toilet", "toilet")
    assert "standing for photographs" in exam.name and exam.name != other.name
    assert (exam.truths == other.truths).all()
    assert not torch.equal(exam.pictures, other.pictures)
    again = single_image.redrawn(small, exam)
    assert (again.truths == exam.truths).all() and (again.model == exam.model).all()
    assert again.pictures.shape == exam.pictures.shape
    assert not torch.equal(again.pictures, exam.pictures)
    known = single_image.known_shapes(small)
    with monkeypatch.context() as patch:  # what is known is drawn once, not with every exam
        patch.setattr(single_image, "views", None)
        answers = single_image.predictions(small, exam, known)
    assert list(answers) == [
        "mean shape",
        "nearest neighbour (pixels)",
        "mean shape of the category, told",
        "nearest neighbour (codes)",
        "encoder-decoder",
        "3D-VAE-GAN",
    ]
    assert all(a.shape == (4, 20, 20, 20) for a in answers.values())
    told = answers["mean shape of the category, told"]
    assert (told[0] == told[1]).all() and (told[1] != told[2]).any()  # two chairs, two toilets
    answers = {row: answers[row] for row in ("mean shape", "3D-VAE-GAN")}
    found = single_image.scores(small, exam, answers)
    assert len(found) == 8
    assert (found[ALIGNED] >= found[PLAIN] - 1e-9).all()
    one = found[(found["row"] == "3D-VAE-GAN") & (found["picture"] == 2)].iloc[0]
    assert one[PLAIN] == metrics.average_precision(exam.truths[2], answers["3D-VAE-GAN"][2])
    gap = single_image.gap({"a": found, "b": found})
    assert (gap["b - a"] == 0).all()
    ids = single_image.run_ids(small)
    assert ids["3D-VAE-GAN"] == ["smoke-vaegan3d-all-s0"]


def test_a_cut_fills_a_share_and_keeps_equal_probabilities_together():
    p = np.random.default_rng(0).permutation(100) / 100
    assert (single_image.filled(p, 0.2) == (p >= 0.8)).all()
    tied = np.array([0.5] * 3 + [0.1] * 7)
    assert (single_image.filled(tied, 0.2) == (tied == 0.5)).all()  # .3 is nearer to .2 than 0
    assert not single_image.filled(tied, 0.1).any()  # and 0 to .1


def test_shapes_held_at_one_half_come_back_and_are_shown_as_they_are_scored(
    workspace, small, monkeypatch
):
    run = runs.Run("smoke", "encoder_decoder", "all", 0)
    split = data.load_train(small.data)
    truths = data.model_grid(split.voxels[split.validation], 24)
    monkeypatch.setattr(runs, "load_networks", lambda *_: {})
    held = np.where(truths, np.float32(0.5), np.float32(0.1))
    monkeypatch.setattr(single_image, "reconstruct", lambda *_: held)
    overlap, found, shapes, _ = single_image.reconstruction_table(small, run, 99)
    assert (found == truths).all() and (shapes == truths).all()
    assert overlap["encoder-decoder, filled as training shapes"] == 1
    assert overlap["encoder-decoder, above 0.5"] == 0
    assert voxel.mean_iou(found, shapes) == overlap.iloc[0]


def test_neighbours_are_training_shapes_that_no_one_validates_on(workspace, small):
    shelf = single_image.shelf_of(small)
    split = data.load_train(small.data)
    train = {g.tobytes() for g in data.model_grid(split.voxels[~split.validation], 24)}
    assert len(shelf.grids) == 12 and all(g.tobytes() in train for g in shelf.grids)


@pytest.mark.parametrize("model", single_image.MODELS)
def test_study_asks_for_joint_and_separate_models_and_lite_for_joint_ones(model):
    separate = [c for c in ikea.CATEGORIES if c not in single_image.ABSENT]
    assert sorted(config.load("study").wanted[model].categories) == sorted([*separate, "all"])
    assert config.load("lite").wanted[model].categories == ("all",)


# ---------------------------------------------------------------- the archive


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RAW", tmp_path / "raw")
    monkeypatch.setattr(paths, "WORKSPACE", tmp_path)
    return tmp_path / "raw"


def test_without_the_photographs_one_line_says_what_to_do(raw):
    with pytest.raises(StudyError, match="ikea.zip is missing; run `python -m lib fetch ikea`"):
        ikea.read()
    with pytest.raises(StudyError, match="no such file; give a copy of ikea.zip"):
        ikea.fetch(raw / "none.zip")
    assert not raw.exists()


def test_other_and_damaged_archives_are_refused(raw, tmp_path):
    (tmp_path / "text.zip").write_text("not an archive")
    with pytest.raises(StudyError, match="not a readable archive"):
        ikea.fetch(tmp_path / "text.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("IKEA/Lists/Images.txt", "a.jpg")
    with pytest.raises(StudyError, match="another file or a damaged one"):
        ikea.fetch(tmp_path / "other.zip")
    assert not raw.exists()


def test_the_archive_is_known_by_its_contents(raw, tmp_path, monkeypatch):
    """The same files in another folder, order and compression are the same data set."""
    files = {"IKEA/Lists/a.txt": b"1", "IKEA/Images/b.jpg": b"2"}
    for name, prefix, order in (("one.zip", "", 1), ("two.zip", "repo-b2a6df1/dataset/", -1)):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for path in list(files)[::order]:
                archive.writestr(prefix + path, files[path])
            archive.writestr(prefix + "IKEA/README.md", name)
    said = []
    for name in ("one.zip", "two.zip"):
        with pytest.raises(StudyError) as caught:
            ikea.fetch(tmp_path / name)
        said.append(str(caught.value).split(": ", 1)[1])
    assert said[0] == said[1]
    digest = hashlib.sha256()
    for path in sorted(files):
        own = hashlib.sha256(files[path]).digest()
        digest.update(path.removeprefix("IKEA/").encode() + b"\0" + own)
    monkeypatch.setattr(ikea, "CONTENT_SHA256", digest.hexdigest())
    assert ikea.fetch(tmp_path / "two.zip") == raw / "ikea.zip"
    (tmp_path / "one.zip").rename(tmp_path / "ikea.zip")
    assert ikea.fetch(tmp_path).read_bytes() == (tmp_path / "ikea.zip").read_bytes()


@pytest.fixture(scope="module")
def archive():
    path = Path(os.environ.get("IKEA", "data/raw/ikea.zip"))
    if not path.is_file():
        pytest.skip("IKEA names no copy of ikea.zip, and data/raw has none")
    return path.resolve()


def test_the_photographs_are_those_of_the_card(archive):
    found = ikea.read(archive)
    assert len(found.pictures) == len(found.model) == 937
    assert found.grids.shape == (43, 20, 20, 20) and found.grids.any((1, 2, 3)).all()
    counts = pd.Series(np.array(found.categories)[found.model]).value_counts().to_dict()
    assert counts == {
        "bookcase": 302, "chair": 227, "table": 195, "sofa": 158, "desk": 29, "bed": 26
    }  # fmt: skip
    assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 for p in found.pictures)
    # z is up: the widest layer of every table lies in the upper half of the object.
    for grid, category in zip(found.grids, found.categories, strict=True):
        if category == "table":
            layers = np.flatnonzero(grid.any((0, 1)))
            assert grid.sum((0, 1)).argmax() >= layers.mean()
