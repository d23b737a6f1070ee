"""The command line: one clear line and status 2 on bad input, never a traceback.

Modules that load torch are imported by the commands that need them, after the environment that
pins threads and instruction set is in place.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from lib import config, device, paths
from lib.errors import StudyError

STATUS_BAD_INPUT = 2
STATUS_INTERRUPTED = 130
OFF_CENTRE = 0.06  # of the side of a grid: two voxels of thirty


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        options = parser().parse_args(arguments)
        status = options.command(options) or 0
        # Flushed here, where a full disk or a closed pipe can still be answered for.
        print(end="", flush=True)
        return status
    except StudyError as error:
        return _refuse(str(error))
    except KeyboardInterrupt as stop:
        print(f"\nstopped: {str(stop) or 'nothing is lost'}", file=sys.stderr)
        return STATUS_INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return 0
    except MemoryError:
        return _refuse("not enough memory; give fewer shapes or a smaller grid")
    except OSError as error:
        _drop_output()
        place = paths.relative(error.filename) if error.filename else "the output"
        return _refuse(f"{place}: {error.strerror or error}; check the path and the free space")


def _drop_output() -> None:
    """Nothing more goes out: the interpreter flushes once more at its end and would complain."""
    with contextlib.suppress(ValueError, AttributeError):  # no file behind it, or closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return STATUS_BAD_INPUT


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other bad input: in one line."""

    def error(self, message: str) -> NoReturn:
        raise StudyError(f"{message}; see `{self.prog} --help`")


