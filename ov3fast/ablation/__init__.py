"""Ablations: sets of runs that each change one thing, over several seeds, and the page that compares them.

    from ov3fast.ablation import ablate
    ablate(get_recipe("demo"), ["full", "no-rec", "no-und"], seeds=3, steps=200, out="runs/ablation", data=build_demo())

`variants` lists them: section 5 of the paper (arXiv 2601.15369), and what it leaves open.
"""

from .report import write_ablation_report
from .runs import ablate
from .variants import PAPER, VARIANTS, Variant

__all__ = ["PAPER", "VARIANTS", "Variant", "ablate", "write_ablation_report"]
