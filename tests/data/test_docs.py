"""docs/skips.md lists every reason for skipping data."""

import re
from pathlib import Path

import ov3fast.data

DATA = Path(ov3fast.data.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"


def test_every_reason_is_explained():
    page = (DOCS / "skips.md").read_text()
    code = "\n".join(path.read_text() for path in DATA.glob("*.py"))
    patterns = (r'Skip\([^)]*?, "(\w+)"', r'ImageError\(\s*"(\w+)"', r'left_out\.add\(\s*"(\w+)"', r'return f?"(\w+): ')
    found = {reason for pattern in patterns for reason in re.findall(pattern, code)}
    assert {
        "broken_image",
        "missing_image",
        "missing_caption",
        "broken_json",
        "truncated_tar",
        "no_tar",
        "foreign_member",
    } <= found
    assert not {reason for reason in found if f"`{reason}`" not in page}
