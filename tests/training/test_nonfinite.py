import json

import pytest
import torch

from ov3fast import ops
from ov3fast.training import NonFiniteError, latents, train
from ov3fast.training.logs import read_rows
from ov3fast.training.optimizer import AdamW


def updates(monkeypatch):
    """The steps whose update has started."""
    begun, update = [], ops.adamw_ema_

    def counted(*arguments, step, **options):
        begun.append(step)
        return update(*arguments, step=step, **options)

    monkeypatch.setattr(ops, "adamw_ema_", counted)
    return begun


def test_a_poisoned_sample_is_named_before_any_update(tiny, data, tmp_path, monkeypatch):
    fill = latents.fill

    def poisoned(*arguments):
        cache = fill(*arguments)
        cache.values[48 + 5] = torch.nan  # photo-05: the photos follow 48 pictures
        return cache

    monkeypatch.setattr(latents, "fill", poisoned)
    begun = updates(monkeypatch)
    with pytest.raises(NonFiniteError) as error:
        train(tiny.recipe(data, tmp_path))
    message = str(error.value)
    assert "\n" not in message and "latent" in message and "samples at fault: photo-05;" in message
    (path,) = tmp_path.glob("non-finite-*.json")
    record = json.loads(path.read_text())
    assert str(path) in message and record["suspects"] == ["photo-05"] and "latent" in record["terms"]
    assert len(record["samples"]) == 24 and "photo-05" in record["samples"]
    # 16 photos, 8 a step: it comes in the first two steps.
    assert begun == list(range(1, record["step"] + 1))
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == begun


def test_a_gradient_that_is_not_finite(tiny, data, tmp_path, monkeypatch):
    begun, seen = updates(monkeypatch), {}
    step = AdamW.step

    def poisoned(self, closure=None):
        if self.steps == 2:
            next(iter(self.parameters.values())).grad.fill_(torch.nan)
        seen["before"] = [p.detach().clone() for p in [*self.parameters.values(), *self.ema.values(), *self.moments().values()]]
        result = step(self, closure)
        seen["after"] = [p.detach().clone() for p in [*self.parameters.values(), *self.ema.values(), *self.moments().values()]]
        return result

    monkeypatch.setattr(AdamW, "step", poisoned)
    with pytest.raises(
        NonFiniteError, match="step 2 of stage s0: gradient norm is not finite; in the batch of .* no weight was changed"
    ):
        train(tiny.recipe(data, tmp_path))
    assert begun == [1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(seen["before"], seen["after"], strict=True))
