"""Counts, masks and cuts of networks of many families, looked at from outside: one line per network.

    python scripts/survey_networks.py                     # all that are listed below
    python scripts/survey_networks.py resnet18 timm:nf_resnet26

Each network is

- counted: its MACs against half of what torch's FlopCounterMode counts in convolutions and in products of matrices
  (mm, addmm). Batched products (bmm) and fused attention are left out there: two activations are no weight. Where our
  count is higher, the rest must lie within torch's bmm, which also holds products of a weight;
- masked (static, 0.9): the operands of all convolutions and matrix products are caught in a real forward pass, and each
  masked weight must be among them with all of its zeros;
- cut (l1_filter, 0.7 of the MACs) with the program's own check that the smaller network computes the same,

or refused in one line. The exit code is 1 if a count or a mask is wrong, or if anything ends in another exception.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from prune_lab import datasets, models
from prune_lab.accounting.costs import dense_macs, profile
from prune_lab.accounting.weight_use import meta_copy
from prune_lab.compose.choices import conf_dir
from prune_lab.compose.overrides import compose_checked
from prune_lab.config.run import RunConfig
from prune_lab.core.context import Context
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline.phase_plan import plan_costs
from prune_lab.training.device_config import resolve_device_config

SIZE = 64
"""px, for networks that take any size"""
TORCHVISION = (
    "alexnet vgg11_bn resnet18 resnext50_32x4d densenet121 squeezenet1_1 googlenet inception_v3@96 mobilenet_v2 "
    "mobilenet_v3_small mnasnet0_5 shufflenet_v2_x0_5 efficientnet_b0 efficientnet_v2_s regnet_y_400mf regnet_x_400mf "
    "convnext_tiny swin_t swin_v2_t vit_b_32@224 maxvit_t@224"
)
TIMM = (
    "resnet26d resnetblur50 ecaresnet26t ecaresnet50d_pruned legacy_seresnet18 skresnet18 res2net50_26w_4s resnest14d "
    "hrnet_w18_small dla34 dpn48b ese_vovnet19b_dw cspresnet50 cspdarknet53 selecsls42 repvgg_a0 rexnet_100 "
    "ghostnet_050 ghostnetv2_100 repghostnet_050 mobilenetv4_conv_small tf_efficientnet_b0 tf_efficientnet_cc_b0_4e "
    "efficientnet_lite0 mixnet_s fbnetc_100 hardcorenas_a lcnet_050 tinynet_e mobileone_s0 fastvit_t8@256 nf_resnet26 "
    "eca_nfnet_l0 nfnet_f0 resnetv2_50x1_bit convnext_atto convnextv2_atto edgenext_xx_small mobilevit_xxs "
    "mobilevitv2_050 poolformer_s12 resmlp_12_224@224 mixer_s32_224@224 gmlp_ti16_224@224 vit_tiny_patch16_224@224 "
    "cait_xxs24_224@224 crossvit_tiny_240@240 coat_lite_tiny@224 pit_ti_224@224 levit_128s@224 "
    "xcit_nano_12_p16_224@224 pvt_v2_b0 twins_svt_small@224 convit_tiny@224 halonet26t@256 lambda_resnet26t@256 "
    "botnet26t_256@256 efficientformer_l1@224 starnet_s1 inception_next_atto regnetx_002 regnetz_005 xception41 "
    "inception_v4@96 mambaout_femto hgnetv2_b0 gernet_s focalnet_tiny_srf sequencer2d_s@224 "
    "convmixer_768_32 repvit_m0_9"
)
"""NAME, or NAME@SIZE where the size is fixed or 64 px are too small"""
_PRODUCTS = (torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm)
_BATCHED = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)


@dataclass(frozen=True)
class Finding:
    """What one look at a network found."""

    text: str
    kind: str
    """right, refused, or wrong: a mismatch or an exception that is no UserError"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="[timm:]NAME[@SIZE]; none: all that are listed in the script")
    names = parser.parse_args(arguments).names
    names = names or [*TORCHVISION.split(), *(f"timm:{name}" for name in TIMM.split())]
    warnings.simplefilter("ignore")  # networks' own, such as of old options
    found = {name: survey(name) for name in names}
    kinds = [finding.kind for findings in found.values() for finding in findings]
    wrong = [name for name, findings in found.items() if any(finding.kind == "wrong" for finding in findings)]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("right", "refused", "wrong"))
    print(f"{len(names)} networks, {len(kinds)} looks: {counts}" + (f": {', '.join(wrong)}" if wrong else ""))
    return 1 if wrong else 0


