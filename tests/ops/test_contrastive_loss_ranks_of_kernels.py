"""The contrastive loss over two gloo ranks by the Triton kernels, in the interpreter, against one process."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist

from ov3fast import testing
from ov3fast.ops import triton
from ov3fast.ops.contrastive_loss import contrastive_loss, reference

pytestmark = pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")

SIZES = (21, 19)
EXCHANGES = ("gather", "ring")


def inputs(kind):
    """The first rank's texts are like their images, so that the ranks' rows and columns differ."""
    image, noise = testing.make(sum(SIZES), 16).float(), testing.make(sum(SIZES), 16, seed=1).float()
    likeness = torch.where(torch.arange(sum(SIZES)) < SIZES[0], 1.5, 0.3)[:, None]
    return image, likeness * image + noise, torch.tensor(10.0), *([torch.tensor(-3.0)] if kind == "sigmoid" else [])


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """(kind, exchange) -> the loss of all pairs and its gradients."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, str(folder))) for rank in range(len(SIZES))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
        process.kill()
    told = [torch.load(folder / f"{rank}.pt") for rank in range(len(SIZES))]
    return {
        case: [
            sum(told_of) / len(SIZES) if told_of[0].ndim == 0 else torch.cat(told_of) / len(SIZES)
            for told_of in zip(*(rank[case] for rank in told), strict=True)
        ]
        for case in told[0]
    }


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(SIZES))
    found = {}
    for kind in ("softmax", "sigmoid"):
        for exchange in EXCHANGES:
            image, text, *scalars = inputs(kind)
            features = [side.split(SIZES)[rank].clone() for side in (image, text)]
            leaves = [leaf.requires_grad_() for leaf in (*features, *scalars)]
            bias = leaves[3] if kind == "sigmoid" else None
            loss = contrastive_loss(
                *leaves[:3], kind=kind, logit_bias=bias, group=dist.group.WORLD, exchange=exchange, impl="triton"
            )
            found[kind, exchange] = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_ranks(gradients, kind, exchange):
    def plainly(values):
        leaves = [value.detach().requires_grad_() for value in values]
        loss = reference(*leaves[:3], kind=kind, logit_bias=leaves[3] if kind == "sigmoid" else None)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    testing.Budget(plainly, inputs(kind)).check(gradients[kind, exchange])
