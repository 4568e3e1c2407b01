"""Devices that say yes and then disappoint: BF16 without units, a vendor's package without its driver, FP16 on a CPU.

The letters and numbers in the names are those of the project's list of faults. Tests with `theirs` in the
name run the same fault through plain PyTorch. The devices are not here: PyTorch answers as it would with them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer, PrecisionPlan, backends
from deepseek_mp.errors import FormatError
from deepseek_mp.nn import apply, assign
from deepseek_mp.ops.dtypes import torch_dtype


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 8, generator=generator), torch.randint(0, 3, (6,), generator=generator)


def found(device):
    """The answer of `capabilities` without its memory, which would outlive the device that is played here."""
    return backends.backend_for(device).capabilities(torch.device(device))


def on(monkeypatch, device):
    """Trainers and plans take the CPU they run on for that device."""
    monkeypatch.setattr(backends, "capabilities", lambda where: device)
    monkeypatch.setattr(assign, "device_capabilities", lambda where: device)


def refused(plan, match, **options):
    """`apply` and the trainer both refuse, and the model is as it was."""
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = {
        "apply": lambda: apply(model, plan, **options),
        "trainer": lambda: MixedPrecisionTrainer(model, plan, device="cpu", **options),
    }
    for call in calls.values():
        with pytest.raises(FormatError, match=match):
            call()
        assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def runs_and_says_so(format):
    """Emulation that was agreed to: the layers run in the format, and every decision says how."""
    trainer = MixedPrecisionTrainer(net(), format, device="cpu", emulate=True)
    seen = []
    for layer in (trainer.model[0], trainer.model[2]):
        layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    assert trainer.step(batch()).status == "applied"
    assert set(seen) == {torch_dtype(format)}
    decisions = {d.layer: (d.new, str(d.reason)) for d in trainer.plan.decisions}
    assert decisions == dict.fromkeys("02", (format, "emulated"))


def tried_by_auto(**options):
    """The plan of `auto`, its decision for the whole model, and all that its evidence says was tried."""
    trainer = MixedPrecisionTrainer(net(), "auto", device="cpu", **options)
    assert trainer.step(batch()).status == "applied"
    whole = next(decision for decision in trainer.plan.decisions if decision.layer == "")
    return trainer.plan, whole, " ".join(map(str, [*whole.evidence, *whole.evidence.values()]))


# ----------------------------------------------------------------- H01 BF16 that is only emulated


@contextmanager
def with_t4(monkeypatch):
    """A machine with a T4, where PyTorch computes BF16 without units for it and calls that supported."""
    t4 = SimpleNamespace(major=7, minor=5, name="Tesla T4")
    with monkeypatch.context() as machine:
        machine.setattr(torch.version, "hip", None)
        machine.setattr(torch.version, "cuda", "12.8")
        machine.setattr(torch.cuda, "is_available", lambda: True)
        machine.setattr(torch.cuda, "current_device", lambda: 0)
        machine.setattr(torch.cuda, "get_device_properties", lambda device=None: t4)
        machine.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
        yield


@pytest.fixture
def t4(monkeypatch):
    """What is found on that machine; it is gone again when the test trains, on the CPU in its place."""
    with with_t4(monkeypatch):
        device = found("cuda:0")
    on(monkeypatch, device)
    return device


def test_h01_theirs_says_yes(monkeypatch):
    with with_t4(monkeypatch):
        assert torch.cuda.is_bf16_supported()
        assert not torch.cuda.is_bf16_supported(including_emulation=False)


@pytest.mark.parametrize(
    "plan", ["bf16", PrecisionPlan.of("fp16", {"2": "bf16"}), PrecisionPlan.of("fp32", {"0": "bf16"})]
)
@pytest.mark.usefixtures("t4")
def test_h01_bf16_is_refused_and_the_nearest_format_named(plan):
    refused(plan, r"Tesla T4 \(sm_75\) does not multiply bf16\. .*Use 'fp16', the nearest it has, or pass emulate=True")


def test_h01_the_format_named_is_taken(t4):
    trainer = MixedPrecisionTrainer(net(), t4.nearest("bf16"), device="cpu")
    assert trainer.step(batch()).scale > 1.0
    assert "emulated" not in {str(decision.reason) for decision in trainer.plan.decisions}


@pytest.mark.usefixtures("t4")
def test_h01_bf16_that_was_agreed_to_is_recorded_as_emulated():
    runs_and_says_so("bf16")


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.usefixtures("t4")
def test_h01_auto_does_not_try_bf16(emulate):
    plan, _, tried = tried_by_auto(emulate=emulate)
    assert "fp16" in tried
    assert "bf16" not in tried
    assert "bf16" not in plan.formats


# --------------------------------------------- H02 a vendor's package whose libraries are missing

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
BROKEN = "import sys\nsys.tries = getattr(sys, 'tries', 0) + 1\nraise {error}\n"
MISSING = [
    "ImportError('libascend_hal.so: cannot open shared object file')",
    "OSError('libhccl.so: cannot open shared object file')",
    "RuntimeError('CANN is not installed')",
]
TRAINS = """
import json, sys, warnings
import torch
from torch import nn
warnings.simplefilter("error")
import deepseek_mp
from deepseek_mp import MixedPrecisionTrainer, backends
tries = lambda: getattr(sys, "tries", 0)
after_import = tries()
x, target = torch.ones(4, 8), torch.tensor([0, 1, 2, 0])
trainer = MixedPrecisionTrainer(nn.Linear(8, 3), "fp32", device="cpu")
said = {"status": trainer.step((x, target)).status, "tries": [after_import, tries()]}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    said["default"] = str(backends.default_device())
    try:
        MixedPrecisionTrainer(nn.Linear(8, 3), "fp32", device="npu")
    except deepseek_mp.MixedPrecisionError as error:
        said["refused"] = f"{type(error).__name__}: {error}"
