"""What is minimized, one file each, found by name."""
