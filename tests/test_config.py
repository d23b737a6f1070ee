"""Profiles are read strictly: what is off is refused with the file and the key."""

import ast
import dataclasses
import re

import pytest
import yaml

from lib import config, paths
from lib.errors import StudyError

SECTIONS = (
    config.Data,
    config.Judge,
    config.Gan3d,
    config.Desnet3d,
    config.Winn3d,
    config.Beyond,
    config.Table1,
    config.Introspective,
    config.Orion,
    config.Features,
    config.Vae3d,
    config.Autoencoder,
    config.Latent,
    config.Vaegan3d,
    config.EncoderDecoder,
    config.SingleImage,
    config.Ablation,
    config.GanAblation,
    config.Gan64,
    config.Upsampling,
    config.Attacks,
    config.Evaluation,
    config.Device,
)


def write(params, name, change):
    """Rewrite a copied profile after ``change`` has edited its plain values."""
    path = params / f"{name}.yaml"
    raw = yaml.safe_load(path.read_text())
    change(raw)
    path.write_text(yaml.safe_dump(raw))


def refusal(name):
    with pytest.raises(StudyError) as caught:
        config.load(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["smoke", "quick", "lite", "study", "paper"])
def test_every_profile_loads(name):
    profile = config.load(name)
    assert profile.name == name
    assert set(profile.categories) <= set(config.CATEGORIES)
    assert config.load(profile.judge.profile).judge == profile.judge


def test_the_five_profiles_are_all():
    assert config.available() == ["lite", "paper", "quick", "smoke", "study"]


def test_the_profile_paper_is_printed_and_study_says_what_it_changed():
    """Values of Wu et al. 2016, Xie et al. 2018 and Huang et al. 2019."""
    paper, study = config.load("paper"), config.load("study")
    assert paper.data == study.data and paper.judge == study.judge and paper.wanted == {}
    assert (paper.gan64.lr_generator, paper.gan64.lr_discriminator) == (2.5e-3, 1e-5)
    assert paper.gan64.saturating and paper.gan64.batch == 100 and paper.gan64.latent == "uniform"
    assert (paper.desnet3d.steps, paper.desnet3d.lr, paper.desnet3d.restart) == (3000, 0.01, 0)
    critic, supervised = paper.winn3d, paper.introspective
    assert (critic.lr, critic.batch, critic.penalty) == (1e-4, 128, 10)
    assert (critic.sampler_lr, critic.sampler_beta1, critic.sampler_beta2) == (0.005, 0.8, 0)
    assert (supervised.lr, supervised.sampler_lr, supervised.sampler_beta2) == (2e-5, 0.002, 0.9)
    assert critic.centre == "batch" and not supervised.penalty_in_alpha
    assert paper.baseline.lr == 2e-5 and paper.baseline.schedule == "constant"
    for model in config.LAYOUTS:
        if model != "judge":
            assert getattr(paper, model).dtype == "float32", model


def test_lite_and_study_share_data_and_judge():
    lite, study = config.load("lite"), config.load("study")
    assert lite.data == study.data
    assert lite.judge == study.judge
    assert lite.judge.profile == "study"


def test_smoke_and_quick_are_deterministic_and_the_others_are_not():
    assert [config.load(n).device.deterministic for n in config.available()] == [0, 0, 1, 1, 0]


def test_unknown_profile_lists_the_known():
    assert refusal("big") == "no profile 'big'; choose one of lite, paper, quick, smoke, study"
    assert "no profile '../study'" in refusal("../study")
    assert "no profile 'runs'" in refusal("runs")


def test_unknown_key(params):
    write(params, "smoke", lambda raw: raw["gan3d"].update(stepz=3))
    assert refusal("smoke").startswith(
        "params/smoke.yaml: unknown key gan3d.stepz; known are z_dim"
    )


def test_missing_key(params):
    write(params, "smoke", lambda raw: raw["judge"].pop("lr"))
    assert refusal("smoke") == "params/smoke.yaml: key judge.lr is missing"


def test_missing_section(params):
    write(params, "smoke", lambda raw: raw.pop("evaluation"))
    assert refusal("smoke") == "params/smoke.yaml: key evaluation is missing"


