"""The contrastive loss over 1, 2, 3 and 4 gloo ranks against one process, in float64: four processes, started once."""

import functools
import multiprocessing
import os
import time
import weakref

import pytest
import torch
import torch.distributed as dist

from ov3fast import testing
from ov3fast.ops import _row_shards
from ov3fast.ops.contrastive_loss import contrastive_loss, reference

pytestmark = pytest.mark.backend_independent

WIDTH = 6
SPLITS = {
    1: [(4,), (0,)], 2: [(3, 3), (5, 1), (4, 0)], 3: [(2, 2, 2), (1, 4, 2), (0, 0, 0)], 4: [(2, 2, 2, 2), (3, 0, 1, 2)],
}  # fmt: skip
RANKS = 4
EXCHANGES = ("gather", "ring")
CHECKS = [
    "shares", "views", "ring", "ring_memory", "ddp", "low_precision", "exchange", "reduce_scatter", "disagreement", "compiled", "outsider",
    "absence",
]  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """check -> the result of each rank: 'passed' or a traceback."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "ov3fast.ops", "ov3fast.testing"])
    ranks = [context.Process(target=run_rank, args=(rank, RANKS, str(folder))) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=400)
    stuck = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in stuck:
        ranks[rank].kill()
    told = [torch.load(folder / f"{rank}.pt") if (folder / f"{rank}.pt").exists() else {} for rank in range(RANKS)]
    return {check: [said.get(check, "never came to it") for said in told] for check in CHECKS}


@pytest.mark.parametrize("check", CHECKS)
def test_ranks(outcome, check):
    assert outcome[check] == ["passed"] * RANKS, "\n".join(outcome[check])


def run_rank(rank, world, folder):
    import traceback

    torch.set_num_threads(1)
    _row_shards.PIECE_ROWS = 2  # so that small shares have several
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 3)} | {4: dist.group.WORLD}
    said = {}
    for check in CHECKS:
        try:
            globals()[f"check_{check}"](rank, groups)
            said[check] = "passed"
        except Exception:
            said[check] = traceback.format_exc(limit=-3)
        torch.save(said, f"{folder}/{rank}.pt")
        if check != CHECKS[-1]:
            dist.barrier()
    dist.destroy_process_group()


def everyone(sizes, dtype=torch.float64):
    pairs = sum(sizes)
    return testing.make(pairs, WIDTH, dtype=dtype), testing.make(pairs, WIDTH, seed=1, dtype=dtype)


def scalars(kind, dtype=torch.float64):
    scale = torch.tensor(8.0, dtype=dtype, requires_grad=True)
    return scale, None if kind == "softmax" else torch.tensor(-2.0, dtype=dtype, requires_grad=True)


def weighted_sum(image, text, scale, bias, kind, sizes, upstream):
    """sum_w upstream_w share_w of all pairs in one process, from the definition."""
    a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (image, text))
    z = scale * a @ b.T
    if kind == "softmax":
        terms = (torch.logsumexp(z, 1) + torch.logsumexp(z, 0)) / 2 - z.diagonal()
    else:
        terms = torch.log1p(torch.exp((1 - 2 * torch.eye(len(z), dtype=z.dtype)) * (z + bias))).sum(1)
    return (terms * upstream.repeat_interleave(torch.tensor(sizes))).sum() * len(sizes) / max(sum(sizes), 1)


def check_shares(rank, groups):
    """The mean of the shares is the loss; gradients are those of sum_w u_w share_w, for any u."""
    for world, group in groups.items():
        for sizes in SPLITS[world] if rank < world else []:
            for kind in ("softmax", "sigmoid"):
                for upstream in (torch.ones(world).double(), torch.tensor([0.5, -2.0, 3.0, 1.5]).double()[:world]):
                    for exchange in EXCHANGES:
                        compare(rank, group, sizes, kind, upstream, exchange)


def compare(rank, group, sizes, kind, upstream, exchange):
    image, text = (t.requires_grad_() for t in everyone(sizes))
    scale, bias = scalars(kind)
    leaves = [image, text, scale] + ([] if bias is None else [bias])
    total = weighted_sum(image, text, scale, bias, kind, sizes, upstream)
    expected = torch.autograd.grad(total, leaves)
    full = reference(image, text, scale, kind=kind, logit_bias=bias).detach()

    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    mine = [image[own].detach().requires_grad_(), text[own].detach().requires_grad_(), *scalars(kind)]
    share = contrastive_loss(*mine[:3], kind=kind, logit_bias=mine[3], group=group, exchange=exchange)
    got = torch.autograd.grad(upstream[rank] * share, [leaf for leaf in mine if leaf is not None])
    mean = share.detach().clone()
    dist.all_reduce(mean, group=group)
    close(mean / len(sizes), full)
    close(got[0], expected[0][own])
    close(got[1], expected[1][own])
    for partial, whole in zip(got[2:], expected[2:], strict=True):
        summed = partial.clone()
        dist.all_reduce(summed, group=group)
        close(summed, whole)


def check_views(rank, groups):
    """Several views of the images: the mean of the views' shares and its gradients, with texts sent only once, as for a single view."""
    for world, group in groups.items():
        for sizes in SPLITS[world] if rank < world else []:
            for kind in ("softmax", "sigmoid"):
                for exchange in EXCHANGES:
                    compare_views(rank, group, sizes, kind, exchange)
    sent = [texts_sent(views) for views in (1, 3)]
    assert sent[0] == sent[1] > 0, sent


