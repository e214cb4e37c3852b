"""The whole recipe of a config: network, augmentation, objective, optimizer."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import tiny_run

from bhsd_jax.assemble import recipe as recipes
from bhsd_jax.assemble import wiring
from bhsd_jax.assemble.program import of_any_length
from bhsd_jax.assemble.recipe import make_augment
from bhsd_jax.assemble.run import Run
from bhsd_jax.augment.chain import IntensityChain, SpatialChain
from bhsd_jax.augment.spatial import Affine, Mirror
from bhsd_jax.configs import cps, mean_teacher, supervised
from bhsd_jax.ct.prepare import prepare_case
from bhsd_jax.datasets.splits import Roles
from bhsd_jax.input.pipeline import Decoded, Stream
from bhsd_jax.models import cotr, nnformer, unetr
from bhsd_jax.objectives.common import Ramp
from bhsd_jax.platform import machine
from bhsd_jax.settings import Settings
from bhsd_jax.shards import store
from bhsd_jax.shards.store import Shards
from bhsd_jax.train import mesh as meshes
from bhsd_jax.train.optimizer import of_spec
from bhsd_jax.train.step import make_train_step
from bhsd_jax.types import Batch
from bhsd_jax.verbs import train
from bhsd_jax.volume import Case, Network, Plan

PLAN = Plan(
    dataset="made up",
    classes=("background", "EDH", "IPH"),
    modality="ct",
    spacing_mm=(5.0, 1.0, 1.0),
    transpose=(0, 1, 2),
    crop_hu=None,
    foreground=(15.0, 54.0, 20.0, 92.0),
    median_shape=(12, 40, 40),
    network=Network(
        patch=(4, 16, 16),
        batch=8,
        features=(4, 8),
        strides=((1, 1, 1), (1, 2, 2)),
        kernels=((1, 3, 3), (3, 3, 3)),
        convs_encoder=(1, 1),
        convs_decoder=(1,),
        batch_dice=True,
    ),
    source_sha256="",
)
ROLES = Roles(train=("a",), unlabeled=("b",), val=(), test=())


def run_of(config, plan=PLAN):
    return Run.of(config, Path("run"), plan)


def make_recipe(config, plan, *more):
    return recipes.make_recipe(run_of(config, plan), *more)


def require_matching(config, *more):
    recipes.require_matching(run_of(config), *more)


def make_mesh(config, plan):
    return recipes.make_mesh(run_of(config, plan))


def config_of(experiment, **fields):
    config = experiment.get_config()
    config.input.labeled = 8
    config.input.unlabeled = 8 if config.objective.name.startswith("cps") else 0
    config.train.steps = 10
    for name, value in fields.items():
        config.input[name] = value
    return config


def raw_batch(recipe, seed):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        low, high = (-1, 3) if leaf.dtype == jnp.int8 else (-200, 200)
        return rng.integers(low, high, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, recipe.abstract_batch())


def test_eight_devices_train_to_the_numbers_of_one():
    recipe = make_recipe(config_of(cps), PLAN)
    start = jax.jit(recipe.init)(jax.random.key(0))
    batches = [raw_batch(recipe, seed) for seed in range(3)]

    alone, step = start, jax.jit(make_train_step(recipe.parts))
    for batch in batches:
        alone, metrics = step(alone, batch)

    mesh = meshes.make_mesh()
    whole, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    spread = jax.device_put(start, whole)
    shared = make_recipe(config_of(cps), PLAN, mesh)
    sharded = jax.jit(
        make_train_step(shared.parts), in_shardings=(whole, rows), out_shardings=whole
    )
    compiled = sharded.lower(spread, meshes.to_devices(batches[0], mesh)).compile()
    for batch in batches:
        spread, others = compiled(spread, meshes.to_devices(batch, mesh))

    assert float(others["loss"]) == pytest.approx(float(metrics["loss"]), abs=1e-5)
    for a, b in zip(jax.tree.leaves(alone.params), jax.tree.leaves(spread.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    text = compiled.as_text()
    assert "all-reduce" in text
    for other in ("all-gather", "all-to-all", "collective-permute"):
        assert other not in text


def test_trainings_of_any_length_share_one_program():
    """And each has the rate and the ramp of its own length."""

    def recipe_of(steps):
        config = config_of(cps)
        config.train.steps = steps
        return make_recipe(config, PLAN)

    recipe = recipe_of(10)
    state = jax.jit(recipe.init)(jax.random.key(0))
    state = dataclasses.replace(state, step=jnp.int32(2))
    batch = raw_batch(recipe, 0)
    step = jax.jit(of_any_length(recipe))
    short, long = (step(state, batch, jnp.int32(steps))[1] for steps in (10, 1000))
    lowered = [
        jax.jit(of_any_length(recipe_of(steps))).lower(state, batch, jnp.int32(steps)).as_text()
        for steps in (10, 1000)
    ]
    assert lowered[0] == lowered[1]
    for metrics, steps in ((short, 10), (long, 1000)):
        parts = recipe_of(steps).parts
        assert float(metrics["lr"]) == pytest.approx(float(parts.schedule(jnp.int32(2))), rel=1e-5)
        want = Ramp.of(parts.objective).at(jnp.int32(2), steps)
        assert float(metrics["weight"]) == pytest.approx(float(want), rel=1e-5)
    assert float(short["weight"]) > 2 * float(long["weight"])


def test_fewer_labeled_cases_than_patches_fill_no_batch_of_two_streams():
    config = config_of(supervised, cases="two_stream")
    recipe = make_recipe(config, PLAN)
    with pytest.raises(ValueError, match=r"two_stream: 1 labeled cases are fewer than the 8"):
        require_matching(config, recipe, ROLES, meshes.make_mesh())


def test_the_augmented_batch_is_what_the_network_wants():
    recipe = make_recipe(config_of(supervised), PLAN)
    batch = jax.eval_shape(recipe.parts.augment, jax.random.key(0), recipe.abstract_batch())
    assert batch.image.shape == (8, 4, 16, 16, 1)
    assert batch.image.dtype == jnp.float32
    assert batch.label.shape == (8, 4, 16, 16)
    assert batch.unlabeled is None
    assert recipe.cut.source == (4, 18, 18), "nnU-Net's initial crop: 16 / 0.85"


def test_slice_labels_reach_the_loss_in_the_shape_of_the_network():
    config = config_of(cps)
    assert make_recipe(config, PLAN).abstract_batch().slice_labels is None
    config.slice_loss.update(neg_sup=1.0, gate_pseudo=True)
    recipe = make_recipe(config, PLAN)
    raw = recipe.abstract_batch()
    assert raw.slice_labels.shape == (8, 4, 1), "binary: one class"
    patches = jax.eval_shape(recipe.parts.augment, jax.random.key(0), raw)
    assert patches.slice_labels.shape == (8, 4, 1)
    assert patches.slice_labels.dtype == jnp.int8
    assert raw.inside.shape == (8, *recipe.cut.source)
    assert patches.inside is None, "the loss is not masked"
    state = jax.eval_shape(recipe.init, jax.random.key(0))
    _, metrics = jax.eval_shape(make_train_step(recipe.parts), state, raw)
    assert {"weak/known", "weak/neg_sup"} <= set(metrics)
    assert "weak/mil" not in metrics


def test_the_mask_of_the_scan_reaches_the_loss_in_the_shape_of_the_network():
    config = config_of(cps)
    assert make_recipe(config, PLAN).abstract_batch().inside is None
    config.input.outside = "masked"
    recipe = make_recipe(config, PLAN)
    raw = recipe.abstract_batch()
    assert raw.inside.shape == (8, *recipe.cut.source)
    patches = jax.eval_shape(recipe.parts.augment, jax.random.key(0), raw)
    assert patches.inside.shape == (8, 4, 16, 16)
    assert patches.inside.dtype == bool
    state = jax.eval_shape(recipe.init, jax.random.key(0))
    jax.eval_shape(make_train_step(recipe.parts), state, raw)
    config.input.outside = "ignored"
    with pytest.raises(
        ValueError, match=r"input\.outside must be learned or masked; got 'ignored'"
    ):
        make_recipe(config, PLAN)


@pytest.mark.parametrize(
    ("asked_mb", "memory", "want"),
    [(4096, 2**31, 2**30), (512, 2**31, 2**29), (4096, 0, 2**32)],  # 0: the system does not tell
)
def test_scans_kept_in_memory_leave_half_of_it(monkeypatch, asked_mb, memory, want):
    monkeypatch.setattr(machine, "memory", lambda: memory)
    assert train._cache_bytes(asked_mb) == want


@pytest.mark.parametrize("cases", ["in_turn", "with_replacement"])
def test_both_streams_take_cases_as_the_config_says(cases):
    config = config_of(cps, cases=cases, cache_mb=0)
    roles = Roles(train=tuple("abcd"), unlabeled=tuple("efghijkl"), val=(), test=())

    class Made(Shards):
        def __init__(self):
            pass

        def open(self, case):
            image = np.full((6, 30, 30), ord(case), np.int16)
            label = np.zeros(image.shape, np.uint8) if case in "abcd" else None
            return Decoded(image, label, ())

        load = open

    drawn = train._batches(
        Settings.of(config),
        Made(),
        roles,
        make_recipe(config, PLAN),
        meshes.make_mesh(),
        0,
    )
    once = True
    for _ in range(4):
        batch = next(drawn)
        labeled = np.bincount(batch.image.max((1, 2, 3, 4)), minlength=128)
        unlabeled = np.bincount(batch.unlabeled.max((1, 2, 3, 4)), minlength=128)
        assert set(np.flatnonzero(labeled)) <= set(map(ord, "abcd"))
        assert set(np.flatnonzero(unlabeled)) <= set(map(ord, "efghijkl"))
        once &= (labeled[ord("a") :][:4] == 2).all() and (unlabeled[ord("e") :][:8] == 1).all()
    assert once == (cases == "in_turn")
    config.input.cases = "shuffled"
    with pytest.raises(
        ValueError, match=r"input\.cases must be with_replacement or in_turn or two_stream; got"
    ):
        make_recipe(config, PLAN)


@pytest.mark.parametrize("slices", [False, True])
def test_the_mask_of_the_scan_is_moved_as_its_voxels_are(slices):
    """Of an image 1 inside and 0 outside, linear in between, the mask is what exceeds 1/2."""
    spatial = SpatialChain((Affine(1.0, 1.0), Mirror(0.5)), (4, 16, 16))
    augment = make_augment(lambda x: x.astype(jnp.float32), spatial, IntensityChain(()))
    inside = np.full((4, *spatial.source_patch), -1, np.int8)
    inside[:, 1:, 3:, :11] = 1
    image = (inside[..., None] > 0).astype(np.int16)
    slice_labels = np.zeros((4, spatial.source_patch[0], 1), np.int8) if slices else None
    raw = Batch(image, inside, image, slice_labels, inside)
    found = jax.jit(augment)(jax.random.key(1), raw)
    values = np.asarray(found.unlabeled[..., 0])
    clear = np.abs(values - 0.5) > 1e-3
    np.testing.assert_array_equal(found.inside[clear], values[clear] > 0.5)
    assert clear.mean() > 0.95
    assert 0.1 < found.inside.mean() < 0.9
    assert (found.slice_labels is None) != slices


def test_labeled_and_unlabeled_patches_have_draws_of_their_own_and_a_mask_that_of_its_patch():
    seen = []

    class Spatial(SpatialChain):
        def __call__(self, key, image, label):
            seen.append(int(jax.random.bits(key)))
            return image, label

    class Intensity(IntensityChain):
        def __call__(self, key, image):
            seen.append(int(jax.random.bits(key)))
            return image

    augment = make_augment(jnp.asarray, Spatial((), (1, 2, 2)), Intensity(()))
    image, label = np.zeros((2, 1, 2, 2, 1), np.float32), np.zeros((2, 1, 2, 2), np.int8)
    augment(jax.random.key(0), Batch(image, label, image, None, label))
    labeled, intensity, unlabeled, mask = seen
    assert len({labeled, intensity, unlabeled}) == 3
    assert mask == unlabeled


@pytest.mark.parametrize(("steps", "decay", "fits"), [(400, 0.999, "0.975"), (20_000, 0.999, "")])
def test_an_average_that_outlives_the_training_is_warned_of(steps, decay, fits, caplog):
    config = config_of(mean_teacher, unlabeled=8)
    config.train.steps, config.objective.ema_decay = steps, decay
    require_matching(config, make_recipe(config, PLAN), ROLES, meshes.make_mesh())
    if fits:
        assert f"ema_decay 0.999 averages over 1000 steps, of 400 in all; choose {fits}" in (
            caplog.text
        )
    else:
        assert not caplog.text


def test_a_ramp_that_outlives_the_training_is_warned_of(caplog):
    """As of `preset=ssl4mis`, whose ramp has the length of its scripts, in a shorter training."""
    config = config_of(mean_teacher, unlabeled=8)
    config.train.steps, config.objective.ema_decay = 10_000, 0.99
    for length, weight, told in (
        (10_000, 2.0, ""),
        (30_000, 0.0, ""),  # a training of masks alone, to compare with
        (30_000, 2.0, "ends at 0.22, and not at 2; set ramp_steps to 10"),
    ):
        with config.unlocked():
            config.objective.update(ramp_steps=length, weight=weight)
        require_matching(config, make_recipe(config, PLAN), ROLES, meshes.make_mesh())
        assert told in caplog.text
        assert bool(told) == bool(caplog.text)


def test_slice_labels_split_over_data_alone():
    config = config_of(cps)
    config.slice_loss.neg_sup = 1.0
    batch, mesh = make_recipe(config, PLAN).abstract_batch(), meshes.make_mesh(2, 1, 4)
    for rows, own in ((20, 5), (37, 37)):  # those that do not divide are whole on every device
        free = jax.ShapeDtypeStruct((8, 4, rows, 18, 1), jnp.int16)
        places = meshes.batch_shardings(mesh, dataclasses.replace(batch, unlabeled=free))
        assert places.slice_labels.shard_shape(batch.slice_labels.shape) == (4, 4, 1)
        assert places.unlabeled.shard_shape(free.shape) == (4, 4, own, 18, 1)


def test_slice_labels_that_nothing_can_use_are_refused():
    config = config_of(supervised)
    config.slice_loss.neg_sup = 1.0
    with pytest.raises(ValueError, match=r"slice_loss: .*supervised\.WeaklySupervised"):
        require_matching(config, make_recipe(config, PLAN), ROLES, meshes.make_mesh())


@pytest.mark.parametrize(
    ("bleeding", "rows", "known", "shown"),
    [
        (None, None, False, False),
        (True, None, False, False),
        (None, ((-1, -1),) * 7, False, False),
        (False, None, True, False),
        (True, ((-1, -1), (0, -1)), True, False),
        (True, ((-1, -1), (1, -1)), True, True),
    ],
)
def test_losses_of_slice_labels_need_a_slice_that_is_known(tmp_path, bleeding, rows, known, shown):
    """That a scan bleeds says nothing of a single slice; `mil` and `size` need one that does."""
    plan = tiny_run.PLAN
    nib.save(nib.Nifti1Image(tiny_run.head(), tiny_run.upright()), tmp_path / "b.nii.gz")
    case = Case("b", "b", tmp_path / "b.nii.gz", None, "unlabeled", bleeding, rows)
    entries = store.write_shard(tmp_path / "shard-0.arrayrecord", [prepare_case(case, plan)])
    store.write_index(tmp_path, entries)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    config = config_of(cps)
    config.split.binary = False
    config.slice_loss.neg_sup = 1.0
    config.preprocess.shards = str(tmp_path)
    run = Run.of(config, tmp_path, plan)
    recipe = recipes.make_recipe(run)
    with nullcontext() if known else pytest.raises(ValueError, match="none of the 1 unlabeled"):
        train._require_slice_labels(run, recipe, ROLES)
    config.slice_loss.size = 0.01
    run, no = Run.of(config, tmp_path, plan), "absence alone" if known else "none of the 1"
    with nullcontext() if shown else pytest.raises(ValueError, match=no):
        train._require_slice_labels(run, recipe, ROLES)


def test_slices_of_ct_are_not_followed_by_what_is_put_around_the_scan():
    """Which is brighter than air, for the plan's range begins in blood."""
    config = config_of(cps)
    config.slice_loss.update(mil=0.1, margin=0)
    config.augment.update(
        spatial=({"name": "spatial.Mirror", "p": 1.0, "axes": (0,)},), intensity=()
    )
    recipe = make_recipe(config, PLAN)
    assert recipe.cut.fill == 15
    far = np.hypot(*(np.indices((12, 12)) - 5.5))
    image = np.stack([np.where(far < 5, 40, -1000).astype(np.int16)] * 4)
    scan = Decoded(image, None, (), ((0, 1), (1, -1), (0, 0), (-1, 0)))
    given = {"batch": 8, "length": 8, "seed": (0, 1), "labeled": False, "slices": recipe.slices}
    stream = Stream({"a": scan}.__getitem__, "a", recipe.cut, **given)
    free = jax.tree.map(lambda *rows: np.stack(rows), *(stream[row] for row in range(8)))
    assert (free["image"] == 15).mean() > 0.4
    label = np.zeros(free["inside"].shape, np.int8)
    raw = Batch(free["image"], label, free["image"], free["slice_labels"], free["inside"])
    found = jax.jit(recipe.parts.augment)(jax.random.key(0), raw)
    np.testing.assert_array_equal(found.slice_labels[..., 0], [[-1, 0, 1, 1]] * 8)
    assert found.inside is None


