"""The benchmarks: tables, ratios, and every subject once at its smallest size. Nothing is timed."""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import time
import types

import numpy as np
import pytest
import torch

from benchmarks import (
    SUBJECTS,
    __main__,
    allocator,
    background,
    budget,
    devices,
    energy,
    frechet,
    gpu,
    harness,
    judge,
    neighbours,
    rounded,
    startup,
    training,
    viewer,
    voxeliser,
)
from benchmarks.harness import Case

ROW = Case(
    "a", ours=0.02, plain=0.5, difference=1e-8, tolerance=1e-6, memory=(3.0, None), note="n = 5"
)


def test_table_has_one_line_a_case_with_its_ratio():
    header, rule, row, empty = harness.table([ROW, Case("b", note="skipped")]).splitlines()
    assert header == "| case | ours | plain | ratio | equal within | memory |"
    assert rule.count("|") == header.count("|") == row.count("|") == empty.count("|")
    assert row == "| a (n = 5) | 20 ms | 0.5 s | 25.00 | 1.0e-08 (<= 1e-06) | 3 / ? MiB |"
    assert empty == "| b (skipped) |  |  |  |  |  |"


def test_growth_is_the_exponent_of_a_group():
    cases = [Case("", ours=n**2, plain=7 * n, group="rows", size=n) for n in (2, 4, 8)]
    assert harness.table(cases).splitlines()[-1] == (
        "Growth: time ~ (rows)^p, p = 2.00 ours, 1.00 plain."
    )
    assert "Growth" not in harness.table(cases[:1])
    assert "memory," not in harness.table([*cases, dataclasses.replace(cases[0], memory=(1, None))])
    held = [dataclasses.replace(c, memory=(c.size**3, c.size)) for c in cases]
    assert harness.table(held).splitlines()[-1] == (
        "Growth: time ~ (rows)^p, p = 2.00 ours, 1.00 plain; memory, p = 3.00 ours, 1.00 plain."
    )


def test_compare_alternates_and_keeps_the_values_of_the_first_pair():
    calls = []
    timing = harness.compare(
        lambda: calls.append("ours") or len(calls), lambda: calls.append("plain"), repeats=3
    )
    assert calls == ["ours", "plain"] * 4
    assert timing.values == (1, None)
    assert timing.pairs == 3 and timing.ours >= 0 and timing.plain >= 0


def test_compare_measures_slow_calls_once():
    calls = []
    timing = harness.compare(
        lambda: calls.append(1), lambda: calls.append(1), patience=0.0, clock=time.perf_counter
    )
    assert len(calls) == 2 and timing.pairs == 1


@pytest.mark.parametrize(
    ("difference", "agrees"), [(0.0, True), (0.1, True), (0.2, False), (math.nan, False)]
)
def test_values_agree_within_the_tolerance_only(difference, agrees):
    assert Case("", difference=difference, tolerance=0.1).agrees is agrees


def test_relative_difference_refuses_other_shapes():
    assert harness.relative([1.0, 4.0], [2.0, 4.0]) == 0.25
    assert harness.relative([1.0], [1.0, 1.0]) == math.inf


