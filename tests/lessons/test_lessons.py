"""The places that lessons/questions.md names exist."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line.split("|")[1:4] for line in (ROOT / "lessons/questions.md").read_text().splitlines()
        if re.match(r"\| [a-j] \|", line)]
PLACES = sorted({(file.strip(), name.strip().replace("\\", ""))
                 for *_, where in ROWS for part in where.split(";")
                 for file, names in [part.split(":")] for name in names.split(",")})


def definitions(tree, prefix=""):
    """Names of all functions, classes and constants of a module: "CLIP", "CLIP.forward", ..."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from definitions(node, f"{prefix}{node.name}.")
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


@pytest.mark.parametrize("file, name", PLACES)
def test_the_place_of_an_answer_exists(file, name):
    assert name in set(definitions(ast.parse((ROOT / file).read_text())))


def test_each_paper_has_ten_questions():
    assert [row[0].strip() for row in ROWS] == 5 * list("abcdefghij")
