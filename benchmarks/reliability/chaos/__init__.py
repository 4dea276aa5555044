"""Faults, seeded, on real processes; afterwards every event is looked for, in its bytes."""