def test_peak_is_what_a_call_takes(tmp_path, monkeypatch):
    source = "def holding(n):\n    held = bytes([1]) * n\n    return lambda: held + held\n"
    (tmp_path / "measured.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peak = harness.peak("measured", "holding", 32 * 2**20)
    assert peak is None or 63 < peak < 66  # the result counts, what was held before does not


SMALLEST = {
    "judge": lambda: judge.case("smoke", 2, 2, "float32", "channels_last", 1, memory=False),
    "judge in bfloat16": lambda: judge.case("smoke", 2, 2, "bfloat16", "contiguous", 2, False),
    "training": lambda: training.case(24, 8, memory=False),
    "climb": lambda: energy.climb_case(8, 2, memory=False),
    "critic": lambda: energy.update_case(8, 2, memory=False),
    "critic, plain in bfloat16": lambda: energy.update_case(8, 2, "bfloat16", memory=False),
    "wander": lambda: energy.wander_case(8, 2, memory=False),
    "descend": lambda: energy.descend_case(8, 2, memory=False),
    "allocator": lambda: allocator.case("steps", energy.wander(8, 2, False)),
    "rounded": lambda: rounded.case(4, 4, 2),
    "by transforms": lambda: rounded.transformed_case(8, 2),
    "sqrtm": lambda: frechet.case(frechet.square_root, 20, 32, memory=False),
    "eigenvalues": lambda: frechet.case(frechet.eigenvalues, 40, 32, memory=False),
    "neighbours": lambda: neighbours.case(16, memory=False),
    "chair": lambda: voxeliser.case("chair", 8),
    "sphere": lambda: voxeliser.case("sphere", 8),
    "viewer": lambda: viewer.case("chair", 1),
    "startup": lambda: startup.case("nothing", ("-c", "pass"), ("-c", "pass"), 2),
    "background": lambda: background.case(24, 8, 2),
}


@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_size_gives_equal_values_and_a_ratio(name):
    case = SMALLEST[name]()
    assert case.checked and case.agrees, case
    assert case.ratio > 0 and math.isfinite(case.ratio)


def warmed(step):
    """Where there is no GPU to capture on: a capture takes some steps, then there is the step."""
    for _ in range(gpu.WARM):
        step()
    return step


def test_ways_of_the_gpu_take_the_same_steps(monkeypatch):
    """On the CPU, traced but not compiled, with the step itself in place of its graph."""
    monkeypatch.setattr(gpu, "captured", warmed)
    monkeypatch.setattr(gpu, "COMPILER", "eager")
    monkeypatch.setattr(energy, "CLIMB", 4)
    cpu = torch.device("cpu")
    found = [*gpu.climb_cases(8, 2, cpu, "batch", n_bytes=2**16), gpu.adam_case(8, cpu)]
    assert len(found) == 2 + len(gpu.WAYS)
    for case in found:
        assert case.checked and case.agrees and case.ratio > 0, case
    assert all("memory alone" in case.note for case in found[:-1])


def test_steps_in_place_are_those_of_the_sampler():
    winn = dataclasses.replace(energy.section("winn3d", 8), dtype="float32")
    network = energy.critic(energy.winn3d.Critic, 8, winn.layout)
    start = energy.noise(8, 2)
    ascent = gpu.Ascent(network.requires_grad_(False), start, winn)
    for n in (3, 5):
        ascent.restart()
        for _ in range(n):
            ascent.step()
        never = torch.full((2,), math.inf)
        found = energy.train_winn3d.climb(winn, network, start, never, stop="never", max_steps=n)
        assert not torch.equal(ascent.y, start)
        torch.testing.assert_close(ascent.y, found[0], rtol=0, atol=1e-4)


def test_a_capture_warms_up_on_a_stream_of_its_own(monkeypatch):
    """The calls that a GPU would get, in their order."""
    said = []
    stream = types.SimpleNamespace(wait_stream=lambda other: said.append("wait"))

    @contextlib.contextmanager
    def inside(name):
        said.append(name)
        yield
        said.append("end")

    graph = types.SimpleNamespace(replay=lambda: said.append("replay"))
    calls = {"Stream": lambda: stream, "current_stream": lambda: stream}
    calls |= {"stream": lambda s: inside("side"), "graph": lambda g: inside("capture")}
    for name, call in (calls | {"CUDAGraph": lambda: graph}).items():
        monkeypatch.setattr(torch.cuda, name, call)
    gpu.captured(lambda: said.append("step"))()
    warm = ["wait", "side", *["step"] * gpu.WARM, "end", "wait"]
    assert said == [*warm, "capture", "step", "end", "replay"]


def test_bytes_of_a_step_by_hand():
    """Two blocks of one channel and two at 2^3 in float32, two shapes."""
    winn = dataclasses.replace(energy.section("winn3d", 8), channels=(1, 2), dtype="float32")
    first, second = (2 + 5) * 8 + 2 * 8, (2 + 10) * 8 + 4 * 1
    weights = 27 * 1 + 27 * 2 + 2
    assert gpu.bytes_moved(winn, 2, 2) == 4 * (2 * (first + second) + 2 * weights + 7 * 2 * 8)


def test_without_a_gpu_one_line_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = harness.table(gpu.cases(False)).splitlines()[-1]
    said = "3DWINN's sampler on a GPU (not run: torch sees no CUDA device)"
    assert line == f"| {said} |  |  |  |  |  |"


def test_with_a_gpu_its_memory_is_asked(monkeypatch):
    held = iter((2**20, 3 * 2**20))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(held))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    built = []
    assert gpu.peak(lambda n: lambda: built.append(n), 7) == 2 and built == [7]


