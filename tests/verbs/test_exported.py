"""Exported networks: StableHLO in a process of JAX alone, safetensors back into a run."""

import dataclasses
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from bhsd_jax.assemble import deployed, wiring
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import common, from_run
from bhsd_jax.torch_weights import importing
from bhsd_jax.train.checkpoint import save_networks
from bhsd_jax.verbs import export
from bhsd_jax.volume import Plan

TOOLS = Path(__file__).parents[2] / "tools"
TILE = (4, 8, 8)
PLAN = dataclasses.replace(
    tiny_run.PLAN,
    network=dataclasses.replace(
        tiny_run.PLAN.network,
        patch=TILE,
        features=(4, 6),
        strides=((1, 1, 1), (2, 2, 2)),
        convs_encoder=(1, 2),
    ),
)
ALONE = """
import sys
import jax, jax.export
import numpy as np
data, image, weights, out = sys.argv[1:]
network = jax.export.deserialize(bytearray(open(data, "rb").read()))
given = [dict(np.load(weights))] if weights else []
np.save(out, network.call(*given, np.load(image)))
ours = {name for name in sys.modules if name.partition(".")[0] in ("flax", "bhsd_jax", "configs")}
assert not ours, ours
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it, its model and variables."""
    return saved_run(tmp_path_factory.mktemp("run"), common.get_config(), TILE)


def saved_run(folder, config, seen, plan=PLAN):
    model = wiring.model(Run.of(config, Path("run"), plan))
    image = jax.ShapeDtypeStruct((1, *seen, 1), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: random.normal(0, 0.5, s.shape).astype(np.float32), shapes)
    plain = json.loads(json.dumps(config.to_dict()))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(plain))
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    save_networks(folder / "checkpoints", variables["params"], config=plain, plan=plan.to_json())
    return folder, model, variables


def run_tool(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(TOOLS / name), run_name="__main__")


def alone(folder, image, weights=""):
    """Logits out of a process that has imported JAX and nothing of ours."""
    np.save(folder / "image.npy", image)
    files = [folder / "model.stablehlo", folder / "image.npy", weights, folder / "out.npy"]
    command = [sys.executable, "-c", ALONE, *map(str, files)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "out.npy")


def logits(run, image, normalize=None):
    _, model, variables = run
    normalize = normalize or (lambda x: x)
    apply = jax.jit(lambda v, x: model.apply(v, normalize(x), train=False)[0])
    return np.asarray(apply(variables, image))


def tiles(count, channels=1):
    return np.random.default_rng(1).normal(60, 30, (count, *TILE, channels)).astype(np.float32)


def test_stablehlo_gives_the_logits_without_the_package(run, tmp_path, monkeypatch):
    pytest.importorskip("flatbuffers", reason="extra export: StableHLO files")
    run_tool(monkeypatch, "export.py", run[0], tmp_path / "out", "--to", "stablehlo")
    image = tiles(3)
    normalize = Run.of(common.get_config(), Path("run"), PLAN).normalization
    want = logits(run, image, normalize)
    found = alone(tmp_path / "out", image)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    facts = json.loads((tmp_path / "out" / "model.json").read_text())
    assert facts["platforms"] == ["cpu", "cuda"]
    assert facts["normalization"] == {
        "formula": "(clip(x, low, high) - shift) / scale",
        "when": "after resampling",
        "low": [10.0],
        "high": [110.0],
        "shift": [60.0],
        "scale": [20.0],
    }
    assert (facts["license"], facts["patch"], facts["classes"][2]) == ("CC0", [4, 8, 8], "SDH")
    assert facts["activation"] == "softmax"
    assert "Research use only" in facts["notice"]
    assert facts["spacing_mm"] == [5.0, 2.0, 2.0]


def test_weights_may_lie_apart_and_images_be_normalized(run, tmp_path, monkeypatch):
    pytest.importorskip("flatbuffers", reason="extra export: StableHLO files")
    out = tmp_path / "out"
    options = ["--to", "stablehlo", "--normalized", "--weights-apart"]
    run_tool(monkeypatch, "export.py", run[0], out, *options)
    image = tiles(1)
    want = logits(run, image)
    found = alone(out, image, out / "weights.npz")
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    size = (out / "model.stablehlo").stat().st_size
    export.stablehlo(from_run.get_config(str(run[0])), run[0], tmp_path / "in")
    assert (tmp_path / "in" / "model.stablehlo").stat().st_size > size


