"""Inference with a trained model: embeddings, captions and reconstructions of images, search, and faster copies of models."""

from ov3fast.data.images import IMAGE_SUFFIXES
from ov3fast.data.preprocess import preprocess, read_image
from ov3fast.inference.caption import Captioned, caption
from ov3fast.inference.embeddings import Embeddings, check_output, read_embeddings, write_embeddings
from ov3fast.inference.encode import Written, encode, encode_to_file
from ov3fast.inference.images import find_images
from ov3fast.inference.load import VisionTower, load_model
from ov3fast.inference.reconstruct import FileResult, Reconstructed, reconstruct_file, reconstruct_files, reconstruct_image

__all__ = [
    "IMAGE_SUFFIXES",
    "Captioned",
    "Embeddings",
    "FileResult",
    "Reconstructed",
    "VisionTower",
    "Written",
    "caption",
    "check_output",
    "encode",
    "encode_to_file",
    "find_images",
    "load_model",
    "read_embeddings",
    "preprocess",
    "read_image",
    "reconstruct_file",
    "reconstruct_files",
    "reconstruct_image",
    "write_embeddings",
]
