"""Weights that a training begins with: from runs and from files of PyTorch, whole or in part."""

import dataclasses
import json
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from tiny_run import PLAN
from toy import Toy, make_batch, make_parts

from bhsd_jax.assemble import deployed, held_out
from bhsd_jax.assemble.pretrained import begin_from
from bhsd_jax.assemble.recipe import Recipe
from bhsd_jax.assemble.run import Run
from bhsd_jax.augment.chain import IntensityChain
from bhsd_jax.augment.intensity import GaussianNoise
from bhsd_jax.configs import common, pretrain
from bhsd_jax.datasets import splits_file
from bhsd_jax.input.pipeline import Cut
from bhsd_jax.models.nnunet import PlainConvUNet
from bhsd_jax.models.primus import Primus
from bhsd_jax.models.swin_unetr import SwinUNETR
from bhsd_jax.objectives.cps import CrossPseudoSupervision
from bhsd_jax.objectives.ensemble import Ensemble
from bhsd_jax.objectives.slice_loss import WithSliceLoss
from bhsd_jax.objectives.supervised import Supervised
from bhsd_jax.platform import files
from bhsd_jax.settings import Train
from bhsd_jax.shards.store import Entry, write_index
from bhsd_jax.torch_weights.recipe import recipe_for
from bhsd_jax.train import mesh as meshes
from bhsd_jax.train.checkpoint import Checkpoints, save_networks
from bhsd_jax.train.step import init_state
from bhsd_jax.types import TrainState
from bhsd_jax.verbs import train

SIZES = {"features": (3, 4), "strides": ((1, 1, 1), (2, 2, 2)), "kernels": ((3, 3, 3),) * 2}
UNET = PlainConvUNet(3, **SIZES)


def drawn(module, fill=0.0):
    image = jax.ShapeDtypeStruct((1, *module.stride, 1), jnp.float32)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), image)
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, fill, leaf.dtype), shapes["params"])


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def saved_run(folder, params, objective):
    save_networks(folder / "checkpoints", params, config={}, plan={})
    (folder / "config.json").write_text(json.dumps({"objective": objective}))
    return str(folder)


SUPERVISED = {"name": "supervised.Supervised"}
MEMBERS = {"name": "ensemble.Ensemble", "members": ["fold_0", "fold_1"]}


def test_a_run_gives_all_that_fits_and_the_log_names_the_rest(tmp_path, caplog):
    run = saved_run(tmp_path, drawn(PlainConvUNet(5, **SIZES), 1.0), SUPERVISED)
    with caplog.at_level(logging.INFO):
        params = flat(begin_from(run, drawn(UNET), UNET, 1, twins=()))
    assert {n for n, leaf in params.items() if not leaf.any()} == {"head_0/kernel", "head_0/bias"}
    assert (
        f"{len(params) - 2} of {len(params)} parameters are from {tmp_path}, step 0" in caplog.text
    )
    assert "random stays head_0/bias [3]: there it is [5]" in caplog.text
    only = flat(begin_from(run, drawn(UNET), UNET, 1, twins=(), only=("encoder_0",)))
    assert all(leaf.any() == name.startswith("encoder_0") for name, leaf in only.items())
    same = saved_run(tmp_path / "same", drawn(UNET, 1.0), SUPERVISED)
    rest = flat(begin_from(same, drawn(UNET), UNET, 1, twins=(), leave=("head",)))
    assert all(leaf.any() != name.startswith("head") for name, leaf in rest.items())


def test_nothing_that_fits_is_refused(tmp_path):
    run = saved_run(tmp_path / "a", {"other": {"kernel": np.ones(2)}}, SUPERVISED)
    with pytest.raises(ValueError, match=r"init_from: nothing in .*a, step 0 fits this network"):
        begin_from(run, drawn(UNET), UNET, 1, twins=())
    with pytest.raises(FileNotFoundError, match="is no folder of a run"):
        begin_from(str(tmp_path), drawn(UNET), UNET, 1, twins=())
    with pytest.raises(FileNotFoundError, match="no such file"):
        begin_from(str(tmp_path / "none.npz"), drawn(UNET), UNET, 1, twins=())


