"""Encode a folder of images, then find each image's nearest neighbour.

    python examples/encode_folder.py runs/demo/model photos/ vectors.safetensors

The file contains pooled vectors [N, E] and tokens [N, T, D]. Unreadable images are skipped and listed.
"""

import sys

import torch.nn.functional as F

from ov3fast.inference import encode_to_file, load_model, read_embeddings


def main(model: str, folder: str, out: str) -> None:
    written = encode_to_file(load_model(model), folder, out)
    for name, reason in written.skipped.items():
        print(f"skipped {name}: {reason}")

    found = read_embeddings(out)
    vectors = F.normalize(found.pooled, dim=-1)
    scores = (vectors @ vectors.T).fill_diagonal_(-1)
    for name, neighbour in zip(found.names, scores.argmax(1).tolist(), strict=True):
        print(f"{name}: nearest is {found.names[neighbour]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
