"""`ov3fast train`: recipes from files, own shards, resuming, and signals."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from ov3fast import cli
from ov3fast.data import write_shards
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.recipes import Recipe, edit, get_recipe, read_recipe
from ov3fast.training import checkpoint
from ov3fast.training.logs import read_rows


def train(*arguments) -> int:
    return cli.main(["train", "--device", "cpu", *map(str, arguments)])


def write(recipe, path):
    path.write_text(json.dumps(recipe.to_dict()))
    return path


@pytest.fixture(scope="module")
def finished(tiny, data, tmp_path_factory):
    """A run of 4 steps from a recipe file, and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = tiny.recipe(data, folder / "run", ((4, 32),), gradient_norms_every=None)
    assert train("--recipe", write(recipe, folder / "recipe.json")) == 0
    return recipe


def test_a_run_goes_on_by_its_folder_alone(finished, tmp_path, capsys):
    assert train("--resume", finished.run_dir) == 0
    assert "is complete at step 4" in capsys.readouterr().out
    saved = json.loads((finished.run_dir / "recipe.json").read_text())
    assert saved["versions"]["torch"] == torch.__version__ and read_recipe(finished.run_dir / "recipe.json") == finished
    state = checkpoint.latest(finished.run_dir / "checkpoints").state
    assert state["torch"] == torch.__version__ and state["ov3fast"]
    assert "versions" in json.loads((finished.run_dir / "model" / "config.json").read_text())
    assert OpenVision3.from_pretrained(finished.run_dir / "model").config.vision == finished.model.vision


def test_a_finished_run_is_lengthened(tiny, data, tmp_path, capsys):
    run = tmp_path / "run"
    recipe = tiny.recipe(data, run, ((3, 32),), gradient_norms_every=None)
    assert train("--recipe", write(recipe, tmp_path / "recipe.json")) == 0
    assert train("--resume", run, "--stages.0.steps", 5) == 2
    assert "stages.0.steps: 3 -> 5" in capsys.readouterr().err
    assert train("--resume", run, "--extend", "--stages.0.steps", 5) == 0
    assert train("--resume", run, "--extend", "--add-stage", "name=more,steps=2") == 0
    rows = read_rows(run / "log.jsonl")
    assert [(row["step"], row["stage"]) for row in rows] == [(n, "s0") for n in range(1, 6)] + [(6, "more"), (7, "more")]
    # The samples are those of a run with this length from the start.
    whole = dataclasses.replace(recipe, run_dir=tmp_path / "whole")
    assert (
        train("--recipe", write(whole, tmp_path / "whole.json"), "--stages.0.steps", 5, "--add-stage", "name=more,steps=2") == 0
    )
    hashes = [checkpoint.latest(path / "checkpoints").state["progress"]["order_hash"] for path in (run, tmp_path / "whole")]
    assert hashes[0] == hashes[1]


