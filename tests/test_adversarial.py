"""The adversarial study: who takes part, sets that are kept, rows, checks, conclusion."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lib import adversarial, attacks, cache, config, data, evaluate, heldout, paths, report
from lib.adversarial import PAIR, ROWS
from lib.errors import StudyError
from lib.train import runs

SIDE = 24


class Toy(nn.Module):
    """A linear classifier of ten classes on a pooled grid; ``levels`` rounds its input first."""

    def __init__(self, seed, levels=0, scale=0.1):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(scale * torch.randn(10, 6**3, generator=draw))
        self.levels, self.side = levels, SIDE

    def forward(self, x):
        x = (x * self.levels).round() / self.levels if self.levels else x
        return nn.functional.avg_pool3d(x, 4).flatten(1) @ self.w.T


@pytest.fixture(scope="module")
def settings(smoke):
    """Smoke with the classifiers of the paper, two more, and one that is not there."""
    models = ["baseline", "introspective", "voxnet", "judge", "orion"]
    changes = dict(classifiers=models, strong=["baseline", "introspective", "voxnet"])
    changes |= dict(
        steps=[2, 4], table_shapes=12, shapes=10, pgd_steps=5, square_queries=60, rays_tries=20
    )
    changes |= dict(pgd_eps=[0.01, 0.1, 0.3], check_eps=0.3, flips=[1, 5, 20], part_starts=2)
    return config.with_changes(smoke, attacks=changes)


@pytest.fixture(scope="module")
def own(workspace, tmp_path_factory):
    """A place of this file for kept sets, shared by its tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("attacks")
        patch.setattr(paths, "CHECKPOINTS", folder)
        # Models that the study does not train yet take part as well.
        patch.setattr(runs.Run, "checked", lambda self: self)
        yield folder / "attacks"


@pytest.fixture
def fresh(own, tmp_path, monkeypatch):
    """An empty place for kept sets."""
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path)
    return tmp_path / "attacks"


@pytest.fixture(scope="module")
def trial(settings, own):
    """Toys as classifiers: two alike, one with hidden gradients, the judge's network, one absent.

    Labels are what the first toy answers, so that it is right on untouched shapes.
    """
    judge = evaluate.train_judge.build(settings.judge, 10).eval()
    networks = {"baseline": Toy(0), "introspective": Toy(1), "voxnet": Toy(0, levels=2)}
    networks["judge"] = judge

    def load(run):
        if run.model == "orion":
            raise StudyError("orion has no weights here")
        return networks[run.model]

    made = adversarial.gather(settings, load)
    with torch.no_grad():
        x = torch.from_numpy(made.voxels[:, None]).float()
        labels = networks["baseline"](x).argmax(1).numpy()
    return dataclasses.replace(made, labels=labels)


# ---------------------------------------------------------------- who takes part


def test_every_profile_names_classifiers_that_have_a_row():
    for name in config.available():
        assert set(config.load(name).attacks.classifiers) <= set(ROWS)
    assert set(PAIR) <= set(ROWS) and len(set(ROWS.values())) == len(ROWS)


def test_an_absent_classifier_is_named_with_its_reason(trial):
    assert set(trial.classifiers) == {"baseline", "introspective", "voxnet", "judge"}
    assert trial.absent == {"orion": "orion has no weights here"}
    called = adversarial.roll_call(trial)
    assert called.loc["ORION", "absent"] == "orion has no weights here"
    assert (called["absent"] == "").sum() == 4


def test_a_classifier_without_a_row_is_refused(settings, own):
    odd = config.with_changes(settings, attacks={"classifiers": ["other"], "strong": []})
    with pytest.raises(StudyError, match="no row for 'other'"):
        adversarial.gather(odd, lambda run: Toy(0))


def test_the_judge_sees_the_grids_it_was_trained_on(trial, settings):
    """30^3 grids of the test split, from the 24^3 model grid, and gradients come back."""
    seen = []
    network = adversarial.OnGrid(evaluate.train_judge.build(settings.judge, 10).eval())
    network.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    split = heldout.load_test(settings.data)
    x = torch.from_numpy(trial.voxels[:4, None]).float().requires_grad_(True)
    network(x).sum().backward()
    assert (seen[0][:, 0].detach().numpy() == split.voxels[:4]).all()
    assert x.grad.shape == x.shape and x.grad.abs().sum() > 0


