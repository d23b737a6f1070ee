"""Model cards: one a published run, every number from its record, and their words work."""

import re
import shlex

import pytest

from lib import cards, cli, files, paths, report
from lib.train import runs

LITE = {
    "run": "lite-beyond-night_stand-s2",
    "key": "lite-beyond-night_stand-s2-441279c0f8ab",
    "recipe": 4,
    "n_parameters": 1179009,
    "parameters": {"channels": [16, 33], "lr": 0.0007, "layout": "channels_last"},
    "weights": {"average.safetensors": "c459e8b1"},
    "device": "x86_64 CPU, 2 threads",
    "policy": {"where": "cpu", "dtype": "bfloat16", "fused": False},
    "hours": 0.467,
    "seconds per sample": 4.817,
    "torch": "2.13.0+cpu",
    "numpy": "2.4.6",
    "python": "3.11.7",
    "commit": "9c2b28ca6d86",
    "date": "2026-11-21",
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(cli.device, "apply_environment", lambda device: None)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)


def test_every_model_has_a_source():
    assert set(runs.MODELS) <= set(cards.SOURCES)


def test_a_card_tells_what_the_record_knows():
    text = cards.card(LITE, draws=True)
    for said in (
        "# lite-beyond-night_stand-s2\n",
        "ours: the network and loss of 3DWINN (Huang et al. 2019)",
        "Trained on category night_stand of the training split, seed 2.",
        "- Hours: 0.467.\n- Seconds per sample: 4.817.\n",
        "- Device: x86_64 CPU, 2 threads.\n- Policy: where cpu, dtype bfloat16, fused False.\n",
        "- `average.safetensors`: sha256 `c459e8b1`",
        "| channels | 16, 33 |\n| lr | 0.0007 |",
        "nothing but night stands.",
        "- Data: named by the key below;",
    ):
        assert said in text
    known = {"data": {"name": "modelnet10", "hash": "c9c0"}}
    assert "- Data: modelnet10, hash `c9c0`;" in cards.card(LITE | known, draws=True)


def test_old_records_without_sizes_have_a_card():
    old = {k: v for k, v in LITE.items() if k not in ("n_parameters", "policy")}
    text = cards.card(old, draws=True)
    assert "1179009" not in text and "Policy" not in text and "- Hours: 0.467." in text


def test_numbers_stand_in_the_record():
    """All but those of papers, of the example's seeds, and of the grids in the limits."""
    text = cards.card(LITE, draws=True)
    for line in text.splitlines():
        if line.startswith(("- ", "| ")):
            for number in re.findall(r"\d+\.?\d*", line.removesuffix(".")):
                assert number in str(LITE) or number == "256", line  # sha256
    assert "Huang et al. 2019" in text and "30 voxels" in text


def test_records_of_smoke_have_no_hours(workspace, smoke_chair):
    text = cards.card(files.read_json(smoke_chair.samples / "run.json"), draws=True)
    assert "- Data: tiny, hash `" in text
    assert not re.search(r"Hours|Device|Commit|Torch", text)
    beside = (smoke_chair.weights / "card.md").read_text()
    assert files.sha256(smoke_chair.weights / "generator.safetensors") in beside
    assert "discriminator" not in beside.split("## Parameters")[0]


def test_the_commands_of_a_card_work(workspace, smoke_chair, tmp_path, monkeypatch):
    text = cards.card(files.read_json(smoke_chair.samples / "run.json"), draws=True)
    line = re.search(r"python -m lib (sample .*)", text).group(1)
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(line)) == 0
    code = re.findall(r"^    (.*)$", text.split("from seed k alone:")[1], re.MULTILINE)
    names = {}
    exec("\n".join(code), names)  # noqa: S102, the text of the card itself
    drawn = files.load_npz(tmp_path / "shapes.npz")["voxels"]
    assert names["voxels"].shape == (4, 24, 24, 24)
    assert (runs.voxel.pack(names["voxels"]) == drawn).all()


def test_the_report_writes_a_card_for_every_published_run(
    workspace, smoke, smoke_chair, smoke_judge
):
    folder = paths.results("smoke") / "report" / "models"
    files.write_text(folder / "smoke-gan3d-bed-s0.md", "of a run that is gone")
    found = report.write_cards(smoke)
    assert {smoke_chair.id, smoke_judge.id} <= set(found)
    assert {p.stem for p in folder.iterdir()} == set(found)
    assert "python -m lib sample" in (folder / f"{smoke_chair.id}.md").read_text()
    judge = (folder / f"{smoke_judge.id}.md").read_text()
    assert "python -m lib sample" not in judge and "all categories" in judge
