"""The command line as a user meets it: help, happy paths, and one clear line for bad input."""

import hashlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from lib import cli, config, data, evaluate, files, paths, voxel
from lib.train import runs

COMMANDS = (
    "fetch prepare voxelize train sample evaluate classify queue pack unpack recipes notebook "
    "strip adopt check readme"
).split()
TETRAHEDRON = "OFF\n4 4 6\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 2 1\n3 0 1 3\n3 0 3 2\n3 1 2 3\n"


def lib(*arguments):
    """A command in this process: status, then what it wrote is with ``capsys``."""
    return cli.main([str(a) for a in arguments])


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, workspace):
    """Commands set the environment and the threads of their process; here that is the tests'."""
    monkeypatch.setattr(cli.device, "apply_environment", lambda device: None)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)


@pytest.fixture(scope="module")
def trained(workspace, smoke_judge, smoke_chair):
    """A workspace with a judge and a 3D-GAN of chairs."""
    return workspace


@pytest.fixture
def refused(capsys):
    """Run a command that must fail with status 2 and one line; returns the line."""

    def run(*arguments):
        assert lib(*arguments) == cli.STATUS_BAD_INPUT
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
        return said.err[len("error: ") : -1]

    return run


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        lib(command, "--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: python -m lib {command}" in said
    assert len(said.splitlines()) > 3


def test_the_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        lib("--help")
    said = capsys.readouterr().out
    found = re.findall(r"^    (\w+) +\S", said, re.MULTILINE)
    assert set(found) == set(COMMANDS)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom lib import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'scipy', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.CODE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["evaluate", "classify", "sample", "train", "prepare"])
def test_numbers_are_computed_in_the_profiles_environment(monkeypatch, command):
    """Threads and instruction set must be in place before numpy and torch are imported."""
    code = (
        "import sys\nfrom lib import cli\n"
        "def seen(device):\n    sys.exit(40 + bool({'numpy', 'torch'} & set(sys.modules)))\n"
        "cli.device.apply_environment = seen\n"
        "cli.main(sys.argv[1:])"
    )
    arguments = {
        "evaluate": ["x.npz", "--category", "chair"],
        "classify": ["x.npz"],
        "sample": ["gan3d", "--category", "chair", "--out", "x.npz"],
        "train": ["gan3d", "--category", "chair"],
        "prepare": [],
    }[command]
    line = [sys.executable, "-c", code, command, *arguments, "--profile", "smoke"]
    assert subprocess.run(line, cwd=paths.CODE).returncode == 40


