"""Bars: named with their interval where they are missed, and of trained rows alone."""

from lib import bars, config, report
from lib.metrics import Estimate


def row(name, value, **changes):
    found = dict(row=name, category="all", metric="accuracy", headline=1, reference="")
    found |= dict(n_samples=50, n_reference="", note="")
    return found | {"estimate": Estimate(value, value - 0.1, value + 0.1)} | changes


def table(rows, profile, name, **options):
    return report.table(name, config.load(profile), rows, judge="abc", **options)


def test_bars_are_named_where_they_are_missed():
    ids = {"Baseline": ["lite-baseline-all-s0"], "3DWINN": ["lite-introspective-all-s0"]}

    def said(baseline, winn, name="supervised", profile="lite"):
        values = {"Baseline": baseline, "3DWINN": winn, "control": 0.99}
        rows = [row(n, v) for n, v in values.items()]
        rows.append(row("3DWINN", 1.0, metric="another", headline=0))
        return bars.verdicts(table(rows, profile, name, run_ids=ids), config.load(profile))

    missed = said(0.914, 0.8)
    assert missed == [
        "Baseline: 91.4% [81.4%, 101.4%] misses the bar of 91.5%, which lies within the interval.",
        "Baseline, best trained row of 2 on the test split: 91.4% [81.4%, 101.4%] misses the bar "
        "of 93.0%, which lies within the interval.",
    ]
    reached = said(0.8, 0.93)
    assert "misses the bar of 91.5%, which lies outside the interval" in reached[0]
    assert "3DWINN" in reached[1] and "reaches the bar of 93.0%" in reached[1]
    (unsupervised,) = said(0.904, 0.9, "unsupervised")
    assert "control" not in unsupervised and "misses the bar of 90.5%" in unsupervised
    nothing = bars.verdicts(table([row("control", 0.9)], "lite", "supervised"), config.load("lite"))
    assert nothing[0] == "Baseline: no run here, so the bar of 91.5% was not tried."
    assert said(0.9, 0.9, profile="quick")[0].startswith("The bars are of ModelNet10")
