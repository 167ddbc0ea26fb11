"""Options that follow the length of the schedule, as numbers: before a run is named, matched or planned. Torch-free."""

from __future__ import annotations

from dataclasses import asdict, replace

from prune_lab.config.run import RunConfig
from prune_lab.datasets import DatasetInfo


def settled(config: RunConfig, info: DatasetInfo) -> RunConfig:
    """Return the options of a run with those settled that the method derives from the schedule."""
    steps, limit = info.num_train // config.schedule.batch_size, config.trainer.limit_train_batches
    method = config.method.for_schedule(config, steps if limit is None else min(steps, limit))
    before, after = asdict(config.method.config), asdict(method.config)
    changed = {key: value for key, value in after.items() if value != before[key]}
    if not changed:
        return config
    return replace(config, method=method, resolved=config.resolved | {"method": config.resolved["method"] | changed})
