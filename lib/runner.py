"""Notebooks run as pipeline stages: same parameters in, same bytes out, nothing left running.

papermill does the running. What is added here: parameters are checked before anything starts, the
executed copy is freed of everything that differs between two runs, and a runner whose parent was
killed takes its kernel with it, so that a second pipeline never meets a first writer.
"""

import ast
import contextlib
import copy
import ctypes
import io
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path

from lib.errors import StudyError
from lib.files import check_place, write_text
from lib.paths import CHECKPOINTS, CODE, relative

# After Ctrl-C the code in the kernel has this long to save its state, then it is killed.
GRACE_SECONDS = 20.0
# After the parent's death somebody may start the same stage again at any moment: less patience.
ORPHAN_SECONDS = 5.0

MAX_CELL_LINES = 15
MAX_DEF_LINES = 3
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "pygments_lexer": "ipython3",
}
METADATA = {"kernelspec": KERNELSPEC, "language_info": LANGUAGE}
# A cell that begins so keeps its output, which nbval compares with what the profile smoke gives.
CHECKED = "# NBVAL_CHECK_OUTPUT"
WIDGET = "application/vnd.jupyter.widget-view+json"
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
ADDRESS = re.compile(r"\bat 0x[0-9A-Fa-f]+")
# Names drawn at random by HTML writers: UUIDs (plotly) and pandas' table ids.
RANDOM_NAME = re.compile(
    r"\b[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\b"
    r"|\bT_[0-9a-f]{5}(?=[_\"\s])"
)
# Evaluated by the kernel before the first cell; an expression, so that no name is left behind.
GUARD = "__import__('lib.runner').runner.follow_runner()"


def execute(
    notebook: Path,
    output: Path,
    parameters: dict,
    environment: dict[str, str] | None = None,
    progress: bool = True,
) -> None:
    """Run a committed notebook with other parameters and write the executed copy.

    The kernel is this interpreter, starts in the repository root and inherits ``os.environ`` with
    ``environment`` on top (threads and instruction sets act before any import). ``progress`` shows
    the cell's number and what the kernel writes to stderr, live. Two runs that compute the same
    write the same bytes, see ``normalise``.

    Raises StudyError for a missing notebook or parameters cell, unknown parameters or ones of
    another type than annotated, an output that is the notebook itself or cannot be written, or an
    exception in a cell (a StudyError passes on its message). The partly executed notebook then
    stays in ``.ckpt/failed``. Ctrl-C and SIGTERM interrupt the kernel, wait up to 20 s, kill it at
    a second signal, and end in SystemExit(128 + signal).
    """
    notebook, output = Path(notebook).resolve(), Path(output).resolve()
    if output == notebook:
        raise StudyError(f"{relative(notebook)}: the output is the notebook itself; name another")
    book = _read(notebook)
    _check_parameters(book, notebook, parameters)
    check_place(output)
    book.metadata = METADATA
    die_with_parent()
    working = CHECKPOINTS / "failed" / (_flat_name(output) + ".failed.ipynb")
    working.parent.mkdir(parents=True, exist_ok=True)
    run = _Run(notebook, book, parameters, working, progress)
    with _changed_environment(environment or {}), _signals_to(run.stop):
        run.papermill()
    write_text(output, _dumps(normalise(_read(working))))
    working.unlink()


# Reading and writing notebooks


def _read(path: Path):
    """A version 4.5 notebook; cells without an id of their own are named by their position."""
    import nbformat

    try:
        book = json.loads(path.read_text(encoding="utf-8"))
        if book["nbformat"] != 4:
            raise ValueError(f"format {book['nbformat']}, expected 4")
        seen: set[str] = set()
        for i, cell in enumerate(book["cells"]):
            if cell.get("id", "") in seen | {""}:
                cell["id"] = f"cell-{i}"
            seen.add(cell["id"])
        book["nbformat_minor"] = 5
        return nbformat.reads(json.dumps(book), as_version=4)
    except FileNotFoundError:
        raise StudyError(f"{relative(path)}: no such notebook") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise StudyError(f"{relative(path)}: not a readable notebook ({error})") from None


