"""The pipeline: dependencies, recipes, notebooks, one-way imports, sizes."""

import ast
import re
import subprocess

import pytest
import yaml

from lib import config, features, latent, runner, single_image, store
from lib.train import runs
from tests.imports import ROOT, closure, direct_imports, needed_by, source_of

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
LISTED = yaml.safe_load((ROOT / "params/runs.yaml").read_text())
# Stages without code dependencies: their recipe stands for the code.
RECIPE_STAGES = set(LISTED)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT = 45 * 2**20

ORDER = [
    {"errors"},
    {"paths", "files", "cards"},
    {"store"},
    {"config"},
    {"rng", "device"},
    {"voxel", "render"},
    {"furniture"},
    {"data"},
    {"heldout", "ikea"},
    {"models", "losses"},
    {"samplers", "metrics", "attacks"},
    {"train"},
    {"evaluate"},
    {"classify", "features", "linear"},
    {"cache"},
    {"evaluate_sets", "evaluate_features", "energy", "latent", "supervised"},
    {"figures", "report", "runner"},
    {"bars", "ablation", "gan_ablation", "judges", "learning_curve", "single_image", "adversarial"},
    {"upsampling"},
    {"cli"},
    {"__main__"},
]


def body(stage: dict) -> dict:
    return stage.get("do", stage)


def notebook_of(stage: dict) -> str:
    return re.search(r"lib notebook (\S+)", body(stage)["cmd"]).group(1)


def outs(stage: dict) -> list[tuple[str, dict]]:
    listed = body(stage)["outs"]
    return [next(iter(o.items())) if isinstance(o, dict) else (o, {}) for o in listed]


@pytest.mark.parametrize("name", [s for s in PIPELINE["stages"] if s not in RECIPE_STAGES])
def test_dependencies_contain_the_import_closure(name):
    stage = PIPELINE["stages"][name]
    needed = needed_by(body(stage)["cmd"])
    items = stage.get("foreach", {})
    items = list(items.values()) if isinstance(items, dict) else []
    templated = {str(v) for item in items for v in item.values()}
    listed = set(body(stage)["deps"]) | templated
    assert needed <= listed, f"{name} lacks {sorted(needed - listed)}: python -m tests.imports"
    code = {d for d in body(stage)["deps"] if d.endswith(".py")}
    assert code <= needed, f"{name} lists {sorted(code - needed)}, which it does not import"


@pytest.mark.parametrize(
    "name, models",
    [
        ("supervised", config.CLASSIFIERS),
        ("adversarial", config.CLASSIFIERS),
        ("svm_features", tuple(features.STARTS)),
        ("latent_space", latent.STUDIED),
        ("single_image", single_image.MODELS),
    ],
)
def test_tables_depend_on_the_models_that_they_load_by_name(name, models):
    """Their modules are imported by `runs.model`, where no import shows; parameters count too."""
    stage = body(PIPELINE["stages"][name])
    (sections,) = [v for p in stage["params"] for k, v in p.items() if k.startswith("params/${")]
    assert set(models) <= set(sections)
    for model in models:
        modules = {f"lib/train/{model}.py", *runs.model(model).modules}
        assert modules <= set(stage["deps"]), f"{name}, {model}: {modules - set(stage['deps'])}"


@pytest.mark.parametrize("name", sorted(RECIPE_STAGES))
def test_costly_runs_depend_on_no_code(name):
    stage = body(PIPELINE["stages"][name])
    assert not [d for d in stage["deps"] if d.endswith((".py", ".ipynb"))]
    assert any("params/recipes.yaml" in p for p in stage["params"] if isinstance(p, dict))


def test_recipes_are_stamped():
    assert runs.stale_recipes() == [], "raise the recipe or run `python -m lib recipes --accept`"


def test_listed_runs_are_known_and_in_their_group():
    for group, found in LISTED.items():
        for name, values in found.items():
            run = runs.Run.parse(name)
            assert runs.run_group(run) == group
            assert values == {"profile": run.profile, "category": run.category, "seed": run.seed}


