"""Using a trained model on files: images to embeddings, images to their reconstructions."""

from ov3fast.inference.embeddings import Embeddings, read_embeddings, write_embeddings
from ov3fast.inference.encode import encode
from ov3fast.inference.images import IMAGE_SUFFIXES, find_images, read_image
from ov3fast.inference.load import VisionTower, load_model
from ov3fast.inference.reconstruct import Reconstructed, reconstruct_file, reconstruct_image

__all__ = [
    "IMAGE_SUFFIXES",
    "Embeddings",
    "Reconstructed",
    "VisionTower",
    "encode",
    "find_images",
    "load_model",
    "read_embeddings",
    "read_image",
    "reconstruct_file",
    "reconstruct_image",
    "write_embeddings",
]
