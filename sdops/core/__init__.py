"""The spine: specs, sources, dials, plans, the run and the sink. Knows tensors, not Stable Diffusion."""
