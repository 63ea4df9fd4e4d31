"""Compile a Triton kernel ahead of time and run its PTX on CPU tensors."""

from dataclasses import dataclass

from .launch import run_ptx


@dataclass
class Compiled:
    ptx: str
    name: str
    shared: int
    num_warps: int
    arg_names: list  # remaining kernel arguments, in parameter order


def _triton_type(v):
    import torch

    if isinstance(v, torch.Tensor):
        names = {
            "torch.float32": "fp32",
            "torch.float16": "fp16",
            "torch.bfloat16": "bf16",
            "torch.float64": "fp64",
            "torch.bool": "i1",
            "torch.uint8": "u8",
            "torch.float8_e4m3fn": "fp8e4nv",
            "torch.float8_e5m2": "fp8e5",
        }
        s = str(v.dtype)
        return "*" + names.get(s, s.replace("torch.uint", "u").replace("torch.int", "i"))
    if isinstance(v, bool):
        return "i1"
    if isinstance(v, int):
        return "i32" if -(2**31) <= v < 2**31 else ("i64" if v < 2**63 else "u64")
    if isinstance(v, float):
        return "fp32"
    raise TypeError(f"argument of type {type(v)}")


def _jit_function(fn):
    import triton

    while not isinstance(fn, triton.JITFunction):  # autotune and heuristics wrappers
        fn = fn.fn
    return fn


def compile_kernel(
    fn, args, constexprs=None, target="sm_80", num_warps=4, num_stages=3, types=None, specialize=True, options=None
):
    """Ahead-of-time compilation with the JIT's specialisation: divisibility by 16, and integers equal to 1 (and None)
    become constants and leave the parameter list."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = _jit_function(fn)
    consts, sig, attrs, left = dict(constexprs or {}), {}, {}, []
    for i, prm in enumerate(fn.params):
        n = prm.name
        if n in consts or prm.is_constexpr:
            if n not in consts:
                consts[n] = args[n] if n in args else prm.default
            sig[n] = "constexpr"
            continue
        v = args[n] if n in args else prm.default
        may = specialize and not prm.do_not_specialize
        if v is None or (may and type(v) is int and v == 1):
            consts[n], sig[n] = v, "constexpr"
            continue
        sig[n] = (types or {}).get(n) or _triton_type(v)
        left.append(n)
        aligned = v.data_ptr() % 16 == 0 if isinstance(v, torch.Tensor) else type(v) is int and v % 16 == 0
        if may and aligned and not getattr(prm, "do_not_specialize_on_alignment", False):
            attrs[(i,)] = [["tt.divisibility", 16]]
    cap = int(str(target).split("_")[-1].rstrip("a"))
    c = triton.compile(
        ASTSource(fn=fn, signature=sig, constexprs=consts, attrs=attrs),
        target=GPUTarget("cuda", cap, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, **(options or {})},
    )
    return Compiled(c.asm["ptx"], c.name, c.metadata.shared, c.metadata.num_warps, left)


def run(
    kernel_fn,
    grid,
    args,
    constexprs=None,
    target="sm_80",
    num_warps=4,
    num_stages=3,
    order="forward",
    check=True,
    types=None,
    specialize=True,
    options=None,
    edit=None,
    **kw,
):
    """Compile a Triton kernel for `target` and run its PTX over the grid on CPU tensors, in place.

    edit: a function PTX -> PTX applied before running (for example to plant a bug). Further keywords: see run_ptx."""
    c = compile_kernel(kernel_fn, args, constexprs, target, num_warps, num_stages, types, specialize, options)
    if callable(grid):
        grid = grid({**args, **(constexprs or {})})
    defaults = {p.name: p.default for p in _jit_function(kernel_fn).params}
    fn_args = [(n, args[n] if n in args else defaults[n]) for n in c.arg_names]
    fn_args = [(n, float(v) if (types or {}).get(n, "").startswith("fp") else v) for n, v in fn_args]
    ptx = edit(c.ptx) if edit else c.ptx
    return run_ptx(ptx, fn_args, grid, c.shared, c.num_warps, order=order, check=check, **kw)