@pytest.mark.parametrize("name", PIPELINE["stages"])
def test_outs_are_ordinary(name):
    for path, options in outs(PIPELINE["stages"][name]):
        assert "persist" not in options
        # What is read on the web page is in git; what derives from the data never travels.
        if options.get("cache") is False:
            assert re.search(r"/(data|tables|figures|report)", path)
        if path.startswith("data/"):
            assert options == {"push": False}


def test_stages_run_nothing_but_notebooks():
    for name, stage in PIPELINE["stages"].items():
        assert body(stage)["cmd"].startswith("python -m lib notebook "), name
        assert not body(stage).get("always_changed"), name


def test_stages_side_by_side_wait_for_the_lock():
    """DVC gives up on its lock after 3 s, and with --quiet it does not even say so."""
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"(?m)^.*(?:SIDE_BY_SIDE|ALONE) = (.*dvc.*)$", makefile)
    assert len(commands) == 2
    for command in commands:
        assert "dvc --wait-for-lock repro" in command and "--quiet" not in command


def test_imports_go_one_way():
    rank = {name: k for k, names in enumerate(ORDER) for name in names}
    for file in sorted((ROOT / "lib").rglob("*.py")):
        own = file.relative_to(ROOT / "lib").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for other in direct_imports(file.read_text()):
            part = other.relative_to(ROOT / "lib").parts[0].removesuffix(".py")
            assert part == own or rank[part] < rank[own], f"{file.name} imports lib.{part}"


def test_models_know_nothing_of_training_and_plots_stay_in_figures():
    for file in (ROOT / "lib").rglob("*.py"):
        text = file.read_text()
        if file.parent.name == "models":
            assert "lib.train" not in text and "lib.metrics" not in text
        if file.name not in ("figures.py", "runner.py"):
            assert not re.search(r"^\s*(import|from) (matplotlib|plotly)", text, re.M), file


def test_training_never_sees_the_test_split():
    for file in (ROOT / "lib/train").glob("*.py"):
        assert ROOT / "lib/heldout.py" not in closure(file), file


def test_training_imports_only_the_five_packages():
    """Training and sampling run where torch, numpy, pyyaml, tqdm and safetensors are (and scipy,
    which the voxel layouts use); no notebook, pipeline or drawing library. Fabric is imported by a
    run on several devices alone (tests/test_ranks.py)."""
    allowed = {"torch", "numpy", "yaml", "tqdm", "safetensors", "scipy", "lib"}
    standard = __import__("sys").stdlib_module_names
    files = closure(*(ROOT / "lib/train").glob("*.py"))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                if (file.name, top) == ("ranks.py", "lightning_fabric"):
                    continue
                assert top in allowed or top in standard, f"{file.name} imports {name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebooks_are_clean(path):
    assert runner.is_clean(path) == []
    assert re.fullmatch(r"\d\d_\w+", path.stem)
    assert "**Claim.**" in path.read_text() or path.stem == "00_tour"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_default_to_smoke(path):
    assert 'profile: str = \\"smoke\\"' in path.read_text()
    assert len(re.findall(r"^\w+: ", source_of(path), re.M)) <= 5


def test_lite_shares_data_and_judge_with_study():
    lite, study = config.load("lite"), config.load("study")
    assert lite.data == study.data
    assert lite.judge == study.judge and lite.judge.profile == "study"


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_tracked_size():
    total = sum((ROOT / f).stat().st_size for f in tracked() if (ROOT / f).is_file())
    assert total <= LIMIT, f"tracked files are {total / 2**20:.1f} MiB; prune the store"


def test_no_data_set_is_tracked():
    for name in tracked():
        assert not re.search(r"\.(off|mat)$|(modelnet10|beds_64).*\.npz$|ikea\.zip", name), name
        assert not re.search(r"\.(off|mat)$|modelnet10.*\.npz$|ikea.*\.zip$|IKEA/", name), name
        assert not name.startswith(("data/raw/", "data/prepared/", ".ckpt/")), name


def test_the_store_is_named_relative():
    assert "url = ../data/store" in (ROOT / ".dvc/config").read_text()


def test_the_store_is_sound():
    named = [f for f in tracked() if f.startswith("data/store/files/")]
    assert store.check() >= len(named) > 100