@pytest.mark.parametrize("side", [24, 32])
def test_margins_are_added_and_cut(side):
    class Sees(nn.Module):
        side = 30

        def forward(self, x):
            return x.flatten(1)

    grids = np.random.default_rng(0).random((2, 30, 30, 30)) < 0.5
    grids[:, :3] = grids[:, -3:] = grids[:, :, :3] = grids[:, :, -3:] = False
    grids[..., :3] = grids[..., -3:] = False
    x = torch.from_numpy(data.model_grid(grids, side)[:, None]).float()
    assert (adversarial.OnGrid(Sees())(x).view(2, 30, 30, 30).bool().numpy() == grids).all()


def test_hashes_tell_classifiers_apart(settings):
    """By weights, by model, and by parameters that leave the weights as they are."""
    found = cache.classifier_hash(settings, "judge", Toy(0))
    assert found == cache.classifier_hash(settings, "judge", Toy(0))
    changed = config.with_changes(settings, judge={"jitter": 1})
    others = {
        cache.classifier_hash(settings, "judge", Toy(1)),
        cache.classifier_hash(settings, "other", Toy(0)),
        cache.classifier_hash(changed, "judge", Toy(0)),
    }
    assert len(others) == 3 and found not in others


# ---------------------------------------------------------------- which shapes


def test_strata_have_equal_shares_and_nest():
    labels = np.repeat(np.arange(3), [50, 10, 4])
    few, more = (adversarial.stratified(labels, n, 0) for n in (9, 24))
    assert np.bincount(labels[few]).tolist() == [3, 3, 3]
    assert np.bincount(labels[more]).tolist() == [10, 10, 4]
    assert set(few) <= set(more) and (np.diff(more) > 0).all()
    assert (adversarial.stratified(labels, 9, 0) == few).all()
    assert (adversarial.stratified(labels, 9, 1) != few).any()
    for n in (0, 64, 100):
        assert (adversarial.stratified(labels, n, 0) == np.arange(64)).all()


# ---------------------------------------------------------------- kept sets


def test_an_interrupted_set_goes_on(trial, fresh, monkeypatch):
    """Killed in its second batch: the first is kept, the end is that of an uninterrupted call."""
    rows = np.arange(25)
    whole = trial.attacked("baseline", "pgd", rows, **_pgd(trial))
    kept = sorted(fresh.rglob("*.npz"))
    assert len(kept) == 3
    for path in kept[1:]:
        path.unlink()
    calls, work = [], attacks.pgd

    def dies(f, x, *rest, **options):
        calls.append(len(x))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return work(f, x, *rest, **options)

    monkeypatch.setattr(attacks, "pgd", dies)
    with pytest.raises(KeyboardInterrupt):
        trial.attacked("baseline", "pgd", rows, **_pgd(trial))
    again = trial.attacked("baseline", "pgd", rows, **_pgd(trial))
    assert calls == [10, 5, 5]
    assert np.array_equal(again, whole)


def test_results_do_not_depend_on_the_batch(trial, settings):
    rows = np.arange(20)
    other = config.with_changes(settings, attacks={"batch": 7})
    parts = dataclasses.replace(trial, profile=other)
    for name, params in (("pgd", _pgd(trial)), ("random_flips", {"n": 5})):
        a = trial.attacked("judge", name, rows, **params)
        b = parts.attacked("judge", name, rows, **params)
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("change", ["weights", "parameters", "shapes", "labels", "seed"])
def test_kept_sets_are_only_used_for_what_they_were_made_for(trial, settings, change):
    rows = np.arange(5)
    before = trial._folder("baseline", "fgsm", rows, {"eps": 0.1})
    assert trial._folder("baseline", "fgsm", rows, {"eps": 0.1}) == before
    other, model, params = trial, "baseline", {"eps": 0.1}
    if change == "weights":
        model = "introspective"
    if change == "parameters":
        params = {"eps": 0.2}
    if change == "shapes":
        other = dataclasses.replace(trial, voxels=~trial.voxels)
    if change == "labels":
        other = dataclasses.replace(trial, labels=trial.labels + 1)
    if change == "seed":
        profile = config.with_changes(settings, attacks={"seed": 1})
        other = dataclasses.replace(trial, profile=profile)
    assert other._folder(model, "fgsm", rows, params) != before


def _pgd(trial):
    return adversarial.pgd_parameters(trial.profile.attacks, 0.1)


# ---------------------------------------------------------------- rows


