"""The notebook runner: refusals, same bytes, clear failures, and processes that end in time."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lib import config, runner
from lib.errors import StudyError
from lib.paths import CODE, NOTEBOOKS
from lib.runner import execute, is_clean, parameter_names, strip

PARAMETERS = "seed: int = 0  # one per run\ncategory: str = 'chair'  # of ten\n"


def code(source, name, **extra):
    cell = {"cell_type": "code", "id": name, "metadata": {}, "source": source}
    return cell | {"outputs": [], "execution_count": None} | extra


def write_notebook(path, *sources, parameters=PARAMETERS):
    """A clean notebook: a parameters cell, then the given cells c0, c1, ..."""
    cells = [code(source, f"c{i}") for i, source in enumerate(sources)]
    first = code(parameters, "params", metadata={"tags": ["parameters"]})
    book = {"cells": [first, *cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(book))
    strip(path)
    return path


def outputs(path):
    return {cell["id"]: cell.get("outputs", []) for cell in json.loads(path.read_text())["cells"]}


@pytest.fixture(autouse=True)
def scratch(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "CHECKPOINTS", tmp_path / ".ckpt")


# Refusals, all before a kernel starts


@pytest.fixture
def no_kernel(monkeypatch):
    def started(run):
        raise AssertionError("papermill was started")

    monkeypatch.setattr(runner._Run, "papermill", started)


def test_unknown_parameters_are_refused_by_name(tmp_path, no_kernel):
    notebook = write_notebook(tmp_path / "a.ipynb")
    with pytest.raises(StudyError, match="no parameter sede; it has seed, category"):
        execute(notebook, tmp_path / "out.ipynb", {"sede": 1, "seed": 2})


@pytest.mark.parametrize(
    "parameters, said",
    [
        ({"seed": "one"}, "parameter seed must be int, not 'one'"),
        ({"seed": True}, "parameter seed must be int, not True"),
        ({"category": ["chair"]}, "parameter category must be str"),
    ],
)
def test_parameters_of_another_type_are_refused(tmp_path, no_kernel, parameters, said):
    notebook = write_notebook(tmp_path / "a.ipynb")
    with pytest.raises(StudyError, match=said):
        execute(notebook, tmp_path / "out.ipynb", parameters)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, no_kernel):
    notebook = write_notebook(tmp_path / "a.ipynb")
    for output in (tmp_path, notebook / "out.ipynb"):
        with pytest.raises(StudyError, match="cannot be written"):
            execute(notebook, output, {"seed": 1})


def test_refuses_missing_notebook_missing_cell_and_itself(tmp_path, no_kernel):
    with pytest.raises(StudyError, match="no such notebook"):
        execute(tmp_path / "none.ipynb", tmp_path / "out.ipynb", {})
    notebook = write_notebook(tmp_path / "a.ipynb")
    link = tmp_path / "link.ipynb"
    link.symlink_to(notebook)
    with pytest.raises(StudyError, match="the notebook itself"):
        execute(notebook, link, {})
    book = json.loads(notebook.read_text())
    book["cells"][0]["metadata"] = {}
    notebook.write_text(json.dumps(book))
    with pytest.raises(StudyError, match="0 cells are tagged `parameters`"):
        execute(notebook, tmp_path / "out.ipynb", {})
    notebook.write_text('{"nbformat": 3, "worksheets": []}')
    with pytest.raises(StudyError, match="not a readable notebook"):
        execute(notebook, tmp_path / "out.ipynb", {})


def test_parameter_names_survive_equals_signs_in_comments():
    source = "a: int = 1  # the paper's a = 2\nb = c = 'x = y'\nd: float\nimport os\ne.f = 3\n"
    assert parameter_names(source) == ["a", "b", "c"]


# Running

STABLE = (
    "import sys, time\n"
    "for i in range(3):\n"
    "    print('chunk', i, seed, flush=True)\n"
    "    print('early' if i == 0 else 'late', file=sys.stderr, flush=True)\n"
    "    time.sleep(0.3)",
    "from tqdm import tqdm\nfor _ in tqdm(range(3)): time.sleep(0.01)\nobject()",
    "import pandas as pd\ntable = pd.DataFrame({'a': [1.5, 2]})\ndisplay(table)\ntable.style",
    "import matplotlib.pyplot as plt\n_ = plt.plot([1, 3, 2])",
    "import os\nprint(os.environ['STUDY_TEST'], os.getcwd(), category)",
)


class TimedStream(io.StringIO):
    """Remembers when each text first arrived."""

    def __init__(self):
        super().__init__()
        self.times = {}

    def write(self, text):
        for word in text.split():
            self.times.setdefault(word, time.monotonic())
        return super().write(text)


def test_two_runs_give_the_same_bytes(tmp_path, monkeypatch):
    notebook = write_notebook(tmp_path / "a.ipynb", *STABLE)
    screen = TimedStream()
    monkeypatch.setattr(sys, "stderr", screen)
    first, second = tmp_path / "deep" / "first.ipynb", tmp_path / "second.ipynb"
    execute(notebook, first, {"seed": 7}, {"STUDY_TEST": "pinned"})
    shown = screen.getvalue()
    execute(notebook, second, {"seed": 7}, {"STUDY_TEST": "pinned"}, progress=False)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().endswith(b"}\n")

    got = outputs(first)
    stream = {"name": "stdout", "output_type": "stream"}
    assert got["c0"] == [stream | {"text": [f"chunk {i} 7\n" for i in range(3)]}]
    assert [o["data"]["text/plain"] for o in got["c1"]] == [["<object at 0x0>"]]
    assert "text/html" in got["c2"][0]["data"] and "T_00001" in str(got["c2"][1]["data"])
    assert "image/png" in got["c3"][0]["data"]
    assert got["c4"][0]["text"] == ["pinned . chair\n"]
    assert "STUDY_TEST" not in os.environ
    assert "papermill" not in first.read_text() and "it/s" not in first.read_text()

    assert "a: cell 6/6" in shown and "3/3" in shown
    assert screen.times["late"] - screen.times["early"] > 0.15  # live, not when the cell ended
    assert screen.getvalue() == shown  # progress=False is silent
    assert sorted(p.name for p in (tmp_path / ".ckpt" / "failed").iterdir()) == []


def test_a_failing_cell_is_named_and_the_copy_kept_elsewhere(tmp_path):
    notebook = write_notebook(tmp_path / "a.ipynb", "print('fine')", "x = 1\n1 / 0", "print(2)")
    output = tmp_path / "out.ipynb"
    output.write_text("older result")
    with pytest.raises(StudyError) as caught:
        execute(notebook, output, {"seed": 1}, progress=False)
    message = str(caught.value)
    assert "cell 3 of 4 raised ZeroDivisionError" in message
    assert "1 / 0" in message and "division by zero" in message and "\x1b" not in message
    assert len(message.splitlines()) <= 10
    assert output.read_text() == "older result"
    [kept] = (tmp_path / ".ckpt" / "failed").glob("*out.failed.ipynb")
    assert "fine" in kept.read_text() and kept.name in message


def test_a_study_error_inside_passes_on_its_message_alone(tmp_path):
    raising = "from lib.errors import StudyError\nraise StudyError('no shapes in here; fetch them')"
    notebook = write_notebook(tmp_path / "a.ipynb", raising)
    with pytest.raises(StudyError, match="^no shapes in here; fetch them$"):
        execute(notebook, tmp_path / "out.ipynb", {}, progress=False)


@pytest.mark.parametrize(
    "name, models",
    [
        ("12_train_vae3d", "vae3d or autoencoder"),
        ("13_train_vaegan3d", "encoder_decoder or vaegan3d"),
        ("16_train_classifiers", f"one of {', '.join(config.CLASSIFIERS)}"),
    ],
)
def test_a_training_notebook_refuses_a_model_of_another_at_its_start(tmp_path, name, models):
    notebook = NOTEBOOKS / f"{name}.ipynb"
    with pytest.raises(StudyError, match=f"^{name}: model must be {models}, not 'gan3d'$"):
        execute(notebook, tmp_path / "out.ipynb", {"model": "gan3d"}, progress=False)


def test_leaving_early_is_a_failure(tmp_path):
    notebook = write_notebook(tmp_path / "a.ipynb", "import sys\nsys.exit(0)", "print('late')")
    with pytest.raises(StudyError, match="ended before cell 3"):
        execute(notebook, tmp_path / "out.ipynb", {}, progress=False)
    assert not (tmp_path / "out.ipynb").exists()


# Ending in time

RUN = (
    "import sys; from pathlib import Path; from lib.runner import execute;"
    "execute(Path(sys.argv[1]), Path(sys.argv[2]), {}, progress=False)"
)
TELL_PIDS = """
import os, pathlib, time
here = pathlib.Path({folder!r})
(here / 'new').write_text(f"{{os.getppid()}} {{os.getpid()}}")
os.rename(here / 'new', here / 'pids')
"""
PATIENT = TELL_PIDS + "try: time.sleep(60)\nfinally: (here / 'saved').touch()"
# A compiled call that never gives the interpreter back: no Python thread can notice anything.
STUBBORN = TELL_PIDS + "import ctypes\nctypes.PyDLL(None).sleep(60)"
DEAF = TELL_PIDS + "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
# Orphans of this process come to itself instead of to process 1, as below systemd or a container.
REAPER = """
import ctypes, subprocess, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
parent = "import subprocess, sys; subprocess.run(['sh', '-c', sys.argv[1] + '; exit $?'])"
dummy = subprocess.Popen([sys.executable, "-c", parent, sys.argv[1]])
print(dummy.pid, flush=True)
sys.stdin.read()
"""


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def command(tmp_path, cell):
    """Arguments of a process that runs a notebook with the given cell in a scratch workspace."""
    source = cell.format(folder=str(tmp_path))
    notebook = write_notebook(tmp_path / "a.ipynb", source, "print('never')")
    return [sys.executable, "-c", RUN, str(notebook), str(tmp_path / "out.ipynb")]


def pids(tmp_path):
    """The pids of runner and kernel, once the cell runs."""
    wait_until((tmp_path / "pids").exists, 30)
    return [int(word) for word in (tmp_path / "pids").read_text().split()]


@pytest.fixture
def start(tmp_path):
    """Popen in the repository root; whatever the test leaves behind is killed."""
    started = []

    def popen(arguments, **options):
        environment = os.environ | {"STUDY_WORKSPACE": str(tmp_path)}
        process = subprocess.Popen(arguments, cwd=CODE, env=environment, text=True, **options)
        started.append(process.pid)
        return process

    yield popen
    if (tmp_path / "pids").exists():
        started += pids(tmp_path)
    for pid in started:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("victim", ["parent", "runner"])
def test_kill_9_leaves_nothing_running(tmp_path, start, victim):
    line = shlex.join(command(tmp_path, PATIENT if victim == "parent" else STUBBORN))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with start([sys.executable, "-c", REAPER, line], **pipes) as reaper:
        parent = int(reaper.stdout.readline())
        runner_pid, kernel_pid = pids(tmp_path)
        shell = psutil.Process(runner_pid).ppid()
        assert psutil.Process(shell).ppid() == parent  # a shell stands between them
        os.kill(parent if victim == "parent" else runner_pid, signal.SIGKILL)
        wait_until(lambda: gone(runner_pid) and gone(kernel_pid), 12)
        assert (tmp_path / "saved").exists() == (victim == "parent")
        assert not (tmp_path / "out.ipynb").exists()
        reaper.kill()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_let_the_kernel_save_and_end_in_failure(tmp_path, start, signum):
    process = start(command(tmp_path, PATIENT), stderr=subprocess.PIPE)
    _, kernel_pid = pids(tmp_path)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=15)
    assert process.returncode == 128 + signum
    assert (tmp_path / "saved").exists() and gone(kernel_pid)
    assert "Traceback" not in stderr
    assert not (tmp_path / "out.ipynb").exists()


def test_a_second_signal_kills_a_kernel_that_does_not_listen(tmp_path, start):
    process = start(command(tmp_path, DEAF), stderr=subprocess.PIPE)
    _, kernel_pid = pids(tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert not gone(kernel_pid)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=15)
    assert process.returncode == 130 and gone(kernel_pid)


@pytest.mark.parametrize(
    ("name", "arguments", "kind"),
    [
        ("sh", ["-c", "python x"], "command"),
        ("bash", ["--noprofile", "--norc", "-c", "python x"], "command"),
        ("bash", ["job.sh"], "program"),
        ("-bash", [], "interactive"),
        ("zsh", ["-i"], "interactive"),
        ("dvc", ["repro", "-c"], "program"),
    ],
)
def test_shells_are_told_apart(name, arguments, kind):
    assert runner._shell_kind(name, arguments) == kind


# Committed notebooks


def test_strip_cleans_in_place_and_keeps_ids(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", "1 + 1")
    clean = path.read_bytes()
    assert is_clean(path) == []
    book = json.loads(clean)
    result = {"output_type": "execute_result", "data": {}, "metadata": {}, "execution_count": 3}
    book["cells"][1] |= {"outputs": [result], "execution_count": 3, "metadata": {"scrolled": True}}
    book["metadata"] |= {"widgets": {}}
    path.write_text(json.dumps(book))
    assert is_clean(path) == [
        "metadata: widgets",
        "cell 2: metadata scrolled",
        "cell 2: has outputs",
        "cell 2: has an execution count",
    ]
    strip(path)
    assert path.read_bytes() == clean
    before = path.stat()
    strip(path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino


def test_outputs_that_nbval_compares_stay(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", "# NBVAL_CHECK_OUTPUT\n1 + 1", "2 + 2")
    missing = "cell 2: has no output to compare; run it in the profile smoke"
    assert is_clean(path) == [missing]
    book = json.loads(path.read_text())
    result = {"output_type": "execute_result", "metadata": {}, "execution_count": 3}
    result["data"] = {"text/plain": ["2"]}
    for cell in book["cells"][1:]:
        cell |= {"outputs": [result], "execution_count": 3}
    path.write_text(json.dumps(book))
    strip(path)
    assert is_clean(path) == []
    checked, other = json.loads(path.read_text())["cells"][1:]
    assert checked["outputs"] == [result | {"execution_count": 1}]
    assert checked["execution_count"] == 1
    assert other["outputs"] == [] and other["execution_count"] is None


def test_is_clean_finds_what_the_house_style_forbids(tmp_path):
    short = "%matplotlib inline\ndef f(x):\n    y = x\n    return y"
    long = "def g(x):\n    y = x\n    z = y\n    return z"
    path = write_notebook(
        tmp_path / "a.ipynb", short, long, "class A:\n    pass", "x = 1\n" * 16, "x = (",
        parameters="seed = 0  # the paper has seed = 1\n",
    )  # fmt: skip
    assert is_clean(path) == [
        "cell 3: def g of 4 lines, at most 3",
        "cell 4: class A; classes belong in lib",
        "cell 5: 16 lines, at most 15",
        "cell 6: does not parse: '(' was never closed, line 1",
        "parameters cell, line 1: `=` in a comment hides it from papermill",
    ]
    book = json.loads(path.read_text())
    book["cells"] = [code("x = 1", "same"), code("x = 2", "same"), code("x = 3", "none")]
    del book["cells"][2]["id"]
    path.write_text(json.dumps(book))
    assert is_clean(path) == [
        "cell 2: no id of its own",
        "cell 3: no id of its own",
        "0 cells are tagged `parameters`, exactly one must be",
    ]


def test_random_names_are_numbered_consistently():
    names = {}
    page = '<div id="4f0c3b1e-9a57-4c1d-8b2e-0a1b2c3d4e5f"> T_12ab3_row0 T_12ab3 4f0c3b1e'
    fixed = runner._numbered_names(page, names)
    uuid = "00000000-0000-4000-8000-000000000001"
    assert fixed == f'<div id="{uuid}"> T_00002_row0 T_00002 4f0c3b1e'
    assert runner._numbered_names("T_12ab3_x", names) == "T_00002_x"  # as in an earlier cell


def test_memory_addresses_and_the_repository_path_are_cut():
    text = f"<A object at 0x7f12ab> {CODE}/results/x.csv 0x10"
    assert runner._stable_text(text) == "<A object at 0x0> results/x.csv 0x10"
