"""Arithmetic of a long ImageNet run on 1, 8 and 64 GPUs, line by line. Nothing here is measured.

Counts come from the program's own accounting; every rate is an option whose default names its reason.

    python scripts/projection.py
    python scripts/projection.py --gpus 8 --utilisation 0.35 --decode-rate 900
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from math import ceil

from prune_lab.accounting.costs import count_parameters, dense_macs, profile
from prune_lab.compose.choices import conf_dir
from prune_lab.compose.overrides import compose_checked
from prune_lab.datasets import describe
from prune_lab.datasets.stream import PIECE
from prune_lab.training import saving
from prune_lab.training.phases import build_model


@dataclass(frozen=True)
class Network:
    """What is counted, not assumed."""

    name: str
    macs: int
    """per image, forward"""
    parameters: int
    norms: int
    """batch-norm layers"""
    norm_channels: int
    """of all of them"""


@dataclass(frozen=True)
class Plan:
    """Sizes of the run."""

    images: int = 1_281_167
    eval_images: int = 50_000
    epochs: int = 100
    batch_per_gpu: int = 256
    largest_batch: int = 4096


@dataclass(frozen=True)
class Rates:
    """Assumptions; the text behind each is printed with it."""

    peak_tflops: float = 989.0
    utilisation: float = 0.07
    gpus_per_node: int = 8
    nvlink_gb_s: float = 350.0
    network_gb_s: float = 40.0
    message_us: float = 30.0
    norm_wait_us: float = 50.0
    overlap: float = 0.7
    decode_rate: float = 350.0
    cached_rate: float = 2000.0
    file_kb: float = 110.0
    cores_per_node: int = 96
    disk_gb_s: float = 6.0
    host_gb_s: float = 20.0
    write_s_gb: float = 1.5
    start_s: float = 120.0


REASONS = {
    "peak_tflops": "dense bf16 peak of an H100 SXM by its data sheet",
    "utilisation": "part of the peak that a step reaches: ResNet-50 waits for memory; 0.07 means 2,800 images/s",
    "gpus_per_node": "usual size of a node",
    "nvlink_gb_s": "GB/s of an all-reduce inside a node; NVLink 4 has 450 each way",
    "network_gb_s": "GB/s of an all-reduce between nodes per GPU; 400 Gb/s InfiniBand has 50",
    "message_us": "latency of a small collective, inside a node",
    "norm_wait_us": "torch.nn.SyncBatchNorm's forward makes the process wait for the GPU, which then has to wait "
    "for new work; per layer, a few launches",
    "overlap": "share of the gradient exchange hidden behind the backward pass",
    "decode_rate": "JPEGs/s that a core decodes and crops; scripts/benchmarks/stream.py measures it",
    "cached_rate": "images/s that a core cuts from dataset.cached_side=256; measured by the same script",
    "file_kb": "mean size of an ImageNet file",
    "cores_per_node": "cores that may decode",
    "disk_gb_s": "GB/s of a node's disk, for images and checkpoints; one NVMe drive",
    "host_gb_s": "GB/s from a GPU into pinned host memory; PCIe 5 has 64 each way",
    "write_s_gb": "seconds of computing that a GB of checkpoint costs the writing thread; 205 MB took 0.30 s",
    "start_s": "imports, listing 1.28 million files, first compilation, warm-up of the kernels",
}


@dataclass(frozen=True)
class Line:
    """One step of the arithmetic."""

    what: str
    value: float
    unit: str
    formula: str

    def __str__(self) -> str:
        return f"  {self.what:<31} {shown(self.value):>9} {self.unit:<6} = {self.formula}"


def shown(value: float) -> str:
    """Return a number with four digits, or all of them before the point."""
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.4g}"


def count(name: str) -> tuple[Network, Plan]:
    """Return the network and the sizes of ImageNet as the program's own options give them."""
    (config,) = compose_checked(conf_dir(), ["dataset=imagenet", f"model={name}", "method=dense"], sweep=False)
    info = describe(config.dataset)
    model = build_model(config.model, num_classes=info.num_classes, image_size=info.image_size, seed=0)
    norms = [module for module in model.modules() if "BatchNorm" in type(module).__name__]
    network = Network(name, dense_macs(profile(model, info.image_size)), count_parameters(model), len(norms),
                      sum(module.num_features for module in norms))  # fmt: skip
    return network, Plan(images=info.num_train, eval_images=info.num_eval)


