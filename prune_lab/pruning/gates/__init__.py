"""Gates that are learned: their distributions, layout, budgets and multipliers."""
