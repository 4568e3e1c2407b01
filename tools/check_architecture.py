"""The rules of the architecture that import-linter cannot say, each a function over source files.

import-linter (pyproject.toml) keeps the layers. Here is what remains: where vendor names may
appear, where third-party packages are imported and how, who may change a module's class, and that
every module has its test. A rule returns its violations as lines of text; docstrings, comments and
strings never count.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from source_tree import PACKAGE, ROOT, Module, imports, read_modules, type_only_imports, under

Rule = Callable[[Module], list[str]]
"""A rule takes a module and returns its violations."""

DEVICE_CODE = ("backends/", "ops/triton/", "ops/native/")
VENDOR_NAMES = {
    "torch.cuda": DEVICE_CODE,
    "torch.version.hip": DEVICE_CODE,
    "get_device_capability": DEVICE_CODE,
    "triton": ("ops/triton/",),
    "torch_npu": ("backends/ascend.py", "ops/native/npu.py"),
}
"""Names of one vendor's interface, and the only places they may appear in."""
VENDOR_METHODS = frozenset({"get_device_capability"})
"""Vendor names that are recognised whatever they are called on."""

REQUIRED = frozenset({"torch", "numpy", "safetensors", "rich", "typer"})
"""The dependencies that are always installed; every other third-party package is optional."""

OPTIONAL_HOMES = (
    "backends/", "ops/choose.py", "ops/triton/", "optim/", "qat/", "inference/", "programs/", "integrations/", "cli/",
    "workloads/",
)  # fmt: skip
"""Where optional packages may be imported; inside a function, so that they stay optional."""

NEEDS_OPTIONAL = (
    f"{PACKAGE}.ops.triton.",
    f"{PACKAGE}.qat.observers",
    f"{PACKAGE}.qat.scheme",
    "torch._inductor.codegen.triton",
)
"""Modules that cannot be imported without an optional package, or import it, and ask for a device, where it is."""

IMPORT_HOMES = {"rich": ("cli/", "trainer/progress.py"), "typer": ("cli/",)}
"""Where the packages that only talk to a terminal are imported."""

PURE = {
    "errors.py": frozenset[str](),
    "version.py": frozenset[str](),
    "records/": frozenset[str](),
    "precision/": frozenset({"numpy"}),
    "report/": frozenset[str](),
    "optim/offload/schedule.py": frozenset[str](),
}
"""Parts that need the standard library alone, with what they may use besides."""

CONVERTER = ("nn/convert.py", "optim/takeover.py")
"""The places that change a class: of a module of the user's, and of an optimizer."""
WITHOUT_TEST = ("__init__.py", "__main__.py", "_kernel.py")
"""Ends of the names of files without a test of their own: they hold names and a call, which the tests
of others use, or a kernel, which is tested through the function that launches it."""


def is_third_party(root: str) -> bool:
    """Whether a top-level package is neither ours nor Python's."""
    return root != PACKAGE and root not in sys.stdlib_module_names


def vendor_problems(module: Module) -> list[str]:
    """Vendor names outside their homes."""
    used = imports(module.tree) + attributes(module.tree)
    return [
        module.at(node, f"{vendor} is used outside {', '.join(homes)}")
        for vendor, homes in VENDOR_NAMES.items()
        if not under(module.inner_path, homes)
        for node, name in used
        if names_vendor(name, vendor)
    ]


def names_vendor(name: str, vendor: str) -> bool:
    """Whether a dotted name is the vendor's or lies in it."""
    if vendor in VENDOR_METHODS:
        return name.rpartition(".")[2] == vendor
    return name == vendor or name.startswith(f"{vendor}.")


def attributes(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """Every `a.b.c` of the code, and every bare name, with import aliases of modules undone.

    What is not rooted in a name (`f(x).b`) is found as `?.b`.
    """
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    aliases = {alias.asname: alias.name for node in statements for alias in node.names if alias.asname}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return [
        (node, dotted(node, aliases))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name) and id(node) not in inner
    ]


def dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """The dotted name that an expression spells."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def class_swap_problems(module: Module) -> list[str]:
    """Assignments to `__class__` outside the one place that converts modules."""
    if under(module.inner_path, CONVERTER):
        return []
    return [
        module.at(node, f"__class__ is assigned outside {', '.join(CONVERTER)}")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and node.attr == "__class__" and isinstance(node.ctx, ast.Store)
    ]


def late_imports(tree: ast.AST) -> set[ast.AST]:
    """The import statements inside functions."""
    return {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }


def import_problems(module: Module) -> list[str]:
    """Imports in the wrong file or at the wrong level."""
    late, type_only = late_imports(module.tree), type_only_imports(module.tree)
    problems = []
    for node, name in imports(module.tree):
        root = name.partition(".")[0]
        optional = is_third_party(root) and root not in REQUIRED
        if node in late and not optional and not name.startswith(NEEDS_OPTIONAL):
            problems.append(module.at(node, f"{name} is imported inside a function; only optional packages may be"))
        if optional and node not in type_only:
            problems += optional_problems(module, node, root, late=node in late)
        if root in IMPORT_HOMES and not under(module.inner_path, IMPORT_HOMES[root]):
            problems.append(module.at(node, f"{root} is imported outside {', '.join(IMPORT_HOMES[root])}"))
    return problems


def optional_problems(module: Module, node: ast.AST, root: str, *, late: bool) -> list[str]:
    """What is wrong with importing the optional package `root` here."""
    if not under(module.inner_path, OPTIONAL_HOMES):
        return [module.at(node, f"optional package {root} is imported outside {', '.join(OPTIONAL_HOMES)}")]
    if not late and not module.name.startswith(NEEDS_OPTIONAL):
        return [module.at(node, f"optional package {root} is imported at module level; import it inside a function")]
    return []


def purity_problems(module: Module) -> list[str]:
    """Third-party imports in the parts that are kept free of them."""
    return [
        module.at(node, f"{name} is imported in {part}, which may use the standard library and {sorted(extra)}")
        for part, extra in PURE.items()
        if under(module.inner_path, (part,))
        for node, name in imports(module.tree)
        if is_third_party(name.partition(".")[0]) and name.partition(".")[0] not in extra
    ]


def private_problems(module: Module) -> list[str]:
    """Names with an underscore that are imported from another folder of the package."""
    own = module.folder.replace("/", ".")
    return [
        module.at(node, f"{name} is private to its folder")
        for node, name in imports(module.tree)
        if name.startswith(f"{PACKAGE}.") and not name.startswith(f"{own}.")
        if any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
    ]


def missing_tests(modules: Iterable[Module], tests: Iterable[str]) -> list[str]:
    """Modules without a test file at the mirrored path: `a/b.py` needs `tests/a/test_b.py`."""
    present = set(tests)
    return [
        f"{module.path}: no {expected}"
        for module in modules
        if not module.path.endswith(WITHOUT_TEST)
        if (expected := test_path(module)) not in present
    ]


def test_path(module: Module) -> str:
    """Where the test of a module is looked for."""
    inner = PurePosixPath(module.inner_path)
    return str(PurePosixPath("tests") / inner.parent / f"test_{inner.name}")


PROBE = """
import json, sys, torch, torch._dynamo

touched = []

def watch(owner, name):
    real = getattr(owner, name, None)
    def watched(*args, **kwargs):
        touched.append(f"{owner.__name__}.{name}")
        return real(*args, **kwargs)
    if real is not None:
        setattr(owner, name, watched)

for owner in (torch.accelerator, torch.cuda, torch.xpu, torch.mps):
    for name in ("_lazy_init", "is_available", "device_count", "current_accelerator", "get_device_properties"):
        watch(owner, name)
before = set(sys.modules)
exec(sys.argv[1])
roots = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"touched": touched, "roots": roots, "initialised": torch.cuda.is_initialized()}))
"""


@dataclass(frozen=True)
class Effects:
    """What running some code did to a fresh process that had only imported torch and its compiler's front end, which
    imports Triton where that is installed.
    """

    touched: tuple[str, ...]
    """Device functions of torch that were called."""
    optional: tuple[str, ...]
    """Packages it imported that a plain installation need not have, and typer."""
    initialised: bool
    """Whether a device context exists."""


def effects_of(code: str) -> Effects:
    """Run `code` in a fresh process and report its effects."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE, code], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )
    if run.returncode:
        raise RuntimeError(f"{code!r} failed in a fresh process:\n{run.stderr}")
    seen = json.loads(run.stdout.splitlines()[-1])
    return Effects(
        touched=tuple(seen["touched"]),
        optional=tuple(root for root in seen["roots"] if root in OPTIONAL_PACKAGES),
        initialised=seen["initialised"],
    )


OPTIONAL_PACKAGES = frozenset({
    "sklearn", "pynvml", "typer", "torch_npu", "triton", "transformers", "lightning", "tensorboard", "torchao", "onnx",
    "onnxruntime", "torchvision", "accelerate", "pytest", "hypothesis",
})  # fmt: skip
"""Packages that `import deepseek_mp` must not import: extras, vendors' own, and the command line's."""


RULES: tuple[Rule, ...] = (vendor_problems, class_swap_problems, import_problems, purity_problems, private_problems)


def source_problems(modules: Sequence[Module]) -> list[str]:
    """Every violation of the rules that are read off the source."""
    return [problem for module in modules for rule in RULES for problem in rule(module)]


def main() -> int:
    """Print the violations of the source rules; 1 if there are any."""
    problems = source_problems(read_modules())
    print("\n".join(problems) or "The architecture's rules are kept.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
