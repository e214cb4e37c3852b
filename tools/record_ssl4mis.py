"""Runs SSL4MIS' own training scripts on a small network and records what they do, for the tests.

python tools/record_ssl4mis.py FOLDER   # a checkout of github.com/HiLab-git/SSL4MIS at 06df604

Needs torch, torchvision, tensorboardX, batchgenerators, h5py, medpy, SimpleITK, scikit-image, tqdm,
and no GPU. Every script's own `train` runs twice, unchanged: 20 iterations of a small network,
whose batches, random draws, losses, gradients and parameters are recorded; and a whole training of
600, whose learning rates are. Its own function gives the consistency weights of 30,000. Replaced
are the data (generated), the network, the logger, the validation and what needs CUDA. Arrays stay
as PyTorch has them, N C W H D; `tests/objectives/test_ssl4mis.py` has the other side.
"""

import contextlib
import functools
import importlib
import logging
import random
import sys
import tempfile
import warnings
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import nn

OUT = Path(__file__).parents[1] / "tests" / "golden"
SCRIPTS = {
    "suponly": "train_fully_supervised_3D",
    "entropy": "train_entropy_minimization_3D",
    "mean_teacher": "train_mean_teacher_3D",
    "ict": "train_interpolation_consistency_training_3D",
    "cps": "train_cross_pseudo_supervision_3D",
}
UPDATES = 20
KEPT = (1, 2, 5, 10, 20)  # updates after which gradients and parameters are kept
PATCH = [8, 8, 4]  # W H D
SHAPE = (11, 13, 6)
CASES, LABELED = 250, 6  # the scripts have 250 cases written into them
UNIT = 1 / 16  # images and noise are multiples of it, so that they are kept as int8
ITERATIONS, WHOLE = 30_000, 600
EDGES = (0, 1, 2, 3, 149, 150, 151, 299, 300, 14_999, 15_000, 29_849, 29_850, 29_998, 29_999)
LOOKED_AT = sorted({*EDGES, *range(0, ITERATIONS, 577)})


class Small(nn.Module):
    """Two convolutions with an instance norm between them, and a head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.norm = nn.InstanceNorm3d(4, affine=True)
        self.second = nn.Conv3d(4, 4, 3, padding=1)
        self.head = nn.Conv3d(4, 2, 1)

    def forward(self, image):
        """Logits [N 2 W H D]."""
        x = nn.functional.leaky_relu(self.norm(self.first(image)), 0.01)
        return self.head(nn.functional.leaky_relu(self.second(x), 0.01))


class Least(nn.Module):
    """Two weights: the fastest network that a script can train."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv3d(1, 2, 1, bias=False)

    def forward(self, image):
        """Logits [N 2 W H D]."""
        return self.head(image)


class EnoughError(Exception):
    """All that was wanted is recorded."""


class Rows(list):
    """What tqdm gives, without its bar."""

    def close(self):
        """Nothing."""


class Recorder:
    """What one run of a script did. Lists have an entry for every update, in turn."""

    def __init__(self, network, updates):
        self.network, self.updates = network, updates
        self.networks = []  # as the script made them: student and teacher, or the two of CPS
        self.start = []  # parameters of each before the first update
        self.scalars = {}
        self.batches, self.draws, self.rates = [], [], []
        self.grads, self.params, self.teachers = {}, {}, {}  # by network and update

    def make(self, **_):
        """Stands for `net_factory_3d`."""
        self.networks.append(self.network())
        return self.networks[-1]

    def add_scalar(self, name, value, step):
        """Of the script's log."""
        self.scalars.setdefault(name, {})[step] = float(value)

    def add_image(self, *_):
        """Nothing."""

    def close(self):
        """Nothing."""

    def noise(self, like):
        """Stands for `torch.randn_like`."""
        rng = np.random.default_rng(len(self.draws))
        drawn = np.clip(np.round(rng.normal(size=like.shape) / UNIT), -127, 127).astype(np.int8)
        self.draws.append(drawn if self.updates else None)
        return torch.from_numpy((drawn * UNIT).astype(np.float32))

    def before(self, optimizer, which):
        """At the start of `optimizer.step()`; `which` is its place among the optimizers."""
        if which == 0:
            self.rates.append(optimizer.param_groups[0]["lr"])
            if self.updates and len(self.rates) > self.updates:
                self.rates.pop()
                raise EnoughError
        if self.updates and len(self.rates) in KEPT:
            rows = [p.grad.numpy().copy() for p in optimizer.param_groups[0]["params"]]
            self.grads[which, len(self.rates)] = rows

    def keep_teacher(self, teacher, update):
        """After its own update."""
        if self.updates and update in KEPT:
            self.teachers[update] = copies(teacher)

    def after(self, optimizer, which):
        """At its end."""
        if self.updates and len(self.rates) in KEPT:
            rows = [p.detach().numpy().copy() for p in optimizer.param_groups[0]["params"]]
            self.params[which, len(self.rates)] = rows


