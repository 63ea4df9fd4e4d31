"""Builds the kernels with ninja: `python csrc/build.py OUT` writes OUT/ov3_<isa>.so, the CPU kernels for one instruction set each, and, if nvcc
is installed, OUT/<operator>.fatbin, the CUDA kernels of an operator for all architectures.

setup.py runs it at install time. Only what has changed is compiled, also in a copy of the tree that has the objects in build/ and the files'
times: ninja is given relative paths. The sources include neither Python's headers nor PyTorch's, so the libraries work with any version of either.
`--sanitize` builds with AddressSanitizer and UndefinedBehaviorSanitizer (see `make sanitize`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# From narrow to wide. Which of them a processor can run is determined at run time (cpu/isa.cpp), so one build serves all processors.
X86_FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
    "avx512_bf16": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mfma -mprefer-vector-width=512",
    "amx_bf16": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mfma -mprefer-vector-width=512 -DOV3_TILES",
}

# The kernels of amx_bf16 on a bit-exact model of the tile unit, for processors without AMX. Slow; for tests.
EMULATED = "amx_emulated"
EMULATED_FLAGS = f"{X86_FLAGS['amx_bf16']} -DOV3_EMULATE_TILES"

# Hidden visibility: several of these libraries are loaded at once, and would otherwise share the first one's static variables (GCC gives those of
# templates unique binding). -Wno-*uninitialized: GCC 12 warns about the "undefined" halves of its own AVX-512 intrinsics.
FLAGS = (
    "-std=c++17 -O2 -g1 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math"
    " -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized"
)
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1"


# Machine code for these, as far as nvcc supports them, and PTX of the last one for later architectures.
CUDA_ARCHITECTURES = (80, 90, 100)
CUDA_FLAGS = "-std=c++17 -O3"
# The first release that supports more than 4096 bytes of kernel parameters.
OLDEST_CUDA = (12, 1)


class NoCompiler(RuntimeError):
    """A C++ compiler, nvcc or ninja is missing, or the kernels are not wanted."""


def isas(compiler: str, emulated: bool = False) -> dict[str, str]:
    """Instruction set -> compiler flags, for the compiler's target machine."""
    if target(compiler) not in ("x86_64", "amd64"):
        return {"portable": ""}
    return X86_FLAGS | ({EMULATED: EMULATED_FLAGS} if emulated else {})


def target(compiler: str) -> str:
    """The machine that the compiler compiles for, such as x86_64 or aarch64."""
    return _output(compiler, "-dumpmachine").lower().split("-")[0]


def work_folder(compiler: str, sanitize: bool = False) -> Path:
    """The folder of the objects. A cross-compiler has another one, so that no build takes objects for another machine."""
    machine = target(compiler)
    name = "native" if machine == platform.machine().lower() else f"native-{machine}"
    return HERE.parent / "build" / (f"{name}-sanitize" if sanitize else name)


