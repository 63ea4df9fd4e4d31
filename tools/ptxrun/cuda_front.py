"""Compile CUDA C++ to PTX with nvcc and run a kernel of it on CPU tensors."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile

from .launch import run_ptx
from .module import Module, PtxError

_memory = {}


def _cache_dir():
    d = os.environ.get("PTXRUN_CACHE") or os.path.join(tempfile.gettempdir(), f"ptxrun-cache-{os.getuid()}")
    os.makedirs(d, exist_ok=True)
    return d


def _includes(text, dirs, seen):
    """Contents of quoted includes, recursively; part of the cache key."""
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.M):
        for d in dirs:
            path = os.path.join(d, name)
            if os.path.isfile(path) and path not in seen:
                with open(path, encoding="utf-8", errors="replace") as f:
                    seen[path] = f.read()
                _includes(seen[path], [os.path.dirname(path), *dirs], seen)
                break
    return seen


def compile_cuda(source_or_path, arch="sm_80", flags=(), instantiate=()):
    """CUDA C++ text, or the path of a file -> PTX text. Cached by content, in memory and on disk (PTXRUN_CACHE).

    flags: further options of nvcc. The macro PTXRUN is defined, so that a file can exclude host code.
    instantiate: kernel template instances to generate, e.g. 'scale<float, 4>'.
    """
    text, folder, name = str(source_or_path), None, "kernel.cu"
    if "\n" not in text and (isinstance(source_or_path, os.PathLike) or os.path.isfile(text)):
        folder, name = os.path.split(os.path.abspath(text))
        with open(text, encoding="utf-8") as f:
            text = f.read()
    for i, inst in enumerate(instantiate):  # taking a kernel's address on the host instantiates it
        text += f"\nvoid *ptxrun_instance_{i}() {{ return (void *)(&{inst}); }}\n"
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc:
        raise PtxError("nvcc not found: put it on PATH or set NVCC")
    flags = list(flags)
    dirs = ([folder] if folder else []) + [f[2:] for f in flags if f.startswith("-I") and len(f) > 2]
    parts = [text, name, arch, *flags, nvcc] + [x for kv in sorted(_includes(text, dirs, {}).items()) for x in kv]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    if key in _memory:
        return _memory[key]
    out = os.path.join(_cache_dir(), key + ".ptx")
    if not os.path.isfile(out):
        with tempfile.TemporaryDirectory() as tmp:
            src, ptx = os.path.join(tmp, name), os.path.join(tmp, "out.ptx")
            with open(src, "w", encoding="utf-8") as f:
                f.write(text)
            cmd = [
                nvcc,
                "-ptx",
                "-lineinfo",
                f"-arch={arch}",
                "-DPTXRUN=1",
                *(["-I" + folder] if folder else []),
                *flags,
                src,
                "-o",
                ptx,
            ]
            r = subprocess.run(cmd, capture_output=True, text=True)
            if r.returncode:
                raise PtxError(f"nvcc failed:\n{(r.stderr + r.stdout).replace(tmp + os.sep, '')}")
            partial = f"{out}.{os.getpid()}"
            shutil.copyfile(ptx, partial)
            os.replace(partial, out)  # atomic: another process may be doing the same
    with open(out, encoding="utf-8") as f:
        _memory[key] = f.read()
    return _memory[key]


def demangle(names):
    """C++ names of mangled symbols; without a demangler, their nested identifiers."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool:
        r = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
        if r.returncode == 0:
            return r.stdout.splitlines()
    return ["::".join(_identifiers(n)) or n for n in names]


def _identifiers(name):
    out, pos = [], 2
    while name.startswith("_Z") and (m := re.compile(r"[NK]*(\d+)").match(name, pos)):
        n = int(m.group(1))
        out.append(name[m.end() : m.end() + n])
        pos = m.end() + n
    return out


def _plain(s):
    return re.sub(r"\s|\(int\)|\(bool\)", "", s)


def find_symbol(wanted, names):
    """The one of `names` that equals `wanted`, or whose C++ name equals, starts with or contains it."""
    if wanted in names:
        return wanted
    cpp = [_plain(d) for d in demangle(names)]
    want = _plain(wanted)
    # 'void ns::f<float>(float*)' without its parameters and result type
    bare = [re.sub(r"\([^()]*(\([^()]*\)[^()]*)*\)$", "", d) for d in cpp]
    for test in (
        lambda d, b: b == want or b.endswith(("::" + want, "void" + want)),
        lambda d, b: re.search(r"(^|::|void)" + re.escape(want) + r"(<|$)", b),
        lambda d, b: want in d,
    ):
        hits = [n for n, d, b in zip(names, cpp, bare, strict=False) if test(d, b)]
        if len(hits) == 1:
            return hits[0]
        if hits:
            raise PtxError(f"{wanted!r} is ambiguous: {[d for n, d in zip(names, demangle(names), strict=False) if n in hits]}")
    return None


def run_cuda(source_or_path, kernel_name, grid, block, args, shared=0, arch="sm_80", flags=(), symbols=None, edit=None, **kw):
    """Compile CUDA C++ with nvcc and run one of its kernels on CPU tensors, in place. Returns a Report.

    kernel_name: the kernel's mangled name, or a unique part of its C++ name. A template instance that the source
        does not contain ('scale<float, 4>') is instantiated.
    args: the arguments in order: a list of values, a list of (name, value) or a dict (names show in findings). Values are
        tensors, numbers, None (a null pointer), bytes or a Struct.
    shared: bytes of dynamic shared memory. symbols: contents of __constant__ and __device__ variables, by name.
    edit: a function PTX -> PTX applied before running (for example to plant a bug). Further keywords: see run_ptx.
    """
    ptx = compile_cuda(source_or_path, arch, flags)
    module = Module(ptx)
    entry = find_symbol(kernel_name, module.entries())
    if entry is None and "<" in kernel_name:
        before = set(module.entries())
        ptx = compile_cuda(source_or_path, arch, flags, (kernel_name,))
        module = Module(ptx)
        new = [n for n in module.entries() if n not in before]
        entry = new[0] if len(new) == 1 else find_symbol(kernel_name, module.entries())
    if entry is None:
        raise PtxError(f"no kernel {kernel_name!r}; there are {demangle(module.entries())}")
    if isinstance(args, dict):
        args = list(args.items())
    else:
        args = [a if isinstance(a, tuple) else (f"arg{i}", a) for i, a in enumerate(args)]
    n = len(module.functions[entry].params)
    if len(args) != n:
        raise ValueError(f"{len(args)} arguments for the {n} parameters of {kernel_name}")
    variables = [v.name for v in module.variables.values() if v.space != "shared"]
    symbols = {find_symbol(s, variables) or s: t for s, t in (symbols or {}).items()}
    return run_ptx(edit(ptx) if edit else ptx, args, grid, shared, entry=entry, block=block, symbols=symbols, **kw)
