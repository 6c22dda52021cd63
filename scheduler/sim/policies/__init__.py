"""The lab's policies as settings: what runs, and what it may know; the formulas are in `baselines`."""
