"""The ledger under fire: what clients were told, held against the books after crashes, pauses and hang-ups.

`run.py` is the program (`make chaos`). It sets up a `world` (a database, providers, and proxies behind nginx, all
processes of their own), lets `clients` loose on it (some make their `calls` by an `sdk`, and an `admin` is among them),
strikes at it with `faults`, and when all is quiet collects the `evidence`, most of which was written to `journal` files
outside of the database, for the `judge`.
"""