def test_slices_of_mr_are_followed_by_the_voxels_of_the_scan():
    """MR has no HU that tells the head from air; the loss sees these voxels only if it is asked."""
    config = config_of(cps)
    config.slice_loss.neg_sup = 1.0
    config.augment.spatial = ({"name": "spatial.Mirror", "p": 1.0, "axes": (0,)},)
    recipe = make_recipe(config, dataclasses.replace(PLAN, modality="mr"))
    shapes = recipe.abstract_batch()
    image = np.full(shapes.unlabeled.shape, 5.0, np.float32)
    inside = np.full(shapes.inside.shape, -1, np.int8)
    inside[:, 1:, 3:13, 3:13] = 1  # the first slice lies outside, the rest shows all of the scan
    known = np.tile(np.asarray([0, 1, 0, 0], np.int8)[None, :, None], (8, 1, 1))
    label = np.zeros(shapes.label.shape, np.int8)
    augment = jax.jit(recipe.parts.augment)
    found = augment(jax.random.key(0), Batch(image, label, image, known, inside))
    np.testing.assert_array_equal(found.slice_labels[0, :, 0], [0, 0, 1, 0])
    assert found.inside is None
    inside[:, 1:, :, 3:13] = 1  # now the scan may reach beyond the patch: what shows it, may not
    found = augment(jax.random.key(0), Batch(image, label, image, known, inside))
    np.testing.assert_array_equal(found.slice_labels[0, :, 0], [0, 0, -1, 0])
    config.input.outside = "masked"
    masked = make_recipe(config, dataclasses.replace(PLAN, modality="mr")).parts.augment
    found = jax.jit(masked)(jax.random.key(0), Batch(image, label, image, known, inside))
    assert found.inside.shape == (8, 4, 16, 16)


