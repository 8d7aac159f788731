"""What the tests stand on: stores that fail on demand, and real servers. Owns no state."""