def compare_views(rank, group, sizes, kind, exchange):
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    text = testing.make(sum(sizes), WIDTH, seed=1, dtype=torch.float64)
    image = testing.make(3, sum(sizes), WIDTH, dtype=torch.float64)
    scale, bias = scalars(kind)

    def loss(x, y, s):
        return contrastive_loss(x, y, s, kind=kind, logit_bias=bias, group=group, exchange=exchange)

    results = []
    for views in (lambda x, *rest: loss(x, *rest), lambda x, *rest: torch.stack([loss(v, *rest) for v in x]).mean()):
        mine = [image[:, own].clone().requires_grad_(), text[own].clone().requires_grad_(), scale]
        share = views(*mine)
        results.append([share, *torch.autograd.grad(share, mine)])
    for together, apart in zip(*results, strict=True):
        close(together, apart)


def check_ring(rank, groups):
    """Chunks come from the preceding ranks, each requested before the current one is processed; gradient sums return to their owners."""
    sizes = (2, 0, 5, 1)
    shards = _row_shards.RowShards(dist.group.WORLD, rank, sizes)
    everyones = testing.make(8, 4, dtype=torch.bfloat16).split(sizes)
    assert shards.pieces == 3
    started, real = [], _row_shards.RowShards._pass_on
    _row_shards.RowShards._pass_on = lambda *args, **options: started.append(options.get("tag", 0)) or real(*args, **options)
    try:
        sums, got = _row_shards.RingSums(shards, torch.empty(0, 4, dtype=torch.float64)), {}
        for number, (owner, first, block) in enumerate(shards.ring(everyones[rank])):
            assert started.count(0) == min(number + 1, 9)
            testing.assert_same_bits([block], [everyones[owner][first : first + len(block)]])
            got[owner] = got.get(owner, 0) + len(block)
            sums.expect(len(block))
            sums.add(block.double() * (rank + 1))
        home = sums.home()
    finally:
        _row_shards.RowShards._pass_on = real
    assert got == dict(enumerate(sizes))
    assert torch.equal(home, everyones[rank].double() * 10)


def check_ring_memory(rank, groups):
    """Peak receive buffers, of the others' 24 rows: three chunks of two rows in the forward, six with gradient sums."""
    held, most, real = [], 0, torch.Tensor.new_empty

    def counting(self, size, *args, **options):
        nonlocal most
        made = real(self, size, *args, **options)
        if made.ndim == 2 and made.shape[1] == 96:
            held.append(weakref.ref(made))
            most = max(most, sum(len(x()) for x in held if x() is not None))
        return made

    mine = [testing.make(8, 96, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(2)]
    torch.Tensor.new_empty = counting
    try:
        loss = contrastive_loss(*mine, scalars("softmax")[0], group=dist.group.WORLD, exchange="ring")
        forward, most = most, 0
        loss.backward()
    finally:
        torch.Tensor.new_empty = real
    assert forward <= 3 * 2 and most <= 6 * 2, (forward, most)


def check_absence(rank, groups):
    """If a rank is missing, the others raise within the timeout. This check is last, since it destroys the group."""
    os.environ["OV3FAST_EXCHANGE_TIMEOUT"] = "2"
    if rank == 1:
        time.sleep(4)
        return
    began = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"not every rank of the group reached the exchange within 2 s \(OV3FAST_EXCHANGE_TIMEOUT\)"
    ):
        contrastive_loss(*everyone((2,)), scalars("softmax")[0], group=dist.group.WORLD)
    assert time.monotonic() - began < 20


def texts_sent(views):
    """Number of transfers of feature-wide rows, forward and backward."""
    count = 0
    real = {name: getattr(dist, name) for name in ("broadcast", "all_gather")}

    def counting(name):
        def collective(x, *args, **options):
            nonlocal count
            first = x[0] if isinstance(x, list) else x
            count += first.ndim == 2 and first.shape[-1] == WIDTH * 8  # the bytes of float64
            return real[name](x, *args, **options)

        return collective

    image, text = testing.make(views, 2, WIDTH, dtype=torch.float64), testing.make(2, WIDTH, seed=1, dtype=torch.float64)
    try:
        for name in real:
            setattr(dist, name, counting(name))
        contrastive_loss(
            image.requires_grad_(), text.requires_grad_(), scalars("softmax")[0], group=dist.group.WORLD
        ).backward()
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
    return count


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = (torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2))
        self.log_scale = torch.nn.Parameter(torch.tensor(2.0).double())
        self.bias = torch.nn.Parameter(torch.tensor(-1.0).double())
        for seed, parameter in enumerate([*self.image.parameters(), *self.text.parameters()]):
            parameter.data.copy_(testing.make(*parameter.shape, seed=seed))

    def forward(self, x, y):
        return self.image(x), self.text(y), self.log_scale.exp(), self.bias * 1


