"""Training: stopped, killed, damaged or refused, it ends with the same bytes or a clear line."""

import csv
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import yaml

from lib import config, data, files, paths, rng, voxel
from lib.errors import StudyError
from lib.train import checkpoint, engine, gan3d, judge, runs

CHAIR = runs.Run("smoke", "gan3d", "chair", 0)
JUDGE = runs.Run("smoke", "judge", "all", 0)
CPU = torch.device("cpu")


def content(folder):
    """Name -> bytes of a folder's files."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def train(run, profile, **options):
    return runs.train(run, profile, progress=False, **options)


@pytest.fixture(scope="module")
def finals(workspace, smoke, smoke_judge, smoke_chair):
    """What uninterrupted runs leave: run -> name -> bytes."""
    return {r: content(runs.state_folder(r, smoke) / "final") for r in (smoke_judge, smoke_chair)}


class Toy(engine.Task):
    """Least squares with noise named by the step."""

    def __init__(self, n_steps=12, at=None, action=None):
        self.n_steps, self.log_every, self.at, self.action = n_steps, 4, at, action
        network = torch.nn.Linear(3, 1)
        for p in network.parameters():
            torch.nn.init.normal_(p, generator=rng.torch_generator("toy"))
        self.networks = {"toy": network}
        self.optimizers = {"toy": torch.optim.Adam(network.parameters(), 0.05)}
        self.counters, self.buffers = {"seen": 0}, {"last": torch.zeros(2, dtype=torch.int64)}
        self.finished = 0

    def step(self, step):
        if step == self.at:
            outcome = self.action()
            if outcome is not None:
                return {"loss": outcome}
        x = torch.randn(8, 3, generator=rng.torch_generator("toy", step))
        loss = (self.networks["toy"](x)[:, 0] - x.sum(1)).square().mean()
        self.optimizers["toy"].zero_grad()
        loss.backward()
        self.optimizers["toy"].step()
        self.counters["seen"] += 1
        self.buffers["last"] = torch.tensor([step, self.counters["seen"]])
        return {"loss": loss.item(), "seen": self.counters["seen"]}

    def monitor(self, step):
        return {"warning": "half way" if step == 8 else ""}

    def finish(self):
        self.finished += 1


def fit(task, folder, **options):
    return engine.fit(task, folder, name="toy", progress=False, **options)


def weights(task):
    return [p.detach().clone() for p in task.networks["toy"].parameters()]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """An uninterrupted toy run: its task and its log."""
    folder, task = tmp_path_factory.mktemp("toy"), Toy()
    assert fit(task, folder)
    return task, (folder / "log.csv").read_text()


def same_as(toy, task, folder):
    assert all(map(torch.equal, weights(task), weights(toy[0])))
    assert (folder / "log.csv").read_text() == toy[1]
    assert task.counters == toy[0].counters
    assert torch.equal(task.buffers["last"], toy[0].buffers["last"])
    return True


# ---------------------------------------------------------------- the loop


def test_log_and_status(toy, tmp_path, capsys):
    task = Toy()
    assert fit(task, tmp_path)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [r["step"] for r in rows] == ["4", "8", "12"]
    assert list(rows[0]) == ["step", "loss", "seen", "warning"]
    assert [r["warning"] for r in rows] == ["", "half way", ""]
    assert "toy step 8: half way" in "".join(capsys.readouterr())
    status = files.read_json(tmp_path / "status.json")
    assert (status["step"], status["n_steps"]) == (12, 12) and status["seconds"] >= 0
    assert task.finished == 1


def test_columns_that_come_late():
    rows = [{"step": 1, "a": 1.0}, {"step": 2, "a": 0.123456789, "b": 3}]
    assert engine.log_csv(rows) == "step,a,b\n1,1,\n2,0.123457,3\n"


def test_a_deadline_saves_and_goes_on(toy, tmp_path):
    stops = 0
    while not fit(task := Toy(), tmp_path, deadline=time.monotonic() - 1):
        stops += 1
        assert files.read_json(tmp_path / "status.json")["step"] == stops
        assert task.finished == 0
    assert stops == 11
    assert same_as(toy, task, tmp_path)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_end_of_the_step(toy, tmp_path, which):
    before = signal.getsignal(which)
    with pytest.raises(KeyboardInterrupt, match="toy: stopped at step 6, saved"):
        fit(Toy(at=5, action=lambda: os.kill(os.getpid(), which)), tmp_path)
    assert signal.getsignal(which) is before
    assert files.read_json(tmp_path / "status.json")["step"] == 6
    assert checkpoint.load(tmp_path / "state.safetensors")["task"]["counters"]["seen"] == 6
    assert fit(task := Toy(), tmp_path)
    assert same_as(toy, task, tmp_path)


def test_training_outside_the_main_thread(toy, tmp_path):
    task, done = Toy(), []
    thread = threading.Thread(target=lambda: done.append(fit(task, tmp_path)))
    thread.start()
    thread.join()
    assert done == [True]
    assert same_as(toy, task, tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite(toy, tmp_path, bad):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        StudyError, match="toy: loss became .* at step 7; the last checkpoint is kept"
    ):
        fit(Toy(at=7, action=lambda: bad), tmp_path, checkpoint_seconds=0)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.load(tmp_path / "state.safetensors")["step"] == 7
    assert fit(task := Toy(), tmp_path)
    assert same_as(toy, task, tmp_path)


def test_an_exception_in_a_step_restores_the_signals(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        fit(Toy(at=2, action=lambda: 1 / 0), tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


def flip(path):
    damaged = bytearray(path.read_bytes())
    damaged[2 * len(damaged) // 3] ^= 4
    path.write_bytes(damaged)


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "short": lambda path: os.truncate(path, 4),
    "empty": lambda path: os.truncate(path, 0),
    "flipped": flip,
}


@pytest.fixture
def stopped(tmp_path):
    """A toy run stopped after step 6, with the state of step 5 beside it."""
    with pytest.raises(KeyboardInterrupt):
        stop = Toy(at=5, action=lambda: os.kill(os.getpid(), signal.SIGINT))
        fit(stop, tmp_path, checkpoint_seconds=0)
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_costs_a_few_steps_only(toy, stopped, damage, capsys):
    DAMAGES[damage](stopped / "state.safetensors")
    assert fit(task := Toy(), stopped)
    said = "".join(capsys.readouterr())
    assert "warning" in said and "damaged checkpoint" in said and "from the one before" in said
    assert same_as(toy, task, stopped)


@pytest.mark.parametrize("damage", DAMAGES)
def test_two_damaged_checkpoints_are_refused(stopped, damage):
    for name in ("state.safetensors", "state.safetensors.previous"):
        DAMAGES[damage](stopped / name)
    before = content(stopped)
    with pytest.raises(StudyError, match="delete .* to train from the beginning") as error:
        fit(Toy(), stopped)
    assert "\n" not in str(error.value)
    assert content(stopped) == before


def test_a_damaged_checkpoint_never_replaces_the_sound_one(toy, stopped):
    """Killed right after falling back, the run must still have the state it fell back to."""
    sound = (stopped / "state.safetensors.previous").read_bytes()
    DAMAGES["cut"](stopped / "state.safetensors")
    checkpoint.load_latest(stopped / "state.safetensors")
    checkpoint.save(stopped / "state.safetensors", {"step": 0})
    assert (stopped / "state.safetensors.previous").read_bytes() == sound


def test_a_full_disk_keeps_a_checkpoint(toy, stopped, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StudyError, match="No space left on device") as error:
            fit(Toy(), stopped, checkpoint_seconds=0)
        assert "\n" not in str(error.value)
        with pytest.raises(StudyError, match="No space left on device"):
            fit(Toy(), stopped, checkpoint_seconds=0)
    assert fit(task := Toy(), stopped)
    assert same_as(toy, task, stopped)


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_hold_what_was_put_in(tmp_path):
    tree = {
        "half": torch.randn(2, 3).half(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "flags": torch.tensor([True, False]),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "empty": torch.empty(0, 3),
        "nested": {0: [1, 2.5, None, "x", {"deep": torch.ones(1)}], "t": (1, 2)},
        "inf": math.inf,
    }
    checkpoint.save(tmp_path / "s", tree)
    found = checkpoint.load(tmp_path / "s")
    for name in ("half", "scalar", "flags", "transposed", "empty"):
        assert torch.equal(found[name], tree[name]) and found[name].dtype == tree[name].dtype
    assert found["nested"][0][:4] == [1, 2.5, None, "x"] and found["nested"]["t"] == [1, 2]
    assert found["inf"] == math.inf
    with pytest.raises(TypeError, match="cannot hold set"):
        checkpoint.save(tmp_path / "s", {"x": {1}})


def test_no_damage_of_a_checkpoint_escapes(tmp_path):
    """Whatever bit flips: refused, or read as it was."""
    tree = {"a": torch.arange(12.0).reshape(3, 4), "b": [torch.ones(2), 5], "c": "text"}
    checkpoint.save(tmp_path / "s", tree)
    whole = (tmp_path / "s").read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    bits = generator.choice(8 * len(whole), 500, replace=False)
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "d").write_bytes(damaged)
        try:
            found = checkpoint.load(tmp_path / "d")
        except StudyError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert torch.equal(found["a"], tree["a"]) and found["c"] == "text"
    assert refused > 0.9 * len(bits)


def test_weights_are_stored_in_half_precision(tmp_path):
    network = gan3d.build(config.load("smoke").gan3d)[0]
    checkpoint.save_weights(tmp_path / "w", network)
    twin = gan3d.build(config.load("smoke").gan3d)[0].train()
    assert not checkpoint.load_weights(tmp_path / "w", twin).training
    for (name, a), b in zip(network.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(b, a.half().float() if a.ndim > 1 else a), name


def test_weights_that_do_not_fit(tmp_path):
    generator, discriminator = gan3d.build(config.load("smoke").gan3d)
    checkpoint.save_weights(tmp_path / "w", generator)
    with pytest.raises(StudyError, match="w: not the weights of this network") as error:
        checkpoint.load_weights(tmp_path / "w", discriminator)
    assert "\n" not in str(error.value)
    with pytest.raises(StudyError, match="no such weights; train the run"):
        checkpoint.load_weights(tmp_path / "none", generator)
    (tmp_path / "w").write_bytes(b"damaged")
    with pytest.raises(StudyError, match="w: not the weights"):
        checkpoint.load_weights(tmp_path / "w", generator)


# ---------------------------------------------------------------- both models, stopped and resumed


def test_the_gan_trained_one_step_at_a_time(finals, checkpoints, smoke):
    calls = 1
    while (final := train(CHAIR, smoke, deadline=-math.inf)) is None:
        calls += 1
    assert calls == smoke.gan3d.steps
    assert content(final) == finals[CHAIR]


def interrupt_at(monkeypatch, task, step, which=signal.SIGTERM):
    original = task.step

    def interrupted(self, k):
        if k == step:
            os.kill(os.getpid(), which)
        return original(self, k)

    monkeypatch.setattr(task, "step", interrupted)


@pytest.mark.parametrize("step", [5, 12, 18])
def test_the_judge_stopped_and_resumed(finals, checkpoints, smoke, monkeypatch, step):
    with monkeypatch.context() as patch:
        interrupt_at(patch, judge.JudgeTask, step)
        with pytest.raises(KeyboardInterrupt, match=f"stopped at step {step + 1}, saved"):
            train(JUDGE, smoke)
    assert content(train(JUDGE, smoke)) == finals[JUDGE]


def test_training_twice_gives_the_same_bytes_whatever_the_global_seed(finals, checkpoints, smoke):
    torch.manual_seed(123)
    np.random.seed(5)  # noqa: NPY002
    assert content(train(CHAIR, smoke)) == finals[CHAIR]


def test_other_seeds_train_other_weights(finals, checkpoints, smoke):
    other = content(train(runs.Run("smoke", "gan3d", "chair", 1), smoke))
    assert other.keys() == finals[CHAIR].keys()
    for name in ("generator.safetensors", "discriminator.safetensors", "samples-0.5.npz"):
        assert other[name] != finals[CHAIR][name]


KILLED = """
import functools, json, os, pathlib, signal, sys, time
import torch
from lib import config, paths
from lib.train import engine, runs
engine.fit = functools.partial(engine.fit, checkpoint_seconds=0)
paths.CHECKPOINTS = pathlib.Path(sys.argv[1])
profile = config.with_changes(config.load("smoke"), device={"threads": 1})
run = runs.Run.parse(sys.argv[2])
status = runs.state_folder(run, profile) / "status.json"


