"""Prints how many training patches a second the input pipeline delivers.

    python tools/bench_input.py [--cases 8] [--seconds 15] [--threads 2]

Makes shards of head-like 34 x 512 x 512 volumes in a temporary folder, reads them once so that
they lie in the page cache, then draws batches of 2 as the training does: 20 x 320 x 256 patches,
and the 20 x 376 x 376 cuts that the rotation of nnU-Net's augmentation needs for them. Each with
the records decoded anew for every patch, and with cases kept decoded in memory.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

from bhsd_jax.ct.prepared import Prepared
from bhsd_jax.input.pipeline import Batches, Cache, Cut, Decoded, Stream
from bhsd_jax.shards.store import Shards, write_index, write_shard
from bhsd_jax.volume import Grid, Network, Plan

SHAPE, PATCH, SOURCE = (34, 512, 512), (20, 320, 256), (20, 376, 376)
SPACING = (5.0, 0.48828125, 0.48828125)


def main() -> None:
    """Runs the four measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = make_shards(Path(folder), args.cases)
        shards = Shards(folder)
        for entry in shards.entries:
            shards.load(entry.id)
        print(
            f"{args.cases} volumes of {'x'.join(map(str, SHAPE))}, "
            f"{size / args.cases / 1e6:.1f} MB each in the shards; "
            f"{args.threads} threads on {os.cpu_count()} cores"
        )
        for name, budget in (("decoded for every patch", 0), ("kept decoded", 2**40)):
            for cut in (PATCH, SOURCE):
                rate = measure(shards, cut, budget, args.threads, args.seconds)
                print(f"{'x'.join(map(str, cut)):>11}  {name:<24} {rate:7.1f} patches/s")


def measure(
    shards: Shards, cut: tuple[int, int, int], budget: int, threads: int, seconds: float
) -> float:
    """Patches per second, after a first batch."""

    def decoded(case: str) -> Decoded:
        whole = shards.load(case)
        return Decoded(whole.image, whole.label, whole.foreground)

    stream = Stream(
        Cache(shards.open, decoded, budget),
        [entry.id for entry in shards.entries],
        Cut(patch=PATCH, source=cut, fill=-1024.0),
        batch=2,
        length=2_000_000,
        seed=(0, 0),
        labeled=True,
    )
    batches = Batches([stream], threads=threads)
    for _ in range(2 * len(shards.entries)):  # fills the cache, where there is one
        next(batches)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        count += len(next(batches).image)
    return count / (time.perf_counter() - begun)


def make_shards(folder: Path, cases: int) -> int:
    """Writes the shards; gives their bytes."""
    entries = write_shard(folder / "shard-0.arrayrecord", map(make_case, range(cases)))
    write_index(folder, entries)
    network = Network(PATCH, 2, (32,), ((1, 1, 1),), ((1, 3, 3),), (2,), (), False)
    plan = Plan(
        dataset="bench",
        classes=("background", *"ABCDE"),
        modality="ct",
        spacing_mm=SPACING,
        transpose=(0, 1, 2),
        crop_hu=None,
        foreground=(15.0, 54.0, 20.0, 92.0),
        median_shape=SHAPE,
        network=network,
        source_sha256="",
    )
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    return sum(path.stat().st_size for path in folder.glob("*.arrayrecord"))


def make_case(index: int) -> Prepared:
    """An ellipsoid of noisy tissue in a bright shell, with a blob of each class."""
    rng = np.random.default_rng(index)
    d, h, w = (np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE)
    radius = np.sqrt(
        (d[:, None, None] / 1.2) ** 2 + (h[None, :, None] / 0.8) ** 2 + (w[None, None] / 0.65) ** 2
    )
    noise = ndimage.gaussian_filter(rng.normal(size=SHAPE).astype(np.float32), (0, 0.8, 0.8))
    image = np.where(radius < 1, 35 + 16 * noise, np.where(radius < 1.1, 1000 + 60 * noise, -1000))
    label = np.zeros(SHAPE, np.uint8)
    for value in range(1, 6):
        z, y, x = rng.integers((5, 180, 180), (28, 330, 330))
        label[z : z + 4, y : y + 30, x : x + 30] = value
    image[label > 0] += 30
    positions = tuple(np.argwhere(label == value).astype(np.int32) for value in range(1, 6))
    eye = tuple(tuple(float(i == j) for j in range(4)) for i in range(4))
    return Prepared(
        case=f"case{index}",
        patient=f"case{index}",
        split="train",
        bleeding=True,
        slice_labels=None,
        image=np.rint(image).astype(np.int16),
        label=label,
        grid=Grid(SHAPE, eye, (0, 1, 2), (False,) * 3, (0, 0, 0), SHAPE, SHAPE, SPACING),
        foreground=positions,
    )


if __name__ == "__main__":
    main()
