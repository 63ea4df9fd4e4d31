"""Every operator under torch.compile: one node, no graph break, outputs on the inputs' device."""

import pytest
import torch
from kernel_tools.samples import SAMPLES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ov3fast import testing

pytestmark = pytest.mark.backend_independent
samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


@samples
def test_no_graph_break(sample):
    """The forward's graph contains the operator itself, and the result equals an eager call."""
    seen = set()

    def look(graph, inputs):
        seen.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    inputs = sample.inputs("tiny", torch.float32)
    torch.compiler.reset()
    sample.results(inputs, torch.compile(sample.function, fullgraph=True, backend=look))
    assert f"ov3fast.{sample.op}" in {name.removesuffix(".default") for name in seen}
    torch.compiler.reset()
    compiled = torch.compile(sample.function, fullgraph=True, backend="aot_eager")
    testing.assert_same_bits(sample.results(inputs, compiled), sample.results(inputs))


class Calls(TorchDispatchMode):
    """Records calls of our operators within the block: (operator, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ov3fast":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@samples
def test_outputs_are_where_the_inputs_are(sample):
    """A CPU tensor among GPU tensors would keep Inductor from using CUDA graphs."""
    from torch._subclasses import FakeTensorMode

    with Calls() as mode:
        sample.results(sample.inputs("tiny", torch.float32))
    assert mode.calls
    with FakeTensorMode() as fake, torch.no_grad():

        def on_gpu(value):
            return torch.empty_like(fake.from_tensor(value), device="cuda") if isinstance(value, torch.Tensor) else value

        for function, args in mode.calls:
            outputs = tree_leaves(function(*tree_map(on_gpu, args)))
            assert {value.device.type for value in outputs} == {"cuda"}, function