def build(out: Path, *, sanitize: bool = False, emulated: bool = False, only: tuple[str, ...] = ()) -> list[Path]:
    """Compiles what has changed and returns the libraries. Raises NoCompiler, or CalledProcessError if compilation fails."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise NoCompiler("no C++ compiler (c++, g++ or clang++; set CXX to use another)")
    out.mkdir(parents=True, exist_ok=True)
    work = work_folder(compiler, sanitize)
    work.mkdir(parents=True, exist_ok=True)
    flags = f"{FLAGS} {SANITIZE}" if sanitize else FLAGS
    lines = [
        "rule compile",
        f"  command = {compiler} {flags} $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {compiler} {flags} -shared $in -o $out",
        "  description = link $out",
    ]
    libraries = []
    for isa, isa_flags in isas(compiler, emulated or EMULATED in only).items():
        if only and isa not in only:
            continue
        objects = []
        for source in sorted((HERE / "cpu").glob("*.cpp")):
            obj = f"{isa}/{source.stem}.o"
            lines += [f"build {obj}: compile {_relative(source, work)}", f"  isa = {isa_flags}"]
            objects.append(obj)
        libraries.append(out.resolve() / f"ov3_{isa}.so")
        lines.append(f"build {_escape(libraries[-1])}: link {' '.join(objects)}")
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([_ninja(), "-C", str(work), "--quiet"], check=True)
    return libraries


def find_nvcc() -> tuple[str, tuple[int, int], list[int]]:
    """nvcc, its release, and the CUDA_ARCHITECTURES that it supports. Raises NoCompiler if it is missing or too old."""
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    nvcc = (
        os.environ.get("NVCC")
        or shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes if home))
        or shutil.which("nvcc")
    )
    if nvcc is None:
        raise NoCompiler("no nvcc (set CUDA_HOME or NVCC)")
    release = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    toolkit = (int(release[1]), int(release[2])) if release else (0, 0)
    if toolkit < OLDEST_CUDA:
        raise NoCompiler(f"{nvcc} is from CUDA {toolkit[0]}.{toolkit[1]}, older than {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}")
    known = set(re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch")))
    return nvcc, toolkit, [arch for arch in CUDA_ARCHITECTURES if str(arch) in known]


def check_cuda_is_wanted() -> None:
    """Raises NoCompiler if OV3FAST_CUDA is 0, or is unset and this machine has no NVIDIA driver to load the kernels."""
    word = os.environ.get("OV3FAST_CUDA", "")
    if word not in ("", "0", "1"):
        raise NoCompiler(f"OV3FAST_CUDA must be 0 or 1, got {word!r}")
    if word == "0" or (not word and not Path("/proc/driver/nvidia").exists() and shutil.which("nvidia-smi") is None):
        raise NoCompiler("OV3FAST_CUDA is 0" if word else "no NVIDIA driver (OV3FAST_CUDA=1 builds them anyway)")


def build_cuda(out: Path) -> list[Path]:
    """Compiles the CUDA kernels that have changed and returns the binaries. Raises NoCompiler if nvcc is missing or CUDA is not wanted, or
    CalledProcessError.

    Needs neither a GPU nor PyTorch: ov3fast/ops/cuda loads the binaries through the driver.
    """
    check_cuda_is_wanted()
    nvcc, toolkit, architectures = find_nvcc()
    codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    codes.append(f"arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    out.mkdir(parents=True, exist_ok=True)
    work = HERE.parent / "build" / "cuda"
    work.mkdir(parents=True, exist_ok=True)
    lines = [
        "rule compile",
        f"  command = {nvcc} {CUDA_FLAGS} {' '.join(f'-gencode {code}' for code in codes)} -MD -MF $dependencies -fatbin $in -o $out",
        "  depfile = $dependencies",
        "  deps = gcc",
        "  description = compile $out",
    ]
    binaries = []
    for source in sorted((HERE / "cuda").glob("*.cu")):
        binaries.append(out.resolve() / f"{source.stem}.fatbin")
        lines += [f"build {_escape(binaries[-1])}: compile {_relative(source, work)}", f"  dependencies = {source.stem}.d"]
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([_ninja(), "-C", str(work), "--quiet"], check=True)
    # Written last, since its presence tells ov3fast.ops.cuda that the binaries are complete.
    (out / "cuda.json").write_text(json.dumps({"toolkit": toolkit, "architectures": architectures}) + "\n")
    return binaries


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _ninja() -> str:
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise NoCompiler("no ninja") from None
        return found


def _relative(path: Path, work: Path) -> str:
    return _escape(Path(os.path.relpath(path, work)))


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the libraries")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--emulated", action="store_true", help=f"{EMULATED} too")
    parser.add_argument("--only", nargs="*", default=(), help="instruction sets to build")
    options = parser.parse_args()
    try:
        for library in build(options.out, sanitize=options.sanitize, emulated=options.emulated, only=tuple(options.only)):
            print(library)
    except NoCompiler as reason:
        sys.exit(f"ov3fast: the CPU kernels were not built: {reason}")
    if options.sanitize or options.only:
        return
    try:
        for binary in build_cuda(options.out):
            print(binary)
    except NoCompiler as reason:
        print(f"ov3fast: the CUDA kernels were not built: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