def check_ddp(rank, groups):
    """DDP's averaged gradients are the full batch's, of the towers, the scale and the bias."""
    for exchange in EXCHANGES:
        compare_ddp(rank, exchange)


def compare_ddp(rank, exchange):
    sizes = (3, 1, 2, 1)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x, y = everyone(sizes)
    alone, parallel = Towers(), Towers()
    image, text, scale, bias = alone(x, y)
    reference(image, text, scale, kind="sigmoid", logit_bias=bias).backward()
    replica = torch.nn.parallel.DistributedDataParallel(parallel)
    image, text, scale, bias = replica(x[own], y[own])
    contrastive_loss(image, text, scale, kind="sigmoid", logit_bias=bias, group=dist.group.WORLD, exchange=exchange).backward()
    for got, expected in zip(parallel.parameters(), alone.parameters(), strict=True):
        close(got.grad, expected.grad)


def check_low_precision(rank, groups):
    for dtype in (torch.float32, torch.bfloat16):
        for exchange in EXCHANGES:
            sizes = (2, 3, 1, 2)
            own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            image, text = (t.requires_grad_() for t in everyone(sizes, dtype))
            scale, _ = scalars("softmax", torch.float32)
            expected = torch.autograd.grad(reference(image, text, scale), (image, text))
            mine = [t[own].detach().requires_grad_() for t in (image, text)]
            share = contrastive_loss(*mine, scale, group=dist.group.WORLD, exchange=exchange)
            assert share.dtype == torch.float32
            for got, whole in zip(torch.autograd.grad(share, mine), expected, strict=True):
                assert got.dtype == dtype
                torch.testing.assert_close(got / 4, whole[own], rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def check_exchange(rank, groups):
    """A rank gets its own rows immediately, before the others have joined the exchange, then theirs in rank order."""
    sizes = (2, 0, 3, 1)
    shards = _row_shards.RowShards(dist.group.WORLD, rank, sizes)
    everyones = testing.make(6, 4, dtype=torch.bfloat16).split(sizes)
    store = dist.distributed_c10d._get_default_store()
    if rank:
        store.wait([f"rank {rank - 1} has its own"])
    arriving = shards.exchange(everyones[rank])
    first = next(arriving)
    store.set(f"rank {rank} has its own", "yes")
    got = [first, *arriving]
    assert [r for r, _ in got] == [rank, *(r for r in range(RANKS) if r != rank)]
    for r, rows in got:
        testing.assert_same_bits([rows], [everyones[r]])


def check_reduce_scatter(rank, groups):
    """The two ways to reduce and scatter agree, for unequal sizes."""
    sizes = (2, 0, 3, 1)
    shards = _row_shards.RowShards(dist.group.WORLD, rank, sizes)
    x = testing.make(6, 4, seed=rank)
    expected = shards.own(sum(testing.make(6, 4, seed=other) for other in range(RANKS)))
    close(shards.reduce_scatter(x.clone()), expected)
    real, dist.get_backend = dist.get_backend, lambda group=None: "nccl"
    try:
        close(shards.reduce_scatter(x.clone()), expected)
    finally:
        dist.get_backend = real


def check_disagreement(rank, groups):
    """If ranks disagree, all of them raise and none hangs."""
    width = WIDTH + (rank == 1)
    x = testing.make(2, width)
    words = rf"the width of image must be the same on all ranks of the group, got \[{WIDTH}, {WIDTH + 1}, {WIDTH}, {WIDTH}\]"
    with pytest.raises(ValueError, match=words):
        contrastive_loss(x, x, scalars("softmax")[0], group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"kind must be the same on all ranks of the group, got \[0, 1, 0, 0\]"):
        x = testing.make(2, WIDTH)
        contrastive_loss(x, x, scalars("softmax")[0], kind="sigmoid" if rank == 1 else "softmax", group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"exchange must be the same on all ranks of the group, got \[0, 0, 1, 0\]"):
        exchange = "ring" if rank == 2 else "gather"
        contrastive_loss(x, x, scalars("softmax")[0], exchange=exchange, group=dist.group.WORLD)


def check_compiled(rank, groups):
    if rank == 0:
        image, text = (t.requires_grad_() for t in everyone((3,)))
        loss = functools.partial(contrastive_loss, group=groups[1])
        expected = torch.autograd.grad(loss(image, text, scalars("softmax")[0]), (image, text))
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(image, text, scalars("softmax")[0]), (image, text))
        testing.assert_same_bits(got, expected)


def check_outsider(rank, groups):
    if rank:
        with pytest.raises(ValueError, match="group does not contain this process"):
            contrastive_loss(*everyone((2,)), scalars("softmax")[0], group=groups[1])
