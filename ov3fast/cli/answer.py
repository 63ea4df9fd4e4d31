"""ov3fast answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ov3fast.cli.options import parse


@dataclass(kw_only=True)
class Answer:
    """Questions about an image, or a benchmark's, answered by what `ov3fast train --recipe understand-...` trained."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run or its model folder."""
    image: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[IMAGE]")] = None
    """Image file; without one, the question stands alone."""
    question: tuple[str, ...] = ()
    """One or several, each answered by itself: --question "is there a red apple?" "which group?"."""
    benchmark: str | None = None
    """pope, gqa, seed, mme or scienceqa, in place of an image."""
    data: Path | None = None
    """With --benchmark: its folder, in its published layout."""
    out: Path | None = None
    """With --benchmark: a .jsonl file of the replies."""
    limit: int | None = None
    """With --benchmark: the first so many questions only; what comes out is no figure of the benchmark's."""
    max_new_tokens: int = 32
    """Length of an answer."""
    batch_size: int = 32
    tower: str | None = None
    """Where the tower is now, if it has moved."""
    device: str | None = None
    """cpu, cuda or cuda:N; default: cpu."""
    trust_remote_code: bool = False
    """For a language model that brings its own code."""


def run(arguments: list[str]) -> int:
    given = parse(Answer, arguments, "answer")
    if (given.benchmark is None) == (not given.question):
        raise ValueError("answer: give --question or --benchmark, one of them")
    for name in ("max_new_tokens", "batch_size", "limit"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise ValueError(f"answer: --{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}")
    if given.benchmark is None and (given.data or given.out or given.limit):
        raise ValueError("answer: --data, --out and --limit are for --benchmark")
    if given.image is not None and not given.image.is_file():
        raise FileNotFoundError(f"answer: there is no file {given.image}")
    from ov3fast.understanding.saved import Answerer

    def load() -> Answerer:
        return Answerer.load(given.run, tower=given.tower, device=given.device, trust_remote_code=given.trust_remote_code)

    if given.benchmark is not None:
        return _benchmark(given, load)
    asked = list(given.question)
    for answer in load().answer(
        [given.image] * len(asked), asked, max_new_tokens=given.max_new_tokens, batch_size=given.batch_size
    ):  # fmt: skip
        print(answer)
    return 0


def _benchmark(given: Answer, load) -> int:
    from rich.progress import track

    from ov3fast.io import atomic_write, check_writable
    from ov3fast.terminal import is_terminal
    from ov3fast.understanding.benchmarks import benchmark

    chosen = benchmark(given.benchmark or "")
    if given.image is not None or given.data is None:
        raise ValueError(f"answer: --benchmark {chosen.name} takes --data FOLDER and no image")
    if given.out is not None:
        check_writable(given.out, "--out")
    items = chosen.read(given.data)[: given.limit]
    answerer, replies = load(), []
    for start in track(range(0, len(items), given.batch_size), chosen.name, disable=not is_terminal(), transient=True):
        part = items[start : start + given.batch_size]
        replies += answerer.answer(
            [item.image for item in part], [item.prompt for item in part], max_new_tokens=given.max_new_tokens, batch_size=given.batch_size
        )  # fmt: skip
    if given.out is not None:
        with atomic_write(given.out) as temporary:
            rows = (
                {"id": i.id, "prompt": i.prompt, "answer": i.answer, "reply": r} for i, r in zip(items, replies, strict=True)
            )
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, value in chosen.score(items, replies).items():
        print(f"{name:<32} {value:.4f}")
    return 0
