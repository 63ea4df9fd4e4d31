"""lmms-eval's class; imported by lmms-eval alone."""

from __future__ import annotations

from typing import Any

from lmms_eval.api.model import lmms

from ov3fast.interop.lmms_eval import replies
from ov3fast.understanding.saved import Answerer


class OV3Fast(lmms):
    """pretrained: the run or its model folder. One process."""

    is_simple = True

    def __init__(
        self,
        pretrained: str = "runs/understand-demo",
        device: str = "cpu",
        batch_size: int | str = 16,
        tower: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if kwargs:
            raise ValueError(
                f"ov3fast: model_args has {', '.join(kwargs)}; it takes pretrained, device, batch_size, tower, trust_remote_code"
            )
        self.answerer = Answerer.load(pretrained, tower=tower, device=device, trust_remote_code=trust_remote_code)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Any]) -> list[str]:
        return replies(self.answerer, requests, self.task_dict, self.batch_size)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("ov3fast: answers questions; tasks that compare likelihoods are not supported")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("ov3fast: answers one question at a time")