def test_the_plan_decides_what_the_config_leaves_open():
    recipe = make_recipe(config_of(supervised), PLAN)
    assert recipe.parts.model.features == (4, 8)
    assert recipe.parts.model.num_classes == 3
    assert recipe.parts.segmentation.batch_dice
    binary = make_recipe(config_of(cps), PLAN)
    assert binary.parts.model.num_classes == 2


@pytest.mark.parametrize(
    ("experiment", "fields", "message"),
    [
        (cps, {"unlabeled": 0}, r"needs unlabeled patches: input\.unlabeled is 0"),
        (supervised, {"unlabeled": 8}, r"set input\.unlabeled=0"),
        (supervised, {"labeled": 3}, r"input\.labeled is 3 .* multiple of 8"),
        (supervised, {"patch": (4, 17, 16)}, "17"),
    ],
)
def test_what_does_not_fit_is_refused_before_compiling(experiment, fields, message):
    config = config_of(experiment, **fields)
    with pytest.raises(ValueError, match=message):
        require_matching(config, make_recipe(config, PLAN), ROLES, meshes.make_mesh())


def test_the_config_arranges_the_devices_and_few_patches_use_few(caplog):
    config = config_of(cps, labeled=4, unlabeled=4)
    config.train.accumulate, config.mesh.twins = 2, 2
    mesh = make_mesh(config, PLAN)
    assert dict(mesh.shape) == {"data": 2, "model": 1, "space": 1, "twins": 2}
    assert "only 4 of 8 devices train, because 4 + 4 patches" in caplog.text
    recipe = make_recipe(config, PLAN, mesh)
    assert (recipe.parts.accumulate, recipe.parts.mesh) == (2, mesh)
    require_matching(config, recipe, ROLES, mesh)


