"""csrc/build.py, with a compiler that only says what it compiles for."""

import platform

import pytest


@pytest.fixture
def compiler_for(tmp_path):
    def make(machine: str) -> str:
        path = tmp_path / machine
        path.write_text(f"#!/bin/sh\necho {machine}\n")
        path.chmod(0o755)
        return str(path)

    return make


def test_a_cross_compiler_has_objects_of_its_own(build, compiler_for):
    here, there = compiler_for(f"{platform.machine()}-linux-gnu"), compiler_for("riscv64-linux-gnu")
    folders = [build.work_folder(compiler, sanitize) for compiler in (here, there) for sanitize in (False, True)]
    assert len(set(folders)) == 4 and folders[0].name == "native"


@pytest.mark.parametrize("machine", ["aarch64-linux-gnu", "arm64-apple-darwin24", "x86_64-linux-gnu"])
def test_instruction_sets_follow_the_compilers_target(build, compiler_for, machine):
    x86 = ["portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
    assert list(build.isas(compiler_for(machine))) == (x86 if machine.startswith("x86") else ["portable"])
