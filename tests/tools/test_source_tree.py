from __future__ import annotations

import ast
from pathlib import Path

from source_tree import Module, imports, read_modules, type_only_imports, under


def test_names_folders_and_summary() -> None:
    module = Module("deepseek_mp/nn/convert.py", '"""One line.\n\nMore."""\nx = 1\n')
    assert (module.name, module.folder, module.inner_path) == (
        "deepseek_mp.nn.convert",
        "deepseek_mp/nn",
        "nn/convert.py",
    )
    assert (module.summary, module.lines) == ("One line.", 4)
    assert Module("deepseek_mp/nn/__init__.py", "").name == "deepseek_mp.nn"
    assert Module("deepseek_mp/nn/__init__.py", "").summary == ""


def test_read_modules_finds_nested_files_in_order(tmp_path: Path) -> None:
    for path in ("top/b.py", "top/a/c.py", "other/d.py", "top/readme.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    assert [module.path for module in read_modules("top", tmp_path)] == ["top/a/c.py", "top/b.py"]


def test_under_tells_a_file_from_a_folder() -> None:
    assert under("cli/app.py", ("cli/",))
    assert not under("client.py", ("cli/",))
    assert under("errors.py", ("errors.py",))
    assert not under("errors.py.old/x.py", ("errors.py",))


def test_imports_gives_every_absolute_name() -> None:
    tree = ast.parse("import a.b as c\nfrom d.e import f, g\ndef h():\n    import i\nfrom . import j\n")
    assert sorted(name for _, name in imports(tree)) == ["a.b", "d.e.f", "d.e.g", "i"]


def test_type_only_imports() -> None:
    tree = ast.parse("import a\nif typing.TYPE_CHECKING:\n    import b\nif x:\n    import c\n")
    assert [ast.unparse(node) for node in type_only_imports(tree)] == ["import b"]


def test_a_problem_starts_with_its_place() -> None:
    module = Module("deepseek_mp/x.py", "\n\nimport os\n")
    assert module.at(module.tree.body[0], "wrong") == "deepseek_mp/x.py:3: wrong"
