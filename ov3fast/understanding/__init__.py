"""Visual understanding in the LLaVA setup: a language model reads the tokens of a frozen vision tower.

towers.py         OpenVision 3, CLIP and SigLIP behind a common interface
conversations.py  LLaVA's JSON formats, prompt templates and the loss mask
batches.py        batches of conversations, padded or packed
model.py          projector and language model; lora.py: LoRA for the language model
training.py       multi-stage training with exact resume; saved.py: saved models and inference
benchmarks/       POPE, GQA, SEED-Bench, MME and ScienceQA from local folders
demo.py           the demo: questions about held-out pictures (questions.py), compared with a control that sees no images
"""
