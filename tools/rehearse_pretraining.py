"""The paper's run rehearsed at tiny size, from a web-crawled set to an exported model.

    python tools/rehearse_pretraining.py OUT [--demo FOLDER] [--samples 96] [--ranks 2 3]

The demo set of `ov3fast data demo` becomes what a run on Recap-DataComp-1B has: tars as img2dataset lays them out and recaptions in parquet,
joined by sha256, and indexed. `train --recipe base` then runs both of its stages, small, under torchrun with FSDP2; in the second stage one process is
killed; the run resumes on another number of processes, and its checkpoint is verified, exported and loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

STEPS = (3, 4)
TINY = {"width": 32, "depth": 2, "heads": 2, "mlp_dim": 64}


def lay_out(demo: Path, out: Path, samples: int, per_tar: int = 40) -> Path:
    """Tars and parquet as img2dataset writes them, and the recaptions: recaptions/0.parquet with key, sha256, url, re_caption and org_caption."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ov3fast.data import ShardDataset

    dataset = ShardDataset(demo)
    shards, rows = out / "shards", []
    shards.mkdir(parents=True)
    for first in range(0, min(samples, len(dataset)), per_tar):
        number, mine = first // per_tar, []
        with tarfile.open(shards / f"{number:05d}.tar", "w") as tar:
            for i in range(first, min(first + per_tar, samples, len(dataset))):
                sample, key = dataset[i], f"{number:05d}{i - first:04d}"
                jpeg, text = _jpeg(sample.image), sample.captions["name"]
                record = {
                    "caption": text, "url": f"https://example.org/{i}.jpg", "key": key, "status": "success", "error_message": None,
                    "width": sample.image.width, "height": sample.image.height, "sha256": hashlib.sha256(jpeg).hexdigest(), "exif": "{}",
                }  # fmt: skip
                for suffix, content in (("jpg", jpeg), ("json", json.dumps(record).encode()), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                mine.append(record)
                recaption = f"The picture shows {sample.captions['caption']}, in some detail."
                rows.append(
                    {name: record[name] for name in ("key", "sha256", "url")} | {"re_caption": recaption, "org_caption": text}
                )
        pq.write_table(pa.Table.from_pylist(mine), shards / f"{number:05d}.parquet")
        (shards / f"{number:05d}_stats.json").write_text(json.dumps({"count": len(mine), "successes": len(mine)}))
    (out / "recaptions").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), out / "recaptions" / "0.parquet")
    return shards


def _jpeg(image) -> bytes:
    from PIL import Image

    page, file = Image.new("RGB", image.size, "white"), io.BytesIO()
    page.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    page.save(file, "JPEG", quality=90)
    return file.getvalue()


def lpips_files(out: Path) -> list[str]:
    """Flags for LPIPS on random weights, in place of VGG-16's, which no package carries."""
    import torch

    from ov3fast.models.perceptual import LPIPS

    torch.manual_seed(0)
    network = LPIPS("squeezenet")
    torch.save({f"features.{name}": value for name, value in network.features.state_dict().items()}, out / "squeezenet.pth")
    torch.save(
        {f"lin{i}.model.1.weight": head.data.abs().view(1, -1, 1, 1) for i, head in enumerate(network.heads)}, out / "heads.pth"
    )
    return [
        "--lpips.backbone",
        "squeezenet",
        "--lpips.weights",
        str(out / "squeezenet.pth"),
        "--lpips.heads",
        str(out / "heads.pth"),
    ]


def flags(shards: Path, out: Path) -> list[str]:
    """`train --recipe base`, small enough for any machine."""
    towers = {
        f"--model.{part}.{name}": value for part in ("vision", "decoder", "text", "caption") for name, value in TINY.items()
    }
    given = {
        **{name.replace("_", "-"): value for name, value in towers.items()},
        "--model.vision.embed-dim": 16, "--vae": "small",
        "--data.sources.0.path": shards, "--data.workers": 1,
        "--stages.0.image-size": 32, "--stages.0.batch-size": 12, "--stages.0.epochs": None, "--stages.0.steps": STEPS[0],
        "--stages.0.warmup-epochs": None, "--stages.0.warmup-steps": 1,
        "--stages.1.image-size": 64, "--stages.1.batch-size": 12, "--stages.1.epochs": None, "--stages.1.steps": STEPS[1],
        "--stages.1.warmup-epochs": None, "--stages.1.warmup-steps": 1,
        "--parallel": "fsdp", "--checkpoint-steps": 1, "--log-every": 1, "--run-dir": out / "run", "--device": "cpu",
    }  # fmt: skip
    return [*(str(word) for pair in given.items() for word in pair), "--no-compile", *lpips_files(out), "--resume"]


def torchrun(ranks: int, arguments: list[str]) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "-m",
        "ov3fast.cli",
        "train",
    ]
    return subprocess.Popen(
        [*command, "--recipe", "base", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return sorted(found)


def rehearse(out: Path, demo: Path, samples: int = 96, ranks: tuple[int, int] = (2, 3)) -> dict:
    """Every step of it; returns the finished run's summary. Raises where a step fails."""
    from ov3fast import OpenVision3, cli
    from ov3fast.data import index_shards, join_captions
    from ov3fast.training.logs import read_rows

    out.mkdir(parents=True, exist_ok=True)
    shards = lay_out(demo, out, samples)
    print(join_captions(shards, out / "recaptions"))
    index_shards(shards, workers=1)
    arguments, log = flags(shards, out), out / "run" / "log.jsonl"

    first = torchrun(ranks[0], arguments)
    while len(read_rows(log)) <= STEPS[0]:
        if first.poll() is not None:
            raise RuntimeError(first.communicate()[0])
        time.sleep(0.05)
    os.kill(children(first.pid)[-1], signal.SIGKILL)
    text = first.communicate()[0]
    if (out / "run" / "summary.json").exists() or first.returncode == 0:
        raise RuntimeError(f"the run was over before a process was killed: {text}")
    print(f"{ranks[0]} processes, one killed after step {read_rows(log)[-1]['step']}")

    second = torchrun(ranks[1], arguments)
    text = second.communicate()[0]
    if second.returncode:
        raise RuntimeError(text)
    print(text)
    for command in (["verify", str(out / "run")], ["export", str(out / "run"), "--out", str(out / "model")]):
        if cli.main(["checkpoint", *command]):
            raise RuntimeError(f"ov3fast checkpoint {command[0]} failed")
    model = OpenVision3.from_pretrained(out / "model", vae="small")
    pooled, tokens = model.encode(_picture(shards))
    print(
        f"exported: {sum(p.numel() for p in model.parameters()):,} parameters, tokens {tuple(tokens.shape)}, pooled {tuple(pooled.shape)}"
    )
    return json.loads((out / "run" / "summary.json").read_text())


def _picture(shards: Path):
    from ov3fast.data import ShardDataset

    return ShardDataset(shards)[0].image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--demo", type=Path, help="shards; default: pairs-train of the demo set")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--ranks", type=int, nargs=2, default=(2, 3), help="processes before and after the kill")
    given = parser.parse_args()
    from ov3fast.data.store import resolve

    rehearse(given.out, given.demo or Path(resolve("demo:pairs-train")), given.samples, tuple(given.ranks))


if __name__ == "__main__":
    main()
