"""Which files of the repository a notebook or module imports, followed through `lib`."""

import ast
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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