def test_table_7_by_hand(trial):
    """Every error and correction rate, recounted from the attacks themselves."""
    rows = {(r["row"], r["metric"]): r for r in adversarial.table_7_rows(trial)}
    x = torch.from_numpy(trial.voxels[trial.table_rows, None]).float()
    y = torch.from_numpy(trial.labels[trial.table_rows])
    f = {m: c.network for m, c in trial.classifiers.items()}
    found = attacks.iterative_fgsm(f["baseline"], x, y, 0.005, 4)
    wrong = {m: attacks.misclassified(f[m], found, y) for m in PAIR}
    error = rows["Baseline", "it-4 adversarial error"]
    assert error["estimate"].value == attacks.adversarial_error(wrong["baseline"]) > 0
    assert error["headline"] == 1 and error["n_samples"] == len(x) == 12
    rate = rows["3DWINN", "it-4 correction rate on Baseline"]
    assert rate["estimate"].value == pytest.approx(
        attacks.correction_rate(wrong["baseline"], wrong["introspective"])
    )
    assert rows["VoxNet", "it-4 correction rate on Baseline"]["headline"] == 0
    clean = attacks.misclassified(f["introspective"], x, y)
    untouched = rows["3DWINN", "error on untouched shapes"]["estimate"].value
    assert untouched == pytest.approx(clean.float().mean().item())
    assert np.isnan(rows["ORION", "fgsm adversarial error"]["estimate"].value)
    assert "Baseline against 3DWINN" in {row for row, _ in rows}


def test_no_error_leaves_the_correction_rate_empty(trial):
    row = adversarial._correction_row("fgsm", *PAIR, 5, np.zeros(0, bool))
    assert np.isnan(row["estimate"].value) and row["note"] == "of 0 errors"


def test_the_table_is_written_with_empty_cells(trial, settings):
    rows = [*adversarial.table_7_rows(trial), *adversarial.curve_rows(trial)]
    table = report.table("adversarial", settings, rows, judge="", run_ids=trial.run_ids)
    assert not table.duplicated(report.KEY).any()
    empty = table[table["row"] == "ORION"]
    assert (empty["value"] == "").all() and (empty["note"] == "not trained in this profile").all()
    page = report.table_page(table)
    assert "| Baseline |" in page and "judge" not in page.split("\n\n")[1]
    assert (table.loc[table["row"] == "Baseline", "run_ids"] != "").all()


def test_published_cells_stand_in_the_table_of_lite():
    """Of five categories trained generators, but classifiers of all ten: the figures apply."""
    lite = config.load("lite")
    estimate = adversarial.Estimate(0.3, 0.2, 0.4)
    rows = [adversarial._row("Baseline", "fgsm adversarial error", estimate, 908, 1)]
    table = report.table("adversarial", lite, rows, judge="").set_index(["row", "metric"])
    assert table.loc[("Baseline", "fgsm adversarial error"), "published"] == 0.2764
    assert len(table) == 12
    missing = table.loc[("3DWINN", "it-10 correction rate on Baseline")]
    assert missing["published"] == 0.7546 and missing["value"] == ""


def test_the_printed_rates_fit_no_counts():
    """251, 277, 483, 173, 175 and 398 of 908; 73.98 % of 251 would be 185.7 shapes."""
    printed = adversarial.printed_counts()["counts that fit"]
    assert printed["Baseline"].iloc[:3].tolist() == ["251", "277", "483"]
    assert printed["3DWINN"].iloc[:3].tolist() == ["173", "175", "398"]
    assert (printed[printed.index.get_level_values(1).str.contains("correction")] == "none").all()
    assert adversarial.integer_counts(30.50, 908) == [277]  # 30.5066, cut
    assert adversarial.integer_counts(33.33, 3) == [1] and adversarial.integer_counts(66.67, 3) == [
        2
    ]
    assert adversarial.integer_counts(73.98, 251) == []


# ---------------------------------------------------------------- curves


def test_curves_grow_with_nested_budgets(trial):
    for kind in adversarial.KINDS:
        budgets, fooled = adversarial.curve(trial, "baseline", kind)
        assert fooled.shape == (10, len(budgets))
        if "part" not in kind and "slices" not in kind:
            assert (fooled[:, 1:] >= fooled[:, :-1]).all()
    table = adversarial.curves(trial)
    assert set(table["row"]) == {"Baseline", "3DWINN", "VoxNet"}
    assert set(table["kind"]) == set(adversarial.KINDS)
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()


def test_greedy_flips_do_better_than_random_ones(trial):
    greedy, chance = (
        adversarial.curve(trial, "baseline", k)[1] for k in ("greedy flips", "random flips")
    )
    assert greedy[:, -1].sum() > chance[:, -1].sum()


def test_nothing_is_left_after_thresholding(trial):
    after = adversarial.rebinarised(trial)
    assert (after["largest change"] < 0.5).all() and (after["changed bits"] == 0).all()
    attacked = after[after["shapes"] > 0]
    assert (attacked["error after"] == attacked["error untouched"]).all()
    assert (attacked["error"] > attacked["error untouched"]).any()


