"""Profiles: every number that changes a result, read strictly into frozen dataclasses.

``params/<profile>.yaml`` are complete files. An unknown key, a missing key or a value of another
type is refused with the file and the key's name.
"""

import dataclasses
import json
import math
import re
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

LAYOUTS = {
    "judge": ("contiguous", "channels_last"),
    "gan3d": ("contiguous", "channels_last"),
    "gan64": ("contiguous", "channels_last"),
    "desnet3d": ("contiguous", "blocked"),
    "winn3d": ("contiguous", "channels_last"),
    "beyond": ("contiguous", "channels_last"),
    "vae3d": ("contiguous", "channels_last"),
    "autoencoder": ("contiguous", "channels_last"),
    "baseline": ("contiguous", "channels_last"),
    "tuned": ("contiguous", "channels_last"),
    "hardened": ("contiguous", "channels_last"),
    "introspective": ("contiguous", "channels_last"),
    "voxnet": ("contiguous", "channels_last"),
    "orion": ("contiguous", "channels_last"),
    "vaegan3d": ("contiguous", "channels_last"),
    "encoder_decoder": ("contiguous", "channels_last"),
}

STOPS = ("batch", "shape", "never")  # of 3DWINN's climbs
CLASSIFIERS = ("baseline", "tuned", "hardened", "introspective", "voxnet", "orion")

