"""Several processes train what one trains, up to rounding, or say in one line that they cannot."""

import csv
import io
import json
import os
import subprocess
import sys
import types

import pytest
import torch

from lib import cli, files, paths
from lib.errors import StudyError
from lib.train import engine, ranks, runs

# Forks pairs of processes as torchrun would start them; gloo joins them on the CPU.
PAIRS = """
import json, math, os, pathlib, socket, sys
import lightning_fabric
from lib import config, paths
from lib.errors import StudyError
from lib.train import engine, ranks, runs

profile = config.with_changes(config.load("smoke"), device={"threads": 1})


def pair(run, folder, deadline):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    elastic = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 2}
    elastic |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "GROUP_RANK": 0}
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            here = elastic | {"RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({k: str(v) for k, v in here.items()})
            paths.CHECKPOINTS = pathlib.Path(folder)
            os._exit(train(run, deadline))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def train(run, deadline):
    together = ranks.start(1)
    try:
        final = runs.train(run, profile, progress=False, together=together, deadline=deadline)
    except StudyError as error:
        print(f"{together.rank}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0 if final else 3


for name, folder, stop in json.loads(sys.argv[1]):
    run, deadline = runs.Run.parse(name), -math.inf if stop else math.inf
    codes = [pair(run, folder, deadline)]
    while stop and codes[-1] == [3, 3]:
        codes.append(pair(run, folder, deadline))
    print(json.dumps(codes), flush=True)
"""
ENERGIES = ("desnet3d", "winn3d", "beyond")


@pytest.fixture(scope="module")
def pairs(workspace, tmp_path_factory):
    """Exit statuses of pairs of processes by scenario, their folders, and what they said."""
    folder = tmp_path_factory.mktemp("pairs")
    asked = {m: (f"smoke-{m}-chair-s0", str(folder / m), False) for m in (*ENERGIES, "gan3d")}
    asked["stopped"] = ("smoke-beyond-chair-s0", str(folder / "stopped"), True)
    held = runs.Run("smoke", "beyond", "chair", 1)
    asked["locked"] = (held.id, str(folder / "locked"), False)
    command = [sys.executable, "-c", PAIRS, json.dumps(list(asked.values()))]
    smoke = runs.config.with_changes(runs.config.load("smoke"), device={"threads": 1})
    with engine.lock(folder / "locked" / runs.key(held, smoke)):
        done = subprocess.run(command, cwd=paths.CODE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    codes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return dict(zip(asked, codes, strict=True)), folder, done.stderr


def numbers(text):
    """The log of a run: one list of numbers a line, warnings left out."""
    rows = list(csv.DictReader(io.StringIO(text)))
    return [[float(v) for k, v in row.items() if k != "warning"] for row in rows]


@pytest.mark.parametrize("model", ENERGIES)
def test_two_processes_train_what_one_trains(pairs, checkpoints, smoke, model):
    codes, folder, said = pairs
    assert codes[model] == [[0, 3]], said
    run = runs.Run("smoke", model, "chair", 0)
    alone = runs.train(run, smoke, progress=False)
    joined = folder / model / runs.key(run, smoke) / "final"
    one, two = ((f / "log.csv").read_text() for f in (alone, joined))
    assert one.splitlines()[0] == two.splitlines()[0]
    assert numbers(two) == [pytest.approx(row, rel=2e-3, abs=2e-4) for row in numbers(one)]
    facts = [files.read_json(f / "run.json") for f in (alone, joined)]
    assert facts[0]["key"] == facts[1]["key"]
    own, other = (runs.load_networks(run, smoke, f).values() for f in (alone, joined))
    for a, b in zip(own, other, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert (p - q).norm() <= 1e-3 * p.norm() + 1e-4


def test_a_pair_stopped_after_every_step_ends_with_the_same_bytes(pairs, smoke):
    codes, folder, said = pairs
    assert codes["stopped"] == [[3, 3]] * (smoke.beyond.steps - 1) + [[0, 3]], said
    key = runs.key(runs.Run("smoke", "beyond", "chair", 0), smoke)
    whole, parts = (folder / name / key / "final" for name in ("beyond", "stopped"))
    assert {p.name for p in whole.iterdir()} == {p.name for p in parts.iterdir()}
    assert all((parts / p.name).read_bytes() == p.read_bytes() for p in whole.iterdir())


def test_what_cannot_be_shared_is_refused(pairs):
    codes, folder, said = pairs
    assert codes["gan3d"] == [[2, 2]]
    assert "0: gan3d is trained on one device: a share of its batch does not train as" in said
    assert not list((folder / "gan3d").glob("*/*.safetensors"))


def test_a_locked_run_is_refused_to_all(pairs):
    codes, _, said = pairs
    assert codes["locked"] == [[2, 2]]
    for rank in (0, 1):
        assert f"process {os.getpid()} trains this run" in said and f"{rank}: smoke-beyond" in said
    assert "Traceback" not in said


def two(rank=0):
    fabric = types.SimpleNamespace(global_rank=rank, world_size=2, device=torch.device("cpu"))
    return ranks.Several(fabric)


def test_shares_make_the_batch():
    x = torch.arange(12).reshape(6, 2)
    assert torch.equal(torch.cat([two(0).share(x), two(1).share(x)]), x)
    assert sorted(two(0).turns(5) + two(1).turns(5)) == [0, 1, 2, 3, 4]
    with pytest.raises(StudyError, match="a batch of 5 cannot be shared by 2 devices"):
        two().share(x[:5])


def test_numbers_of_devices_that_cannot_be(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for wrong in ((0, 1), (2, 0), (-1, 1)):
        with pytest.raises(StudyError, match="--devices and --nodes must be 1 or more"):
            ranks.start(*wrong)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(StudyError, match="--devices 2: this machine has 1 GPUs"):
        ranks.start(2)
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(StudyError, match="needs `pip install lightning-fabric`"):
        ranks.start(2)


def test_one_process_needs_no_fabric():
    code = "import sys; from lib.train import ranks; ranks.start(1); print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=paths.CODE, capture_output=True, text=True, check=True)
    assert "lightning_fabric" not in done.stdout.split()


@pytest.mark.parametrize("rank, status, said", [(0, 2, "error: full\n"), (1, 0, "")])
def test_the_first_process_speaks_for_all(monkeypatch, capsys, rank, status, said):
    def fails(*_, **__):
        raise StudyError("full")

    monkeypatch.setattr(cli.device, "apply_environment", lambda device: None)
    monkeypatch.setattr(ranks, "start", lambda devices, nodes: two(rank))
    monkeypatch.setattr(runs, "train", fails)
    line = "train beyond --category chair --profile smoke --devices 2"
    assert cli.main(line.split()) == status
    assert capsys.readouterr().err == said
