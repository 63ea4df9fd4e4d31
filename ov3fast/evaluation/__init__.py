"""Evaluation on held-out data: reconstruction, retrieval, zero-shot and linear probe, and the report that shows them."""
