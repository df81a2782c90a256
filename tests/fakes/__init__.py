"""Stand-ins for the world outside Tollgate: real servers on loopback sockets."""
