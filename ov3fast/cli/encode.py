"""ov3fast encode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ov3fast.cli.options import ImagesOptions, parse


@dataclass(kw_only=True)
class Encode(ImagesOptions):
    """Images to pooled vectors and tokens. MODEL may be the folder of a released vision tower too (open_clip_config.json)."""

    out: Path
    """File to write: .safetensors (pooled and tokens), or .npy (pooled alone) or .npz."""


def run(arguments: list[str]) -> int:
    given = parse(Encode, arguments, "encode")
    from ov3fast.data.skips import printable
    from ov3fast.inference import check_output, encode_to_file, load_model

    check_output(given.out, "--out")
    model = load_model(given.model, vae=given.vae, device=given.device)
    written = encode_to_file(
        model, given.images, given.out, image_size=given.image_size, batch_size=given.batch_size, workers=given.workers, progress=True
    )  # fmt: skip
    for name, reason in written.skipped.items():
        print(f"skipped {printable(name)}: {reason}")
    print(f"{len(written.names)} images -> {written.path}")
    return 0
