"""The tiny training run and its data."""

from tiny_models import data, tiny
