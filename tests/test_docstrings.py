"""Names in the documentation exist, and doctests pass."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import ov3fast
from ov3fast import ops, testing

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [*sorted((ROOT / "ov3fast").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]
WITH_DOCTESTS = [path for path in SOURCES if ">>> " in path.read_text(encoding="utf-8")]


def module_of(path):
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


@pytest.mark.parametrize("path", WITH_DOCTESTS, ids=lambda path: path.stem)
def test_doctests(path):
    tried = doctest.testmod(module_of(path), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert tried.attempted and not tried.failed


@pytest.mark.parametrize(
    "path", [path for path in (*PAGES, *SOURCES) if path.exists()], ids=lambda path: str(path.relative_to(ROOT))
)
def test_named_operators_and_helpers_exist(path):
    """ops.NAME and testing.NAME, anywhere in prose or code; ops.NAME may also be a file in that folder."""
    text = path.read_text(encoding="utf-8")
    files = {module.name for module in pkgutil.iter_modules(ops.__path__)}
    for owner, name in set(re.findall(r"(?<![\w.])(?:ov3fast\.)?(ops|testing)\.(\w+)", text)):
        module = {"ops": ops, "testing": testing}[owner]
        a_file = name in ("md", "py", "html") or (module is ops and name in files)
        assert a_file or hasattr(module, name), f"{path}: {owner}.{name} does not exist"


def test_public_names_exist():
    for name in ov3fast.__all__:
        assert hasattr(ov3fast, name), name
