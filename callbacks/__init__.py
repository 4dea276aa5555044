"""Lightning callbacks that the configurations name by class path."""