def test_thresholding_is_counted_and_not_assumed(trial):
    rows = np.arange(10)
    found = adversarial._after_threshold(trial, "baseline", "fgsm", rows, {"eps": 0.7})
    assert found[1] == pytest.approx(0.7) and found[2] > 0


def test_transfer_has_the_own_error_on_its_diagonal(trial):
    rows = trial.strong_rows
    table = adversarial.transfer(trial, "fgsm", rows, eps=0.1)
    for model, seen in trial.classifiers.items():
        own = trial.wrong_on(model, model, "fgsm", rows, eps=0.1).mean()
        assert table.loc[seen.row, seen.row] == own
    assert table.loc["untouched", "Baseline"] == 0
    flips = adversarial.transfer_of_flips(trial, rows)
    assert flips.shape == table.shape
    wrong = trial.flips("baseline", True, False)
    k = trial.profile.attacks.flips.index(trial.profile.attacks.transfer_flips)
    assert flips.loc["Baseline", "Baseline"] <= wrong[:, k].mean()


# ---------------------------------------------------------------- hidden gradients


def test_hidden_gradients_are_found_and_open_ones_are_not_accused(trial):
    """VoxNet's part is played by the Baseline behind a rounding of its input."""
    hidden = adversarial.masking_checks(trial, "voxnet").loc["VoxNet"]
    assert hidden.loc["one step (FGSM)", "other"] == 0
    for name in ("Square, logits only", "transfer from Baseline", "shapes without any gradient"):
        assert not hidden.loc[name, "passed"], name
    assert hidden.loc["transfer from Baseline", "only other"] > 0
    opened = adversarial.masking_checks(trial, "baseline").loc["Baseline"]
    assert opened["passed"].all()
    assert (adversarial.gradient_sizes(trial, "voxnet")["zeros"] == 1).all()


# ---------------------------------------------------------------- pictures and words


def test_examples_are_right_before_and_wrong_after(trial):
    before, after, captions = adversarial.examples(trial, "baseline", 4)
    assert 0 < len(before) <= 4 and before.shape == after.shape and before.dtype == bool
    flipped = (before ^ after).sum((1, 2, 3))
    assert [int(c.rsplit(": ", 1)[1]) for c in captions] == flipped.tolist()
    network = trial.classifiers["baseline"].network
    for grid, caption in zip((*before, *after), [*captions, *captions], strict=True):
        names = caption.split(": ")[0].split(" → ")
        with torch.no_grad():
            answer = int(network(torch.from_numpy(grid[None, None]).float()).argmax())
        assert config.CATEGORIES[answer] in names
    assert (before != after).any((1, 2, 3)).all()


def test_pictures_are_saved(trial, tmp_path):
    table = adversarial.curves(trial)
    assert adversarial.curve_figure(table, ("pgd",), tmp_path / "eps", log=("pgd",))
    assert adversarial.curve_figure(table.iloc[:0], ("pgd",), tmp_path / "none") is None
    assert adversarial.surface_figure(trial, tmp_path / "surface")
    assert {p.name for p in tmp_path.glob("*.*")} >= {"eps.png", "eps.csv", "surface.png"}
    assert not (tmp_path / "none.png").exists()


def test_errors_by_steps_are_those_of_the_table(trial, tmp_path):
    found = adversarial.error_by_steps(trial)
    table = pd.DataFrame(adversarial.table_7_rows(trial)).set_index(["row", "metric"])["estimate"]
    assert found["budget"].tolist() == [0, 1, *trial.profile.attacks.steps] * len(trial.classifiers)
    for line in found.itertuples():
        name = {0: "error on untouched shapes", 1: "fgsm adversarial error"}
        metric = name.get(line.budget, f"it-{line.budget} adversarial error")
        assert line.value == table[line.row, metric].value
    assert adversarial.curve_figure(found, ("FGSM",), tmp_path / "table-7")


def test_the_conclusion_follows_the_numbers(trial, settings):
    text = adversarial.conclusion(trial)
    assert "Under FGSM at ε = 0.005, Baseline errs on" in text and "leaves none of" in text
    assert "Under 2 steps of FGSM at ε = 0.005" in text and "checks for hidden gradients" in text
    alone = config.with_changes(settings, attacks={"strong": ["baseline"]})
    text = adversarial.conclusion(dataclasses.replace(trial, profile=alone))
    assert "Under FGSM at ε = 0.005, Baseline errs on" in text and "stays open" in text
    assert "PGD" not in text
    one = {"baseline": trial.classifiers["baseline"]}
    text = adversarial.conclusion(dataclasses.replace(trial, classifiers=one))
    assert text.startswith("3DWINN did not meet the attacks in this profile")


