import copy

import pytest
import torch
from torch import nn

from ov3fast.recipes import OptimizerConfig
from ov3fast.training.optimizer import AdamW, decayed


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.pos_embed = nn.Parameter(torch.randn(3, 4))
        self.linear = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Linear(2, 2)

    def forward(self, ids):
        return self.norm(self.linear(self.embed(ids) + self.pos_embed)) * self.scale


def test_only_linear_weights_decay():
    assert decayed(Toy()) == {"linear.weight", "unused.weight"}


@pytest.mark.parametrize("clip_norm", [None, 0.05, 1e6])
def test_steps_equal_torchs_adamw_with_clipping_and_an_average(clip_norm):
    torch.manual_seed(0)
    ours = Toy()
    theirs = copy.deepcopy(ours)
    average = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    config = OptimizerConfig(betas=(0.8, 0.9), eps=1e-8, weight_decay=0.3, clip_norm=clip_norm, ema_decay=0.6)
    optimizer = AdamW(ours, config)
    names = decayed(theirs)
    reference = torch.optim.AdamW(
        [
            {"params": [p for n, p in theirs.named_parameters() if n in names], "weight_decay": 0.3},
            {"params": [p for n, p in theirs.named_parameters() if n not in names], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.9),
    )
    for step, lr in enumerate((1e-2, 2e-2, 5e-3)):
        ids, target = torch.randint(5, (7, 3)), torch.randn(7, 3, 6)
        for model in (ours, theirs):
            for parameter in model.parameters():
                parameter.grad = None
            (model(ids) - target).square().sum().backward()
        optimizer.set_lr(lr)
        optimizer.step()
        norm = optimizer.grad_norm
        for group in reference.param_groups:
            group["lr"] = lr
        parameters = [p for p in theirs.parameters() if p.grad is not None]
        expected = nn.utils.clip_grad_norm_(parameters, clip_norm or 1e30)
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
        reference.step()
        decay = min(0.6, (2 + step) / (11 + step))
        for name, parameter in theirs.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - decay)
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(ours.get_parameter(name), parameter, atol=1e-6), name
        assert torch.allclose(optimizer.ema[name], average[name], atol=1e-6), name


def test_state_round_trip_names_what_is_missing():
    model = Toy()
    optimizer = AdamW(model, OptimizerConfig(ema_decay=0.9))
    model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    other = AdamW(Toy(), OptimizerConfig(ema_decay=0.9))
    other.load(optimizer.moments(), optimizer.ema, optimizer.steps)
    assert other.steps == 1
    for name, value in optimizer.moments().items():
        assert torch.equal(other.moments()[name], value)
    moments = dict(optimizer.moments())
    del moments["exp_avg.scale"]
    with pytest.raises(ValueError, match="optimizer: exp_avg.scale is missing from the checkpoint"):
        other.load(moments, optimizer.ema, 1)
