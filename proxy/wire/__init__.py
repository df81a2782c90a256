"""What crosses the wire: bytes to events and to the few fields we read. No I/O."""
