"""The examples do what their docstrings say."""

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "examples"


def example(name: str, folder: Path = FOLDER):
    spec = importlib.util.spec_from_file_location(f"example_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def png(seed: int) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    colour = torch.randint(0, 255, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    Image.new("RGB", (72, 64), tuple(colour)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A model trained by train_on_tars for two steps."""
    from ov3fast.data.shards import write_shards

    folder = tmp_path_factory.mktemp("trained")
    write_shards(((f"{i:02d}", {"png": png(i), "txt": f"picture {i}".encode()}) for i in range(8)), folder / "shards")
    return example("train_on_tars").main(f"{folder}/shards/*.tar", f"{folder}/run", steps=2, batch_size=4)


def test_train_on_tars(trained):
    assert (trained / "config.json").exists() and (trained / "model.safetensors").exists()


def test_encode_folder(trained, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").write_bytes(png(number))
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    example("encode_folder").main(str(trained), str(tmp_path / "photos"), str(tmp_path / "out.safetensors"))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("skipped broken.png") for line in lines)
    assert sum(": nearest is " in line for line in lines) == 3


def test_swap_operator():
    assert example("swap_operator").main() < 1e-6


def test_write_backend():
    """In a separate process, since it adds to the list of backends."""
    example("write_backend")
    command = [sys.executable, "-W", "ignore", str(FOLDER / "write_backend.py")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(FOLDER.parent)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'mine': 'ready'" in done.stdout and "within the error budget" in done.stdout


def test_load_released_tower():
    assert example("load_released_tower").main() == ((2, 40), (2, 16, 48))


def test_every_example_is_tried_here():
    source = Path(__file__).read_text(encoding="utf-8")
    for path in FOLDER.glob("*.py"):
        assert f'example("{path.stem}")' in source, f"{path.name} has no test"


def test_the_pictures_script(trained, tmp_path):
    from PIL import Image

    from ov3fast.evaluation.evaluate import sources_of
    from ov3fast.inference import load_model

    script = example("readme_picture", FOLDER.parent / "tools")
    out, readme = tmp_path / "docs" / "demo.jpg", tmp_path / "README.md"
    script.save(script.draw(load_model(trained), sources_of(trained.parents[1] / "shards")), out)
    with Image.open(out) as image:
        assert image.height == script.GAP + (2 + script.QUERIES) * (script.CELL + script.GAP)
    readme.write_text(f"before\n\n{script.MARK}\n\nafter\n")
    script.show(readme, out)
    once = readme.read_text()
    script.show(readme, out)
    assert readme.read_text() == once and "(docs/demo.jpg)" in once
    assert script.MARK in (FOLDER.parent / "README.md").read_text(encoding="utf-8")
