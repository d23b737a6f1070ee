"""Which files of the repository a notebook or module imports, followed through `lib`.

`python -m tests.imports` writes them into dvc.yaml as dependencies of the stages.
"""

import ast
import json
import re
from pathlib import Path

import yaml

from lib import config

ROOT = Path(__file__).resolve().parent.parent
# Models that a notebook loads by name, besides those that its own name or command gives.
LOADED = {
    "02_reference": ("judge",),
    "16_train_classifiers": config.CLASSIFIERS,
    "31_latent_space": ("gan3d", "vae3d", "autoencoder", "vaegan3d"),
    "32_single_image": ("vaegan3d", "encoder_decoder"),
}


def module_file(name: str) -> Path | None:
    """The file of a dotted module of this repository, or None for everything else."""
    for candidate in (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py"):
        if name.split(".")[0] == "lib" and (ROOT / candidate).is_file():
            return ROOT / candidate
    return None


def direct_imports(source: str) -> set[Path]:
    """Files that a source text imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {f for n in names if (f := module_file(n))} - {ROOT / "lib/__init__.py"}


def closure(*files: Path) -> set[Path]:
    """The files and everything that they import."""
    found, todo = set(), list(files)
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += direct_imports(source_of(file))
    return found


def source_of(file: Path) -> str:
    """The Python text of a module, or of all code cells of a notebook."""
    if file.suffix != ".ipynb":
        return file.read_text()
    cells = json.loads(file.read_text())["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def needed_by(command: str) -> set[str]:
    """Files of `lib` that a stage's command `python -m lib notebook NAME ...` depends on.

    A model that is imported by its name counts with `lib/train/<model>.py`: that of `-p model=`,
    else those of ``LOADED``, else of the notebook's own name.
    """
    name = re.search(r"lib notebook (\S+)", command).group(1)
    given = re.search(r"-p model=(\w+)", command)
    own = re.match(r"\d+_train_(\w+)", name)
    models = given.groups() if given else LOADED.get(name) or (own.groups() if own else ())
    start = [ROOT / f"notebooks/{name}.ipynb", *(ROOT / f"lib/train/{m}.py" for m in models)]
    return {str(f.relative_to(ROOT)) for f in closure(*start) if f.suffix == ".py"}


def write_dependencies(file: Path) -> None:
    """Replace the `lib` entries in the deps of every stage of dvc.yaml that lists any code."""
    blocks = re.split(r"(?m)^(?=  \w+:$)", file.read_text())
    out = []
    for block in blocks:
        command = re.search(r"^ +cmd: (.+)$", block, re.M)
        listed = re.search(r"(?m)^( +)deps:\n((?:\1  - .+\n)+)", block)
        if command and listed and "foreach: ${" not in block:
            indent, lines = listed.group(1), listed.group(2).splitlines()
            kept = [line for line in lines if not re.search(r"- lib/\S+\.py$", line)]
            code = [f"{indent}  - {name}" for name in sorted(needed_by(command.group(1)))]
            deps = "\n".join([f"{indent}deps:", *kept, *code]) + "\n"
            block = block[: listed.start()] + deps + block[listed.end() :]
        out.append(block)
    text = "".join(out)
    yaml.safe_load(text)
    file.write_text(text)


if __name__ == "__main__":
    write_dependencies(ROOT / "dvc.yaml")
