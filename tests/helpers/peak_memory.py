"""Scores ResNet-50 at 224 px on 64 random images and prints the process's peak memory in bytes. Holds no tests.

Usage: python peak_memory.py METHOD [OPTION=VALUE ...]
"""

from __future__ import annotations

import resource
import sys

import torch
import yaml

from prune_lab import models
from prune_lab.compose.overrides import compose_checked
from tests.helpers.method_runs import CONF, make
from tests.helpers.score_phases import Images, phase


def main(name: str, *options: str) -> None:
    (config,) = compose_checked(CONF, ["model=resnet50"], sweep=False)
    torch.manual_seed(0)
    model = models.build(config.model, num_classes=1000, image_size=224)
    data = Images(torch.randn(64, 3, 224, 224), torch.arange(64), 64)
    changes = {key: yaml.safe_load(value) for key, _, value in (option.partition("=") for option in options)}
    method = make(name, **({"samples_per_class": 1, "scoring_batch": 64} | changes))
    scores = method.scores(phase(model, method, data))
    assert all(bool(torch.isfinite(score).all()) and bool(score.any()) for score in scores.values())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
