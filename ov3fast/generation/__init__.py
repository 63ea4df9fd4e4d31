"""Generation over unified tokens, as RAE does it: statistics, generators, samplers, and the figures of what they make.

moments.py     means, variances and covariances that merge exactly
statistics.py  per-element statistics of tokens, and RAE's and diffusers' forms of them
flow.py        flow matching: times, loss, samplers; guidance.py: four kinds
ddt.py         the two generators (layers.py: their parts)
fid.py         FID, inception score, precision and recall under named protocols; frechet.py: their maths; inception.py: FID's network
"""
