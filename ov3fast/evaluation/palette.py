"""Images for a page: uint8 tensors -> PNG data, and error maps in colour."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor

ERROR_RANGE = 0.25
"""Error, as a fraction of the full range, with the brightest colour; the same on every map, so that maps are comparable."""

# Black over purple and orange to pale yellow, of steadily rising lightness.
_STOPS = (
    (0, 0, 4),
    (40, 11, 84),
    (101, 21, 110),
    (159, 42, 99),
    (212, 72, 66),
    (245, 125, 21),
    (250, 193, 39),
    (252, 255, 164),
)


def error_map(images: Tensor, reference: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] pairs -> uint8 [..., 3, H, W]: the mean absolute error over the channels, in colour."""
    error = (images.float() - reference.float()).abs().mean(dim=-3) / 255
    place = (error / ERROR_RANGE).clamp(0, 1) * (len(_STOPS) - 1)
    stops = torch.tensor(_STOPS, dtype=torch.float32, device=images.device)
    low = place.floor().long().clamp(max=len(_STOPS) - 2)
    colours = torch.lerp(stops[low], stops[low + 1], (place - low)[..., None])
    return colours.round().to(torch.uint8).movedim(-1, -3)


def scale_css() -> str:
    """The error map's colours as a CSS gradient, from no error to ERROR_RANGE."""
    return "linear-gradient(90deg," + ",".join(f"rgb({r},{g},{b})" for r, g, b in _STOPS) + ")"


def png_data(image: Tensor) -> str:
    """uint8 [3, H, W] -> a data: URL with a PNG; the same pixels give the same text."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
