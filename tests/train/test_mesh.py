"""Which devices train, and that how they are arranged changes no number."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import Merging, make_batch, make_parts

from bhsd_jax.losses import DiceCE
from bhsd_jax.models.nnunet import PlainConvUNet
from bhsd_jax.objectives.cps import CrossPseudoSupervision
from bhsd_jax.objectives.cps_cutmix import CrossPseudoSupervisionCutMix
from bhsd_jax.objectives.entropy import EntropyMinimization
from bhsd_jax.objectives.ict import InterpolationConsistency
from bhsd_jax.objectives.mean_teacher import MeanTeacher
from bhsd_jax.objectives.slice_loss import SliceTerms, WithSliceLoss
from bhsd_jax.objectives.supervised import Supervised
from bhsd_jax.objectives.w2s import WeakToStrong
from bhsd_jax.train import layout
from bhsd_jax.train import mesh as meshes
from bhsd_jax.train.step import deal, init_state, make_train_step

KINDS = {
    "supervised": Supervised(ema_decay=0.9),
    "cps": CrossPseudoSupervision(ramp=0.0),
    "cps_cutmix": CrossPseudoSupervisionCutMix(ramp=0.0),
    "mean_teacher": MeanTeacher(ramp=0.0, ema_decay=0.9, noise=0.1),
    "ict": InterpolationConsistency(ramp=0.0, ema_decay=0.9),
    "entropy": EntropyMinimization(ramp=0.0),
    "w2s": WeakToStrong(ramp=0.0, ema_decay=0.9, sure=0.4, sure_foreground=0.4),
    "slices": WithSliceLoss(
        CrossPseudoSupervision(ramp=0.0),
        SliceTerms(True, neg_sup=1.0, mil=0.1, size=0.01, start=0.0),
    ),
}


def parts_of(kind, **changes):
    return dataclasses.replace(make_parts(KINDS[kind]), **changes)


@functools.cache
def batches_of(kind):
    batches = [make_batch(seed) for seed in range(3)]
    if kind != "slices":
        return batches
    slices = [jax.random.randint(jax.random.key(9), (8, 4, 2), -1, 2, jnp.int8)] * 3
    return [dataclasses.replace(b, slice_labels=s) for b, s in zip(batches, slices, strict=True)]


@functools.cache
def start_of(alike):
    image = batches_of(alike)[0].image
    return jax.jit(lambda: init_state(parts_of(alike), image, jax.random.key(0)))()


def start(kind):
    """State at step 0; the same for all of one network, with or without its average, or of two."""
    objective = KINDS[kind]
    if objective.twins:
        return start_of("cps")
    return start_of("entropy" if objective.ema_decay is None else "supervised")


@functools.cache
def alone(kind, accumulate=1):
    """State and metrics after three steps on one device."""
    state, step = start(kind), jax.jit(make_train_step(parts_of(kind, accumulate=accumulate)))
    for batch in batches_of(kind):
        state, metrics = step(state, batch)
    return state, metrics


def spread(kind, sizes, accumulate=1):
    """The same on eight."""
    mesh, began = meshes.make_mesh(*sizes), start(kind)
    places = meshes.state_shardings(mesh, began)
    rows = meshes.batch_shardings(mesh, batches_of(kind)[0])
    step = jax.jit(
        make_train_step(parts_of(kind, accumulate=accumulate, mesh=mesh)),
        in_shardings=(places, rows),
        out_shardings=(places, meshes.replicated(mesh)),
    )
    state = jax.device_put(began, places)
    for batch in batches_of(kind):
        state, metrics = step(state, meshes.to_devices(batch, mesh))
    return state, metrics


def compare(found, want):
    for name, value in want[1].items():
        assert float(found[1][name]) == pytest.approx(float(value), abs=1e-5, rel=1e-5), name
    for name in ("params", "ema", "opt_state"):
        leaves = (jax.tree.leaves(getattr(state, name)) for state, _ in (found, want))
        for a, b in zip(*leaves, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


DATA, ALL, TWINS = (8, 1, 1), (2, 2, 2), (1, 2, 2, 2)
LAYOUTS = [(kind, sizes) for kind in KINDS for sizes in (DATA, ALL)]
LAYOUTS += [("supervised", sizes) for sizes in ((4, 2, 1), (2, 1, 4), (1, 4, 2))]
LAYOUTS += [("cps", (4, 1, 1, 2)), ("cps", TWINS), ("cps_cutmix", TWINS)]


@pytest.mark.parametrize(("kind", "sizes"), LAYOUTS, ids=str)
def test_eight_devices_equal_one(kind, sizes):
    compare(spread(kind, sizes), alone(kind))


@pytest.mark.parametrize("sizes", [(2, 1, 4), (1, 1, 8)], ids=str)
def test_fewer_rows_than_devices_leave_every_gradient_as_it_is(sizes, key):
    """A stage of two rows on four or eight devices: copies, over which XLA would sum."""
    net, batch, mesh = Merging(), make_batch(), meshes.make_mesh(*sizes)
    params = jax.jit(lambda: net.init(key, batch.image, train=False)["params"])()

    def loss(params, batch, mesh):
        with layout.keep_rows(mesh):
            logits = net.apply({"params": layout.gathered(mesh, params)}, batch.image, train=True)
        return DiceCE()(logits, batch.label)

    want = jax.jit(jax.grad(functools.partial(loss, mesh=None)))(params, batch)
    places, rows = meshes.state_shardings(mesh, params), meshes.batch_shardings(mesh, batch)
    grad = jax.jit(
        jax.grad(functools.partial(loss, mesh=mesh)),
        in_shardings=(places, rows),
        out_shardings=places,
    )
    found = grad(jax.device_put(params, places), meshes.to_devices(batch, mesh))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


PARTS = [("supervised", ALL), ("ict", (4, 2, 1)), ("cps", (2, 1, 2, 2))]


@pytest.mark.parametrize(("kind", "sizes"), PARTS, ids=str)
def test_batches_in_parts_are_the_same_on_eight_devices(kind, sizes):
    compare(spread(kind, sizes, accumulate=2), alone(kind, accumulate=2))


def test_a_mean_over_patches_is_that_of_its_parts(key):
    compare(alone("supervised", accumulate=2), alone("supervised"))
    parts, batch, state = make_parts(KINDS["entropy"], quiet=True), make_batch(), start("entropy")
    whole, quarters = (
        jax.jit(make_train_step(dataclasses.replace(parts, accumulate=n)))(state, batch)
        for n in (1, 4)
    )
    compare(quarters, whole)


def test_parts_keep_the_rows_of_a_device_and_their_neighbors():
    rows = jnp.arange(16)
    assert deal(rows, 2).tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
    assert deal(rows[:6], 2).tolist() == [[0, 2, 4], [1, 3, 5]]
    assert deal(rows, 16).tolist() == [[row] for row in range(16)]


@pytest.mark.parametrize("kind", ["ict", "w2s", "cps_cutmix"])
def test_parts_in_which_no_pair_is_whole_are_refused_with_both_fields(kind, key):
    batch = make_batch(labeled=2, unlabeled=2)
    state = jax.eval_shape(lambda: init_state(parts_of(kind), batch.image, key))
    step = make_train_step(parts_of(kind, accumulate=2))
    with pytest.raises(ValueError, match=r"make input\.unlabeled a multiple of 2 x train\.accumul"):
        jax.eval_shape(step, state, batch)


def test_parts_hold_a_part_of_the_memory(key, full_compilation):
    batch = make_batch(labeled=64, unlabeled=0)

    def temporaries(accumulate):
        parts = dataclasses.replace(make_parts(Supervised(), quiet=True), accumulate=accumulate)
        state = jax.eval_shape(lambda: init_state(parts, batch.image, key))
        compiled = jax.jit(make_train_step(parts), donate_argnums=0).lower(state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4) < 0.5 * temporaries(1)


def test_parameters_and_optimizer_split_over_the_devices(key):
    """As the compiled step counts them; a real network, Nesterov momentum, moving average."""
    net = PlainConvUNet(
        3, features=(8, 16), strides=((1, 1, 1), (1, 2, 2)), convs_encoder=1, convs_decoder=1
    )
    parts = dataclasses.replace(make_parts(KINDS["supervised"], quiet=True), model=net)
    batch = make_batch(unlabeled=0)
    state = jax.eval_shape(lambda: init_state(parts, batch.image, key))

    def held(*sizes):
        """Bytes of the state on a device: what the step takes, less the batch."""
        mesh = meshes.make_mesh(*sizes)
        places, rows = meshes.state_shardings(mesh, state), meshes.batch_shardings(mesh, batch)
        step = jax.jit(
            make_train_step(dataclasses.replace(parts, mesh=mesh)),
            in_shardings=(places, rows),
            out_shardings=(places, meshes.replicated(mesh)),
        )
        taken = step.lower(state, batch).compile().memory_analysis().argument_size_in_bytes
        return taken - (batch.image.nbytes + batch.label.nbytes) // mesh.shape["data"]

    assert held(1, 8, 1) < 0.3 * held(8, 1, 1)


def test_twins_share_the_devices_of_their_parameters(key):
    state = jax.eval_shape(lambda: start("cps"))
    places = meshes.state_shardings(meshes.make_mesh(2, 2, 1, 2), state.params)
    wide = state.params["b"]["Conv_0"]["kernel"], places["b"]["Conv_0"]["kernel"]
    assert wide[1].shard_shape(wide[0].shape) == (3, 3, 3, 1, 1)  # of four features
    narrow = state.params["a"]["Conv_2"]["kernel"], places["a"]["Conv_2"]["kernel"]
    assert narrow[1].shard_shape(narrow[0].shape) == (1, 1, 1, 1, 3)


@pytest.mark.parametrize(
    ("sizes", "batches", "accumulate", "want"),
    [
        ({}, (2, 2), 1, (2, 1, 1, 1)),
        ({}, (6, 0), 1, (6, 1, 1, 1)),
        ({}, (8, 4), 2, (2, 1, 1, 1)),
        ({}, (3,), 2, (1, 1, 1, 1)),
        ({"model": 2}, (2, 2), 1, (2, 2, 1, 1)),
        ({"twins": 2}, (4, 4), 1, (4, 1, 1, 2)),
        ({"space": 4}, (2, 2), 1, (2, 1, 4, 1)),
    ],
)
def test_as_many_devices_train_as_share_the_batch(sizes, batches, accumulate, want, caplog):
    with caplog.at_level(logging.WARNING):
        mesh = meshes.make_mesh(**sizes, batches=batches, accumulate=accumulate)
    assert tuple(mesh.shape.values()) == want
    idle = jax.devices()[mesh.size :]
    assert bool(caplog.records) == bool(idle)
    if idle:
        assert f"only {mesh.size} of 8 devices train" in caplog.text
        assert f"idle: {', '.join(map(str, idle))}." in caplog.text


@dataclasses.dataclass(frozen=True)
class Far:
    """A device of another process."""

    process_index: int
    id: int


@pytest.mark.parametrize(
    ("group", "batches", "groups", "used"),
    [
        (1, (4, 4), 4, [0, 1, 4, 5]),
        (2, (8, 8), 4, list(range(8))),
        (2, (2, 2), 2, [0, 1, 4, 5]),
        (8, (1, 1), 1, list(range(8))),  # one group that spans both processes
    ],
)
def test_every_process_keeps_as_many_devices(group, batches, groups, used):
    devices = [Far(id // 4, id) for id in range(8)]
    found, data = meshes._fill(devices, group, batches, 1)
    assert (data, [device.id for device in found]) == (groups, used)


@dataclasses.dataclass(frozen=True)
class Gpu(Far):
    """One of a machine whose GPUs are wired to each other and not to those of the next."""

    device_kind = "NVIDIA H100"
    platform = "gpu"

    @property
    def slice_index(self):
        return self.process_index


@pytest.mark.parametrize("sizes", [{}, {"space": 2}, {"data": 2, "twins": 2, "model": 2}], ids=str)
def test_all_gpus_of_two_machines_train_in_groups_that_no_machine_shares(sizes):
    """Stand-ins: no test has two machines."""
    devices = [Gpu(id // 4, id) for id in range(8)]
    mesh = meshes.make_mesh(**sizes, batches=(8, 8), devices=devices)
    groups = mesh.devices.reshape(mesh.shape["data"], -1)
    assert {device.id for device in groups.flat} == set(range(8))
    assert all(len({device.process_index for device in group}) == 1 for group in groups)


@dataclasses.dataclass(frozen=True)
class Chip(Far):
    """One of a v6e-16: 4 x 4 chips, each joined to its neighbors, 2 x 2 of them a machine's."""

    coords: tuple[int, int, int]
    core_on_chip = slice_index = 0
    device_kind = "TPU v6 lite"
    platform = "tpu"

    @classmethod
    def all(cls):
        at = [(id % 4, id // 4) for id in range(16)]
        return [cls(y // 2 * 2 + x // 2, id, (x, y, 0)) for id, (x, y) in enumerate(at)]


@pytest.mark.parametrize(
    "sizes", [{"twins": 2}, {"space": 2}, {"space": 8}, {"model": 2}, {"model": 4, "twins": 2}, {}]
)
def test_any_split_of_a_tpu_is_a_mesh_of_neighbors(sizes, monkeypatch):
    """Stand-ins: no test has a TPU."""
    monkeypatch.setattr(jax, "device_count", lambda: 16)
    mesh = meshes.make_mesh(**sizes, batches=(16, 16), devices=Chip.all())
    groups = mesh.devices.reshape(mesh.shape["data"], -1)
    assert groups.shape[1] == np.prod([*sizes.values()])
    assert {chip.id for chip in groups.flat} == set(range(16))
    for group in groups:
        at = np.asarray([chip.coords for chip in group])
        assert np.prod(np.ptp(at, 0) + 1) == len(group), "a group is a rectangle without holes"


@pytest.mark.parametrize("data", [-1, 15])
def test_processes_of_unequally_many_devices_are_refused(data):
    """JAX would say that it cannot reshape an array, at the first word between processes."""
    devices = [Far(int(id >= 8), id) for id in range(15)]
    told = r"process 0 has 8, process 1 has 7; start one .* each process 7 of its own \(CUDA_V"
    with pytest.raises(ValueError, match=told):
        meshes.make_mesh(data, batches=(14, 14), devices=devices)


def test_batches_that_processes_cannot_share_are_refused():
    devices = [Far(id // 4, id) for id in range(8)]
    with pytest.raises(
        ValueError, match=r"3 patches a step .* over 2 processes; .* multiples of 2"
    ):
        meshes.make_mesh(batches=(3, 0), devices=devices)
    # What the message says instead does for any batch.
    for count, batches, product in ((2, (3, 0), 8), (4, (2, 2), 4), (4, (2, 1), 8)):
        devices = [Far(id * count // 8, id) for id in range(8)]
        with pytest.raises(ValueError, match=rf"their product is {product}$"):
            meshes._fill(devices, 1, batches, 1)
        used, _ = meshes._fill(devices, product, batches, 1)
        assert used == devices


def test_what_does_not_spread_is_refused():
    mesh = meshes.make_mesh()
    with pytest.raises(ValueError, match=r"input\.labeled is 3 .* multiple of 8"):
        meshes.require_divisible(mesh, 3, 0, 64)
    with pytest.raises(ValueError, match=r"is 8 .* 2 parts \(train\.accumulate\).* multiple of 16"):
        meshes.require_divisible(mesh, 16, 8, 64, accumulate=2)
    with pytest.raises(ValueError, match=r"train\.accumulate .* got 0"):
        meshes.require_divisible(mesh, 8, 8, 64, accumulate=0)
    with pytest.raises(ValueError, match=r"mesh\.model 2 x mesh\.space 2 .* the 18 rows"):
        meshes.require_divisible(meshes.make_mesh(2, 2, 2), 2, 2, 18)
    for sizes in ((3, 2, 1), (-1, 3, 1), (4, 1, 1), (-1, 1, 1, 16)):
        with pytest.raises(ValueError, match="multiply"):
            meshes.make_mesh(*sizes)
    with pytest.raises(ValueError, match=r"mesh\.space counts devices, 1 or more; got 0"):
        meshes.make_mesh(-1, 1, 0)