def test_a_run_begins_with_another_models_weights(finished, tmp_path):
    stage = dataclasses.replace(finished.stages[0], base_lr=0.0, steps=1, warmup_steps=None)
    recipe = dataclasses.replace(finished, stages=(stage,), seed=5, run_dir=tmp_path / "run")
    assert train("--recipe", write(recipe, tmp_path / "r.json"), "--init-from", finished.run_dir) == 0
    a, b = (OpenVision3.from_pretrained(path / "model").state_dict() for path in (finished.run_dir, recipe.run_dir))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_own_shards(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ("--stages.0.steps", 1, "--stages.0.batch-size", 8, "--data.workers", 0)
    assert train("--data", data / "pairs", *small) == 0
    saved = read_recipe(tmp_path / "runs" / "custom" / "recipe.json")
    (source,) = saved.data.sources
    assert source.captions == (("caption", 1.0),) and saved.objective.und_weight == 1.0
    assert train("--data", data / "photos", "--run-dir", tmp_path / "photos", *small) == 0
    assert "contrastive" not in read_rows(tmp_path / "photos" / "log.jsonl")[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_process_group_saves(tiny, data, tmp_path, number):
    recipe = tiny.recipe(data, tmp_path / "run", ((4000, 32),), cache_latents=False)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=2, cache_images=False))
    command = [sys.executable, "-m", "ov3fast", "train", "--device", "cpu", "--recipe", str(write(recipe, tmp_path / "r.json"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        while process.poll() is None and len(read_rows(tmp_path / "run" / "log.jsonl")) < 2:
            time.sleep(0.1)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, output
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").state["progress"]["step"] >= 2


def test_a_pipe_that_closes_saves(tiny, data, tmp_path):
    """`ov3fast train ... | head -4`: the run is saved, and the exit code is that of SIGPIPE."""
    recipe = tiny.recipe(data, tmp_path / "run", ((4000, 32),), cache_latents=False, log_every=1, checkpoint_steps=None)
    command = [sys.executable, "-m", "ov3fast", "train", "--device", "cpu", "--recipe", str(write(recipe, tmp_path / "r.json"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if "images/s" in line:
                break
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(timeout=300) == 141 and error == ""
    finally:
        process.kill()
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").state["progress"]["step"] >= 2


def test_everything_has_the_umasks_mode(finished):
    modes = {oct(file.stat().st_mode & 0o777) for file in finished.run_dir.rglob("*") if file.is_file()}
    probe = finished.run_dir / "probe"
    probe.touch()
    assert modes == {oct(probe.stat().st_mode & 0o777)}
    probe.unlink()


def test_the_home_folder_in_a_recipe(tiny, data, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = {**tiny.recipe(data, tmp_path, ((1, 32),)).to_dict(), "run_dir": "~/run"}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    assert train("--recipe", tmp_path / "r.json") == 0 and train("--recipe", tmp_path / "r.json", "--resume") == 0
    assert (tmp_path / "run" / "model").is_dir() and not list((tmp_path / "here").iterdir())


def test_own_shards_warn_once(data, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for tar in (data / "pairs").glob("*.tar"):
        (shards / tar.name).write_bytes(tar.read_bytes())
    (shards / "._0.tar").write_bytes(b"macOS")
    small = ("--stages.0.steps", 1, "--stages.0.batch-size", 8, "--data.workers", 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train("--data", shards, "--run-dir", tmp_path / "run", *small) == 0
    assert len([w for w in caught if "1 foreign_archive" in str(w.message)]) == 1


def test_own_shards_with_few_captions_say_so(data, tmp_path):
    from ov3fast.recipes import custom

    picture = b"P6 1 1 255 abc"
    write_shards([(f"{i}", {"ppm": picture, **({"txt": b"one"} if i < 2 else {})}) for i in range(6)], tmp_path / "few")
    with pytest.warns(UserWarning, match=r"--data: 2 of the 6 samples looked at have a caption \(txt\), fewer than half"):
        assert custom.fit(str(tmp_path / "few")).objective.und_weight == 0


def test_help_fits_a_screen(capsys):
    assert train("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    assert next(line for line in lines if line.startswith("  --")).startswith("  --recipe")
    assert train("--help", "optimizer") == 0
    assert "--optimizer.weight-decay" in capsys.readouterr().out


def test_a_recipe_in_yaml(finished, tmp_path):
    import yaml

    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(finished.to_dict()))
    assert read_recipe(path) == finished


def test_stages_and_sources_come_and_go():
    demo = get_recipe("demo")
    changed = edit(
        demo, remove_stages=["finetune"], add_stages=["name=long,steps=7"], remove_sources=["1"],
        add_sources=["path=mine,captions=txt:0.7+alt:0.3,caption_key=txt"],
    )  # fmt: skip
    assert [(s.name, s.steps, s.minutes, s.batch_size) for s in changed.stages] == [
        ("pretrain", None, 8.6, 144), ("long", 7, None, 144),
    ]  # fmt: skip
    assert [s.path for s in changed.data.sources] == ["demo:pairs-train", "mine"]
    assert changed.data.sources[1].captions == (("txt", 0.7), ("alt", 0.3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "custom"), "--recipe custom needs --data PATH"),
        (("--recipe", "base", "--data", "x"), "--data is for --recipe custom, got --recipe base"),
        (("--resume", "/nowhere"), "--resume: /nowhere is not a run"),
        (("--recipe", "/nowhere.json"), "there is no file /nowhere.json"),
        (("--extend",), "--extend needs --resume RUN"),
        (("--remove-stage", "third"), "--remove-stage: got 'third'; it takes a number from 0 or one of pretrain, finetune"),
        (("--add-stage", "name=x,stepz=1"), "--add-stage: got 'stepz=1'; it takes field=value"),
        (("--add-source", "path=x,fraction=0"), "--add-source: fraction: got 0"),
        (("--add-source", "path=x,captions="), "--add-source: got 'captions='; it takes captions=key"),
        (("--add-source", "path=x,captions=a:b"), "--add-source: SourceConfig.captions[0][1]: takes float, got 'b'"),
        (("--add-stage", "name=x,steps=abc"), "--add-stage: Stage.steps: takes int or null, got 'abc'"),
        (("--resume", "RUN", "--overwrite"), "--resume continues a run, --overwrite starts it over"),
        (("--help", "towers"), "--help takes model, objective"),
    ],
)
def test_errors_name_the_flag(capsys, finished, arguments, message):
    assert train(*(finished.run_dir if argument == "RUN" else argument for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_former_names_in_a_recipe_are_read():
    values = get_recipe("demo").to_dict()
    values["model"]["latents"] = values["model"].pop("latent_convention")
    assert Recipe.from_dict(values) == get_recipe("demo") and get_recipe("demo").difference(values) is None
