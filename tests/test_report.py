"""Tables: one row a key, published figures beside ours, empty where nothing was run."""

import math
import subprocess

import numpy as np
import pandas as pd
import pytest

from lib import config, data, report
from lib.errors import StudyError
from lib.metrics import Estimate


def row(name="3D-GAN", category="chair", metric="class probability", value=0.9, **changes):
    found = dict(row=name, category=category, metric=metric, headline=1, reference="")
    found |= dict(n_samples=50, n_reference="", note="")
    return found | {"estimate": Estimate(value, value - 0.1, value + 0.1)} | changes


def table(rows, profile="study", name="class_probability", **options):
    return report.table(name, config.load(profile), rows, judge="abc", **options)


def test_two_rows_of_one_key_are_refused():
    with pytest.raises(
        StudyError, match="table class_probability: two rows for .*'chair'"
    ) as error:
        table([row(), row(value=0.8)])
    assert "\n" not in str(error.value)
    assert len(table([row(), row(metric="other")], profile="quick")) == 2


def test_published_figures_stand_beside_headlines_of_real_data():
    found = table([row(), row(metric="fraction of real test", headline=0)])
    ours = found[found["row"] == "3D-GAN"].set_index(["category", "metric"])
    chair = ours.loc[("chair", "class probability")]
    assert (chair["published"], chair["value"], chair["low"]) == (0.97, 0.9, 0.8)
    assert ours.loc[("chair", "fraction of real test"), "published"] == ""


def test_published_cells_that_were_not_run_stay_with_an_empty_value():
    found = table([row()])
    bed = found[(found["row"] == "3D-GAN") & (found["category"] == "bed")].iloc[0]
    assert (bed["published"], bed["value"], bed["note"]) == (0.7775, "", "not run in this profile")
    quoted = report.published().query("table == 'class_probability'")
    assert len(found) == len(quoted)
    assert not found.duplicated(report.KEY).any()


def test_a_profile_of_five_categories_quotes_five():
    found = table([row()], profile="lite")
    assert set(found["category"]) <= {*config.load("lite").categories, "all"}


def test_procedural_shapes_have_no_published_figures():
    found = table([row()], profile="quick")
    assert len(found) == 1 and found["published"].tolist() == [""]


def test_a_table_with_no_rows_holds_the_published_figures():
    found = table([], name="inception")
    assert (found["value"] == "").all() and 8.66 in found["published"].tolist()


def test_runs_behind_a_row_are_those_of_its_category():
    ids = {"3D-GAN": ["study-gan3d-chair-s0", "study-gan3d-bed-s0"]}
    rows = [row(), row(category="bed"), row(category="all"), row("noise")]
    found = table(rows, profile="quick", run_ids=ids)
    assert found["run_ids"].tolist() == [
        "study-gan3d-chair-s0",
        "study-gan3d-bed-s0",
        "study-gan3d-chair-s0 study-gan3d-bed-s0",
        "",
    ]
    assert found["n_seeds"].tolist() == [1, 1, 1, ""]


def test_rows_may_state_their_seeds():
    found = table([row(n_seeds=3), row("noise")], profile="quick")
    assert found["n_seeds"].tolist() == [3, ""]


def test_numbers_are_rounded_and_absence_is_empty():
    found = table([row(estimate=Estimate(1 / 3, math.nan, math.nan))], profile="quick").iloc[0]
    assert (found["value"], found["low"], found["high"]) == (0.333333, "", "")


def test_the_published_figures_are_those_of_the_paper():
    quoted = report.published()
    assert not quoted.duplicated(["table", "row", "category", "metric"]).any()
    assert quoted["source"].str.len().min() > 0
    cells = {(q.table, q.row, q.category): q.published for q in quoted.itertuples()}
    assert cells["inception", "3D-GAN", "all"] == 8.66
    assert cells["fid", "3D-GAN", "chair"] == 469
    assert cells["fid", "3D-GAN", "desk"] == 651
    assert ("fid", "3D-GAN", "bed") not in cells
    gan = [v for (t, r, c), v in cells.items() if (t, r) == ("class_probability", "3D-GAN")]
    assert len(gan) == 10 and np.mean(gan) == pytest.approx(0.743, abs=5e-4)
    assert set(quoted["category"]) <= {*config.CATEGORIES, "all"}


