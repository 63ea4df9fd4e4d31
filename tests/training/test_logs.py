import dataclasses
import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ov3fast.training import train
from ov3fast.training.logs import LOG, TENSORBOARD, Display, RunLog, clock, describe, read_rows


def board(run_dir, tag):
    events = EventAccumulator(str(run_dir / TENSORBOARD))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_no_row_twice_after_a_resume(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3, 4):
        log.write({"step": step, "stage": "a", "loss": float(step)})
    log.close()
    with open(tmp_path / LOG, "a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a row
    log = RunLog(tmp_path, after=2)
    for step in (3, 4, 5):
        log.write({"step": step, "stage": "a", "loss": 10.0 * step})
    log.close()
    rows = read_rows(tmp_path / LOG)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert board(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


class FakeWandb:
    """Weights & Biases as far as it is used: a run's steps only go up, and a run of a known id goes on behind its last one."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, dict]] = {}
        self.asked: list[dict] = []
        self.finished = 0

    def init(self, *, project, id, name, dir, config, resume):
        self.asked.append({"project": project, "id": id, "name": name, "resume": resume, "config": config})
        fake, rows = self, self.rows.setdefault(id, {})

        class Run:
            step = max(rows, default=-1) + 1

            def log(self, values, step):
                assert step >= self.step, f"step {step} after {self.step - 1}: W&B drops it with a warning"
                rows[step], Run.step = values, step + 1

            def finish(self):
                fake.finished += 1

        return Run()


def test_no_step_twice_in_weights_and_biases(tiny, data, tmp_path, monkeypatch):
    """A run that is killed behind its checkpoint and resumed, and the run that never was."""
    from ov3fast import ops

    fake, update = FakeWandb(), ops.adamw_ema_
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def failing(*arguments, step, **options):
        if step == 6:
            raise MemoryError
        return update(*arguments, step=step, **options)

    recipe = tiny.recipe(data, tmp_path / "run", ((8, 32),), wandb="project", gradient_norms_every=None)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "adamw_ema_", failing)
        with pytest.raises(MemoryError):
            train(recipe)
    assert sorted(*fake.rows.values()) == [1, 2, 3, 4, 5] and fake.finished == 1
    train(recipe, resume=True)  # from step 3
    [rows] = fake.rows.values()
    assert sorted(rows) == list(range(1, 9)) and fake.finished == 2
    assert [row["step"] for row in read_rows(tmp_path / "run" / LOG)] == list(range(1, 9))
    train(dataclasses.replace(recipe, run_dir=tmp_path / "whole"))
    assert len(fake.rows) == 2
    clock = ("seconds", "images_per_s", "data_wait", "memory_gib", "tflops")
    [first, whole] = [
        {step: {k: v for k, v in row.items() if k not in clock} for step, row in run.items()} for run in fake.rows.values()
    ]
    assert first == whole and "loss" in whole[8]
    assert [asked["resume"] for asked in fake.asked] == ["allow"] * 3 and fake.asked[0]["config"]["name"] == "tiny"


def test_without_wandb_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="wandb is not installed: pip install wandb"):
        RunLog(tmp_path, wandb="project")


def test_rows_are_valid_json_whatever_the_loss(tmp_path):
    log = RunLog(tmp_path)
    log.write({"step": 1, "loss": float("nan")})
    log.close()
    assert json.loads((tmp_path / LOG).read_text(), parse_constant=lambda name: 1 / 0) == {"step": 1, "loss": None}


def test_plain_lines_where_there_is_no_terminal(capsys):
    row = {"step": 7, "images_per_s": 12.3456, "lr": 1e-3, "loss": 2.5, "contrastive": 1.25}
    with Display() as display:
        display.update("s0", 0.5, describe(row, 61.0))
        display.update("s0", 0.6, "too soon after the last")
        display.update("s0", 1.0, "the end", last=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "s0  50.0% step 7  12.3 images/s  ETA 0:01:01  lr 1.00e-03  loss 2.5000  contrastive 1.2500",
        "s0 100.0% the end",
    ]


def test_other_ranks_say_nothing(capsys):
    with Display(show=False) as display:
        display.note("hello")
        display.update("s0", 1.0, "the end", last=True)
    assert capsys.readouterr().out == ""


def test_clock():
    assert clock(3725.4) == "1:02:05"
