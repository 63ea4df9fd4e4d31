"""Kernels compiled for each chip without a GPU: every row of the table passes the checks, and the checks catch what they should."""

import ast
import csv
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest
from kernel_tools import trial

from ov3fast import kernels, ops
from ov3fast.kernels.aot import compile, syntax, table
from ov3fast.kernels.aot.chips import CHIPS
from ov3fast.kernels.aot.compile import Job, entries, measure
from ov3fast.kernels.aot.estimate import TERMS
from ov3fast.kernels.lib import config as configs
from ov3fast.kernels.lib.config import Config
from ov3fast.ops import triton as backend

TABLE = Path(__file__).parents[2] / "benches" / "results" / "kernels-aot.csv"

pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="compiled kernels, not the interpreter")

OPS = sorted({} if backend.INTERPRETED else {entry.op for module in compile.modules() for entry in entries(module)})
GATED = ("sm_80", "sm_90")
# float16 compiles like bfloat16 except for instruction names, and float32 takes minutes; `make aot` covers all three.
DTYPES = ("bf16",)


@pytest.mark.full
@pytest.mark.parametrize("target", GATED)
@pytest.mark.parametrize("op", OPS)
def test_no_row_falls_short(op, target):
    rows = table.rows([target], [op], DTYPES)
    short = [f"{row['kernel']} {row['variant']} ({row['config']}) {row['dtype']}: {row['shortcomings']}" for row in rows]
    assert rows and not [text for text, row in zip(short, rows, strict=True) if row["shortcomings"]], "\n".join(short)


def test_the_committed_table_has_no_shortcomings_on_nvidia():
    """For all chips and dtypes, as written by `make aot`."""
    with TABLE.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} >= set(OPS) and {row["target"] for row in rows} == set(CHIPS)
    assert not [row for row in rows if row["shortcomings"] and row["target"] != "gfx942"]


def jit_functions():
    """(module, function) of every @triton.jit function defined in kernels/."""
    from triton.runtime.jit import JITFunction

    for info in pkgutil.walk_packages(kernels.__path__, "ov3fast.kernels."):
        if info.name.startswith("ov3fast.kernels.aot"):
            continue
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if isinstance(value, JITFunction) and value.__module__ == module.__name__:
                yield info.name, value


def mentioned(function):
    """Ids of the functions that this one refers to."""
    for node in ast.walk(function.parse()):
        if isinstance(node, ast.Name):
            yield id(function.__globals__.get(node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield id(getattr(function.__globals__.get(node.value.id), node.attr, None))


def returns_a_value(function):
    return any(isinstance(node, ast.Return) and node.value is not None for node in ast.walk(function.parse()))


def test_every_entry_point_is_described():
    """Entry points are the functions that return nothing and that no other function refers to."""
    everything = dict.fromkeys(jit_functions())
    described = [entry for module in compile.modules() for entry in entries(module)]
    helpers = {name for _, function in everything for name in mentioned(function) if name != id(function)}
    helpers |= {id(value) for entry in described for value in entry.constexprs.values()}
    launched = {id(entry.kernel) for entry in described}
    missing = [
        f"{module}.{f.__name__}" for module, f in everything if id(f) not in helpers | launched and not returns_a_value(f)
    ]
    assert not missing, f"no Entry describes {', '.join(missing)}"


def test_every_row_of_the_configurations_is_compiled():
    described = [entry for module in compile.modules() for entry in entries(module)]
    used = set()
    for entry in described:
        for target in entry.targets:
            for dtype in entry.dtypes:
                for size in entry.sizes or configs.sizes(entry.name):
                    used.add((entry.name, id(configs.pick(entry.name, dtype, size, target))))
    idle = [
        (kernel, *key) for kernel, rows in configs.TABLE.items() for key, row in rows.items() if (kernel, id(row)) not in used
    ]
    assert not idle, f"no launch on {', '.join(CHIPS)} picks {idle}"


def test_the_backend_takes_what_the_widest_rows_of_configuration_hold():
    from ov3fast.kernels.attention import config as attention
    from ov3fast.kernels.lib import norm

    assert {backend.KERNELS[op].widest for op in ("layer_norm", "rms_norm")} == {norm.WIDTHS[-1]}
    assert {backend.KERNELS[op].widest for op in ("flash_attention", "flash_attention_qkvpacked")} == {
        int(attention.WIDTHS[-1])
    }


def test_entries_name_operators_and_count_work():
    for module in compile.modules():
        for entry in entries(module):
            assert entry.op in (*ops.table(), module), "the operator, or the file where several share a kernel"
            for dtype in entry.dtypes:
                work = entry.work(
                    dtype, configs.pick(entry.name, dtype, (entry.sizes or configs.sizes(entry.name))[0], entry.targets[-1])
                )
                assert work.bytes >= work.once > 0 and work.flops >= 0, (entry.name, entry.variant, dtype)
                assert work.programs > 0


# ---- the gate itself -------------------------------------------------------------------------------------------------


def row(entry, config, dtype, target):
    return table.describe(entry, Job("trial", 0, config, "any", dtype, target), measure(entry, config, dtype, target))


COPY = Config({"BLOCK": 1024})
PRODUCT = Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32})