def parser() -> Parser:
    """All commands with their help."""
    top = Parser(prog="python -m lib", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(command, *options) -> None:
        text = command.__doc__.splitlines()[0]
        name = command.__name__
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        for option in options:
            sub.add_argument(option[0], **option[1])

    profile = ("--profile", dict(required=True, help=f"one of {', '.join(config.available())}"))
    category = ("--category", dict(required=True))
    seed = ("--seed", dict(type=int, default=0))
    model = ("model", dict(metavar="MODEL"))
    layout = (
        "--layout",
        dict(choices=("padded", "tight"), help="padded: with a margin; default: as the profile's"),
    )
    quiet = ("--quiet", dict(action="store_true", help="no progress bar"))
    add(
        fetch,
        ("name", dict(nargs="?", default="modelnet10", help="modelnet10, rotations, beds64, ikea")),
        ("--from", dict(dest="source", metavar="PATH", help="a local copy of the file")),
    )
    add(prepare, profile)
    add(
        voxelize,
        ("mesh", dict(type=Path, metavar="MESH.off")),
        ("--resolution", dict(type=int, default=32)),
        ("--fill", dict(action="store_true", help="fill the interior")),
        ("--out", dict(type=Path, required=True)),
    )
    add(
        train,
        model,
        category,
        profile,
        seed,
        ("--devices", dict(type=int, default=1, help="GPUs, or CPU processes, of each machine")),
        ("--nodes", dict(type=int, default=1, help="machines")),
        quiet,
    )
    add(
        sample,
        model,
        category,
        profile,
        seed,
        ("--run-seed", dict(type=int, default=0, help="seed of the training run")),
        ("-n", dict(type=int, default=1, help="number of shapes")),
        ("--threshold", dict(type=float, help="default: that of the profile")),
        ("--out", dict(type=Path, required=True, help=".npz, .obj or .stl")),
    )
    add(
        evaluate,
        ("samples", dict(type=Path, metavar="SAMPLES.npz")),
        category,
        profile,
        layout,
    )
    add(classify, ("shape", dict(type=Path, metavar="SHAPE.npz|MESH.off")), profile, layout)
    add(
        queue,
        profile,
        ("--run", dict(action="store_true", help="train and sample, cheapest first")),
        ("--minutes", dict(type=float, help="stop cleanly in time; progress is kept")),
        ("--only", dict(metavar="TEXT", default="", help="runs whose name contains TEXT")),
        quiet,
    )
    add(pack, ("folder", dict(type=Path)), ("--profile", dict(action="append")))
    add(unpack, ("parts", dict(type=Path, nargs="+")))
    add(recipes, ("--accept", dict(action="store_true", help="stamp the present code")))
    add(
        notebook,
        ("name", dict(help="of a file in notebooks/, without suffix")),
        ("--out", dict(type=Path, required=True)),
        ("-p", dict(action="append", default=[], dest="parameters", metavar="KEY=VALUE")),
        quiet,
    )
    add(strip, ("paths", dict(type=Path, nargs="*")))
    add(adopt, profile)
    add(readme)
    add(
        check,
        ("--profile", dict(action="append")),
        ("--store", dict(action="store_true", help="only whether the artifact store is sound")),
    )
    return top


def _profile(name: str) -> config.Profile:
    """The profile, with its threads and instruction set in place before torch is imported."""
    profile = config.load(name)
    device.apply_environment(profile.device)
    return profile


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def fetch(options) -> None:
    """Bring ModelNet10, or another data set, to data/raw, checked by SHA-256."""
    from lib import data, ikea

    def bring(source) -> Path:
        return ikea.fetch(source) if options.name == "ikea" else data.fetch(source, options.name)

    try:
        # A file that is in place already counts as a copy.
        found = bring(options.source or paths.RAW)
    except StudyError:
        if options.source:
            raise
        found = bring(None)
    _say(f"{paths.relative(found)} is in place")


def prepare(options) -> None:
    """Clean, split and store the shapes of a profile."""
    profile = _profile(options.profile)
    from lib import data

    card = data.prepare(profile.data)
    _say(f"{card['name']}: hash {card['hash'][:12]}")


def voxelize(options) -> None:
    """Voxelise one OFF mesh exactly: its longest side spans the grid."""
    from lib import voxel

    if options.out.suffix.lower() != ".npz":
        raise StudyError(f"{options.out}: write .npz")
    vertices, faces = voxel.read_off(options.mesh)
    grid = voxel.voxelize(vertices, faces, options.resolution, fill=options.fill)
    voxel.save_voxels(options.out, grid[None])
    _say(f"{options.out}: {int(grid.sum())} of {grid.size} voxels")


def train(options) -> None:
    """Train one run, or go on where it stopped; a complete run does nothing.

    Of several processes the first one speaks for all.
    """
    profile = _profile(options.profile)
    from lib.train import ranks, runs

    run = runs.Run(profile.name, options.model, options.category, options.seed).checked()
    together = ranks.start(options.devices, options.nodes)
    try:
        final = runs.train(run, profile, progress=not options.quiet, together=together)
    except (StudyError, KeyboardInterrupt):
        if together.rank > 0:
            return
        raise
    if final is not None:
        print(paths.relative(final))


def sample(options) -> None:
    """Draw shapes from a trained run; shape k starts from seed + k."""
    if options.n < 1:
        raise StudyError(f"-n must be 1 or more, not {options.n}")
    if options.seed < 0:
        raise StudyError(f"--seed must be 0 or more, not {options.seed}")
    if options.threshold is not None and not 0 < options.threshold < 1:
        raise StudyError(f"--threshold must lie in (0, 1), not {options.threshold}")
    kind = options.out.suffix
    if kind not in (".npz", ".obj", ".stl"):
        raise StudyError(f"{options.out}: write .npz, .obj or .stl")
    if kind != ".npz" and options.n != 1:
        raise StudyError(f"{options.out}: a mesh file holds one shape; use -n 1 or .npz")
    profile = _profile(options.profile)
    from lib import voxel
    from lib.train import runs

    run = runs.Run(profile.name, options.model, options.category, options.run_seed).checked()
    side = getattr(getattr(profile, run.model, None), "side", profile.data.side)
    most = voxel.MAX_VOXELS // side**3
    if options.n > most:
        raise StudyError(f"-n must be at most {most} in one file, not {options.n}")
    runs.check_draws(run)
    networks = runs.load_networks(run, profile, runs.weights_folder(run, profile))
    seeds = [options.seed + k for k in range(options.n)]
    threshold = options.threshold or profile.evaluation.threshold
    voxels = runs.sample(run, profile, networks, seeds) > threshold
    write = {".npz": voxel.save_voxels, ".obj": voxel.write_obj, ".stl": voxel.write_stl}[kind]
    write(options.out, voxels if kind == ".npz" else voxels[0])
    _say(
        f"{options.out}: {len(voxels)} shapes of side {voxels.shape[1]}, "
        f"seeds {seeds[0]}..{seeds[-1]}"
    )


def evaluate(options) -> None:
    """Judge a file of samples; one JSON object on standard output."""
    profile = _profile(options.profile)
    from lib import evaluate as judging

    judging.check_category(profile, options.category)
    grids = _judge_grids(options.samples, options.layout, profile)
    if len(grids) < 2:
        raise StudyError(f"{options.samples}: {len(grids)} shapes: distances need at least 2")
    _say(f"{options.samples}: judging {len(grids)} shapes")
    print(json.dumps(judging.evaluate_file(profile, grids, options.category), indent=1))


def _judge_grids(path: Path, layout: str | None, profile):
    """Shapes of a voxel file as the judge's grids; their layout is the profile's own if not given.

    Warns where the judge would see other shapes than it knows.
    """
    from lib import data, evaluate, voxel

    voxels = voxel.load_voxels(path)
    expected = data.layout_of(profile.data.side)
    try:
        grids = evaluate.to_judge(profile, voxels, layout or expected)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None
    margin = layout is None and expected == "padded"
    _warn(path, voxels > profile.evaluation.threshold, margin)
    return grids


def _warn(path: Path, filled, margin: bool) -> None:
    """Warns of bool shapes (N, D, D, D) that are empty, off centre or, with ``margin``, too large.

    Those of the study are centred by their bounding boxes and have a margin.
    """
    from lib import voxel

    empty = ~filled.any((1, 2, 3))
    if empty.any():
        _say(f"warning: {path}: {empty.sum()} of {len(filled)} shapes are empty")
    off = voxel.off_centre(filled[~empty]).max(1, initial=0) > OFF_CENTRE
    if 2 * off.sum() > len(filled):
        _say(
            f"warning: {path}: {off.sum()} of {len(filled)} shapes stand off the centre of their "
            "grids, where those of the study are centred; move their bounding boxes to the middle"
        )
    large = voxel.fills_grid(filled)
    if margin and 2 * large.sum() > len(filled):
        _say(
            f"warning: {path}: {large.sum()} of {len(filled)} shapes reach from border to border, "
            "where those of the study have a margin; if they fill their grids, give --layout tight"
        )


def classify(options) -> None:
    """Category of each shape in a voxel file, or of a mesh, and how sure the answer is."""
    profile = _profile(options.profile)
    from lib import classify as asking
    from lib import voxel

    kind = options.shape.suffix.lower()
    if kind in (".obj", ".stl", ".ply"):
        raise StudyError(
            f"{options.shape}: no mesh but .off is read; convert it, or give voxels as .npz"
        )
    if kind == ".off":
        if options.layout:
            raise StudyError(
                f"{options.shape}: a mesh is voxelised with its margin; --layout is for .npz files"
            )
        grids = voxel.modelnet_layout(*voxel.read_off(options.shape))[None]
    else:
        grids = _judge_grids(options.shape, options.layout, profile)
    run, error, n = asking.best(profile)
    known = asking.scale(run, profile)
    _say(f"{run.id} answers: validation error {error:.3f}, the lowest of {n} classifiers in place")
    for found in asking.answers(asking.logits(asking.load_classifier(run, profile), grids), known):
        print(json.dumps({"model": run.id} | found))


def queue(options) -> int | None:
    """List the runs of a profile that are not trained, or train them.

    A run that diverged is not tried again until its parameters change; the others go on. Several
    queues may work side by side: each leaves alone what another one trains.
    """
    profile = _profile(options.profile)
    from lib.train import engine, runs

    if options.minutes is not None and not options.minutes > 0:
        raise StudyError(f"--minutes must be above 0, not {options.minutes}")
    found = [p for p in runs.pending(profile) if options.only in p.run.id]
    if not options.run:
        for p in found:
            state = f"step {p.step}/{p.n_steps}" if p.n_steps else "not begun"
            busy = ", running elsewhere" if p.active else ""
            why = f", stopped: {p.stopped}" if p.stopped else ""
            print(f"{p.run.id}\t{p.minutes:.0f} min\t{state}{busy}{why}")
        _say(f"{len(found)} runs to train, {sum(p.minutes for p in found):.0f} minutes")
        return None
    seconds = float("inf") if options.minutes is None else options.minutes * 60
    deadline = time.monotonic() + seconds
    done, elsewhere, failed = 0, 0, [p for p in found if p.stopped]
    for p in [p for p in found if not p.stopped]:
        if time.monotonic() >= deadline:
            break
        if runs.is_complete(p.run, profile):
            elsewhere += 1
            continue
        try:
            final = runs.train(p.run, profile, deadline=deadline, progress=not options.quiet)
        except engine.Locked:
            elsewhere += 1
        except StudyError as error:
            _say(f"error: {error}")
            failed.append(p)
        else:
            done += final is not None
    left = len(found) - done - elsewhere - len(failed)
    _say(
        f"{done} runs completed, {len(failed)} stopped, {left} to go"
        + (f", {elsewhere} done or running elsewhere" if elsewhere else "")
    )
    return 1 if failed else None


def pack(options) -> None:
    """Write complete runs into files of at most 15 MiB, to be carried to another machine."""
    from lib.train import parcel

    names = options.profile or ["lite", "study"]
    for path in parcel.pack([config.load(n) for n in names], options.folder):
        print(path)


def unpack(options) -> None:
    """Check packed files and put their runs where the notebooks adopt them."""
    from lib.train import parcel

    profiles = [config.load(n) for n in config.available()]
    for name in parcel.unpack(options.parts, profiles):
        print(name)


def recipes(options) -> int:
    """Compare the training code with what the recipes were stamped with."""
    from lib.train import runs

    if options.accept:
        runs.stamp_recipes()
    stale = runs.stale_recipes()
    for model in stale:
        print(
            f"{model}: its training code changed. If results change, raise its recipe in "
            "params/recipes.yaml; then run `python -m lib recipes --accept`"
        )
    return int(bool(stale))


def notebook(options) -> None:
    """Execute a notebook with parameters into a byte-stable copy."""
    import yaml

    from lib import runner

    runner.die_with_parent()
    parameters = {}
    for text in options.parameters:
        name, separator, value = text.partition("=")
        if not separator:
            raise StudyError(f"-p {text}: write KEY=VALUE")
        try:
            parameters[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise StudyError(f"-p {text}: the value is not readable as YAML") from None
    profile = config.load(str(parameters.get("profile", "smoke")))
    runner.execute(
        paths.NOTEBOOKS / f"{options.name}.ipynb",
        options.out,
        parameters,
        environment=device.environment(profile.device),
        progress=not options.quiet,
    )


def strip(options) -> None:
    """Remove outputs and stray metadata from committed notebooks, in place."""
    from lib import runner

    for path in options.paths or sorted(paths.NOTEBOOKS.glob("*.ipynb")):
        runner.strip(path)


def adopt(options) -> None:
    """List complete runs in params/runs.yaml, so that the pipeline publishes them."""
    profile = _profile(options.profile)
    from lib.train import runs

    for name in runs.adopt(profile):
        print(name)


def readme(options) -> None:
    """Fill the tables of README.md and FINDINGS.md from the results in place."""
    from lib import files, report

    for path in (paths.CODE / "README.md", paths.CODE / "FINDINGS.md"):
        files.write_text(path, report.readme_tables(path.read_text()))


def check(options) -> int | None:
    """Compare results in place with the committed ones, within their tolerance."""
    if options.store:
        from lib import store

        return print(f"data/store: {store.check()} files, each what its name says")
    from lib import report

    status = 0
    for name in [config.load(n).name for n in options.profile or ["quick", "lite", "study"]]:
        lines = report.check(name)
        status |= bool(lines)
        print("\n".join(lines) or f"{name}: results agree with the committed ones")
    return status
