"""The private names of torch and Triton that we use are listed in tools/private_names.py, and exist in the installed versions."""

import ast
import re

import pytest

from tools import private_names

LISTED = [name for names in private_names.NAMES.values() for name in names]


@pytest.mark.parametrize("name", LISTED)
def test_is_in_the_installed_version(name):
    private_names.resolve(name)


def test_what_the_sources_use_is_listed():
    missing = {name: sorted(paths) for name, paths in private_names.used().items() if name not in LISTED}
    assert not missing, "list these in tools/private_names.py"


def test_what_is_listed_is_used():
    words = {
        word
        for path in private_names.files()
        if path.name != "private_names.py"
        for word in re.findall(r"\w+", path.read_text())
    }
    assert [name for name in LISTED if name.split(".")[-1] not in words] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch._C._f(torch.add)", {"torch._C._f"}),
        ("from torch.utils._pytree import tree_map as tm", {"torch.utils._pytree.tree_map"}),
        ("from triton import knobs\nknobs.runtime.hook.add(f)", {"triton.knobs.runtime.hook.add"}),
        (
            "import triton\nmock.patch.object(triton.runtime.driver, '_active', x)",
            {"triton.runtime.driver._active", "triton.runtime.driver"},
        ),
        ("import triton.language as tl\nimport triton\ntriton.jit\ntl.dot", set()),
        ("from . import triton\ntriton._x", set()),
    ],
)
def test_the_scan(source, expected):
    assert {name for name in private_names.names_in(ast.parse(source)) if private_names.private(name)} == expected


def test_a_name_that_is_gone_is_an_error():
    with pytest.raises((AttributeError, ImportError)):
        private_names.resolve("torch._C._cuda_getDriverVersion_of_old")