@pytest.mark.parametrize(("experiment", "twins"), [(supervised, 2), (cps, 4)])
def test_devices_for_twins_that_are_not_there_are_refused(experiment, twins):
    config = config_of(experiment)
    config.mesh.twins = twins
    mesh = make_mesh(config, PLAN)
    with pytest.raises(ValueError, match=f"mesh.twins is {twins}, but objective .* trains"):
        require_matching(config, make_recipe(config, PLAN, mesh), ROLES, mesh)


def test_batch_dice_in_parts_is_said(caplog):
    config = config_of(supervised)
    config.train.accumulate = 2
    make_recipe(config, PLAN)
    assert "loss.batch_dice counts over the 4 patches of a part, not the 8" in caplog.text


def test_a_loud_twin_does_not_mute_the_other():
    tx = make_recipe(config_of(cps), PLAN).parts.optimizer
    params = {twin: jnp.ones(3) for twin in "ab"}

    def update_of_b(a):
        grads = {"a": jnp.full(3, a), "b": jnp.full(3, 0.5)}
        return tx.update(grads, tx.init(params), params)[0]["b"]

    np.testing.assert_array_equal(update_of_b(1e6), update_of_b(0.0))


@pytest.mark.parametrize(
    ("experiment", "words", "clip"),
    [
        (cps, "preset=ssl4mis", None),
        (mean_teacher, "preset=ssl4mis", None),
        (supervised, "backbone=unetr", None),
        (cps, "", 12.0),
    ],
)
def test_a_clip_of_none_clips_nothing(experiment, words, clip):
    config = Settings.of(experiment.get_config(words))
    assert config.optimizer["clip"] == clip
    _, optimizer = of_spec(config.optimizer, config.train.steps, parts=True)
    params = {"a": jnp.zeros(4), "b": jnp.zeros(4)}
    grads = {"a": jnp.full(4, 1e4), "b": jnp.ones(4)}
    state = optimizer.init(params)
    told = [optimizer.update(grads, state, params)[1]]
    # What the optimizer remembers of the gradient says whether that was clipped on its way.
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(told) if leaf.ndim)
    assert (largest > 100) == (clip is None)