def test_a_number_that_yaml_reads_as_text(params):
    path = params / "smoke.yaml"
    path.write_text(path.read_text().replace("lr_discriminator: 1.0e-4", "lr_discriminator: 1e-4"))
    assert refusal("smoke") == (
        "params/smoke.yaml: gan3d.lr_discriminator must be float, not '1e-4' "
        "(YAML reads 1e-4 as text: write 1.0e-4)"
    )


def test_a_word_that_yaml_reads_as_false(params):
    """The one way to ask for meshes, as the data page says it: in quotes."""
    path = params / "smoke.yaml"
    text = path.read_text()
    path.write_text(text.replace("source: procedural", "source: off"))
    assert refusal("smoke") == (
        "params/smoke.yaml: data.source must be str, not False "
        '(YAML reads off, on, no and yes as truth values: write "off")'
    )
    path.write_text(text.replace("source: procedural", 'source: "off"'))
    assert config.load("smoke").data.source == "off"


def test_what_makes_a_profile():
    assert config.maker("quick", "90_report") == "`make repro`"
    assert config.maker("smoke", "02_reference", seed=0) == (
        "`python -m lib notebook 02_reference -p profile=smoke -p seed=0 --out 02_reference.ipynb`"
    )


@pytest.mark.parametrize(
    "section, key, value, kind",
    [
        ("gan3d", "steps", 8.0, "int"),
        ("gan3d", "steps", True, "int"),
        ("gan3d", "batch", "8", "int"),
        ("gan3d", "gate", "high", "float"),
        ("gan3d", "norm_first", 1, "bool"),
        ("gan3d", "generator_channels", 16, "a list"),
        ("judge", "widths", [8, "8", 16], "int"),
        ("data", "name", 3, "str"),
        ("device", "threads", None, "int"),
    ],
)
def test_wrong_types_are_named(params, section, key, value, kind):
    write(params, "smoke", lambda raw: raw[section].update({key: value}))
    message = refusal("smoke")
    assert message.startswith(f"params/smoke.yaml: {section}.{key}")
    assert f"must be {kind}, not" in message


def test_a_whole_number_is_a_float():
    assert config.with_changes(config.load("smoke"), gan3d={"gate": 1}).gan3d.gate == 1.0


@pytest.mark.parametrize("text", ["gan3d: [", "a: b: c", "\t- x", "- 1\n- 2\n", "", "\x00"])
def test_a_file_that_is_no_profile(params, text):
    (params / "smoke.yaml").write_text(text)
    assert refusal("smoke").startswith("params/smoke.yaml: ")


def test_a_key_that_stands_twice(params):
    path = params / "smoke.yaml"
    path.write_text(path.read_text().replace("  gate: 0.8", "  gate: 0.8\n  gate: 0.9", 1))
    assert "gate stands twice" in refusal("smoke")


@pytest.mark.parametrize("categories", [[], ["chair", "chair"], ["all"], ["lamp"]])
def test_categories_are_names_each_once(params, categories):
    write(params, "smoke", lambda raw: raw.update(categories=categories))
    assert "categories must be names" in refusal("smoke")


def test_wanted_seeds(params):
    write(params, "smoke", lambda raw: raw["wanted"]["gan3d"].update(seeds=[-1]))
    assert "wanted.gan3d.seeds" in refusal("smoke")


