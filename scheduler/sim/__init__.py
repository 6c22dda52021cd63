"""Virtual time: the engine model, workloads and fleets that the lab and the emulated engine share."""
