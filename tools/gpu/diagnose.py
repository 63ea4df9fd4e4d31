"""compute-sanitizer on every kernel, Nsight Compute on some. A rehearsal runs the examined programs without these tools."""

from __future__ import annotations

import csv
import io
import re
from typing import TYPE_CHECKING

from .jobs import Job, python

if TYPE_CHECKING:
    from .plans import Plan

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PROFILED = (
    "flash_attention", "contrastive_loss-softmax", "linear_cross_entropy", "mlp-gelu", "layer_norm-residual", "noise_projection", "patch_embed",
    "group_norm_silu-channels_last",
)  # fmt: skip
METRICS = {
    "gpu__time_duration.sum": "time",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps",
    "launch__registers_per_thread": "registers",
}
KERNELS = 12
"""Most launches of ours to profile per operator."""


def jobs(plan: Plan) -> list[Job]:
    """The sanitizer's tools, each over all samples of a backend at tiny sizes."""
    from .plans import find

    names = _names(plan)
    if plan.rehearse:
        return [
            Job("all", python("tools.gpu.once", "triton", *names), 200, plan.environment, _row(plan, "all", "once", "triton"))
        ]
    sanitizer = find("compute-sanitizer")
    if sanitizer is None:
        plan.rows.write("all", "compute-sanitizer", "missing", detail="compute-sanitizer is not installed")
        return []
    # The caching allocator would hide out-of-bounds and uninitialised reads.
    environment = {**plan.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Job("all", [sanitizer, "--tool", tool, "--error-exitcode", "9", *python("tools.gpu.once", backend, *names)], 180, environment,
            _row(plan, "all", tool, backend))
        for backend in ("cuda", "triton") for tool in TOOLS
    ]  # fmt: skip


def profiles(plan: Plan) -> list[Job]:
    """One call of several operators at real sizes, under Nsight Compute."""
    from .plans import find

    if plan.rehearse:
        return []
    ncu = find("ncu")
    if ncu is None:
        plan.rows.write("all", "ncu", "missing", detail="Nsight Compute (ncu) is not installed")
        return []
    ours = (
        "regex:^(ov3_|_?("
        + "|".join(sorted({name.split("_")[0].split("-")[0] for name in PROFILED}))
        + "|cross_entropy|column|merge))"
    )
    command = [
        ncu,
        "--csv",
        "--clock-control",
        "none",
        "--target-processes",
        "all",
        "--kernel-name",
        ours,
        "--launch-count",
        str(KERNELS),
    ]
    command += ["--metrics", ",".join(METRICS)]
    return [
        Job(name, [*command, *python("tools.gpu.once", "any", name, "--real")], 45, plan.environment, _profile(plan, name))
        for name in PROFILED if plan.only in name
    ]  # fmt: skip


def _names(plan: Plan) -> list[str]:
    from . import setting

    return [sample.name for sample in setting.samples().SAMPLES if plan.only in sample.name] if plan.only else []


def _row(plan: Plan, name: str, check: str, backend: str):
    def finished(status: int, output: str) -> None:
        done = output.count("torch.float32") + output.count("torch.bfloat16")
        plan.rows.write(
            name,
            check,
            "failed" if status or not done else "ok",
            backend=backend,
            samples=done,
            detail=output if status else "",
        )

    return finished


def _profile(plan: Plan, name: str):
    def finished(status: int, output: str) -> None:
        found = parse(output)
        for kernel, metrics in found:
            plan.rows.write(
                name,
                "profile",
                kernel=kernel,
                detail=f"{kernel}: " + ", ".join(f"{k} {v}" for k, v in metrics.items()),
                **metrics,
            )
        if status or not found:
            plan.rows.write(name, "profile", "failed", detail=f"exit status {status}\n{output}")

    return finished


def parse(output: str) -> list[tuple[str, dict[str, str]]]:
    """(kernel, metric -> value with unit) per launch, from ncu's CSV, which is mixed with the program's own output."""
    lines = [line for line in output.splitlines() if re.match(r'^"(ID|\d+)",', line)]
    launches: dict[str, tuple[str, dict[str, str]]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        metric = METRICS.get(row.get("Metric Name", ""))
        if metric is not None:
            _, metrics = launches.setdefault(row["ID"], (row["Kernel Name"], {}))
            metrics[metric] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(launches.values())
