"""Events from HDF5 files."""

from peaknet_predict.sources.hdf5.energy import CXI_ENERGY, LCLS_ENERGY
from peaknet_predict.sources.hdf5.source import Hdf5Source

__all__ = ["CXI_ENERGY", "LCLS_ENERGY", "Hdf5Source"]
