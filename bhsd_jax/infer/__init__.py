"""Whole volumes through a network, tile by tile."""
