"""Our side of `bench_time_to_dice.py`, which starts it: the verbs `train` and `predict`.

    python tools/bench_trainer_ours.py train STUDY RUN INITIAL|- FLAGS OF THE VERB ...
    python tools/bench_trainer_ours.py predict STUDY RUN

Around the loop of `train` it reads the clock, keeps the weights of some steps as runs of their own,
and if wanted starts with given weights instead of those drawn.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from flax import serialization

from bhsd_jax import main as program
from bhsd_jax.nnunet import trained
from bhsd_jax.platform import files
from bhsd_jax.settings import Settings
from bhsd_jax.torch_weights import exporting, importing
from bhsd_jax.train.checkpoint import save_networks
from bhsd_jax.types import TrainState
from bhsd_jax.verbs import predict as predicting
from bhsd_jax.verbs import train as training
from configs import from_run


def main() -> None:
    """Trains one network, or predicts with the weights that one training has kept."""
    verb, study, run = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    setup = json.loads((study / "setup.json").read_text())
    setup |= setup["ours"]
    if verb == "predict":
        predict(run, study, setup)
        return
    watch = Watch(run, setup, study)
    initial = None if sys.argv[4] == "-" else Path(sys.argv[4])
    fit = training.fit

    def watched(state, batches, step, actions, steps):
        state = watch.start(state, initial)
        return fit(state, batches, step, [*actions, watch], steps)

    training.fit = watched
    sys.argv[1:] = ["train", f"--workdir={run}", *sys.argv[5:]]
    program.cli()


class Watch:
    """What is noted after each step; waits for a step only where its weights are kept."""

    def __init__(self, run: Path, setup: dict, study: Path) -> None:
        self.run, self.setup, self.points = run, setup, []
        self.begun = self.left_out = 0.0  # CPU seconds: before the loop, and in what is kept
        plans = json.loads((study / "plans.json").read_text())
        dataset = json.loads((study / "raw" / setup["dataset"] / "dataset.json").read_text())
        self.network = trained.network_of(plans, dataset, "3d_fullres")

    def start(self, state: TrainState, initial: Path | None) -> TrainState:
        """Puts given weights in place, keeps those the training starts with, starts the clock."""
        if initial is not None:
            _, given = importing.load(*self.network, dict(np.load(initial)))
            params = serialization.from_state_dict(jax.device_get(state.params), given["params"])
            places = jax.tree.map(lambda leaf: leaf.sharding, state.params)
            state = dataclasses.replace(state, params=jax.device_put(params, places))
        self.keep_torch("initial", state)
        self.begun = time.process_time()
        return state

    def keep_torch(self, name: str, state: TrainState) -> None:
        """The weights under the names of PyTorch's network."""
        params = jax.device_get(state.params)
        np.savez(self.run / f"{name}.npz", **exporting.dump(*self.network, {"params": params}))

    def __call__(self, step: int, state: TrainState, *_) -> None:
        """Keeps the weights at the steps of the curve."""
        if step not in self.setup["curve"]:
            return
        jax.block_until_ready(state.params)
        now = time.process_time()
        spent = now - self.begun - self.left_out
        self.points.append({"step": step, "cpu_s": spent, "before_cpu_s": self.begun})
        folder = self.run / f"at_{step}"
        config, plan = (
            json.loads((self.run / f"{n}.json").read_text()) for n in ("config", "plan")
        )
        params = jax.device_get(state.params)
        save_networks(folder / "checkpoints", params, config=config, plan=plan)
        files.write_json(folder / "plan.json", plan)
        files.write_json(folder / "config.json", config)
        (self.run / "curve.json").write_text(json.dumps(self.points))
        if step == self.setup["steps"]:
            self.keep_torch("final", state)
        self.left_out += time.process_time() - now


def predict(run: Path, study: Path, setup: dict) -> None:
    """Label maps of the validation cases at every step of the curve."""
    points = json.loads((run / "curve.json").read_text())
    for point in points:
        folder = run / f"at_{point['step']}"
        config = from_run.get_config(str(folder))
        config.predict.images = str(study / "raw" / which(point["step"], setup))
        config.predict.checkpoint = "last"
        begun = time.process_time()
        predicting.run(Settings.of(config), folder)
        point["predict_cpu_s"] = time.process_time() - begun
    (run / "curve.json").write_text(json.dumps(points))


def which(step: int, setup: dict) -> str:
    """Folder of the scans that are predicted after this step."""
    return "all" if step == setup["steps"] else "early"


if __name__ == "__main__":
    main()
