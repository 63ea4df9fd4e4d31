"""tools/gpu_run.py, as far as it can be tested without a GPU."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ov3fast.kernels.lib import config as configs
from tools.gpu import diagnose, machine, plans, results
from tools.gpu.jobs import Job, run_all
from tools.gpu.rows import LARGEST_FILE, Rows, bad

ROOT = Path(__file__).parents[1]
ABSENT = ("PIL", "tyro", "diffusers", "webdataset", "wids")


def run(plan, out, *options, paths=()):
    command = [sys.executable, ROOT / "tools" / "gpu_run.py", plan, "--out", out, *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_CACHE_DIR": str(out / "cache")}
    return subprocess.run(command, capture_output=True, text=True, cwd=out, env=environment)


def bare_machine(folder):
    """A folder for PYTHONPATH on which the packages that a bare machine lacks can't be imported."""
    absent = folder / "absent"
    absent.mkdir()
    for name in ABSENT:
        (absent / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')")
    return absent


def test_tests_of_operators_are_collected_on_a_bare_machine(tmp_path):
    """tools/versions.py and `make test-gpu` run them there."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-p",
        "no:cacheprovider",
        "tests/ops/test_linear.py",
        "tests/gpu",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{bare_machine(tmp_path)}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and "test_linear.py" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "plan", [pytest.param(p, marks=pytest.mark.full) if p == "diagnose" else p for p in sorted(plans.PLANS)]
)
def test_rehearsal(plan, tmp_path):
    """Run from another folder, with packages that a bare machine lacks made unimportable."""
    done = run(plan, tmp_path, "--rehearse", "--only", "layer_norm", paths=[bare_machine(tmp_path)])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = Rows(tmp_path / f"{plan}.jsonl").read()
    assert not bad(rows) and done.stdout.endswith(f"{plan} passed\n")
    checks = {(row["direction"], row["check"]) for row in rows if row["operator"].startswith("layer_norm")}
    assert (
        checks
        >= {
            "correct": {("forward", "parity"), ("backward", "parity"), ("both", "same bits")},
            "time": {("forward", "time"), ("both", "time")},
            "diagnose": set(),
        }[plan]
    )
    if plan == "correct":
        assert all(0 < row["ratio"] <= 1 for row in rows if row["check"] == "parity")
    with pytest.raises(ValueError, match="rehearsal"):
        results.facts(rows)


def test_rehearsal_of_attention_s_descriptors(tmp_path):
    """The `--only` of the plans above does not cover this."""
    command = [sys.executable, "-m", "tools.gpu.correct", tmp_path / "rows.jsonl", "triton", "descriptors"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.DEVNULL)
    rows = Rows(tmp_path / "rows.jsonl").read()
    assert len(rows) == 12 and not bad(rows) and all(0 < row["ratio"] <= 1 for row in rows)


def test_a_launcher_that_fails_is_left_for_triton_s(tmp_path, monkeypatch):
    """The run goes on with Triton's launcher, and still counts as failed."""
    rows, ran = Rows(tmp_path / "correct.jsonl"), []
    plan = plans.Plan("correct", rows, "", True, time.monotonic() + 60, tmp_path)

    def run(jobs, at_once=1):
        for job in jobs:
            ran.append((job.name, job.environment.get("OV3FAST_LAUNCHER")))
            if "OV3FAST_LAUNCHER" not in job.environment or fails:
                rows.write(job.name, "same bits", "failed")

    monkeypatch.setattr(plan, "run", run)
    fails = False
    plans.correct(plan)
    assert ran[:2] == [("layer_norm", None), ("layer_norm", "triton")] and {launcher for _, launcher in ran[1:]} == {"triton"}
    assert len(ran) > 10 and [row["check"] for row in bad(rows.read())] == ["same bits", "launcher"]
    rows.path.unlink()
    ran.clear()
    del plan.environment["OV3FAST_LAUNCHER"]
    fails = True
    plans.correct(plan)
    assert len(ran) == 2 and rows.read()[-1]["status"] == "not reached"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_a_failure(tmp_path):
    done = run("correct", tmp_path)
    assert done.returncode == 1 and done.stdout.endswith("correct FAILED\n") and "missing machine GPU" in done.stdout


def test_a_backend_that_was_not_built_is_a_failure(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    machine.backends_that_are_not_there(
        rows, {"adamw_ema_": {"cuda": "not built", "cpu": "ready"}, "mlp": {"triton": "ready"}}, ("triton", "cuda")
    )
    [row] = rows.read()
    assert (row["operator"], row["status"], row["detail"]) == ("adamw_ema_", "missing", "not built") and bad([row])


def test_a_job_that_hangs_is_killed_and_says_in_what(tmp_path):
    """And so is its own subprocess."""
    rows, child = Rows(tmp_path / "rows.jsonl"), tmp_path / "child"
    script = (
        "import subprocess, sys, time; print('launch some_kernel', flush=True);"
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    jobs = [
        Job("hangs", [sys.executable, "-c", script], 8.0),
        Job("fails", [sys.executable, "-c", "raise SystemExit('so it goes')"], 30.0),
        Job("works", [sys.executable, "-c", ""], 30.0),
    ]
    run_all(jobs, rows, time.monotonic() + 30, at_once=2)
    found = {row["operator"]: row for row in rows.read()}
    assert set(found) == {"hangs", "fails"}
    assert found["hangs"]["status"] == "killed" and found["hangs"]["detail"].endswith("launch some_kernel")
    assert found["fails"]["status"] == "failed" and "so it goes" in found["fails"]["detail"]
    state, deadline = Path(f"/proc/{child.read_text()}/stat"), time.monotonic() + 10

    def gone() -> bool:
        try:
            return state.read_text().split()[2] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    # The signal was sent; the kernel may deliver it later.
    while not gone() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone()


def test_jobs_that_the_time_does_not_allow_are_named(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    run_all([Job("late", [sys.executable, "-c", ""], 1.0)], rows, time.monotonic())
    assert [(row["operator"], row["status"]) for row in rows.read()] == [("late", "not reached")]


def test_summary_and_file_have_limits(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    for number in range(300):
        rows.write(f"operator {number}", "parity", "failed", detail="x" * 5000)
    text = plans.summary("correct", rows.read(), 1.0)
    assert len(text) <= plans.SUMMARY and text.endswith("correct FAILED") and "300 failed" in text
    rows.path.write_bytes(b"{}\n" * (LARGEST_FILE // 3))
    rows.write("one", "more")
    assert rows.path.stat().st_size <= LARGEST_FILE


def test_rows_that_were_cut_off_are_left_out(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    rows.write("mlp", "parity", ratio=0.5)
    with rows.path.open("a") as file:
        file.write('{"operator": "ml')
    assert [row["ratio"] for row in rows.read()] == [0.5]


FACTS = dict(gpu="Some GPU", driver=13000, cuda="13.0", torch="2.11.0", triton="3.6.0", commit="abc", rehearsal=False)


def written(folder):
    folder.mkdir()
    timed, correct, diagnosed = (Rows(folder / f"{name}.jsonl") for name in ("time", "correct", "diagnose"))
    for rows in (timed, correct, diagnosed):
        rows.write("machine", "facts", facts=FACTS)
    timed.write("machine", "rate", dtype="bf16", size="product", rate=5e14)
    timed.write("machine", "rate", size="copy", rate=3e12)
    for operator in ("mlp", "ViT-B/2 encoder"):
        where = dict(direction="forward", dtype="bf16", size="8", flops=1e12, bytes=0.0, target=1.2, captured=True)
        for variant, ms in (("ov3fast", 4.0), ("triton", 5.0), ("eager", 6.0), ("compile", 3.0)):
            timed.write(operator, "time", **where, variant=variant, ms=ms, ms_q1=ms, ms_q3=ms, host_us=80.0)
    correct.write("mlp", "parity", backend="triton", direction="forward", dtype="bf16", size="3x4", ratio=0.25)
    correct.write("mlp", "parity", "over", backend="triton", direction="backward", dtype="bf16", size="3x4", ratio=1.25)
    diagnosed.write("mlp", "profile", kernel="mlp_forward", time="3 us", registers="128")
    return folder


def test_what_comes_back_becomes_tables_and_a_sentence(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("Before. **Nothing here has been run on a GPU yet**: after.")
    results.take_over(written(tmp_path / "run"), tmp_path, readme)
    assert readme.read_text() == (
        "Before. **Run on a GPU: Some GPU, torch 2.11.0, Triton 3.6.0, commit abc; 1 of 2 checks of correctness passed; times are in"
        " benches/results/operators-cuda.csv**: after."
    )
    [line] = results.csv.DictReader((tmp_path / "operators-cuda.csv").open())
    expected = dict(
        ms="4.0000", triton_ms="5.0000", cuda_ms="", best_peer="compile", ratio="0.75", of_floor="0.50", rate="250.0 TFLOP/s"
    )
    assert {name: line[name] for name in expected} == expected and line["gpu"] == "Some GPU"
    assert "ViT-B/2" in (tmp_path / "step-cuda.csv").read_text() and "1.25" in (tmp_path / "parity-cuda.csv").read_text()
    assert "mlp_forward" in (tmp_path / "profiles-cuda.csv").read_text()
    results.take_over(tmp_path / "run", tmp_path, readme)  # again, over its own sentence


def tried(rows, config, ms, operator="mlp", size="3x4", status="ok"):
    where = dict(
        direction="both", dtype="bf16", size=size, kernel="mlp_forward", kind="bf16", size_class="large", architecture="sm_90"
    )
    before = {"blocks": {"BLOCK_M": 128}, "warps": 8, "stages": 4}
    rows.write(
        operator, "tune", status, **where, before=before, config=config, before_ms=2.0, **({"ms": ms} if status == "ok" else {})
    )


def test_rows_of_configuration_that_won_are_picked_from_then_on(tmp_path, monkeypatch):
    readme, measured = tmp_path / "README.md", tmp_path / "measured.csv"
    readme.write_text("**Nothing here has been run on a GPU yet**")
    other = "mlp_backward,bf16,large,sm_90,{},4,1,0.900,Other GPU,2,3,abc\n"
    measured.write_text(",".join(configs.COLUMNS) + "\n" + other)
    rows = Rows(written(tmp_path / "run") / "diagnose.jsonl")
    better, sometimes, worse, broken = ({"blocks": {"BLOCK_M": 64}, "warps": 4, "stages": n} for n in (1, 2, 3, 4))
    for size in ("3x4", "5x6"):
        tried(rows, better, 1.0 if size == "3x4" else 2.2, size=size)
        tried(rows, worse, 1.99, size=size)
    tried(rows, sometimes, 0.1)
    tried(rows, broken, 0.0, status="left out")
    results.take_over(tmp_path / "run", tmp_path, readme, measured)
    lines = measured.read_text().splitlines()
    assert lines[1] == other.strip() and lines[2].startswith("mlp_forward,bf16,large,sm_90,") and "0.742,Some GPU" in lines[2]
    assert len(lines) == 3

    monkeypatch.setattr(configs, "MEASURED", measured)
    configs.measured.cache_clear()
    import ov3fast.kernels.mlp  # noqa: F401  (whose rows it replaces)

    won = configs.Config({"BLOCK_M": 64}, 4, 1)
    assert configs.pick("mlp_forward", "bf16", "large", "sm_90") == won
    assert configs.pick("mlp_forward", "bf16", "large", "sm_90", tuned=False) != won
    assert configs.pick("mlp_forward", "bf16", "large", "sm_100") != won
    configs.measured.cache_clear()


def test_neighbours_of_a_row():
    from ov3fast.kernels.attention import config as rows
    from tools.gpu import tuning

    row = rows.TABLE["flash_attention_grad_q"]["any", "64", "any"]
    found = tuning.neighbours(("flash_attention_grad_q", "bf16", "64"), row)
    assert row not in found and len(found) <= tuning.MOST and len({str(config) for config in found}) == len(found)
    assert {config.stages for config in found} >= {row.stages + 1, row.stages - 1} and {config.warps for config in found} == {
        4,
        8,
    }
    assert any(config.blocks != row.blocks for config in found)


def test_nothing_is_written_unless_all_of_it_can_be(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("Nothing to replace.")
    with pytest.raises(ValueError, match="no sentence in bold"):
        results.take_over(written(tmp_path / "run"), tmp_path, readme)
    assert not list(tmp_path.glob("*.csv"))
    with pytest.raises(FileNotFoundError, match="neither correct.jsonl nor time.jsonl"):
        results.take_over(tmp_path, tmp_path, readme)


def test_the_readme_says_what_was_run():
    assert results.STATUS.search(results.README.read_text(encoding="utf-8"))


def test_what_nsight_compute_prints():
    columns = '"ID","Process ID","Process Name","Host Name","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    line = '"{}","7","python","host","{}","{}","{}","{}"'
    output = "\n".join([
        "==PROF== Connected", "mlp-gelu torch.bfloat16", columns,
        line.format(0, "mlp_forward", "gpu__time_duration.sum", "us", "31.2"),
        line.format(0, "mlp_forward", "launch__registers_per_thread", "register/thread", "128"),
        line.format(1, "linear", "gpu__time_duration.sum", "us", "9"),
    ])  # fmt: skip
    assert diagnose.parse(output) == [
        ("mlp_forward", {"time": "31.2 us", "registers": "128 register/thread"}),
        ("linear", {"time": "9 us"}),
    ]


def test_plans_name_every_operator():
    from benches import cases
    from tools.gpu.setting import samples

    module = samples()
    assert set(plans.operators()) == {sample.op for sample in module.SAMPLES}
    assert {f"{name}" for name in diagnose.PROFILED} <= {sample.name for sample in module.SAMPLES}
    assert set(plans.CASES) == {operator for operator, *_ in cases.full(on_gpu=True)}
    assert set(plans.CASES) == {operator for operator, *_ in cases.tiny()}
    assert set(plans.TUNED) < set(plans.CASES)
