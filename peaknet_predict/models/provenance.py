"""Where a network's parameters come from, and the operating point at which it predicts."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from peaknet_predict import __version__
from peaknet_predict.models.weights import load_weights, stored_threshold

log = logging.getLogger(__name__)


class Provenance:
    """Loads a network's weights, if that is wanted, and knows what its peaks depend on.

    A network that loads weights by itself says so with an attribute ``weights_sha256``, which is
    None while its parameters are random.

    Parameters
    ----------
    net
        The network.
    weights
        Weight file for it, see `load_weights`; None leaves the parameters as they are.
    threshold
        Log odds above which a pixel is peak; None for what the weight file asks for, else 0.
    allow_random
        Whether random parameters may predict.
    pixels
        What decides which pixels count, for the record: names and values that JSON can hold.

    Attributes
    ----------
    threshold
        The operating point that counts.
    weights_sha256
        SHA-256 of the weight file; None if the parameters are random, or nothing is known of them.

    Raises
    ------
    ValueError
        If the weights do not fit the network, or the threshold is not finite.
    FileNotFoundError
        If there is no such weight file.
    """

    def __init__(
        self,
        net: nn.Module,
        weights: str | None,
        threshold: float | None,
        allow_random: bool,
        pixels: Mapping[str, Any],
    ) -> None:
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"threshold is {threshold}; give a finite number, 0 by default")
        self._network = type(net).__name__
        self._settings = settings_of(net)
        self._pixels = dict(pixels)
        self._allow_random = allow_random
        self.weights_sha256: str | None = getattr(net, "weights_sha256", None)
        says_so = hasattr(net, "weights_sha256")
        has_parameters = next(net.parameters(), None) is not None
        if weights is not None:
            self.weights_sha256 = load_weights(net, weights)
            threshold = stored_threshold(weights) if threshold is None else threshold
        self.threshold = threshold or 0.0
        self.is_random = says_so and self.weights_sha256 is None
        self._is_unknown = has_parameters and not says_so and weights is None

    def check(self) -> None:
        """Raise a ValueError if the network would predict with random parameters unasked."""
        if self.is_random and not self._allow_random:
            raise ValueError(
                f"{self._network} has no weights: its parameters are random, and its peaks would "
                "be, too. Give a weight file as model.init_args.net.init_args.weights or "
                "model.init_args.weights (-c models/peaknet_small has one); to try "
                "something out with random parameters, set model.init_args.random_weights: true"
            )

    def show(self) -> None:
        """Log the operating point; warn of parameters whose origin is unknown."""
        if self.is_random:
            log.warning(
                "%s has random parameters, as asked for, and so are the peaks", self._network
            )
        if self._is_unknown:
            log.warning(
                "%s does not say where its parameters are from (no attribute weights_sha256): if "
                "it loads no weight file by itself, set model.init_args.weights",
                self._network,
            )
        log.info("operating point: a pixel is peak above log odds of %g", self.threshold)

    def record(self) -> dict[str, Any]:
        """Return what the peaks depend on, for the record of a run, and for that of each result."""
        return {
            "version": __version__,
            "class": self._network,
            "settings": self._settings,
            "weights_sha256": self.weights_sha256,
            "threshold": self.threshold,
            **self._pixels,
        }


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Return a module's public attributes that are numbers or texts: most often its arguments."""
    return {
        name: value
        for name, value in vars(module).items()
        if type(value) in (bool, int, float, str)
        and not name.startswith("_")
        and name not in ("training", "weights_sha256")
    }
