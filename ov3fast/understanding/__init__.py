"""Understanding as LLaVA measures it: a language model that reads a frozen tower's tokens.

towers.py         OpenVision 3, CLIP and SigLIP behind one call
conversations.py  LLaVA's JSON formats, templates, and which tokens carry loss
batches.py        rows of conversations: padded, or packed
model.py          projector and language model; lora.py: low-rank updates of the latter
training.py       stages with exact resume; saved.py: what a run leaves, and its answers
benchmarks/       POPE, GQA, SEED-Bench, MME and ScienceQA from local folders
demo.py           the demo: questions on pictures that were held out (questions.py), against a control that doesn't see them
"""
