"""Whether a network has its fast form on a device, and the making of it."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

from peaknet_predict.models.fast.network import FastPeakNet, unsupported
from peaknet_predict.models.peaknet import PeakNet

log = logging.getLogger(__name__)

_FIRST_WITH_BFLOAT16 = (8, 0)  # compute capability


class FastForm:
    """The fast form of a network, if it has one where it is to run.

    Not a module: a module that holds it neither saves its tensors nor converts them to another
    precision. Networks other than `PeakNet` are none of its business.

    Parameters
    ----------
    net
        The network. Its parameters are read, never changed.
    wanted
        Whether to use the fast form at all.

    Attributes
    ----------
    network
        The fast form once `start` has found that it runs; None while the plain network does.
    """

    def __init__(self, net: nn.Module, wanted: bool = True) -> None:
        self.network: FastPeakNet | None = None
        self._net = net
        self._wanted = wanted
        self._made: FastPeakNet | None = None
        self._made_from: list[int] = []
        self._failure: str | None = None

    def prepare(self, device: torch.device, precision: str) -> None:
        """Make the fast form from the parameters as they are now, if it will run on `device`.

        To be called while they are float32: they are multiplied together before they are rounded.
        """
        if self._obstacle(device, precision) is not None:
            return
        assert isinstance(self._net, PeakNet)
        versions = _versions(self._net)
        if self._made is None or versions != self._made_from:
            self._made, self._made_from = FastPeakNet(_in_float32(self._net)), versions

    def start(self, device: torch.device, precision: str) -> None:
        """Load the kernels and move to `device`; set `network`, and log which one runs and why."""
        self.network = None
        if not isinstance(self._net, PeakNet):
            return
        obstacle = self._obstacle(device, precision)
        if obstacle is None:
            try:
                _load_kernels()
            except Exception as error:
                self.give_up(error)
                return
        if obstacle is not None:
            log.info("the plain PeakNet runs: %s", obstacle)
            return
        # Again, because a checkpoint may have changed the parameters since.
        self.prepare(device, precision)
        assert self._made is not None
        self.network = self._made.to(device).eval()
        log.info("the fast PeakNet runs, in bfloat16 on %s", _name(device))

    def give_up(self, error: Exception) -> None:
        """Leave it to the plain network from now on, because the kernels do not run."""
        reason = str(error).strip().splitlines()
        self._failure = f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}"
        self.network = self._made = None
        log.warning(
            "the fast PeakNet does not run, and the plain one takes its place, which is slower: "
            "%s; %s",
            self._failure,
            _remedy(error),
        )

    def _obstacle(self, device: torch.device, precision: str) -> str | None:
        """Say why the plain network runs; None if nothing is known to stop the fast one."""
        if not isinstance(self._net, PeakNet):
            return "the network is another one"
        if not self._wanted:
            return "the fast one is switched off (fast: false)"
        # A subclass may compute something else.
        if type(self._net) is not PeakNet:
            return (
                f"{type(self._net).__name__} is a class of its own, and only PeakNet is rewritten"
            )
        obstacle = unsupported(self._net) or _unfit(device)
        if obstacle is not None:
            return obstacle
        if not precision.startswith("bf16"):
            return (
                f"precision is {precision}, the fast one computes in bfloat16 "
                "(trainer.precision: bf16-mixed or bf16-true)"
            )
        if self._failure is not None:
            return f"the fast one failed before ({self._failure})"
        return None


def _unfit(device: torch.device) -> str | None:
    """Say why no kernels of ours run on a device; None if they do."""
    if device.type != "cuda":
        return f"the device is {device}, the fast one needs a CUDA GPU"
    if torch.cuda.get_device_capability(device) < _FIRST_WITH_BFLOAT16:
        return f"{_name(device)} does not compute in bfloat16"
    return None


def _load_kernels() -> None:
    """Put the GPU's kernels in place of the operators' plain implementations."""
    # Where it is used: CuPy and Triton may not be installed.
    import peaknet_predict.models.fast.cuda_ops  # noqa: F401


def _remedy(error: Exception) -> str:
    if not isinstance(error, ImportError):
        return (
            "to do without it from the start, and without this warning, set fast: false; "
            "peaknet-predict doctor checks the GPU"
        )
    if (error.name or "").startswith("triton"):
        return "pip install triton, in the version that this torch was built with"
    cuda = str(torch.version.cuda or "13").split(".")[0]
    return f"pip install 'peaknet-predict[cuda{cuda}]'"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _versions(net: nn.Module) -> list[int]:
    """Return what changes when parameters do: by loading or training, not by moving or rounding."""
    return [0 if p.is_inference() else p._version for p in net.parameters()]


def _in_float32(net: PeakNet) -> PeakNet:
    if all(p.dtype == torch.float32 for p in net.parameters()):
        return net
    return copy.deepcopy(net).float()
