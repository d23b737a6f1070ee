"""What the study asks of its own classifiers on ModelNet10, and what they reach."""

import pandas as pd

from lib import config

BEST = "best trained row"
# Accuracy on the test split: table -> row -> least.
BARS = {"supervised": {"Baseline": 0.915, BEST: 0.93}, "unsupervised": {BEST: 0.905}}
PROCEDURAL = "The bars are of ModelNet10 and say nothing of procedural shapes."


def verdicts(found: pd.DataFrame, profile: config.Profile) -> list[str]:
    """Which accuracies of table ``supervised`` or ``unsupervised`` reach ``BARS``, a line each."""
    if profile.data.source == "procedural":
        return [PROCEDURAL]
    own = found[(found["headline"] == 1) & (found["value"] != "") & (found["run_ids"] != "")]
    own = own.astype({"value": float, "low": float, "high": float})
    out = []
    for name, bar in BARS[found["table"].iloc[0]].items():
        rows = own if name == BEST else own[own["row"] == name]
        if rows.empty:
            out.append(f"{name}: no run here, so the bar of {bar:.1%} was not tried.")
            continue
        best = rows.loc[rows["value"].idxmax()]
        title = (
            name
            if name == best["row"]
            else f"{best['row']}, {name} of {len(rows)} on the test split"
        )
        out.append(verdict(title, *best[["value", "low", "high"]], bar))
    return out


def verdict(name: str, value: float, low: float, high: float, bar: float) -> str:
    """Whether an accuracy reaches a bar, and whether its interval holds the bar."""
    word = "reaches" if value >= bar else "misses"
    where = "within" if low <= bar <= high else "outside"
    return (
        f"{name}: {value:.1%} [{low:.1%}, {high:.1%}] {word} the bar of {bar:.1%}, which lies "
        f"{where} the interval."
    )