@pytest.mark.parametrize("field", ["only", "leave"])
def test_a_word_that_begins_no_name_is_refused_with_the_names(tmp_path, field):
    """Primus has no head of that name: its weights would all be taken."""
    primus = Primus(2, token=(2, 4, 4), width=12, heads=2, layers=1)
    run = saved_run(tmp_path, drawn(primus, 1.0), SUPERVISED)
    with pytest.raises(ValueError, match=rf"init_{field}: no .* begins with 'head'; .* up_1"):
        begin_from(run, drawn(primus), primus, 1, twins=(), **{field: ("up_0", "head")})
    left = flat(begin_from(run, drawn(primus), primus, 1, twins=(), leave=("up_1",)))
    assert {name.partition("/")[0] for name, leaf in left.items() if not leaf.any()} == {"up_1"}


def test_each_twin_gets_a_network_where_there_are_as_many(tmp_path, caplog):
    members = {"fold_0": drawn(UNET, 1.0), "fold_1": drawn(UNET, 2.0)}
    run = saved_run(tmp_path / "two", members, MEMBERS)
    both = {"a": drawn(UNET), "b": drawn(UNET)}
    params = begin_from(run, both, UNET, 1, twins=("a", "b"))
    assert {float(leaf.max()) for leaf in jax.tree.leaves(params["a"])} == {1.0}
    assert {float(leaf.max()) for leaf in jax.tree.leaves(params["b"])} == {2.0}
    one = saved_run(tmp_path / "one", drawn(UNET, 3.0), SUPERVISED)
    params = begin_from(one, both, UNET, 1, twins=("a", "b"))
    assert {float(leaf.min()) for leaf in jax.tree.leaves(params)} == {3.0}
    assert "has one network, and the 2 of the objective all begin with it" in caplog.text
    assert "taken" not in caplog.text
    params = begin_from(run, drawn(UNET), UNET, 1, twins=())
    assert {float(leaf.max()) for leaf in jax.tree.leaves(params)} == {1.0}
    assert "two, step 0 has 2 networks; taken: fold_0" in caplog.text


def test_a_file_of_pytorch_is_read_by_the_names_of_the_network(tmp_path):
    weights = recipe_for(UNET, 1).weights
    leaves = flat(drawn(UNET, 1.0))
    state = {
        f"module.{name}": weight.layout.to_torch(
            np.asarray(leaves[weight.path.removeprefix("params/")])
        )
        for name, weight in weights.items()
    }
    np.savez(tmp_path / "w.npz", **state, **{"module.surprise": np.zeros(1)})
    params = begin_from(str(tmp_path / "w.npz"), drawn(UNET), UNET, 1, twins=())
    assert all(leaf.all() for leaf in jax.tree.leaves(params))


SWIN = SwinUNETR(2, feature_size=6, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), attn_window=(2, 2, 2))


@pytest.mark.parametrize(
    ("prefix", "doubled", "linear"),
    [
        # MONAI's `load_from`, and its `filter_swinunetr`.
        ("module.", "", "fc"),
        ("encoder.", "0.", "linear"),
    ],
)
def test_an_encoder_of_swin_that_was_trained_by_itself(tmp_path, caplog, prefix, doubled, linear):
    state, whole = {}, flat(drawn(SWIN))
    for name, weight in recipe_for(SWIN, 1).weights.items():
        if name.startswith("swinViT."):
            shape = weight.layout.to_torch(np.asarray(whole[weight.path[7:]])).shape
            own = name.removeprefix("swinViT.").replace("mlp.linear", f"mlp.{linear}")
            stage, _, rest = own.partition(".0.")
            own = f"{stage}.0.{doubled}{rest}" if own.startswith("layers") else own
            state[f"{prefix}{own}"] = np.ones(shape, np.float32)
    for other in ("norm.weight", "mask_token"):
        state[f"{prefix}{other}"] = np.ones(3, np.float32)
    np.savez(tmp_path / "w.npz", **state)
    params = flat(begin_from(str(tmp_path / "w.npz"), drawn(SWIN), SWIN, 1, twins=()))
    encoder = ("patch_embed", "stage_", "merging_")
    assert all(leaf.any() == name.startswith(encoder) for name, leaf in params.items())
    assert "random stays" in caplog.text
    assert "does not tell the order in which its patches are merged" in caplog.text


