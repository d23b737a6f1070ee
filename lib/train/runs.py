"""Runs: what one is called, what it depends on, where its state lies, and how it is completed.

A run trains one model on one category with one seed. Its state lives in ``.ckpt/<key>``, where the
key is a hash of everything that its result depends on; ``final/`` in it appears whole when the run
is complete, and is what notebooks publish to ``results`` and what ``pack`` carries.
"""

import ast
import datetime
import hashlib
import importlib
import json
import math
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from lib import config, data, device, files, paths, voxel
from lib.errors import StudyError
from lib.train import checkpoint, engine

LOCAL = ("smoke", "quick")  # profiles whose bytes must repeat: no hours, commits or versions inside


# Training modules (lib/train/<name>.py) and the name of the model's row in the tables.
MODELS = {
    "judge": "3dnin_fc (judge)",
    "gan3d": "3D-GAN",
    "desnet3d": "3D DescriptorNet",
    "winn3d": "3DWINN",
    "beyond": "ours (persistent chains)",
    "vaegan3d": "3D-VAE-GAN",
    "encoder_decoder": "encoder-decoder",
}

PROBABILITIES = ("gan3d", "vaegan3d")  # models whose samples are probabilities


def model(name: str) -> engine.Model:
    """How a model is trained and stored; its module is imported here, and only when asked for."""
    return importlib.import_module(f"lib.train.{name}").MODEL


@dataclass(frozen=True)
class Run:
    """One model, category and seed in one profile."""

    profile: str
    model: str
    category: str
    seed: int

    @property
    def id(self) -> str:
        return paths.run_id(self.profile, self.model, self.category, self.seed)

    @classmethod
    def parse(cls, name: str) -> "Run":
        """The run of an id such as ``lite-gan3d-chair-s0``; StudyError when it is not one."""
        parts = name.rsplit("-", 3)
        if len(parts) == 4 and parts[3][:1] == "s" and parts[3][1:].isdecimal():
            return cls(parts[0], parts[1], parts[2], int(parts[3][1:])).checked()
        raise StudyError(f"{name!r} is no run; a run is <profile>-<model>-<category>-s<seed>")

    def checked(self) -> "Run":
        """Itself, or StudyError naming what is not known."""
        if self.model not in MODELS:
            raise StudyError(f"no model {self.model!r}; choose one of {', '.join(MODELS)}")
        if self.category not in (*config.CATEGORIES, "all"):
            names = ", ".join((*config.CATEGORIES, "all"))
            raise StudyError(f"no category {self.category!r}; choose one of {names}")
        if self.model == "judge" and self.category != "all":
            raise StudyError("the judge is trained on all categories: --category all")
        if self.seed < 0:
            raise StudyError(f"seed must be 0 or more, not {self.seed}")
        return self

    @property
    def weights(self) -> Path:
        """Where the published weights lie; judges have a folder of their own."""
        kind = "judge" if self.model == "judge" else "weights"
        return paths.results(self.profile) / kind / self.id

    @property
    def samples(self) -> Path:
        """Where the published samples, curve and provenance lie; beside the weights of a judge."""
        kind = "judge" if self.model == "judge" else "samples"
        return paths.results(self.profile) / kind / self.id


def recipes() -> dict:
    """params/recipes.yaml: for each model its recipe and the syntax hash it was stamped with."""
    return yaml.safe_load((paths.PARAMS / "recipes.yaml").read_text())


