"""The three plans: which jobs run, for how long, and what counts as success."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from . import diagnose
from .jobs import Job, python, run_all
from .rows import Row, Rows, bad, describe

MINUTES = 9.0
SUMMARY = 10_000
"""Characters."""

CUDA_OPERATORS = ("group_norm_silu", "adamw_ema_")
"""Operators with CUDA C++ kernels."""
CASES = (
    "flash_attention", "contrastive_loss", "linear_cross_entropy", "noise_projection", "patch_embed", "moments to tokens", "mlp", "layer_norm + residual",
    "group_norm_silu", "linear", "latent_projection", "random_normal", "rms_norm + residual", "swiglu", "rope", "adamw_ema_", "ViT-B/2 encoder", "VAE",
)  # fmt: skip
"""Operators in benches/cases.py."""
TUNED = (
    "flash_attention", "contrastive_loss", "linear_cross_entropy", "noise_projection", "patch_embed", "mlp", "layer_norm + residual",
    "group_norm_silu", "latent_projection", "rms_norm + residual", "swiglu", "rope",
)  # fmt: skip
"""Those that spend their time in our kernels."""


def operators() -> tuple[str, ...]:
    """All operators, the simplest first: if that fails, nothing else is tried."""
    from ov3fast import ops

    return ("layer_norm", *(op for op in ops.table() if op != "layer_norm"))


class Plan:
    """Shared settings of a plan's jobs."""

    def __init__(self, name: str, rows: Rows, only: str, rehearse: bool, end: float, cache: Path):
        self.name, self.rows, self.only, self.rehearse, self.end, self.cache = name, rows, only, rehearse, end, cache
        self.environment = {
            "TRITON_CACHE_DIR": str(cache),
            "OV3FAST_CACHE": str(cache / "ov3fast"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if rehearse:
            self.environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def job(self, name: str, module: str, *arguments: str, limit: float) -> Job:
        # The interpreter is slow.
        limit = 4 * limit if self.rehearse else limit
        return Job(name, python(f"tools.gpu.{module}", str(self.rows.path), *arguments), limit, self.environment)

    def run(self, jobs: list[Job], at_once: int = 1) -> None:
        run_all(jobs, self.rows, self.end, at_once)

    def wanted(self, operators: tuple[str, ...]) -> list[str]:
        return [operator for operator in operators if self.only in operator]

    @property
    def at_once(self) -> int:
        """Processes that share the GPU."""
        return 1 if self.rehearse else 4


def run(name: str, out: Path, *, only: str = "", rehearse: bool = False, minutes: float = MINUTES) -> int:
    """Runs the plan, prints its summary and returns the exit status."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    rows = Rows(out / f"{name}.jsonl")
    rows.path.unlink(missing_ok=True)
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path(tempfile.gettempdir(), f"ov3fast-gpu-run-{os.getuid()}"))
    plan = Plan(name, rows, only, rehearse, began + 60 * minutes, cache)
    plan.run([plan.job("machine", "machine", limit=90)])
    if not bad(rows.read()):
        plan.run([_precompile(plan)])
        PLANS[name](plan)
    print(summary(name, rows.read(), time.monotonic() - began))
    return 1 if bad(rows.read()) or not rows.read() else 0


def _precompile(plan: Plan) -> Job:
    only = [plan.only] if plan.only or not plan.rehearse else ["layer_norm"]
    sizes = ["tiny"] if plan.rehearse else ["tiny", "real"]
    job = plan.job("all", "precompile", plan.name, "--cache", str(plan.cache), "--only", *only, "--sizes", *sizes, limit=150)
    # It uses a pretended GPU, so it must not find a real one, and must compile even if everything else is interpreted.
    return Job(job.name, job.command, job.limit, {**job.environment, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"})


def correct(plan: Plan) -> None:
    """Runs the first operator alone; if it fails, the rest is skipped, unless Triton's own launcher works where ours doesn't. Code never run before comes last."""
    plan.run([plan.job("layer_norm", "correct", "triton", "layer_norm", limit=90)])
    failed = len(bad(plan.rows.read()))
    if failed:
        plan.rows.write(
            "all", "launcher", "failed", detail="layer_norm failed; what follows is launched by Triton (OV3FAST_LAUNCHER)"
        )
        plan.environment["OV3FAST_LAUNCHER"] = "triton"
        plan.run([plan.job("layer_norm", "correct", "triton", "layer_norm", limit=90)])
        if len(bad(plan.rows.read())) > failed + 1:
            plan.rows.write("all", "run", "not reached", detail="layer_norm comes first, and failed")
            return
    jobs = [
        plan.job(op, "correct", "triton", op, limit=150)
        for op in plan.wanted(operators())
        if op not in ("layer_norm", "adamw_ema_")
    ]
    if not plan.rehearse:
        jobs += [plan.job(op, "correct", "cuda", op, limit=90) for op in plan.wanted(CUDA_OPERATORS)]
    plan.run(jobs, plan.at_once)
    if plan.only in "flash_attention":
        plan.run([plan.job("flash_attention", "correct", "triton", "descriptors", limit=60)])


def timed(plan: Plan) -> None:
    """One job at a time. torch.compile comes last, since it takes longest."""
    wanted = plan.wanted(CASES)
    if not plan.rehearse:
        plan.run([plan.job("machine", "measure", "machine", limit=60)])
    plan.run([plan.job(op, "measure", op, limit=90) for op in wanted])
    if not plan.rehearse:
        plan.run([plan.job(op, "measure", op, "--compile", limit=90) for op in wanted])


def diagnosed(plan: Plan) -> None:
    plan.run(diagnose.jobs(plan), plan.at_once if plan.rehearse else 6)
    plan.run(diagnose.profiles(plan))
    plan.run([plan.job(op, "tuning", op, limit=45) for op in plan.wanted(TUNED)])
    again = sorted(
        {row["operator"].split("-")[0] for row in bad(Rows(plan.rows.path.with_name("correct.jsonl")).read())}
        & set(operators())
    )
    for operator in again:
        job = plan.job(operator, "correct", "triton", operator, limit=60)
        plan.run([Job(job.name, job.command, job.limit, {**job.environment, "CUDA_LAUNCH_BLOCKING": "1"})])


PLANS = {"correct": correct, "time": timed, "diagnose": diagnosed}


def summary(name: str, rows: list[Row], seconds: float) -> str:
    """At most SUMMARY characters: counts, everything that went wrong, then as many of the numbers as fit."""
    counts = Counter(row["status"] for row in rows)
    wrong = bad(rows)
    lines = [
        f"{name}: {len(rows)} rows in {seconds:.0f} s: "
        + ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    ]
    lines += [describe(row) for row in rows if row["operator"] == "machine" and row["check"] == "facts"]
    lines += [describe(row) for row in wrong]
    worst: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if "ratio" in row:
            key = row["operator"], row["direction"], row["dtype"]
            worst[key] = max(worst.get(key, 0.0), row["ratio"])
    lines += [f"worst error / budget: {' '.join(key)} {ratio}" for key, ratio in worst.items()]
    lines += [describe(row) for row in rows if ("ms" in row and row["check"] != "tune") or row["check"] == "profile"]
    lines += tuned(rows)
    verdict = "FAILED" if wrong or not rows else "passed"
    last = f"{name} {verdict}"
    text = "\n".join(lines)
    room = SUMMARY - len(last) - 40
    if len(text) > room:
        text = text[:room].rsplit("\n", 1)[0] + "\n... the rest is in the file of rows"
    return f"{text}\n{last}"


def tuned(rows: list[Row]) -> list[str]:
    """For each configuration that was tuned, the best of its neighbours."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["check"] == "tune" and "ms" in row:
            key = tuple(row[name] for name in ("operator", "direction", "size", "kernel", "size_class"))
            if key not in best or row["ms"] < best[key]["ms"]:
                best[key] = row
    return [
        f"tune {' '.join(key)}: {row['ms'] / row['before_ms']:.2f} of the time with {row['config']}"
        for key, row in best.items()
    ]


def find(program: str) -> str | None:
    """The path of a CUDA toolkit program, which may not be on PATH."""
    return shutil.which(program) or shutil.which(f"/usr/local/cuda/bin/{program}")


if __name__ == "__main__":
    sys.exit("run tools/gpu_run.py")
