"""The network of a run for other programs: StableHLO, or PyTorch's names in safetensors.

    import jax, numpy as np
    network = jax.export.deserialize(bytearray(open("out/model.stablehlo", "rb").read()))
    logits = network.call(image)  # float32 [b D H W C] -> float32 [b D H W K], any b

With the weights apart: `network.call(dict(np.load("out/weights.npz")), image)`.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bhsd_jax import windows
from bhsd_jax.assemble import deployed, wiring
from bhsd_jax.assemble.run import Run
from bhsd_jax.labels import Labels
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.report.page import notice
from bhsd_jax.settings import Config
from bhsd_jax.torch_weights import exporting, nnunet, weights_file
from bhsd_jax.types import Params
from bhsd_jax.verbs import import_weights
from bhsd_jax.volume import Channel

PLATFORMS = ("cpu", "cuda")
_NORMALIZATION = ("low", "high", "shift", "scale")


def stablehlo(
    config: Config,
    workdir: Path,
    out: Path,
    *,
    normalize: bool = True,
    weights_apart: bool = False,
) -> None:
    """Writes `model.stablehlo`, `model.json`, and `weights.npz` if they are to lie apart.

    One tile of the run's patch, any number at once, float32, full-resolution logits; networks that
    need voxels around those they answer for (BLAST-CT's) take that `margin` on every side, too.
    `normalize`: the function takes raw intensities (CT: HU) and normalizes them itself, unless the
    plan does it before resampling (MR, and runs imported from nnU-Net).

    Raises:
        FileNotFoundError: If there is no plan or checkpoint.
        ValueError: If they do not fit the config, or flatbuffers is not installed.
    """
    weights_file.library("flatbuffers", out, extra="export")  # of JAX's file format
    run = Run.of(config, workdir)
    normalize = normalize and not run.plan.normalized_before
    step, name, variables = _network(run)
    model = wiring.model(run).clone(dtype=jnp.float32, remat="none")
    flat: Any = traverse_util.flatten_dict(variables, sep="/")
    forward = _forward(model, run.network_input if normalize else None)
    (batch,) = jax.export.symbolic_shape("b")
    channels = run.plan.raw_channels if normalize else run.network_input.channels
    margin = getattr(model, "margin", (0, 0, 0))
    size = tuple(n + 2 * m for n, m in zip(run.patch, margin, strict=True))
    image = jax.ShapeDtypeStruct((batch, *size, channels), jnp.float32)
    if weights_apart:
        shapes = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in flat.items()}
        function, arguments = forward, (shapes, image)
    else:
        function, arguments = lambda image: forward(flat, image), (image,)
    made = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    data = bytes(made.serialize())
    out.mkdir(parents=True, exist_ok=True)
    files.write_bytes(out / "model.stablehlo", data)
    if weights_apart:
        weights = io.BytesIO()
        np.savez(weights, **flat)
        files.write_bytes(out / "weights.npz", weights.getvalue())
    facts = _facts(run, step, name) | {
        "input": f"float32 [b D H W {channels}], {'raw, HU' if normalize else 'normalized'}",
        "output": f"logits float32 [b D H W {model.num_classes}]",
        "margin": margin,  # voxels of the input on every side that have no logits
        "platforms": PLATFORMS,
        "sha256": hashlib.sha256(data).hexdigest(),
        "weights": "weights.npz, the first argument" if weights_apart else "inside",
        "jax": jax.__version__,
    }
    files.write_json(out / "model.json", facts)


def safetensors(config: Config, workdir: Path, out: Path) -> None:
    """Writes the weights under PyTorch's names, and a JSON file beside them.

    For nnU-Net's networks, and for every imported run. The header holds reference and constructor,
    so that `tools/import_torch.py` needs neither.

    Raises:
        FileNotFoundError: If there is no plan or checkpoint.
        ValueError: If the network has no twin in PyTorch, or safetensors is not installed.
    """
    library = weights_file.library("safetensors.numpy", out)
    run = Run.of(config, workdir)
    step, name, variables = _network(run)
    reference, constructor = _twin(run)
    # It has no weights, does nothing in prediction, and gives other names to what comes after it.
    constructor = {key: value for key, value in constructor.items() if "dropout_op" not in key}
    state = exporting.dump(reference, constructor, variables)
    facts = _facts(run, step, name)
    header = {"reference": reference, "constructor": json.dumps(constructor)}
    header |= {key: facts[key] for key in ("notice", "license", "trained_on")}
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(out, library.save(state, metadata=header))
    twin = {"reference": reference, "constructor": constructor}
    files.write_json(out.with_suffix(".json"), facts | twin)


def _network(run: Run) -> tuple[int, str, Params]:
    step, networks = deployed.load(run)
    if len(networks) > 1:
        raise UserError(
            f"{run.folder}: predicts with {len(networks)} networks together, and an export holds "
            f"one; name it with --network, one of {', '.join(networks)}"
        )
    ((name, variables),) = networks.items()
    return step, name, variables


def _forward(model: Any, normalization: Any) -> Callable[[Mapping[str, Any], jax.Array], jax.Array]:
    def forward(flat: Mapping[str, Any], image: jax.Array) -> jax.Array:
        variables = traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, dict(flat)), sep="/")
        ready = normalization(image) if normalization else image
        return model.apply(variables, ready, train=False)[0]

    return forward


def _twin(run: Run) -> tuple[str, dict[str, Any]]:
    file = run.folder / import_weights.REFERENCE_FILE
    if file.is_file():
        found = weights_file.json_of(str(file))
        return found["reference"], found["constructor"]
    return nnunet.constructor_of(wiring.model(run), run.network_input.channels)


def _facts(run: Run, step: int, name: str) -> dict[str, Any]:
    """What one must know to use the network, without this package."""
    plan = run.plan
    return {
        "notice": notice(run.labels.names),
        "license": plan.license,
        "trained_on": plan.dataset,
        "classes": run.labels.output_names,  # of the logits' channels
        **_activation(run.labels),
        "patch": run.patch,
        "spacing_mm": plan.spacing_mm,
        "axes": plan.axes,
        "transpose": plan.transpose,
        "modality": plan.modality,
        "normalization": _normalization(run),
        "plan": plan.to_json(),
        "model": {"name": run.config.model["name"], "network": name, "step": step},
    }


def _activation(labels: Labels) -> dict[str, Any]:
    """What makes probabilities of logits; of regions also the value that each above 0.5 writes.

    Later ones are written over earlier ones.
    """
    if not labels.regions:
        return {"activation": "softmax"}
    return {"activation": "sigmoid", "region_values": labels.region_order}


def _normalization(run: Run) -> dict[str, Any]:
    """From raw intensities to the network's input, in numbers; one entry per channel.

    Source: nnU-Net v2.8.1, `default_normalization_schemes`, where the plan has its channels.
    """
    plan = run.plan
    when = "before resampling" if plan.normalized_before else "after resampling"
    if plan.channels:
        return {"when": when, "channels": [_of_channel(one) for one in plan.channels]}
    if plan.modality == "mr":
        return {"formula": _z_scores(plan.use_mask_for_norm), "when": when}
    normalization = run.normalization
    if plan.normalize_first:
        normalization = windows.Normalization.from_plan("ct", plan.foreground)
    numbers = {key: getattr(normalization, key) for key in _NORMALIZATION}
    return {"formula": "(clip(x, low, high) - shift) / scale", "when": when, **numbers}


def _of_channel(channel: Channel) -> dict[str, Any]:
    """One of several input channels; what is said of the scan is of this channel of it."""
    low, mean, std, high = channel.foreground
    formula, numbers = {
        "CTNormalization": (
            "(clip(x, low, high) - mean) / std",
            {"low": low, "high": high, "mean": mean, "std": std},
        ),
        "ZScoreNormalization": (_z_scores(channel.masked), {}),
        "NoNormalization": ("x", {}),
        "RescaleTo01Normalization": ("(x - smallest of the scan) / (its largest - smallest)", {}),
        "RGBTo01Normalization": ("x / 255", {}),
    }[channel.scheme]
    return {"name": channel.name, "formula": formula, **numbers}


def _z_scores(masked: bool) -> str:
    formula = "(x - mean of the scan) / its standard deviation"
    return formula + (
        ", both of its non-zero voxels and of the holes in them; all else stays 0" if masked else ""
    )
