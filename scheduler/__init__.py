"""The functional core: who runs next, where, and at what predicted cost. No I/O, no clock, no chance."""
