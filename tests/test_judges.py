"""Several judges: what they agree on, counted by hand."""

import dataclasses
import math

import pandas as pd
import pytest
import torch

from lib import config, evaluate, judges, report
from lib.errors import StudyError
from lib.train import runs


@pytest.fixture(scope="module")
def two(workspace, smoke, smoke_judge):
    """The smoke judge, and another network of the same shape with other weights."""
    first = evaluate.load_judge(smoke)
    other = evaluate.load_judge(smoke).network
    torch.manual_seed(1)
    for value in other.parameters():
        value.data += 0.05 * torch.randn_like(value)
    return [first, evaluate.Judge(1, "other", other.eval())]


@pytest.fixture(scope="module")
def found(two, smoke, smoke_chair):
    return judges.verdicts(smoke, two)


def test_the_first_judge_says_what_the_generation_tables_say(found, two, smoke):
    gallery = evaluate.look_at_everything(smoke, two[0])
    own = found[found["judge"] == 0].set_index(["metric", "row", "category"])
    for row in evaluate.distance_rows(gallery, "kid"):
        if row["metric"] == "kid" and row["headline"] and row["row"] not in gallery.variants:
            cell = own.loc[("kid", row["row"], row["category"])]
            assert tuple(cell[["value", "low", "high"]]) == tuple(row["estimate"])
    assert set(found["metric"]) == set(judges.METRICS)
    assert not any("above" in row for row in found["row"])
    other = found[found["judge"] == 1].set_index(["metric", "row", "category"])
    assert (own["n"] == other["n"]).all() and not own["value"].equals(other["value"])


def made(values: dict[str, list[tuple[float, float, float]]]) -> pd.DataFrame:
    """Verdicts on one metric and category: row -> (value, low, high) of each judge."""
    return pd.DataFrame(
        [
            dict(metric="kid", row=row, category="chair", judge=k, n=9)
            | dict(zip(("value", "low", "high"), cell, strict=True))
            for row, cells in values.items()
            for k, cell in enumerate(cells)
        ]
    )


HAND = made(
    {
        "real test": [(0, 0, 0), (9, 9, 9)],
        "a": [(1.0, 0.8, 1.2), (1.0, 0.8, 1.2)],
        "b": [(2.0, 1.5, 2.5), (0.5, 0.4, 0.6)],  # settled against a, and turned
        "c": [(2.2, 1.9, 2.6), (3.0, 2.9, 3.1)],  # touches b, alike; settled against a, alike
    }
)


def test_pairs_and_agreement_by_hand():
    cells = judges.pairs(HAND).set_index(["a", "b"])
    assert cells["alike"].to_dict() == {("a", "b"): False, ("a", "c"): True, ("b", "c"): True}
    assert cells["settled"].to_dict() == {("a", "b"): True, ("a", "c"): True, ("b", "c"): False}
    line = judges.agreement(HAND).loc["kid"]
    assert line[:4].to_dict() == {"pairs": 3, "alike": 2, "settled": 2, "settled and alike": 1}
    assert line["tau"] == pytest.approx(1 / 3)  # one of three pairs turned: (2 - 1) / 3
    words = judges.in_words(HAND)
    assert "2 of 3 pairs" in words and "1 of the 2" in words and "0.33" in words


def test_turned_pairs_come_with_the_values_of_all_judges():
    (line,) = judges.turned(HAND, "kid").to_dict("records")
    assert (line["a"], line["b"]) == ("a", "b")
    assert (line["values of a"], line["values of b"]) == ("1 1", "2 0.5")


def test_one_judge_has_no_spread():
    alone = HAND[HAND["judge"] == 0]
    assert math.isnan(judges.agreement(alone).loc["kid", "tau"])
    assert judges.pairs(alone)["alike"].all()
    assert "no spread" in judges.in_words(alone)


def test_the_table_has_one_row_a_key_and_the_mean_accuracy(found, two, smoke):
    accuracy = list(judges.accuracy_rows(smoke, two))
    table = report.table("judges", smoke, [*accuracy, *judges.table_rows(found)], judge="two")
    cells = table.set_index(["row", "metric"])["value"]
    one, other = (cells[judges.JUDGE, f"accuracy, judge {s}"] for s in (0, 1))
    assert cells[judges.JUDGE, "accuracy"] == pytest.approx((one + other) / 2, abs=1e-5)
    share = cells[judges.PAIRS, "kid, ordered alike, all pairs"]
    assert share == pytest.approx(judges.pairs(found).query("metric == 'kid'")["alike"].mean())
    assert [r["n_seeds"] for r in accuracy].count(2) == 3
    assert [r["metric"] for r in judges.accuracy_rows(smoke, two[:1])] == [
        "accuracy, judge 0",
        "accuracy, exact duplicates removed, judge 0",
        "accuracy, IoU .95 removed, judge 0",
    ]


def test_all_judges_asked_for_must_be_there(workspace, smoke, smoke_judge, monkeypatch):
    assert [j.seed for j in judges.load_judges(smoke)] == [0]
    wanted = smoke.wanted | {"judge": dataclasses.replace(smoke.wanted["judge"], seeds=(0, 3))}
    asked = dataclasses.replace(smoke, wanted=wanted)
    monkeypatch.setattr(config, "load", lambda name: asked)
    missing = runs.Run("smoke", "judge", "all", 3).id
    with pytest.raises(StudyError, match=missing):
        judges.load_judges(smoke)
