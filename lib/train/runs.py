"""Runs: what one is called, what it depends on, where its state lies, and how it is completed.

A run trains one model on one category with one seed. Its state lives in ``.ckpt/<key>``, where the
key is a hash of everything that its result depends on; ``final/`` in it appears whole when the run
is complete, and is what notebooks publish to ``results`` and what ``pack`` carries.
"""

import ast
import contextlib
import datetime
import functools
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

from lib import cards, config, data, device, files, paths, voxel
from lib.errors import StudyError
from lib.train import checkpoint, engine, ranks

LOCAL = ("smoke", "quick")  # profiles whose bytes must repeat: no hours, commits or versions inside


# Training modules (lib/train/<name>.py) and the name of the model's row in the tables.
MODELS = {
    "judge": "3dnin_fc (judge)",
    "gan3d": "3D-GAN",
    "desnet3d": "3D DescriptorNet",
    "winn3d": "3DWINN",
    "beyond": "ours (persistent chains)",
    "vae3d": "3D-VAE",
    "autoencoder": "autoencoder + Gaussian",
    "baseline": "Baseline",
    "tuned": "Baseline, tuned (ours)",
    "hardened": "Baseline, hardened (ours)",
    "introspective": "3DWINN, supervised",
    "voxnet": "VoxNet",
    "orion": "ORION",
    "gan64": "3D-GAN at 64^3",
    "vaegan3d": "3D-VAE-GAN",
    "encoder_decoder": "encoder-decoder",
}

# What the record of every complete run holds; the oldest have nothing more in common.
RECORD = {"run": str, "key": str, "recipe": int, "parameters": dict, "weights": dict}

# Models whose samples are probabilities.
PROBABILITIES = ("gan3d", "gan64", "vae3d", "autoencoder", "vaegan3d", "encoder_decoder")


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
        if self.model in ("judge", *config.CLASSIFIERS) and self.category != "all":
            name = "the judge" if self.model == "judge" else self.model
            raise StudyError(f"{name} is trained on all categories: --category all")
        if self.seed < 0:
            raise StudyError(f"seed must be 0 or more, not {self.seed}")
        return self

    @property
    def weights(self) -> Path:
        """Where the published weights lie; the judge's lie beside its record."""
        kind = "judge" if self.model == "judge" else "weights"
        return paths.results(self.profile) / kind / self.id

    @property
    def samples(self) -> Path:
        """Where the published samples, curve and provenance lie; tables are made of these.

        Those of a classifier lie apart, since they are no samples of a generator.
        """
        own = {"judge": "judge"} | dict.fromkeys(config.CLASSIFIERS, "classifiers")
        return paths.results(self.profile) / own.get(self.model, "samples") / self.id


def recipes() -> dict:
    """params/recipes.yaml: for each model its recipe and the syntax hash it was stamped with."""
    return yaml.safe_load((paths.PARAMS / "recipes.yaml").read_text())


def syntax_hash(name: str) -> str:
    """Hash of the docstring-free syntax trees of a model's training modules."""
    return syntax_hash_of((*model(name).modules, *engine.SHARED_MODULES))


def syntax_hash_of(modules: tuple[str, ...]) -> str:
    """Hash of the docstring-free syntax trees of files, named from the repository's root."""
    digest = hashlib.sha256()
    for module in modules:
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
    } | code_key(run.model, run.profile)
    if model(run.model).sample:
        parts["n_samples"] = n_samples(run, profile)
        parts["thresholds"] = thresholds(profile, "gan3d")
    text = json.dumps(parts, sort_keys=True)
    return f"{run.id}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def code_key(name: str, profile: str) -> dict[str, int | str]:
    """What a model's results depend on in its code: the recipe; in smoke and quick, all of it."""
    recipe = {"recipe": recipes()[name]["recipe"]}
    return recipe | {"code": syntax_hash(name)} if profile in LOCAL else recipe


def state_folder(run: Run, profile: config.Profile) -> Path:
    """``.ckpt/<key>`` of a run."""
    return paths.CHECKPOINTS / key(run, profile)


def train(
    run: Run,
    profile: config.Profile,
    *,
    deadline: float = math.inf,
    progress: bool = True,
    together: ranks.Alone = ranks.Alone(),  # noqa: B008, it holds nothing
) -> Path | None:
    """Complete a run: train, or go on from where it stopped, store weights, draw samples.

    Returns its ``final`` folder, or None when the deadline (``time.monotonic`` seconds) came
    first; calling again goes on. A complete run is returned at once. Of several processes
    (``together``) the first holds the lock and writes; the others return None. Raises Locked when
    another process trains the run.
    """
    folder = state_folder(run, profile)
    final = folder / "final"
    with contextlib.ExitStack() as held:
        if together.agree(lambda: _completed(held, folder)):
            return final if together.rank == 0 else None
        where = device.pick(profile.device)
        where = together.where or where
        split = data.load_train(profile.data).category(run.category)
        trained = engine.fit_again(
            lambda: _task(run, profile, split, where, together),
            folder,
            restarts=model(run.model).restarts,
            name=run.id,
            deadline=deadline,
            progress=progress and together.rank == 0,
        )
        if trained is None or together.rank > 0:
            return None
        files.commit_folder(final, lambda stage: _finalise(stage, run, profile, trained, folder))
        # The final folder holds all that is needed from here on.
        for leftover in folder.glob("state.safetensors*"):
            leftover.unlink()
    return final