def _dumps(book) -> str:
    """JSON with sorted keys, as every notebook of the study is written."""
    import nbformat

    return nbformat.writes(book, version=4).rstrip("\n") + "\n"


def _flat_name(output: Path) -> str:
    """One file name per output, so that two stages of one notebook never share a failed copy."""
    return relative(output.with_suffix("")).strip("/").replace("/", "-")


# Parameters


def _tagged(book) -> list:
    """The code cells that carry the tag ``parameters``."""
    return [
        cell
        for cell in book.cells
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", [])
    ]


def parameter_names(source: str) -> list[str]:
    """Names assigned at the top level of a parameters cell, in order.

    papermill reads the cell by regular expressions and misses a parameter whose comment holds an
    equals sign, so the syntax tree is asked instead. Raises SyntaxError.
    """
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            names.append(node.target)
        elif isinstance(node, ast.Assign):
            names.extend(node.targets)
    return [name.id for name in names if isinstance(name, ast.Name)]


def _parameter_types(source: str) -> dict[str, type]:
    """The parameters that are annotated with a plain type."""
    plain = {kind.__name__: kind for kind in (str, int, float, bool)}
    return {
        node.target.id: plain[node.annotation.id]
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.annotation, ast.Name)
        and node.annotation.id in plain
    }


def _check_parameters(book, notebook: Path, parameters: dict) -> None:
    """Refuse what papermill would only warn about."""
    cells = _tagged(book)
    if len(cells) != 1:
        raise StudyError(
            f"{relative(notebook)}: {len(cells)} cells are tagged `parameters`, exactly one must be"
        )
    try:
        known = parameter_names(cells[0].source)
        types = _parameter_types(cells[0].source)
    except SyntaxError as error:
        raise StudyError(f"{relative(notebook)}: the parameters cell: {error}") from None
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise StudyError(
            f"{relative(notebook)}: no parameter {', '.join(unknown)}; it has {', '.join(known)}"
        )
    for name, value in parameters.items():
        kind = types.get(name, type(value))
        if type(value) is not kind and (type(value), kind) != (int, float):
            raise StudyError(
                f"{relative(notebook)}: parameter {name} must be {kind.__name__}, not {value!r}"
            )


# Running


class _Interrupted(Exception):
    """Leaves papermill's loop before the next cell."""


class _Screen:
    """Lines on stderr: the runner's own, and the kernel's, which take its place."""

    def __init__(self, shown: bool):
        self.shown, self.at_start, self.status_open = shown, True, False

    def write(self, text: str) -> None:
        if not self.shown or not text:
            return
        if self.status_open:
            text = "\r\x1b[K" + text
        sys.stderr.write(text)
        self.at_start, self.status_open = text.endswith("\n"), False
        sys.stderr.flush()

    def flush(self) -> None:
        """papermill flushes the stream it was given; ``write`` has done so already."""

    def status(self, text: str, last: bool = False) -> None:
        """On a terminal one line that is overwritten, elsewhere (a log) a line each."""
        if sys.stderr.isatty():
            self.write(("" if self.status_open else "\r\x1b[K") + text + "\n" * last)
            self.status_open = self.shown and not last
        else:
            self.write(("" if self.at_start else "\n") + text + "\n")


