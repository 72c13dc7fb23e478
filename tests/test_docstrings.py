"""How many public functions say what a reader needs: what they do, the shapes of their tensors, the errors they raise.

python -m tests.test_docstrings     # lists those that do not
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPE = re.compile(r"_[A-Z][A-Za-z0-9]*\b|\[[\w.…, ×*+/-]+\]|scalar|(any|each|same) shape")
ERRORS = re.compile(r"UserError|Raises|error", re.IGNORECASE)


class Public(NamedTuple):
    """A public function or method: where it stands, its text and its docstring."""

    where: str
    node: ast.FunctionDef
    doc: str


def functions() -> Iterator[Public]:
    """All public functions of the code, and the methods of its public classes."""
    for area in ("train", "launch"):
        for path in sorted((REPOSITORY / area).rglob("*.py")):
            tree = ast.parse(path.read_text())
            scopes = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]
            for node in (node for scope in scopes for node in scope.body):
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    where = f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}"
                    yield Public(where, node, ast.get_docstring(node) or "")


def takes_tensors(function: Public) -> bool:
    """Whether an argument or the result is a tensor."""
    arguments = function.node.args
    kinds = [a.annotation for a in (*arguments.args, *arguments.kwonlyargs, arguments.vararg) if a]
    texts = (re.sub(r"Callable\[.*\]", "", ast.unparse(kind)) for kind in (*kinds, function.node.returns) if kind)
    return any(re.search(r"\bTensor\b", text) for text in texts)


def raises(function: Public) -> bool:
    """Whether it raises an error for a user's mistake itself."""
    return any(
        isinstance(node, ast.Raise) and node.exc and "UserError" in ast.unparse(node.exc)
        for node in ast.walk(function.node)
    )


def names_shapes(function: Public) -> bool:
    names = " ".join(a.arg for a in (*function.node.args.args, *function.node.args.kwonlyargs))
    return bool(SHAPE.search(f"{names} {function.doc}"))


MEASURES = {
    "has a docstring": (lambda _: True, lambda function: bool(function.doc)),
    "names the shapes of its tensors": (takes_tensors, names_shapes),
    "names the error for a user's mistake": (raises, lambda function: bool(ERRORS.search(function.doc))),
}


def lacking(measure: str) -> tuple[list[str], int]:
    """Where a measure does not hold, and of how many functions it could."""
    concerns, holds = MEASURES[measure]
    concerned = [function for function in functions() if concerns(function)]
    return [function.where for function in concerned if not holds(function)], len(concerned)


@pytest.mark.parametrize("measure", MEASURES)
def test_at_least_95_percent_of_public_functions(measure):
    without, count = lacking(measure)
    assert len(without) <= 0.05 * count, "\n".join(without)


if __name__ == "__main__":
    for name in MEASURES:
        left, of = lacking(name)
        print(f"{name}: {of - len(left)} of {of}", *left, sep="\n    ")
