"""Table 6: which rows there are, what each protocol does, and what is said to be not valid."""

import dataclasses

import numpy as np
import pytest

from lib import config, data, evaluate_features, features, heldout, linear, report
from lib.evaluate_features import Row
from lib.train import runs

K = len(config.CATEGORIES)


@pytest.fixture(scope="module")
def task(workspace, smoke):
    return evaluate_features.task(smoke)


def told(task, strength, seed=0, width=40, **rest):
    """Features that tell the categories apart the better, the higher ``strength``."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(K, width))
    made = (
        strength * centres[split.labels] + generator.normal(size=(len(split.labels), width))
        for split in (task.train, task.test)
    )
    train, test = (x.astype(np.float32) for x in made)
    return Row(rest.pop("name", "told"), train, test, "made by hand", **rest)


@pytest.fixture(scope="module")
def found(task):
    rows = [
        told(task, 0.5, name="3DWINN", protocol=evaluate_features.PROTOCOLS["winn3d"]),
        told(
            task,
            0.5,
            name="3D DescriptorNet",
            protocol=evaluate_features.PROTOCOLS["desnet3d"],
            softmax=True,
            control="nothing",
        ),
        told(task, 0.0, name="nothing"),
        told(task, 3.0, name="everything", run_ids=("smoke-beyond-all-s0",)),
    ]
    return [evaluate_features.classify(task, row) for row in rows]


def test_what_is_kept_is_what_was_found(task, monkeypatch):
    row = told(task, 0.5, seed=3, protocol=evaluate_features.PROTOCOLS["desnet3d"], softmax=True)
    fresh, kept = evaluate_features.classify(task, row), evaluate_features.kept(task, row)
    monkeypatch.setattr(evaluate_features, "classify", None)  # not asked again
    for found in (kept, evaluate_features.kept(task, row)):
        np.testing.assert_equal(vars(found), vars(fresh))
        assert list(evaluate_features.table_rows(task, [found])) == list(
            evaluate_features.table_rows(task, [fresh])
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "moved"},
        {"test": "moved"},
        {"protocol": "raw, C as published"},
        {"softmax": True},
        {"run_ids": ("another",)},
    ],
)
def test_other_features_and_another_protocol_are_classified_anew(task, changes):
    row = told(task, 0.5, seed=4)
    other = {k: getattr(row, k) + 1e-6 if v == "moved" else v for k, v in changes.items()}
    keys = [evaluate_features._key(task, r) for r in (row, dataclasses.replace(row, **other), row)]
    assert keys[0] == keys[2] != keys[1]


def test_other_settings_are_classified_anew(task):
    row = told(task, 0.5, seed=4)
    profile = config.with_changes(task.profile, features={"draws": task.profile.features.draws + 1})
    where = dataclasses.replace(task, profile=profile)
    assert evaluate_features._key(where, row) != evaluate_features._key(task, row)


def by_name(found):
    return {row.row: row for row in found}


# ---------------------------------------------------------------- the task


def test_all_ten_categories_are_told_apart_whatever_the_profile_trains_on(task, smoke):
    assert len(smoke.categories) < K
    assert set(task.train.labels) == set(task.test.labels) == set(range(K))
    assert len(task.train.labels) == len(data.load_train(smoke.data).labels)
    assert set(task.fold) == set(range(smoke.features.folds))


def test_a_number_of_shapes_takes_the_first_of_every_category(workspace, smoke):
    few = config.with_changes(smoke, features={"n_train": 7})
    task = evaluate_features.task(few)
    assert np.bincount(task.train.labels).tolist() == [7] * K
    whole = data.load_train(smoke.data)
    for k in range(K):
        first = whole.ids[whole.labels == k][:7]
        assert (task.train.ids[task.train.labels == k] == first).all()
    assert len(task.test.labels) == len(heldout.load_test(smoke.data).labels)


def test_near_duplicates_are_one_group_and_others_alone():
    voxels = np.zeros((5, 30, 30, 30), bool)
    voxels[0, :10] = voxels[1, :10] = voxels[3, :10] = True
    voxels[3, 0, 0, 0] = False  # overlap above .95
    voxels[2, 20:] = voxels[4, 12:15] = True
    labels = np.zeros(5, int)
    duplicate = np.array([1, 1, 0, 0.99, 0.3], np.float32)
    split = data.Split(voxels, labels, labels, labels.astype(bool), duplicate)
    groups = evaluate_features.near_groups(split)
    assert groups[0] == groups[1] == groups[3]
    assert len({groups[0], groups[2], groups[4]}) == 3


def test_folds_keep_near_duplicates_together(workspace, smoke):
    """Every shape of the training split twice: both copies lie in one fold."""
    split = data.load_train(smoke.data)
    rows = np.arange(len(split.labels)).repeat(2)
    twice = split.where(rows)
    twice = dataclasses.replace(twice, duplicate=np.ones(len(rows), np.float32))
    groups = evaluate_features.near_groups(twice)
    fold = linear.folds(twice.labels, groups, 3, "test")
    assert (fold[::2] == fold[1::2]).all()


# ---------------------------------------------------------------- rows


def test_a_run_of_all_categories_goes_before_chairs_and_seeds_do_not_count(smoke, monkeypatch):
    def trained(*names):
        listed = [runs.Run.parse(f"smoke-{n}") for n in names]
        monkeypatch.setattr(evaluate_features.evaluate, "trained_runs", lambda profile: listed)
        return [r.id for r in evaluate_features.feature_runs(smoke)]

    assert trained("winn3d-chair-s0", "winn3d-all-s0") == ["smoke-winn3d-all-s0"]
    assert trained("winn3d-all-s0", "winn3d-chair-s0") == ["smoke-winn3d-all-s0"]
    assert trained("winn3d-chair-s0", "winn3d-toilet-s0") == ["smoke-winn3d-chair-s0"]
    assert trained("winn3d-toilet-s0", "winn3d-all-s1", "winn3d-chair-s1") == []
    # 3D-GAN's discriminator is stored for runs of all categories alone.
    assert trained("gan3d-chair-s0") == []
    assert trained("gan3d-chair-s0", "gan3d-all-s0") == ["smoke-gan3d-all-s0"]
    order = trained("beyond-all-s0", "gan3d-all-s0", "desnet3d-chair-s0")
    assert order == ["smoke-gan3d-all-s0", "smoke-desnet3d-chair-s0", "smoke-beyond-all-s0"]


@pytest.fixture
def chairs(workspace, smoke, checkpoints):
    """Our own run on chairs, trained and published, and taken away again."""
    import shutil

    run = runs.Run("smoke", "beyond", "chair", 0)
    runs.publish(run, runs.train(run, smoke, progress=False))
    yield run
    for folder in (run.weights, run.samples):
        shutil.rmtree(folder)


def test_a_run_of_chairs_is_named_so_and_its_stored_weights_are_used(task, smoke, chairs):
    rows = {r.name: r for r in evaluate_features.trained_rows(task)}
    assert list(rows) == [
        "ours (persistent chains) (chair only)",
        "ours (persistent chains) (chair only), layers",
    ]
    row = rows["ours (persistent chains) (chair only)"]
    assert row.run_ids == (chairs.id,) and row.note == "features trained on chair only"
    assert row.protocol is None and row.control == "untrained 3DWINN"
    assert rows["ours (persistent chains) (chair only), layers"].control == row.control + ", layers"
    several = rows["ours (persistent chains) (chair only), layers"]
    assert (several.test[:, -row.test.shape[1] :] == row.test).all()
    assert several.train.shape[1] > row.train.shape[1]
    network = features.load_network(chairs, smoke, "average")
    again = features.extract(features.winn3d_features, network, task.test.voxels[:5], 24)
    np.testing.assert_allclose(row.test[:5], again, atol=1e-5, rtol=1e-4)
    assert len(row.train) == len(task.train.labels)


def test_controls_are_named_and_none_has_a_paper(task, smoke):
    rows = list(evaluate_features.control_rows(task))
    assert [r.name for r in rows] == [
        "raw voxels",
        f"PCA-{smoke.features.pca} of the voxels",
        "untrained 3DWINN",
        "untrained 3DWINN, layers",
        "untrained 3D-GAN",
        "untrained 3D DescriptorNet",
        "untrained 3D-VAE",
    ]
    # DescriptorNet's own classifier meets its untrained network too, or no comparison is fair.
    assert [r.name for r in rows if r.softmax] == ["untrained 3D DescriptorNet"]
    assert all(r.protocol is None and not r.run_ids for r in rows)
    for row in rows:
        assert len(row.train) == len(task.train.labels) and len(row.test) == len(task.test.labels)
        assert row.train.shape[1] == row.test.shape[1] and np.isfinite(row.train).all()


# ---------------------------------------------------------------- protocols


def test_every_row_meets_every_protocol(found, smoke):
    common = [
        f"{scaling}, {how}"
        for scaling in linear.SCALINGS
        for how in ("C as published", "C by cross-validation")
    ]
    named = by_name(found)
    assert list(named["nothing"].answers) == common
    extra = ["logistic, C by cross-validation", "logistic, no penalty, last epoch"]
    assert list(named["3D DescriptorNet"].answers) == common + extra
    assert f"C = {smoke.features.c:g}" in named["nothing"].notes["raw, C as published"]


def test_a_paper_decides_its_row_and_cross_validation_the_others(found):
    named = by_name(found)
    assert named["3DWINN"].chosen == "raw, C as published"
    assert named["3D DescriptorNet"].chosen == "logistic, C by cross-validation"
    for name in ("nothing", "everything"):
        row = named[name]
        among = {p: v for p, v in row.validated.items() if p.endswith("by cross-validation")}
        assert row.validated[row.chosen] == max(among.values())


def test_good_features_score_and_noise_is_at_chance(task, found):
    named = by_name(found)
    accuracy = {
        name: (row.answers[row.chosen] == task.test.labels).mean() for name, row in named.items()
    }
    assert accuracy["everything"] > 0.95
    assert accuracy["nothing"] < 0.25
    assert evaluate_features.best(found).row == "everything"


def test_the_test_split_chooses_nothing(task, found):
    """Other labels of the test shapes change no answer and no choice, but of what is not valid."""
    labels = np.roll(task.test.labels, 1)
    other = dataclasses.replace(task, test=dataclasses.replace(task.test, labels=labels))
    protocol = "logistic, C by cross-validation"
    row = told(task, 0.5, name="3D DescriptorNet", protocol=protocol, softmax=True)
    a, b = evaluate_features.classify(task, row), evaluate_features.classify(other, row)
    assert a.chosen == b.chosen and a.validated == b.validated and a.notes == b.notes
    assert all((a.answers[p] == b.answers[p]).all() for p in a.answers)


def test_shares_of_the_labels(task, found, smoke):
    row = by_name(found)["everything"]
    assert list(row.shares) == list(smoke.features.shares)
    assert all(len(v) == smoke.features.draws for v in row.shares.values())
    again = evaluate_features.classify(task, told(task, 3.0)).shares
    assert all((again[s] == row.shares[s]).all() for s in again)
    curves = evaluate_features.share_curves(task, found).set_index(["row", "share"])
    full = (row.answers["standardised, C as published"] == task.test.labels).mean()
    assert curves.loc[("everything", 1.0), "value"] == full
    least = smoke.features.shares[0]
    assert curves.loc[("everything", least), "value"] == row.shares[least].mean()


def test_what_is_not_valid_is_never_below_the_honest_choice(task, found):
    claims = evaluate_features.invalid_claims(task, found)
    assert (claims["claimed"] >= claims["honest"]).all()
    assert (claims["inflated by"] > 0).any()
    at = claims.loc[("3D DescriptorNet", "logistic, best epoch on the test split")]
    assert at["choices"] == config.load("smoke").features.epochs
    assert len(claims) == len(found) * len(linear.SCALINGS) + 1


def test_against_a_control(task, found):
    compared = evaluate_features.against(task, found, "nothing")
    assert list(compared.index) == ["3DWINN", "3D DescriptorNet", "everything"]
    assert compared.loc["everything", "p"] < 0.01 and compared.loc["everything", "above"] > 0.5
    same = [dataclasses.replace(found[0], row="a"), dataclasses.replace(found[0], row="b")]
    assert evaluate_features.against(task, same, "b").loc["a", "p"] == 1


def test_both_sides_of_a_comparison_answer_by_one_protocol(task, found):
    """The paper's, of a row whose control cross-validation would classify otherwise."""
    named = by_name(found)
    compared = evaluate_features.against(task, found, "nothing")
    of = compared["protocol"].to_dict()
    assert of["3DWINN"] == "raw, C as published" != named["nothing"].chosen
    # The control has no logistic regression.
    assert of["3D DescriptorNet"] == of["everything"] == evaluate_features.CHOSEN

    def accuracy(name, protocol):
        return (named[name].answers[protocol] == task.test.labels).mean()

    for name, protocols in {
        "3DWINN": ["raw, C as published"] * 2,
        "3D DescriptorNet": [named["3D DescriptorNet"].svm, named["nothing"].svm],
    }.items():
        pair = [accuracy(n, p) for n, p in zip((name, "nothing"), protocols, strict=True)]
        assert compared.loc[name, "above"] == pytest.approx(pair[0] - pair[1], abs=1e-12)