def test_patches_that_were_merged_in_another_order_are_told(tmp_path, caplog):
    """The weights fit, and mean other channels: MONAI 1.5 changed the order."""
    saved = {"objective": SUPERVISED, "model": {"name": "swin_unetr.SwinUNETR"}}
    legacy = SWIN.clone(merging="legacy")
    for own, kept, told in (
        (SWIN, {}, ""),
        (SWIN, {"merging": "legacy"}, "--model.merging=legacy"),
        (legacy, {}, "--model.merging=fixed"),
        (legacy, {"merging": "legacy"}, ""),
    ):
        run = saved_run(tmp_path / f"{own.merging}{len(kept)}", drawn(SWIN, 1.0), SUPERVISED)
        described = saved | {"model": saved["model"] | kept}
        (tmp_path / f"{own.merging}{len(kept)}" / "config.json").write_text(json.dumps(described))
        caplog.clear()
        begin_from(run, drawn(own), own, 1, twins=())
        assert told in caplog.text
        assert ("mean other channels" in caplog.text) == bool(told)


def toy_recipe(objective):
    parts = make_parts(objective)
    cut = Cut(patch=(4, 4, 4), source=(4, 4, 4), fill=0.0)
    return Recipe(
        parts, lambda _: (parts.schedule, parts.optimizer), cut, jnp.float32, 1, 1, 2, 0, None
    )


def test_a_training_begins_there_and_its_average_too(tmp_path):
    recipe = toy_recipe(Supervised(ema_decay=0.9))
    state = jax.jit(lambda key: init_state(recipe.parts, make_batch().image, key))(
        jax.random.key(0)
    )
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), state.params)
    config = Train(init_from=saved_run(tmp_path, ones, SUPERVISED))
    begun = train._begun_from(config, recipe, state, meshes.make_mesh(devices=jax.devices()[:1]))
    assert jax.tree.all(jax.tree.map(lambda leaf: bool((leaf == 1).all()), begun.params))
    assert jax.tree.all(jax.tree.map(lambda leaf: bool((leaf == 1).all()), begun.ema))
    assert begun.step == 0
    assert begun.opt_state is state.opt_state


class Dropping(Toy):
    """Its channels of input at random."""

    @nn.compact
    def __call__(self, image, *, train):
        return super().__call__(nn.Dropout(0.5, deterministic=not train)(image), train=train)


def test_networks_that_would_stay_one_are_refused(tmp_path):
    """Where they see the same patches, begin alike and drop nothing, their gradients are equal."""
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    image = jax.ShapeDtypeStruct((1, 4, 4, 4, 1), jnp.float32)
    shapes = jax.eval_shape(lambda x: Toy().init(jax.random.key(0), x, train=False), image)
    network = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes["params"])
    run = saved_run(tmp_path, network, SUPERVISED)

    def begun(objective, *leave, view=None, model=None):
        """Whether the second network begins as the first."""
        recipe = toy_recipe(WithSliceLoss(objective) if objective.uses_unlabeled else objective)
        parts = dataclasses.replace(recipe.parts, view=view or IntensityChain(()))
        parts = dataclasses.replace(parts, model=model or parts.model)
        recipe = dataclasses.replace(recipe, parts=parts)
        drawn = {
            twin: jax.tree.map(lambda leaf, k=k: leaf + k, network)
            for k, twin in enumerate(objective.twins, start=1)
        }
        state = TrainState(jnp.zeros((), jnp.int32), drawn, (), None, jax.random.key(0))
        config = Train(init_from=run, init_leave=leave)
        first, second, *_ = train._begun_from(config, recipe, state, mesh).params.values()
        return jax.tree.all(jax.tree.map(np.array_equal, first, second))

    shared, independent = (CrossPseudoSupervision(views=v) for v in ("shared", "independent"))
    noise = IntensityChain((GaussianNoise(p=0.1, std=(0.0, 0.1)),))
    for objective, view in ((shared, noise), (independent, None), (Ensemble(), noise)):
        with pytest.raises(ValueError, match=r"would stay one network, .*init_leave=head,"):
            begun(objective, view=view)
        assert not begun(objective, "Conv_1", view=view)
        assert begun(objective, view=view, model=Dropping())
    assert begun(independent, view=noise)


