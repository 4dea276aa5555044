"""Training of small networks: simulated shots with labels, made on the device as training goes."""