def test_the_words_go_either_way():
    few, many = np.arange(40) < 4, np.arange(40) < 30
    assert "3DWINN errs less often" in adversarial._compared("x", PAIR, many, few)
    assert "Baseline errs less often" in adversarial._compared("x", PAIR, few, many)
    assert "cannot be told apart" in adversarial._compared(
        "x", PAIR, few, ~few & (np.arange(40) < 9)
    )


def test_the_verdict_follows_the_attacks_and_the_checks(trial, monkeypatch):
    """Fewer errors, more, both or neither; and what failed checks make of fewer errors."""
    few, many = np.arange(40) < 4, np.arange(40) < 30
    found = {}
    monkeypatch.setattr(adversarial, "_at", lambda t, pair, kind, budget: found[kind])
    passed = pd.DataFrame({"passed": [True, True]})
    monkeypatch.setattr(adversarial, "masking_checks", lambda t, model: passed)
    same = dict.fromkeys(("pgd", "rays", "greedy flips"), (few, few))
    found |= same
    assert "cannot be told apart" in adversarial.verdict(trial)
    found["pgd"] = (many, few)
    assert "3DWINN is more robust than Baseline under PGD" in adversarial.verdict(trial)
    assert "shows no hidden gradients" in adversarial.verdict(trial)
    passed["passed"] = [True, False]
    assert "may hide its gradients" in adversarial.verdict(trial)
    found["rays"] = (few, many)
    assert "they disagree" in adversarial.verdict(trial)
    found["pgd"] = (few, few)
    assert "3DWINN is less robust than Baseline under RayS" in adversarial.verdict(trial)


def test_the_yardstick_is_compared_where_it_stands(trial, settings):
    """A hardened Baseline meets both classifiers of the paper in the rows and in the words."""
    titles = {r["row"] for r in adversarial.curve_rows(trial) if "mcnemar" in r["metric"]}
    assert titles == {"Baseline against 3DWINN"}
    models = ["baseline", "introspective", "hardened"]
    more = config.with_changes(settings, attacks={"classifiers": models, "strong": models})
    hard = dataclasses.replace(trial.classifiers["voxnet"], row=ROWS["hardened"])
    classifiers = {m: trial.classifiers[m] for m in PAIR} | {"hardened": hard}
    made = dataclasses.replace(trial, profile=more, classifiers=classifiers)
    rows = [*adversarial.curve_rows(made), *adversarial.table_7_rows(made)]
    titles = {r["row"] for r in rows if "mcnemar" in r["metric"]}
    assert titles == {" against ".join(ROWS[m] for m in pair) for pair in adversarial.PAIRS}
    assert len(adversarial.PAIRS) == 3
    assert "PGD at ε = 0.3, Baseline errs on" in adversarial.conclusion(made)


def test_longer_ways_of_fgsm_go_on_where_shorter_ones_end(trial, fresh):
    """Table 7's sets share their steps; each is what the attack makes by itself."""
    rows, step = trial.table_rows, 0.02
    x, y = trial._tensors("baseline", rows)
    f = trial.classifiers["baseline"].network
    for n in trial.profile.attacks.steps:
        found = trial.attacked("baseline", "iterative_fgsm", rows, step=step, n_steps=n)
        alone = attacks.iterative_fgsm(f, x, y, step, n)
        assert np.allclose(found, alone.numpy(), atol=1e-6) and (found != x.numpy()).any()
    kept = {p.parent.name.split("-")[0] for p in fresh.rglob("*.npz")}
    assert kept == {"fgsm", "iterative_fgsm"}


def test_without_classifiers_everything_is_empty(settings, own):
    def load(run):
        raise StudyError("not here")

    made = adversarial.gather(settings, load)
    rows = [*adversarial.table_7_rows(made), *adversarial.curve_rows(made)]
    table = report.table("adversarial", settings, rows, judge="")
    assert len(table) == 5 and (table["value"] == "").all()
    assert len(adversarial.rebinarised(made)) == 0 and len(adversarial.curves(made)) == 0
    assert adversarial.surface_figure(made, own / "none") is None
    assert "did not meet" in adversarial.conclusion(made)
    assert adversarial.transfer(made, "fgsm", made.strong_rows, eps=0.1).shape == (1, 0)
    assert isinstance(adversarial.roll_call(made), pd.DataFrame)
