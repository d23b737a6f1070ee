"""Device policy: what STUDY_DEVICE may change, what it may not, and what a run records."""

import platform
import subprocess
import sys

import pytest
import torch

from lib import config, device, losses
from lib.errors import StudyError
from lib.train import checkpoint

FREE, FIXED = (config.Device(threads=2, deterministic=d) for d in (False, True))


@pytest.fixture
def choose(monkeypatch):
    return lambda text: monkeypatch.setenv("STUDY_DEVICE", text)


def test_nothing_is_overridden_unless_asked(monkeypatch):
    monkeypatch.delenv("STUDY_DEVICE", raising=False)
    assert device.overridden(FREE) == device.overridden(FIXED) == {}
    assert device.environment(FREE)["OMP_NUM_THREADS"] == "2"


FAULTS = """
import resource, sys
import numpy
from lib import config, device, losses

if sys.argv[1] == "kept":
    device.apply_environment(config.Device(threads=1, deterministic=False))
for step in range(20):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.ones(10_000_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is glibc's to keep")
@pytest.mark.parametrize("how", ["kept", "given back", "as the user says"])
def test_freed_memory_is_kept(how, monkeypatch):
    """80 MB are some 20,000 pages, or 40 huge ones; glibc itself keeps blocks below 32 MiB."""
    for name in device.KEPT_MEMORY:
        monkeypatch.delenv(name, raising=False)
    if how == "as the user says":
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "100000")
    command = [sys.executable, "-c", FAULTS, "given back" if how == "given back" else "kept"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (float(done.stdout) < 5) == (how == "kept")


def test_overriding(choose):
    choose("where=cpu threads=5  fused=true")
    assert device.overridden(FREE) == {"where": "cpu", "threads": 5, "fused": True}
    assert device.environment(FREE)["OMP_NUM_THREADS"] == "5"
    assert device.pick(FREE) == torch.device("cpu")
    assert device.fused(FREE, torch.device("cpu"))
    choose("fused=false")
    assert not device.fused(FREE, torch.device("cuda"))


@pytest.mark.parametrize("text", ["gpu", "threads=0", "threads=x", "where=tpu", "fused=1"])
def test_what_is_not_understood_is_refused(choose, text):
    choose(text)
    with pytest.raises(StudyError, match="STUDY_DEVICE: .* is not understood") as error:
        device.overridden(FREE)
    assert "\n" not in str(error.value)


def test_profiles_whose_bytes_repeat_are_not_overridden(choose):
    choose("threads=4")
    for call in (device.pick, device.environment):
        with pytest.raises(StudyError, match="smoke and quick are computed in one way only"):
            call(FIXED)


def test_a_gpu_that_is_not_there(choose, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choose("where=cuda")
    with pytest.raises(StudyError, match="torch sees no GPU here"):
        device.pick(FREE)


def test_the_policy_of_every_model_is_recorded(monkeypatch):
    monkeypatch.delenv("STUDY_DEVICE", raising=False)
    lite = config.load("lite")
    for model in config.LAYOUTS:
        found = device.policy(lite, model, torch.device("cpu"))
        assert found["dtype"] == getattr(lite, model).dtype and found["where"] == "cpu"
        assert found["layout"] == getattr(lite, model).layout and found["fused"] is False
        assert found["threads"] == torch.get_num_threads()
    assert device.policy(lite, "winn3d", torch.device("cuda"))["fused"] is True


def steps(n, fused, state=None):
    """An Adam after n steps on one fixed problem, from a saved state or from the start."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 50))
    adam = torch.optim.Adam([parameter], 0.1)
    if state:
        parameter.data.copy_(state[0])
        adam.load_state_dict(state[1])
    device.fuse(adam, fused)
    for _ in range(n):
        adam.zero_grad()
        (parameter - torch.arange(50.0)).square().sum().backward()
        adam.step()
    return parameter.detach().clone(), adam.state_dict()


@pytest.mark.parametrize("first, second", [(True, True), (False, True), (True, False)])
def test_fused_steps_are_the_same_steps(first, second):
    """Also when a run goes on where the kernel is another one."""
    plain = steps(8, fused=False)[0]
    torch.testing.assert_close(steps(5, second, steps(3, first))[0], plain)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_moments_lie_in_memory_as_their_parameter_after_a_resume(tmp_path, make):
    """A checkpoint holds tensors in standard order; the fused kernel walks through memory."""

    def go_on(n, fused, resumed=None):
        torch.manual_seed(0)
        layer = torch.nn.Conv3d(2, 3, 3).to(memory_format=torch.channels_last_3d)
        options = {"momentum": 0.9} if make is torch.optim.SGD else {}
        optimizer = make(layer.parameters(), 0.05, **options)
        if resumed:
            state = checkpoint.load(resumed)
            layer.load_state_dict(state["layer"])
            optimizer.load_state_dict(state["optimizer"])
        device.fuse(optimizer, fused)
        x = torch.randn(4, 2, 5, 5, 5, generator=torch.Generator().manual_seed(1))
        for _ in range(n):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
        return layer, optimizer

    plain = go_on(6, False)[0].state_dict()
    layer, optimizer = go_on(3, True)
    state = {"layer": layer.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(tmp_path / "state.safetensors", state)
    found = go_on(3, True, tmp_path / "state.safetensors")[0].state_dict()
    torch.testing.assert_close(found, plain)


def test_an_optimizer_without_counted_steps_can_be_fused():
    parameter = torch.nn.Parameter(torch.ones(3))
    sgd = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    device.fuse(sgd, True)
    parameter.sum().backward()
    sgd.step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.9))