def steps(network: Network, plan: Plan, rates: Rates, gpus: int) -> dict[str, Line]:
    """Return the lines about one step and its number."""
    batch = min(plan.batch_per_gpu * gpus, plan.largest_batch)
    local = batch // gpus
    per_epoch = plan.images // batch
    flops = 2 * 3 * network.macs * batch
    compute = flops / (gpus * rates.peak_tflops * 1e12 * rates.utilisation)
    gradient = 4 * network.parameters
    nodes = ceil(gpus / rates.gpus_per_node)
    bandwidth, wire = (rates.nvlink_gb_s, "NVLink") if nodes == 1 else (rates.network_gb_s, "network")
    reduce = 2 * (gpus - 1) / gpus * gradient / (bandwidth * 1e9)
    norm_messages = 2 * network.norms if gpus > 1 else 0
    norm = norm_messages * rates.message_us * 1e-6
    host = norm_messages // 2 * rates.norm_wait_us * 1e-6
    step = compute + (1 - rates.overlap) * reduce + norm + host
    lines = [
        Line("batch", batch, "images", f"min({plan.batch_per_gpu} x {gpus}, {plan.largest_batch}); {local} per GPU"),
        Line("steps per epoch", per_epoch, "", f"{plan.images:,} // {batch}, the last partial batch is dropped"),
        Line("steps", per_epoch * plan.epochs, "", f"{per_epoch} x {plan.epochs} epochs"),
        Line("FLOPs per step", flops / 1e12, "TFLOP",
             f"2 per MAC x (1 forward + 2 backward) x {network.macs:,} x {batch}"),
        Line("computing per step", 1e3 * compute, "ms",
             f"{flops / 1e12:.4g} T / ({gpus} x {rates.peak_tflops:g} T/s x {rates.utilisation:g})"),
        Line("gradients", gradient / 1e6, "MB", f"{network.parameters:,} parameters x 4 bytes (fp32)"),
        Line("all-reduce of gradients", 1e3 * reduce, "ms",
             f"2 x {gpus - 1}/{gpus} x {gradient / 1e6:.4g} MB / {bandwidth:g} GB/s ({wire})"),
        Line("messages of joined batch norm", norm_messages, "",
             f"2 (forward, backward) x {network.norms} layers, {8 * network.norm_channels / 1e6:.2g} MB each way"
             if gpus > 1 else "none on one GPU"),
        Line("waiting for them", 1e3 * norm, "ms", f"{norm_messages} x {rates.message_us:g} us, not hidden"),
        Line("host waits of joined batch norm", 1e3 * host, "ms",
             f"{norm_messages // 2} layers x {rates.norm_wait_us:g} us, in the forward pass"),
        Line("time per step", 1e3 * step, "ms",
             f"{1e3 * compute:.4g} + (1 - {rates.overlap:g}) x {1e3 * reduce:.4g} + {1e3 * norm:.4g} + "
             f"{1e3 * host:.4g}"),
        Line("images/s", batch / step, "", f"{batch} / {1e3 * step:.4g} ms"),
    ]  # fmt: skip
    return {line.what: line for line in lines}


