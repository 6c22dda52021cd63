"""Real vLLM servers on the clock of an accelerator that is not there."""