def test_a_training_goes_on_only_on_the_scans_and_the_division_it_began_with(tmp_path):
    recipe, mesh = toy_recipe(Supervised()), meshes.make_mesh(devices=jax.devices()[:1])
    shards = tmp_path / "shards"
    files.write_json(shards / "plan.json", PLAN.to_json())
    row = {"has_label": True, "bleeding": None, "shape": (4, 4, 4), "voxels": (), "volume_ml": ()}
    row |= {"split": "train", "shard": "s", "record": 0}
    names = [f"c{i}" for i in range(10)]
    write_index(shards, [Entry(id=name, patient=name, **row) for name in names])

    def opened(plan=PLAN, **split):
        config = common.get_config()
        config.split.update(split)
        return Run.of(config, tmp_path, plan)

    def position(run):
        checkpoints = train._open_run(run)
        checkpoints.close()
        return train._start(recipe, checkpoints, mesh, run)[1]["batches"]

    def sequel(run):
        kept = held_out.Trained.of(tmp_path)
        held_out.require_sequel(kept, run.config, tmp_path, run.plan, run.roles[0])

    saved, state = train._open_run(opened()), jax.jit(recipe.init)(jax.random.key(0))
    saved.save(3, state, {"batches": 3}, 0.5)
    saved.close()
    low, mean, std, high = PLAN.foreground
    near = {"notes": ("told otherwise",), "foreground": (low, mean * (1 + 1e-9), std, high)}
    assert position(opened(plan=dataclasses.replace(PLAN, **near))) == 3
    sequel(opened(labeled=4))  # the masks of the others are left out, no scan is
    for changed, said in (
        ({"foreground": (low, mean + 0.1, std, high)}, r"foreground .*init_from"),
        ({"source_sha256": "of another list of files"}, "scans or masks were added"),
    ):
        with pytest.raises(ValueError, match=said):
            sequel(opened(plan=dataclasses.replace(PLAN, **changed)))
    for name, value in (("fold", 1), ("binary", True), ("seed", 7)):
        with pytest.raises(ValueError, match=rf"split\.{name} .*--preprocess\.shards={shards}"):
            sequel(opened(**{name: value}))
    splits_file.keep(shards, ((tuple(names[:7]), tuple(names[7:])),))
    with pytest.raises(ValueError, match=r"other roles in the training so far: splits_final\.json"):
        position(opened())
    older = train._open_run(opened())
    del older.extra["roles"]
    older.save(4, state, {"batches": 4}, 0.5)
    older.close()
    assert position(opened()) == 4, "of an older version, which kept none"


def test_a_network_that_has_seen_no_mask_predicts_nothing(tmp_path):
    run = Run.of(pretrain.get_config("smoke"), tmp_path, PLAN)
    with pytest.raises(ValueError, match=rf"segments nothing; .*init_from={tmp_path}"):
        deployed.load(run)


def test_imported_weights_are_no_training_to_go_on_with(tmp_path):
    save_networks(tmp_path / "run" / "checkpoints", drawn(UNET), config={}, plan={})
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", config={}, plan={})
    parts, image = make_parts(Supervised()), make_batch().image
    state = jax.eval_shape(lambda key: init_state(parts, image, key), jax.random.key(0))
    with pytest.raises(ValueError, match=r"use another --workdir and --train\.init_from=.*run"):
        checkpoints.restore(state)
    checkpoints.close()