@pytest.mark.parametrize(("target", "opcode"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTC"), ("gfx942", "v_mfma")])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_product_uses_each_chips_matrix_instructions(target, opcode, dtype):
    made = row(trial.entries()[1], PRODUCT, dtype, target)
    assert made["shortcomings"] == "" and made["mma"] and all(name.startswith(opcode) for name in made["mma"])
    assert 0 < made["shared_bytes"] <= CHIPS[target].shared and 16 < made["registers"] < 256


def test_the_gate_sees_what_a_kernel_lacks():
    copy, product, scalar, atomic = trial.entries()
    assert row(copy, COPY, "bf16", "sm_80")["shortcomings"] == ""
    assert "wide: 0%" in row(scalar, COPY, "bf16", "sm_80")["shortcomings"]
    assert "ADD.F32" in row(atomic, COPY, "fp32", "sm_80")["shortcomings"]
    large = row(product, Config({"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64}, warps=4, stages=4), "fp32", "sm_80")[
        "shortcomings"
    ]
    assert "stack: " in large and "spills: " in large and "shared: " in large
    assert "no HGMMA" in row(product, Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}), "bf16", "sm_90")["shortcomings"]


def test_exceptions_stand_in_the_row_with_their_reason():
    scalar = trial.entries()[2]
    made = row(scalar, COPY, "bf16", "sm_80")
    assert made["exceptions"] == ""
    made = row(trial.excused(scalar, {"wide@sm_80": "a stride of two"}), COPY, "bf16", "sm_80")
    assert made["shortcomings"] == "" and made["exceptions"] == "wide: a stride of two"
    for key, excuse in (
        ("wide", True),
        ("wide@bf16", True),
        ("wide@sm_80/bf16", True),
        ("wide@sm_90", False),
        ("stack", False),
    ):
        assert bool(trial.excused(scalar, {key: "so"}).excuse("wide", "sm_80", "bf16")) == excuse


def test_a_kernel_that_does_not_compile_is_a_row_too():
    entry = trial.entries()[0]
    made = table.describe(
        entry, Job("trial", 0, COPY, "any", "bf16", "sm_80"), {"error": "CompilationError: at 1:1\nno such thing"}
    )
    assert made["shortcomings"] == "compiles: no such thing"


def test_estimates_count_what_the_machine_code_does():
    copy = row(trial.entries()[0], COPY, "fp32", "sm_90")
    assert copy["bound"] == "hbm" and copy["estimate_us"] == pytest.approx(1e6 * 2**23 / (0.9 * 3.35e12), rel=1e-3)
    assert copy["tensor_us"] == copy["mufu_us"] == 0 < copy["issue_us"] < copy["hbm_us"]
    product = row(trial.entries()[1], PRODUCT, "bf16", "sm_90")
    # 256 tiles on 132 SMs take as long as 264.
    assert product["tensor_us"] == pytest.approx(1e6 * 2**31 * 264 / 256 / (0.8 * 989.4e12), rel=1e-3)
    assert product["issue_us"] > 0 and product["estimate_us"] == max(product[term] for term in TERMS)


def test_an_entry_that_does_not_fit_its_kernel_says_so():
    copy = trial.entries()[0]
    with pytest.raises(ValueError, match="neither the entry nor the config .* sets BLOCK"):
        measure(copy, Config(), "bf16", "sm_80")
    with pytest.raises(ValueError, match="no parameter WARPS"):
        measure(copy, Config({"BLOCK": 128, "WARPS": 2}), "bf16", "sm_80")


def test_results_are_remembered_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("OV3FAST_AOT_CACHE", str(tmp_path))
    monkeypatch.setattr(compile, "entries", lambda module: trial.entries())
    job = Job("trial", 0, COPY, "any", "bf16", "sm_80")
    first = compile.run(job)
    assert dict(compile.measure_all([job], 1)) == {0: first} and len(list(tmp_path.iterdir())) == 1
    places = {compile._remembered(job) for job in (
        job, Job("trial", 1, PRODUCT, "any", "bf16", "sm_80"), Job("trial", 0, COPY, "any", "fp32", "sm_80"),
        Job("trial", 0, COPY, "any", "bf16", "sm_90"), Job("trial", 0, Config({"BLOCK": 512}), "any", "bf16", "sm_80"),
    )}  # fmt: skip
    assert len(places) == 5


MODULE = '''
import triton
import triton.language as tl

LIMIT = tl.constexpr({limit})
{before}

@triton.jit
def inner(x):
    """{docstring}"""
    return x * {factor}{comment}


@triton.jit
def outer(x):
    tl.store(x, inner(tl.load(x)) + LIMIT)
'''


def test_a_result_depends_on_all_that_a_kernel_calls_but_not_on_prose(tmp_path):
    def syntax_of(**parts):
        path = tmp_path / f"module_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(MODULE.format(**{"limit": 1, "before": "", "docstring": "Twice.", "factor": 2, "comment": "", **parts}))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return syntax.of_kernel(module.outer)

    first = syntax_of()
    assert first == syntax_of(before="# A line more.\n", docstring="Two times.", comment="  # doubled")
    assert first != syntax_of(limit=3) and first != syntax_of(factor=3)


def test_tables(tmp_path):
    rows = [row(trial.entries()[1], PRODUCT, dtype, target) for dtype in ("fp32", "bf16") for target in ("sm_80", "sm_90")]
    table.write_csv(rows, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert read == [table.flat(made) for made in rows] and read[0]["mma"].endswith("HMMA.1688.F32.TF32")
    lines = table.markdown(read).splitlines()
    assert len(lines) == 3 and "| product |  | 1024 x 1024 x 1024 | 2.15 GFLOP, 6.29 MB | " in lines[2]
    cell = r"\| \d+ registers, \d+ KB, HMMA, \*\*[\d.]+ µs \w+\*\* \([\d.]+ / [\d.]+ / [\d.]+ / [\d.]+; \d+ an SM\) \| \d+ registers, "
    assert re.search(cell, lines[2])
