"""The machine, its file system and its cluster, without JAX."""
