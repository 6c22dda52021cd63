"""Redis as Headgate uses it: one connection file, and the moves of each party over it."""
