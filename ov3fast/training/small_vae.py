"""Trains the small VAE that the package ships: diffusers' AutoencoderKL, 16 channels, 8x, few feature maps.

    python -m ov3fast.training.small_vae --minutes 45 --out runs/small_vae

It stands in for the FLUX.1 VAE where that one can't be downloaded: the same class, the same latent shape, the same
interface, 2.8 M parameters in place of 84 M. Data: gcompris' photos and Tux Paint's cut-out photos on plain backgrounds.
scikit-image's and foolbox's photos are held out and only measured. Writes config.json, the weights in float16
(safetensors, 5.5 MB) and a card with the command and the metrics.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class SmallVAEConfig:
    out: Path = Path("runs/small_vae")
    """Folder for config.json, the weights and the card."""
    init: Path | None = None
    """Folder of a small VAE to go on from; None: start from random weights."""
    minutes: float = 45.0
    """Wall time of training; the learning rate follows a cosine over it."""
    batch: int = 16
    size: int = 64
    """Side of the training crops in pixels."""
    lr: float = 2e-3
    kl_weight: float = 2e-4
    """Weight of the mean KL per latent element: keeps the latents near unit scale and the decoder robust to small errors."""
    ema: float = 0.995
    seed: int = 0
    cache_dir: Path | None = None


def build() -> torch.nn.Module:
    """An untrained small VAE: images [B,3,H,W] in [-1,1] <-> latents [B,16,H/8,W/8]."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,
    )


def train(config: SmallVAEConfig) -> dict[str, float]:
    """Trains, measures and writes the VAE; returns its held-out metrics."""
    torch.manual_seed(config.seed)
    draw = random.Random(config.seed)
    photos, stamps = _training_pictures(config.cache_dir)
    held_out = _held_out_photos(config.cache_dir)
    print(f"{len(photos)} photos and {len(stamps)} cut-outs to train on, {len(held_out)} photos held out", flush=True)
    model = (build() if config.init is None else type(build()).from_pretrained(config.init)).float()
    model = model.to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=1e-4)
    start, step, last_report = time.monotonic(), 0, 0.0
    while (elapsed := (time.monotonic() - start) / 60) < config.minutes:
        progress = elapsed / config.minutes
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        batch = torch.stack([_crop(_picture(photos, stamps, draw), config.size, draw) for _ in range(config.batch)])
        batch = batch.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(batch).latent_dist
            output = model.decode(posterior.sample()).sample
        difference = output.float() - batch
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = difference.abs().mean() + 5 * difference.square().mean() + config.kl_weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step < 300 and config.init is None:  # an average that still contains the random initial weights would be useless
            average.module.load_state_dict(model.state_dict())
        else:
            average.update_parameters(model)
        step += 1
        if elapsed - last_report > 2:
            last_report = elapsed
            print(f"step {step} at {elapsed:.1f} min: loss {loss.item():.4f}, kl {kl.item():.2f}, "
                  f"held-out {_psnr(average.module, held_out):.2f} dB", flush=True)  # fmt: skip
            _write(average.module, config, photos, {"steps": step, "psnr_128": _psnr(average.module, held_out)})
    metrics = {"steps": step, "psnr_128": _psnr(average.module, held_out)}
    _write(average.module, config, photos, metrics)
    return metrics


def _training_pictures(cache_dir: Path | None) -> tuple[list[Image.Image], list[Image.Image]]:
    from ov3fast.data.assets import fetch
    from ov3fast.data.demo.sources import gcompris_photos, tuxpaint_stamps

    photos = []
    for _, image in gcompris_photos(fetch("gcompris", cache_dir)):
        image = image.convert("RGB")
        image.thumbnail((512, 512), Image.Resampling.BICUBIC)
        photos.append(image)
    stamps = [image.convert("RGBA") for _, _, image in tuxpaint_stamps(fetch("tuxpaint", cache_dir)) if min(image.size) >= 64]
    return photos, stamps


