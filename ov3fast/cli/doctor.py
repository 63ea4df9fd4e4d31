"""ov3fast doctor."""

from __future__ import annotations

from dataclasses import dataclass

from ov3fast.cli.options import parse


@dataclass
class Doctor:
    """Show what this machine can run: packages, tools, environment, and every operator's backends."""

    json: bool = False
    """Print one JSON object, for scripts and bug reports."""


def run(arguments: list[str]) -> int:
    given = parse(Doctor, arguments, "doctor")
    from ov3fast import doctor

    doctor.print_json() if given.json else doctor.show()
    return 0
