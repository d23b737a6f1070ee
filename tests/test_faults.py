"""Killed, full, damaged or doubled: nothing is lost, and one line says what is wrong."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import time
import zipfile

import pytest
from dvc.exceptions import CheckoutError
from dvc.repo import Repo

from lib import cli, evaluate, files, paths, rng, store
from lib.errors import StudyError
from lib.train import checkpoint, engine, gan3d, parcel, runs

CHAIR = runs.Run("smoke", "gan3d", "chair", 0)
LEFT = {"final", "lock", "log.csv", "status.json"}  # of a complete run


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Commands set the environment and the threads of their process; here that is the tests'."""
    monkeypatch.setattr(cli.device, "apply_environment", lambda device: None)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)


def content(folder):
    """Name -> bytes of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(workspace, smoke, smoke_chair, smoke_toilet):
    """The final folders of uninterrupted runs: run -> folder."""
    return {r: runs.state_folder(r, smoke) / "final" for r in (smoke_chair, smoke_toilet)}


@pytest.fixture
def place(checkpoints, tmp_path, monkeypatch):
    """Checkpoints and results of one test."""
    monkeypatch.setattr(paths, "results", lambda profile: tmp_path / "results" / profile)
    return tmp_path


# ---------------------------------------------------------------- kill -9

# A warm process forks the victims, so that a kill costs milliseconds. Arguments: a folder, the
# source of final folders, a notebook, and moments of death in seconds.
VICTIMS = """
import functools, json, os, pathlib, resource, signal, sys, time
import torch
from lib import cli, config, paths, runner
from lib.train import engine, parcel, runs

folder, source, moments = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]
paths.results = lambda profile: folder / "results" / profile
profile = config.with_changes(config.load("smoke"), device={"threads": 1})
cli.config.load = lambda name: profile
fit = functools.partial(engine.fit, checkpoint_seconds=0)
torch.optim.Adam([torch.zeros(1)])  # what it imports at first use


def counted(task, place, **options):
    with open(folder / "begun", "a") as file:
        file.write(f"{options['name']}\\n")
    return fit(task, place, **options)


engine.fit = counted


def begin(work):
    child = os.fork()
    if child == 0:
        os._exit(work() or 0)
    return child


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(seconds, *children):
    time.sleep(seconds)
    for child in children:
        os.kill(child, signal.SIGKILL)
    return [end(child) for child in children]


def queue():
    return cli.main("queue --profile smoke --run --only smoke-gan3d --quiet".split())


said = {}
paths.CHECKPOINTS = folder / "together"
said["together"] = [end(child) for child in [begin(queue), begin(queue)]]
said["begun"] = (folder / "begun").read_text().split()

paths.CHECKPOINTS = folder / "killed"
said["killed"] = []
for moment in moments:
    said["killed"] += kill_after(float(moment), begin(queue), begin(queue))
said["finished"] = end(begin(queue))