# ---------------------------------------------------------------- files and pages


@pytest.fixture
def written(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(report.paths, "results", lambda profile: tmp_path / profile)
    rows = [row(), row("noise", value=0.1), row(category="bed", value=0.5)]
    report.write_table(table(rows), "study", "20_generation", "class_probability")
    return tmp_path / "study"


def test_tables_are_read_as_written(written):
    found = report.read_tables(written / "tables")
    assert list(found.columns) == report.COLUMNS
    assert found.iloc[0][["value", "published", "note"]].tolist() == ["0.9", "0.97", ""]
    assert (found["table"] == "class_probability").all()


@pytest.mark.parametrize("make", [True, False])
def test_no_tables(tmp_path, make):
    if make:
        (tmp_path / "tables").mkdir()
    with pytest.raises(StudyError, match="tables holds no table; run 20_generation first") as error:
        report.read_tables(tmp_path / "tables")
    assert "\n" not in str(error.value)


def test_wide(written):
    found = report.read_tables(written / "tables")
    wide = report.wide(found, "class probability")
    assert wide.loc["3D-GAN", "chair"] == "0.900 [0.800, 1.000] (paper 0.970)"
    assert wide.loc["noise", "chair"] == "0.100 [0.000, 0.200]"
    assert wide.loc["noise", "bed"] == ""
    assert wide.loc["3D-GAN", "desk"].strip() == "(paper 0.794)"
    with pytest.raises(StudyError, match="no rows of metric 'nonsense' against 'test'"):
        report.wide(found, "nonsense", "test")


def test_wide_keeps_references_apart():
    rows = [row(metric="kid", reference=r, value=v) for r, v in (("test", 0.5), ("train", 0.25))]
    found = table(rows, profile="quick", name="kid").astype(str)
    assert report.wide(found, "kid", "test").loc["3D-GAN", "chair"].startswith("0.500")
    assert report.wide(found, "kid", "train").loc["3D-GAN", "chair"].startswith("0.250")


def test_markdown():
    frame = pd.DataFrame({"a": ["1", "2"], "b": ["", "x"]}, index=["r", "s"])
    frame.index.name = "m"
    assert (
        report.markdown(frame)
        == "| m | a | b |\n| --- | --- | --- |\n| r | 1 |  |\n| s | 2 | x |\n"
    )


@pytest.mark.parametrize("name", ["study kid", "smoke class_probability"])
def test_a_block_without_results_is_left_empty(written, name):
    report.write_report(config.load("study"))
    full, empty = (
        f"<!-- table: {shown} -->\n<!-- end -->" for shown in ("study class_probability", name)
    )
    assert "(paper 0.970)" in report.readme_tables(full)
    assert report.readme_tables(empty) == empty


def test_the_report_joins_and_repeats(written):
    found = report.write_report(config.load("study"))
    csv = (written / "report" / "results.csv").read_bytes()
    page = (written / "report" / "tables.md").read_text()
    assert len(pd.read_csv(written / "report" / "results.csv")) == len(found)
    assert "# Tables of profile study" in page and "Table 4 of 3DWINN" in page
    assert "0.900 [0.800, 1.000] (paper 0.970)" in page and "n = 50" in page
    report.write_report(config.load("study"))
    assert (written / "report" / "results.csv").read_bytes() == csv
    assert (written / "report" / "tables.md").read_text() == page


def test_beating_an_anchor_needs_intervals_apart():
    def cell(name, low, high):
        return row(
            name, metric="kid", reference="test", estimate=Estimate((low + high) / 2, low, high)
        )

    rows = [
        cell("3D-GAN", 2, 3),
        cell("noise", 5, 6),
        cell("Bernoulli", 2.5, 4),
        cell("real train", 0, 1),
    ]
    found = table(rows, "quick", "kid", run_ids={"3D-GAN": ["quick-gan3d-chair-s0"]}).astype(str)
    line = report.against_anchors(found).loc[("3D-GAN", "chair")]
    assert line["below noise"] == "yes"
    assert line["below Bernoulli"] == "undecided"
    assert line["below real train"] == "no"
    assert line["below PCA-Gaussian"] == ""


def test_orders_of_the_papers_need_intervals_apart():
    def fid(name, low, high, **other):
        found = Estimate((low + high) / 2, low, high)
        return row(name, metric="fid", reference="test", estimate=found) | other

    rows = [
        fid("3DWINN", 2, 3),  # 225 in the paper
        fid("3D DescriptorNet", 2.5, 4),  # 490
        fid("3D-GAN", 0, 1),  # 469
        fid("loose", 5, 6),
        fid("3D-VAE", 7, 8),  # no figure in this table
        fid("3D-GAN", 9, 10, n_samples=7, headline=0),  # another n is another quantity
    ]
    runs = {r["row"]: [f"study-{r['row']}-chair-s0"] for r in rows}
    found = table(rows, "study", "fid", run_ids=runs, variants={"loose": ("3D-GAN", 0.1)})
    orders = report.against_papers(found.astype(str)).loc[("fid", "chair")]
    verdicts = {
        (line.better.split(" (")[0], line.than.split(" (")[0]): line.here
        for line in orders.rename(columns={"better in the paper": "better"}).itertuples()
    }
    assert verdicts == {
        ("3DWINN", "3D DescriptorNet"): "undecided",
        ("3DWINN", "3D-GAN"): "no",
        ("3DWINN", "3D-GAN, above 0.1"): "yes",
        ("3D-GAN", "3D DescriptorNet"): "yes",
        ("3D-GAN, above 0.1", "3D DescriptorNet"): "no",
    }


def test_of_probabilities_the_higher_is_the_better():
    rows = [  # .9938 and .97 in the paper
        row("3DWINN", estimate=Estimate(0.5, 0.4, 0.6)),
        row("3D-GAN", estimate=Estimate(0.8, 0.7, 0.9)),
    ]
    runs = {r["row"]: [f"study-{r['row']}-chair-s0"] for r in rows}
    found = table(rows, "study", "class_probability", run_ids=runs).astype(str)
    (line,) = report.against_papers(found).itertuples(index=False)
    assert line[:3] == ("3DWINN (0.9938)", "3D-GAN (0.97)", "no")
    untrained = table(rows, "study", "class_probability").astype(str)
    assert not len(report.against_papers(untrained))


@pytest.mark.parametrize(
    "column, value, said",
    [
        ("value", "0.9001", None),
        ("value", "0.7", "value was 0.9, is 0.7"),
        ("value", "", "value was 0.9, is empty"),
        ("judge", "def", None),
        ("headline", "0", "headline was 1, is 0"),
        ("n_reference", "9", "n_reference was empty, is 9"),
        ("run_ids", "x", "run_ids was empty, is x"),
        ("row", "other", "only in HEAD"),
    ],
)
def test_check_names_what_differs(written, monkeypatch, column, value, said):
    found = report.write_report(config.load("study"))
    path = written / "report" / "results.csv"
    shown = subprocess.CompletedProcess([], 0, stdout=path.read_text())
    monkeypatch.setattr(report.subprocess, "run", lambda *_, **__: shown)
    assert report.check("study") == []
    changed = found.astype(str)
    first = (changed["row"] == "3D-GAN") & (changed["category"] == "chair")
    changed.loc[first, column] = value
    changed.to_csv(path, index=False, lineterminator="\n")
    lines = report.check("study")
    assert any(said in line for line in lines) if said else lines == []


def test_check_without_git(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError(2, "No such file or directory", "git")

    monkeypatch.setattr(report.subprocess, "run", missing)
    with pytest.raises(StudyError, match="git is not installed"):
        report.check("study")


def test_confusion():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    np.testing.assert_array_equal(
        report.confusion(np.array([0, 1, 1]), probabilities), [[1, 0], [1, 1]]
    )


def test_the_data_card_states_what_was_found(workspace, smoke):
    card = data.card(smoke.data)
    text = report.data_card(card, smoke.data)
    assert card["hash"] in text and "procedural furniture" in text
    chair = card["counts"]["chair"]
    cells = f"| chair | {chair['train']} | {chair['validation']} | {chair['test']} |"
    assert cells in text
    total = sum(c["validation"] for c in card["counts"].values())
    assert f"| all | 240 | {total} | 120 |" in text