def test_a_file_that_is_no_text(params):
    (params / "smoke.yaml").write_bytes(b"name: \xff\xfe")
    assert refusal("smoke").startswith("params/smoke.yaml: not readable as YAML")


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("data", "source", "web"),
        ("data", "side", 28),
        ("data", "validation", 0.0),
        ("data", "validation", 0.5),
        ("data", "name", "../raw"),
        ("data", "name", ""),
        ("data", "n_train", 0),
        ("data", "n_test", -3),
        ("data", "seed", -1),
        ("judge", "momentum", -5.0),
        ("judge", "weight_decay", -1.0),
        ("judge", "widths", []),
        ("judge", "widths", [8, 16]),
        ("judge", "widths", [-8, 8, 16]),
        ("gan3d", "beta1", 1.5),
        ("vaegan3d", "beta2", -1.0),
        ("winn3d", "sampler_beta1", 1.0),
        ("gan3d", "gate", float("nan")),
        ("gan3d", "gate", 10**400),
        ("gan3d", "generator_channels", [0, 8]),
        ("gan3d", "discriminator_channels", [8, -8]),
        ("voxnet", "channels", 0),
        ("judge", "jitter", 4),
        ("judge", "jitter", -1),
        ("judge", "dtype", "float16"),
        ("judge", "layout", "rows"),
        ("judge", "epochs", 0),
        ("judge", "batch", 0),
        ("judge", "lr", -0.1),
        ("judge", "lr", float("nan")),
        ("gan3d", "latent", "cauchy"),
        ("gan3d", "batch", 7),
        ("gan3d", "label_real", 1.2),
        ("gan3d", "label_real", 0.5),
        ("gan3d", "generator_channels", [16, 8]),
        ("gan3d", "discriminator_channels", [8, 8]),
        ("gan3d", "steps", 0),
        ("gan3d", "z_dim", 0),
        ("gan3d", "lr_generator", float("inf")),
        ("desnet3d", "layout", "channels_last"),
        ("desnet3d", "dtype", "float16"),
        ("desnet3d", "observed", -1),
        ("desnet3d", "delta", 0.0),
        ("desnet3d", "s", 0.0),
        ("desnet3d", "chains", 0),
        ("desnet3d", "sample_steps", []),
        ("desnet3d", "sample_steps", [0, 20]),
        ("desnet3d", "sample_steps", [40, 20]),
        ("desnet3d", "n_validation", 1),
        ("desnet3d", "kernels", [6]),
        ("desnet3d", "strides", [3, 2, 2]),
        ("winn3d", "layout", "blocked"),
        ("winn3d", "dtype", "half"),
        ("winn3d", "centre", "mean"),
        ("winn3d", "stop", "sometimes"),
        ("ablation", "stop", "sometimes"),
        ("ablation", "sampler_beta2", 1.0),
        ("winn3d", "start", "uniform"),
        ("winn3d", "batch", 7),
        ("winn3d", "positives", -1),
        ("winn3d", "cascades", 0),
        ("winn3d", "sampler_lr", 0.0),
        ("winn3d", "max_steps", 0),
        ("winn3d", "channels", [4, 4, 4, 4, 4, 4, 8]),
        ("beyond", "layout", "blocked"),
        ("beyond", "dtype", "bf16"),
        ("beyond", "restart", 1.1),
        ("beyond", "restart", -0.1),
        ("beyond", "momentum", 1.0),
        ("beyond", "average", 1.0),
        ("beyond", "average", -0.1),
        ("beyond", "floor", 0.0),
        ("beyond", "channels", [4, 4, 4, 4, 4, 4, 8]),
        ("baseline", "schedule", "step"),
        ("baseline", "warmup", -1),
        ("baseline", "epochs", 0),
        ("baseline", "init_std", 0.0),
        ("baseline", "channels", [4, 4, 4, 4, 4, 4, 8]),
        ("tuned", "jitter", 1),
        ("tuned", "smoothing", 1.0),
        ("tuned", "average", 1.0),
        ("tuned", "dropout", 1.0),
        ("tuned", "votes", 2),
        ("tuned", "squeeze", 1.0),
        ("introspective", "value", "head"),
        ("introspective", "cascades", 9),
        ("introspective", "negatives", -1),
        ("introspective", "new", 0),
        ("introspective", "sampler_beta2", 1.0),
        ("voxnet", "layout", "blocked"),
        ("orion", "dtype", "half"),
        ("orion", "channels", 0),
        ("vae3d", "beta", -1.0),
        ("vae3d", "batch", 7),
        ("vae3d", "lr", 0.0),
        ("vae3d", "dtype", "float16"),
        ("vae3d", "layout", "blocked"),
        ("vae3d", "decoder_channels", [8, 8]),
        ("autoencoder", "encoder_channels", [8, 8, 8, 8]),
        ("autoencoder", "steps", 0),
        ("autoencoder", "layout", "blocked"),
        ("latent", "values", 1),
        ("latent", "steps", 2),
        ("latent", "top", 1),
        ("latent", "pairs", 0),
        ("attacks", "eps", 0.0),
        ("attacks", "steps", [10, 5]),
        ("attacks", "steps", []),
        ("attacks", "pgd_eps", [0.1, 0.1]),
        ("attacks", "pgd_eps", [-0.1, 0.1]),
        ("attacks", "check_eps", 0.07),
        ("attacks", "flips", [0, 5]),
        ("attacks", "transfer_flips", 6),
        ("attacks", "part_shares", [0.1, 1.0]),
        ("attacks", "strong", ["hardened", "other"]),
        ("attacks", "classifiers", ["baseline", "baseline", "introspective", "judge"]),
        ("attacks", "table_shapes", -1),
        ("attacks", "surface_points", 1),
        ("attacks", "pgd_restarts", 0),
        ("features", "n_train", -1),
        ("features", "c", 0.0),
        ("features", "relative_cs", []),
        ("features", "relative_cs", [0.5, 0.01]),
        ("features", "relative_cs", [0.0, 0.5]),
        ("features", "logistic_cs", [0.1, 0.1]),
        ("features", "shares", [0.5, 1.0]),
        ("features", "shares", [0.0]),
        ("features", "folds", 1),
        ("features", "draws", 0),
        ("features", "pca", 0),
        ("features", "epochs", 0),
        ("features", "epoch_lr", -0.1),
        ("evaluation", "threshold", 1.0),
        ("evaluation", "threshold", 0.0),
        ("evaluation", "n_equal", 17),
        ("evaluation", "n_draws", 0),
        ("device", "threads", 0),
    ],
)
def test_ranges(params, section, key, value):
    write(params, "smoke", lambda raw: raw[section].update({key: value}))
    message = refusal("smoke")
    assert message.startswith("params/smoke.yaml: ")
    assert key in message or "layers must be data.side" in message
    with pytest.raises(StudyError):
        config.with_changes(config.load("quick"), **{section: {key: value if value != 17 else 65}})


