"""Do the tests reject wrong code, and accept right code that is written in another way?

    python tests/benchmarks/variants.py wrong [TEXT]      the mistakes of variants.txt, each alone
    python tests/benchmarks/variants.py right [TEXT]      the files of tests/alternatives

A mistake must fail an assertion in the class of its definition; an alternative must pass all tests
of mechanisms. Each is tried in a copy of the project. TEXT: only those whose description has it.
"""
import argparse
import ast
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import numpy, PIL.Image, pytest, sentencepiece, torch, torch._dynamo, tqdm    # noqa: E401, F401

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.dont_write_bytecode = True


def wrong_variants():
    """(file, definition, what is wrong, code, wrong code) for each paragraph of variants.txt."""
    file = None
    for paragraph in Path(__file__).with_suffix(".txt").read_text().split("\n\n")[1:]:
        first, *lines = paragraph.strip("\n").split("\n")
        if first.startswith("# "):
            file = first[2:]
            continue
        old = "\n".join(line[2:] for line in lines if line[0] == "-")
        new = "\n".join(line[2:] for line in lines if line[0] == "+")
        yield file, *first.split(": ", 1), old, new


def find(body, name):
    return next(node for node in body if getattr(node, "name", None) == name)


def put_wrong(root, file, name, what, old, new):
    """Write the wrong code into a copy of the project."""
    source = (root / file).read_text()
    lines, node = source.splitlines(keepends=True), find(ast.parse(source).body, name)
    begin = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno - 1
    body = "".join(lines[begin:node.end_lineno])
    assert old in body, f"{file}: {name}: {what}: not found: {old}"
    lines[begin:node.end_lineno] = [body.replace(old, new)]
    (root / file).write_text("".join(lines))


def put_right(root, alternative):
    """Write the functions and methods of an alternative over those of the file it names."""
    tree, text = ast.parse(alternative.read_text()), alternative.read_text().splitlines()
    file = root / ast.get_docstring(tree).split(":")[0]
    parts = [node for node in tree.body[1:] if not isinstance(node, ast.ClassDef)]
    parts += [(node.name, method) for node in tree.body if isinstance(node, ast.ClassDef)
              for method in node.body]
    for part in parts:
        lines = file.read_text().splitlines()
        body, last = ast.parse("\n".join(lines)).body, len(lines)
        owner, part = part if isinstance(part, tuple) else (None, part)
        if owner:
            body, last = find(body, owner).body, find(body, owner).end_lineno
        first = min([part.lineno] + [d.lineno for d in getattr(part, "decorator_list", [])]) - 1
        new = text[first:part.end_lineno]
        if isinstance(part, (ast.Import, ast.ImportFrom)):
            begin = end = body[1].lineno - 1                          # after the docstring
        elif any(getattr(node, "name", None) == part.name for node in body):
            old = find(body, part.name)
            begin = min([old.lineno] + [d.lineno for d in old.decorator_list]) - 1
            end = old.end_lineno
        else:
            begin = end = last
        lines[begin:end] = new
        file.write_text("\n".join(lines) + "\n")


class Judge:
    """A pytest plugin that notes how tests fail, and ends at the first assertion if asked to."""

    def __init__(self, stop):
        self.stop, self.failed, self.asserted = stop, [], False

    def pytest_runtest_makereport(self, item, call):
        if call.excinfo and call.excinfo.typename != "Skipped":
            self.failed.append(f"{item.nodeid}: {call.excinfo.exconly()[:300]}")
            self.asserted |= call.excinfo.typename in ("AssertionError", "Failed")
            if self.asserted and self.stop:
                item.session.shouldstop = "seen"


def judge(case):
    """(description, verdict, what failed) of one variant, tried in a copy."""
    description, put, arguments, nodes, stop = case
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("clip.py", "flamingo.py", "blip.py", "blip2.py", "llava.py",
                     "train.py", "pytest.ini"):
            shutil.copy(ROOT / name, root)
        for name in ("common", "tests"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        put(root, *arguments)
        os.chdir(root)
        sys.path.remove(str(ROOT))
        for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "common")]:
            del sys.modules[name]
        plugin, out = Judge(stop), os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1), os.dup2(out, 2)
        status = pytest.main(["-q", "-p", "no:cacheprovider", *nodes], plugins=[plugin])
        os.chdir("/")
    verdict = "passed" if status == 0 else "assertion" if plugin.asserted else "error"
    return description, verdict, plugin.failed or [f"pytest ended with {status}"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("wrong", "right"))
    parser.add_argument("text", nargs="?", default="")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    from tests.test_layout import MODELS, node_of
    if options.kind == "wrong":
        want = "assertion"
        cases = [(f"{file}: {name}: {what}", put_wrong, (file, name, what, old, new),
                  [node_of(file, name)], True) for file, name, what, old, new in wrong_variants()
                 if options.text in f"{file}: {name}: {what}"]
    else:
        want, nodes = "passed", [f"tests/{folder}" for folder in ("common", *MODELS)]
        cases = [(path.stem, put_right, (path,), nodes, False)
                 for path in sorted((ROOT / "tests/alternatives").glob("*.py"))
                 if options.text in path.stem]
    bad = 0
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        for description, verdict, failed in tqdm.tqdm(pool.imap(judge, cases), total=len(cases)):
            if verdict != want:
                bad += 1
                tqdm.tqdm.write("\n    ".join([f"{verdict}: {description}", *failed]))
    print(f"{len(cases) - bad} of {len(cases)}: {want}")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
