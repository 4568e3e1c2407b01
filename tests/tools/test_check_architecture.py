"""Each rule is silent on allowed code and reports a planted violation."""

from __future__ import annotations

import pytest

import check_architecture
from check_architecture import Rule
from source_tree import Module

VENDOR = check_architecture.vendor_problems
SWAP = check_architecture.class_swap_problems
IMPORTS = check_architecture.import_problems
PURE = check_architecture.purity_problems
PRIVATE = check_architecture.private_problems

VIOLATIONS: list[tuple[Rule, str, str]] = [
    (VENDOR, "trainer/step.py", "x = torch.cuda.is_available()"),
    (VENDOR, "trainer/step.py", "import torch as t\nx = t.cuda.Stream"),
    (VENDOR, "trainer/step.py", "import torch.cuda"),
    (VENDOR, "trainer/step.py", "from torch import cuda"),
    (VENDOR, "trainer/step.py", "from torch.cuda.amp import GradScaler"),
    (VENDOR, "nn/convert.py", "x = torch.version.hip"),
    (VENDOR, "nn/convert.py", "from torch.version import hip"),
    (VENDOR, "nn/convert.py", "x = f(device).get_device_capability()"),
    (VENDOR, "backends/cuda.py", "import triton.language as tl"),
    (VENDOR, "backends/cuda.py", "def f():\n    import torch_npu"),
    (VENDOR, "trainer/step.py", "def f(stream: torch.cuda.Stream) -> None: ..."),
    (SWAP, "trainer/step.py", "module.__class__ = Other"),
    (IMPORTS, "trainer/step.py", "def f():\n    import json"),
    (IMPORTS, "trainer/step.py", "def f():\n    from deepseek_mp.nn import units"),
    (IMPORTS, "cli/app.py", "def f():\n    from deepseek_mp.nn import units"),
    (IMPORTS, "cli/app.py", "class A:\n    def f(self):\n        import torch"),
    (IMPORTS, "trainer/step.py", "def f():\n    import sklearn"),
    (IMPORTS, "workloads/data.py", "import sklearn"),
    (IMPORTS, "qat/preparation.py", "import torchao"),
    (
        IMPORTS,
        "qat/preparation.py",
        "def f():\n    from deepseek_mp.qat.modes import y",
    ),
    (IMPORTS, "trainer/step.py", "from transformers import AutoModel"),
    (IMPORTS, "trainer/step.py", "import rich"),
    (IMPORTS, "trainer/progress.py", "from typer import echo"),
    (PURE, "records/writer.py", "import numpy as np"),
    (PURE, "precision/plan.py", "from torch import Tensor"),
    (PURE, "errors.py", "import numpy"),
    (PRIVATE, "trainer/step.py", "from deepseek_mp.nn.unit import _apply"),
    (PRIVATE, "trainer/step.py", "from deepseek_mp.nn._unit import apply"),
]

ALLOWED: list[tuple[Rule, str, str]] = [
    (VENDOR, "backends/cuda.py", "x = torch.cuda.get_device_capability()"),
    (VENDOR, "trainer/step.py", "x = torch.accelerator.is_available()"),
    (VENDOR, "trainer/step.py", "x = torch.backends.cuda.matmul"),
    (VENDOR, "trainer/step.py", '"""Uses torch.cuda."""\n# torch.cuda\nx = "torch.cuda"'),
    (VENDOR, "backends/ascend.py", "def f():\n    import torch_npu"),
    (VENDOR, "ops/choose.py", "from deepseek_mp.ops import triton"),
    (SWAP, "nn/convert.py", "module.__class__ = Other"),
    (SWAP, "optim/takeover.py", "optimizer.__class__ = Other"),
    (SWAP, "trainer/step.py", "x = module.__class__"),
    (IMPORTS, "backends/cuda.py", "def f():\n    import pynvml"),
    (IMPORTS, "qat/observers.py", "import torchao"),
    (IMPORTS, "qat/preparation.py", "def f():\n    from deepseek_mp.qat.observers import FiniteRange"),
    (IMPORTS, "workloads/data.py", "def f():\n    from sklearn.datasets import load_digits"),
    (IMPORTS, "trainer/step.py", "import json\nimport torch\nfrom deepseek_mp.nn import units"),
    (IMPORTS, "trainer/step.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
    (IMPORTS, "trainer/progress.py", "from rich.progress import Progress"),
    (IMPORTS, "cli/app.py", "import rich, typer"),
    (PURE, "precision/stats.py", "import numpy as np\nimport math"),
    (PURE, "records/writer.py", "import json\nfrom deepseek_mp.errors import ConfigError"),
    (PRIVATE, "nn/convert.py", "from deepseek_mp.nn.unit import _apply"),
    (PRIVATE, "trainer/step.py", "from deepseek_mp import __version__\nfrom torch import _foreach_norm"),
]


def problems(rule: Rule, path: str, text: str) -> list[str]:
    return rule(Module(f"deepseek_mp/{path}", text))


@pytest.mark.parametrize(("rule", "path", "text"), VIOLATIONS)
def test_violation_is_reported_with_its_file(rule: Rule, path: str, text: str) -> None:
    found = problems(rule, path, text)
    assert found
    assert all(line.startswith(f"deepseek_mp/{path}:") for line in found)


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_allowed_code_is_left_alone(rule: Rule, path: str, text: str) -> None:
    assert problems(rule, path, text) == []


def test_every_rule_has_a_violation_here() -> None:
    assert {rule for rule, _, _ in VIOLATIONS} == set(check_architecture.RULES)


def test_source_problems_runs_every_rule() -> None:
    modules = [Module(f"deepseek_mp/{path}", text) for _, path, text in VIOLATIONS]
    found = check_architecture.source_problems(modules)
    assert len(found) >= len(VIOLATIONS)


def test_missing_test_is_named() -> None:
    modules = [Module("deepseek_mp/errors.py", ""), Module("deepseek_mp/nn/unit.py", "")]
    modules += [Module("deepseek_mp/nn/__init__.py", ""), Module("deepseek_mp/__main__.py", "")]
    present = ["tests/test_errors.py", "tests/nn/test_unit.py"]
    assert check_architecture.missing_tests(modules, present) == []
    assert check_architecture.missing_tests(modules, present[:1]) == [
        "deepseek_mp/nn/unit.py: no tests/nn/test_unit.py"
    ]


def test_effects_of_an_import_that_does_too_much() -> None:
    effects = check_architecture.effects_of("import pytest, torch; torch.accelerator.device_count()")
    assert effects.optional == ("pytest",)
    assert "torch.accelerator.device_count" in effects.touched


def test_effects_of_code_that_fails() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)'import nothing_of_that_name' failed.*ModuleNotFoundError"):
        check_architecture.effects_of("import nothing_of_that_name")
