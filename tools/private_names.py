"""The private names of torch and Triton that we rely on, and what each is used for.

`tests/test_private_names.py` checks this list against the sources and the installed versions; `make test-versions` runs it for the oldest and
newest versions that we support. Private names are those with a leading underscore, and those of Triton outside `triton` and `triton.language`.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("ov3fast", "kernels", "csrc", "benches", "tools", "tests", "examples", "setup.py")
PACKAGES = ("torch", "triton")
PUBLIC = ("triton.language", "triton.testing")

NAMES = {
    "an operator's call without PyTorch's dispatcher (ov3fast/ops/_operator.py)": (
        "torch._C._any_requires_grad", "torch._C._are_functorch_transforms_active", "torch._C._autograd._top_saved_tensors_default_hooks", "torch._C._dynamo.guards.TensorGuards", "torch._C._functorch.TransformType.Grad",
        "torch._C._functorch.get_interpreter_stack",
        "torch._C._functorch.is_functorch_wrapped_tensor", "torch._C._get_tracing_state", "torch._C._is_any_autocast_enabled",
        "torch._C._len_torch_dispatch_stack", "torch._functorch.utils.unwrap_dead_wrappers", "torch.autograd.forward_ad._current_level",
    ),
    "a check that costs no synchronisation": ("torch._assert_async",),
    "an optimizer's step in PyTorch": (
        "torch._foreach_add_", "torch._foreach_addcdiv_", "torch._foreach_addcmul_", "torch._foreach_copy_", "torch._foreach_div_",
        "torch._foreach_lerp_", "torch._foreach_mul", "torch._foreach_mul_", "torch._foreach_norm", "torch._foreach_sqrt",
    ),
    "attention by PyTorch's own kernels (ov3fast/ops/_attention_peers.py)": (
        "torch.ops.aten._flash_attention_backward", "torch.ops.aten._flash_attention_forward",
        "torch.ops.aten._scaled_dot_product_cudnn_attention", "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "oneDNN's products (ov3fast/ops/onednn.py, ov3fast/inference/packed.py, int8.py)": (
        "torch.cpu._is_vnni_supported", "torch.ops.mkldnn._convolution_pointwise", "torch.ops.mkldnn._is_mkldnn_bf16_supported",
        "torch.ops.mkldnn._linear_pointwise", "torch.ops.mkldnn._reorder_convolution_weight", "torch.ops.mkldnn._reorder_linear_weight",
    ),
    "a model compiled ahead of time (ov3fast/interop/torch.py)": (
        "torch._inductor.aoti_compile_and_package", "torch._inductor.aoti_load_package",
    ),
    "a process group that travels through an operator's schema": (
        "torch.distributed.distributed_c10d._get_default_store", "torch.distributed.distributed_c10d._resolve_process_group",
    ),
    "compiled blocks: several backward passes through them, as many kinds as there are towers (ov3fast/training/build.py)": (
        "torch._dynamo.config.recompile_limit", "torch._functorch.config.donated_buffer",
    ),
    "moves of the encoder, which take the VAE along (ov3fast/models/vit.py)": ("torch.nn.Module._apply",),
    "the error budget and tests: what PyTorch dispatches": (
        "torch._decomp.get_decompositions", "torch.utils._python_dispatch.TorchDispatchMode", "torch.utils._pytree.tree_leaves",
        "torch.utils._pytree.tree_map",
    ),
    "kernels compiled ahead of time, and run on a CPU (kernels/aot, tools/ptxrun)": (
        "triton.backends.compiler.GPUTarget", "triton.backends.nvidia", "triton.compiler.ASTSource", "triton.knobs.cache",
        "triton.knobs.cache.dir", "triton.knobs.cache.scope", "triton.runtime.jit.JITFunction", "triton.runtime.jit.JITFunction.run",
    ),
    "checkpoints at fsspec URLs (ov3fast/training)": (
        "torch.distributed.checkpoint._fsspec_filesystem.FsspecReader", "torch.distributed.checkpoint._fsspec_filesystem.FsspecWriter",
    ),
    "a step's memory on fake tensors (ov3fast/training/footprint.py)": ("torch._subclasses.fake_tensor.FakeTensorMode",),
    "fences that Triton before 3.9 leaves out (kernels/lib/fences.py)": ("triton.knobs.runtime.add_stages_inspection_hook", "triton.knobs.runtime.scope"),
    "host time without the mode of a default device (tools/gpu/measure.py)": ("torch._C.DisableTorchFunction",),
    "what a launcher asks PyTorch for (ov3fast/_plans.py)": ("torch._C._AutoDispatchBelowAutograd",),
    "launches without Triton's cost per call (kernels/lib/launch.py)": (
        "triton.knobs.runtime.launch_enter_hook", "triton.knobs.runtime.launch_exit_hook",
    ),
    "a pretended GPU (tools/gpu/pretend.py), and names of launches": (
        "torch._C.DispatchKey.CPU", "torch._C.DispatchKeySet", "torch._subclasses.FakeTensor", "torch._subclasses.FakeTensorMode",
        "torch.cuda._exchange_device", "torch.cuda._maybe_exchange_device", "triton.knobs.runtime", "triton.knobs.runtime.jit_cache_hook",
        "triton.knobs.runtime.launch_enter_hook.add", "triton.knobs.runtime.launch_enter_hook.remove", "triton.runtime.driver", "triton.runtime.driver._active",
        "triton.runtime.jit.JITFunction.preload",
    ),
    "tests in Triton's interpreter": (
        "triton.runtime._allocation", "triton.runtime._allocation._allocator.get", "triton.runtime.interpreter.interpreter_builder",
        "triton.runtime.interpreter.interpreter_builder.set_grid_dim", "triton.runtime.interpreter.interpreter_builder.set_grid_idx",
    ),
}  # fmt: skip
"""Purpose -> names."""


def private(name: str) -> bool:
    """Whether `name` is private."""
    first, *parts = name.split(".")
    if any(part.startswith("_") for part in parts):
        return True
    return first == "triton" and len(parts) > 1 and not name.startswith(PUBLIC)


def used() -> dict[str, set[str]]:
    """Dotted private name -> the files that use it."""
    found: dict[str, set[str]] = {}
    for path in files():
        for name in names_in(ast.parse(path.read_text(encoding="utf-8"))):
            name = name.split(".__")[0]
            if private(name):
                found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


def files() -> Iterator[Path]:
    for source in SOURCES:
        path = ROOT / source
        yield from (
            [path] if path.is_file() else (p for p in path.rglob("*.py") if "ov3fast/kernels/" not in str(p.relative_to(ROOT)))
        )


def names_in(tree: ast.AST) -> Iterator[str]:
    """The longest dotted names below torch and Triton in imports, attributes, and targets of mock.patch.object."""
    aliases = dict(_aliases(tree))
    yield from (name for name in aliases.values() if "." in name)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            name = _dotted(node, aliases)
            if name:
                yield name
        if isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            owner = _dotted(node.args[0], aliases)
            if owner and isinstance(node.args[1].value, str) and node.args[1].value.isidentifier():
                yield f"{owner}.{node.args[1].value}"


def _aliases(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] in PACKAGES:
                    yield (name.asname, name.name) if name.asname else (name.name.split(".")[0], name.name.split(".")[0])
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in PACKAGES:
            yield from ((name.asname or name.name, f"{node.module}.{name.name}") for name in node.names)


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join([aliases[node.id], *parts]) if isinstance(node, ast.Name) and node.id in aliases else None


def resolve(name: str) -> Any:
    """The object with that dotted name. Raises AttributeError or ImportError if it does not exist."""
    first, *parts = name.split(".")
    value, path = importlib.import_module(first), first
    for part in parts:
        path = f"{path}.{part}"
        if not hasattr(value, part):
            importlib.import_module(path)
        value = getattr(value, part)
    return value
