"""The judge at work: what it sees, how sets are compared, which rows a table gets."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from lib import config, data, evaluate, files, heldout, metrics, report
from lib.errors import StudyError
from lib.train import runs


@pytest.fixture(scope="module")
def judge(workspace, smoke, smoke_judge):
    return evaluate.load_judge(smoke)


@pytest.fixture(scope="module")
def gallery(workspace, smoke, judge, smoke_chair, smoke_toilet):
    return evaluate.look_at_everything(smoke, judge)


@pytest.fixture(scope="module")
def tables(gallery):
    return evaluate.generation_tables(gallery)


# ---------------------------------------------------------------- the judge


def test_what_the_judge_sees_does_not_depend_on_the_batch(judge, smoke):
    grids = heldout.load_test(smoke.data).voxels[:40]
    whole, pieces = judge.see(grids), judge.see(grids, batch=7)
    np.testing.assert_allclose(pieces.features, whole.features, atol=1e-4)
    np.testing.assert_allclose(pieces.probabilities, whole.probabilities, atol=1e-5)
    backwards = judge.see(grids[::-1])
    np.testing.assert_allclose(backwards.probabilities[::-1], whole.probabilities, atol=1e-5)
    assert whole.features.shape == (40, judge.network.n_features)
    assert whole.features.dtype == np.float32 and whole.probabilities.dtype == np.float64
    np.testing.assert_allclose(whole.probabilities.sum(1), 1, rtol=1e-12)


def test_the_judge_is_at_rest_and_known_by_its_weights(judge, smoke, smoke_judge):
    assert not judge.network.training
    assert evaluate.load_judge(smoke).hash == judge.hash and len(judge.hash) == 12
    assert all(torch.isfinite(p).all() for p in judge.network.parameters())


def test_a_judge_that_is_not_there(workspace, smoke):
    with pytest.raises(StudyError, match="the judge smoke-judge-all-s7 is not in results") as error:
        evaluate.load_judge(smoke, seed=7)
    assert "\n" not in str(error.value)


def test_accuracy_columns(judge, smoke, monkeypatch):
    test = heldout.load_test(smoke.data)
    duplicate = np.zeros(len(test.labels), np.float32)
    duplicate[:10], duplicate[10:30] = 1, 0.96
    changed = data.Split(test.voxels, test.labels, test.ids, test.validation, duplicate)
    monkeypatch.setattr(heldout, "load_test", lambda settings: changed)
    right = judge.see(test.voxels).probabilities.argmax(1) == test.labels
    found = evaluate.accuracy_columns(judge, smoke)
    assert found == {
        "all": (right.sum(), 120),
        "exact duplicates removed": (right[10:].sum(), 110),
        "IoU .95 removed": (right[30:].sum(), 90),
    }


# ---------------------------------------------------------------- comparing two sets


def test_compare_draws_equal_numbers(smoke):
    sizes = []

    def statistic(a, b):
        sizes.append((len(a), len(b)))
        return 1.0

    settings = smoke.evaluation
    found, n = evaluate.compare(
        statistic, np.zeros((30, 2)), np.zeros((16, 2)), False, settings, "t"
    )
    assert n == settings.n_equal and set(sizes) == {(n, n)} and found.value == 1
    _, n = evaluate.compare(statistic, np.zeros((30, 2)), np.zeros((4, 2)), False, settings, "t")
    assert n == 4 and sizes[-1] == (4, 4)


def test_one_pool_is_cut_in_disjoint_halves(smoke):
    pool = np.arange(15.0)[:, None]
    drawn = []

    def statistic(a, b):
        assert len(a) == len(b) == 7
        assert not set(a[:, 0]) & set(b[:, 0])
        drawn.append(tuple(a[:, 0]))
        return float(a.mean() - b.mean())

    found, n = evaluate.compare(statistic, pool, pool, True, smoke.evaluation, "halves")
    assert n == 7 and len(set(drawn)) == smoke.evaluation.n_draws
    assert found.low <= found.value <= found.high


def test_comparisons_repeat_and_are_named_by_their_key(smoke):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 3)), rng.normal(size=(30, 3))

    def draw(*key):
        return evaluate.compare(
            lambda x, y: float(x.mean() - y.mean()), a, b, False, smoke.evaluation, *key
        )

    assert draw("a", 1) == draw("a", 1) != draw("a", 2)


def test_distances_of_swapped_sets_are_equal(smoke):
    """Both distances are symmetric; the draws of each side differ, so all shapes are used."""
    settings = config.with_changes(smoke, evaluation={"n_equal": 16}).evaluation
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(16, 5)), rng.normal(1, 2, size=(16, 5))
    for statistic in (metrics.frechet_distance, metrics.kernel_distance):
        there, n = evaluate.compare(statistic, a, b, False, settings, "swap")
        back, m = evaluate.compare(statistic, b, a, False, settings, "swap")
        assert n == m == 16
        np.testing.assert_allclose(there, back, rtol=1e-6)


# ---------------------------------------------------------------- tables


def test_the_rows_of_the_gallery(gallery, smoke, smoke_chair, smoke_toilet):
    assert set(gallery.seen) == {*evaluate.ANCHORS, "3D-GAN", "3D-GAN, above 0.1"}
    assert all(set(seen) == set(smoke.categories) for seen in gallery.seen.values())
    assert gallery.runs == dict.fromkeys(
        ["3D-GAN", "3D-GAN, above 0.1"], [smoke_chair.id, smoke_toilet.id]
    )
    assert gallery.variants == {"3D-GAN, above 0.1": ("3D-GAN", 0.1)}


@pytest.mark.parametrize("name", ["inception", "fid", "kid", "class_probability"])
def test_every_table_has_one_row_a_key(tables, name, smoke, judge, gallery):
    more = dict(run_ids=gallery.runs, variants=gallery.variants)
    found = report.table(name, smoke, tables[name], judge=judge.hash, **more)
    assert list(found.columns) == report.COLUMNS
    assert not found.duplicated(report.KEY).any()
    assert set(found["row"]) == {*evaluate.ANCHORS, "3D-GAN"}
    values = found[["value", "low", "high"]].astype(float)
    assert (values["low"] <= values["value"]).all() and (values["value"] <= values["high"]).all()
    ours = found[found["row"] == "3D-GAN"]
    assert set(ours["threshold"]) == {0.5, 0.1}
    assert (ours[ours["threshold"] == 0.1]["headline"] == 0).all()
    assert (ours["run_ids"] != "").all() and (ours["n_seeds"] == 1).all()
    assert (found[found["row"] != "3D-GAN"]["run_ids"] == "").all()


def test_the_tables_repeat(gallery, tables):
    again = evaluate.generation_tables(gallery)
    assert again == tables


def test_distances_of_real_shapes_against_themselves(tables, smoke):
    for name in ("fid", "kid"):
        rows = {(r["row"], r["category"], r["reference"], r["metric"]): r for r in tables[name]}
        halves = rows.get(("real train", "chair", "train", name))
        assert halves["note"] == "two random halves of one pool"
        assert halves["n_samples"] == smoke.evaluation.n_equal
        assert rows["real train", "chair", "test", f"{name} excess"]["estimate"].value == 0
        excess = rows["noise", "chair", "test", f"{name} excess"]["estimate"].value
        own = rows["noise", "chair", "test", name]["estimate"].value
        floor = rows["real train", "chair", "test", name]["estimate"].value
        assert excess == pytest.approx(own - floor)


def test_no_frechet_distance_of_few_shapes(tables, smoke):
    """Halves of twelve test chairs are below the common n: FID stays empty, KID does not."""

    def cells(name):
        return {(r["row"], r["reference"]) for r in tables[name] if r["metric"] == name}

    assert ("real test", "test") not in cells("fid")
    assert ("real test", "test") in cells("kid")
    assert ("real test", "train") in cells("fid")
    assert all(r["n_samples"] == smoke.evaluation.n_equal for r in tables["fid"])


def test_headlines_are_against_the_test_split(tables):
    for name in ("fid", "kid"):
        assert {r["reference"] for r in tables[name] if r["headline"]} == {"test"}
        assert {r["metric"] for r in tables[name] if r["headline"]} == {name}
    assert {r["metric"] for r in tables["inception"] if r["headline"]} == {"inception score"}


def test_class_probability_of_real_test_shapes_is_all_of_itself(tables, judge, smoke):
    rows = {
        (r["row"], r["category"], r["metric"]): r["estimate"] for r in tables["class_probability"]
    }
    for category in smoke.categories:
        grids = heldout.reference(smoke.data, category).voxels
        label = config.CATEGORIES.index(category)
        mean = judge.see(grids).probabilities[:, label].mean()
        found = rows["real test", category, "class probability"]
        assert found.low - 1e-9 <= mean <= found.high + 1e-9
        share = rows["real test", category, "fraction of real test"]
        assert share.value == pytest.approx(found.value / mean)


def test_a_row_that_lacks_a_category_has_no_inception_score(gallery, smoke):
    partial = evaluate.Gallery(smoke, gallery.judge, dict(gallery.seen))
    partial.seen["3D-GAN"] = {"chair": gallery.seen["3D-GAN"]["chair"]}
    rows = {r["row"] for r in evaluate.inception_rows(partial)}
    assert "3D-GAN" not in rows and "3D-GAN, above 0.1" in rows
    scores = [r["estimate"].value for r in evaluate.inception_rows(partial)]
    assert all(1 - 1e-9 <= s <= 10 for s in scores)


def test_a_second_seed_changes_no_table_and_no_figure(gallery, smoke, smoke_chair, monkeypatch):
    other = dataclasses.replace(smoke_chair, seed=1)
    monkeypatch.setattr(evaluate, "trained_runs", lambda profile: [smoke_chair, other])
    assert evaluate.judged_runs(smoke) == [smoke_chair]
    shown = evaluate.first_shapes(smoke, 2)["chair"]["3D-GAN, above 0.1"]
    np.testing.assert_array_equal(shown, evaluate.load_samples(smoke_chair, 0.1)[:2])
    assert len(list(evaluate.nearest_in_features(gallery, 2))) == 2


# ---------------------------------------------------------------- foreign sample files


def test_evaluate_file(workspace, smoke, smoke_judge, smoke_chair):
    voxels = evaluate.load_samples(smoke_chair, 0.5)
    assert voxels.shape == (16, 24, 24, 24)
    grids = evaluate.to_judge(smoke, voxels, "tight")
    found = evaluate.evaluate_file(smoke, grids, "chair")
    again = evaluate.evaluate_file(smoke, grids, "chair")
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(again))
    assert (found["n"], found["profile"], found["category"]) == (16, "smoke", "chair")
    assert 0 <= found["mean occupancy"] <= 1
    p, share = found["class probability"], found["fraction of real test"]
    assert 0 <= p["low"] <= p["value"] <= p["high"] <= 1 and p["n"] == 16
    assert p["value"] / share["value"] == pytest.approx(p["high"] / share["high"])
    for name in ("fid test", "fid train", "kid test", "kid train"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
        assert found[name]["n"] == 10
    best = found["real train"]
    assert set(best) == {"fid test", "kid test"} and best["fid test"]["n"] == 10
    assert best["fid test"]["value"] < found["fid test"]["value"]
    assert found["mean occupancy"] == pytest.approx(voxels.mean() * 24**3 / 30**3)


def test_a_shape_is_the_same_at_24_and_padded_to_32(workspace, smoke, smoke_judge):
    shapes = data.load_train(smoke.data).category("toilet").voxels[:12]
    tight = evaluate.to_judge(smoke, data.model_grid(shapes, 24), "tight")
    padded = evaluate.to_judge(smoke, data.model_grid(shapes, 32), "padded")
    assert np.array_equal(tight, padded)


def test_a_file_taken_whole_has_no_interval_and_stays_json(workspace, smoke, smoke_judge):
    """Twelve shapes against twelve test shapes: one subset only, and NaN is not JSON."""
    every = config.with_changes(smoke, evaluation={"n_equal": 12}, device={"threads": 1})
    shapes = data.load_train(smoke.data).category("chair").voxels[:12]
    found = evaluate.evaluate_file(every, evaluate.to_judge(every, shapes, "padded"), "chair")
    assert found["kid test"]["low"] is None and found["kid test"]["high"] is None
    assert found["kid train"]["low"] <= found["kid train"]["value"]
    json.dumps(found, allow_nan=False)


def test_training_shapes_are_recognised_as_copies(workspace, smoke, smoke_judge):
    shapes = data.load_train(smoke.data).category("chair").voxels[:12]
    found = evaluate.evaluate_file(smoke, shapes, "chair")
    assert found["memorisation"]["share_95"] == 1
    assert found["memorisation"]["auc"] > 0.9


@pytest.mark.parametrize(
    "shape, category, layout, said",
    [
        ((4, 24, 24, 24), "lamp", "tight", "no category 'lamp' in profile smoke; choose one of"),
        ((4, 24, 24, 24), "bed", "tight", "no category 'bed' in profile smoke"),
        ((1, 24, 24, 24), "chair", "tight", "1 shapes: distances need at least 2"),
        ((4, 17, 17, 17), "chair", "tight", "grids of side 17 cannot be judged"),
        ((4, 24, 24, 24), "chair", "loose", "layout 'loose' is unknown"),
    ],
)
def test_files_that_cannot_be_judged(workspace, smoke, smoke_judge, shape, category, layout, said):
    with pytest.raises(StudyError, match=said) as error:
        grids = evaluate.to_judge(smoke, np.zeros(shape, bool), layout)
        evaluate.evaluate_file(smoke, grids, category)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- models of all categories


def test_joint_models_have_inception_rows_and_shares_of_their_own(gallery, smoke):
    joint = dataclasses.replace(gallery, joint={}, runs=dict(gallery.runs))
    sure = np.zeros((30, 10))
    sure[np.arange(30), np.repeat([2, 9], [20, 10])] = 1
    joint.joint["3DWINN-joint-single"] = evaluate.Seen(np.zeros((30, 1), np.float32), sure)
    rows = {r["row"]: r for r in evaluate.inception_rows(joint) if r["headline"]}
    found = rows["3DWINN-joint-single"]
    assert found["category"] == "all" and found["n_samples"] == 20
    assert 1.5 < found["estimate"].value <= 2.0
    shares = evaluate.category_shares(joint)
    assert shares["3DWINN-joint-single"][[2, 9]].tolist() == [20 / 30, 10 / 30]
    labels = data.load_train(smoke.data).labels
    assert shares["training split"].tolist() == [np.mean(labels == k) for k in range(10)]


def test_a_row_of_fewer_shapes_has_fewer_splits_not_smaller_ones(gallery, smoke):
    """The score of a split grows with its size, so rows of other sizes could not be compared."""
    settings, joint = smoke.evaluation, dataclasses.replace(gallery, joint={})
    per_split = settings.n_equal * len(smoke.categories) // settings.n_splits
    for n in (per_split - 1, per_split, 2 * per_split - 1, settings.n_splits * per_split):
        joint.joint[f"{n}"] = evaluate.Seen(np.zeros((n, 1), np.float32), np.eye(10)[[2] * n])
    notes = {r["row"]: r["note"] for r in evaluate.inception_rows(joint) if r["headline"]}
    splits = [
        int(notes[f"{len(s.features)}"].split("; ")[1].split()[0]) for s in joint.joint.values()
    ]
    assert splits == [1, 1, 1, settings.n_splits] and settings.n_splits > 1


def test_pooled_rows_have_the_papers_name():
    assert evaluate.pooled_name("3DWINN") == "3DWINN-separate-multi"
    assert evaluate.pooled_name("3D-GAN, above 0.1") == "3D-GAN, above 0.1"
    assert evaluate.pooled_name("3DWINN, above 0.1") == "3DWINN-separate-multi, above 0.1"


def test_costs_are_those_that_runs_recorded(gallery, smoke, smoke_chair):
    assert list(evaluate.cost_rows(smoke)) == []
    path = smoke_chair.samples / "run.json"
    facts = files.read_json(path)
    files.write_json(path, facts | {"hours": 0.5, "seconds per sample": 0.25, "device": "a CPU"})
    try:
        rows = list(evaluate.cost_rows(smoke))
    finally:
        files.write_json(path, facts)
    assert [(r["metric"], r["estimate"].value) for r in rows] == [
        ("training hours", 0.5),
        ("seconds per sample", 0.25),
    ]
    page = report.table_page(report.table("cost", smoke, rows, judge=""))
    assert "0.500" in page and "As measured on: a CPU." in page


def test_a_joint_run_has_its_cost_in_a_row_of_its_own(smoke, monkeypatch):
    run = runs.Run("smoke", "winn3d", "all", 0)
    monkeypatch.setattr(evaluate, "judged_runs", lambda profile: [])
    monkeypatch.setattr(evaluate, "joint_runs", lambda profile: [run])
    facts = {"hours": 0.5, "seconds per sample": 0.25, "device": "a CPU"}
    monkeypatch.setattr(evaluate.files, "read_json", lambda path: facts)
    rows = [(r["row"], r["category"], r["estimate"].value) for r in evaluate.cost_rows(smoke)]
    assert rows == [("3DWINN-joint-single", "all", 0.5), ("3DWINN-joint-single", "all", 0.25)]


def test_shares_by_frequency_follow_the_training_split(gallery, smoke):
    """Answers that are sure make the score the exponential of the mixture's entropy."""
    sure = {c: np.eye(10)[[k] * 8] for k, c in enumerate(smoke.categories)}
    counts = {"chair": 40, smoke.categories[1]: 10}
    assert set(counts) == set(smoke.categories)
    seen = {
        "real train": {
            c: evaluate.Seen(np.zeros((n, 1)), sure[c][:1].repeat(n, 0)) for c, n in counts.items()
        },
        "sure": {c: evaluate.Seen(np.zeros((8, 1)), p) for c, p in sure.items()},
    }
    found = {
        r["metric"]: r
        for r in evaluate.inception_rows(dataclasses.replace(gallery, seen=seen, joint={}))
        if r["row"] == "sure"
    }
    by_frequency = found["inception score, by frequency, one split"]
    assert by_frequency["n_samples"] == 8 + 2 and by_frequency["headline"] == 0
    p = np.array([0.8, 0.2])
    assert by_frequency["estimate"].value == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert found["inception score, one split"]["estimate"].value == pytest.approx(2)
