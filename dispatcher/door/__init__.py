"""The OpenAI-compatible front door: HTTP on one side, the pool's streams on the other, nothing kept in between."""
