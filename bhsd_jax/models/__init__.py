"""Backbones, one file each, found by name."""