said["warnings"] = [str(w.message) for w in caught if "torch_npu" in str(w.message)]
said["tries"].append(tries())
print(json.dumps(said))
"""


@pytest.fixture
def with_torch_npu(tmp_path):
    """Runs a script where torch_npu is installed, with its entry point that PyTorch loads, and its import fails."""

    def run(script, error, autoload):
        (tmp_path / "torch_npu.py").write_text(BROKEN.format(error=error))
        info = tmp_path / "torch_npu-2.9.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.9.0\n")
        (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
        path = os.pathsep.join(filter(None, [str(tmp_path), *sys.path]))
        env = {**os.environ, "PYTHONPATH": path, AUTOLOAD: autoload, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize("error", MISSING)
def test_h02_a_package_without_its_libraries_changes_nothing_on_a_cpu(error, with_torch_npu):
    # With autoloading on, `import torch` fails before any line of ours could run: the test after this one.
    done = with_torch_npu(TRAINS, error, autoload="0")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["status"] == "applied"
    assert said["tries"] == [0, 0, 1]  # asked for by neither the import nor a CPU, and only once by what needs it
    assert said["default"] != "npu"
    assert said["refused"].startswith("ConfigError: ")
    assert "npu" in said["refused"]
    assert len(said["warnings"]) == 1
    assert "Ascend devices are ignored" in said["warnings"][0]
    assert error.split("'")[1] in said["warnings"][0]


def test_h02_theirs_pytorch_itself_does_not_import(with_torch_npu):
    done = with_torch_npu("import torch", MISSING[0], autoload="1")
    assert done.returncode != 0
    assert "Failed to load the backend extension: torch_npu" in done.stderr
    assert AUTOLOAD in done.stderr  # PyTorch names the way out


# ------------------------------------------------------------- H04 FP16 on a CPU without units

PLAIN = {"avx2": {"avx2": True}, "avx512_bf16": {"avx2": True, "avx512_f": True, "avx512_bf16": True}}
NEAREST = {"avx2": "fp32", "avx512_bf16": "bf16"}


@pytest.fixture(params=PLAIN)
def plain_cpu(request, monkeypatch):
    """The nearest format of an x86 CPU without FP16 units, of which oneDNN claims, as it may, that it has them."""
    flags = {"architecture": "x86_64", "cpu_name": "plain CPU", **PLAIN[request.param]}
    onednn = SimpleNamespace(
        _is_mkldnn_bf16_supported=lambda: request.param != "avx2", _is_mkldnn_fp16_supported=lambda: True
    )
    with monkeypatch.context() as machine:
        machine.setattr(torch.cpu, "get_capabilities", lambda: flags)
        machine.setattr(torch.ops, "mkldnn", onednn)
        device = found("cpu")
    on(monkeypatch, device)
    return NEAREST[request.param]


def test_h04_theirs_runs_fp16_without_a_word():
    layer, (x, _) = net()[0], batch()
    with warnings.catch_warnings(), torch.autocast("cpu", torch.float16):
        warnings.simplefilter("error")
        assert layer(x).dtype == torch.float16


@pytest.mark.parametrize("plan", ["fp16", PrecisionPlan.of("fp32", {"2": "fp16"})])
def test_h04_fp16_is_refused_and_what_to_use_said(plan, plain_cpu):
    refused(
        plan,
        rf"plain CPU \(x86_\w+\) does not multiply fp16\. .*Use '{plain_cpu}', the nearest it has, "
        "or pass emulate=True to run it slowly",
    )


@pytest.mark.usefixtures("plain_cpu")
def test_h04_fp16_that_was_agreed_to_is_recorded_as_emulated():
    runs_and_says_so("fp16")


@pytest.mark.parametrize("emulate", [False, True])
def test_h04_auto_does_not_try_fp16(emulate, plain_cpu):
    plan, whole, tried = tried_by_auto(emulate=emulate)
    assert plain_cpu in tried
    assert "fp16" not in tried.replace("bf16", "")
    assert "fp16" not in plan.formats
    if plain_cpu == "fp32":
        assert (str(whole.reason), whole.new) == ("device_lacks", "fp32")
