"""Profiles: every number that changes a result, read strictly into frozen dataclasses.

``params/<profile>.yaml`` are complete files. An unknown key, a missing key or a value of another
type is refused with the file and the key's name.
"""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass

import yaml

from lib import paths
from lib.errors import StudyError

CATEGORIES = (
    "bathtub",
    "bed",
    "chair",
    "desk",
    "dresser",
    "monitor",
    "night_stand",
    "sofa",
    "table",
    "toilet",
)

# Values without which nothing can be computed when they are zero, negative or not finite.
POSITIVE = {
    "judge": ("hidden", "epochs", "batch", "lr", "halve_every"),
    "gan3d": ("z_dim", "base", "init_std", "steps", "lr_generator", "lr_discriminator"),
    "evaluation": ("n_samples", "n_equal", "n_draws", "n_splits", "k"),
}


@dataclass(frozen=True)
class Data:
    """Which shapes, and on which grid the generative models see them."""

    name: str  # folder below data/prepared
    source: str  # modelnet10, off or procedural
    side: int  # grid of the generative models: 32 is padded, 24 is tight
    n_train: int  # shapes a category, procedural source only
    n_test: int
    validation: float  # share of the training split held out
    seed: int


@dataclass(frozen=True)
class Judge:
    """Training of the reference network (Qi et al. 2016)."""

    profile: str  # the profile whose judge this one asks
    widths: tuple[int, ...]
    hidden: int
    epochs: int
    batch: int
    lr: float
    halve_every: int  # epochs
    momentum: float
    weight_decay: float
    jitter: int  # voxels
    turns: bool  # quarter turns about z
    dtype: str
    layout: str


@dataclass(frozen=True)
class Gan3d:
    """Training of 3D-GAN (Wu et al. 2016)."""

    z_dim: int
    latent: str  # uniform or normal
    base: int
    generator_channels: tuple[int, ...]
    discriminator_channels: tuple[int, ...]
    norm_first: bool
    init_std: float
    steps: int
    batch: int
    lr_generator: float
    lr_discriminator: float
    beta1: float
    beta2: float
    gate: float  # the discriminator rests while its last accuracy is above this
    saturating: bool  # the paper's log(1 - D) for the generator instead of -log D
    label_real: float  # target of real shapes; below 1 is one-sided smoothing
    dtype: str
    layout: str


@dataclass(frozen=True)
class Evaluation:
    """How samples are judged."""

    threshold: float  # above it a voxel counts as occupied
    other_thresholds: tuple[float, ...]  # read beside it, in rows of their own
    n_samples: int  # shapes a run draws and stores
    n_equal: int  # shapes a side in every distance
    n_draws: int  # draws without replacement behind an interval
    n_splits: int  # splits of the inception score
    k: int  # neighbours of precision, recall, density and coverage
    judge_seeds: tuple[int, ...]  # the first judges, the others show the spread


@dataclass(frozen=True)
class Device:
    """Threads and determinism."""

    threads: int
    deterministic: bool


@dataclass(frozen=True)
class Wanted:
    """The runs that a profile asks of one model; its table cells."""

    categories: tuple[str, ...]
    seeds: tuple[int, ...]
    minutes: float  # expected on the hardware the profile is for, before a rate is known


@dataclass(frozen=True)
class Profile:
    """One complete file of parameters."""

    name: str
    categories: tuple[str, ...]
    data: Data
    judge: Judge
    gan3d: Gan3d
    evaluation: Evaluation
    device: Device
    wanted: dict[str, Wanted]


def available() -> list[str]:
    """The profiles that have a file."""
    return sorted(p.stem for p in paths.PARAMS.glob("*.yaml") if p.stem not in ("runs", "recipes"))


def load(name: str) -> Profile:
    """The profile of that name. Raises StudyError naming file and key when anything is off."""
    path = paths.PARAMS / f"{name}.yaml"
    if name not in available():
        raise StudyError(f"no profile {name!r}; choose one of {', '.join(available())}")
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise StudyError(f"params/{name}.yaml: not readable as YAML ({reason})") from None
    profile = _build(Profile, raw, f"params/{name}.yaml", "")
    _check(profile, name)
    return profile


def section(profile: Profile, model: str) -> dict:
    """The parameters of one model as plain values, for a run's key and card."""
    return json.loads(json.dumps(dataclasses.asdict(getattr(profile, model))))


