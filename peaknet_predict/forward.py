"""The forward pass: preprocessing and network, in the fastest way that works on the device.

Shape legend: B events, P panels of an event, N = B*P panels of a batch, C classes, H rows, W
columns.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from peaknet_predict.models.fast import FastPeakNet, support
from peaknet_predict.models.peaknet import PeakNet
from peaknet_predict.network_output import NetworkOutput
from peaknet_predict.preprocess import Prepared, Preprocess

log = logging.getLogger(__name__)


class ForwardPass:
    """Preprocessing and network, and the choice of how they run.

    There are three ways to run the network, from the fastest to the plainest:

    - ``fast``: `FastPeakNet` in place of a PeakNet (docs/fast.md);
    - ``compiled``: the network through `torch.compile`;
    - ``eager``: the network as it is.

    The fastest one that is wanted and possible is chosen at `start`. If it fails when a shape first
    comes, a warning says why, and the next one takes its place for the rest of the run. All of them
    give the same peaks.

    It is not an `nn.Module`: what it makes from the network appears in no checkpoint, and Lightning
    does not round it to the Trainer's precision.

    Parameters
    ----------
    net, preprocess
        As for `PeakNetModule`. Parameters are read, never changed.
    compile
        Whether to compile the preprocessing and, unless the fast PeakNet runs, the network.
    fast
        Whether to run the fast PeakNet where possible.

    Attributes
    ----------
    mode
        The way that the network runs now.
    network, stride
        What runs: a function of images (N, 1, H, W) that returns logits at 1 / stride of the
        resolution.
    """

    def __init__(
        self, net: nn.Module, preprocess: Preprocess, compile: bool = False, fast: bool = True
    ) -> None:
        self._net, self._preprocess = net, preprocess
        self._wants_fast = fast
        self._not_compiled = None if compile else "it is switched off (compile: false)"
        self._takes_valid = "valid_N1HW" in inspect.signature(net.forward).parameters
        self._fast_net: FastPeakNet | None = None
        self._made_from: list[int] = []
        self._not_fast: str | None = "the run has not started"
        self._failure: str | None = None
        self._shapes_seen: set[tuple[int, ...]] = set()
        self._device = torch.device("cpu")
        # Functions, not modules: a module held twice would be saved twice.
        self._prepare: Callable[[Tensor, Tensor], Prepared] = preprocess.transform
        self.network: Callable[..., Tensor] = net.forward
        self.stride: Literal[1, 4] = 1
        self.mode: Literal["fast", "compiled", "eager"] = "eager"

    def why(self) -> str:
        """Return why the network does not run in a faster way."""
        if self.mode == "fast":
            return "it is the fastest"
        not_compiled = f"; not compiled: {self._not_compiled}" if self._not_compiled else ""
        return f"not fast: {self._not_fast}{not_compiled}"

    @property
    def fast_net(self) -> FastPeakNet | None:
        """The fast PeakNet while it is what runs."""
        return self._fast_net if self.mode == "fast" else None

    def prepare(self, device: torch.device, precision: str) -> None:
        """Make the fast PeakNet from the parameters as they are now, if it will run on a device.

        Call it while they are float32: they are multiplied together before they are rounded.
        """
        if self._obstacle(device, precision) is not None:
            return
        assert isinstance(self._net, PeakNet)
        versions = _versions(self._net)
        if self._fast_net is None or versions != self._made_from:
            self._fast_net, self._made_from = FastPeakNet(_in_float32(self._net)), versions

    def start(self, device: torch.device, precision: str) -> None:
        """Choose how to predict on a device, and log it.

        Parameters
        ----------
        device
            Where the network is.
        precision
            The Trainer's, such as ``bf16-mixed``.
        """
        self._device = device
        self._shapes_seen.clear()
        self._not_fast = self._obstacle(device, precision)
        if self._not_fast is None:
            try:
                support.load_kernels()
            except Exception as error:
                self._give_up_fast(error)
            else:
                # Made again, because a checkpoint may have changed the parameters since.
                self.prepare(device, precision)
                assert self._fast_net is not None
                self._fast_net.to(device).eval()
                log.info("the fast PeakNet runs, in bfloat16 on %s", support.device_name(device))
        elif isinstance(self._net, PeakNet):
            log.info("the plain PeakNet runs: %s", self._not_fast)
        self._choose()

    def start_training(self) -> None:
        """Choose how to train: the network as it is, compiled or not, at full resolution."""
        self._not_fast = "the fast PeakNet cannot be trained"
        self._shapes_seen.clear()
        self._choose(coarse=False)

    def has_seen(self, shape_BPHW: tuple[int, ...]) -> bool:
        """Whether batches of a shape have already run in the present mode."""
        return shape_BPHW in self._shapes_seen

    def __call__(self, counts_BPHW: Tensor, bad_bits_BK: Tensor | None = None) -> NetworkOutput:
        """Run a batch of raw counts on the device, see `Preprocess.forward`."""
        shape_BPHW = tuple(counts_BPHW.shape)
        while True:
            try:
                output = self._run(counts_BPHW, bad_bits_BK)
            except TorchDynamoException as error:
                self._give_up_compiling(error)
            except torch.OutOfMemoryError:
                raise  # not the kernels' fault
            except Exception as error:
                # Kernels are compiled for a shape when it first comes; later, something else has
                # gone wrong.
                if self.mode != "fast" or shape_BPHW in self._shapes_seen:
                    raise
                self._give_up_fast(error)
            else:
                if shape_BPHW not in self._shapes_seen:
                    output.check(type(self._net).__name__)
                    self._shapes_seen.add(shape_BPHW)
                return output.readable()
            self._choose()

    def _run(self, counts_BPHW: Tensor, bad_bits_BK: Tensor | None) -> NetworkOutput:
        with stage("preprocess"):
            # Outside the compiled part, which would be compiled again for every dtype of raw
            # counts.
            images_BPHW, valid_BPHW = self._preprocess.widen(counts_BPHW, bad_bits_BK)
            prepared = self._prepare(images_BPHW, valid_BPHW)
        with stage("network"):
            if self.mode == "fast":
                # Its dtypes are chosen one by one; autocast would change some of them.
                with torch.autocast(images_BPHW.device.type, enabled=False):
                    logits_NCHW = self.network(prepared.images_N1HW.to(torch.bfloat16))
                return NetworkOutput(logits_NCHW, self.stride, prepared)
            images_N1HW = prepared.images_N1HW.to(self._input_dtype())
            valid = {"valid_N1HW": prepared.valid_N1HW} if self._takes_valid else {}
            return NetworkOutput(self.network(images_N1HW, **valid), self.stride, prepared)

    def _choose(self, coarse: bool = True) -> None:
        """Set the functions that run: the fastest wanted ones that have not failed."""
        is_fast = self._not_fast is None
        net = self._fast_net if is_fast and self._fast_net is not None else self._net
        compile = self._not_compiled is None
        self.mode = "fast" if is_fast else "compiled" if compile else "eager"
        # The peak finder interpolates by 4, the stride of ConvNeXt's stem, and by nothing else.
        if coarse and self._device.type == "cuda" and getattr(net, "coarse_stride", None) == 4:
            self.stride, self.network = 4, cast(Callable[..., Tensor], net.coarse_logits)
        else:
            self.stride, self.network = 1, net.forward
        self._prepare = self._preprocess.transform
        if compile:
            self._prepare = torch.compile(self._prepare, dynamic=False)
        if self.mode == "compiled":
            self.network = torch.compile(self.network, dynamic=False)

    def _obstacle(self, device: torch.device, precision: str) -> str | None:
        """Return why the fast PeakNet cannot run; None if nothing is known against it."""
        if not self._wants_fast:
            return "the fast one is switched off (fast: false)"
        reason = support.obstacle(self._net, device, precision)
        if reason is None and self._failure is not None:
            return f"the fast one failed before ({self._failure})"
        return reason

    def _give_up_fast(self, error: Exception) -> None:
        """Use the plain network from now on, because the kernels do not run."""
        self._failure = f"{type(error).__name__}: {_first_line(error)}"
        self._not_fast = f"the fast one failed before ({self._failure})"
        self._fast_net = None
        # The plain network has seen none of them.
        self._shapes_seen.clear()
        log.warning(
            "the fast PeakNet does not run, and the plain one takes its place, which is slower: "
            "%s; %s",
            self._failure,
            support.remedy(error),
        )

    def _give_up_compiling(self, error: Exception) -> None:
        """Go on without compilation where it fails: slower, with the same peaks."""
        if self._not_compiled is not None:
            raise error
        self._not_compiled = f"{type(error).__name__}: {_first_line(error)}"
        log.warning(
            "the network does not compile and runs eagerly, which is slower: %s",
            self._not_compiled,
        )

    def _input_dtype(self) -> torch.dtype:
        """Return the dtype of the network's own parameters (bf16-true, say), or float32."""
        return next(
            (p.dtype for p in self._net.parameters() if p.dtype.is_floating_point), torch.float32
        )


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Name a stage in profilers' timelines (an NVTX range where there is a GPU)."""
    if not torch.cuda.is_available():
        yield
        return
    with torch.cuda.nvtx.range(name):
        yield


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason given"


def _versions(net: nn.Module) -> list[int]:
    """Return what changes when parameters do: by loading or training, not by moving or rounding."""
    return [0 if p.is_inference() else p._version for p in net.parameters()]


def _in_float32(net: PeakNet) -> PeakNet:
    if all(p.dtype == torch.float32 for p in net.parameters()):
        return net
    return copy.deepcopy(net).float()
