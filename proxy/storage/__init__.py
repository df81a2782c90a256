"""Where things are kept: the engine and the tables. The ledger's hot path has statements of its own."""
