"""The dispatch shell: Redis, the live loop, leadership, the client and the command line."""