class Loader(torch.utils.data.DataLoader):
    """In this process, with every batch recorded."""

    def __init__(self, recorder, *given, **options):
        super().__init__(*given, **(options | {"num_workers": 0, "pin_memory": False}))
        self.recorder = recorder

    def __iter__(self):
        for batch in super().__iter__():
            if self.recorder.updates:
                copy = {name: value.numpy().copy() for name, value in batch.items()}
                self.recorder.batches.append(copy)
            yield batch


@functools.cache
def opened(path, _="r", read=h5py.File):
    """The arrays of a case, read once: opening files would take most of the time."""
    with read(path, "r") as file:
        return {name: file[name][:] for name in file}


def copies(network):
    """Its parameters."""
    return [p.detach().numpy().copy() for p in network.parameters()]


@contextlib.contextmanager
def standing_in(script, recorder):
    """Puts recorder, generated data and the CPU in the place of what a script names."""
    optimizers = []

    class SGD(torch.optim.SGD):
        def __init__(self, *arguments, **options):
            if not recorder.start:
                recorder.start = [copies(network) for network in recorder.networks]
            super().__init__(*arguments, **options)
            optimizers.append(self)

        def step(self, *_):
            which = optimizers.index(self)
            recorder.before(self, which)
            super().step()
            recorder.after(self, which)

    beta = np.random.beta

    def share(*arguments, **options):
        recorder.draws.append(np.asarray(beta(*arguments, **options), np.float32))
        return recorder.draws[-1]

    follow = getattr(script, "update_ema_variables", None)

    def update(student, teacher, alpha, step):
        follow(student, teacher, alpha, step)
        recorder.keep_teacher(teacher, step + 1)

    changes = [
        (script, "SummaryWriter", lambda *_: recorder),
        (script, "DataLoader", lambda *given, **options: Loader(recorder, *given, **options)),
        (script, "net_factory_3d", recorder.make),
        (script, "test_all_case", lambda *_, **__: np.zeros((1, 2))),
        (script, "tqdm", lambda rows, **_: Rows(rows)),
        (script, "make_grid", lambda *_, **__: None),  # patches are smaller than its pictures
        (script, "update_ema_variables", update),
        (torch.optim, "SGD", SGD),
        (torch, "randn_like", recorder.noise),
        (torch, "save", lambda *_: None),
        (h5py, "File", opened),
        (np.random, "beta", share),
        (torch.Tensor, "cuda", lambda self: self),
        (nn.Module, "cuda", lambda self: self),
    ]
    before = [(where, name, getattr(where, name, None)) for where, name, _ in changes]
    for where, name, value in changes:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)


def generate(root, shape):
    """A data set as the scripts read it: names in train.txt, one h5 file a case."""
    (root / "data").mkdir()
    names = [f"case{i:03d}" for i in range(CASES)]
    (root / "train.txt").write_text("".join(f"{name}\n" for name in names))
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        place = np.indices(shape) - rng.uniform(0.2, 0.8, 3).reshape(3, 1, 1, 1) * np.reshape(
            shape, (3, 1, 1, 1)
        )
        label = (np.sqrt((place**2).sum(0)) < rng.uniform(2, 4)).astype(np.uint8)
        image = np.clip(np.round((rng.normal(size=shape) + 2 * label) / UNIT), -127, 127) * UNIT
        with h5py.File(root / "data" / f"{name}.h5", "w") as file:
            file["image"], file["label"] = image.astype(np.float32), label


def run(script, root, network, patch, updates, length=ITERATIONS):
    """One run of the script's `train` of so many iterations, or of its first updates."""
    arguments = script.args
    arguments.root_path, arguments.patch_size = str(root), patch
    arguments.labeled_num, arguments.max_iterations = LABELED, length
    random.seed(1337)
    np.random.seed(1337)  # noqa: NPY002, which the scripts draw from
    torch.manual_seed(1337)
    recorder = Recorder(network, updates)
    with standing_in(script, recorder), contextlib.suppress(EnoughError):
        script.train(arguments, str(root))
    return recorder


