"""`prune-lab dashboard` and `prune-lab wandb-sync`: finished runs in W&B."""
