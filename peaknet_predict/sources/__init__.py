"""Producers of events: a simulator with known peaks, and files of recorded data."""

from peaknet_predict.sources.base import EventSource, SkippedFile
from peaknet_predict.sources.hdf5 import Hdf5Source
from peaknet_predict.sources.images import ImageFileSource
from peaknet_predict.sources.npz import NpzSource
from peaknet_predict.sources.simulator import PlantedPeaks, Simulator

__all__ = [
    "EventSource",
    "Hdf5Source",
    "ImageFileSource",
    "NpzSource",
    "PlantedPeaks",
    "Simulator",
    "SkippedFile",
]
