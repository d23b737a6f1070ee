"""What tests share: a workspace of small shapes, two models trained in it, and the real data.

Threads and the instruction set are fixed before anything imports numpy or torch, here and in the
processes that tests start.
"""

import contextlib
import os
from pathlib import Path

import pytest

from lib import config, device, paths

os.environ.update(device.environment(config.Device(threads=1, deterministic=True)))


@contextlib.contextmanager
def _writing_to(folder):
    """Point this process and those it starts at another workspace, for the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUDY_WORKSPACE", str(folder))
        patch.setattr(paths, "WORKSPACE", folder)
        patch.setattr(paths, "RAW", folder / "data" / "raw")
        patch.setattr(paths, "PREPARED", folder / "data" / "prepared")
        patch.setattr(paths, "CHECKPOINTS", folder / ".ckpt")
        yield folder


@pytest.fixture(scope="session")
def smoke():
    """The smoke profile on one thread; its keys are those of the file."""
    return config.with_changes(config.load("smoke"), device={"threads": 1})


@pytest.fixture(scope="session")
def workspace_folder(tmp_path_factory, smoke):
    """A workspace with the smoke shapes prepared, made once; use it through ``workspace``."""
    from lib import data

    with _writing_to(tmp_path_factory.mktemp("workspace").resolve()) as folder:
        data.prepare(smoke.data)
    return folder


@pytest.fixture(scope="module")
def workspace(workspace_folder):
    """The shared workspace, in force for the tests of one file and the processes they start."""
    with _writing_to(workspace_folder) as folder:
        yield folder


def _published(folder, smoke, model, category):
    """A smoke run, trained and published in the shared workspace."""
    from lib.train import runs

    with _writing_to(folder):
        run = runs.Run("smoke", model, category, 0)
        runs.publish(run, runs.train(run, smoke, progress=False))
    return run


@pytest.fixture(scope="session")
def smoke_judge(workspace_folder, smoke):
    """The smoke judge, trained once and published."""
    return _published(workspace_folder, smoke, "judge", "all")


@pytest.fixture(scope="session")
def smoke_chair(workspace_folder, smoke):
    """The smoke 3D-GAN of chairs, trained once and published."""
    return _published(workspace_folder, smoke, "gan3d", "chair")


@pytest.fixture(scope="session")
def smoke_toilet(workspace_folder, smoke):
    """The smoke 3D-GAN of toilets, trained once and published."""
    return _published(workspace_folder, smoke, "gan3d", "toilet")


@pytest.fixture
def checkpoints(workspace, tmp_path, monkeypatch):
    """An empty folder of checkpoints for one test that trains."""
    monkeypatch.setattr(paths, "CHECKPOINTS", tmp_path / ".ckpt")
    return tmp_path / ".ckpt"


@pytest.fixture
def params(tmp_path, monkeypatch):
    """A copy of params/ that a test may change."""
    folder = tmp_path / "params"
    folder.mkdir()
    for file in paths.PARAMS.glob("*.yaml"):
        (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(paths, "PARAMS", folder)
    return folder


@pytest.fixture(scope="session")
def modelnet10():
    """The path of a copy of modelnet10.npz, or a skip that says which variable names it."""
    path = Path(os.environ.get("MODELNET10", ""))
    if path.is_dir():
        path = path / "modelnet10.npz"
    if not path.is_file():
        pytest.skip("MODELNET10 names no copy of modelnet10.npz")
    return path.resolve()
