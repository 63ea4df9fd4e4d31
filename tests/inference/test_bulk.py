"""Bulk encoding: sources, parts, processes, and resuming after a kill."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from ov3fast import cli
from ov3fast.data.shards import write_shards
from ov3fast.data.skips import DataError
from ov3fast.inference import bulk, encode, read_embeddings
from ov3fast.inference.search import search
from ov3fast.inference.sources import ImageFiles, Shards, find

from .conftest import noise

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def model_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bulk") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """23 pictures, two of them broken."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(23):
        noise(i, 40 + i, 50).save(folder / f"{i:02d}.png")
    (folder / "07.png").write_bytes(b"no picture")
    (folder / "20.png").write_bytes((folder / "21.png").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def expected(model, photos):
    return encode(model, photos)


@pytest.fixture
def run(model_folder, vae_folder, capsys):
    """Runs the command and returns its JSON summary."""

    def run(*arguments, model=model_folder):
        assert cli.main(["encode", str(model), *map(str, arguments), "--vae", str(vae_folder), "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def same(found, expected) -> bool:
    tokens = expected.tokens is None if found.tokens is None else torch.equal(found.tokens, expected.tokens)
    return (
        tokens
        and torch.equal(found.pooled, expected.pooled)
        and (found.names, found.skipped) == (expected.names, expected.skipped)
    )


@pytest.mark.parametrize("out", ["e.parquet", "e.safetensors", "e.npz", "folder"])
def test_every_output_holds_what_encode_gives(run, photos, tmp_path, expected, out):
    done = run(photos, "--out", tmp_path / out, "--rows", "5")
    assert done["images"] == 21 and done["skipped"] == expected.skipped and done["resumed"] == 0
    found = read_embeddings(tmp_path / out)
    assert same(found, expected) and found.about == expected.about
    assert sorted(p.name for p in tmp_path.iterdir()) == [out], "nothing else is left"


@pytest.mark.parametrize("parts", ["safetensors", "parquet", "npy"])
def test_a_folder_of_parts_is_an_index(run, photos, tmp_path, expected, model, parts):
    run(photos, "--out", tmp_path / "parts", "--rows", "8", "--parts", parts)
    names = sorted(p.name for p in (tmp_path / "parts").iterdir() if p.suffix == f".{parts}")
    assert names == [f"0000{i}.{parts}" for i in range(3)]
    assert search(model, tmp_path / "parts", image=photos / "11.png", top=1)[0].name == "11.png"
    found = read_embeddings(tmp_path / "parts")
    assert found.names == expected.names and (found.tokens is None) == (parts == "npy")


def test_parquet_is_a_plain_one(run, photos, tmp_path, expected):
    from pyarrow import parquet

    run(photos, "--out", tmp_path / "e.parquet", "--no-tokens")
    table = parquet.read_table(tmp_path / "e.parquet")
    assert table.column_names == ["name", "pooled"] and table["name"].to_pylist() == expected.names
    assert table["pooled"].to_pylist()[3] == expected.pooled[3].tolist() and table.schema.metadata[b"image_size"] == b"32"


def test_half_precision_and_other_options(run, photos, tmp_path, expected):
    run(photos, "--out", tmp_path / "h.npy", "--store", "float16", "--rows", "4")
    found = read_embeddings(tmp_path / "h.npy")
    assert found.pooled.dtype == torch.float16 and torch.equal(found.pooled, expected.pooled.half()) and found.tokens is None
    run(photos, "--out", tmp_path / "b.npy", "--dtype", "bfloat16")
    found = read_embeddings(tmp_path / "b.npy").pooled
    assert not torch.equal(found, expected.pooled)
    assert torch.cosine_similarity(found, expected.pooled).min() > 0.99


# ---- sources ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "set"
    files = sorted(photos.iterdir())
    write_shards(((file.stem, {"png": file.read_bytes(), "txt": b"a"}) for file in files), folder, samples_per_shard=10)
    return folder


def test_tar_shards(run, shards, tmp_path, expected):
    for number, given in enumerate((shards, shards / "*.tar", shards / "{00000..00002}.tar")):
        done = run(given, "--out", tmp_path / f"{number}.safetensors", "--rows", "6")
        found = read_embeddings(tmp_path / f"{number}.safetensors")
        assert torch.equal(found.pooled, expected.pooled) and done["images"] == 21
        assert found.names[0] == "00000.tar/00" and found.names[-1] == "00002.tar/22"
        assert set(found.skipped) == {"00000.tar/07", "00002.tar/20"}


def test_patterns_and_standard_input(run, photos, tmp_path, expected, monkeypatch):
    run(photos / "1*.png", "--out", tmp_path / "p.npz")
    assert read_embeddings(tmp_path / "p.npz").names == [f"1{i}.png" for i in range(10)]
    lines = "".join(f"{file}\n" for file in sorted(photos.iterdir())).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    run("-", "--out", tmp_path / "s.npz")
    assert torch.equal(read_embeddings(tmp_path / "s.npz").pooled, expected.pooled)


def test_what_is_found(photos, shards, tmp_path):
    assert isinstance(find([photos]), ImageFiles) and isinstance(find([shards]), Shards)
    assert len(find([photos])) == len(find([shards])) == 23
    with pytest.raises(ValueError, match="takes tar shards or images, not both"):
        find([photos, shards])
    with pytest.raises(FileNotFoundError, match=r"no file matches .*nothing\*.png"):
        find([photos / "nothing*.png"])
    with pytest.raises(ValueError, match="got no path"):
        find(["-"], [])
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="matches 1 files, none of which is an image"):
        find([tmp_path / "*.txt"])
    (tmp_path / "odd[1].png").write_bytes((photos / "01.png").read_bytes())
    assert find([tmp_path / "odd[1].png"]).names == ("odd[1].png",), "a file that is there is no pattern"


# ---- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["e.safetensors", "folder"])
def test_a_run_that_was_stopped_goes_on(run, model, model_folder, vae_folder, photos, tmp_path, expected, out):
    batches = []

    def fail(done, total):
        batches.append(done)
        if done >= 12:
            raise KeyboardInterrupt

    options = {"vae": str(vae_folder), "rows": 5, "batch_size": 5}
    with pytest.raises(KeyboardInterrupt):
        bulk.encode_many(model_folder, find([photos]), tmp_path / out, progress=fail, **options)
    assert not (tmp_path / "e.safetensors").exists()
    seen = []
    found = bulk.encode_many(
        model_folder, find([photos]), tmp_path / out, progress=lambda done, _: seen.append(done), **options
    )
    assert found.resumed == seen[0] == 10 and found.images == 21
    assert same(read_embeddings(tmp_path / out), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == [out]


def test_parts_of_another_job_are_not_taken(run, photos, tmp_path, expected):
    run(photos, "--out", tmp_path / "folder", "--rows", "8")
    again = run(photos, "--out", tmp_path / "folder", "--rows", "8")
    assert again["resumed"] == 23, "nothing was left to do"
    for options in (["--image-size", "64", "--rows", "8"], ["--rows", "4"], ["--rows", "8", "--store", "float16"]):
        with pytest.raises(AssertionError):
            run(photos, "--out", tmp_path / "folder", *options)
    os.utime(photos / "03.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("")
    job = _as_before(tmp_path / "folder", photos)
    for folder, words in (
        (tmp_path / "folder", r"another job \(its sources\)"),
        (tmp_path / "mine", "holds other files; name another"),
    ):
        with pytest.raises(FileExistsError, match=words):
            bulk._open(folder, *job)


def _as_before(folder, photos):
    words = json.loads((folder / "job.json").read_text())
    options = bulk.Options(
        **{k: words[k] for k in ("image_size", "interpolation", "tokens", "max_image_pixels", "batch_invariant")}
    )
    plan = bulk.Plan(
        *(words[k] for k in ("model", "vae", "device", "dtype")), options, words["store"], words["rows"], words["suffix"]
    )
    return plan, find([photos]), False


@pytest.mark.full
def test_processes_share_the_work(run, photos, tmp_path, expected):
    done = run(photos, "--out", tmp_path / "e.safetensors", "--rows", "6", "--processes", "2")
    assert done["images"] == 21 and same(read_embeddings(tmp_path / "e.safetensors"), expected)


@pytest.mark.full
def test_a_killed_run_goes_on_and_leaves_no_process(model_folder, vae_folder, photos, tmp_path, expected):
    out = tmp_path / "e.parquet"
    command = [sys.executable, "-m", "ov3fast", "encode", str(model_folder), str(photos), "--vae", str(vae_folder)]
    command += ["--out", str(out), "--rows", "2", "--batch-size", "1", "--processes", "2", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    parts = tmp_path / ".e.parquet.parts"
    end = time.monotonic() + 120
    while len(list(parts.glob("0*"))) < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 20
    while (left := _in_session(process.pid)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left, "its workers outlived it"
    assert not out.exists() and len(list(parts.glob("0*"))) >= 2
    done = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert done["images"] == 21 and done["resumed"] >= 4 and same(read_embeddings(out), expected) and not parts.exists()


def _in_session(session: int) -> list[str]:
    found = subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True, text=True)
    return [pid for pid in found.stdout.split() if pid != str(session)]


@pytest.mark.full
def test_a_worker_that_is_killed_ends_the_run_by_name(model_folder, vae_folder, photos, tmp_path):
    killed = []

    def kill(done, total):
        import multiprocessing

        if done and not killed:
            [worker, *_] = multiprocessing.active_children()
            killed.append(worker.pid)
            worker.kill()

    with pytest.raises(RuntimeError, match="ended with code -9; finished parts are kept"):
        bulk.encode_many(
            model_folder, find([photos]), tmp_path / "e.npz", vae=str(vae_folder), rows=2, processes=2, progress=kill
        )


def test_errors(model_folder, vae_folder, photos, tmp_path):
    sources = find([photos / "07.png", photos / "20.png"])
    with pytest.raises(DataError, match=r"none of the 2 images could be read \(1 broken_image, 1 truncated_image\)"):
        bulk.encode_many(model_folder, sources, tmp_path / "x.npz", vae=str(vae_folder), rows=1)
    assert list(tmp_path.iterdir()) == []
    for options, words in (
        ({"processes": 0}, "processes must be at least 1, got 0"), ({"rows": 0}, "rows must be at least 1"),
        ({"store": "int8"}, "store must be float32 or float16"), ({"parts": ".txt"}, "parts must be one of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            bulk.encode_many(model_folder, sources, tmp_path / "x", **options)
    with pytest.raises(ValueError, match="out must end in .*, or be a folder"):
        bulk.encode_many(model_folder, sources, tmp_path / "x.csv")


@pytest.mark.full
def test_what_a_process_meets_is_one_line(photos, tmp_path, capsys):
    assert cli.main(["encode", "/nowhere", str(photos), "--out", str(tmp_path / "f"), "--processes", "2", "--rows", "3"]) == 2
    err = capsys.readouterr().err
    assert "/nowhere" in err and len(err.splitlines()) == 1


def test_names_that_are_not_utf_8(run, photos, tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write((photos / "01.png").read_bytes())
    run(tmp_path, "--out", tmp_path / "e.parquet", "--rows", "2")
    assert read_embeddings(tmp_path / "e.parquet").names == ["caf\\udce9.png"]
    assert Image.open(photos / "01.png").size == (41, 50)