class _Run:
    """One execution: the notebook, its kernel, and the signal that asked it to stop, if any."""

    def __init__(self, notebook, book, parameters: dict, working: Path, progress: bool):
        self.notebook, self.book, self.parameters = notebook, book, parameters
        self.working, self.screen = working, _Screen(progress)
        self.kernel: int | None = None
        self.signal: int | None = None
        self.cell = 0
        self.timer: threading.Timer | None = None

    def papermill(self) -> None:
        """Run all cells into the working copy, or raise what ``execute`` promises."""
        import papermill
        from jupyter_client.kernelspec import NoSuchKernel
        from nbclient.exceptions import DeadKernelError

        start = time.monotonic()
        try:
            self._call(papermill)
            if self.signal is None:
                self._check_complete()
        except _Interrupted:
            pass
        except papermill.PapermillExecutionError as error:
            if self.signal is None:
                raise self._failure(error) from None
        except NoSuchKernel as error:
            raise StudyError(f"{error}: install ipykernel in this environment") from None
        except (DeadKernelError, RuntimeError) as error:
            if self.signal is None:
                reason = str(error) or "the kernel died, perhaps for want of memory"
                raise StudyError(f"{self._place()}: {reason}") from None
        finally:
            if self.timer:
                self.timer.cancel()
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            self.screen.status(f"{self._place()}: stopped by {name}", last=True)
            raise SystemExit(128 + self.signal)
        seconds = time.monotonic() - start
        self.screen.status(f"{self.notebook.stem}: done in {seconds:.0f} s", last=True)

    def _call(self, papermill) -> None:
        # Its only warnings are unknown parameters, which were checked, and slow automatic saving.
        logging.getLogger("papermill").setLevel(logging.ERROR)
        papermill.execute_notebook(
            self.book,
            # papermill formats paths: braces must be doubled.
            str(self.working).replace("{", "{{").replace("}", "}}"),
            parameters={name: self.parameters[name] for name in sorted(self.parameters)},
            kernel_name="python3",
            cwd=CODE,
            progress_bar=False,
            stderr_file=self.screen,
            kernel_manager_class=_kernel_manager(self),
            extra_arguments=[f"--IPKernelApp.exec_lines={GUARD}"],
            on_cell_start=self.cell_start,
        )

    def cell_start(self, cell, cell_index: int) -> None:
        """Called by nbclient before each cell."""
        injected = "injected-parameters" in cell.metadata.get("tags", [])
        self.cell += not injected
        if self.signal is not None:
            raise _Interrupted
        if not injected:
            self.screen.status(f"{self.notebook.stem}: cell {self.cell}/{len(self.book.cells)}")

    def stop(self, signum: int, frame=None) -> None:
        """First signal: interrupt the code in the kernel and give it time. Second: kill it."""
        first = self.signal is None
        self.signal = self.signal or signum
        if self.kernel is None:
            if not first:
                raise SystemExit(128 + signum)
        elif first:
            self.timer = threading.Timer(GRACE_SECONDS, _kill, (self.kernel, signal.SIGKILL))
            self.timer.daemon = True
            self.timer.start()
            _kill(self.kernel, signal.SIGINT)
        else:
            _kill(self.kernel, signal.SIGKILL)

    def _check_complete(self) -> None:
        """papermill takes ``sys.exit(0)`` for success and leaves the remaining cells unrun."""
        for i, cell in enumerate(_read(self.working).cells, start=1):
            if cell.cell_type == "code" and cell.source.strip() and not cell.execution_count:
                raise StudyError(f"{relative(self.notebook)}: ended before cell {i}, by an exit()")

    def _place(self) -> str:
        return f"{relative(self.notebook)}: cell {self.cell} of {len(self.book.cells)}"

    def _failure(self, error) -> StudyError:
        if error.ename == "StudyError":
            return StudyError(error.evalue)
        lines = ANSI.sub("", "\n".join(error.traceback)).splitlines()
        tail = [f"    {line}" for line in lines if line.strip()][-8:]
        kept = f"  partly executed copy: {relative(self.working)}"
        return StudyError("\n".join([f"{self._place()} raised {error.ename}", *tail, kept]))


def _kernel_manager(run: _Run) -> type:
    """A kernel manager class that starts this very interpreter and tells ``run`` its pid."""
    from jupyter_client.manager import AsyncKernelManager

    class Manager(AsyncKernelManager):
        def __init__(self, **options):
            # Where the kernel can, its messages are encrypted; otherwise it warns at each start.
            super().__init__(transport_encryption="auto", **options)

        def format_kernel_cmd(self, extra_arguments=None):
            # A python3 kernel installed in the user's folder may name another environment.
            return [sys.executable, *super().format_kernel_cmd(extra_arguments)[1:]]

        async def start_kernel(self, **options):
            await super().start_kernel(**options)
            run.kernel = self.provisioner.pid

    return Manager


def _kill(kernel: int, signum: int) -> None:
    """Signal the kernel's process group (it leads its own session); a dead one is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(kernel, signum)


@contextlib.contextmanager
def _changed_environment(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _signals_to(handler) -> Iterator[None]:
    """SIGINT and SIGTERM go to ``handler``; only the main thread may ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


# Dying in time

SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "ash", "fish"}
_guard: threading.Thread | None = None


