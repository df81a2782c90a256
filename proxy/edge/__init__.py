"""HTTP in: with `proxy.app` the only importers of the web framework."""