def test_as_a_program(trained, tmp_path):
    """Bad input in a process of its own: status, streams and the one line."""
    line = [
        sys.executable,
        "-m",
        "lib",
        "train",
        "vae",
        "--category",
        "chair",
        "--profile",
        "smoke",
    ]
    done = subprocess.run(line, cwd=paths.CODE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: no model 'vae'; choose one of {', '.join(runs.MODELS)}\n"


def test_an_interrupt_is_no_traceback(monkeypatch, capsys, trained):
    def stop(*_, **__):
        raise KeyboardInterrupt("smoke-gan3d-chair-s0: stopped at step 3, saved")

    monkeypatch.setattr(runs, "train", stop)
    assert lib("train", "gan3d", "--category", "chair", "--profile", "smoke") == 130
    said = capsys.readouterr()
    assert said.err.strip() == "stopped: smoke-gan3d-chair-s0: stopped at step 3, saved"
    assert said.out == ""


def test_an_interrupt_without_words_says_that_nothing_is_lost(monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_profile", stop)
    assert lib("prepare", "--profile", "smoke") == 130
    assert capsys.readouterr().err.strip() == "stopped: nothing is lost"


@pytest.mark.parametrize(
    "error, said",
    [
        (PermissionError(13, "Permission denied", "/x/.ckpt"), "/x/.ckpt: Permission denied"),
        (OSError(28, "No space left on device"), "the output: No space left on device"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_what_the_machine_refuses_is_one_line(monkeypatch, refused, error, said):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "_profile", fail)
    assert refused("prepare", "--profile", "smoke").startswith(said)


def test_a_reader_that_went_away_is_no_error():
    code = (
        "import sys\nfrom lib import cli\n"
        "def check(options):\n    'A long answer.'\n    print('x' * 100000)\n"
        "cli.check = check\n"
        "sys.exit(cli.main(['check']))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.CODE, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_output_that_is_full_is_one_line():
    code = (
        "import sys\nfrom lib import cli\n"
        "def check(options):\n    'An answer.'\n    print('x')\n"
        "cli.check = check\n"
        "sys.exit(cli.main(['check']))"
    )
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-c", code]
        done = subprocess.run(line, cwd=paths.CODE, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == cli.STATUS_BAD_INPUT
    assert done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


# ---------------------------------------------------------------- bad input


GAN = ("gan3d", "--category", "chair", "--profile", "smoke")


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "the following arguments are required: COMMAND"),
        (("fly",), "invalid choice: 'fly'"),
        (("train",), "the following arguments are required: MODEL"),
        (("train", "gan3d", "--category", "chair"), "required: --profile"),
        (("train", *GAN, "--speed", "9"), "unrecognized arguments: --speed 9"),
        (("train", *GAN, "--seed", "one"), "argument --seed: invalid int value: 'one'"),
        (("train", *GAN, "--seed", "-1"), "seed must be 0 or more, not -1"),
        (
            ("train", "vae", *GAN[1:]),
            f"no model 'vae'; choose one of {', '.join(runs.MODELS)}",
        ),
        (("train", "gan3d", "--category", "lamp", "--profile", "smoke"), "no category 'lamp'"),
        (("train", "judge", *GAN[1:]), "the judge is trained on all categories"),
        (
            ("train", *GAN[:-1], "big"),
            "no profile 'big'; choose one of lite, paper, quick, smoke, study",
        ),
        (("prepare", "--profile", "nope"), "no profile 'nope'"),
        (("prepare", "--profile", "study"), "modelnet10.npz is missing; run `python -m lib fetch`"),
        (("train", "gan3d", "--category", "chair", "--profile", "quick"), "prepared/furniture is"),
        (("fetch", "--from", "{tmp}/none"), "no such file; give a copy of modelnet10.npz"),
        (("fetch", "lamps"), "no source 'lamps'; choose one of modelnet10"),
        (("fetch", "ikea", "--from", "{tmp}/none"), "no such file; give a copy of ikea.zip"),
        (("fetch", "ikea", "--from", "{tmp}/text.npz"), "not a readable archive"),
        (("fetch", "--from", "{tmp}/text.npz"), "this is another file or a damaged one"),
        (("sample", *GAN, "--out", "{tmp}/x.npz", "-n", "0"), "-n must be 1 or more, not 0"),
        (
            ("sample", *GAN, "--out", "{tmp}/x.npz", "--threshold", "1.5"),
            "--threshold must lie in (0, 1), not 1.5",
        ),
        (("sample", *GAN, "--out", "{tmp}/x.npz", "-n", "-3"), "-n must be 1 or more, not -3"),
        (("sample", *GAN, "--out", "{tmp}/x.npz", "-n", "1.5"), "argument -n: invalid int value"),
        (("sample", *GAN, "--out", "{tmp}/x.npz", "-n", "900000000"), "-n must be at most 310689"),
        (("sample", *GAN, "--out", "{tmp}/x.npz", "--seed", "-1"), "--seed must be 0 or more"),
        (("sample", *GAN, "--out", "{tmp}/x.npz", "--run-seed", "-1"), "seed must be 0 or more"),
        (("sample", *GAN, "--out", "{tmp}/x.npz", "--run-seed", "9"), "s9 has no weights here"),
        (("sample", *GAN, "--out", "{tmp}/x.png"), "write .npz, .obj or .stl"),
        (("sample", *GAN, "--out", "{tmp}/x"), "write .npz, .obj or .stl"),
        (("sample", *GAN, "--out", "{tmp}/x.obj", "-n", "2"), "a mesh file holds one shape"),
        (("sample", *GAN, "--out", "{tmp}/text.npz/x.npz"), "text.npz"),
        (
            ("sample", "judge", "--category", "all", "--profile", "smoke", "--out", "{tmp}/x.npz"),
            "judge draws no shapes; choose a model that does",
        ),
        (
            ("sample", "voxnet", "--category", "all", "--profile", "smoke", "--out", "{tmp}/x.npz"),
            "voxnet draws no shapes; choose a model that does",
        ),
        (("check", "--profile", "bogus"), "no profile 'bogus'; choose one of lite, paper, quick"),
        (
            ("evaluate", "{tmp}/none.npz", "--category", "chair", "--profile", "smoke"),
            "no such file",
        ),
        (("evaluate", "{tmp}/text.npz", "--category", "chair", "--profile", "smoke"), "text.npz"),
        (("evaluate", "{tmp}", "--category", "chair", "--profile", "smoke"), "folder"),
        (
            ("evaluate", "{tmp}/four.npz", "--category", "bed", "--profile", "smoke"),
            "no category 'bed'",
        ),
        (("evaluate", "{tmp}/one.npz", "--category", "chair", "--profile", "smoke"), "at least 2"),
        (("evaluate", "{tmp}/odd.npz", "--category", "chair", "--profile", "smoke"), "side 17"),
        (
            (
                "evaluate",
                "{tmp}/four.npz",
                "--category",
                "chair",
                "--profile",
                "smoke",
                "--layout",
                "x",
            ),
            "argument --layout: invalid choice: 'x'",
        ),
        (("classify", "{tmp}/none.off", "--profile", "smoke"), "no such file"),
        (("classify", "{tmp}/bad.off", "--profile", "smoke"), "bad.off"),
        (("classify", "{tmp}/odd.npz", "--profile", "smoke"), "side 17"),
        (
            ("classify", "{tmp}/a.stl", "--profile", "smoke"),
            "a.stl: no mesh but .off is read; convert it, or give voxels as .npz",
        ),
        (("classify", "{tmp}/a.OBJ", "--profile", "smoke"), "a.OBJ: no mesh but .off is read"),
        (
            ("classify", "{tmp}/good.off", "--profile", "smoke", "--layout", "tight"),
            "good.off: a mesh is voxelised with its margin; --layout is for .npz files",
        ),
        (
            ("classify", "{tmp}/four.npz", "--profile", "smoke", "--layout", "padded"),
            "grids of side 24 cannot be judged",
        ),
        (
            ("classify", "{tmp}/four.npz", "--profile", "quick"),
            "no classifier of profile quick is in place",
        ),
        (("voxelize", "{tmp}/none.off", "--out", "{tmp}/x.npz"), "no such file"),
        (("voxelize", "{tmp}/bad.off", "--out", "{tmp}/x.npz"), "bad.off"),
        (("voxelize", "{tmp}/good.off", "--resolution", "0", "--out", "{tmp}/x.npz"), "resolution"),
        (
            ("voxelize", "{tmp}/good.off", "--resolution", "9999", "--out", "{tmp}/x.npz"),
            "resolution",
        ),
        (("voxelize", "{tmp}/good.off", "--out", "{tmp}/bad.off/x.npz"), "bad.off"),
        (("queue", "--profile", "smoke", "--minutes", "0"), "--minutes must be above 0"),
        (("queue", "--profile", "smoke", "--minutes", "nan"), "--minutes must be above 0"),
        (
            ("pack", "{tmp}/parcel", "--profile", "smoke"),
            "no complete run to pack; `python -m lib queue --run --profile smoke` trains",
        ),
        (("notebook", "none", "--out", "{tmp}/x.ipynb"), "none"),
        (("notebook", "none", "--out", "{tmp}/x.ipynb", "-p", "seed"), "-p seed: write KEY=VALUE"),
        (("notebook", "none", "--out", "{tmp}/x.ipynb", "-p", "seed=["), "not readable as YAML"),
        (("notebook", "none", "--out", "{tmp}/x.ipynb", "-p", "profile=big"), "no profile 'big'"),
    ],
)
def test_bad_input(trained, refused, tmp_path, arguments, said):
    (tmp_path / "text.npz").write_text("not an archive")
    (tmp_path / "bad.off").write_text("OFF\n3 1 0\n0 0 0\n")
    (tmp_path / "good.off").write_text(TETRAHEDRON)
    for name, shape in (("one", (1, 24)), ("four", (4, 24)), ("odd", (4, 17))):
        voxel.save_voxels(tmp_path / f"{name}.npz", np.ones((shape[0], *[shape[1]] * 3), bool))
    before = sorted(tmp_path.glob("**/*"))
    results = sorted(trained.glob("results/**/*"))
    assert said in refused(*(a.format(tmp=tmp_path) for a in arguments))
    assert sorted(tmp_path.glob("**/*")) == before
    assert sorted(trained.glob("results/**/*")) == results


def test_parts_that_cannot_be_unpacked(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "wanted", lambda profile: [])
    (tmp_path / "part.zip").write_text("damaged")
    assert "part.zip: damaged part" in refused("unpack", tmp_path / "part.zip")
    assert "none.zip: no such file" in refused("unpack", tmp_path / "none.zip")


# ---------------------------------------------------------------- happy paths


def test_prepare(capsys, workspace):
    before = (paths.PREPARED / "tiny" / "train.npz").read_bytes()
    assert lib("prepare", "--profile", "smoke") == 0
    assert capsys.readouterr().err.startswith("tiny: hash ")
    assert (paths.PREPARED / "tiny" / "train.npz").read_bytes() == before


def test_train_prints_where_the_run_lies(capsys, checkpoints):
    assert lib("train", "gan3d", "--category", "chair", "--profile", "smoke", "--quiet") == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.endswith("/final") and (paths.WORKSPACE / printed / "samples-0.5.npz").is_file()
    assert lib("train", "gan3d", "--category", "chair", "--profile", "smoke") == 0
    assert capsys.readouterr().out.splitlines() == [printed]


def test_sample_names_shapes_by_seeds(trained, tmp_path, capsys):
    assert lib("sample", *GAN, "--out", tmp_path / "a.npz", "-n", "5") == 0
    assert "5 shapes of side 24, seeds 0..4" in capsys.readouterr().err
    assert lib("sample", *GAN, "--out", tmp_path / "b.npz", "-n", "2", "--seed", "3") == 0
    a, b = (voxel.load_voxels(tmp_path / f"{n}.npz") for n in "ab")
    np.testing.assert_array_equal(a[3:], b)
    folder = trained / "results/smoke/samples/smoke-gan3d-chair-s0"
    stored = voxel.load_voxels(folder / "samples-0.5.npz")
    np.testing.assert_array_equal(a, stored[:5])
    assert lib("sample", *GAN, "--out", tmp_path / "c.npz", "-n", "5") == 0
    assert files.sha256(tmp_path / "a.npz") == files.sha256(tmp_path / "c.npz")


@pytest.mark.parametrize("suffix", [".obj", ".stl"])
def test_sample_writes_meshes(trained, tmp_path, suffix):
    import trimesh

    assert lib("sample", *GAN, "--out", tmp_path / f"x{suffix}") == 0
    mesh = trimesh.load(tmp_path / f"x{suffix}")
    assert len(mesh.faces) > 0 and mesh.bounds.max() <= 24


def test_evaluate_prints_one_object(trained, tmp_path, capsys):
    assert lib("sample", *GAN, "--out", tmp_path / "a.npz", "-n", "12") == 0
    capsys.readouterr()
    line = ("evaluate", tmp_path / "a.npz", "--category", "chair", "--profile", "smoke")
    assert lib(*line) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["n"] == 12 and {"fid test", "kid test", "memorisation"} <= set(found)
    assert "judging 12 shapes" in shown.err
    assert lib(*line, "--layout", "tight") == 0
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.parametrize(("margin", "warned"), [(0, True), (4, False)])
def test_shapes_that_fill_their_grids_are_noticed(tmp_path, capsys, margin, warned):
    """The study's grids have a margin; where smoke's are tight, a profile of 32 is asked."""
    grids = np.pad(
        np.ones((2, 32 - 2 * margin, 4, 4), bool), [(0, 0), (margin,) * 2, (14, 14), (14, 14)]
    )
    lite, path = config.load("lite"), tmp_path / "a.npz"
    voxel.save_voxels(path, grids)
    padded = evaluate.to_judge(lite, grids, "padded")
    assert np.array_equal(cli._judge_grids(path, None, lite), padded)
    assert ("give --layout tight" in capsys.readouterr().err) == warned
    tight = evaluate.to_judge(lite, grids, "tight")
    assert np.array_equal(cli._judge_grids(path, "tight", lite), tight)
    assert capsys.readouterr().err == ""


def test_shapes_that_stand_off_the_centre_or_are_empty_are_noticed(tmp_path, capsys):
    grids = np.zeros((3, 32, 32, 32), bool)
    grids[:2, 10:22, 10:22, 4:16] = True  # on a floor, the third is empty
    voxel.save_voxels(tmp_path / "a.npz", grids)
    cli._judge_grids(tmp_path / "a.npz", None, config.load("lite"))
    said = capsys.readouterr().err
    assert "a.npz: 1 of 3 shapes are empty" in said
    assert "a.npz: 2 of 3 shapes stand off the centre" in said


def test_fetch_takes_what_is_in_place(tmp_path, capsys, monkeypatch):
    content = b"shapes"
    source = ("toy.npz", hashlib.sha256(content).hexdigest(), None)
    monkeypatch.setattr(data, "SOURCES", {"modelnet10": source})
    monkeypatch.setattr(paths, "RAW", tmp_path)
    assert lib("fetch") == 2 and "no public address" in capsys.readouterr().err
    (tmp_path / "toy.npz").write_bytes(content)
    assert lib("fetch") == 0 and "in place" in capsys.readouterr().err
    (tmp_path / "toy.npz").write_bytes(b"damaged")
    assert lib("fetch") == 2 and "no public address" in capsys.readouterr().err


def test_voxelize_does_not_write_over_the_mesh(tmp_path, capsys):
    mesh = tmp_path / "a.off"
    mesh.write_text(TETRAHEDRON)
    assert lib("voxelize", mesh, "--resolution", "8", "--out", mesh) == 2
    assert mesh.read_text() == TETRAHEDRON and "write .npz" in capsys.readouterr().err


def test_classify(trained, tmp_path, capsys):
    voxel.save_voxels(tmp_path / "a.npz", np.ones((3, 24, 24, 24), bool))
    assert lib("classify", tmp_path / "a.npz", "--profile", "smoke") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3
    for found in rows:
        assert set(found["probabilities"]) == set(config.CATEGORIES)
        assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-3)
        assert found["category"] == next(iter(found["probabilities"]))
    (tmp_path / "a.off").write_text(TETRAHEDRON)
    assert lib("classify", tmp_path / "a.off", "--profile", "smoke") == 0
    assert json.loads(capsys.readouterr().out)["category"] in config.CATEGORIES


def test_voxelize(tmp_path, capsys):
    (tmp_path / "a.off").write_text(TETRAHEDRON)
    assert (
        lib("voxelize", tmp_path / "a.off", "--resolution", "8", "--out", tmp_path / "a.npz") == 0
    )
    surface = voxel.load_voxels(tmp_path / "a.npz")
    assert surface.shape == (1, 8, 8, 8)
    assert f"{surface.sum()} of 512 voxels" in capsys.readouterr().err
    line = (
        "voxelize",
        tmp_path / "a.off",
        "--resolution",
        "8",
        "--fill",
        "--out",
        tmp_path / "b.npz",
    )
    assert lib(*line) == 0
    assert voxel.load_voxels(tmp_path / "b.npz").sum() > surface.sum()


def test_queue_lists_then_trains(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "results", lambda profile: tmp_path / "results" / profile)
    assert lib("queue", "--profile", "smoke") == 0
    said = capsys.readouterr()
    listed = [text.split("\t")[0] for text in said.out.splitlines()]
    assert set(listed) == {r.id for r in runs.wanted(config.load("smoke"))}
    assert f"{len(listed)} runs to train" in said.err
    assert "smoke-gan3d-chair-s0\t1 min\tnot begun" in said.out
    line = ("queue", "--profile", "smoke", "--run", "--only", "smoke-gan3d", "--quiet")
    assert lib(*line, "--minutes", "0.00001") == 0
    assert "0 runs completed, 0 stopped, 2 to go" in capsys.readouterr().err
    assert lib(*line) == 0
    assert "2 runs completed, 0 stopped, 0 to go" in capsys.readouterr().err
    assert lib("queue", "--profile", "smoke") == 0
    left = [text.split("\t")[0] for text in capsys.readouterr().out.splitlines()]
    assert left == [name for name in listed if "smoke-gan3d" not in name]
    assert left[-1] == "smoke-judge-all-s0"  # the dearest


def test_pack_and_unpack(checkpoints, tmp_path, monkeypatch, capsys, smoke):
    monkeypatch.setattr(paths, "results", lambda profile: tmp_path / "results" / profile)
    assert lib("train", "gan3d", "--category", "chair", "--profile", "smoke", "--quiet") == 0
    capsys.readouterr()
    assert lib("pack", tmp_path / "parcel", "--profile", "smoke") == 0
    parts = capsys.readouterr().out.splitlines()
    assert parts == [str(tmp_path / "parcel" / "part-000.zip")]


def test_adopt_prints_what_it_added(checkpoints, params, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "results", lambda profile: tmp_path / "results" / profile)
    assert lib("adopt", "--profile", "smoke") == 0
    assert capsys.readouterr().out == ""
    assert lib("train", "gan3d", "--category", "chair", "--profile", "smoke", "--quiet") == 0
    capsys.readouterr()
    assert lib("adopt", "--profile", "smoke") == 0
    assert capsys.readouterr().out == "smoke-gan3d-chair-s0\n"


def test_recipes_tell_what_changed(params, capsys):
    assert lib("recipes", "--accept") == 0
    assert lib("recipes") == 0
    text = (params / "recipes.yaml").read_text()
    (params / "recipes.yaml").write_text(re.sub("  syntax: .*", "  syntax: old", text, count=1))
    assert lib("recipes") == 1
    assert "judge: its training code changed" in capsys.readouterr().out
    assert lib("recipes", "--accept") == 0
    assert (params / "recipes.yaml").read_text() == text
