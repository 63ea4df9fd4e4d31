"""The pages' templates, in assets/report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parents[1] / "assets" / "report"


def template(name: str) -> jinja2.Template:
    """Text is escaped unless it is Markup; a variable that the caller doesn't give is an error."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template(name)  # fmt: skip
