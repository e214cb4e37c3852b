"""nnU-Net's planner, its plans.json, and the networks it has trained."""