PRODUCTS = {
    "3D": (lambda: torch.nn.Conv3d(3, 4, 3, padding=1), (2, 3, 5, 5, 5)),
    "2D, strided": (lambda: torch.nn.Conv2d(3, 4, 5, stride=2), (2, 3, 9, 9)),
    "transposed": (lambda: torch.nn.ConvTranspose3d(3, 4, 4, stride=2, padding=1), (2, 3, 4, 4, 4)),
    "linear": (lambda: torch.nn.Linear(30, 4), (2, 30)),
}


def gradients(layer, x, context):
    """Values, gradients, and a second derivative, as the gradient penalty takes one."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with context:
        y = layer(x)
    (by_x,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    by_x.float().square().sum().backward()
    return y, by_x, x.grad, *(p.grad for p in layer.parameters())


@pytest.mark.parametrize("name", PRODUCTS)
def test_rounded_operands_are_bfloat16_and_not_float32(name, monkeypatch):
    """Against torch's own bfloat16, in value, first and second derivative."""
    build, shape = PRODUCTS[name]
    torch.manual_seed(0)
    layer, x, cpu = build(), torch.randn(shape), torch.device("cpu")
    found = {}
    for native in (True, False):
        monkeypatch.setattr(device, "has_bfloat16", lambda native=native: native)
        assert device.rounds(cpu, "bfloat16") is not native
        found[native] = gradients(layer, x, device.autocast(cpu, "bfloat16"))
    for rounded, own in zip(found[False], found[True], strict=True):
        assert rounded.dtype == own.dtype
        scale = own.float().abs().max()
        assert (rounded - own).abs().max() < 0.02 * scale
    assert found[False][0].dtype == torch.bfloat16
    with torch.no_grad():
        with device.autocast(cpu, "float32"):
            single = layer(x)
        # Products of rounded operands, summed far more exactly, then rounded.
        closed = layer.bfloat16().double()(x.bfloat16().double()).bfloat16()
    assert (found[False][0] == closed).float().mean() > 0.95
    assert single.dtype == torch.float32
    assert not torch.equal(found[False][0].float(), single)


def test_networks_cast_to_bfloat16_are_rounded_too(monkeypatch):
    monkeypatch.setattr(device, "has_bfloat16", lambda: False)
    layer, x = torch.nn.Linear(30, 4).bfloat16(), torch.randn(2, 30).bfloat16()
    own = layer(x)
    with device.arithmetic(torch.device("cpu"), "bfloat16"):
        rounded = layer(x)
    assert rounded.dtype == own.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, own, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("where, dtype", [("cuda", "bfloat16"), ("cpu", "float32")])
def test_nothing_is_rounded_on_other_devices_and_in_float32(monkeypatch, where, dtype):
    monkeypatch.setattr(device, "has_bfloat16", lambda: False)
    assert not device.rounds(torch.device(where), dtype)


@pytest.mark.parametrize("amx", [True, False])
def test_with_amx_gradients_of_gradients_are_computed_in_float32(monkeypatch, amx):
    """Since bfloat16 is wrong there; the values themselves stay in bfloat16 on either."""
    monkeypatch.setattr(device, "has_amx", lambda: amx)
    monkeypatch.setattr(device, "has_bfloat16", lambda: True)
    layer, seen = torch.nn.Conv3d(1, 2, 3), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    a, b, u = torch.rand(2, 1, 4, 4, 4), torch.rand(2, 1, 4, 4, 4), torch.rand(2)
    with device.autocast(torch.device("cpu"), "bfloat16"):
        losses.gradient_penalty(layer, a, b, u).backward()
        layer(a)
    assert seen == [torch.float32 if amx else torch.bfloat16, torch.bfloat16]


def test_a_run_records_the_kind_of_its_cpu(monkeypatch):
    monkeypatch.setattr(device, "cpu_name", lambda: "A CPU")
    for amx, words in ((True, "A CPU, AMX, "), (False, "A CPU, ")):
        monkeypatch.setattr(device, "has_amx", lambda amx=amx: amx)
        assert device.describe(torch.device("cpu")) == f"{words}{torch.get_num_threads()} threads"
