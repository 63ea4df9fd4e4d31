"""Builds the CPU kernels with ninja, once per instruction set: `python csrc/build.py OUT` writes OUT/ov3_<isa>.so.

setup.py runs it at installation. The sources include neither Python's headers nor PyTorch's, so the libraries fit every version of both.
`--sanitize` builds with AddressSanitizer and UndefinedBehaviorSanitizer (see `make sanitize`).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# The widest last. What a processor can run is asked at run time (cpu/isa.cpp), so one build serves them all.
X86_FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
    "avx512_bf16": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mfma -mprefer-vector-width=512",
}

# GCC 12 takes the "undefined" halves of its own AVX-512 intrinsics for mistakes.
FLAGS = (
    "-std=c++17 -O2 -g1 -fPIC -fopenmp -fvisibility=default -ffp-contract=fast -fno-math-errno -fno-trapping-math"
    " -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized"
)
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1"


class NoCompiler(RuntimeError):
    """There is no C++ compiler or no ninja."""


def isas() -> dict[str, str]:
    """Instruction set -> compiler flags, for the machine that builds."""
    return X86_FLAGS if platform.machine().lower() in ("x86_64", "amd64") else {"portable": ""}


def build(out: Path, *, sanitize: bool = False, only: tuple[str, ...] = ()) -> list[Path]:
    """Compiles what has changed and returns the libraries. NoCompiler, or CalledProcessError where compilation fails."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise NoCompiler("no C++ compiler (c++, g++ or clang++; CXX names another)")
    out.mkdir(parents=True, exist_ok=True)
    work = HERE.parent / "build" / ("native-sanitize" if sanitize else "native")
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
    for isa, isa_flags in isas().items():
        if only and isa not in only:
            continue
        objects = []
        for source in sorted((HERE / "cpu").glob("*.cpp")):
            obj = f"{isa}/{source.stem}.o"
            lines += [f"build {obj}: compile {_escape(source)}", f"  isa = {isa_flags}"]
            objects.append(obj)
        libraries.append(out.resolve() / f"ov3_{isa}.so")
        lines.append(f"build {_escape(libraries[-1])}: link {' '.join(objects)}")
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([_ninja(), "-C", str(work), "--quiet"], check=True)
    return libraries


def _ninja() -> str:
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise NoCompiler("no ninja") from None
        return found


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the libraries")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--only", nargs="*", default=(), help="instruction sets to build")
    options = parser.parse_args()
    try:
        for library in build(options.out, sanitize=options.sanitize, only=tuple(options.only)):
            print(library)
    except NoCompiler as reason:
        sys.exit(f"ov3fast: the CPU kernels were not built: {reason}")


if __name__ == "__main__":
    main()