def die_with_parent() -> None:
    """End this process when the program that asked for it is gone, even by ``kill -9``.

    DVC starts a stage as ``sh -c "..."``, and the shell outlives DVC: so ``sh -c`` is looked
    through, and each link of the chain is watched every half second. A broken link means SIGTERM,
    and five seconds later the hard end. An interactive shell is no supervisor: closing a terminal
    is left to the hang-up signal and to nohup. Calling it again does nothing.

    Linux could also send a signal at the parent's death, but it does so when the parent's *thread*
    ends, and a false alarm would cost hours of training. The kernel, whose parent thread is known,
    does use it (``follow_runner``).
    """
    global _guard
    if _guard is None:
        links = _parent_links()
        _guard = threading.Thread(target=_follow, args=(links,), daemon=True)
        _guard.start()


def _parent_links() -> list[tuple]:
    """Pairs (process, pid of its parent) from here up to the first parent that is no ``sh -c``."""
    import psutil

    links, child = [], psutil.Process()
    with contextlib.suppress(psutil.Error):
        while (parent := child.parent()) is not None:
            kind = _shell_kind(parent.name(), parent.cmdline()[1:])
            if kind == "interactive":
                break
            links.append((child, parent.pid))
            if kind != "command":
                break
            child = parent
    return links


def _shell_kind(name: str, arguments: list[str]) -> str:
    """``command`` for ``sh -c``, ``interactive`` for a bare shell, ``program`` for the rest."""
    if name in {"timeout", "time"}:
        return "command"
    if name.lstrip("-") not in SHELLS:
        return "program"
    if any(re.fullmatch(r"-[a-zA-Z]*c[a-zA-Z]*", a) for a in arguments):
        return "command"
    return "program" if any(not a.startswith("-") for a in arguments) else "interactive"


def _follow(links: list[tuple]) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        while all(child.ppid() == parent for child, parent in links):
            time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SECONDS)
    os._exit(128 + signal.SIGTERM)


def follow_runner() -> None:
    """In a kernel: die with the runner at once, also while compiled code holds the interpreter.

    ipykernel polls its parent from a Python thread, which is enough elsewhere, but neither runs
    during a long compiled call nor notices a runner that died while the kernel was starting.
    """
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_death_signal, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(os.environ["JPY_PARENT_PID"]):
        os._exit(1)


# Same bytes


def normalise(book):
    """An executed notebook without what differs between two runs, as a new notebook.

    Kept: sources, ids (the injected cell gets a fixed one), tags, stdout merged into one stream,
    displayed data. Dropped: all other metadata, stderr, widgets. Cells are counted from 1. Memory
    addresses become ``0x0``, random names in HTML are numbered, the repository's path is cut, and
    pictures are kept in 256 colours.
    """
    book, names, count = copy.deepcopy(book), {}, 0
    book.metadata = METADATA
    for cell in book.cells:
        _keep_tags(cell)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"
        if cell.cell_type == "code" and cell.source.strip():
            count += 1
            cell.execution_count = count
            cell.outputs = _merged(cell.outputs)
            for output in cell.outputs:
                _stabilise(output, count, names)
    return book


def _keep_tags(cell) -> None:
    """Drop all metadata of a cell but its tags."""
    tags = cell.metadata.get("tags", [])
    cell.metadata = {"tags": tags} if tags else {}


def _is_checked(cell) -> bool:
    return cell.source.startswith(CHECKED)


def _merged(outputs: list) -> list:
    """Outputs without stderr and widgets; neighbouring stdout chunks become one."""
    kept = []
    for output in outputs:
        if output.get("name") == "stderr" or WIDGET in output.get("data", {}):
            continue
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def _stabilise(output, count: int, names: dict[str, str]) -> None:
    """Fix the count and the text of one output, in place."""
    if output.output_type == "stream":
        output.text = _stable_text(output.text)
    if output.output_type == "execute_result":
        output.execution_count = count
    data = output.get("data", {})
    for mime in [mime for mime in data if mime.startswith("text/")]:
        data[mime] = _stable_text(data[mime])
    if "text/html" in data:
        data["text/html"] = _numbered_names(data["text/html"], names)