def survey(name: str) -> list[Finding]:
    """Return and print what was found about a network, typed as [timm:]NAME[@SIZE]."""
    source, _, rest = name.rpartition(":")
    plain, _, size = rest.partition("@")
    network = (source or "torchvision", plain, int(size or SIZE))
    findings = []
    for what, look in (("MACs", counted), ("mask", masked), ("cut", cut)):
        findings.append(guarded(look, network))
        print(f"{name:32} {what:5} {findings[-1].kind:8} {findings[-1].text}", flush=True)
        gc.collect()  # networks hold references in circles
    return findings


def guarded(look: Callable[[str, str, int], Finding], network: tuple[str, str, int]) -> Finding:
    try:
        return look(*network)
    except UserError as error:
        return Finding(str(error), "refused" if "\n" not in str(error) else "wrong")
    except Exception as error:
        traceback.print_exc()
        return Finding(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", "wrong")


def options(source: str, name: str, size: int, *method: str) -> RunConfig:
    (config,) = compose_checked(conf_dir(), [
        "model=torchvision", f"model.source={source}", f"model.name={name}", "dataset=fake",
        f"dataset.image_size={size}", "dataset.num_train=16", "dataset.num_test=8", "schedule.batch_size=8",
        "trainer.device=cpu", *method,
    ], sweep=False)  # fmt: skip
    return config


def last_context(config: RunConfig) -> Context:
    """Return the run's last phase, set up without training."""
    info, device_config = datasets.describe(config.dataset), resolve_device_config(config.trainer)
    return plan_costs(config, config.model, info, device_config)[-1].context


def counted(source: str, name: str, size: int) -> Finding:
    config = options(source, name, size, "method=dense")
    info = datasets.describe(config.dataset)
    model = models.build_on_meta(config.model, num_classes=info.num_classes, image_size=size)
    ours = dense_macs(profile(model, size))
    products, batched = torch_macs(model, size)
    text = f"{ours}, torch {products}"
    if ours == products:
        return Finding(text, "right")
    return Finding(f"{text} and {batched} in bmm", "right" if products < ours <= products + batched else "wrong")


def torch_macs(model: nn.Module, size: int) -> tuple[int, int]:
    """Return torch's own count for one image, halved: products of one kernel or matrix, batched products."""
    # The counter fails on parameters that are handed from module to module, unless they need no gradient.
    ghost = meta_copy(model).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(torch.zeros(1, 3, size, size, device="meta"))
    flops = counter.get_flop_counts()["Global"]
    single, batched = (sum(flops.get(operator, 0) for operator in part) for part in (_PRODUCTS, _BATCHED))
    return single // 2, batched // 2


class _Operands(TorchDispatchMode):
    """Catches the operands of convolutions and matrix products: (size, zeros) and where they lie in memory."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self._sizes = sizes
        self.shares: set[tuple[int, int]] = set()
        self.places: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (*_PRODUCTS, *_BATCHED):
            for tensor in args:
                if isinstance(tensor, Tensor):
                    self.places.add(tensor.untyped_storage().data_ptr())
                    if tensor.numel() in self._sizes:
                        self.shares.add((tensor.numel(), int((tensor == 0).sum())))
        return func(*args, **(kwargs or {}))


def masked(source: str, name: str, size: int) -> Finding:
    context = last_context(options(source, name, size, "method=static", "method.sparsity=0.9"))
    masks, named = context.masks.masks, dict(context.model.named_parameters())
    operands = _Operands({mask.numel() for mask in masks.values()})
    with operands:  # with gradients: without them torch fuses attention into one operator that hides its products
        context.model.eval()(torch.randn(1, 3, size, size))
    lost = [path for path, mask in masks.items() if not reaches(named[path].detach(), mask, operands)]
    if lost:
        return Finding(f"zeros of {len(lost)} of {len(masks)} weights are in no product: {lost[0]}", "wrong")
    dense = sum("computed" in layer.reason for layer in context.layers)
    note = f", {dense} layers compute their weight and stay dense" if dense else ""
    return Finding(f"zeros of all {len(masks)} masked weights reach a product{note}", "right")


def reaches(weight: Tensor, mask: Tensor, operands: _Operands) -> bool:
    """Return whether the masked weight itself, or a copy with just as many zeros, was an operand."""
    zeros = int((weight == 0).sum())
    if zeros < int((~mask).sum()):
        return False
    return weight.untyped_storage().data_ptr() in operands.places or (weight.numel(), zeros) in operands.shares


def cut(source: str, name: str, size: int) -> Finding:
    config = options(source, name, size, "method=l1_filter", "method.macs_ratio=0.7")
    context = last_context(config)
    before = models.build_on_meta(config.model, num_classes=10, image_size=size)
    ratio = dense_macs(context.costs) / dense_macs(profile(before, size))
    return Finding(f"{ratio:.4f} of the MACs left, outputs checked", "right" if 0 < ratio <= 0.75 else "wrong")


if __name__ == "__main__":
    sys.exit(main())
