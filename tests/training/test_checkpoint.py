import json
import subprocess
import sys
import threading
import warnings

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from ov3fast.training import checkpoint, saving
from ov3fast.training.distributed import ALONE

TENSORS = {
    "model": {"w": torch.arange(6.0).view(2, 3).t(), "b": torch.ones((), dtype=torch.bfloat16)},
    "ema": {"w": torch.zeros(3)},
}


def save(folder, step, **options):
    return saving.save(folder, step, TENSORS, {"progress": {"step": step}}, **options)


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
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-3])


def damage_bit(path):
    content = bytearray((path / "__0_0.distcp").read_bytes())
    [chunk] = json.loads((path / "manifest.json").read_text())["tensors"]["ema/w"]["chunks"]
    content[chunk["offset"] + chunk["bytes"] // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(content)


def damage_state(path):
    (path / "state.json").write_text((path / "state.json").read_text().replace("20", "21"))


def damage_missing(path):
    (path / "__0_0.distcp").unlink()


def damage_manifest(path):
    (path / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_cut, "__0_0.distcp has .* bytes, the manifest says"),
        (damage_bit, "tensor ema/w is not what was written: __0_0.distcp was changed or cut within"),
        (damage_state, "state.json is not what was written"),
        (damage_missing, "__0_0.distcp is missing"),
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
    """The process dies during the second save, after each of its write and rename system calls in turn."""
    code = f"""
import os, pathlib, sys, torch
from ov3fast.training import saving
folder, fatal = pathlib.Path({str(tmp_path)!r}), int(sys.argv[1])
tensors = {{"model": {{"w": torch.arange(6.0)}}, "ema": {{"w": torch.ones(3)}}}}
saving.save(folder / sys.argv[1], 1, tensors, {{"n": 1}})
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
saving.shutil.rmtree = count("rmtree", saving.shutil.rmtree)
for n in range(1, 14):
    if os.fork() == 0:
        fatal, folder_n = n, folder / f"k{{n}}"
        calls = -1000
        saving.save(folder_n, 1, tensors, {{"n": 1}}, keep=1)
        calls = 0
        saving.save(folder_n, 2, tensors, {{"n": 2}}, keep=1)
        os._exit(0)
    os.wait()
"""
    subprocess.run([sys.executable, "-c", code, "0"], check=True)
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(1, 14):
            found = checkpoint.latest(tmp_path / f"k{n}")
            seen.add(found.state["n"])
            # The next save removes the leftovers of the kill.
            saving.save(tmp_path / f"k{n}", 3, {"model": {"w": torch.zeros(1)}}, {"n": 3}, keep=1)
            assert checkpoint.steps(tmp_path / f"k{n}") == [3] and not list((tmp_path / f"k{n}").glob(".*"))
    assert seen == {1, 2}


def test_manifest_names_every_file(tmp_path):
    path = save(tmp_path, 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {"__0_0.distcp", ".metadata", "state.json"}


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
    save(tmp_path, 1)

    def full(*arguments):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="the disk is full; the checkpoint before is whole") as caught:
        save(tmp_path, 2)
    assert caught.value.filename == str(tmp_path / "step-00000002")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"] and checkpoint.latest(tmp_path) is not None


def test_a_checkpoint_of_an_earlier_version(tmp_path):
    """safetensors files with a manifest of their hashes."""
    path = tmp_path / "step-00000007"
    path.mkdir()
    tensors = {group: {name: value.contiguous() for name, value in values.items()} for group, values in TENSORS.items()}
    for group, values in tensors.items():
        save_file(values, path / f"{group}.safetensors")
    (path / "state.json").write_text(json.dumps({"progress": {"step": 7}}))
    files = {
        file.name: {"sha256": checkpoint.Folder(path).sha256(file.name), "bytes": file.stat().st_size}
        for file in path.iterdir()
    }
    (path / "manifest.json").write_text(json.dumps({"step": 7, "files": files}))
    found = checkpoint.latest(tmp_path)
    into = {name: torch.full_like(value, 9.0) for name, value in tensors["model"].items()}
    found.restore("model", into, ALONE)
    assert found.state["progress"]["step"] == 7 and torch.equal(found.tensors["ema"]["w"], torch.zeros(3))
    assert all(torch.equal(value, tensors["model"][name]) for name, value in into.items())
    (path / "ema.safetensors").write_bytes((path / "ema.safetensors").read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="ema.safetensors is not what was written"):
        checkpoint.load(path)


def test_what_does_not_fit_is_named(tmp_path):
    found = checkpoint.load(save(tmp_path, 1))
    with pytest.raises(ValueError, match="model: other is missing from the checkpoint"):
        found.restore("model", {"other": torch.zeros(2)}, ALONE)
    with pytest.raises(ValueError, match="ema: w is unknown to this model, but in the checkpoint"):
        found.restore("ema", {}, ALONE)
    with pytest.raises(ValueError, match=r"ema: w has shape \(3,\) in the checkpoint, \(4,\) here"):
        found.restore("ema", {"w": torch.zeros(4)}, ALONE)


def test_the_step_waits_for_the_copy_alone(tmp_path, monkeypatch):
    write, may_write, values = saving._LocalWriter.write_data, threading.Event(), torch.zeros(1000)

    def slow(*arguments):
        assert may_write.wait(60)
        return write(*arguments)

    monkeypatch.setattr(saving._LocalWriter, "write_data", slow)
    saver = saving.Saver(tmp_path)
    saver.save(1, {"model": {"w": values}}, {})
    saver.copied()
    values.fill_(1.0)  # training goes on
    assert checkpoint.steps(tmp_path) == [] and not saver.failed
    may_write.set()
    saver.finish()
    saver.close()
    assert torch.equal(checkpoint.latest(tmp_path).tensors["model"]["w"], torch.zeros(1000))


def test_every_so_many_stay(tmp_path):
    saver = saving.Saver(tmp_path, keep=1, keep_every=4)
    for step in (2, 4, 6, 8, 9, 10):
        saver.save(step, TENSORS, {})
    saver.finish()
    saver.close()
    assert checkpoint.steps(tmp_path) == [4, 8, 10]


def test_on_a_remote_file_system():
    where = "memory://bucket/run"
    for step in (1, 2, 3):
        saving.save(where, step, TENSORS, {"progress": {"step": step}}, keep=2)
    assert checkpoint.steps(where) == [2, 3]
    files = fsspec.filesystem("memory")
    found = checkpoint.latest(where)
    assert torch.equal(found.tensors["model"]["w"], TENSORS["model"]["w"])
    # An interrupted save has no manifest: it does not count, and the next save removes it.
    files.rm("/bucket/run/step-00000003/manifest.json")
    with pytest.warns(checkpoint.CheckpointWarning):
        assert checkpoint.latest(where).state["progress"]["step"] == 2
    saving.save(where, 4, TENSORS, {}, keep=2)
    assert checkpoint.steps(where) == [2, 4]
    files.rm("/bucket", recursive=True)


def test_differences_are_named(tmp_path):
    a = checkpoint.load(save(tmp_path / "a", 1))
    changed = {"model": {**TENSORS["model"], "w": TENSORS["model"]["w"] + torch.eye(3, 2)}, "ema": {"v": torch.zeros(3)}}
    b = checkpoint.load(saving.save(tmp_path / "b", 1, changed, {}))
    assert checkpoint.difference(a, a) == []
    assert checkpoint.difference(a, b) == [
        ("ema/v", f"only in {b.folder}"),
        ("ema/w", f"only in {a.folder}"),
        ("model/w", "2 of 6 values, by 1 at most (largest 5)"),
    ]