def test_a_network_with_a_margin_takes_it_around_the_tile(tmp_path, monkeypatch):
    """As BLAST-CT's, whose margin of 40 voxels is wider than half of its tile."""
    pytest.importorskip("flatbuffers", reason="extra export: StableHLO files")
    config, seen = common.get_config(), tuple(n + 6 for n in TILE)
    config.model = {
        "name": "deepmedic.DeepMedic",
        "scales": ((1, 1, 1),),
        "features": (2, 3, 2),
        "joined": (4,),
        "dropout": (0.0, 0.0),
        "context": "given",
    }
    run = saved_run(tmp_path / "run", config, seen)
    run_tool(monkeypatch, "export.py", run[0], tmp_path / "out", "--to", "stablehlo")
    network = jax.export.deserialize(bytearray((tmp_path / "out/model.stablehlo").read_bytes()))
    image = np.random.default_rng(1).normal(60, 30, (2, *seen, 1)).astype(np.float32)
    found = network.call(image)
    want = logits(run, image, Run.of(config, Path("run"), PLAN).normalization)
    assert found.shape == want.shape == (2, *TILE, 3)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    facts = json.loads((tmp_path / "out" / "model.json").read_text())
    assert (facts["patch"], facts["margin"]) == (list(TILE), [3, 3, 3])


def test_regions_are_named_by_channel_and_said_to_be_sigmoids(tmp_path):
    pytest.importorskip("flatbuffers", reason="extra export: StableHLO files")
    regions = ("any", (1, 2)), ("subdural", (2,))
    plan = dataclasses.replace(PLAN, regions=regions, region_order=(1, 2))
    folder, _, _ = saved_run(tmp_path / "run", common.get_config(), TILE, plan)
    config = from_run.get_config(str(folder))
    export.stablehlo(config, folder, tmp_path / "out")
    export.safetensors(config, folder, tmp_path / "out" / "weights.safetensors")
    network = jax.export.deserialize(bytearray((tmp_path / "out/model.stablehlo").read_bytes()))
    for name in ("model.json", "weights.json"):
        facts = json.loads((tmp_path / "out" / name).read_text())
        assert facts["classes"] == ["any", "subdural"]
        assert len(facts["classes"]) == network.out_avals[0].shape[-1]
        assert (facts["activation"], facts["region_values"]) == ("sigmoid", [1, 2])


def test_safetensors_come_back_as_the_same_run(run, tmp_path, monkeypatch):
    folder, _, variables = run
    file, again = tmp_path / "w.safetensors", tmp_path / "again"
    run_tool(monkeypatch, "export.py", folder, file, "--to", "safetensors")
    options = ["--classes", *PLAN.classes, "--spacing-mm", "5", "2", "2", "--patch", *TILE]
    options += ["--clip", "10", "110", "--mean-std", "60", "20", "--crop-hu", "-200"]
    run_tool(monkeypatch, "import_torch.py", file, again, *options)
    config = from_run.get_config(str(again))
    _, networks = deployed.load(Run.of(config, again))
    (found,) = networks.values()
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    plan = Plan.load(again)
    for name in ("classes", "foreground", "spacing_mm", "axes", "crop_hu", "modality"):
        assert getattr(plan, name) == getattr(PLAN, name)
    twin = json.loads(file.with_suffix(".json").read_text())
    module, _ = importing.load(
        twin["reference"], twin["constructor"], torch_names(tmp_path / "w.safetensors")
    )
    assert module == wiring.model(Run.of(common.get_config(), Path("run"), PLAN))

    second = tmp_path / "second.safetensors"
    run_tool(monkeypatch, "export.py", again, second, "--to", "safetensors")
    a, b = torch_names(file), torch_names(second)
    assert a.keys() == b.keys()
    jax.tree.map(np.testing.assert_array_equal, a, b)


def torch_names(path):
    from safetensors.numpy import load_file

    return load_file(path)


def test_what_cannot_be_exported_says_why(run, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no config; give the folder of a run"):
        run_tool(monkeypatch, "export.py", tmp_path, tmp_path / "x", "--to", "stablehlo")
    with pytest.raises(SystemExit, match="no 'teacher'; this objective has student"):
        run_tool(
            monkeypatch,
            *("export.py", run[0], tmp_path / "x", "--to", "safetensors", "--network", "teacher"),
        )
    other = json.loads((run[0] / "config.json").read_text())
    other["predict"]["checkpoint"] = 77  # the tool takes the checkpoint that the run predicts with
    shutil.copytree(run[0], tmp_path / "again")
    (tmp_path / "again" / "config.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="77"):
        run_tool(
            monkeypatch,
            *("export.py", tmp_path / "again", tmp_path / "x", "--to", "safetensors"),
        )
    monkeypatch.setattr(wiring, "model", lambda run: object())
    with pytest.raises(ValueError, match="only PlainConvUNet and ResidualEncoderUNet"):
        export.safetensors(from_run.get_config(str(run[0])), run[0], tmp_path / "x")
