"""Every public name says what it is; a function with several parameters says what each of them is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "medsam_lora"
# Typer shows the help of each option; a second list of them would only go stale.
OPTIONS_DESCRIBED_BY_HELP = PACKAGE / "commands"

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# Up to this many parameters, each with its type in the signature, a summary line can say enough.
FEW = 4
SEE_ANOTHER = re.compile(r"\b(see|as) `", re.IGNORECASE)


def public(path: Path) -> Iterator[tuple[str, Documented]]:
    """The module and the public classes, functions and methods in it; what stands inside a function is private."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    yield path.stem, module
    yield from public_in(module, "")


def public_in(owner: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Documented]]:
    for node in owner.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_in(node, f"{prefix}{node.name}.")


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    taken = function.args
    named = [a for a in (*taken.posonlyargs, *taken.args, taken.vararg, *taken.kwonlyargs, taken.kwarg) if a]
    return [a for a in named if a.arg not in ("self", "cls")]


def section(doc: str, title: str) -> str | None:
    """A numpydoc section's text, None where the docstring has none of this title."""
    lines = [line.rstrip() for line in doc.splitlines()]
    for i, line in enumerate(lines[:-1]):
        if line == title and lines[i + 1] == "-" * len(title):
            rest = lines[i + 2 :]
            end = next((j for j in range(1, len(rest)) if rest[j] and set(rest[j]) == {"-"}), len(rest) + 1)
            return "\n".join(rest[: end - 1])
    return None


def complaints(path: Path) -> list[str]:
    found = []
    for name, node in public(path):
        doc = ast.get_docstring(node)
        if not doc:
            # What a torch module does is said by its class; `forward` is the call of it.
            if not name.endswith(".forward"):
                found.append(f"{name}: no docstring")
            continue
        if not doc.splitlines()[0].strip():
            found.append(f"{name}: no summary line")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and path.parent != OPTIONS_DESCRIBED_BY_HELP:
            found += [f"{name}: {text}" for text in parameter_complaints([a.arg for a in arguments(node)], doc)]
            if untyped := [a.arg for a in arguments(node) if a.annotation is None]:
                found.append(f"{name}: no type of {', '.join(untyped)}")
    return found


def parameter_complaints(names: list[str], doc: str) -> Iterator[str]:
    described = section(doc, "Parameters")
    if described is None:
        if len(names) > FEW and not SEE_ANOTHER.search(doc):
            yield f"{len(names)} parameters and no section Parameters"
        return
    heads = [line.partition(":")[0] for line in described.splitlines() if line and not line.startswith(" ")]
    listed = [name.strip().lstrip("*") for head in heads for name in head.split(",")]
    if strange := [name for name in listed if name not in names]:
        yield f"describes {', '.join(strange)}, which it does not take"
    if absent := [name for name in names if name not in listed]:
        yield f"does not describe {', '.join(absent)}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_public_name_is_described(path: Path) -> None:
    assert complaints(path) == []


GOOD = '''
"""A module."""
def near(a: int, b: int, c: int, d: int):
    """The one near the other."""
def _private(a, b, c): ...
class Thing:
    """A thing."""
    def act(self, x: int, y: int, *, z: int):
        """Do it.

        Parameters
        ----------
        x, y : int
        z : int
            Depth.

        Returns
        -------
        int
        """
'''


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("", "", None),
        ('"""A module."""', "", "m: no docstring"),
        ('"""A thing."""', "pass", "Thing: no docstring"),
        ('"""The one near the other."""', "...", "near: no docstring"),
        ("d: int", "d: int, e: int", "near: 5 parameters and no section Parameters"),
        ("d: int", "d", "near: no type of d"),
        ("x, y : int", "x : int", "Thing.act: does not describe y"),
        ("x, y : int", "x, y, w : int", "Thing.act: describes w, which it does not take"),
        ("y: int, *, z: int", "y: int, *, z: int, **w: int", "Thing.act: does not describe w"),
    ],
)
def test_the_check_sees_what_is_missing(old: str, new: str, complaint: str | None, tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(GOOD.replace(old, new) if old else GOOD)
    assert complaints(path) == ([] if complaint is None else [complaint])