def test_subjects_have_cases_and_a_title():
    for name in SUBJECTS:
        subject = importlib.import_module(f"benchmarks.{name}")
        assert callable(subject.cases) and subject.__doc__.splitlines()[0]


def test_clipping_knows_contact_from_none():
    triangle = np.array([[0.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
    touched = {(0, 0, 0): True, (0, 0, 1): True, (1, 1, 0): True, (0, 0, 2): False}
    touched |= {(2, 0, 0): True, (2, 1, 0): False}
    assert {cell: voxeliser.touches(triangle, cell) for cell in touched} == touched
    cells = np.array([(0, 0, 0), (0, 0, 2)])
    assert voxeliser.unconfirmed(cells, triangle[None]) == 1


def test_enclosed_volume_counts_the_voxels():
    grid = np.zeros((4, 4, 4), dtype=bool)
    grid[0, 0, 0] = grid[1, 1:3, 2] = True
    assert viewer.enclosed(viewer.ours(grid)) == pytest.approx(3, abs=1e-12)
    assert viewer.enclosed(viewer.plain(grid)) < 3


def test_budget_reads_the_seconds_of_quick_and_the_newest_status(tmp_path):
    text = "# Seconds allotted on 2 cores: data 20, judge 100, each 3D-GAN run 60, report 9.\n"
    assert budget.allotted(text) == {"judge": 100.0, "gan3d": 60.0}
    assert budget.allotted("name: quick") == {}
    quick = budget.allotted((budget.paths.PARAMS / "quick.yaml").read_text())
    assert set(quick) == set(budget.WORDS)
    for age, seconds in ((2, 1.0), (1, 2.0)):
        status = tmp_path / f"run-{age}" / "status.json"
        budget.files.write_json(status, {"step": 5, "n_steps": 5, "seconds": seconds})
        os.utime(status, (1e9 - age, 1e9 - age))
    assert budget.latest_status("other", tmp_path) is None
    newest = budget.latest_status("run", tmp_path)
    assert budget.case("run", 60.0, newest).ratio == 30
    assert math.isnan(budget.case("run", 60.0, newest | {"step": 4}).ratio)
    assert "has not run" in budget.case("run", 60.0, None).note


def test_stale_pipeline_is_skipped_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    case = startup.pipeline()
    assert math.isnan(case.ours) and "skipped" in case.note and "DVC" in case.note


def test_command_prints_and_writes_only_where_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(budget, "cases", lambda full: [ROW])
    assert __main__.main(["--only", "budget"]) == 0
    printed = capsys.readouterr().out
    assert "threads used, torch" in printed and "| a (n = 5) | 20 ms |" in printed
    path = tmp_path / "new" / "table.md"
    assert __main__.main(["--only", "budget", "--out", str(path)]) == 0
    assert "| a (n = 5) | 20 ms |" in path.read_text()


def test_command_fails_in_one_line_where_values_disagree(capsys, monkeypatch):
    wrong = Case("b", 1.0, 1.0, difference=0.5, tolerance=0.1)
    monkeypatch.setattr(budget, "cases", lambda full: [ROW, wrong])
    assert __main__.main(["--only", "budget"]) == 1
    assert capsys.readouterr().err == "error: values disagree in budget: b\n"


def test_a_share_of_the_devices_benchmark_measures_its_steps(capsys, monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    devices.main("beyond", "smoke", "1")
    found = json.loads(capsys.readouterr().out.split("RESULT")[1])
    assert found["seconds"] > 0 and len(found["logged"]) == 3
    monkeypatch.setattr(devices, "measured", lambda n, *given: found | {"seconds": 2 / n})
    case = devices.case("beyond", "smoke", 1)
    assert case.ratio == 2 and case.agrees