def test_rules_of_two_parameters(params):
    write(params, "smoke", lambda raw: raw["beyond"].update(advanced=9))
    assert refusal("smoke") == "params/smoke.yaml: beyond.chains must be a multiple of advanced"
    write(
        params, "quick", lambda raw: raw["winn3d"].update(snapshots=raw["winn3d"]["iterations"] + 1)
    )
    assert refusal("quick") == "params/quick.yaml: winn3d.snapshots must lie in 0..iterations"


def test_names_of_categories_and_wanted_models(params):
    write(params, "smoke", lambda raw: raw["categories"].append("lamp"))
    assert refusal("smoke") == (
        "params/smoke.yaml: categories must be names of ModelNet10, each once, and at least one"
    )
    write(params, "quick", lambda raw: raw["wanted"]["gan3d"]["categories"].append("lamp"))
    assert refusal("quick") == "params/quick.yaml: wanted.gan3d.categories: unknown name"
    write(params, "lite", lambda raw: raw["wanted"].update(vae=raw["wanted"]["gan3d"]))
    assert refusal("lite") == "params/lite.yaml: wanted.vae: unknown model"
    write(params, "study", lambda raw: raw.update(name="lite"))
    assert refusal("study") == "params/study.yaml: name must be study"


def test_with_changes_refuses_unknown_parameters_and_leaves_the_original():
    profile = config.load("smoke")
    changed = config.with_changes(profile, gan3d={"steps": 4})
    assert (changed.gan3d.steps, profile.gan3d.steps) == (4, 8)
    assert dataclasses.replace(changed, gan3d=profile.gan3d) == profile
    with pytest.raises(StudyError, match="gan3d has no parameter stepz"):
        config.with_changes(profile, gan3d={"stepz": 4})
    with pytest.raises(StudyError, match="gan3d.steps must be int"):
        config.with_changes(profile, gan3d={"steps": 4.5})


def test_every_parameter_is_used():
    """A key that no code reads promises what it does not do; models' sections are read by name."""
    read = set(config.LAYOUTS)
    for file in [*paths.CODE.glob("lib/**/*.py"), *paths.NOTEBOOKS.glob("*.ipynb")]:
        if file.suffix == ".ipynb":
            read |= set(re.findall(r"\.(\w+)", file.read_text()))
        elif file.name != "config.py":
            tree = ast.parse(file.read_text())
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for section in (*SECTIONS, config.Wanted, config.Profile):
        unread = {field.name for field in dataclasses.fields(section)} - read
        assert not unread, f"{section.__name__}: {unread}"
