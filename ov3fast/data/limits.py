"""Limits that several files share."""

MAX_IMAGE_PIXELS = 64 * 1024 * 1024
"""Images with more pixels are skipped without being decoded; callers may set another limit."""
