"""Doors to other libraries: one set of weights, the same tokens through each.

transformers.py   AutoModel, AutoConfig, AutoImageProcessor, AutoProcessor; a vision tower for transformers' Llava classes
diffusers.py      an autoencoder beside AutoencoderKL and AutoencoderRAE, and its exact statistics
rae.py            RAE's stage-1 protocol
llava.py          the towers of the LLaVA and LLaVA-NeXT repositories
open_clip.py      create_model_and_transforms, encode_image, encode_text, tokenizer
timm.py           forward_features, forward_intermediates and their kin
sentence_transformers.py   encode(list) for images and texts

Each file imports its library, where it needs one, when it is imported, and none is imported by `import ov3fast`.
"""