def _build(kind: type, value: object, where: str, key: str) -> object:
    """``value`` as an instance of ``kind``, or a StudyError that names the key."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    name = f"{where}: {key or 'the file'}"
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where, key)
    if origin is tuple:
        if not isinstance(value, list):
            raise StudyError(f"{name} must be a list, not {value!r}")
        return tuple(_build(arguments[0], v, where, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise StudyError(f"{name} must be a mapping, not {value!r}")
        return {k: _build(arguments[1], v, where, f"{key}.{k}") for k, v in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if kind is float else ""
        raise StudyError(f"{name} must be {kind.__name__}, not {value!r}{hint}")
    return value


def _build_dataclass(kind: type, value: object, where: str, key: str) -> object:
    if not isinstance(value, dict):
        raise StudyError(f"{where}: {key or 'the file'} must be a mapping, not {value!r}")
    fields = typing.get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for odd in sorted(set(value) - set(fields), key=str):
        raise StudyError(f"{where}: unknown key {prefix}{odd}; known are {', '.join(fields)}")
    for odd in [f for f in fields if f not in value]:
        raise StudyError(f"{where}: key {prefix}{odd} is missing")
    built = {f: _build(t, value[f], where, prefix + f) for f, t in fields.items()}
    return kind(**built)


def _check(profile: Profile, name: str) -> None:
    """Ranges that types cannot express; the sentence names the key."""
    where = f"params/{name}.yaml"
    rules: dict[str, bool] = {
        f"name must be {name}": profile.name == name,
        "data.source must be modelnet10, off or procedural": profile.data.source
        in ("modelnet10", "off", "procedural"),
        "data.side must be 24 or 32": profile.data.side in (24, 32),
        "data.validation must lie in (0, .5)": 0 < profile.data.validation < 0.5,
        "judge.jitter must lie in 0..3, the margin of the grids": 0 <= profile.judge.jitter <= 3,
        "evaluation.threshold must lie in (0, 1)": 0 < profile.evaluation.threshold < 1,
        "evaluation.other_thresholds must lie in (0, 1)": all(
            0 < t < 1 for t in profile.evaluation.other_thresholds
        ),
        "evaluation.n_equal must be at most n_samples": profile.evaluation.n_equal
        <= profile.evaluation.n_samples,
        "gan3d.latent must be uniform or normal": profile.gan3d.latent in ("uniform", "normal"),
        "gan3d.batch must be 8 or more: batch normalisation fails below": profile.gan3d.batch >= 8,
        "gan3d.label_real must lie in (.5, 1]": 0.5 < profile.gan3d.label_real <= 1,
        "gan3d: base * 2 ** layers must be data.side": profile.gan3d.base
        * 2 ** len(profile.gan3d.generator_channels)
        == profile.data.side,
        "gan3d.discriminator_channels must be as many as generator_channels": len(
            profile.gan3d.generator_channels
        )
        == len(profile.gan3d.discriminator_channels),
        "device.threads must be 1 or more": profile.device.threads >= 1,
        "dtype must be float32 or bfloat16": {profile.judge.dtype, profile.gan3d.dtype}
        <= {"float32", "bfloat16"},
        "layout must be contiguous or channels_last": {profile.judge.layout, profile.gan3d.layout}
        <= {"contiguous", "channels_last"},
    }
    for part, keys in POSITIVE.items():
        for key in keys:
            value = getattr(getattr(profile, part), key)
            rules[f"{part}.{key} must be above 0"] = 0 < value < math.inf
    known = {*CATEGORIES, "all"}
    for model, wanted in profile.wanted.items():
        rules[f"wanted.{model}: unknown model"] = model in ("judge", "gan3d")
        rules[f"wanted.{model}.categories: unknown name"] = set(wanted.categories) <= known
    rules["categories: unknown name"] = set(profile.categories) <= known
    for sentence, holds in rules.items():
        if not holds:
            raise StudyError(f"{where}: {sentence}")


def with_changes(profile: Profile, **changes: dict) -> Profile:
    """A copy with some sections' values replaced, as ``gan3d={"steps": 4}``; types stay checked."""
    raw = json.loads(json.dumps(dataclasses.asdict(profile)))
    for name, values in changes.items():
        unknown = set(values) - set(raw[name])
        if unknown:
            raise StudyError(f"{name} has no parameter {', '.join(sorted(unknown))}")
        raw[name] |= values
    changed = _build(Profile, raw, f"changed profile {profile.name}", "")
    _check(changed, profile.name)
    return changed
