"""Shards to batches, with Grain."""
