"""How ranks exchange the sizes of their shards."""

import pytest
import torch
import torch.distributed as dist

from ov3fast.ops import _row_shards


@pytest.mark.backend_independent
@pytest.mark.parametrize(("config", "device"), [("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo", "cpu"), ("cuda:nccl", "meta")])
def test_sizes_go_by_the_cpu_where_the_group_can(monkeypatch, config, device):
    """ "meta" stands in for a GPU: reading its values would synchronise, and here is impossible."""
    devices = []

    class Work:
        def wait(self, timeout):
            assert timeout.total_seconds() == 600

    def all_gather(told, mine, group, async_op):
        devices.append(mine.device.type)
        for rank, values in enumerate(told):
            values.copy_(mine + rank * torch.tensor([1, 0], device=mine.device))
        return Work()

    monkeypatch.setattr(_row_shards, "resolve", lambda name: "group")
    replaced = {
        "get_backend_config": lambda group: config,
        "get_world_size": lambda group: 3,
        "get_rank": lambda group: 1,
        "all_gather": all_gather,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(dist, name, function)
    if device == "cpu":
        shards = _row_shards.deal("op", "name", 5, {"width": 8}, torch.device("meta"))
        assert shards.sizes == (5, 6, 7) and shards.rank == 1
    else:
        with pytest.raises((RuntimeError, NotImplementedError)):
            _row_shards.deal("op", "name", 5, {"width": 8}, torch.device("meta"))
    assert devices == [device]
