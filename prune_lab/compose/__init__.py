"""From typed overrides through Hydra to one checked `RunConfig` per run."""