def _held_out_photos(cache_dir: Path | None) -> Tensor:
    """[N,3,128,128] in [-1,1]: short side resized to 128 px, centre crop."""
    from ov3fast.data.assets import fetch
    from ov3fast.data.demo.sources import foolbox_photos, skimage_photos

    images = [*skimage_photos(fetch("skimage", cache_dir)), *foolbox_photos(fetch("foolbox", cache_dir))]
    return torch.stack([_centre(image.convert("RGB"), 128) for _, image in images])


def _picture(photos: list[Image.Image], stamps: list[Image.Image], draw: random.Random) -> Image.Image:
    if draw.random() < 0.7:
        return draw.choice(photos)
    stamp = draw.choice(stamps)
    plain = Image.new("RGB", stamp.size, tuple(draw.randrange(256) for _ in range(3)))
    plain.paste(stamp, mask=stamp)
    return plain


def _crop(image: Image.Image, size: int, draw: random.Random) -> Tensor:
    """A square crop, at most 4 times as large as `size`, resized to it and perhaps mirrored."""
    shortest = min(image.size)
    side = min(shortest, round(size * 2 ** draw.uniform(0, 2)))
    left, top = draw.randint(0, image.width - side), draw.randint(0, image.height - side)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side), reducing_gap=2)
    return _tensor(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else image)


def _centre(image: Image.Image, size: int) -> Tensor:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return _tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def _psnr(model: torch.nn.Module, images: Tensor) -> float:
    """Mean over images of the PSNR in dB on [0,1] after rounding to 8 bits; float32."""
    output = torch.cat([model.decode(model.encode(part).latent_dist.mode()).sample for part in images.split(8)])
    to_bytes = lambda x: ((x.clamp(-1, 1) + 1) * 127.5).round() / 255  # noqa: E731
    mse = (to_bytes(output) - to_bytes(images)).square().mean(dim=(1, 2, 3))
    return float((-10 * mse.log10()).mean())


@torch.no_grad()
def _write(model: torch.nn.Module, config: SmallVAEConfig, photos: list[Image.Image], metrics: dict[str, float]) -> None:
    """Sets the latent scale from the training photos, then saves folder and card."""
    images = torch.stack([_centre(photo, 128) for photo in photos[::4]])
    means = torch.cat([model.encode(part).latent_dist.mean for part in images.split(8)])
    model.register_to_config(scaling_factor=round(1 / float(means.std()), 4), shift_factor=round(float(means.mean()), 4))
    half = type(model).from_config(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.float16).save_pretrained(config.out)
    (config.out / "README.md").write_text(
        CARD.format(command=f"python -m ov3fast.training.small_vae --minutes {config.minutes:g}", **metrics)
    )


def _command(config: SmallVAEConfig) -> str:
    start = "" if config.init is None else f" --init {config.init.name}"
    return f"python -m ov3fast.training.small_vae{start} --lr {config.lr:g} --seed {config.seed} --minutes {config.minutes:g}"


CARD = """# Small VAE

diffusers' AutoencoderKL with 16 latent channels, 8x downsampling and (16, 32, 64, 128) feature maps: 2.8 M parameters,
stored in float16. It stands in for the FLUX.1 VAE where that one can't be downloaded; its latents are its own.

- Data: the photos of gcompris-qt-data (GPL-3+ as a whole; mostly CC-BY-SA, CC0 and public domain) and the cut-out photos of
  tuxpaint-stamps-default (GPL-2) on plain backgrounds, random 64 px crops.
- Command: `{command}` ({steps} steps of 16 crops on 2 CPU cores)
- Held-out photos (scikit-image and foolbox, never trained on), short side resized to 128 px, centre crop, mean of per-image PSNR
  after rounding to 8 bits: {psnr_128:.2f} dB
"""

if __name__ == "__main__":
    import tyro

    print(train(tyro.cli(SmallVAEConfig)))