def data(done: dict[str, Line], plan: Plan, rates: Rates, gpus: int) -> dict[str, Line]:
    """Return the lines about reading images, per node; what is possible there bounds evaluation too."""
    nodes = ceil(gpus / rates.gpus_per_node)
    needed = done["images/s"].value / nodes
    cores = rates.cores_per_node * min(gpus, rates.gpus_per_node) / rates.gpus_per_node
    copies_kb = 256 * 342 * 3 / 1e3
    lines = [
        Line("images/s needed per node", needed, "", f"{shown(done['images/s'].value)} / {nodes} nodes"),
        Line("resized copies", plan.images * copies_kb / 1e6, "GB", f"{plan.images:,} x 256 x 342 x 3 bytes"),
    ]  # fmt: skip
    for name, rate, size in (("JPEG files", rates.decode_rate, rates.file_kb),
                             ("cached_side=256", rates.cached_rate, copies_kb)):  # fmt: skip
        by_cores, by_disk = cores * rate, rates.disk_gb_s * 1e6 / size
        possible = min(by_cores, by_disk)
        limit = "disk" if by_disk < by_cores else "cores"
        lines += [
            Line(f"cores for {name}", needed / rate, "cores",
                 f"{shown(needed)} / {rate:g} per core; {cores:g} are there"),
            Line(f"reading of {name}", needed * size / 1e6, "GB/s",
                 f"{shown(needed)} x {size:.4g} kB; {rates.disk_gb_s:g} are there, more from memory"),
            Line(f"possible with {name}", possible, "",
                 f"images/s, min({cores:g} x {rate:g}, {rates.disk_gb_s:g} GB/s / {size:.4g} kB); limited by "
                 f"{limit}, {needed / possible:.0%} needed"),
            Line(f"slowdown with {name}", max(1.0, needed / possible), "x",
                 f"max(1, {shown(needed)} / {shown(possible)})"),
        ]  # fmt: skip
    return {line.what: line for line in lines}


def num_saves(cost_s: float, training_s: float) -> int:
    """Return how many checkpoints of equal cost the program takes with `checkpoint_interval_s=auto`."""
    costs, last = [], 0.0
    while (last := saving.next_save_s(costs, last)) <= training_s:
        costs.append(cost_s)
    return len(costs)


def checkpoints(training: float, network: Network, rates: Rates) -> dict[str, Line]:
    """Return the lines about checkpoints in `training` seconds."""
    state = 2 * 4 * network.parameters
    copy, write = state / (rates.host_gb_s * 1e9), state / 1e9 * rates.write_s_gb
    cost = copy + write
    count = num_saves(cost, training)
    lines = [
        Line("checkpoint", state / 1e6, "MB", f"2 (weights, momentum) x 4 bytes x {network.parameters:,}"),
        Line("copy of a checkpoint", 1e3 * copy, "ms",
             f"{state / 1e6:.4g} MB / {rates.host_gb_s:g} GB/s to the host, training waits"),
        Line("writing of a checkpoint", 1e3 * write, "ms",
             f"{state / 1e6:.4g} MB x {rates.write_s_gb:g} s/GB of computing, beside training but booked as cost"),
        Line("checkpoints", count, "",
             f"none at epochs' ends; when all of {1e3 * cost:.4g} ms are {saving.SHARE:.0%} of the time, "
             f"{saving.LEAST_S:g} s apart at least"),
        Line("time between checkpoints", training / max(1, count), "s", f"{shown(training)} s / {max(1, count)}"),
        Line("cost of checkpoints", count * cost / 3600, "h", f"{count} x {1e3 * cost:.4g} ms, at most"),
    ]  # fmt: skip
    return {line.what: line for line in lines}


