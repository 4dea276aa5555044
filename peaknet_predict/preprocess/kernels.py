"""Whether the preprocessing runs in Triton kernels, which pass over the pixels less often."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def triton_steps(images: Tensor) -> ModuleType | None:
    """Return `triton_steps` where images lie on a GPU that it runs on; None otherwise.

    None too while torch compiles the preprocessing: then it makes kernels of its own.
    """
    if not images.is_cuda or torch.compiler.is_compiling():
        return None
    return _load()


@functools.cache
def _load() -> ModuleType | None:
    # Imported where it is used: Triton may not be installed.
    try:
        from peaknet_predict.preprocess import triton_steps
    except ImportError as error:
        log.info("the preprocessing runs without kernels of its own, which is slower: %s", error)
        return None
    return triton_steps
