"""Generation over unified tokens, following RAE: token statistics, generators, samplers, and metrics of their samples.

moments.py     mergeable means, variances and covariances
statistics.py  per-element token statistics, also in RAE's and diffusers' formats
flow.py        flow matching: times, loss, samplers
guidance.py    classifier-free guidance, AutoGuidance, internal guidance
ddt.py         the two generators (layers.py: their layers)
fid.py         FID, inception score, precision and recall under named protocols
frechet.py     the maths of these metrics
inception.py   FID's network
"""
