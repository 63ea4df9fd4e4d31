"""The modules of ov3fast.data have no import cycles."""

import ast
from pathlib import Path

import ov3fast.data

FOLDER = Path(ov3fast.data.__file__).parent


def imports(path: Path) -> set[str]:
    """Names of the sibling modules that a file imports anywhere."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ov3fast.data":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ov3fast.data."):
            found.add(node.module.split(".")[2])
    return found


def test_there_is_no_circle():
    left = {path.stem: imports(path) for path in FOLDER.glob("*.py") if path.stem != "__init__"}
    assert left["limits"] == left["captions"] == left["hash_rng"] == left["skips"] == set()
    while left:
        leaves = {name for name, needed in left.items() if not needed & left.keys()}
        assert leaves, f"these import each other: {left}"
        left = {name: needed for name, needed in left.items() if name not in leaves}
