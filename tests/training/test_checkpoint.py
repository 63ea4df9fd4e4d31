import json
import subprocess
import sys
import warnings

import pytest
import torch

from ov3fast.training import checkpoint

TENSORS = {
    "model": {"w": torch.arange(6.0).view(2, 3).t(), "b": torch.ones((), dtype=torch.bfloat16)},
    "ema": {"w": torch.zeros(3)},
}


def save(folder, step, **options):
    return checkpoint.save(folder, step, TENSORS, {"progress": {"step": step}}, **options)


def test_round_trip(tmp_path):
    path = save(tmp_path, 12)
    assert path.name == "step-00000012"
    found = checkpoint.latest(tmp_path)
    assert found.state == {"progress": {"step": 12}}
    for group, tensors in TENSORS.items():
        for name, value in tensors.items():
            assert torch.equal(found.tensors[group][name], value) and found.tensors[group][name].dtype == value.dtype


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 10]
    save(tmp_path, 10, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 10]
    assert not list(tmp_path.glob(".*"))


def test_nothing_there():
    assert checkpoint.latest(__import__("pathlib").Path("/nowhere")) is None


def damage_cut(path):
    file = path / "optimizer.safetensors" if (path / "optimizer.safetensors").exists() else path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def damage_bit(path):
    content = bytearray((path / "ema.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "ema.safetensors").write_bytes(content)


def damage_state(path):
    (path / "state.json").write_text((path / "state.json").read_text().replace("20", "21"))


def damage_missing(path):
    (path / "model.safetensors").unlink()


def damage_manifest(path):
    (path / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_cut, "model.safetensors has .* bytes, the manifest says"),
        (damage_bit, "ema.safetensors is not what was written"),
        (damage_state, "state.json is not what was written"),
        (damage_missing, "model.safetensors is missing"),
        (damage_manifest, "manifest.json can't be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, damage, message):
    save(tmp_path, 10)
    damage(save(tmp_path, 20))
    with pytest.warns(checkpoint.CheckpointWarning, match=rf"step-00000020.*{message}"):
        assert checkpoint.latest(tmp_path).path.name == "step-00000010"


def test_only_damaged_ones(tmp_path):
    damage_manifest(save(tmp_path, 3))
    with pytest.warns(checkpoint.CheckpointWarning), pytest.raises(ValueError, match="none of step-00000003 .* is whole"):
        checkpoint.latest(tmp_path)


def test_a_kill_while_saving_leaves_the_one_before(tmp_path):
    """The process dies in the middle of the second save, after each of its system calls that write or rename in turn."""
    code = f"""
import os, pathlib, sys, torch
from ov3fast.training import checkpoint
folder, fatal = pathlib.Path({str(tmp_path)!r}), int(sys.argv[1])
tensors = {{"model": {{"w": torch.arange(6.0)}}, "ema": {{"w": torch.ones(3)}}}}
checkpoint.save(folder / sys.argv[1], 1, tensors, {{"n": 1}})
calls = 0
def count(name, function):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == fatal:
            os._exit(9)
        return function(*args, **kwargs)
    return wrapped
for name in ("fsync", "replace"):
    setattr(os, name, count(name, getattr(os, name)))
checkpoint.shutil.rmtree = count("rmtree", checkpoint.shutil.rmtree)
for n in range(1, 30):
    if os.fork() == 0:
        fatal, folder_n = n, folder / f"k{{n}}"
        calls = -1000
        checkpoint.save(folder_n, 1, tensors, {{"n": 1}}, keep=1)
        calls = 0
        checkpoint.save(folder_n, 2, tensors, {{"n": 2}}, keep=1)
        os._exit(0)
    os.wait()
"""
    subprocess.run([sys.executable, "-c", code, "0"], check=True)
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(1, 30):
            found = checkpoint.latest(tmp_path / f"k{n}")
            seen.add(found.state["n"])
            # The next save clears what the kill left behind.
            checkpoint.save(tmp_path / f"k{n}", 3, {"model": {"w": torch.zeros(1)}}, {"n": 3}, keep=1)
            assert checkpoint.steps(tmp_path / f"k{n}") == [3] and not list((tmp_path / f"k{n}").glob(".*"))
    assert seen == {1, 2}


def test_manifest_names_every_file(tmp_path):
    path = save(tmp_path, 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {"model.safetensors", "ema.safetensors", "state.json"}


def test_files_that_are_not_ours_are_left_alone(tmp_path):
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "thesis").write_text("x")
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-7").write_text("a file")
    (tmp_path / ".writing-00000003").mkdir()
    (tmp_path / ".step-00000003.writing-123").mkdir()
    save(tmp_path, 1, keep=1)
    save(tmp_path, 2, keep=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".DS_Store", ".hidden", "step-notes", "step-7", "step-00000002"}
    assert (tmp_path / ".hidden" / "thesis").read_text() == "x" and checkpoint.latest(tmp_path).state["progress"]["step"] == 2


def test_a_step_may_be_a_link(tmp_path):
    run, archive = tmp_path / "run", tmp_path / "archive"
    save(archive, 4)
    run.mkdir()
    (run / "step-00000004").symlink_to(archive / "step-00000004")
    assert checkpoint.latest(run).state["progress"]["step"] == 4
    save(run, 5, keep=1)
    assert checkpoint.steps(run) == [5] and checkpoint.latest(archive).state["progress"]["step"] == 4


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    import safetensors.torch

    save(tmp_path, 1)

    class SafetensorError(Exception):
        pass

    def full(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="the disk is full"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"] and checkpoint.latest(tmp_path) is not None
