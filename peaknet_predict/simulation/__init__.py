"""Simulated shots with labels, made on the device that trains."""
