"""Two training steps of nnU-Net's own trainer, on a small network: the losses, and so the gradient.

`model_<name>.npz` holds the weights before, the patches (16ths) and their labels.
"""

import json

import jax
import numpy as np
import optax
import pytest

from bhsd_jax.assemble.recipe import _segmentation
from bhsd_jax.nnunet import dataset_json, trained
from bhsd_jax.objectives.supervised import Supervised
from bhsd_jax.torch_weights import importing
from bhsd_jax.train.optimizer import make_optimizer, make_schedule
from bhsd_jax.train.step import Parts, make_train_step
from bhsd_jax.types import Batch, TrainState


def weights(arrays, which):
    start = f"{which}/"
    return {name.removeprefix(start): v for name, v in arrays.items() if name.startswith(start)}


def after_two_steps(module, variables, labels, known, batch, augment=lambda key, batch: batch):
    """Both losses, and the state; of patches that are drawn already."""
    settings = {"smooth": 1e-5, "batch_dice": known["batch_dice"]}
    schedule = make_schedule("constant", steps=10, lr=known["lr"])
    optimizer = make_optimizer("sgd", schedule, momentum=0.99, weight_decay=3e-5, clip=12.0)
    parts = Parts(
        model=module,
        objective=Supervised(),
        optimizer=optimizer,
        schedule=schedule,
        segmentation=_segmentation(settings, labels),
        augment=augment,
        view=lambda key, image: image,
        steps=10,
    )
    params = variables["params"]
    state = TrainState(np.int32(0), params, optimizer.init(params), None, jax.random.key(0))
    step = jax.jit(make_train_step(parts))
    found = []
    for _ in range(2):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return found, state


def test_the_losses_of_two_steps_are_nnunets(golden):
    require_losses(golden, "two_channels")


@pytest.mark.usefixtures("plain_compilation")
@pytest.mark.parametrize("name", ["ignore", "regions", "regions_ignore", "planar"])
def test_the_losses_of_two_steps_with_other_labels_are_nnunets(golden, name):
    require_losses(golden, name)


def require_losses(golden, name):
    with np.load(golden / f"model_{name}.npz") as stored:
        arrays = dict(stored)
    known = json.loads((golden / f"model_{name}.json").read_text())
    labels = dataset_json.labels(known["dataset"], name)
    network = trained.network_of(known["plans"], known["dataset"], known["configuration"])
    module, variables = importing.load(*network, weights(arrays, "before"))
    image = arrays["x16"].astype(np.float32) / 16
    if image.ndim == 4:  # a patch of one slice
        image, arrays["y"] = image[:, :, None], arrays["y"][:, :, None]
    batch = Batch(np.moveaxis(image, 1, -1), np.maximum(arrays["y"][:, 0], 0))
    found, state = after_two_steps(module, variables, labels, known, batch)
    assert np.isfinite(optax.tree.norm(state.params))
    np.testing.assert_allclose(found, arrays["losses"], atol=1e-5)
    assert abs(found[0] - found[1]) > 1e-4, "the step has changed something"
