"""How networks of PyTorch name and lay out their weights, one file each, found by name."""
