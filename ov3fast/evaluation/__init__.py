"""Evaluation on held-out data: reconstruction, retrieval, zero-shot and linear probe, and the report that shows them.

metrics.py         PSNR, SSIM, LPIPS-style, each with its protocol
reconstruction.py  the model compared with its VAE alone;  retrieval.py: R@k in both directions, zero-shot;  probe.py: linear probe
pictures.py        held-out pictures in memory, and their embeddings
evaluate.py        everything, as tables;  headline.py: the metrics with targets, tables on the terminal
report.py          report.html, of assets/report (Jinja), curves.py (the training log), charts.py (matplotlib), palette.py (pictures)
"""

from ov3fast.evaluation.evaluate import Evaluation, evaluate
from ov3fast.evaluation.headline import DEMO_TARGETS, headline, print_tables
from ov3fast.evaluation.metrics import Metric, lpips_metric, psnr, ssim, standard_metrics
from ov3fast.evaluation.probe import fashion_mnist, linear_probe
from ov3fast.evaluation.reconstruction import reconstruct
from ov3fast.evaluation.report import write_report
from ov3fast.evaluation.retrieval import retrieval, zero_shot

__all__ = [
    "DEMO_TARGETS",
    "Evaluation",
    "Metric",
    "evaluate",
    "fashion_mnist",
    "headline",
    "linear_probe",
    "lpips_metric",
    "print_tables",
    "psnr",
    "reconstruct",
    "retrieval",
    "ssim",
    "standard_metrics",
    "write_report",
    "zero_shot",
]