def totals(
    done: dict[str, Line], read: dict[str, Line], network: Network, plan: Plan, rates: Rates, gpus: int
) -> dict[str, Line]:
    """Return the lines about the whole run."""
    step, num_steps, batch = done["time per step"].value / 1e3, done["steps"].value, done["batch"].value
    training, start = step * num_steps, rates.start_s
    nodes, images = ceil(gpus / rates.gpus_per_node), plan.epochs * plan.eval_images
    forward = gpus / nodes * rates.peak_tflops * 1e12 * rates.utilisation / (2 * network.macs)
    first = min(PIECE, ceil(batch / gpus)), min(PIECE, ceil(plan.eval_images / gpus))
    lines = [
        Line("training", training / 3600, "h", f"{num_steps:,.0f} x {1e3 * step:.4g} ms"),
        Line("evaluation by GPUs", forward, "",
             f"images/s per node, {gpus / nodes:g} x {rates.peak_tflops:g} T/s x {rates.utilisation:g} / "
             f"(2 x {network.macs:,} FLOPs)"),
    ]  # fmt: skip
    saves = checkpoints(training, network, rates)
    lines += [*saves.values(), Line("start", start / 3600, "h", f"{start:g} s, once")]
    for name, rate in (("JPEG files", rates.decode_rate), ("cached_side=256", rates.cached_rate)):
        factor, possible = read[f"slowdown with {name}"].value, read[f"possible with {name}"].value
        evaluation, wait = images / (nodes * min(forward, possible)), plan.epochs * sum(first) / rate
        rest = evaluation + wait + start + 3600 * saves["cost of checkpoints"].value
        lines += [
            Line(f"evaluation, {name}", evaluation / 3600, "h",
                 f"{plan.epochs} x {plan.eval_images:,} / ({nodes} x min({shown(forward)}, {shown(possible)}))"),
            Line(f"first batches, {name}", wait / 3600, "h",
                 f"{plan.epochs} x ({first[0]} + {first[1]} images in a worker's first pieces of a batch) / {rate:g}"),
            Line(f"total with {name}", (training * factor + rest) / 3600, "h",
                 f"{training / 3600:.4g} h x {factor:.4g} + {rest / 3600:.3g} h of evaluation, first batches, "
                 "checkpoints and start"),
        ]  # fmt: skip
    return {line.what: line for line in lines}


def optimistic(plan: Plan, rates: Rates, gpus: int) -> list[str]:
    """Return what is taken too lightly for so many GPUs, in a line each."""
    local, nodes, found = plan.largest_batch // gpus, ceil(gpus / rates.gpus_per_node), []
    if local < plan.batch_per_gpu:
        found.append(f"{local} images per GPU are taken to compute as fast as {plan.batch_per_gpu}; they are slower")
    if nodes > 1:
        found.append(f"a message over {nodes} nodes is taken to need no longer than one inside a node; it needs more")
    return [f"  optimistic: {words}" for words in found]


def project(network: Network, plan: Plan, rates: Rates, gpus: int) -> dict[str, Line]:
    """Return every line for `gpus` GPUs, by what it is about."""
    done = steps(network, plan, rates, gpus)
    read = data(done, plan, rates, gpus)
    return done | read | totals(done, read, network, plan, rates, gpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="a model of prune-lab (default: resnet50)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], help="default: 1 8 64")
    parser.add_argument("--epochs", type=int, default=Plan.epochs, help="default: 100")
    for field in fields(Rates):
        kind = type(field.default)
        words = f"{REASONS[field.name]} (default: {field.default:g})"
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=words)
    options = vars(parser.parse_args())
    network, sizes = count(options["model"])
    plan = Plan(images=sizes.images, eval_images=sizes.eval_images, epochs=options["epochs"])
    rates = Rates(**{field.name: options[field.name] for field in fields(Rates)})
    print(f"PROJECTION, NOT MEASURED: {plan.epochs} epochs of {network.name} on ImageNet\n\ncounted")
    print(f"  {network.macs:,} MACs per image, {network.parameters:,} parameters, {network.norms} batch norms")
    print("\nassumed")
    for field in fields(Rates):
        print(f"  --{field.name.replace('_', '-'):<20} {getattr(rates, field.name):>8g}  {REASONS[field.name]}")
    for gpus in options["gpus"]:
        print(f"\n{gpus} GPU{'s' * (gpus > 1)} (projection, not measured)")
        print("\n".join(map(str, [*project(network, plan, rates, gpus).values(), *optimistic(plan, rates, gpus)])))


if __name__ == "__main__":
    main()
