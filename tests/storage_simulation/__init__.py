"""A deterministic simulation of queues, spools, quarantine and CXI files on faulty storage.

`disk` is the storage, `world` the programs and the scheduler, `check` what must hold at the end,
`mutations` faults that can be planted in the code, `run` seeds and their shrinking.
"""
