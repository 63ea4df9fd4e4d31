"""Sets of runs that differ in one thing each, over several seeds, and the page that compares them.

    from ov3fast.ablation import ablate
    ablate(get_recipe("demo"), ["full", "no-rec", "no-und"], seeds=3, steps=200, out="runs/ablation", data=build_demo())

The paper's section 5 (arXiv 2601.15369) and what it leaves open: `variants` names them.
"""

from .report import write_ablation_report
from .runs import ablate
from .variants import PAPER, VARIANTS, Variant

__all__ = ["PAPER", "VARIANTS", "Variant", "ablate", "write_ablation_report"]