# Values without which nothing can be computed when they are zero, negative or not finite.
POSITIVE = {
    "judge": ("hidden", "epochs", "batch", "lr"),
    "gan3d": ("z_dim", "base", "init_std", "steps", "lr_generator", "lr_discriminator"),
    "gan64": ("z_dim", "base", "init_std", "steps", "lr_generator", "lr_discriminator")
    + ("n_shapes", "n_samples"),
    "upsampling": ("steps",),
    "desnet3d": ("init_std", "s", "delta", "langevin_steps", "batch", "chains", "steps", "lr")
    + ("n_samples",),
    "winn3d": ("init_std", "cascades", "iterations", "passes", "batch", "lr", "pool", "new")
    + ("new_last", "sampler_batch", "sampler_lr", "max_steps", "n_samples"),
    "beyond": ("init_std", "chains", "advanced", "chain_steps", "chain_lr", "floor", "start_std")
    + ("steps", "lr", "sample_steps", "n_samples"),
    "vae3d": ("z_dim", "base", "init_std", "steps", "lr"),
    "autoencoder": ("z_dim", "base", "init_std", "steps", "lr"),
    "latent": ("bases", "dimensions", "pairs", "neurons"),
    "baseline": ("epochs", "batch", "lr", "init_std"),
    "tuned": ("epochs", "batch", "lr", "init_std"),
    "hardened": ("epochs", "batch", "lr", "init_std", "attack_eps", "attack_steps", "attack_step"),
    "learning_curve": ("steps",),
    "introspective": ("epochs", "batch", "lr", "init_std", "pool", "new", "cascades")
    + ("sampler_batch", "sampler_lr", "max_steps"),
    "voxnet": ("epochs", "batch", "lr", "channels", "hidden"),
    "orion": ("epochs", "batch", "lr", "channels", "hidden"),
    "attacks": ("eps", "steps", "ball_step", "shapes", "batch", "pgd_eps", "pgd_steps")
    + ("pgd_restarts", "pgd_step", "square_queries", "rays_tries", "flips", "part_shares")
    + ("part_starts", "slices", "surface_shapes"),
    "features": ("c", "draws", "pca", "epochs", "epoch_lr"),
    "ablation": ("shapes", "epochs", "learning_steps"),
    "gan_ablation": ("pool", "steps", "lr_generator", "lr_discriminator", "updates", "every")
    + ("decay", "latent_std"),
    "vaegan3d": ("z_dim", "base", "image", "views", "init_std", "steps", "lr_encoder")
    + ("lr_generator", "lr_discriminator", "weight_recon"),
    "encoder_decoder": ("z_dim", "base", "image", "views", "init_std", "steps", "batch")
    + ("lr_encoder", "lr_generator"),
    "single_image": ("neighbours", "photographs", "n_draws"),
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
    momentum: float
    weight_decay: float
    jitter: int  # voxels
    turns: bool  # quarter turns about z
    mirror: bool
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
class Gan64(Gan3d):
    """Training of 3D-GAN at the resolution of its paper, on shapes of their own."""

    side: int  # of the shapes
    source: str  # furniture: procedural meshes of the run's category; beds: beds_64.npz
    n_shapes: int  # furniture only
    n_samples: int  # shapes a run draws and stores


@dataclass(frozen=True)
class Upsampling:
    """The budget of one run in the comparison of native and upsampled shapes; else gan64."""

    seeds: tuple[int, ...]
    side: int  # of the shapes; gan64.side, or that side halved
    generator_channels: tuple[int, ...]
    discriminator_channels: tuple[int, ...]
    steps: int
    batch: int
    n_samples: int  # shapes that a run is measured by


@dataclass(frozen=True)
class Desnet3d:
    """Training of 3D DescriptorNet (Xie et al. 2018)."""

    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    init_std: float
    s: float  # deviation of the reference Gaussian
    delta: float  # step of the Langevin dynamics
    langevin_steps: int  # a learning step
    noise_until: int  # learning steps; from then on descent without noise
    clip: bool  # chains to the range of voxels, after every Langevin step
    observed: int  # training shapes a learning step; 0 is all
    batch: int  # observed shapes per batch of chains
    chains: int  # per batch
    restart: float  # share of the chains that start anew, a learning step
    steps: int  # learning steps; an epoch of the paper where observed is 0
    lr: float
    lr_until: int  # learning steps; from then on the rate falls linearly, to 0 after the last
    beta1: float
    beta2: float
    sample_steps: tuple[int, ...]  # from noise to an evaluation sample; one is chosen
    n_validation: int  # chains that choose it
    n_samples: int  # shapes a run draws and stores
    dtype: str
    layout: str


@dataclass(frozen=True)
class Winn3d:
    """Training of 3DWINN (Huang et al. 2019); what it leaves open after WINN (Lee et al. 2018)."""

    channels: tuple[int, ...]
    slope: float
    norm_first: bool
    centre: str  # train: the training shapes' mean voxel; batch: the mini-batch's
    init_std: float
    cascades: int
    iterations: int  # a cascade
    passes: int  # of the critic over the positives, an iteration
    positives: int  # training shapes an iteration; 0 is all
    batch: int  # half real shapes, half pseudo-negatives
    lr: float
    beta1: float
    beta2: float
    penalty: float  # lambda of the gradient penalty
    pool: int  # pseudo-negatives before the first iteration: noise
    new: int  # shapes synthesised an iteration; the pool grows by them
    new_last: int  # in the last iteration of a cascade, where the next one starts
    sampler_batch: int
    sampler_lr: float
    sampler_beta1: float
    sampler_beta2: float
    sampler_epsilon: float
    max_steps: int
    stop: str  # batch: when the mean of f reaches the threshold; shape: each at its own; never
    sigma: float  # deviation of the Langevin noise at the first step; 0 is none
    clip: bool  # to the range of voxels, after every step
    snapshots: int  # last iterations whose critics draw the samples of joint-multi
    start: str  # normal: N(0, 1) around the mean; network: images of a random network
    n_samples: int  # shapes a run draws and stores
    dtype: str
    layout: str


@dataclass(frozen=True)
class Beyond:
    """Training of our own row: the network of 3DWINN with persistent, preconditioned chains."""

    channels: tuple[int, ...]
    slope: float
    init_std: float
    chains: int
    advanced: int  # chains a step
    restart: float  # share of the advanced chains that start anew
    chain_steps: int  # a learning step
    chain_lr: float
    momentum: float
    floor: float
    sigma: float  # deviation of the noise of a chain step
    start_std: float  # chains start at N(mean, start_std^2)
    margin: float  # chains stay in [-margin, 1 + margin]
    data_noise: float  # deviation of the noise on real shapes
    steps: int
    lr: float
    beta1: float
    beta2: float
    penalty: float
    average: float  # decay of the mean of the weights that sample
    sample_steps: int  # chain steps from noise to an evaluation sample
    n_samples: int  # shapes a run draws and stores
    dtype: str
    layout: str


@dataclass(frozen=True)
class Autoencoder:
    """Training of the volumetric autoencoder (a comparison of 3D-GAN's paper)."""

    z_dim: int
    base: int
    decoder_channels: tuple[int, ...]
    encoder_channels: tuple[int, ...]
    init_std: float
    steps: int
    batch: int
    lr: float
    beta1: float
    beta2: float
    dtype: str
    layout: str


@dataclass(frozen=True)
class Vae3d(Autoencoder):
    """Training of 3D-VAE (Kingma and Welling 2014 on voxels)."""

    beta: float  # weight of the divergence from the prior; 1 is the evidence lower bound


@dataclass(frozen=True)
class Latent:
    """How far the study of latent spaces looks."""

    bases: int  # shapes from which a dimension is swept
    dimensions: int  # swept, from the first; at most all
    values: int  # of a dimension, from low to high
    pairs: int  # of shapes between which codes are interpolated; triples of the arithmetic
    steps: int  # shapes on such a way, ends included
    neurons: int  # of the discriminator, drawn at random
    top: int  # shapes that excite a neuron most


@dataclass(frozen=True)
class Classifier:
    """How a classifier of table 5 of 3DWINN learns and is asked; the same for all of them."""

    epochs: int
    batch: int
    lr: float
    schedule: str  # constant, or cosine to 0
    warmup: int  # steps from 0 to the rate
    weight_decay: float
    jitter: int  # voxels
    turns: bool  # quarter turns about z
    mirror: bool  # left to right
    smoothing: float  # of the labels
    average: float  # decay of the mean of the weights that is kept; 0 is none
    votes: int  # quarter turns over which the answer is averaged, 1 or 4
    test_mirror: bool  # and over mirror images
    dtype: str
    layout: str


@dataclass(frozen=True)
class Table1(Classifier):
    """A classifier with the network of 3DWINN's Table 1 (Huang et al. 2019), trained by Adam."""

    channels: tuple[int, ...]
    slope: float
    norm_first: bool
    init_std: float
    dropout: float  # on the features before the last layer
    beta1: float
    beta2: float


@dataclass(frozen=True)
class Tuned(Table1):
    """The Baseline with regularisers of today."""

    squeeze: float  # each axis of a shape is shrunk by U[1 - squeeze, 1]


@dataclass(frozen=True)
class Hardened(Table1):
    """The Baseline trained on attacked shapes (Madry et al. 2018)."""

    attack_eps: float
    attack_steps: int
    attack_step: float  # step, times attack_eps / attack_steps


@dataclass(frozen=True)
class Introspective(Table1):
    """Supervised 3DWINN; what it leaves open after the supervised code of WINN."""

    value: str  # the critic on the logits: linear, or logsumexp
    alpha: float  # weight of the critic's loss
    penalty: float  # lambda of the gradient penalty
    penalty_in_alpha: bool  # alpha (W + lambda GP), else alpha W + lambda GP
    negatives: int  # pseudo-negatives beside a batch; 0 is as many as real shapes
    pool: int  # of each category before the first epoch: noise
    new: int  # synthesised of each category after every epoch
    cascades: int  # into which the epochs are divided
    label_weight: float  # of the cross-entropy in the synthesis loss
    tolerance: float  # |f - threshold| at which a shape is done
    sampler_batch: int
    sampler_lr: float
    sampler_beta1: float
    sampler_beta2: float
    sampler_epsilon: float
    max_steps: int
    clip: bool  # to the range of voxels, after every step


@dataclass(frozen=True)
class Voxnet(Classifier):
    """VoxNet (Maturana and Scherer 2015), trained by gradient descent with momentum."""

    channels: int
    hidden: int
    momentum: float


@dataclass(frozen=True)
class Orion(Voxnet):
    """ORION (Sedaghat et al. 2016): VoxNet with batch normalisation and a pose head."""

    orientation: float  # weight of the pose's cross-entropy


@dataclass(frozen=True)
class Features:
    """Linear classifiers on features that were learned without labels."""

    n_train: int  # training shapes of each category that fit the classifiers; 0 is all
    c: float  # of the SVM, as published
    relative_cs: tuple[float, ...]  # over the features' variance, beside c
    logistic_cs: tuple[float, ...]  # of the logistic regression, from which it chooses
    folds: int
    shares: tuple[float, ...]  # of the labels, beside all of them
    draws: int  # of each share
    pca: int  # principal components of the voxels
    epochs: int  # of the softmax layer without penalty
    epoch_lr: float


@dataclass(frozen=True)
class EncoderDecoder:
    """Training of 3D-VAE-GAN's encoder and generator on the reconstruction alone."""

    z_dim: int
    base: int
    generator_channels: tuple[int, ...]
    encoder_channels: tuple[int, ...]
    image: int  # side of the encoder's pictures, a multiple of 32
    views: int  # of every training shape
    init_std: float
    steps: int
    batch: int
    lr_encoder: float
    lr_generator: float
    beta1: float
    beta2: float
    recon: str  # sse, mse, l2norm or bce_sum
    dtype: str
    layout: str


@dataclass(frozen=True)
class Vaegan3d(EncoderDecoder):
    """Training of 3D-VAE-GAN (Wu et al. 2016): 3D-GAN with an image encoder."""

    discriminator_channels: tuple[int, ...]
    norm_first: bool
    lr_discriminator: float
    gate: float  # the discriminator rests while its last accuracy is above this
    saturating: bool  # the paper's log(1 - D) for the generator instead of -log D
    label_real: float
    weight_kl: float  # alpha_1
    kl: str  # mean or sum over the dimensions of the code
    weight_recon: float  # alpha_2

    @property
    def latent(self) -> str:
        """The prior of the code, which the KL divergence is taken to."""
        return "normal"


@dataclass(frozen=True)
class SingleImage:
    """How shapes that are predicted from one picture are judged."""

    neighbours: int  # training views among which the nearest neighbour is sought
    photographs: int  # rendered ones a category, of held-out shapes
    shift: float  # of an aligned prediction, at most, as a share of the grid's side
    n_draws: int  # bootstrap draws of models behind an interval


@dataclass(frozen=True)
class LearningCurve:
    """The Baseline on parts of the shapes that train, each for as many steps."""

    shares: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int


@dataclass(frozen=True)
class Ablation:
    """The budget of one reading in the ablations; all else is the section of its model.

    ``shapes`` (of a category) and ``epochs`` are those of the supervised network; 3D DescriptorNet
    takes ``learning_steps``, each with ``new`` shapes and as many chains; the rest is 3DWINN's,
    and ``sampler_beta2`` and ``stop`` are those of its readings that do not name another.
    """

    category: str
    cascades: int
    iterations: int
    positives: int
    pool: int
    new: int
    new_last: int
    max_steps: int
    sampler_beta2: float
    stop: str
    shapes: int
    epochs: int
    learning_steps: int


@dataclass(frozen=True)
class Attacks:
    """How classifiers are attacked: table 7 of 3DWINN (Huang et al. 2019) and what we add."""

    classifiers: tuple[str, ...]  # rows of table 7, and those that transfer is tried between
    strong: tuple[str, ...]  # of these, the ones that meet the costly attacks too
    eps: float  # of FGSM and iterative FGSM
    steps: tuple[int, ...]  # of iterative FGSM
    ball_step: float  # step of the reading with a ball, times eps / steps
    table_shapes: int  # test shapes of table 7; 0 is all
    shapes: int  # of the costly attacks, in equal shares of the categories
    seed: int  # names which shapes these are, and every random attack
    batch: int
    pgd_eps: tuple[float, ...]  # ascending
    pgd_steps: int
    pgd_restarts: int
    pgd_step: float  # step, times eps / steps
    check_eps: float  # at which kinds of attacks are compared; one of pgd_eps
    square_queries: int  # of the Square attack, a shape
    rays_tries: int  # of RayS, a shape, without the bisections
    flips: tuple[int, ...]  # ascending counts of flipped voxels; the gradient is taken at each
    transfer_flips: int  # whose shapes the others see; one of flips
    part_shares: tuple[float, ...]  # of a shape's voxels, taken away in one connected part
    part_starts: int  # random places of such a part
    slices: tuple[int, ...]  # widths of emptied slabs
    surface_shapes: int  # over which the loss surface is averaged
    surface_points: int  # a side of the loss surface


@dataclass(frozen=True)
class GanAblation:
    """The budget of one reading in the ablation of 3D-GAN, and the switches that 3D-GAN lacks.

    All else is the section gan3d; where both have a key, this one's value holds.
    """

    category: str
    seeds: tuple[int, ...]
    pool: int  # blocks of pool^3 voxels of the profile's grid are one voxel here
    generator_channels: tuple[int, ...]
    discriminator_channels: tuple[int, ...]
    steps: int
    batch: int
    latent: str
    lr_generator: float
    lr_discriminator: float
    n_samples: int  # shapes that a reading is measured by
    loss: str  # binary: 3D-GAN's cross entropy; wasserstein: with gradient penalty and no gate
    labels: str  # hard: 1 and 0 (or gan3d.label_real); noisy: U(.7, 1.2) and U(0, .3)
    norm: str  # of the discriminator: batch or layer
    updates: int  # of the discriminator a step
    every: int  # steps from one update of the discriminator to the next
    cap: float  # largest norm of the discriminator's gradient; 0 is none
    optimizer: str  # of the discriminator: adam or sgd
    decay: float  # both rates at the last step, as a share of those at the first
    latent_std: float  # of normal latents
    penalty: float  # weight of the gradient penalty


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
    gan64: Gan64
    upsampling: Upsampling
    desnet3d: Desnet3d
    winn3d: Winn3d
    beyond: Beyond
    vae3d: Vae3d
    autoencoder: Autoencoder
    latent: Latent
    baseline: Table1
    tuned: Tuned
    hardened: Hardened
    introspective: Introspective
    voxnet: Voxnet
    orion: Orion
    features: Features
    learning_curve: LearningCurve
    vaegan3d: Vaegan3d
    encoder_decoder: EncoderDecoder
    single_image: SingleImage
    ablation: Ablation
    attacks: Attacks
    gan_ablation: GanAblation
    evaluation: Evaluation
    device: Device
    wanted: dict[str, Wanted]


def available() -> list[str]:
    """The profiles that have a file."""
    return sorted(p.stem for p in paths.PARAMS.glob("*.yaml") if p.stem not in ("runs", "recipes"))


def maker(name: str, notebook: str, **parameters) -> str:
    """What puts results of a profile in place: its pipeline, or the notebook where it has none."""
    pipelines = {"quick": "make repro", "lite": "make lite", "study": "make study"}
    given = " ".join(f"-p {k}={v}" for k, v in {"profile": name, **parameters}.items())
    alone = f"python -m lib notebook {notebook} {given} --out {notebook}.ipynb"
    return f"`{pipelines.get(name, alone)}`"


class _EachKeyOnce(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the last one would win in silence."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep) for key, _ in node.value]
        for k, key in enumerate(keys):
            if key in keys[:k]:
                mark = node.value[k][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands twice", mark)
        return super().construct_mapping(node, deep)


def load(name: str) -> Profile:
    """The profile of that name. Raises StudyError naming file and key when anything is off."""
    path = paths.PARAMS / f"{name}.yaml"
    if name not in available():
        raise StudyError(f"no profile {name!r}; choose one of {', '.join(available())}")
    try:
        raw = yaml.load(path.read_text(), _EachKeyOnce)
    except (yaml.YAMLError, ValueError) as error:
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
    if kind is float and type(value) is int and abs(value) < 1e15:
        return float(value)
    if kind is float and type(value) is float and not math.isfinite(value):
        raise StudyError(f"{name} must be finite, not {value}")
    if type(value) is not kind:
        hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if kind is float else ""
        if kind is str and type(value) is bool:
            hint = ' (YAML reads off, on, no and yes as truth values: write "off")'
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
        "winn3d.centre must be train or batch": profile.winn3d.centre in ("train", "batch"),
        "winn3d.stop must be batch, shape or never": profile.winn3d.stop in STOPS,
        "ablation.stop must be batch, shape or never": profile.ablation.stop in STOPS,
        "winn3d.start must be normal or network": profile.winn3d.start in ("normal", "network"),
        "winn3d.batch must be even": profile.winn3d.batch % 2 == 0,
        "winn3d.snapshots must lie in 0..iterations": 0
        <= profile.winn3d.snapshots
        <= profile.winn3d.iterations,
        "winn3d.positives must be 0 or more": profile.winn3d.positives >= 0,
        "desnet3d.observed must be 0 or more": profile.desnet3d.observed >= 0,
        "desnet3d: channels, kernels and strides must be equally many": len(
            {len(v) for v in (profile.desnet3d.channels, profile.desnet3d.kernels)}
            | {len(profile.desnet3d.strides)}
        )
        == 1,
        "beyond.restart must lie in [0, 1]": 0 <= profile.beyond.restart <= 1,
        "desnet3d.restart must lie in [0, 1]": 0 <= profile.desnet3d.restart <= 1,
        "beyond.average must lie in [0, 1)": 0 <= profile.beyond.average < 1,
        "beyond.chains must be a multiple of advanced": profile.beyond.chains
        % max(profile.beyond.advanced, 1)
        == 0,
        "beyond.chains must be 2 or more": profile.beyond.chains >= 2,
        "desnet3d.chains must be 2 or more": profile.desnet3d.chains >= 2,
        "desnet3d.n_validation must be 2 or more": profile.desnet3d.n_validation >= 2,
        "desnet3d.sample_steps must ascend from above 0": _ascends(profile.desnet3d.sample_steps),
        "winn3d.new must be 2 or more": profile.winn3d.new >= 2,
        "winn3d.new_last must be 2 or more": profile.winn3d.new_last >= 2,
        "winn3d.snapshots must be at most n_samples": profile.winn3d.snapshots
        <= profile.winn3d.n_samples,
        "desnet3d.kernels and strides must be 1 or more": min(
            (*profile.desnet3d.kernels, *profile.desnet3d.strides), default=0
        )
        >= 1,
        "features.n_train must be 0 or more": profile.features.n_train >= 0,
        "features.relative_cs must ascend from above 0": _ascends(profile.features.relative_cs),
        "features.logistic_cs must ascend from above 0": _ascends(profile.features.logistic_cs),
        "features.shares must ascend from above 0 to below 1": _ascends(
            (*profile.features.shares, 1.0)
        ),
        "features.folds must be 2 or more": profile.features.folds >= 2,
    }
    curve = profile.learning_curve
    rules |= {
        "learning_curve.shares must rise, above 0 and at most 1": _ascends(curve.shares)
        and curve.shares[-1] <= 1,
        "learning_curve.seeds must be different, 0 or more, and at least one": _are_seeds(
            curve.seeds
        ),
    }
    for model in CLASSIFIERS:
        rules |= _classifier_rules(model, getattr(profile, model), profile.data.side)
    critic = profile.introspective
    rules |= {
        "introspective.value must be linear or logsumexp": critic.value in ("linear", "logsumexp"),
        "introspective.cascades must be at most epochs": critic.cascades <= critic.epochs,
        "introspective.negatives must be 0 or more": critic.negatives >= 0,
    }
    rules |= _gan_ablation_rules(profile) | _gan64_rules(profile)
    rules |= _image_rules(profile, "vaegan3d") | _image_rules(profile, "encoder_decoder")
    rules["encoder_decoder.image must be that of vaegan3d"] = (
        profile.encoder_decoder.image == profile.vaegan3d.image
    )
    rules["single_image.shift must lie in [0, .5)"] = 0 <= profile.single_image.shift < 0.5
    for model, layouts in LAYOUTS.items():
        part = getattr(profile, model)
        rules[f"{model}.dtype must be float32 or bfloat16"] = part.dtype in (
            "float32",
            "bfloat16",
        )
        rules[f"{model}.layout must be {' or '.join(layouts)}"] = part.layout in layouts
    table1 = ("baseline", "tuned", "hardened", "introspective")
    for model in ("winn3d", "beyond", *table1):
        halvings = len(getattr(profile, model).channels) - 1
        rules[f"{model}.channels: data.side must be halved evenly after each but the first"] = (
            profile.data.side % 2**halvings == 0
        )
    for model in ("vae3d", "autoencoder"):
        part = getattr(profile, model)
        rules[f"{model}.batch must be 8 or more: batch normalisation fails below"] = part.batch >= 8
        for name in ("decoder_channels", "encoder_channels"):
            rules[f"{model}: base * 2 ** {name} must be data.side"] = (
                part.base * 2 ** len(getattr(part, name)) == profile.data.side
            )
    rules["vae3d.beta must be 0 or more"] = 0 <= profile.vae3d.beta < math.inf
    rules["tuned.squeeze must lie in [0, 1)"] = 0 <= profile.tuned.squeeze < 1
    rules["latent.values must be 2 or more"] = profile.latent.values >= 2
    rules["latent.steps must be 3 or more"] = profile.latent.steps >= 3
    rules["latent.top must be 2 or more"] = profile.latent.top >= 2
    rules |= _attack_rules(profile.attacks)
    for field in dataclasses.fields(profile):
        rules |= _common_rules(field.name, getattr(profile, field.name))
    for part, keys in POSITIVE.items():
        for key in keys:
            value = getattr(getattr(profile, part), key)
            values = value if isinstance(value, tuple) else (value,)
            rules[f"{part}.{key} must be above 0"] = all(0 < v < math.inf for v in values)
    known = {*CATEGORIES, "all"}
    for model, wanted in profile.wanted.items():
        rules[f"wanted.{model}: unknown model"] = model in LAYOUTS
        rules[f"wanted.{model}.categories: unknown name"] = set(wanted.categories) <= known
        rules[f"wanted.{model}.seeds must be different, 0 or more, and at least one"] = _are_seeds(
            wanted.seeds
        )
    rules["categories must be names of ModelNet10, each once, and at least one"] = (
        0 < len(profile.categories) == len(set(profile.categories) & set(CATEGORIES))
    )
    least = 1 if profile.data.source == "procedural" else 0
    rules |= {
        "data.name must be of letters, digits, - and _": bool(
            re.fullmatch(r"[A-Za-z0-9_-]+", profile.data.name)
        ),
        f"data.n_train and n_test must be {least} or more": min(
            profile.data.n_train, profile.data.n_test
        )
        >= least,
        "data.seed must be 0 or more": profile.data.seed >= 0,
        "judge.widths must be three": len(profile.judge.widths) == 3,
    }
    for sentence, holds in rules.items():
        if not holds:
            raise StudyError(f"{where}: {sentence}")


def _common_rules(name: str, part: object) -> dict[str, bool]:
    """Ranges that a key has in every section that knows it."""
    if not dataclasses.is_dataclass(part):
        return {}
    rules, values = {}, {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    for key, value in values.items():
        if re.fullmatch(r"(sampler_)?beta[12]|momentum", key):
            rules[f"{name}.{key} must lie in [0, 1)"] = 0 <= value < 1
        if key == "weight_decay":
            rules[f"{name}.{key} must be 0 or more"] = value >= 0
        if re.fullmatch(r"(\w+_)?channels|widths|hidden", key):
            sizes = value if isinstance(value, tuple) else (value,)
            rules[f"{name}.{key} must be 1 or more"] = min(sizes, default=0) >= 1
    return rules


def _classifier_rules(name: str, part: Classifier, side: int) -> dict[str, bool]:
    margin = (side - 24) // 2  # objects span 24 voxels
    return {
        f"{name}.schedule must be constant or cosine": part.schedule in ("constant", "cosine"),
        f"{name}.warmup must be 0 or more": part.warmup >= 0,
        f"{name}.jitter must lie in 0..{margin}, the margin of the grids": 0
        <= part.jitter
        <= margin,
        f"{name}.smoothing must lie in [0, 1)": 0 <= part.smoothing < 1,
        f"{name}.average must lie in [0, 1)": 0 <= part.average < 1,
        f"{name}.votes must be 1 or 4": part.votes in (1, 4),
        f"{name}.dropout must lie in [0, 1)": 0 <= getattr(part, "dropout", 0) < 1,
    }


def _attack_rules(attacks: Attacks) -> dict[str, bool]:
    """Ranges of the section attacks."""
    rules = {
        f"attacks.{key} must be ascending, each once, and not empty": len(values) > 0
        and list(values) == sorted(set(values))
        for key in ("steps", "pgd_eps", "flips", "part_shares", "slices")
        for values in [getattr(attacks, key)]
    }
    return rules | {
        "attacks.strong must be among attacks.classifiers": set(attacks.strong)
        <= set(attacks.classifiers),
        "attacks.classifiers must name each once": len(set(attacks.classifiers))
        == len(attacks.classifiers),
        "attacks.check_eps must be one of pgd_eps": attacks.check_eps in attacks.pgd_eps,
        "attacks.transfer_flips must be one of flips": attacks.transfer_flips in attacks.flips,
        "attacks.part_shares must be below 1": all(s < 1 for s in attacks.part_shares),
        "attacks.table_shapes must be 0 or more": attacks.table_shapes >= 0,
        "attacks.surface_points must be 2 or more": attacks.surface_points >= 2,
    }


def _are_seeds(values: tuple[int, ...]) -> bool:
    """True for different numbers from 0 on, at least one."""
    return len(values) > 0 and len(set(values)) == len(values) and min(values) >= 0


def _ascends(values: tuple[float, ...]) -> bool:
    """True for positive finite numbers, at least one, each above the one before."""
    pairs = zip((0.0, *values), (*values, math.inf), strict=True)
    return len(values) > 0 and all(low < high for low, high in pairs)


def _gan_ablation_rules(profile: Profile) -> dict[str, bool]:
    """Sentences on the section gan_ablation, and whether they hold."""
    part = profile.gan_ablation
    layers = len(part.generator_channels)
    return {
        "gan_ablation.category: unknown name": part.category in (*CATEGORIES, "all"),
        "gan_ablation.seeds must be different, 0 or more, and at least one": _are_seeds(part.seeds),
        "gan_ablation.pool: gan3d.base * 2 ** layers * pool must be data.side": (
            profile.gan3d.base * 2**layers * part.pool == profile.data.side
        ),
        "gan_ablation.discriminator_channels must be as many as generator_channels": (
            len(part.discriminator_channels) == layers
        ),
        "gan_ablation.batch must be 8 or more: batch normalisation fails below": part.batch >= 8,
        "gan_ablation.n_samples must be 2 or more": part.n_samples >= 2,
        "gan_ablation.loss must be binary or wasserstein": part.loss in ("binary", "wasserstein"),
        "gan_ablation.labels must be hard or noisy": part.labels in ("hard", "noisy"),
        "gan_ablation.norm must be batch or layer": part.norm in ("batch", "layer"),
        "gan_ablation.norm must be layer with the loss wasserstein": part.loss == "binary"
        or part.norm == "layer",
        "gan_ablation.optimizer must be adam or sgd": part.optimizer in ("adam", "sgd"),
        "gan_ablation.cap must be 0 or more": 0 <= part.cap < math.inf,
        "gan_ablation.penalty must be 0 or more": 0 <= part.penalty < math.inf,
        "gan_ablation.latent must be uniform or normal": part.latent in ("uniform", "normal"),
        "gan_ablation.latent_std must be 1 with uniform latents": part.latent == "normal"
        or part.latent_std == 1,
    }


def _gan64_rules(profile: Profile) -> dict[str, bool]:
    """Sentences on the sections gan64 and upsampling, and whether they hold."""
    gan, budget = profile.gan64, profile.upsampling
    layers = {len(gan.generator_channels), len(gan.discriminator_channels)}
    fewer = {len(budget.generator_channels), len(budget.discriminator_channels)}
    return {
        "gan64.latent must be uniform or normal": gan.latent in ("uniform", "normal"),
        "gan64.batch must be 8 or more: batch normalisation fails below": gan.batch >= 8,
        "gan64.label_real must lie in (.5, 1]": 0.5 < gan.label_real <= 1,
        "gan64: generator and discriminator must have as many layers, and base * 2 ** layers must "
        "be side": len(layers) == 1 and gan.base * 2 ** max(layers) == gan.side,
        "gan64.source must be furniture or beds": gan.source in ("furniture", "beds"),
        "gan64.side must be 64 with source beds": gan.source == "furniture" or gan.side == 64,
        "upsampling.seeds must be different, 0 or more, and at least one": _are_seeds(budget.seeds),
        "upsampling.side must be gan64.side or half of it": budget.side
        in (gan.side, gan.side // 2),
        "upsampling: generator and discriminator must have as many layers, and gan64.base * 2 ** "
        "layers must be side": len(fewer) == 1 and gan.base * 2 ** max(fewer) == budget.side,
        "upsampling.batch must be 8 or more: batch normalisation fails below": budget.batch >= 8,
        "upsampling.n_samples must be 2 or more": budget.n_samples >= 2,
    }


def _image_rules(profile: Profile, model: str) -> dict[str, bool]:
    """Rules of a model that turns pictures into shapes."""
    part = getattr(profile, model)
    rules = {
        f"{model}.image must be a multiple of 32": part.image % 32 == 0,
        f"{model}.batch must be 8 or more: batch normalisation fails below": part.batch >= 8,
        f"{model}.encoder_channels must be four": len(part.encoder_channels) == 4,
        f"{model}: base * 2 ** layers must be data.side": part.base
        * 2 ** len(part.generator_channels)
        == profile.data.side,
        f"{model}.recon must be sse, mse, l2norm or bce_sum": part.recon
        in ("sse", "mse", "l2norm", "bce_sum"),
    }
    if model == "vaegan3d":
        rules |= {
            "vaegan3d.kl must be mean or sum": part.kl in ("mean", "sum"),
            "vaegan3d.weight_kl must be 0 or more": 0 <= part.weight_kl < math.inf,
            "vaegan3d.label_real must lie in (.5, 1]": 0.5 < part.label_real <= 1,
            "vaegan3d.discriminator_channels must be as many as generator_channels": len(
                part.generator_channels
            )
            == len(part.discriminator_channels),
        }
    return rules


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
