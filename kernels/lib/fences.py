"""Inserts fences that Triton before 3.9 omits on Hopper.

wgmma reads shared memory through the asynchronous proxy. Data written there with st.shared or cp.async becomes visible to it after a
fence.proxy.async by the writing thread, and a barrier (PTX ISA, "async proxy"). Triton 3.9 emits these fences; 3.6 does not for tiles loaded
with cp.async. We insert one into our kernels' PTX before each barrier and each group of products; it costs a few cycles, and nothing extra if
there is one already.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import triton

FENCE = "fence.proxy.async.shared::cta;"
GIVEN_SINCE = (3, 9)
"""The first Triton version whose own fences pass tools/ptxrun."""

_PLACES = re.compile(r"^(\s*)((?:@!?%p\d+\s+)?(?:bar\.sync|barrier\.sync|wgmma\.fence\.sync)\b)", re.MULTILINE)


def fenced(ptx: str) -> str:
    """The same code with a fence before every barrier and every group of products; code without wgmma is unchanged."""
    return _PLACES.sub(rf"\1{FENCE}\n\1\2", ptx) if "wgmma.mma_async" in ptx else ptx


def install() -> None:
    """Adds `fenced` to the PTX stage for our kernels, if this Triton version needs it."""
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    runtime = triton.knobs.runtime
    if version < GIVEN_SINCE and not isinstance(runtime.add_stages_inspection_hook, _Hook):
        runtime.add_stages_inspection_hook = _Hook(runtime.add_stages_inspection_hook)


class _Hook:
    """Called by Triton with a compilation's stages, and without arguments for the hook's cache key."""

    def __init__(self, before: Callable[..., Any] | None) -> None:
        self.before = before

    def __call__(self, *arguments: Any) -> Any:
        found = None if self.before is None else self.before(*arguments)
        if not arguments:
            key, value = found or ("", "")
            return f"{key} ov3fast fences", f"{value} 1"
        stages = arguments[1]
        if "ptx" in stages:
            make = stages["ptx"]
            stages["ptx"] = lambda source, metadata: _of_ours(make(source, metadata), metadata)
        return None


def _of_ours(ptx: str, metadata: Any) -> str:
    return fenced(ptx) if metadata["name"] in _names() else ptx


def _names() -> set[str]:
    """Names of all kernels in the imported modules of this package."""
    package = __name__.rsplit(".", 2)[0]
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.")]
    return {value.__name__ for module in modules for value in vars(module).values() if isinstance(value, triton.JITFunction)}
