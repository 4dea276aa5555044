"""Weight files for prediction, made from the checkpoints of a training run."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from peaknet_predict import __version__
from peaknet_predict.models.weights import METADATA
from peaknet_predict.process.files import expanded, write_whole
from peaknet_predict.training.metrics import OPERATING_POINT

log = logging.getLogger(__name__)

_NETWORK = "net."
_PEAK_BIAS = "head_segmask.bias"


def export_weights(checkpoint: str | Path, path: str | Path) -> str:
    """Write the network of a checkpoint as a weight file in float16, ready for `weights`.

    The operating point of the checkpoint's validation goes with the weights. Prediction calls a
    pixel peak where class 1 has the larger logit, so in a PeakNet the bias of that class is lowered
    by the threshold. It enters once, in ``head_segmask.bias``; the learned enlargement, where there
    is one, is added to that branch. For any other network the threshold is written into the file's
    metadata, where `PeakNetModule` finds it if it is the one that loads the file (``weights``).

    The file appears under its name once it is complete.

    Parameters
    ----------
    checkpoint
        A ``.ckpt`` file of `peaknet-predict fit`. If it has averaged weights, those are taken.
    path
        The ``.safetensors`` file to write; its directory is made if need be.

    Returns
    -------
    str
        SHA-256 of the file, in hexadecimal.

    Raises
    ------
    FileNotFoundError
        If there is no such checkpoint.
    ValueError
        If the file is no checkpoint of such a run, or `path` has another suffix; or if a weight is
        not finite or too large for float16.
    """
    path = expanded(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are written as .safetensors; give the path that suffix")
    content = _read(expanded(checkpoint))
    tensors = {
        name.removeprefix(_NETWORK): tensor.detach().cpu()
        for name, tensor in content["state_dict"].items()
        if name.startswith(_NETWORK)
    }
    if not tensors:
        raise ValueError(f"{checkpoint} holds no network: it is not of `peaknet-predict fit`")
    figures: dict[str, float] | None = content.get(OPERATING_POINT)
    threshold: float | None = None
    if figures is None:
        log.warning("%s was never validated: its operating point is left as it is", checkpoint)
    elif _PEAK_BIAS in tensors:
        tensors[_PEAK_BIAS] = tensors[_PEAK_BIAS].clone()
        tensors[_PEAK_BIAS][1:] -= figures["threshold"]
        threshold = 0.0
    else:
        threshold = figures["threshold"]
        log.info(
            "%s: pixels are peaks above log odds of %g; this goes into the file's metadata, and "
            "predict heeds it with model.init_args.weights, else set model.init_args.threshold",
            checkpoint,
            threshold,
        )
    origin = {
        "version": __version__,
        "steps": content.get("global_step"),
        "validation": figures,
        "threshold": threshold,
    }
    # One entry, because several have no order: the same checkpoint makes the same file.
    metadata = {METADATA: json.dumps(origin)}
    data = save({name: _halved(name, tensor) for name, tensor in tensors.items()}, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)
    sha256 = hashlib.sha256(data).hexdigest()
    log.info("%s: %.1f MB, sha256 %s", path, len(data) / 1e6, sha256)
    return sha256


def _read(checkpoint: Path) -> dict[str, Any]:
    if not checkpoint.is_file():
        raise FileNotFoundError(f"there is no checkpoint {checkpoint}: check the path")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{checkpoint} is not a checkpoint that can be read: {error}") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{checkpoint} has no state_dict: it is not a checkpoint of a run")
    return content


def _halved(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.contiguous()
    half = tensor.to(torch.float16).contiguous()
    if not torch.isfinite(half).all():
        raise ValueError(f"{name} has values that are not finite in float16: the run diverged")
    return half
