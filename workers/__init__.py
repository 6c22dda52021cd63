"""The sidecar shell beside each vLLM: pull, admit, talk to the engine, report."""
