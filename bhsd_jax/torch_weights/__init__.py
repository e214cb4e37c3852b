"""PyTorch's weights."""