AFFINE, MIRROR = {"name": "spatial.Affine"}, {"name": "spatial.Mirror"}


@pytest.mark.parametrize(
    ("spatial", "axes"),
    [
        ((AFFINE, MIRROR), (0, 1, 2)),
        ((AFFINE, {**MIRROR, "axes": (2,)}), (2,)),
        ((AFFINE, {**MIRROR, "axes": (2, 1), "p": 0.1}), (1, 2)),
        (({**MIRROR, "axes": (2,)}, {**MIRROR, "axes": (0,)}), (0, 2)),
        (({**MIRROR, "p": 0.0},), ()),
        (({"name": "turned.Turned", "axes": (1,)},), ()),  # one's own, of which that is not known
        ((AFFINE,), ()),
        ((), ()),
    ],
)
def test_predictions_are_mirrored_along_the_axes_of_the_training_and_no_others(spatial, axes):
    config = config_of(supervised)
    config.augment.spatial = spatial
    assert wiring.mirror_axes(run_of(config)) == axes
    config.infer.mirror_axes = (0, 2)
    assert wiring.mirror_axes(run_of(config)) == (0, 2), "what is named stays"
    config.infer.mirror = False
    assert wiring.mirror_axes(run_of(config)) == ()


def test_what_is_put_around_a_scan_is_what_an_augmentation_says_else_air():
    config = config_of(supervised)
    config.augment.spatial = (AFFINE,)
    run = run_of(config)
    assert recipes.make_chains(run)[0].ops[0].fill == run.normalization.fill("air")
    config.augment.spatial = ({**AFFINE, "fill": 0.5},)
    assert recipes.make_chains(run_of(config))[0].ops[0].fill == 0.5


def test_an_unknown_model_argument_is_refused():
    config = config_of(supervised)
    config.model.name = "nnunet.PlainConvNet"
    with pytest.raises(ValueError, match="PlainConvUNet"):
        make_recipe(config, PLAN)


def test_batches_of_the_abstract_shape_are_batches():
    recipe = make_recipe(config_of(cps), PLAN)
    assert isinstance(recipe.abstract_batch(), Batch)
    assert recipe.abstract_batch().image.dtype == jnp.int16


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("unetr.UNETR", "patch", (4, 16, 16)),
        ("unetr.UNETR", "up_strides", unetr.HEAD_CT["up_strides"]),
        ("swin_unetr.SwinUNETR", "attn_window", (5, 10, 8)),
        ("cotr.CoTr", "features", (64, 192, 384)),
        ("cotr.CoTr", "strides", cotr.HEAD_CT["strides"]),
        ("nnformer.NNFormer", "attn_windows", nnformer.HEAD_CT["attn_windows"]),
    ],
)
def test_thick_slices_give_other_backbones_their_own_preset(name, field, value):
    config = supervised.get_config(f"backbone={name}")
    assert getattr(wiring.model(run_of(config)), field) == value