def step():
    return json.loads(status.read_text())["step"] if status.exists() else 0


reached = []
torch.optim.Adam([torch.zeros(1)])
runs.key(run, profile)
for number, delay in enumerate([*map(float, sys.argv[3:]), 600]):
    before = step()
    child = os.fork()
    if child == 0:
        runs.train(run, profile, progress=False)
        os._exit(0)
    end = time.monotonic() + delay if number % 4 == 0 else None  # some before the first step
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if end is None and step() > before:
            end = time.monotonic() + delay / 4
        if end is not None and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.002)
    reached.append(step())
print(json.dumps(reached))
"""


@pytest.mark.parametrize("run, n_steps", [(CHAIR, 8), (JUDGE, 26)])
def test_killed_at_random_moments(finals, checkpoints, smoke, run, n_steps):
    """kill -9, again and again, with a checkpoint at every step."""
    moments = rng.numpy_generator("kill", run.id).uniform(0.02, 0.4, 12)
    command = [sys.executable, "-c", KILLED, str(checkpoints), run.id, *map(str, moments)]
    done = subprocess.run(command, cwd=paths.CODE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    reached = yaml.safe_load(done.stdout.splitlines()[-1])
    assert len({r for r in reached if 0 < r < n_steps}) >= 2, reached
    assert reached[-1] == n_steps
    assert content(runs.state_folder(run, smoke) / "final") == finals[run]


def test_a_damaged_checkpoint_of_the_gan(finals, checkpoints, smoke, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, gan3d.Gan3dTask, 5)
        patch.setattr(
            engine.fit, "__kwdefaults__", engine.fit.__kwdefaults__ | {"checkpoint_seconds": 0.0}
        )
        with pytest.raises(KeyboardInterrupt):
            train(CHAIR, smoke)
    flip(runs.state_folder(CHAIR, smoke) / "state.safetensors")
    assert content(train(CHAIR, smoke)) == finals[CHAIR]


def test_a_complete_run_is_returned_at_once(checkpoints, smoke, monkeypatch):
    final = train(CHAIR, smoke)
    folder = final.parent
    assert not list(folder.glob("state.safetensors*"))
    before = {p.name: p.stat().st_mtime_ns for p in final.iterdir()}
    monkeypatch.setattr(engine, "fit", lambda *a, **k: pytest.fail("it trained again"))
    assert train(CHAIR, smoke) == final
    assert {p.name: p.stat().st_mtime_ns for p in final.iterdir()} == before


def test_a_run_in_training_is_locked(checkpoints, smoke):
    folder = runs.state_folder(CHAIR, smoke)
    assert not engine.is_locked(folder)
    with engine.lock(folder):
        assert engine.is_locked(folder)
        code = (
            "import pathlib, sys; from lib.train import engine\n"
            "from lib.errors import StudyError\n"
            "try:\n    engine.lock(pathlib.Path(sys.argv[1])).__enter__()\n"
            "except StudyError as error:\n    print(error)"
        )
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, cwd=paths.CODE, capture_output=True, text=True, check=True)
        assert f"process {os.getpid()} trains this run" in done.stdout
        with pytest.raises(StudyError, match="trains this run"):
            train(CHAIR, smoke)
    assert not engine.is_locked(folder)
    assert train(CHAIR, smoke).is_dir()


def test_divergence_ends_a_run_and_keeps_its_checkpoint(checkpoints, smoke, monkeypatch):
    assert train(CHAIR, smoke, deadline=-math.inf) is None
    state = (runs.state_folder(CHAIR, smoke) / "state.safetensors").read_bytes()
    monkeypatch.setattr(gan3d.losses, "generator_loss", lambda *a: (a[0] * math.nan).mean())
    with pytest.raises(StudyError, match="smoke-gan3d-chair-s0: loss_generator became nan"):
        train(CHAIR, smoke)
    assert (runs.state_folder(CHAIR, smoke) / "state.safetensors").read_bytes() == state


# ---------------------------------------------------------------- what the models do


def gan_task(workspace, smoke, **changes):
    profile = config.with_changes(smoke, gan3d=changes)
    chairs = data.load_train(profile.data).category("chair")
    return gan3d.Gan3dTask(profile.gan3d, chairs, 24, 0, CPU)


def test_the_gate_shuts_and_opens_again(workspace, smoke, monkeypatch):
    """Accuracy is measured at rest too; otherwise a shut gate would stay shut."""
    task = gan_task(workspace, smoke)
    script = iter([0.5, 0.9, 0.95, 0.81, 0.8, 0.3, 0.9])
    monkeypatch.setattr(gan3d.losses, "discriminator_accuracy", lambda *_: next(script))
    updates, moved = [], []
    for step in range(7):
        before = [p.detach().clone() for p in task.networks["discriminator"].parameters()]
        updates.append(task.step(step)["updates"])
        after = task.networks["discriminator"].parameters()
        moved.append(not all(map(torch.equal, before, after)))
    # Rests follow accuracies above .8; exactly .8 is not above.
    assert moved == [True, True, False, False, False, True, True]
    assert updates == [1, 2, 2, 2, 2, 3, 4]


def test_the_generator_learns_while_the_gate_is_shut(workspace, smoke):
    task = gan_task(workspace, smoke)
    task.counters["accuracy"] = 1.0
    before = [p.detach().clone() for p in task.networks["generator"].parameters()]
    assert task.step(0)["updates"] == 0
    assert not any(map(torch.equal, before, task.networks["generator"].parameters()))


def test_the_gan_sees_training_shapes_only(workspace, smoke):
    task = gan_task(workspace, smoke)
    split = data.load_train(smoke.data).category("chair")
    kept = data.model_grid(split.voxels[~split.validation], 24)
    np.testing.assert_array_equal(task.voxels, kept)
    assert len(kept) < len(split.labels)


@pytest.mark.parametrize(
    "options", [{"latent": "normal"}, {"norm_first": True}, {"saturating": True}]
)
def test_options_change_the_training(workspace, smoke, options):
    plain, other = gan_task(workspace, smoke), gan_task(workspace, smoke, **options)
    losses = [[t.step(s)["loss_generator"] for s in range(3)] for t in (plain, other)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "fill, said", [(1.0, "fill their box"), (0.0, "almost empty"), (1.0, "shapes are alike")]
)
def test_collapse_is_said_early(workspace, smoke, monkeypatch, fill, said):
    task = gan_task(workspace, smoke)
    monkeypatch.setattr(
        task.networks["generator"], "voxels", lambda z: torch.full((len(z), 1, 24, 24, 24), fill)
    )
    assert said in task.monitor(1)["warning"]


def test_the_judge_learns_eight_shapes_by_heart(workspace, smoke):
    split = data.load_train(smoke.data)
    first = [np.flatnonzero((split.labels == k) & ~split.validation)[0] for k in range(8)]
    rows = [*first, *np.flatnonzero(split.validation)[:2]]
    settings = config.with_changes(
        smoke,
        judge={
            "widths": [16, 16, 64],
            "batch": 8,
            "epochs": 80,
            "jitter": 0,
            "turns": False,
            "mirror": False,
        },
    ).judge
    task = judge.JudgeTask(settings, split.where(np.array(rows)), 0, CPU)
    for step in range(task.n_steps):
        task.step(step)
    with torch.no_grad():
        task.network.eval()
        right = task.network(task._tensor(task.x)).argmax(1).numpy() == task.y
    assert right.all()


def test_the_judge_keeps_the_best_weights_on_validation(workspace, smoke, monkeypatch):
    task = judge.JudgeTask(smoke.judge, data.load_train(smoke.data), 0, CPU)
    found = iter([(0.5, 1.0), (0.6, 0.8), (0.5, 0.9), (0.4, 0.9)])
    monkeypatch.setattr(task, "_validate", lambda: next(found))
    kept = []
    for step in range(4):
        task.step(step)
        task.monitor(step + 1)
        kept.append(next(task.network.parameters()).detach().clone())
    assert task.counters["best_step"] == 2 and task.counters["best_loss"] == 0.8
    task.finish()
    assert torch.equal(next(task.network.parameters()), kept[1])
    assert not torch.equal(kept[1], kept[3])


def test_the_judge_sees_training_shapes_only(workspace, smoke):
    split = data.load_train(smoke.data)
    task = judge.JudgeTask(smoke.judge, split, 0, CPU)
    assert len(task.x) == (~split.validation).sum() and len(task.x_val) == split.validation.sum()
    np.testing.assert_array_equal(task.y, split.labels[~split.validation])


STILL = {"jitter": 0, "turns": False, "mirror": False}


def test_augmentation_moves_shapes_and_changes_nothing_else(workspace, smoke):
    voxels = data.load_train(smoke.data).voxels[:40]
    settings = config.with_changes(smoke, judge={"jitter": 2}).judge
    moved = judge.augment(voxels, settings, rng.numpy_generator("augment"))
    np.testing.assert_array_equal(moved.sum((1, 2, 3)), voxels.sum((1, 2, 3)))
    assert (moved != voxels).any((1, 2, 3)).mean() > 0.9
    again = judge.augment(voxels, settings, rng.numpy_generator("augment"))
    np.testing.assert_array_equal(moved, again)
    still = config.with_changes(smoke, judge=STILL).judge
    np.testing.assert_array_equal(judge.augment(voxels, still, rng.numpy_generator("a")), voxels)


def moved_voxel(smoke, **changes) -> set[tuple]:
    """Where the one voxel (5, 3, 1) of a grid of 7 can come to lie."""
    one = np.zeros((400, 7, 7, 7), bool)
    one[:, 5, 3, 1] = True
    settings = config.with_changes(smoke, judge=STILL | changes).judge
    moved = judge.augment(one, settings, rng.numpy_generator("places"))
    return {tuple(int(i) for i in p[1:]) for p in np.argwhere(moved)}


def test_augmentation_turns_about_the_vertical_in_all_quarters(smoke):
    assert moved_voxel(smoke, turns=True) == {(5, 3, 1), (3, 5, 1), (1, 3, 1), (3, 1, 1)}
    assert moved_voxel(smoke, mirror=True) == {(5, 3, 1), (1, 3, 1)}
    places = moved_voxel(smoke, jitter=1)
    assert len(places) == 27 and {p[2] for p in places} == {0, 1, 2}


# ---------------------------------------------------------------- runs and their keys


def test_names_of_runs():
    run = runs.Run.parse("lite-gan3d-night_stand-s12")
    assert run == runs.Run("lite", "gan3d", "night_stand", 12) and run.id.endswith("_stand-s12")
    for name in (
        "",
        "chair",
        "lite-gan3d-chair",
        "lite-gan3d-chair-0",
        "lite-gan3d-chair-sx",
        "lite-gan3d-chair-s-1",
        "lite-gan3d-chair-s²",
        "lite-gan3d-chair-s",
    ):
        with pytest.raises(StudyError, match="is no run; a run is <profile>-<model>"):
            runs.Run.parse(name)


@pytest.mark.parametrize(
    "model, category, seed, said",
    [
        ("vae", "chair", 0, "no model 'vae'; choose one of judge, gan3d, desnet3d, winn3d, beyond"),
        ("gan3d", "lamp", 0, "no category 'lamp'; choose one of bathtub, bed"),
        ("judge", "chair", 0, "the judge is trained on all categories"),
        ("gan3d", "chair", -1, "seed must be 0 or more, not -1"),
    ],
)
def test_runs_that_cannot_be(model, category, seed, said):
    with pytest.raises(StudyError, match=said):
        runs.Run("smoke", model, category, seed).checked()


def test_a_key_names_all_that_the_result_depends_on(workspace, smoke, monkeypatch, params):
    def key(run=CHAIR, **changes):
        return runs.key(run, config.with_changes(smoke, **changes))

    base = key()
    assert base.startswith("smoke-gan3d-chair-s0-") and base == key()
    other = [
        key(gan3d={"steps": 9}),
        key(gan3d={"label_real": 0.9}),
        key(gan3d={"latent": "normal"}),
        key(evaluation={"n_samples": 17}),
        key(runs.Run("smoke", "gan3d", "toilet", 0)),
        key(runs.Run("smoke", "gan3d", "chair", 1)),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(data, "card", lambda settings: {"hash": "other data"})
        other.append(key())
    recipes = yaml.safe_load((params / "recipes.yaml").read_text())
    recipes["gan3d"]["recipe"] += 1
    (params / "recipes.yaml").write_text(yaml.safe_dump(recipes))
    other.append(key())
    assert len({base, *other}) == 9


def test_a_key_ignores_what_changes_no_result(workspace, smoke):
    base = {run: runs.key(run, smoke) for run in (CHAIR, JUDGE)}
    for changes in (
        {"device": {"threads": 4}},
        {"device": {"deterministic": False}},
        {"evaluation": {"n_draws": 99}},
        {"evaluation": {"k": 4}},
    ):
        changed = config.with_changes(smoke, **changes)
        assert {run: runs.key(run, changed) for run in base} == base
    assert runs.key(CHAIR, config.with_changes(smoke, judge={"lr": 0.02})) == base[CHAIR]
    assert runs.key(JUDGE, config.with_changes(smoke, gan3d={"steps": 9})) == base[JUDGE]
    assert (
        runs.key(JUDGE, config.with_changes(smoke, evaluation={"n_samples": 9, "n_equal": 9}))
        == (base[JUDGE])
    )


@pytest.mark.parametrize(
    "name, holds", [("smoke", True), ("quick", True), ("lite", False), ("study", False)]
)
def test_local_keys_hold_the_code(monkeypatch, name, holds):
    monkeypatch.setattr(data, "card", lambda settings: {"hash": "x"})
    profile, run = config.load(name), runs.Run(name, "gan3d", "chair", 0)
    before = runs.key(run, profile)
    monkeypatch.setattr(runs, "syntax_hash", lambda model: "changed")
    assert (runs.key(run, profile) != before) == holds


def test_lite_and_study_never_share_a_run(monkeypatch):
    monkeypatch.setattr(data, "card", lambda settings: {"hash": "x"})
    keys = [
        runs.key(r, config.load(n)) for n in ("lite", "study") for r in runs.wanted(config.load(n))
    ]
    assert len(set(keys)) == len(keys)


# ---------------------------------------------------------------- recipes


@pytest.fixture
def code(tmp_path, monkeypatch, params):
    """A copy of lib/ whose text a test may change, with recipes stamped for it."""
    shutil.copytree(paths.CODE / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__py*"))
    monkeypatch.setattr(paths, "CODE", tmp_path)
    runs.stamp_recipes()
    return tmp_path / "lib"


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_recipes_are_not_stale_in_this_checkout():
    assert runs.stale_recipes() == []


def test_words_do_not_make_a_recipe_stale(code):
    assert runs.stale_recipes() == []
    edit(code / "train" / "gan3d.py", '"""One discriminator update', '"""Just one update')
    edit(code / "rng.py", "def ", "# a comment\ndef ")
    assert runs.stale_recipes() == []


@pytest.mark.parametrize(
    "file, old, new, stale",
    [
        (
            "train/gan3d.py",
            'self.counters["updates"] += 1',
            'self.counters["updates"] += 2',
            ["gan3d", "gan64", "vaegan3d", "encoder_decoder"],
        ),
        (
            "losses.py",
            "softplus(fake).mean()",
            "softplus(fake).sum()",
            ["gan3d", "winn3d", "beyond", "vae3d", "autoencoder", "introspective", "gan64"]
            + ["vaegan3d", "encoder_decoder"],
        ),
        ("models/nin3d.py", "nn.Dropout(0.5)", "nn.Dropout(0.4)", ["judge"]),
        ("models/desnet3d.py", "total // 2", "total // 3", ["desnet3d"]),
        (
            "models/winn3d.py",
            "return -self(x)",
            "return self(x)",
            ["winn3d", "beyond", "baseline", "tuned", "hardened", "introspective", "voxnet"]
            + ["orion"],
        ),
        ("models/vae3d.py", "codes.mean(0)", "codes.amax(0)", ["vae3d", "autoencoder"]),
        ("train/vae3d.py", "self.section.beta * kl", "kl", ["vae3d"]),
        ("rng.py", "digest[:8]", "digest[8:16]", list(runs.MODELS)),
        ("train/engine.py", "step += 1", "step += 2", list(runs.MODELS)),
    ],
)
def test_a_change_of_training_code_is_found(code, file, old, new, stale):
    edit(code / file, old, new)
    assert runs.stale_recipes() == stale


def test_stamping_keeps_the_numbers_and_the_words(code, params):
    path = params / "recipes.yaml"
    path.write_text(re.sub(r"recipe: \d+", "recipe: 7", path.read_text()))
    edit(code / "rng.py", "digest[:8]", "digest[8:16]")
    runs.stamp_recipes()
    assert runs.stale_recipes() == []
    assert {name: row["recipe"] for name, row in runs.recipes().items()} == dict.fromkeys(
        runs.MODELS, 7
    )
    assert path.read_text().startswith("# recipe: raised by hand")


# ---------------------------------------------------------------- queue and adoption


@pytest.fixture
def nothing_published(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "results", lambda profile: tmp_path / "results" / profile)


def test_pending_runs(nothing_published, smoke):
    found = runs.pending(smoke)
    cheapest = sorted(runs.wanted(smoke), key=lambda r: smoke.wanted[r.model].minutes)
    assert [p.run for p in found] == cheapest and len(found) >= 6
    assert found[0].run == CHAIR and found[-1].run == JUDGE
    assert all((p.step, p.n_steps, p.active) == (0, 0, False) for p in found)
    assert train(CHAIR, smoke, deadline=-math.inf) is None
    chair = next(p for p in runs.pending(smoke) if p.run == CHAIR)
    assert (chair.step, chair.n_steps, chair.active) == (1, 8, False) and chair.minutes >= 0
    with engine.lock(runs.state_folder(CHAIR, smoke)):
        assert next(p for p in runs.pending(smoke) if p.run == CHAIR).active
    (runs.state_folder(CHAIR, smoke) / "status.json").write_text("{}")
    assert next(p for p in runs.pending(smoke) if p.run == CHAIR).step == 0
    final = train(CHAIR, smoke)
    assert CHAIR not in [p.run for p in runs.pending(smoke)]
    assert runs.complete_unpublished(smoke) == [CHAIR]
    runs.publish(CHAIR, final)
    assert runs.complete_unpublished(smoke) == [] and runs.is_published(CHAIR, smoke)
    assert sorted(content(CHAIR.weights)) == ["card.md", "generator.safetensors"]
    names = ["log.csv", "run.json", "samples-0.1.npz", "samples-0.5.npz"]
    assert sorted(content(CHAIR.samples)) == names


def test_what_another_clone_made_counts_while_its_parameters_hold(nothing_published, monkeypatch):
    """dvc.lock records parameters and recipe of a listed run; with others it is to be trained."""
    lite, run = config.load("lite"), runs.Run("lite", "winn3d", "chair", 0)
    assert runs.is_published(run, lite)
    assert not runs.is_published(runs.Run("lite", "winn3d", "chair", 9), lite)
    assert not runs.is_published(run, config.with_changes(lite, winn3d={"lr": 0.5}))
    raised = {name: r | {"recipe": r["recipe"] + 1} for name, r in runs.recipes().items()}
    monkeypatch.setattr(runs, "recipes", lambda: raised)
    assert not runs.is_published(run, lite)


@pytest.mark.parametrize("text", ["", "schema: '2.0'\n", "stages:\n  judge: {cmd: 'py", "stages"])
def test_a_lock_that_is_being_written_is_one_line(nothing_published, monkeypatch, tmp_path, text):
    (tmp_path / "dvc.lock").write_text(text)
    monkeypatch.setattr(paths, "CODE", tmp_path)
    with pytest.raises(StudyError, match="^dvc.lock: empty or cut short; [^\n]+$"):
        runs.is_published(runs.Run("lite", "winn3d", "chair", 0), config.load("lite"))


def test_adoption(nothing_published, smoke, params):
    assert runs.adopt(smoke) == []
    before = (params / "runs.yaml").read_text()
    train(CHAIR, smoke)
    toilet = runs.Run("smoke", "gan3d", "toilet", 0)
    runs.publish(toilet, train(toilet, smoke))  # as a notebook run by hand does
    train(JUDGE, smoke)
    added = ["smoke-gan3d-chair-s0", "smoke-gan3d-toilet-s0", "smoke-judge-all-s0"]
    assert sorted(runs.adopt(smoke)) == added
    text = (params / "runs.yaml").read_text()
    assert text.split("\n\n")[0] == before.split("\n\n")[0]
    listed = yaml.safe_load(text)
    assert listed["judge"]["smoke-judge-all-s0"] == dict(profile="smoke", category="all", seed=0)
    assert "smoke-gan3d-chair-s0" in listed["gan3d"]
    assert "smoke-gan3d-toilet-s0" in listed["gan3d_light"]
    assert runs.adopt(smoke) == [] and (params / "runs.yaml").read_text() == text


@pytest.mark.parametrize("lacking", ["run", "key", "recipe", "parameters", "weights"])
def test_a_damaged_record_is_neither_adopted_nor_published(
    nothing_published, smoke, params, lacking
):
    final = train(CHAIR, smoke)
    record = files.read_json(final / "run.json")
    files.write_json(final / "run.json", record | {lacking: None})
    listed = (params / "runs.yaml").read_text()
    said = f"run.json: damaged, it has no {lacking}; pull it again, or delete .*final and train"
    for use in (lambda: runs.adopt(smoke), lambda: runs.publish(CHAIR, final)):
        with pytest.raises(StudyError, match=said) as error:
            use()
        assert "\n" not in str(error.value)
    assert (params / "runs.yaml").read_text() == listed
    assert not CHAIR.samples.exists()


def test_weights_beside_a_damaged_record_are_not_used(nothing_published, smoke):
    final = train(CHAIR, smoke)
    files.write_json(final / "run.json", {})
    with pytest.raises(StudyError, match="run.json: damaged, it has no weights; pull it again"):
        runs.load_networks(CHAIR, smoke, final)


def test_weights_that_are_not_here(nothing_published, smoke):
    with pytest.raises(StudyError, match="no weights here; train it with .*; the store") as error:
        runs.weights_folder(CHAIR, smoke)
    assert "\n" not in str(error.value)


def test_samples_are_drawn_from_the_stored_weights(workspace, smoke, smoke_chair):
    networks = runs.load_networks(smoke_chair, smoke, smoke_chair.weights)
    voxels = runs.sample(smoke_chair, smoke, networks, list(range(16))) > 0.5
    stored = files.load_npz(smoke_chair.samples / "samples-0.5.npz")
    np.testing.assert_array_equal(voxel.pack(voxels), stored["voxels"])
    facts = files.read_json(smoke_chair.samples / "run.json")
    assert set(facts["weights"]) == {"generator.safetensors", "discriminator.safetensors"}
    generator = smoke_chair.weights / "generator.safetensors"
    assert facts["weights"][generator.name] == files.sha256(generator)
    assert not {"hours", "commit", "date", "torch"} & set(facts)
    with pytest.raises(StudyError, match="judge draws no shapes"):
        runs.sample(JUDGE, smoke, {}, [0])