def test_a_trained_row_meets_the_same_network_untrained(task, found):
    compared = evaluate_features.against(task, found)
    assert compared["control"].to_dict() == {"3D DescriptorNet": "nothing"}
    assert list(evaluate_features.against(task, found[:1]).columns) == list(compared.columns)


@pytest.mark.parametrize(
    "validated, said",
    [
        ([0.1, 0.3, 0.2], ""),
        ([0.3, 0.2, 0.1], ", the least tried"),
        ([0.1, 0.2, 0.3], ", the largest tried"),
        ([0.3, 0.3, 0.1], ""),  # flat: no promise beyond
        ([0.3], ", the least tried"),
    ],
)
def test_a_choice_on_the_edge_of_the_grid_is_marked(validated, said):
    found = evaluate_features.Found("row", "", (), notes={"raw": "C = 1"})
    evaluate_features._mark_edge(found, "raw", np.array(validated))
    assert found.edges == ["raw"] * bool(said) and found.notes["raw"] == f"C = 1{said}"


def test_choices_on_the_edge_are_named(task, smoke):
    """Of two values either is an edge."""
    one = config.with_changes(smoke, features={"relative_cs": [1e-6]})
    where = dataclasses.replace(task, profile=one)
    found = evaluate_features.classify(where, told(task, 0.5))
    assert found.edges == ["raw, C by cross-validation", "standardised, C by cross-validation"]
    said = evaluate_features.edges([found])
    assert said.startswith("2 of 2 choices lie on the edge of the grid")
    assert "told: linear SVM, raw features, C = 2.03e-08, the least tried" in said
    found.edges = []
    assert "2 in all, lies inside its grid" in evaluate_features.edges([found])