def limited():
    sys.stderr = open(folder / "limited.txt", "w", buffering=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return cli.main("train gan3d --category chair --profile smoke --quiet".split())


paths.CHECKPOINTS = folder / "limited"
said["limited"] = end(begin(limited))

paths.CHECKPOINTS = source
parts = functools.partial(parcel.pack, [profile], part_bytes=46_000)
said["packed"], said["parts"] = [], []
for number, moment in enumerate(moments * 3):
    target = folder / f"parcel-{number}"
    pack = begin(lambda: parts(folder=target) and 0)
    said["packed"] += kill_after(float(moment) / 20, pack)
    said["parts"].append(sorted(str(p) for p in target.glob("part-*.zip")))
parts(folder=folder / "parcel")

paths.CHECKPOINTS = folder / "unpacked"
said["unpacked"], said["placed"] = [], []
sent = sorted((folder / "parcel").glob("*.zip"))
for moment in moments * 3:
    unpack = begin(lambda: parcel.unpack(sent, [profile]) and 0)
    said["unpacked"] += kill_after(float(moment) / 40, unpack)
    placed = folder.glob("unpacked/*/final")
    said["placed"].append({p.parent.name: len(list(p.iterdir())) for p in placed})
parcel.unpack(sent, [profile])

# Only papermill, which takes seconds, is left out: it writes a copy elsewhere.
notebook, output = folder / "a.ipynb", folder / "executed.ipynb"
runner.CHECKPOINTS = folder / "runner"
runner._Run.papermill = lambda run: run.working.write_text(notebook.read_text())
runner.die_with_parent = lambda: None
execute = functools.partial(runner.execute, notebook, output, {}, progress=False)
output.write_text("older")
said["executed"], said["outputs"] = [], []
for moment in moments * 3:
    said["executed"] += kill_after(float(moment) / 20, begin(execute))
    said["outputs"].append(output.read_text())
    output.write_text("older")
execute()
print("RESULT" + json.dumps(said))
"""
NOTEBOOK = {
    "cells": [
        {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "source": "x = 1"}
        | {"outputs": [], "execution_count": None}
    ],
    "metadata": {},
    "nbformat": 4,
    "nbformat_minor": 5,
}


@pytest.fixture(scope="module")
def victims(workspace, whole, tmp_path_factory):
    """What the killed processes left: a folder, and what was seen after each death."""
    folder = tmp_path_factory.mktemp("victims")
    (folder / "a.ipynb").write_text(json.dumps(NOTEBOOK))
    for final in whole.values():
        shutil.copytree(final, folder / "source" / final.parent.name / "final")
    moments = rng.numpy_generator("faults").uniform(0.05, 0.5, 5).round(3)
    command = [sys.executable, "-c", VICTIMS, folder, folder / "source", *moments]
    done = subprocess.run(
        [str(c) for c in command], cwd=paths.CODE, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return folder, json.loads(done.stdout.split("RESULT")[1])


def complete(folder, whole):
    """Runs in a folder of checkpoints are the uninterrupted ones, and nothing lies about."""
    keys = {final.parent.name for final in whole.values()}
    assert {p.name for p in folder.iterdir()} == keys
    for final in whole.values():
        assert content(folder / final.parent.name / "final") == content(final)
    return {p.name for key in keys for p in (folder / key).iterdir()}


def test_two_queues_train_every_run_exactly_once(victims, whole):
    folder, said = victims
    assert said["together"] == [0, 0]
    assert sorted(said["begun"]) == sorted(run.id for run in whole)
    assert complete(folder / "together", whole) == LEFT


def test_queues_killed_at_random_moments(victims, whole):
    folder, said = victims
    assert -9 in said["killed"] and set(said["killed"]) <= {0, -9}
    assert said["finished"] == 0
    assert complete(folder / "killed", whole) == LEFT


def test_packing_killed_at_random_moments(victims):
    """Every part that is there is the part of the whole parcel."""
    folder, said = victims
    assert -9 in said["packed"]
    parts = content(folder / "parcel")
    for found in said["parts"]:
        for part in found:
            name = os.path.basename(part)
            assert zipfile.ZipFile(part).testzip() is None
            assert open(part, "rb").read() == parts[name]


def test_unpacking_killed_at_random_moments(victims, whole):
    """A run that is there is there with all its files."""
    folder, said = victims
    assert -9 in said["unpacked"]
    n_files = {final.parent.name: len(list(final.iterdir())) for final in whole.values()}
    for placed in said["placed"]:
        assert placed == {key: n_files[key] for key in placed}
    complete(folder / "unpacked", whole)


def test_the_notebook_runner_killed_at_random_moments(victims):
    folder, said = victims
    assert -9 in said["executed"]
    assert set(said["outputs"]) <= {"older", (folder / "executed.ipynb").read_text()}


# ---------------------------------------------------------------- full disk


def test_files_cannot_grow(victims, checkpoints, whole, smoke, monkeypatch):
    """A real limit of the system, met by the whole command; then there is room again."""
    folder, said = victims
    assert said["limited"] == cli.STATUS_BAD_INPUT
    line = (folder / "limited.txt").read_text().splitlines()[-1]
    assert line.startswith("error: ") and "File too large); nothing was changed" in line
    monkeypatch.setattr(paths, "CHECKPOINTS", folder / "limited")
    assert not runs.is_complete(CHAIR, smoke)
    assert content(runs.train(CHAIR, smoke, progress=False)) == content(whole[CHAIR])


@pytest.mark.parametrize("nth", [0, 25, 28])
def test_the_disk_is_full_at_the_nth_write(place, whole, smoke, monkeypatch, nth):
    calls = iter(range(1000))

    def full(handle):
        if next(calls) >= nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr(
            engine.fit, "__kwdefaults__", engine.fit.__kwdefaults__ | {"checkpoint_seconds": 0.0}
        )
        with pytest.raises(StudyError, match="No space left on device") as error:
            runs.train(CHAIR, smoke, progress=False)
        assert "\n" not in str(error.value)
    assert not runs.is_complete(CHAIR, smoke)
    assert content(runs.train(CHAIR, smoke, progress=False)) == content(whole[CHAIR])


def test_the_disk_is_full_while_publishing(place, whole, smoke, monkeypatch):
    runs.publish(CHAIR, whole[CHAIR])
    before = content(place / "results")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in ((shutil, "copyfile"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(StudyError, match="No space left on device"):
                runs.publish(CHAIR, whole[CHAIR])
        assert content(place / "results") == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr(runs, "is_published", lambda run, profile: False)
        patch.setattr(paths, "CHECKPOINTS", whole[CHAIR].parent.parent)
        with pytest.raises(StudyError, match="No space left on device"):
            parcel.pack([smoke], place / "parcel")
    assert list((place / "parcel").iterdir()) == []


# ---------------------------------------------------------------- damage

DAMAGES = ("cut", "flipped")


def damage(path, how):
    data = bytearray(path.read_bytes())
    data[2 * len(data) // 3] ^= 4
    path.write_bytes(data[: len(data) // 2] if how == "cut" else data)


@pytest.fixture
def published(place, whole, smoke_judge, smoke, monkeypatch):
    """The chair run in place, and complete in ``.ckpt``, where a test may damage it."""
    final = runs.state_folder(CHAIR, smoke) / "final"
    shutil.copytree(whole[CHAIR], final)
    runs.publish(CHAIR, final)
    return final


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_weights_are_never_used(published, smoke, how, capsys):
    damage(CHAIR.weights / "generator.safetensors", how)
    line = "sample gan3d --category chair --profile smoke -n 2 --out"
    assert cli.main([*line.split(), str(published / "x.npz")]) == cli.STATUS_BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "damaged, or of another run" in said
    assert not (published / "x.npz").exists()


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["generator.safetensors", "discriminator.safetensors", "npz"])
def test_a_damaged_complete_run_is_neither_published_nor_packed(published, smoke, name, how):
    path = next(published.glob(f"*{name}"))
    damage(path, how)
    before = content(CHAIR.weights) | content(CHAIR.samples)
    with pytest.raises(StudyError, match=path.name) as error:
        runs.publish(CHAIR, published)
    assert "\n" not in str(error.value)
    assert content(CHAIR.weights) | content(CHAIR.samples) == before
    shutil.rmtree(CHAIR.samples)
    with pytest.raises(StudyError, match=path.name):
        parcel.pack([smoke], published.parent / "parcel")
    assert not (published.parent / "parcel").exists()


def test_a_complete_run_without_one_of_its_files(published, smoke):
    (published / "discriminator.safetensors").unlink()
    with pytest.raises(StudyError, match="discriminator.safetensors is missing"):
        runs.publish(CHAIR, published)


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_samples_are_not_judged(published, how, capsys):
    path = CHAIR.samples / "samples-0.5.npz"
    damage(path, how)
    line = ["evaluate", str(path), "--category", "chair", "--profile", "smoke"]
    assert cli.main(line) == cli.STATUS_BAD_INPUT
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and path.name in said.err


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_judge_judges_nothing(place, workspace, smoke_judge, smoke, how, monkeypatch):
    shutil.copytree(workspace / "results" / "smoke" / "judge", place / "results/smoke/judge")
    evaluate.load_judge(smoke)
    damage(smoke_judge.weights / "judge.safetensors", how)
    with pytest.raises(StudyError, match="judge.safetensors: damaged, or of another run"):
        evaluate.load_judge(smoke)


@pytest.mark.parametrize("text", ["", '{"key": ', "{}"])
def test_a_damaged_record_is_said_not_retrained(published, smoke, text, capsys):
    (CHAIR.samples / "run.json").write_text(text)
    assert cli.main(["queue", "--profile", "smoke"]) == cli.STATUS_BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "run.json" in said


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A project with the study's DVC configuration and two files in its store; then the place."""
    project = tmp_path / "project"
    (project / "out").mkdir(parents=True)
    for name in "ab":
        (project / "out" / name).write_text(name * 1000)
    monkeypatch.chdir(project)
    with Repo.init(project, no_scm=True):
        shutil.copy(paths.CODE / ".dvc" / "config", project / ".dvc" / "config")
    with Repo(project, config={"core": {"no_scm": True}}) as repo:
        repo.add("out")
        repo.push()
    for name in ("out", ".dvc/cache"):
        shutil.rmtree(project / name)
    return project


@pytest.mark.parametrize("how", [None, *DAMAGES])
def test_a_damaged_file_of_the_store_is_never_taken(stored, how):
    path = max((stored / "data/store").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    path.chmod(0o644)
    if how:
        damage(path, how)
    with Repo(stored, config={"core": {"no_scm": True}}) as repo:
        if not how:
            repo.pull()
            assert (stored / "out" / "a").read_text() == "a" * 1000
            return
        with pytest.raises(CheckoutError):
            repo.pull()
    assert not (stored / "out").exists()
    with pytest.raises(StudyError, match=f"{path.name}: damaged; bring back") as error:
        store.check(stored / "data/store")
    assert "\n" not in str(error.value)


def test_the_command_counts_the_store_or_says_what_is_damaged(stored, monkeypatch, capsys):
    monkeypatch.setattr(store.check, "__defaults__", (stored / "data/store",))
    assert cli.main(["check", "--store"]) == 0
    assert "3 files, each what its name says" in capsys.readouterr().out
    for path in (p for p in (stored / "data/store").rglob("*") if p.is_file()):
        path.chmod(0o644)
        damage(path, "cut")
    assert cli.main(["check", "--store"]) == cli.STATUS_BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "and 2 more: damaged" in said


# ---------------------------------------------------------------- two at once


def test_a_run_completed_meanwhile_is_not_trained_again(place, whole, smoke, monkeypatch):
    """Another process completes the run between the first look and the lock."""
    lock = engine.lock

    def late(folder):
        shutil.copytree(whole[CHAIR], folder / "final")
        return lock(folder)

    monkeypatch.setattr(engine, "lock", late)
    monkeypatch.setattr(engine, "fit", lambda *a, **k: pytest.fail("it trained again"))
    assert content(runs.train(CHAIR, smoke, progress=False)) == content(whole[CHAIR])


def test_looking_at_a_run_does_not_keep_another_from_it(tmp_path, monkeypatch):
    """``is_locked`` holds the lock for a moment; who wants to train then tries again."""
    (tmp_path / "lock").touch()
    flock, refusals = engine.fcntl.flock, iter([OSError()] * 3)

    def busy(file, how):
        for refusal in refusals:
            raise refusal
        return flock(file, how)

    monkeypatch.setattr(engine.fcntl, "flock", busy)
    with engine.lock(tmp_path):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_the_queue_shows_and_leaves_alone_what_trains_elsewhere(place, smoke, capsys):
    assert runs.train(CHAIR, smoke, progress=False, deadline=-math.inf) is None
    line = "queue --profile smoke --only smoke-gan3d-chair"
    with engine.lock(runs.state_folder(CHAIR, smoke)):
        assert cli.main(line.split()) == 0
        assert "\tstep 1/8, running elsewhere\n" in capsys.readouterr().out
        assert cli.main([*line.split(), "--run", "--quiet"]) == 0
        said = capsys.readouterr().err
        assert "0 runs completed, 0 stopped, 0 to go, 1 done or running elsewhere" in said
    assert not runs.is_complete(CHAIR, smoke)


# ---------------------------------------------------------------- clocks


@pytest.mark.parametrize("jump", [1e6, -1e6])
def test_clock_jumps_change_no_result(place, whole, smoke, monkeypatch, jump):
    clock, step = time.monotonic, gan3d.Gan3dTask.step
    shift = [0.0]

    def jumping(self, k):
        shift[0] += jump if k in (2, 5) else 0.0
        return step(self, k)

    with monkeypatch.context() as patch:
        patch.setattr(gan3d.Gan3dTask, "step", jumping)
        patch.setattr(engine.time, "monotonic", lambda: clock() + shift[0])
        patch.setattr(engine.time, "time", lambda: shift[0])
        final = runs.train(CHAIR, smoke, progress=False)
    assert content(final) == content(whole[CHAIR])
    assert files.read_json(final.parent / "status.json")["seconds"] >= 0


def test_a_clock_that_jumps_past_the_deadline_saves(place, whole, smoke, monkeypatch):
    clock = time.monotonic
    with monkeypatch.context() as patch:
        patch.setattr(engine.time, "monotonic", lambda: clock() + 1e6)
        deadline = clock() + 3600
        assert runs.train(CHAIR, smoke, progress=False, deadline=deadline) is None
    state = runs.state_folder(CHAIR, smoke) / "state.safetensors"
    assert checkpoint.load(state)["step"] == 1
    assert content(runs.train(CHAIR, smoke, progress=False)) == content(whole[CHAIR])
