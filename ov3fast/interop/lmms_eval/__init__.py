"""The door to lmms-eval: a run of `ov3fast train --recipe understand-...` as its model `ov3fast`.

    lmms-eval --model ov3fast --model_args pretrained=runs/understand-base --tasks pope,gqa,mme,seedbench,scienceqa_img --batch_size 16

Where lmms-eval (0.7 or later) is installed beside ov3fast, it finds `manifest` by the entry point `lmms_eval.models`.
"""

from __future__ import annotations

from typing import Any

from ov3fast.understanding.saved import Answerer


def manifest() -> Any:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="ov3fast", simple_class_path="ov3fast.interop.lmms_eval.model.OV3Fast")


def replies(answerer: Answerer, requests: list[Any], task_dict: Any, batch_size: int) -> list[str]:
    """The text for each request; its args are (prompt, generation's options, doc_to_visual, number, task, split).

    ValueError for more than one image. A reply ends before the first of `until`.
    """
    texts: list[str] = []
    for start in range(0, len(requests), batch_size):
        part = [request.args for request in requests[start : start + batch_size]]
        images, longest = [], 1
        for prompt, options, doc_to_visual, number, task, split in part:
            seen = list(doc_to_visual(task_dict[task][split][number]) or [])
            if len(seen) > 1:
                raise ValueError(f"ov3fast: takes one image a question, {task} has {len(seen)} for {prompt[:60]!r}")
            images.append(seen[0] if seen else None)
            longest = max(longest, int(options.get("max_new_tokens", 32)))
        prompts = [prompt.replace("<image>", "").strip() for prompt, *_ in part]
        found = answerer.answer(images, prompts, max_new_tokens=longest, batch_size=batch_size)
        for text, (_, options, *_) in zip(found, part, strict=True):
            until = options.get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
    return texts