def _stable_text(text: str) -> str:
    return ADDRESS.sub("at 0x0", text).replace(f"{CODE}/", "").replace(str(CODE), ".")


def _numbered_names(html: str, names: dict[str, str]) -> str:
    """Random names replaced by numbers of the same form, in the order of their appearance."""

    def number(match: re.Match) -> str:
        name, n = match.group(), len(names) + 1
        fixed = f"T_{n:05x}" if name.startswith("T_") else f"00000000-0000-4000-8000-{n:012x}"
        return names.setdefault(name, fixed)

    return RANDOM_NAME.sub(number, html)


# Committed notebooks


def strip(path: Path) -> None:
    """Remove outputs, counts and stray metadata in place; cell ids and checked outputs stay.

    A clean file is not touched. Raises StudyError when the file is missing or no notebook.
    """
    path = Path(path)
    book = _read(path)
    book.metadata = METADATA
    for cell in book.cells:
        _keep_tags(cell)
        if cell.cell_type == "code":
            cell.outputs = _merged(cell.outputs) if _is_checked(cell) else []
            cell.execution_count = 1 if cell.outputs else None  # nbval wants one beside outputs
            for output in cell.outputs:
                _stabilise(output, 1, {})
    text = _dumps(book)
    if text != path.read_text(encoding="utf-8"):
        write_text(path, text)


def is_clean(path: Path) -> list[str]:
    """What is wrong with a committed notebook, one line each; empty when it is clean.

    Looks for outputs (where nbval compares, for none), counts, stray metadata, missing or repeated
    ids, cells over 15 lines, classes, functions over 3 lines, and a parameters cell that breaks its
    rules. Raises StudyError when the file is missing or no notebook.
    """
    path = Path(path)
    book = _read(path)
    raw = json.loads(path.read_text(encoding="utf-8"))
    found = [f"metadata: {key}" for key in sorted(set(book.metadata) - set(METADATA))]
    found += [
        f"metadata: {key} is not the fixed one; strip sets it"
        for key, value in METADATA.items()
        if book.metadata.get(key) != value
    ]
    for i, (cell, raw_cell) in enumerate(zip(book.cells, raw["cells"], strict=True), start=1):
        found += [f"cell {i}: {finding}" for finding in _cell_findings(cell)]
        if cell.id != raw_cell.get("id"):
            found.append(f"cell {i}: no id of its own")
    return found + _parameter_findings(book)


def _cell_findings(cell) -> list[str]:
    found = [f"metadata {key}" for key in sorted(set(cell.metadata) - {"tags"})]
    if cell.cell_type != "code":
        return found
    if cell.outputs and not _is_checked(cell):
        found.append("has outputs")
    if _is_checked(cell) and not cell.outputs:
        found.append("has no output to compare; run it in the profile smoke")
    if cell.execution_count is not None and not _is_checked(cell):
        found.append("has an execution count")
    n_lines = len(cell.source.splitlines())
    if n_lines > MAX_CELL_LINES:
        found.append(f"{n_lines} lines, at most {MAX_CELL_LINES}")
    return found + _definition_findings(cell.source)


def _definition_findings(source: str) -> list[str]:
    """Classes, and functions over three lines; lines of IPython's own syntax are passed over."""
    try:
        tree = ast.parse(re.sub(r"(?m)^(\s*)[%!?].*$", r"\1pass", source))
    except SyntaxError as error:
        return [f"does not parse: {error.msg}, line {error.lineno}"]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found.append(f"class {node.name}; classes belong in lib")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            n_lines = node.end_lineno - node.lineno + 1
            if n_lines > MAX_DEF_LINES:
                found.append(f"def {node.name} of {n_lines} lines, at most {MAX_DEF_LINES}")
    return found


def _parameter_findings(book) -> list[str]:
    cells = _tagged(book)
    if len(cells) != 1:
        return [f"{len(cells)} cells are tagged `parameters`, exactly one must be"]
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(cells[0].source).readline))
    except (tokenize.TokenError, SyntaxError):
        return []  # reported as a cell that does not parse
    return [
        f"parameters cell, line {token.start[0]}: `=` in a comment hides it from papermill"
        for token in tokens
        if token.type == tokenize.COMMENT and "=" in token.string
    ]
