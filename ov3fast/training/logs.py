"""What a run leaves behind and shows: log.jsonl, TensorBoard, and the terminal.

log.jsonl is the record, one JSON object a row, ordered by step. A resumed run first cuts the rows past its checkpoint, and
TensorBoard's files are rewritten from the rows that stay, so that no step appears twice in either.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ov3fast import terminal
from ov3fast.io import atomic_write

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"
SHOWN = ("loss", "pixel", "latent", "lpips", "caption", "contrastive")
LINE_EVERY_S = 5.0


class RunLog:
    """Appends rows to <run_dir>/log.jsonl and <run_dir>/tensorboard. after: the step that the run goes on from, 0 for a new run.

    wandb: the project that they go to as well, under an id that a resumed run keeps; it takes each step once.
    """

    def __init__(self, run_dir: Path, after: int = 0, wandb: str | None = None, config: dict[str, Any] | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [row for row in read_rows(run_dir / LOG) if row["step"] <= after]
        path = run_dir / LOG
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        shutil.rmtree(run_dir / TENSORBOARD, ignore_errors=True)
        self._file = open(path, "a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / TENSORBOARD))
        for row in kept:
            self._to_board(row)
        self._wandb = None if wandb is None else _wandb_run(run_dir, wandb, config)

    def write(self, row: dict[str, Any]) -> None:
        """One row; it has a "step". Values that are not finite are written as null."""
        plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()
        self._to_board(plain)
        # A resumed run comes by steps again that Weights & Biases has already.
        if self._wandb is not None and plain["step"] >= self._wandb.step:
            self._wandb.log({key: value for key, value in plain.items() if key != "step"}, step=plain["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _to_board(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._board.add_scalar(key, value, row["step"])


def _wandb_run(run_dir: Path, project: str, config: dict[str, Any] | None) -> Any:
    try:
        import wandb
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "wandb: the recipe logs to Weights & Biases, and wandb is not installed: pip install wandb"
        ) from None
    name = hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:16]
    return wandb.init(project=project, id=name, name=run_dir.name, dir=str(run_dir), config=config, resume="allow")


class Window:
    """Losses since the last row of the log."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.names: list[str] = []
        self.sum: Tensor | None = None
        self.count, self.images, self.began = 0, 0, time.monotonic()

    def add(self, losses: dict[str, Tensor], norm: Tensor, images: int) -> None:
        values = torch.stack([*losses.values(), norm.to(losses["loss"].dtype)])
        self.names = [*losses, "grad_norm"]
        self.sum = values if self.sum is None else self.sum + values
        self.count += 1
        self.images += images

    def take(self) -> tuple[list[str], Tensor, float]:
        """Names, means (CPU) and images per second; then empty."""
        assert self.sum is not None, "nothing was added"
        names, means = self.names, (self.sum / self.count).cpu()
        rate = self.images / max(time.monotonic() - self.began, 1e-9)
        self._begin()
        return names, means, rate


class StepRows:
    """A row of the log, and the display, every `every` steps and at the last one.

    A row holds the step's own figures, but the mean loss since the row before, and a rate for each figure in `counted`: images -> images_per_s.
    """

    def __init__(self, log: RunLog, display: Display, every: int, counted: tuple[str, ...] = ("images",)) -> None:
        self._log, self._display, self._every, self._counted = log, display, every, counted
        self._begin()

    def _begin(self) -> None:
        self._steps, self._sums, self._began = 0, dict.fromkeys(("loss", *self._counted), 0.0), time.perf_counter()

    def add(self, what: str, row: dict[str, Any], done: int, steps: int) -> None:
        """A step's figures: row has step, loss, lr and what is counted. done of `steps` steps of the part `what` are done."""
        self._steps += 1
        self._sums = {name: total + row[name] for name, total in self._sums.items()}
        if row["step"] % self._every and done != steps:
            return
        seconds = time.perf_counter() - self._began
        rates = {f"{name}_per_s": self._sums[name] / seconds for name in self._counted}
        row = {**row, "loss": self._sums["loss"] / self._steps, **rates}
        self._log.write(row)
        self._display.update(what, done / steps, describe(row, (steps - done) * seconds / self._steps), done == steps)
        self._begin()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl, [] where there is none. A last line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Display:
    """The run on the terminal: a live bar with rates and losses, or plain lines where the output is no terminal.

    show=False (all ranks but the first) prints nothing. BrokenPipeError where the reader of the output has gone.
    """

    def __init__(self, show: bool = True) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.console = terminal.console(quiet=not show, highlight=False)
        self._live = self.console.is_terminal and show
        self._last_line = 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f}%"), TextColumn("{task.fields[text]}"),
            console=self.console, disable=not self._live,
        )  # fmt: skip
        self._task: Any = None

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Prints a line that stays above the live bar."""
        self.console.print(text, soft_wrap=True, markup=False)

    def update(self, what: str, share: float, text: str, last: bool = False) -> None:
        """Where the part `what` of the run is: share done, 0 to 1, and a text. A plain line comes every few seconds and at the last."""
        if self._live:
            if self._task is None or self._progress.tasks[0].description != what:
                for task in self._progress.task_ids:
                    self._progress.remove_task(task)
                self._task = self._progress.add_task(what, total=1.0, text="")
            self._progress.update(self._task, completed=share, text=text)
        elif last or time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.note(f"{what} {100 * share:5.1f}% {text}")


def describe(row: dict[str, Any], eta_s: float | None) -> str:
    """A row of the log as a line of text."""
    losses = "  ".join(f"{name} {row[name]:.4f}" for name in SHOWN if isinstance(row.get(name), float))
    eta = "" if eta_s is None else f"  ETA {clock(eta_s)}"
    return f"step {row['step']}  {row['images_per_s']:.1f} images/s{eta}  lr {row['lr']:.2e}  {losses}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
