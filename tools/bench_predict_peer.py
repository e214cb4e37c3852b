"""Makes nnU-Net's checkpoint for `bench_predict.py`, which starts it; needs torch.

PYTHON tools/bench_predict_peer.py WEIGHTS.npz CHECKPOINT.pth FACTS
"""

import json
import sys

import numpy as np
import torch


def main() -> None:
    """Saves the weights as nnU-Net's trainer does, with the facts, a JSON object, beside them."""
    weights, checkpoint, facts = sys.argv[1:]
    with np.load(weights) as file:
        state = {name: torch.from_numpy(value) for name, value in file.items()}
    torch.save({"network_weights": state, **json.loads(facts)}, checkpoint)


if __name__ == "__main__":
    main()
