"""CXI files: what is in one, which event goes into which, and peak intensities."""
