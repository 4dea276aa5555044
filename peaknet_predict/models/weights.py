"""Load a weight file into a network, completely or not at all.

A partly loaded network still runs and gives plausible peaks. So everything is checked before the
first parameter is written, and each error names the tensors concerned.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from peaknet_predict.process.files import expanded

_log = logging.getLogger(__name__)

_WRAPPERS = ("model_state_dict", "state_dict", "model", "module")
"""Keys under which training programs put the state dict beside their own state."""

_PREFIXES = ("_orig_mod.", "module.")
"""Prefixes that `torch.compile` and `DistributedDataParallel` add to every name."""

_MAX_NAMES = 10

METADATA = "peaknet_predict"
"""Key of a weight file's metadata: JSON with version, steps taken, figures of the validation, and
the operating point that is not part of the weights (``threshold``)."""

SHIPPED = Path(__file__).parents[1] / "weights"
"""Directory of the weight files that come with this program."""


def load_weights(model: nn.Module, path: str | Path) -> str:
    """Copy the tensors of a weight file into a model.

    Parameters
    ----------
    model
        The network; its dtypes and devices stay, the file's tensors are cast to them.
    path
        The name of a file that comes with this program, without its suffix (``peaknet_small``); or
        the path of a ``.safetensors``, or of a ``.pt`` / ``.pth`` with a state dict of tensors,
        bare or under one of the keys ``model``, ``state_dict``, ``module`` and
        ``model_state_dict``. Prefixes ``_orig_mod.`` and ``module.`` that all names share are
        removed. A model may have an attribute ``weight_aliases``, a dict of prefixes of names in
        other programs' files and their replacements.

    Returns
    -------
    str
        SHA-256 of the file, in hexadecimal.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is of another kind, damaged, or holds more than plain tensors; or if a tensor is
        missing, unexpected, of the wrong shape or not finite. The model is then unchanged.
    """
    path = _found(expanded(path))
    own = model.state_dict()
    tensors = _strip_prefixes(_read(path), own, path)
    tensors = _in_own_names(tensors, own, getattr(model, "weight_aliases", {}))
    _check_names_and_shapes(tensors, own, path)
    # Cast first: a float64 or bfloat16 value may be finite and its float16 cast not.
    cast = {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()}
    broken = [name for name, tensor in cast.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{path}: NaN or infinite values in {_listed(broken)}")
    model.load_state_dict(cast)

    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    _log.info("loaded %d tensors from %s (sha256 %s)", len(cast), path, sha256)
    return sha256


def stored_threshold(path: str | Path) -> float | None:
    """Return the operating point that a weight file asks for; None if it says nothing.

    `peaknet-predict export` writes it where it cannot be part of the weights: the log odds above
    which a pixel is a peak.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If what the file says is no number.
    """
    path = _found(expanded(path))
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        stored = (file.metadata() or {}).get(METADATA)
    try:
        threshold = None if stored is None else json.loads(stored).get("threshold")
        value = None if threshold is None else float(threshold)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its metadata '{METADATA}' cannot be read: {error}") from error
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{path}: its threshold is {value}, which is no operating point")
    return value


def _found(path: Path) -> Path:
    """Return the path of a weight file that may be given by its name alone."""
    if path.is_file():
        return path
    shipped = SHIPPED / f"{path.name}.safetensors"
    if len(path.parts) == 1 and not path.suffix and shipped.is_file():
        return shipped
    names = sorted(file.stem for file in SHIPPED.glob("*.safetensors"))
    raise FileNotFoundError(
        f"there is no weight file {path}: check the path given as `weights` (a relative one starts "
        f"at the working directory), give the name of one that is shipped "
        f"({', '.join(names) or 'none is'})"
    )


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(
            f"{path}: weights are read from .safetensors, .pt and .pth, not '{path.suffix}'"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused for safety: it holds Python objects beside plain tensors, and "
            "unpickling them could run any code. Where you trust the file, convert it once: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a PyTorch file: {error}") from error
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict, from under a wrapping key where there is one."""
    while isinstance(content, Mapping):
        wrapper = next((k for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if wrapper is None:
            break
        _log.info("%s: the state dict is under the key '%s'", path, wrapper)
        content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path}: these entries are not tensors: {_listed(others)}")
    return {str(name): tensor for name, tensor in content.items()}


def _strip_prefixes(
    tensors: dict[str, Tensor], own: Iterable[str], path: Path
) -> dict[str, Tensor]:
    """Remove prefixes that wrappers gave to all names, in any combination."""
    own_names = list(own)
    stripped = ""
    while True:
        prefix = next((p for p in _PREFIXES if tensors and _all_start_with(tensors, p)), None)
        # A network that is itself wrapped needs the prefix.
        if prefix is None or _all_start_with(own_names, prefix):
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        stripped += prefix
    if stripped:
        _log.info("%s: removed the prefix '%s' from all names", path, stripped)
    return tensors


def _in_own_names(
    tensors: dict[str, Tensor], own: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    """Rename tensors of other programs to the model's names."""
    renamed = {}
    for name, tensor in tensors.items():
        for beginning, ours in aliases.items():
            candidate = ours + name.removeprefix(beginning)
            if name not in own and name.startswith(beginning) and candidate not in tensors:
                name = candidate
        renamed[name] = tensor
    return renamed


def _all_start_with(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def _check_names_and_shapes(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path
) -> None:
    problems = []
    if missing := [name for name in own if name not in tensors]:
        problems.append(f"missing from the file: {_listed(missing)}")
    if unexpected := [name for name in tensors if name not in own]:
        problems.append(f"unknown to the network: {_listed(unexpected)}")
    misshapen = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
        for name, tensor in tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if misshapen:
        problems.append(f"of the wrong shape: {_listed(misshapen)}")
    if problems:
        raise ValueError(
            f"{path} does not fit the network; tensors "
            + "; ".join(problems)
            + ". Do the network's sizes in the configuration belong to this file?"
        )


def _listed(names: list[str]) -> str:
    """Return the number of names and the first of them."""
    rest = f", and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"{len(names)}: {', '.join(names[:_MAX_NAMES])}{rest}"
