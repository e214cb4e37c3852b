"""Files of PyTorch weights as NumPy arrays: .pth and its kin, safetensors, npz. No code is run."""

import importlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import yaml  # which ml_collections brings

from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError, explain_extra

# Where training scripts keep the network's weights among other things, the surest name first.
_NESTS = ("network_weights", "state_dict", "model_state_dict", "model", "net", "network", "params")
_SCALARS = (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)
_YAML = (".yaml", ".yml")


@dataclass(frozen=True, eq=False)
class WeightsFile:
    """What a file holds."""

    state: Mapping[str, np.ndarray]  # by PyTorch name
    beside: Mapping[str, Any]  # the rest, by key: nnU-Net's plans; strings of a safetensors header


def read(path: Path) -> WeightsFile:
    """Reads weights, told apart by suffix; anything else is taken for a file of `torch.save`.

    A state dict may lie under one of the usual names, however deep, or be the only one there is.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a library is missing, the file is damaged, holds no weights, or holds Python
            objects, which only running code from it could bring back.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix == ".npz":
        return _npz(path)
    content = _torch(path)
    return WeightsFile(_state(content, path), content if isinstance(content, Mapping) else {})


def beside(path: Path) -> Mapping[str, Any]:
    """What a file of `torch.save` holds by key, without looking for weights; {}: no keys.

    Raises:
        ValueError: As `read`.
    """
    content = _torch(path)
    return content if isinstance(content, Mapping) else {}


def library(name: str, path: Path, extra: str = "torch-import") -> ModuleType:
    """Imports what only an extra brings.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f"{path}: needs {package}; {explain_extra(extra)}") from error


def _safetensors(path: Path) -> WeightsFile:
    safetensors = library("safetensors", path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            narrow = [name for name, kind in kinds.items() if kind == "BF16"]
            state = {name: file.get_tensor(name) for name in kinds if name not in narrow}
            state |= _bfloat16(path, narrow)
            return WeightsFile({name: state[name] for name in kinds}, file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a sound safetensors file ({error})") from error


def _bfloat16(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Tensors that NumPy has no type for, as float32: they are its upper halves.

    Source: the safetensors format: the header's length in 8 bytes, the header, the data.
    """
    if not names:
        return {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header, state = json.loads(file.read(length)), {}
        for name in names:
            first, last = header[name]["data_offsets"]
            file.seek(8 + length + first)
            upper = np.frombuffer(file.read(last - first), "<u2").astype(np.uint32)
            state[name] = (upper << 16).view(np.float32).reshape(header[name]["shape"])
    return state


def _npz(path: Path) -> WeightsFile:
    try:
        with np.load(path, allow_pickle=False) as file:
            return WeightsFile({name: file[name] for name in file.files}, {})
    except (ValueError, OSError, EOFError, AttributeError) as error:
        raise UserError(f"{path}: not an npz file of plain arrays ({error})") from error


def _torch(path: Path) -> Any:
    _require_weights(path)
    torch = library("torch", path)
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()
        blocked = next((line.strip() for line in reason if "GLOBAL" in line), reason[0])
        raise UserError(
            f"{path}: cannot be read without running code from it ({blocked}); at its origin, "
            "save the weights alone: torch.save(network.state_dict(), ...)"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a sound PyTorch file ({error})") from error


def _require_weights(path: Path) -> None:
    """Refuses what stands in the place of a file of weights, with what to do about it."""
    with path.open("rb") as file:
        other = files.stand_in(file.read(64))
    if other:
        raise UserError(f"{path}: {other}")
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = [name.rpartition("/")[2] for name in archive.namelist()]
    if "constants.pkl" in names:
        raise UserError(
            f"{path}: a TorchScript archive, whose network is code that would have to be run; give "
            "the state dict that it was made of, often model.pt beside it"
        )
    if "data.pkl" not in names:
        raise UserError(
            f"{path}: an archive of files; unpack it, and give the folder or file in it"
        )


def _numpy_scalars() -> list[Any]:
    """Exactly what a NumPy number in a log needs, under the names of NumPy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    types = {type(np.dtype(kind)) for kind in _SCALARS}
    return [np.dtype, *types, *((scalar, name) for name in names)]


def _state(content: Any, path: Path) -> dict[str, np.ndarray]:
    state = content
    while not _is_state(state):
        keys = list(state) if isinstance(state, Mapping) else []
        nest = next((name for name in _NESTS if name in keys), None)
        alone = [key for key in keys if _is_state(state[key])]
        if nest is None and len(alone) == 1:
            nest = alone[0]
        if nest is None:
            raise UserError(
                f"{path}: no weights under {', '.join(_NESTS)}; it holds "
                f"{', '.join(map(str, keys[:12])) or type(state).__name__}"
            )
        state = state[nest]
    return {name: _array(tensor) for name, tensor in state.items()}


def _is_state(content: Any) -> bool:
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(k, str) and hasattr(v, "shape") for k, v in content.items())


def _array(tensor: Any) -> np.ndarray:
    whole = tensor.detach()
    return (whole.float() if whole.is_floating_point() else whole).numpy()


def json_of(text: str) -> dict[str, Any]:
    """A JSON object, from a file or written out; from a file called .yaml the same in YAML.

    Raises:
        ValueError: If it is neither.
    """
    written = text.lstrip().startswith("{")
    parse = yaml.safe_load if not written and Path(text).suffix in _YAML else json.loads
    try:
        value = parse(text if written else Path(text).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{text}: neither a JSON object nor a file of one ({why})") from error
    if not isinstance(value, dict):
        raise UserError(f"{text}: must be a JSON object, got a {type(value).__name__}")
    return value
