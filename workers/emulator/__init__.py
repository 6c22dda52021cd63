"""An emulated vLLM: its HTTP face over the simulator's engine, at wall-clock or scaled time."""
