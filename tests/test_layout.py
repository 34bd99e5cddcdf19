"""The tests as a student needs them: each definition has its class, each file stands alone."""
import ast
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODELS = [name for name in ("clip", "flamingo", "blip", "blip2", "llava")
          if (ROOT / f"{name}.py").exists()]
READ = [f"{name}.py" for name in MODELS] + sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "common").glob("[!_]*.py"))
TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py")
               if not {"parity", "benchmarks", "alternatives"} & set(path.parts))
MECHANISMS = [path for path in TESTS if path.parent.name in ("common", *MODELS)
              and path.stem != "__init__"]
ELSEWHERE = ("main", "data_sources", "from_pretrained")    # they read files: training/, pretrained/
LIBRARIES = {"torch", "numpy", "PIL", "pytest", *sys.stdlib_module_names}


@functools.cache
def tree_of(path):
    return ast.parse((ROOT / path).read_text())


def public(path):
    """The public functions and classes of a source file."""
    return [node.name for node in tree_of(path).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"]


def node_of(path, name):
    """`tests/common/test_masks.py::TestCausal`, the one class of a definition.

    A function that differs from a class by its capital alone has TestNameFunction.
    """
    stem, camel = Path(path).stem, "".join(p[0].upper() + p[1:] for p in name.split("_"))
    wanted = f"Test{camel}" + "Function" * (camel != name and camel in public(path))
    folder = Path(path).parent.name                  # of common/data/files.py: data
    files = [f"{stem}/test_*.py" if stem in MODELS else f"{folder}/test_{stem}.py"]
    if name in ELSEWHERE:
        files = [f"pretrained/test_{stem}.py", f"training/test_{stem}.py"]
    found = [f"{file.relative_to(ROOT)}::{wanted}"
             for pattern in files for file in sorted((ROOT / "tests").glob(pattern))
             for node in tree_of(file).body if getattr(node, "name", None) == wanted]
    assert len(found) == 1, f"{path}: {name} needs one class {wanted}, found {found}"
    return found[0]


@pytest.mark.parametrize("path, name", [(path, name) for path in READ for name in public(path)])
def test_each_public_definition_has_its_class(path, name):
    node_of(path, name)


def imports(tree):
    """The modules that a file imports, as "common.masks"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", MECHANISMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_mechanisms_tests_import_its_module_and_the_helpers_alone(path):
    folder = path.parent.name
    own = folder if folder in MODELS else f"common.{path.stem.removeprefix('test_')}"
    others = {name for name in imports(tree_of(path)) if name.split(".")[0] not in LIBRARIES}
    assert others <= {own, "tests.helpers", "common"}, "other imports"


def test_no_tests_import_other_tests():
    for path in TESTS:
        assert not [name for name in imports(tree_of(path)) if ".test_" in name], path


def calls_at_import(body):
    """Calls that run when a module is imported: also decorators, defaults and class bodies."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            now = [*node.decorator_list, *(node.args.defaults + [d for d in node.args.kw_defaults if d]
                                           if isinstance(node, ast.FunctionDef) else node.bases)]
            yield from calls_at_import(node.body if isinstance(node, ast.ClassDef) else [])
        else:
            now = [node]
        for part in now:
            yield from (call for call in ast.walk(part) if isinstance(call, ast.Call))


def root_of(function):
    """masks.causal -> "masks"."""
    while isinstance(function, (ast.Attribute, ast.Call, ast.Subscript)):
        function = getattr(function, "value", None) or function.func
    return getattr(function, "id", "")


@pytest.mark.parametrize("path", TESTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_of_the_project_is_called_at_import(path):
    """Else one function that is not written yet keeps a whole file from being collected."""
    tree = tree_of(path)
    ours = {alias.asname or alias.name.split(".")[0] for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names
            if (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
            not in LIBRARIES}
    ours |= {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
             and ours & {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}}
    found = [f"line {call.lineno}: {ast.unparse(call)[:60]}" for call in calls_at_import(tree.body)
             if root_of(call.func) in ours]
    assert not found


@pytest.mark.parametrize("path", MECHANISMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_comparisons_explain_themselves(path):
    """`assert_close(name, got, expected)` says what differs and where; these do not."""
    found = [f"line {node.lineno}: {code}" for node in ast.walk(tree_of(path))
             if isinstance(node, (ast.Assert, ast.Attribute))
             for code in [ast.unparse(node)] if code.endswith("testing.assert_close")
             or code.startswith(("assert torch.equal(", "assert torch.allclose(")) and not node.msg]
    assert not found
