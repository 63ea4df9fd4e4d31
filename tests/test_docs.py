"""The documentation builds without network, has no dead links, and lists what exists."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)([^)#\s]*)")


def tracked(*patterns: str) -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def doc_tables():
    spec = importlib.util.spec_from_file_location("doc_tables", ROOT / "tools" / "doc_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    blocked = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **blocked}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_site_builds_and_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=\"(?:https?:)?//[^\"]+", html), page
        assert not re.findall(r"<link[^>]+rel=\"(?:stylesheet|preconnect)\"[^>]+href=\"(?:https?:)?//[^\"]+", html), page


def test_operator_pages_carry_the_maths_and_the_signature(site):
    page = (site / "operators" / "layer_norm.html").read_text(encoding="utf-8")
    assert "biased variance" in page and "residual" in page


@pytest.mark.parametrize("page", tracked("*.md"), ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in filter(None, LINK.findall(text)):
        assert (page.parent / target).exists(), f"{page}: {target}"


def test_tables_are_those_of_the_results():
    tables = doc_tables()
    assert any("<!-- table:" in page.read_text(encoding="utf-8") for page in tables.pages())
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        assert tables.render(text) == text, f"{page}: run python tools/doc_tables.py"


def test_every_operator_has_a_page():
    index = (DOCS / "operators" / "index.md").read_text(encoding="utf-8")
    for path in (ROOT / "ov3fast" / "ops").glob("[a-z]*.py"):
        if "\nCALLS = [" not in path.read_text(encoding="utf-8"):
            continue  # a backend
        page = f"{path.stem}.md"
        assert (DOCS / "operators" / page).exists(), f"docs/operators/{page} is missing"
        assert f"({page})" in index, f"docs/operators/index.md does not list {page}"


def test_the_newcomers_walk_takes_at_most_eight_files():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## From an image to the kernels")[1].split("\n## ")[0]
    files = re.findall(r"^\d+\. `([^`]+)`", section, flags=re.MULTILINE)
    assert 0 < len(files) <= 8
    for name in files:
        assert (ROOT / name).is_file(), name
    assert any(name.startswith("csrc/") for name in files) and any(name.startswith("kernels/") for name in files)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_the_paths_that_a_page_names_exist(page):
    folders = "ov3fast|kernels|csrc|tests|benches|docs|tools|examples"
    named = re.findall(rf"(?<![\w/])((?:{folders})(?:/[\w.-]+)+)", (ROOT / page).read_text(encoding="utf-8"))
    for name in {name.rstrip(".") for name in named}:
        if "NAME" not in name:
            assert (ROOT / name).exists(), name


def test_an_operators_files_are_where_contributing_says():
    for name in ("layer_norm", "patch_embed", "mlp"):
        for place in (
            "ov3fast/ops/NAME.py",
            "csrc/cpu/NAME.cpp",
            "kernels/NAME.py",
            "tests/ops/test_NAME.py",
            "docs/operators/NAME.md",
        ):
            assert (ROOT / place.replace("NAME", name)).exists()


def test_the_citation_names_the_version():
    import yaml

    import ov3fast

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == ov3fast.__version__ and citation["license"] == "Apache-2.0"
