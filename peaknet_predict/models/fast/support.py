"""Whether the fast PeakNet can replace a network on a device."""

from __future__ import annotations

import torch
from torch import nn

from peaknet_predict.models.fast.network import unsupported
from peaknet_predict.models.peaknet import PeakNet

_FIRST_WITH_BFLOAT16 = (8, 0)  # compute capability


def obstacle(net: nn.Module, device: torch.device, precision: str) -> str | None:
    """Return why a network has to run as it is; None if nothing rules out the fast one.

    Parameters
    ----------
    net
        The network.
    device
        Where it is to run.
    precision
        The Trainer's, such as ``bf16-mixed``.
    """
    if not isinstance(net, PeakNet):
        return "the network is not a PeakNet"
    # A subclass may compute something else.
    if type(net) is not PeakNet:
        return f"{type(net).__name__} is a class of its own, and only PeakNet is rewritten"
    reason = unsupported(net) or _unfit(device)
    if reason is not None:
        return reason
    if not precision.startswith("bf16"):
        return (
            f"precision is {precision}, the fast one computes in bfloat16 "
            "(trainer.precision: bf16-mixed or bf16-true)"
        )
    return None


def _unfit(device: torch.device) -> str | None:
    """Return why our kernels do not run on a device; None if they do."""
    if device.type != "cuda":
        return f"the device is {device}, the fast one needs a CUDA GPU"
    if torch.cuda.get_device_capability(device) < _FIRST_WITH_BFLOAT16:
        return f"{device_name(device)} does not compute in bfloat16"
    return None


def load_kernels() -> None:
    """Put the GPU's kernels in place of the operators' plain implementations."""
    # Imported where they are used: CuPy and Triton may not be installed.
    import peaknet_predict.models.fast.cuda_backbone
    import peaknet_predict.models.fast.cuda_pyramid
    import peaknet_predict.models.fast.triton_enlarge
    import peaknet_predict.models.fast.triton_head  # noqa: F401


def remedy(error: Exception) -> str:
    """Return what to do about an error of the kernels."""
    if not isinstance(error, ImportError):
        return (
            "to do without it from the start, and without this warning, set fast: false; "
            "peaknet-predict doctor checks the GPU"
        )
    if (error.name or "").startswith("triton"):
        return "pip install triton, in the version that this torch was built with"
    cuda = str(torch.version.cuda or "13").split(".")[0]
    return f"pip install 'peaknet-predict[cuda{cuda}]'"


def device_name(device: torch.device) -> str:
    """Return a device's name for a log line."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
