import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