def syntax_hash(name: str) -> str:
    """Hash of the docstring-free syntax trees of a model's training modules."""
    digest = hashlib.sha256()
    for module in (*model(name).modules, *engine.SHARED_MODULES):
        tree = ast.parse((paths.CODE / module).read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and _is_docstring(body[0]):
                body[0] = ast.Pass()
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def _is_docstring(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        return False
    return isinstance(node.value.value, str)


def key(run: Run, profile: config.Profile) -> str:
    """Hash of what the run's result depends on: parameters, data, seed and recipe.

    The device is not in it. In smoke and quick the code itself is.
    """
    section = config.section(profile, run.model)
    section.pop("profile", None)
    parts = {
        "model": run.model,
        "category": run.category,
        "seed": run.seed,
        "parameters": section,
        "side": profile.data.side,
        "data": data.card(profile.data)["hash"],
        "recipe": recipes()[run.model]["recipe"],
    }
    if model(run.model).sample:
        parts["n_samples"] = n_samples(run, profile)
        parts["thresholds"] = thresholds(profile, "gan3d")
    if run.profile in LOCAL:
        parts["code"] = syntax_hash(run.model)
    text = json.dumps(parts, sort_keys=True)
    return f"{run.id}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def state_folder(run: Run, profile: config.Profile) -> Path:
    """``.ckpt/<key>`` of a run."""
    return paths.CHECKPOINTS / key(run, profile)


def train(
    run: Run,
    profile: config.Profile,
    *,
    deadline: float = math.inf,
    progress: bool = True,
) -> Path | None:
    """Complete a run: train, or go on from where it stopped, store weights, draw samples.

    Returns its ``final`` folder, or None when the deadline (``time.monotonic`` seconds) came
    first; calling again goes on. A complete run is returned at once.
    """
    folder = state_folder(run, profile)
    final = folder / "final"
    if final.is_dir():
        return final
    with engine.lock(folder):
        where = device.pick(profile.device)
        split = data.load_train(profile.data).category(run.category)
        task = model(run.model).task(profile, split, run.seed, where)
        if not engine.fit(task, folder, name=run.id, deadline=deadline, progress=progress):
            return None
        files.commit_folder(final, lambda stage: _finalise(stage, run, profile, task, folder))
        # The final folder holds all that is needed from here on.
        for leftover in folder.glob("state.safetensors*"):
            leftover.unlink()
    return final


def _finalise(
    stage: Path, run: Run, profile: config.Profile, task: engine.Task, folder: Path
) -> None:
    """Everything of a complete run: weights, samples drawn from the stored weights, log, card."""
    for name, network in task.networks.items():
        checkpoint.save_weights(stage / f"{name}.safetensors", network)
    shutil.copy(folder / "log.csv", stage / "log.csv")
    status = files.read_json(folder / "status.json")
    facts = provenance(run, profile, status["seconds"], next(iter(task.networks.values())))
    started = time.monotonic()
    if model(run.model).sample:
        n = draw_samples(run, profile, stage)
        if run.profile not in LOCAL:
            facts["seconds per sample"] = round((time.monotonic() - started) / n, 4)
    for kind, shapes in task.other_samples().items():
        for threshold in thresholds(profile, run.model):
            grids = (shapes > threshold).numpy()
            voxel.save_voxels(stage / samples_file(threshold, kind), grids)
    facts["weights"] = {p.name: files.sha256(p) for p in sorted(stage.glob("*.safetensors"))}
    files.write_json(stage / "run.json", facts)


def thresholds(profile: config.Profile, name: str) -> list[float]:
    """The thresholds at which a model's samples are read, the headline's first.

    The others are for occupancy probabilities. Energy-based models move voxels: between the object
    and 0 they leave noise, which is no lower probability of being filled.
    """
    others = profile.evaluation.other_thresholds if name in PROBABILITIES else ()
    return [profile.evaluation.threshold, *others]


def n_samples(run: Run, profile: config.Profile) -> int:
    """The shapes that a run draws: its model's own number where shapes are dear, else all."""
    return getattr(getattr(profile, run.model), "n_samples", profile.evaluation.n_samples)


def samples_file(threshold: float, kind: str = "samples") -> str:
    """The name of the file that holds the samples above a threshold; a run may have other kinds."""
    return f"{kind}-{threshold:g}.npz"


def draw_samples(run: Run, profile: config.Profile, folder: Path) -> int:
    """Draw a run's evaluation samples from the weights in ``folder`` and store them there.

    Shape k starts from seed k. One file a threshold; returns the number of shapes.
    """
    networks = load_networks(run, profile, folder)
    seeds = list(range(n_samples(run, profile)))
    probabilities = sample(run, profile, networks, seeds)
    for threshold in thresholds(profile, run.model):
        voxel.save_voxels(folder / samples_file(threshold), probabilities > threshold)
    return len(seeds)


def provenance(run: Run, profile: config.Profile, seconds: float, network: torch.nn.Module) -> dict:
    """What produced a run. Hours, versions and commit stay out of smoke and quick."""
    facts = {
        "run": run.id,
        "key": key(run, profile),
        "recipe": recipes()[run.model]["recipe"],
        "parameters": config.section(profile, run.model),
        "n_parameters": checkpoint.n_parameters(network),
    }
    if run.profile in LOCAL:
        return facts
    where = next(network.parameters()).device
    return facts | {
        "device": device.describe(where),
        "hours": round(seconds / 3600, 3),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    """The commit of the code, or ``unknown`` where there is no git history (another machine)."""
    command = ["git", "-C", str(paths.CODE), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def load_networks(run: Run, profile: config.Profile, folder: Path) -> dict[str, torch.nn.Module]:
    """The networks that sample a run, or all of a classifier, with the weights in ``folder``."""
    where = device.pick(profile.device)
    networks = model(run.model).build(profile)
    needed = model(run.model).sampling or tuple(networks)
    return {
        name: checkpoint.load_weights(folder / f"{name}.safetensors", networks[name]).to(where)
        for name in needed
    }


def sample(
    run: Run, profile: config.Profile, networks: dict[str, torch.nn.Module], seeds: list[int]
) -> np.ndarray:
    """Occupancy probabilities (len(seeds), D, D, D) of a run, from noise, one seed a shape."""
    draw = model(run.model).sample
    if draw is None:
        raise StudyError(f"{run.model} draws no shapes")
    return draw(profile, networks, seeds)


def publish(run: Run, final: Path) -> None:
    """Copy a complete run to ``results``: weights to one folder, all else to another.

    Of a run on one category only the networks that sample are published: the store is small.
    """
    weights = sorted(final.glob("*.safetensors"))
    rest = [f for f in sorted(final.iterdir()) if f not in weights]
    if sampling := model(run.model).sampling if run.category != "all" else ():
        weights = [f for f in weights if f.stem in sampling]
    facts = files.read_json(final / "run.json")
    facts["weights"] = {f.name: facts["weights"][f.name] for f in weights}
    card = model_card(run, facts)

    def copy(folder: Path, found: list[Path], with_card: bool) -> None:
        for file in found:
            shutil.copyfile(file, folder / file.name)
        if with_card:
            files.write_text(folder / "card.md", card)

    if run.weights == run.samples:
        files.commit_folder(run.weights, lambda stage: copy(stage, weights + rest, True))
        return
    files.commit_folder(run.weights, lambda stage: copy(stage, weights, True))
    files.commit_folder(run.samples, lambda stage: copy(stage, rest, False))


def model_card(run: Run, facts: dict) -> str:
    """The card beside a run's weights, from its provenance: what, how trained, limits."""
    trained = [
        f"{name}: {facts[name]}"
        for name in ("n_parameters", "device", "hours", "torch", "python", "commit", "date")
        if name in facts
    ]
    values = [f"| {name} | {value} |" for name, value in facts["parameters"].items()]
    hashes = [f"- `{name}`: sha256 `{digest}`" for name, digest in facts["weights"].items()]
    corpus = "all ten categories" if run.category == "all" else f"category {run.category}"
    lines = [
        f"# {run.id}",
        "",
        f"{MODELS[run.model]}, trained on {corpus} of the training split, seed {run.seed}.",
        "Kernels are stored in half precision; samples and scores were computed with these files.",
        "",
        *hashes,
        "",
        f"Recipe {facts['recipe']}. {'; '.join(trained)}".strip(),
        "",
        "| parameter | value |",
        "| --- | --- |",
        *values,
        "",
        "Data: see the data card of the profile. Research use; one pose a shape, 30^3 grids.",
        "How good it is stands in the tables of the profile, not here.",
    ]
    return "\n".join(lines) + "\n"


def wanted(profile: config.Profile) -> list[Run]:
    """All runs that a profile asks for, in its order."""
    return [
        Run(profile.name, name, category, seed)
        for name, want in profile.wanted.items()
        for category in want.categories
        for seed in want.seeds
    ]


@dataclass(frozen=True)
class Pending:
    """A wanted run that is not complete: how far it is, and the minutes it still needs.

    ``stopped`` is why it diverged, or empty; it would again, until its parameters change.
    """

    run: Run
    step: int
    n_steps: int
    minutes: float
    active: bool
    stopped: str = ""


def is_published(run: Run, profile: config.Profile) -> bool:
    """True when the run's results, made with these parameters, are in place.

    Where they are not here but dvc.lock names the run, another clone made them: that counts too.
    """
    if (run.samples / "run.json").is_file():
        return files.read_json(run.samples / "run.json")["key"] == key(run, profile)
    lock = paths.CODE / "dvc.lock"
    stages = yaml.safe_load(lock.read_text()).get("stages", {}) if lock.is_file() else {}
    return any(name.endswith(f"@{run.id}") for name in stages)


def pending(profile: config.Profile) -> list[Pending]:
    """Wanted runs that are neither published nor complete, cheapest first."""
    found = [
        _progress(run, profile)
        for run in wanted(profile)
        if not is_published(run, profile) and not (state_folder(run, profile) / "final").is_dir()
    ]
    return sorted(found, key=lambda p: p.minutes)


def _progress(run: Run, profile: config.Profile) -> Pending:
    minutes = profile.wanted[run.model].minutes
    folder = state_folder(run, profile)
    active = engine.is_locked(folder)
    if not (folder / "status.json").is_file():
        return Pending(run, 0, 0, minutes, active)
    status = files.read_json(folder / "status.json")
    step, n_steps = status["step"], status["n_steps"]
    if reason := status.get("stopped"):
        return Pending(run, step, n_steps, minutes, active, reason)
    left = status["seconds"] / max(step, 1) * (n_steps - step) / 60
    return Pending(run, step, n_steps, left, active)


def complete_unpublished(profile: config.Profile) -> list[Run]:
    """Runs that are complete in ``.ckpt`` and not yet published."""
    return [
        run
        for run in wanted(profile)
        if (state_folder(run, profile) / "final").is_dir() and not is_published(run, profile)
    ]


def weights_folder(run: Run, profile: config.Profile) -> Path:
    """Where a run's weights are: published, or complete and not yet published.

    Raises StudyError when there are none.
    """
    if run.weights.is_dir():
        return run.weights
    final = state_folder(run, profile) / "final"
    if final.is_dir():
        return final
    raise StudyError(
        f"{run.id} has no weights here; train it with `python -m lib train {run.model} --category "
        f"{run.category} --profile {run.profile} --seed {run.seed}`, or pull them with `dvc pull`"
    )


def stale_recipes() -> list[str]:
    """Models whose training code differs from what their recipe was stamped with."""
    stamped = recipes()
    return [m for m in MODELS if stamped.get(m, {}).get("syntax") != syntax_hash(m)]


def stamp_recipes() -> None:
    """Write the present syntax hashes into params/recipes.yaml.

    Raise a model's number by hand first when the change touches what training computes: its
    results then count as stale.
    """
    stamped = recipes()
    rows = {
        m: {"recipe": stamped.get(m, {}).get("recipe", 1), "syntax": syntax_hash(m)} for m in MODELS
    }
    head = (
        "# recipe: raised by hand when a model's training code changes what it computes; lite and\n"
        "# study runs of the model are stale from then on.\n"
        "# syntax: hash of the training code, written by `python -m lib recipes --accept`.\n"
    )
    files.write_text(paths.PARAMS / "recipes.yaml", head + yaml.safe_dump(rows, sort_keys=False))


def adopt(profile: config.Profile) -> list[str]:
    """Add complete runs to params/runs.yaml, which lists what the pipeline publishes.

    Returns the ids that were added.
    """
    path = paths.PARAMS / "runs.yaml"
    listed = yaml.safe_load(path.read_text())
    added = []
    for run in complete_unpublished(profile):
        group = run_group(run)
        if run.id in listed[group]:
            continue
        values = {"profile": run.profile, "category": run.category, "seed": run.seed}
        listed[group][run.id] = values
        added.append(run.id)
    head = path.read_text().split("\n\n")[0]
    if added:
        files.write_text(path, f"{head}\n\n{yaml.safe_dump(listed, sort_keys=True)}")
    return added


def run_group(run: Run) -> str:
    """The stage group of a run: weights travel for the judge, ``all`` and one category a model."""
    travels = run.category in ("all", "chair") and run.seed == 0
    return run.model if travels else f"{run.model}_light"