def _task(
    run: Run, profile: config.Profile, split: data.Split, where, together: ranks.Alone
) -> engine.Task:
    """A run's task before its first step; StudyError where several processes cannot share it."""
    task = model(run.model).task(profile, split, run.seed, where)
    if together.size > 1 and task.gradients is None:
        raise StudyError(
            f"{run.model} is trained on one device: a share of its batch does not train as "
            "the whole does; train other runs beside it instead"
        )
    task.ranks, task.fused = together, device.fused(profile.device, where)
    return task


def _completed(held: contextlib.ExitStack, folder: Path) -> bool:
    """True when the run is complete; else its lock is held from here on.

    Asked again under the lock: another process may have completed the run just before.
    """
    final = folder / "final"
    if not final.is_dir():
        held.enter_context(engine.lock(folder))
    return final.is_dir()


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
    if reasons := engine.read_restarts(folder):
        facts["restarts"] = reasons
    facts |= task.facts()
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
    networks = _load(run, profile, folder)
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
        "data": {"name": profile.data.name, "hash": data.card(profile.data)["hash"]},
    }
    if run.profile in LOCAL:
        return facts
    where = next(network.parameters()).device
    return facts | {
        "device": device.describe(where),
        "policy": device.policy(profile, run.model, where),
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


def read_record(path: Path, *needed: str) -> dict:
    """A run's ``run.json``; StudyError where it is damaged or lacks one of the needed entries."""
    facts = files.read_json(path)
    for name in needed:
        if not (isinstance(facts.get(name), RECORD[name]) and facts[name]):
            raise StudyError(
                f"{paths.relative(path)}: damaged, it has no {name}; pull it again, or delete "
                f"{paths.relative(path.parent)} and train the run"
            )
    return facts


def load_networks(run: Run, profile: config.Profile, folder: Path) -> dict[str, torch.nn.Module]:
    """The networks that sample a run, or all of a classifier, with the weights in ``folder``.

    Raises StudyError where they are not those of the run's record.
    """
    check_weights(run, folder, model(run.model).sampling or tuple(model(run.model).build(profile)))
    return _load(run, profile, folder)


def _load(run: Run, profile: config.Profile, folder: Path) -> dict[str, torch.nn.Module]:
    where = device.pick(profile.device)
    networks = model(run.model).build(profile)
    needed = model(run.model).sampling or tuple(networks)
    return {
        name: checkpoint.load_weights(folder / f"{name}.safetensors", networks[name]).to(where)
        for name in needed
    }


def check_weights(run: Run, folder: Path, names: tuple[str, ...]) -> None:
    """Raise StudyError where weights in ``folder`` are not those that the run's record names."""
    records = [f / "run.json" for f in (folder, run.samples)]
    record = next((r for r in records if r.is_file()), None)
    if record is None:
        raise StudyError(f"{run.id} has no run.json here; pull the run with `dvc pull`")
    stored = read_record(record, "weights")["weights"]
    for name in names:
        path = folder / f"{name}.safetensors"
        if path.is_file() and files.sha256(path) != stored.get(path.name):
            raise StudyError(
                f"{paths.relative(path)}: damaged, or of another run: its SHA-256 is not the one "
                f"in {paths.relative(record)}; pull it again, or delete it and train the run"
            )


def sample(
    run: Run, profile: config.Profile, networks: dict[str, torch.nn.Module], seeds: list[int]
) -> np.ndarray:
    """Occupancy probabilities (len(seeds), D, D, D) of a run, from noise, one seed a shape."""
    check_draws(run)
    return model(run.model).sample(profile, networks, seeds)


def check_draws(run: Run) -> None:
    """Raise StudyError where the run's model draws no shapes."""
    if model(run.model).sample is None:
        raise StudyError(f"{run.model} draws no shapes; choose a model that does, such as gan3d")


def check_final(run: Run, final: Path) -> None:
    """Raise StudyError where a file of a complete run is missing, damaged or not in its record."""
    listed = {Path(n).stem for n in read_record(final / "run.json", *RECORD)["weights"]}
    stored = {p.stem for p in final.glob("*.safetensors")}
    names = sorted(listed | stored | set(model(run.model).sampling))
    for name in names:
        if not (final / f"{name}.safetensors").is_file():
            raise StudyError(f"{final / name}.safetensors is missing; delete {final} and train")
    check_weights(run, final, tuple(names))
    for path in final.glob("*.npz"):
        voxel.load_voxels(path)


def publish(run: Run, final: Path) -> None:
    """Copy a complete run to ``results``: weights to one folder, all else to another.

    Of a run on one category only the networks that sample are published: the store is small.
    """
    check_final(run, final)
    weights = sorted(final.glob("*.safetensors"))
    rest = [f for f in sorted(final.iterdir()) if f not in weights]
    if sampling := model(run.model).sampling if run.category != "all" else ():
        weights = [f for f in weights if f.stem in sampling]
    facts = files.read_json(final / "run.json")
    facts["weights"] = {f.name: facts["weights"][f.name] for f in weights}
    card = cards.card(facts, draws=model(run.model).sample is not None)

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


def is_complete(run: Run, profile: config.Profile) -> bool:
    """True when the run is complete in ``.ckpt``."""
    return (state_folder(run, profile) / "final").is_dir()


def is_published(run: Run, profile: config.Profile) -> bool:
    """True when the run's results, made with these parameters, are in place.

    Where they are not here but dvc.lock names the run with these parameters and this recipe,
    another clone made them: that counts too.
    """
    if (run.samples / "run.json").is_file():
        return read_record(run.samples / "run.json", "key")["key"] == key(run, profile)
    lock = paths.CODE / "dvc.lock"
    stages = _stages(lock.read_text()) if lock.is_file() else {}
    made = [stage["params"] for name, stage in stages.items() if name.endswith(f"@{run.id}")]
    return any(_is_current(params, run, profile) for params in made)


@functools.lru_cache(maxsize=1)
def _stages(lock: str) -> dict:
    """The stages in the text of dvc.lock: ten thousand lines, asked once a run, read once.

    Raises StudyError where it holds none: DVC does not write that file at once.
    """
    try:
        return yaml.load(lock, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["stages"]
    except (yaml.YAMLError, TypeError, KeyError):
        raise StudyError(
            "dvc.lock: empty or cut short; another dvc command may be writing it: wait for it, "
            "or `git checkout dvc.lock`"
        ) from None


def _is_current(made: dict, run: Run, profile: config.Profile) -> bool:
    """Whether the parameters that dvc.lock records of a run are those of today."""
    own, recipe = made[f"params/{profile.name}.yaml"], made["params/recipes.yaml"]
    same = _plain(own[run.model]) == _plain(config.section(profile, run.model))
    side = own.get("data.side", profile.data.side) == profile.data.side
    return same and side and recipe[f"{run.model}.recipe"] == recipes()[run.model]["recipe"]


def _plain(value: object) -> object:
    """Parameters with every number as a float: DVC writes 1e-08, which YAML 1.1 calls a text."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def pending(profile: config.Profile) -> list[Pending]:
    """Wanted runs that are neither published nor complete, cheapest first."""
    found = [
        _progress(run, profile)
        for run in wanted(profile)
        if not is_published(run, profile) and not is_complete(run, profile)
    ]
    return sorted(found, key=lambda p: p.minutes)


def _progress(run: Run, profile: config.Profile) -> Pending:
    minutes = profile.wanted[run.model].minutes
    folder = state_folder(run, profile)
    active = engine.is_locked(folder)
    if not (folder / "status.json").is_file():
        return Pending(run, 0, 0, minutes, active)
    status = {"step": 0, "n_steps": 0, "seconds": 0.0} | files.read_json(folder / "status.json")
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
        if is_complete(run, profile) and not is_published(run, profile)
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
        f"{run.category} --profile {run.profile} --seed {run.seed}`; the store carries only some"
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

    A run whose notebook was run by hand counts too. Returns the ids that were added. Raises
    StudyError, and adds none, where one is damaged.
    """
    path = paths.PARAMS / "runs.yaml"
    listed = yaml.safe_load(path.read_text())
    added = []
    for run in [r for r in wanted(profile) if is_complete(r, profile)]:
        group = run_group(run)
        if run.id in listed[group]:
            continue
        check_final(run, state_folder(run, profile) / "final")
        values = {"profile": run.profile, "category": run.category, "seed": run.seed}
        listed[group][run.id] = values
        added.append(run.id)
    head = path.read_text().split("\n\n")[0]
    if added:
        files.write_text(path, f"{head}\n\n{yaml.safe_dump(listed, sort_keys=True)}")
    return added


def run_group(run: Run) -> str:
    """The stage group of a run; those of groups ``<model>_light`` keep their weights to themselves.

    The others are ``all`` and one category a model, of 3DWINN only ``all``, since a run holds the
    critics of all its cascades. Some of them stay back too: see ``push: false`` in dvc.yaml.
    """
    one = "all" if run.model == "winn3d" else "chair"
    travels = run.seed == 0 and run.category in ("all", one)
    return run.model if travels else f"{run.model}_light"
