"""The learning curve: nested parts, one budget for all, and points that are taken up again."""

import numpy as np
import pandas as pd
import pytest

from lib import config, data, learning_curve
from lib.errors import StudyError
from lib.train import engine


@pytest.fixture(scope="module")
def split(workspace, smoke):
    return data.load_train(smoke.data)


@pytest.fixture(scope="module")
def found(workspace, smoke):
    return learning_curve.measure(smoke)


def test_parts_are_nested_and_keep_the_validation_part_whole(split):
    small, large = (learning_curve.subset(split, s, seed=0) for s in (0.25, 0.5))
    assert set(small.ids) < set(large.ids) < set(split.ids)
    for part in (small, large):
        assert set(part.ids[part.validation]) == set(split.ids[split.validation])
    assert set(learning_curve.subset(split, 1.0, seed=0).ids) == set(split.ids)


def test_parts_hold_every_category_in_its_share(split):
    part = learning_curve.subset(split, 0.5, seed=0)
    for category in np.unique(split.labels):
        whole = (~split.validation & (split.labels == category)).sum()
        kept = (~part.validation & (part.labels == category)).sum()
        assert kept == max(1, round(0.5 * whole))
    tiny = learning_curve.subset(split, 1e-6, seed=0)
    assert set(tiny.labels[~tiny.validation]) == set(split.labels)


def test_another_seed_is_another_part(split):
    a, b = (learning_curve.subset(split, 0.5, seed=s) for s in (0, 1))
    assert set(a.ids) != set(b.ids)


def test_every_point_has_its_budget_and_an_interval(found, split, smoke):
    assert list(found["share"]) == list(smoke.learning_curve.shares)
    assert found["n"].iloc[-1] == (~split.validation).sum()
    assert ((found["low"] <= found["value"]) & (found["value"] <= found["high"])).all()
    assert found["validation"].between(0, 1).all()
    shown = smoke.learning_curve.steps * smoke.baseline.batch
    np.testing.assert_allclose(found["epochs"] * found["n"], shown)


def test_complete_points_are_not_trained_again(found, smoke, monkeypatch):
    def step(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr("lib.train.classifiers.ClassifierTask.step", step)
    pd.testing.assert_frame_equal(learning_curve.measure(smoke), found)


def test_all_points_take_as_many_steps(found, smoke, monkeypatch):
    seen = []
    fit = engine.fit

    def watched(task, *rest, **named):
        seen.append((task.n_steps, task.log_every))
        return fit(task, *rest, **named)

    monkeypatch.setattr(engine, "fit", watched)
    learning_curve.measure(smoke)
    assert set(seen) == {(smoke.learning_curve.steps, 1)} and len(seen) == len(found)


def test_words_state_the_worth_of_a_doubling():
    share = [0.25, 0.5, 1.0] * 2
    curve = pd.DataFrame(dict(share=share, value=[0.79, 0.95, 0.89, 0.81, 0.95, 0.91]))
    curve = curve.assign(low=curve["value"] - 0.03, high=curve["value"] + 0.03)
    curve = curve.assign(epochs=2 / curve["share"])
    assert "80.0% to 90.0%: +5.0 points a doubling" in learning_curve.in_words(curve)
    assert "apart" in learning_curve.in_words(curve)
    said = "Equal are the steps, not the epochs: 8.0 at 25%, 2.0 at 100%."
    assert learning_curve.in_words(curve).endswith(said)
    wide = curve.assign(low=curve["value"] - 0.05, high=curve["value"] + 0.05)
    assert "no gain" in learning_curve.in_words(wide)
    falling = curve.assign(share=1.25 - curve["share"])
    assert "no gain" in learning_curve.in_words(falling)
    assert "no curve" in learning_curve.in_words(curve[:1])


@pytest.mark.parametrize("shares", [[], [0.5, 0.5], [0.5, 1.1], [0.0, 1.0]])
def test_shares_that_make_no_curve_are_refused(smoke, shares):
    with pytest.raises(StudyError, match="learning_curve.shares must rise"):
        config.with_changes(smoke, learning_curve={"shares": shares})
