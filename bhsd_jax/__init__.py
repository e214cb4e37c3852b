"""Segmentation of intracranial hemorrhage on head CT, in JAX."""

__version__ = "0.1.0"