@pytest.mark.parametrize("name", ["quick", "lite", "study", "paper"])
def test_the_grids_of_c_span_what_features_need(name):
    settings = config.load(name).features
    assert settings.relative_cs[0] <= 0.1 and settings.relative_cs[-1] >= 1000
    assert len(settings.logistic_cs) >= 4


# ---------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def table(task, found, smoke):
    rows = list(evaluate_features.table_rows(task, found))
    ids = evaluate_features.run_ids(found)
    return report.table("unsupervised", smoke, rows, judge="", run_ids=ids)


def test_headlines_are_the_chosen_protocols(table, task, found):
    headline = table[table["headline"] == 1]
    assert headline["metric"].tolist() == ["accuracy"] * len(found)
    assert headline["row"].tolist() == [row.row for row in found]
    for row, value in zip(found, headline["value"], strict=True):
        right = (row.answers[row.chosen] == task.test.labels).mean()
        assert value == pytest.approx(right, abs=1e-5)
    assert (headline["low"] <= headline["value"]).all()
    assert (headline["value"] <= headline["high"]).all()
    assert headline.set_index("row").loc["everything", "run_ids"] == "smoke-beyond-all-s0"
    assert set(headline["n_samples"]) == {len(task.test.labels)}
    assert set(headline["n_reference"]) == {len(task.train.labels)}


