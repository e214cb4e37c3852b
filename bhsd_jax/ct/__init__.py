"""Scans on the host: files, geometry, HU, preparing one case at a time. NumPy only."""
