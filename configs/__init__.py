"""Experiment files: each says what differs from `common`."""
