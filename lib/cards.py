"""Model cards: what stands beside every published weight file, from the run's own record."""

# The paper behind each training module; ours are named as ours.
SOURCES = {
    "judge": "3dnin_fc, the judge (Qi et al. 2016, Volumetric and multi-view CNNs for object "
    "classification on 3D data)",
    "gan3d": "3D-GAN (Wu et al. 2016, Learning a probabilistic latent space of object shapes via "
    "3D generative-adversarial modeling)",
    "desnet3d": "3D DescriptorNet (Xie et al. 2018, Learning descriptor networks for 3D shape "
    "synthesis and analysis)",
    "winn3d": "3DWINN (Huang et al. 2019, 3D volumetric modeling with introspective neural "
    "networks)",
    "beyond": "ours: the network and loss of 3DWINN (Huang et al. 2019) with persistent chains; "
    "not a published method",
    "vae3d": "3D-VAE (Kingma and Welling 2014 on voxels; a row of 3DWINN that states no layers)",
    "autoencoder": "the volumetric autoencoder with a Gaussian fitted to its codes (a comparison "
    "of Wu et al. 2016)",
    "vaegan3d": "3D-VAE-GAN (Wu et al. 2016)",
    "encoder_decoder": "ours: the networks of 3D-VAE-GAN (Wu et al. 2016) without an adversary",
    "gan64": "3D-GAN at its own resolution (Wu et al. 2016)",
    "baseline": "Baseline of 3DWINN (Huang et al. 2019): its network, cross-entropy alone",
    "tuned": "ours: the Baseline of 3DWINN with a tuned rate, regularisers and squeezed shapes",
    "hardened": "ours: the Baseline of 3DWINN trained on attacked shapes (Madry et al. 2018)",
    "introspective": "supervised 3DWINN (Huang et al. 2019, Eq. 3)",
    "voxnet": "VoxNet (Maturana and Scherer 2015)",
    "orion": "ORION (Sedaghat et al. 2016)",
}
PROVENANCE = ("device", "policy", "hours", "seconds per sample", "torch", "numpy", "python")
PROVENANCE += ("commit", "date", "restarts", "sample steps", "distance by sample steps")

DRAW = """\
    python -m lib sample {model} --category {category} --profile {profile} --run-seed {seed} \
-n 4 --seed 0 --out shapes.npz

or, with shape k drawn from seed k alone:

    from lib import config
    from lib.train import runs

    settings, run = config.load("{profile}"), runs.Run.parse("{run}")
    networks = runs.load_networks(run, settings, runs.weights_folder(run, settings))
    voxels = runs.sample(run, settings, networks, [0, 1, 2, 3]) > settings.evaluation.threshold
"""
LOAD = """\
    from lib import config
    from lib.train import runs

    settings, run = config.load("{profile}"), runs.Run.parse("{run}")
    networks = runs.load_networks(run, settings, runs.weights_folder(run, settings))
"""


def card(facts: dict, *, draws: bool) -> str:
    """A run's card as Markdown, from its ``run.json``; every number in it is read from there.

    draws: whether the model draws shapes. Hours, device and versions appear where the record has
    them: lite and study do, smoke and quick do not.
    """
    profile, model, category, seed = facts["run"].rsplit("-", 3)
    names = {"run": facts["run"], "profile": profile, "model": model, "category": category}
    corpus = "all categories" if category == "all" else f"category {category}"
    data = facts.get("data")
    known = f"{data['name']}, hash `{data['hash']}`" if data else "named by the key below"
    rows = [(k, facts[k]) for k in PROVENANCE if k in facts]
    sizes = [k for k in ("n_parameters",) if k in facts]  # the oldest records lack it
    return "\n".join(
        [
            f"# {facts['run']}",
            "",
            f"{SOURCES[model]}. Trained on {corpus} of the training split, seed {seed[1:]}.",
            "",
            *(f"- Parameters of the first network: {facts[n]}." for n in sizes),
            f"- Data: {known}; the data card says what it holds and what it may be used for.",
            f"- Recipe {facts['recipe']} of the training code; key `{facts['key']}`.",
            *(f"- {name.capitalize()}: {_plain(value)}." for name, value in rows),
            "",
            "## Files",
            "",
            *(f"- `{name}`: sha256 `{digest}`" for name, digest in facts["weights"].items()),
            "",
            "Kernels are stored in half precision, all else in single; samples and scores were",
            "computed with these very files. A file that does not match its hash is refused. Those",
            "that the artifact store does not carry come back by training: the key names the run.",
            "",
            "## Use",
            "",
            (DRAW if draws else LOAD).format(**names, seed=seed[1:]),
            "## Parameters",
            "",
            "| parameter | value |",
            "| --- | --- |",
            *(f"| {name} | {_plain(value)} |" for name, value in facts["parameters"].items()),
            "",
            "## Limits",
            "",
            "One pose a shape, grids of about 30 voxels a side, "
            + (
                "ten categories at most."
                if category == "all"
                else f"nothing but {category.replace('_', ' ')}s."
            ),
            "For research, as the data are. How good it is stands in the tables of the profile.",
            "",
        ]
    )


def _plain(value: object) -> str:
    """Lists without brackets, mappings as ``name value``."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
