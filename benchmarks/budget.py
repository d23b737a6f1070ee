"""Budget: seconds that the runs of quick have spent, beside those allotted in params/quick.yaml"""

import re
from pathlib import Path

from benchmarks import harness
from lib import config, files, paths

# Names in the comment of params/quick.yaml for the models.
WORDS = {
    "judge": "judge",
    "gan3d": "3D-GAN",
    "desnet3d": "DescriptorNet",
    "winn3d": "3DWINN",
    "beyond": "our own",
    "vae3d": "3D-VAE",
    "autoencoder": "autoencoder",
    "baseline": "Baseline",
    "introspective": "supervised",
    "voxnet": "VoxNet",
    "gan64": "3D-GAN of 64",
    "vaegan3d": "3D-VAE-GAN",
    "encoder_decoder": "encoder-decoder",
}


def allotted(text: str) -> dict[str, float]:
    """Seconds a run of each model, from the comment ``... allotted on 2 cores: judge 100, ...``."""
    comment = re.search(r"# Seconds allotted[^:]*:(.*)", text)
    if not comment:
        return {}
    found = {
        model: re.search(rf"{re.escape(word)}\D*?(\d+)", comment[1])
        for model, word in WORDS.items()
    }
    return {model: float(match[1]) for model, match in found.items() if match}


def latest_status(run: str, folder: Path) -> dict | None:
    """The newest status of a run, whatever its code and parameters were."""
    found = list(folder.glob(f"{run}-*/status.json"))
    return files.read_json(max(found, key=lambda p: p.stat().st_mtime)) if found else None


def case(run: str, seconds: float, status: dict | None) -> harness.Case:
    """One run; nothing is compared while it is not complete."""
    if status is None:
        return harness.Case(run, plain=seconds, note="skipped, has not run here")
    if status["step"] < status["n_steps"]:
        progress = f"{status['step']} of {status['n_steps']} steps in {status['seconds']:.0f} s"
        return harness.Case(run, plain=seconds, note=f"incomplete, {progress}")
    return harness.Case(run, status["seconds"], seconds)


def cases(full: bool) -> list[harness.Case]:
    """Every run that quick asks for."""
    seconds = allotted((paths.PARAMS / "quick.yaml").read_text())
    wanted = config.load("quick").wanted
    runs = [
        (paths.run_id("quick", model, category, seed), seconds[model])
        for model in wanted
        if model in seconds
        for category in wanted[model].categories
        for seed in wanted[model].seeds
    ]
    return [case(run, s, latest_status(run, paths.CHECKPOINTS)) for run, s in runs]
