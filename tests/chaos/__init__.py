"""The ledger under fire: what clients were told, held against the books after crashes, pauses and hang-ups.

`run.py` is the program (`make chaos`). It sets up a `world` (a database, a provider and proxies, each a process of its
own), lets `clients` loose on it, strikes at it with `faults`, and when all is quiet collects the `evidence`, most of
which was written to `journal` files outside of the database, for the `judge`.
"""
