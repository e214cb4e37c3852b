"""Segmentation metrics on the host. NumPy only."""