def test_three_columns_count_their_shapes(task, found, smoke):
    duplicate = np.zeros(len(task.test.labels), np.float32)
    duplicate[:10], duplicate[10:30] = 1, 0.96
    test = dataclasses.replace(task.test, duplicate=duplicate)
    columns = evaluate_features.evaluate.test_columns(test)
    other = dataclasses.replace(task, test=test, columns=columns)
    rows = {r["metric"]: r for r in evaluate_features.table_rows(other, found[:1])}
    n = len(duplicate)
    right = found[0].answers[found[0].chosen] == test.labels
    for metric, first in (
        ("accuracy", 0),
        ("accuracy, exact duplicates removed", 10),
        ("accuracy, IoU .95 removed", 30),
    ):
        assert rows[metric]["n_samples"] == n - first
        assert rows[metric]["estimate"].value == right[first:].mean()


def test_what_is_not_valid_is_marked_and_no_headline(table):
    marked = table[table["metric"].str.startswith("not valid: ")]
    assert len(marked) and (marked["headline"] == 0).all()
    assert marked["note"].str.startswith("not valid: the best of ").all()
    others = table.drop(marked.index)
    assert not others["note"].str.contains("on the test split").any()


def test_published_figures_stand_beside_the_joint_rows_of_lite(task, found):
    """Table 6 tells all ten categories apart in profile lite too, where five are generated."""
    chairs = [dataclasses.replace(found[0], row="3DWINN (chair only)")]
    rows = list(evaluate_features.table_rows(task, [*found, *chairs]))
    lite = config.load("lite")
    made = report.table("unsupervised", lite, rows, judge="").query("headline == 1")
    published = made.set_index("row")["published"].to_dict()
    assert published["3DWINN"] == 0.919 and published["3D DescriptorNet"] == 0.924
    assert published["3DWINN (chair only)"] == published["everything"] == ""
    missing = made[made["value"] == ""]
    quoted = {"SPH", "LFD", "VConv-DAE", "3D-GAN, on ModelNet40"}
    assert set(missing["row"]) == {*quoted, "3D-GAN"}
    page = report.table_page(made.astype(str))
    assert "(paper 0.919)" in page and "judge" not in page