def patches():
    """What `RandomRotFlip` and `RandomCrop` cut for given draws, and what they draw from."""
    from dataloaders import brats2019

    size, rng, found = (8, 6, 4), np.random.default_rng(0), []
    cut = [brats2019.RandomRotFlip(), brats2019.RandomCrop(size)]
    for shape in ((11, 13, 6), (9, 7, 3), (8, 20, 4), (30, 9, 5)):
        voxels = np.arange(1, np.prod(shape) + 1, dtype=np.int32).reshape(shape)
        for turn in range(8):
            shares = np.array([turn // 2 / 4, turn % 2 / 2, *rng.uniform(0, 1, 3)])
            ranges = []

            def draw(low, high, shares=shares, ranges=ranges):
                ranges.append(high - low)
                return low + int(shares[len(ranges) - 1] * (high - low))

            before, np.random.randint = np.random.randint, draw
            sample = {"image": voxels, "label": voxels}
            for change in cut:
                sample = change(sample)
            np.random.randint = before
            found.append((shape, shares, ranges, sample["image"]))
    names = ("shape", "shares", "ranges", "patch")
    return dict(zip(names, map(np.array, zip(*found, strict=True)), strict=True))


def orders():
    """Batches of `TwoStreamBatchSampler` whose permutations are ours: functions of a seed."""
    from dataloaders import brats2019

    labeled, unlabeled, calls = list(range(7)), list(range(7, 12)), []

    def permutation(indices):
        stream = int(indices[0] == unlabeled[0])
        calls.append(stream)
        epoch = calls.count(0) - 1
        turn = calls[::-1].index(0) - 1 if stream else 0  # passes since the epoch began
        order = np.random.default_rng((7, stream, epoch, turn, 1)).permutation(len(indices))
        return np.array(indices)[order]

    sampler = brats2019.TwoStreamBatchSampler(labeled, unlabeled, 4, 2)
    before, np.random.permutation = np.random.permutation, permutation
    batches = [batch for _ in range(4) for batch in sampler]
    np.random.permutation = before
    return {"batches": np.array(batches)}


def flat(values):
    """Arrays one after another."""
    return np.concatenate([value.ravel() for value in values])


def updates_of(name, recorder):
    """What the tests compare 20 updates with."""
    batches = recorder.batches[:UPDATES]
    found = {
        "image": np.stack([np.round(b["image"] / UNIT) for b in batches]).astype(np.int8),
        "label": np.stack([b["label"] for b in batches]).astype(np.int8),
        "rates": np.array(recorder.rates),
        "start": np.stack([flat(part) for part in recorder.start]),
        "kept": np.array(KEPT),
    }
    if recorder.draws:
        found["draws"] = np.stack(recorder.draws[:UPDATES])
    for scalar, values in recorder.scalars.items():
        by_step = [values[step] for step in sorted(values)][:UPDATES]
        found[f"log/{scalar.split('/')[-1]}"] = np.array(by_step)
    networks = range(2 if name == "cps" else 1)
    for kind in ("grads", "params"):
        rows = getattr(recorder, kind)
        found[kind] = np.stack([np.stack([flat(rows[n, k]) for n in networks]) for k in KEPT])
    if recorder.teachers:
        found["teacher"] = np.stack([flat(recorder.teachers[k]) for k in KEPT])
    return found


def main() -> None:
    """Writes ssl4mis_<experiment>.npz for every script, their schedules and their patches."""
    sys.path.insert(0, str(Path(sys.argv[1]).resolve() / "code"))
    sys.argv = sys.argv[:1]
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    np.savez_compressed(OUT / "ssl4mis_patches.npz", **patches(), **orders())
    schedules = {"step": np.array(LOOKED_AT)}
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as least:
        generate(Path(small), SHAPE)
        generate(Path(least), (3, 3, 3))
        for name, module in SCRIPTS.items():
            script = importlib.import_module(module)
            found = updates_of(name, run(script, Path(small), Small, PATCH, UPDATES))
            np.savez_compressed(OUT / f"ssl4mis_{name}.npz", **found)
            whole = run(script, Path(least), Least, [2, 2, 2], None, WHOLE)
            assert len(whole.rates) == WHOLE
            schedules[f"lr/{name}"] = np.array(whole.rates)
            weight = getattr(script, "get_current_consistency_weight", None)
            if weight is not None:
                schedules[f"weight/{name}"] = np.array([weight(k // 150) for k in LOOKED_AT])
            print(name, {key: value.shape for key, value in found.items()}, flush=True)
    np.savez_compressed(OUT / "ssl4mis_schedules.npz", **schedules)


if __name__ == "__main__":
    main()
