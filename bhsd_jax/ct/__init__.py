"""Scans on the host: files, geometry, planning, shards. NumPy only."""
