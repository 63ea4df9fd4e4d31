"""ov3fast watch and ov3fast compare."""

import json
import os
import re
import threading
import time

import pytest

from ov3fast.cli import main
from ov3fast.evaluation import runs as runs_module
from ov3fast.evaluation.runs import charts, differences, read_run, read_runs, table, write_page
from ov3fast.recipes import get_recipe


def row(step, **values):
    return {
        "step": step, "stage": "pretrain" if step <= 20 else "finetune", "images": 144 * step, "seconds": 0.5 * step, "images_per_s": 288.0,
        "lr": 1e-3, "loss": 9.0 / step, "contrastive": 4.0 / step, "grad_norm": 1.0, **values,
    }  # fmt: skip


def write_run(folder, steps=30, complete=False, factor=1.0, **recipe):
    folder.mkdir(parents=True)
    values = get_recipe("demo").to_dict() | {"run_dir": str(folder), **recipe}
    (folder / "recipe.json").write_text(json.dumps(values))
    rows = [row(step, loss=factor * 9.0 / step) for step in range(1, steps + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    if complete:
        summary = {"step": steps, "images": 144 * steps, "seconds": 60.0, "loss": rows[-1]["loss"], "images_per_s": 300.0}
        (folder / "summary.json").write_text(json.dumps(summary))
        metric = {
            "id": "style/R@1",
            "group": "Known concepts",
            "label": "image to text, R@1",
            "value": 0.5 / factor,
            "unit": "%",
        }
        (folder / "evaluation.json").write_text(json.dumps({"metrics": [metric]}))
    return folder


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")


@pytest.fixture
def two(tmp_path):
    return [write_run(tmp_path / "a" / "run", complete=True), write_run(tmp_path / "b" / "run", steps=20, factor=2.0, seed=7)]


def test_figures_metrics_and_differences(two):
    runs = read_runs(two)
    assert [run.name for run in runs] == ["a/run", "b/run"]
    rows = {cells[0]: cells[1:] for cells in table(runs)}
    assert rows["steps"] == ["30", "20"] and rows["loss"] == ["0.3000", "0.9000"] and rows["images/s"] == ["300.0", "288.0"]
    assert (
        rows["Known concepts"] == [] and rows["image to text, R@1"][0].startswith("50") and rows["image to text, R@1"][1] == ""
    )
    assert "LPIPS-style" not in rows
    assert differences(runs) == [["seed", "0", "7"]]


def test_every_panel_has_a_line_for_every_run(two, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        runs_module, "line_chart", lambda title, series, **options: drawn.setdefault(title, (series, options)) and "x"
    )
    charts(read_runs(two), "images")
    series, options = drawn["Total loss"]
    assert [line.name for line in series] == ["a/run", "b/run"] and [len(line.x) for line in series] == [30, 20]
    assert series[1].x[:2] == [144, 288] and options["x_range"] == (144, 30 * 144) and options["x_label"] == "images"
    with pytest.raises(ValueError, match="axis: must be one of step, images, seconds, got 'epoch'"):
        charts(read_runs(two), "epoch")


def test_the_page_is_self_contained_and_the_same_again(two, tmp_path, monkeypatch):
    monkeypatch.setattr(runs_module, "PANELS", runs_module.PANELS[:2])
    page = write_page(tmp_path / "page.html", read_runs(two)).read_text()
    assert page == write_page(tmp_path / "again.html", read_runs(two)).read_text()
    assert not re.search(r"(src|href)=\"https?:", page) and "http-equiv" not in page
    assert page.count("<svg") == 2 and "What differs in the recipes" in page and "a/run" in page


@pytest.fixture
def without_charts(monkeypatch):
    monkeypatch.setattr(runs_module, "line_chart", lambda *_, **options: "")


def test_compare_prints_and_writes(two, tmp_path, capsys, without_charts):
    assert main(["compare", *map(str, two), "--out", str(tmp_path / "c.html")]) == 0
    out = capsys.readouterr().out
    assert "0.3000" in out and "0.9000" in out and "seed" in out and str(tmp_path / "c.html") in out
    assert (tmp_path / "c.html").is_file()
    assert main(["compare", str(two[0]), str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["compare", *[str(two[0])] * 7]) == 2 and "up to 6 runs" in capsys.readouterr().err


def test_watch_shows_a_run_once(two, capsys, tmp_path, without_charts):
    (two[1] / "checkpoints" / "step-00000012").mkdir(parents=True)
    assert main(["watch", str(two[1]), "--once", "--page", str(tmp_path / "w.html")]) == 0
    out = capsys.readouterr().out
    assert (
        "running, stage pretrain: 1.9 %" in out
        and "step 20" in out
        and "step-00000012" in out
        and "Total loss" in out
        and "▁" in out
    )
    page = (tmp_path / "w.html").read_text()
    assert '<meta http-equiv="refresh" content="30.0">' in page and "running, stage pretrain" in page


def test_watch_follows_the_log_and_ends_with_the_run(two, capsys, tmp_path, without_charts):
    folder = two[1]

    def train():
        time.sleep(0.3)
        with open(folder / "log.jsonl", "a") as log:
            log.write(json.dumps(row(21)) + "\n" + '{"step": 22, "lo')
            log.flush()
            time.sleep(0.3)
            log.write('ss": 0.5, "images_per_s": 1.0, "lr": 0.0, "stage": "finetune", "images": 9, "seconds": 99.0}\n')
        (folder / "summary.json").write_text(json.dumps({"step": 22, "images": 3168, "seconds": 11.0}))

    thread = threading.Thread(target=train)
    thread.start()
    assert main(["watch", str(folder), "--every", "0.05", "--page", str(tmp_path / "w.html")]) == 0
    thread.join()
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.match(r"step (\d+)", line)[1]) for line in lines[:-1]] == list(range(1, 23))
    assert lines[-1] == "complete: 22 steps, 3,168 images, 0:00:11"
    assert "http-equiv" not in (tmp_path / "w.html").read_text()


def test_a_silent_run_is_named(two, capsys):
    os.utime(two[1] / "log.jsonl", (1e9, 1e9))
    assert main(["watch", str(two[1]), "--once"]) == 0
    assert "silent for" in capsys.readouterr().out
    (two[1] / "log.jsonl").unlink()
    assert main(["watch", str(two[1]), "--once"]) == 0
    assert "no row in the log yet" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--every", "0"], ["--page-every", "-1"]])
def test_wrong_flags(two, capsys, flags):
    assert main(["watch", str(two[0]), *flags]) == 2
    assert "must be above 0" in capsys.readouterr().err


def test_runs_that_are_no_runs(tmp_path, capsys):
    assert main(["watch", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert read_run(write_run(tmp_path / "x")).figure("absent") is None
