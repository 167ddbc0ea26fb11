"""prune-lab export: files that other runtimes open, what is refused, and times that are really measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import prune_lab
from prune_lab.commands.export import catalog, command, files, formats, sparse, table, work
from prune_lab.commands.export.latency import MIN_ROUNDS, interleaved, ratio, spread
from prune_lab.foundations.errors import UserError
from tests.helpers.runs import TINY, execute, run_dir

NO_TIMES = ("--no-latency", "--threads", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with nine in ten weights zero, which tests only read."""
    folder = tmp_path_factory.mktemp("pruned")
    assert execute(folder, "method=magnitude", *TINY) == 0
    return run_dir(folder)


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    assert execute(folder, "method=dense", *TINY) == 0
    return run_dir(folder)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an export in all formats that are installed."""
    out = tmp_path_factory.mktemp("exported")
    export(run, out, *NO_TIMES)
    return out


def record_of(out: Path) -> dict:
    return json.loads((out / "export.json").read_text())


@pytest.fixture
def flushed():
    """Undo the arithmetic setting of an export."""
    yield
    torch.set_flush_denormal(False)


pytestmark = pytest.mark.usefixtures("flushed")


def export(run: Path, out: Path, *arguments: str) -> dict:
    """Export in this process and return what export.json says."""
    assert command.main([str(run), "--out", str(out), *arguments]) == 0
    return record_of(out)


def zeros_of(weights) -> int:
    return sum(int((weight == 0).sum()) for weight in weights if weight.ndim in (2, 4))


def expected(run: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return prune_lab.load(run)(images)


@pytest.fixture
def images() -> torch.Tensor:
    """A batch size that no check uses."""
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_safetensors_and_json_open_as_a_network(run: Path, tmp_path: Path, images: torch.Tensor) -> None:
    record = export(run, tmp_path, "--format", "safetensors", *NO_TIMES)
    assert torch.equal(prune_lab.load(tmp_path)(images), expected(run, images))
    assert record["formats"]["safetensors"]["checks"][0]["max_difference"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "model.json", "model.safetensors"]
    assert record["latency"] is None


def test_the_torch_program_takes_any_batch_size(run: Path, exported: Path, images: torch.Tensor) -> None:
    program = torch.export.load(exported / "model.pt2").module()
    for batch in (images, images[:1]):
        torch.testing.assert_close(program(batch), expected(run, batch))


def test_onnx_opens_in_onnxruntime_with_zeros_kept(run: Path, exported: Path, images: torch.Tensor) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    assert [(node.name, node.shape) for node in session.get_inputs()] == [("images", ["batch", 3, 16, 16])]
    assert [(node.name, node.shape) for node in session.get_outputs()] == [("logits", ["batch", 4])]
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(found, expected(run, images), atol=1e-4, rtol=1e-4)
    stored = onnx.load(exported / "model.onnx").graph.initializer
    kept = zeros_of(torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in stored)
    assert kept == zeros_of(load_file(run / "model.safetensors").values()) > 0
    sizes = record_of(exported)["formats"]["onnx"]["size"]
    assert sizes["pruned"]["bytes"] == (exported / "model.onnx").stat().st_size
    assert sizes["pruned"]["gzip_bytes"] < 0.7 * sizes["dense"]["gzip_bytes"]


def test_openvino_opens_with_both_precisions_checked(run: Path, exported: Path, images: torch.Tensor) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    core = formats.import_openvino().Core()
    network = core.compile_model(exported / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert network.input("images").partial_shape.to_string() == "[?,3,16,16]"
    found = torch.from_numpy(network(images.numpy())["logits"])
    torch.testing.assert_close(found, expected(run, images), atol=1e-4, rtol=1e-4)
    fp32, *bf16 = record_of(exported)["formats"]["openvino"]["checks"]
    assert (fp32["runtime"], fp32["tolerance"]) == ("OpenVINO fp32", 1e-4)
    if work.runtimes.openvino_has_bf16():
        assert 1e-4 < bf16[0]["relative"] <= 0.05 == bf16[0]["tolerance"]
    else:
        assert bf16 == []
        with pytest.raises(UserError, match="this CPU has no bf16 instructions"):
            export(run, exported, "--precision", "bf16", *NO_TIMES)


def test_each_precision_has_its_tolerance() -> None:
    far = work.agreement.Agreement(max_difference=1.0, relative=0.01, same_top1=9, images=10)
    for precision, option, is_within in (
        ("fp32", "--tolerance 0.0001", False),
        ("bf16", "--tolerance-bf16 0.05", True),
    ):
        check = files.Check(catalog.Runtime("X", "openvino", precision), far, float(option.split()[1]))
        assert check.is_within is is_within and f"above {option}; model.xml and model.bin removed" in work._refusal(
            check
        )


@pytest.mark.parametrize("is_asked", [False, True])
def test_bf16_that_nobody_asked_for_does_not_cost_the_file(
    run: Path, exported: Path, tmp_path: Path, monkeypatch, capsys, is_asked: bool
) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    if not work.runtimes.openvino_has_bf16():
        pytest.skip("this CPU has no bf16 instructions")
    monkeypatch.setattr(formats, "trace", lambda model, image_size: "written before")
    monkeypatch.setattr(files, "write", lambda name, network, folder: copy_files(name, exported, folder))
    arguments = [str(run), "--out", str(tmp_path), "--format", "openvino", "--tolerance-bf16", "1e-9", *NO_TIMES]
    if is_asked:
        with pytest.raises(UserError, match="OpenVINO bf16 differs .* above --tolerance-bf16 1e-09"):
            command.main([*arguments, "--precision", "fp32,bf16"])
    else:
        assert command.main(arguments) == 0
        assert "bf16 is too coarse for this network" in capsys.readouterr().out
    assert (tmp_path / "model.xml").exists() is not is_asked


def test_a_file_that_computes_something_else_is_removed(run: Path, tmp_path: Path, monkeypatch) -> None:
    """Also one of an earlier export; the other formats are kept, and export.json says which."""
    export(run, tmp_path, "--format", "safetensors", *NO_TIMES)

    def spoil(model, description, folder):
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        tensors["linear.bias"][0] += 0.1
        (folder / "model.json").write_text(json.dumps(description))
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(formats, "save_model", spoil)
    with pytest.raises(UserError, match=r"differs from the run's network by .* above --tolerance 0.0001") as error:
        command.main([str(run), "--out", str(tmp_path), "--format", "safetensors,torch_export", *NO_TIMES])
    assert "\n" not in str(error.value)
    record = record_of(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "model.pt2"]
    assert list(record["formats"]) == ["torch_export"] and len(record["refused"]) == 1


def test_outputs_that_are_not_numbers_are_refused(run: Path, tmp_path: Path) -> None:
    broken = copy_of(run, tmp_path / "run")
    tensors = load_file(broken / "model.safetensors")
    tensors["linear.bias"][0] = torch.nan
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UserError, match="not finite or all zero"):
        export(broken, tmp_path / "out", "--format", "safetensors", *NO_TIMES)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_a_number_is_outside_every_tolerance() -> None:
    reference = work.agreement.Reference([torch.zeros(1, 2)], [torch.ones(1, 2)])
    found = work.agreement.compare(reference, lambda images: torch.tensor([[1.0, torch.nan]]))
    assert not found.within(1e9)
    assert work.agreement.compare(reference, lambda images: torch.tensor([[1.0, 0.75]])).relative == 0.25


def test_tensors_in_half_precision_are_computed_in_fp32(run: Path, tmp_path: Path, images: torch.Tensor) -> None:
    half = copy_of(run, tmp_path / "run")
    tensors = load_file(half / "model.safetensors")
    halved = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(halved, half / "model.safetensors")
    export(half, tmp_path / "out", "--format", "safetensors", *NO_TIMES)
    found = prune_lab.load(tmp_path / "out")(images)
    assert found.dtype == torch.float32 and torch.equal(found, expected(half, images))


def copy_files(name: str, source: Path, target: Path) -> None:
    for file in catalog.FORMATS[name].files:
        shutil.copy(source / file, target)


def copy_of(run: Path, target: Path) -> Path:
    return Path(shutil.copytree(run, target, ignore=shutil.ignore_patterns("phases")))


class Hashing(nn.Module):
    """Stands for a module that decides while it runs."""

    export_refusal = "hashed convolutions choose their channels per image; export has no form for that"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture
def with_module(monkeypatch):
    """Put a module in front of the run's network."""

    def install(module: nn.Module) -> None:
        load = work.load_model
        monkeypatch.setattr(work, "load_model", lambda folder: nn.Sequential(module, load(folder)).eval())

    return install


def test_a_module_can_refuse_to_become_a_graph(run: Path, tmp_path: Path, with_module) -> None:
    with_module(Hashing())
    with pytest.raises(UserError, match=r"choose their channels per image; .* \(0: Hashing\)$"):
        export(run, tmp_path / "out", "--format", "torch_export", *NO_TIMES)
    assert not (tmp_path / "out").exists()


def test_without_a_graph_the_tensors_are_still_written(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(formats, "refusal", lambda model: Hashing.export_refusal)
    record = export(run, tmp_path, *NO_TIMES)
    assert list(record["formats"]) == ["safetensors"]
    assert record["left_out"]["torch_export"] == Hashing.export_refusal
    assert f": {Hashing.export_refusal}\n" in capsys.readouterr().out


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 3, 16, 16)


@pytest.mark.parametrize(("module", "reason"), [(Branch(), "data-dependent"), (FixedBatch(), "batch")])
def test_what_cannot_be_traced_ends_in_one_line(module: nn.Module, reason: str) -> None:
    with pytest.raises(formats.NotExportable, match=f"torch.export cannot trace the network: .*{reason}") as error:
        formats.trace(module, 16)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_the_command_that_brings_it(run: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(catalog, "find_spec", lambda name: None if name in ("openvino", "onnx") else object())
    with pytest.raises(UserError, match="--format openvino needs openvino: pip install openvino"):
        command.main([str(run), "--format", "safetensors,openvino"])
    monkeypatch.setattr(formats, "refusal", lambda model: "no graph")
    record = export(run, tmp_path, *NO_TIMES)
    assert set(record["left_out"]) == {"torch_export", "onnx", "openvino"}
    assert record["left_out"]["openvino"] == "needs openvino: pip install openvino"
    assert "left out: onnx: needs onnx: pip install onnx onnxscript onnxruntime\n" in capsys.readouterr().out


WRONG = {
    ("--format", "onx"): "--format onx (did you mean 'onnx'?): allowed are safetensors",
    ("--format", "safetensors,safetensors"): "--format must be different values with commas",
    ("--format", ""): "got nothing",
    ("--format", "safetensors", "--precision", "bf16"): "--precision is of OpenVINO, which is not among the formats",
    ("--precision", "fp16"): "--precision fp16: allowed are fp32, bf16",
    ("--tolerance", "0"): "--tolerance must lie in (0, inf), got 0",
    ("--tolerance", "nan"): "--tolerance must be a finite number",
    ("--tolerance", "x"): "--tolerance: invalid float value",
    ("--batch", "1,0"): "--batch must lie in [1, inf), got 0",
    ("--batch", "1,big"): "--batch must be",
    ("--repeats", "7"): "--repeats must lie in [8, inf), got 7",
    ("--threads", "0"): "--threads must lie in [1, inf), got 0",
    ("--no-latency", "--batch", "1"): "--batch is of no effect with --no-latency",
    ("--no-latency", "--repeats", "9"): "--repeats is of no effect with --no-latency",
    ("--bach", "1"): "unrecognized arguments: --bach",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_option_is_named(run: Path, arguments: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        command.main([str(run), *arguments])
    assert WRONG[arguments] in str(error.value)
    assert not (run / "export").exists()


def test_only_finished_runs_are_exported_and_never_over_a_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        command.main([str(tmp_path)])
    unfinished = copy_of(run, tmp_path / "unfinished")
    (unfinished / "status.json").write_text('{"status": "interrupted", "error": null}')
    with pytest.raises(UserError, match="is not finished"):
        command.main([str(unfinished)])
    with pytest.raises(UserError, match="is a run directory, whose files stay as they are"):
        command.main([str(run), "--out", str(run)])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, no folder"):
        command.main([str(run), "--out", str(tmp_path / "file")])


def test_options_and_help_need_no_torch() -> None:
    code = (
        "import contextlib, sys\nfrom prune_lab.commands.export import command\n"
        "with contextlib.suppress(SystemExit): command.main(['--help'])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "usage: prune-lab export" in done.stdout and done.stdout.endswith("False\n"), done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 115


def test_dense_and_pruned_are_timed_side_by_side(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(work.timing, "interleaved", partial(interleaved, sample_s=0))
    monkeypatch.setattr(sparse, "faster_layers", lambda model, images: [])
    arguments = ("--format", "safetensors,torch_export", "--batch", "1,3", "--repeats", "9", "--threads", "1")
    record = export(run, tmp_path, *arguments)
    rows = record["latency"]["rows"]
    assert [(row["runtime"], row["batch"], row["rounds"]) for row in rows] == [
        ("PyTorch", 1, 9), ("torch.export", 1, 9), ("PyTorch", 3, 9), ("torch.export", 3, 9),
    ]  # fmt: skip
    for row in rows:
        samples = row["dense"]["samples_s"], row["pruned"]["samples_s"]
        assert [row["dense"]["median_s"], row["pruned"]["median_s"]] == [sorted(times)[4] for times in samples]
        assert row["by_pruning"]["median"] == sorted(a / b for a, b in zip(*samples, strict=True))[4]
    assert record["machine"]["threads"] == 1 and record["dense"] == work.DENSE
    assert [entry["batch"] for entry in record["latency"]["sparse"]] == [1, 3]
    text = capsys.readouterr().out
    assert text.isascii() and "| latency, ms  | batch | dense " in text and "medians (quartiles) of 9 rounds" in text


def test_a_network_that_was_not_pruned_stands_alone(dense_run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(work.timing, "interleaved", partial(interleaved, sample_s=0))
    record = export(dense_run, tmp_path, "--format", "safetensors", "--batch", "1", "--repeats", "8", "--threads", "1")
    (row,) = record["latency"]["rows"]
    assert record["dense"] is None and "pruned" not in row and "by_pruning" not in row
    assert "pruned" not in capsys.readouterr().out


def row(**ratios: tuple[float, bool]) -> dict:
    times = {"median_s": 0.0123456, "quartiles_s": [0.012, 0.2], "samples_s": []}
    shown = {key: {"median": median, "is_difference": is_real} for key, (median, is_real) in ratios.items()}
    return {"runtime": "X", "batch": 1, "dense": times, "pruned": times, **shown}


def test_only_measured_differences_are_printed() -> None:
    text = table.latency_table([row(by_pruning=(1.75, True), to_dense_pytorch=(0.5, True))])
    assert "12.3 (12.0-200)" in text and "1.75x" in text and "0.50x" in text
    text = table.latency_table([row(by_pruning=(1.75, False), to_dense_pytorch=(3.0, False))])
    assert text.count("no difference") == 2 and "1.75" not in text and "3.00" not in text


@pytest.mark.parametrize(
    ("load", "threads", "is_busy"), [(0.4, 4, False), (0.6, 4, True), (3.2, 1, False), (3.6, 1, True)]
)
def test_a_busy_machine_is_told(load: float, threads: int, is_busy: bool) -> None:
    assert table.is_busy({"load_average_1min": load, "cores": 4, "threads": threads}) is is_busy
    assert not table.is_busy({"load_average_1min": None, "cores": 4, "threads": threads})


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (1500, "1.5 kB"), (1_094_288, "1.09 MB"), (2e9, "2 GB")])
def test_sizes_are_in_decimal_units(count: int, text: str) -> None:
    assert table.size(int(count)) == text


def test_the_interval_of_a_ratio_covers_its_median_in_99_percent_of_cases() -> None:
    """n = 15: 2 P[B < 3] = 0.0074, 2 P[B < 4] = 0.035, so from the 3rd to the 13th; n = 8: from end to end."""
    found = ratio([float(value) for value in range(1, 16)], [1.0] * 15)
    assert (found.low, found.median, found.high) == (3, 8, 13) and found.is_difference
    found = ratio([3.0, 1.0, 2.0, 6.0, 5.0, 4.0, 8.0, 7.0], [1.0] * 8)
    assert (found.low, found.median, found.high) == (1, 4.5, 8) and not found.is_difference
    with pytest.raises(ValueError, match="8 rounds or more are needed, got 7"):
        ratio([1.0] * 7, [1.0] * 7)


@pytest.mark.parametrize(("gain", "is_real"), [(1.0, False), (1.04, False), (0.97, False), (1.06, True), (0.5, True)])
def test_small_gains_are_no_difference_however_steady(gain: float, is_real: bool) -> None:
    assert ratio([gain] * 15, [1.0] * 15).is_difference is is_real


def test_quartiles() -> None:
    found = spread([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found.low, found.median, found.high) == (2, 3, 4)


def test_functions_take_turns_and_the_order_turns() -> None:
    said: list[str] = []
    samples = interleaved([lambda: said.append("a"), lambda: said.append("b")], rounds=9, seconds=9, sample_s=0)
    assert [len(times) for times in samples] == [9, 9]
    timed = said[-18:]
    assert timed == (["a", "b", "b", "a"] * 5)[:18]
    assert [len(times) for times in interleaved([lambda: None], rounds=99, seconds=0, sample_s=0)] == [MIN_ROUNDS]


LAYERS = {
    "linear": (nn.Linear(12, 7), (4, 12)),
    "linear, three dimensions": (nn.Linear(12, 7, bias=False), (2, 4, 12)),
    "1x1": (nn.Conv2d(6, 5, 1, stride=2), (3, 6, 7, 8)),
    "3x3": (nn.Conv2d(6, 5, 3, padding=1, bias=False), (2, 6, 7, 8)),
    "stride and dilation": (nn.Conv2d(6, 5, (3, 2), stride=(2, 1), dilation=2, padding=(1, 2)), (2, 6, 11, 8)),
    "same padding": (nn.Conv2d(6, 5, (3, 5), padding="same"), (1, 6, 7, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_without_its_zeros_computes_the_same(name: str) -> None:
    layer, shape = LAYERS[name]
    with torch.no_grad():
        layer.weight *= torch.rand_like(layer.weight) > 0.8
        x = torch.randn(shape)
        torch.testing.assert_close(sparse.CsrLayer(layer)(x), layer(x))


def test_layers_that_are_faster_without_zeros_are_found(monkeypatch) -> None:
    """In reality a matter of the machine; here every second layer that is tried is."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 3), nn.Flatten())
    model.append(nn.Linear(8 * 36, 3))
    with torch.no_grad():
        for layer in (model[0], model[1], model[2], model[4]):
            layer.weight *= torch.rand_like(layer.weight) > 0.9
    answers = iter([[[1.0], [0.5]], [[1.0], [1.0]], [[1.0], [0.5]]])
    monkeypatch.setattr(sparse, "interleaved", lambda calls, **_: next(answers))
    monkeypatch.setattr(sparse, "roughly", lambda call: 1.0)
    images = torch.randn(2, 3, 10, 10)
    layers = sparse.faster_layers(model, images)
    assert layers == ["0", "4"]
    changed = sparse.with_csr(model, layers)
    assert [type(module).__name__ for module in changed] == ["CsrLayer", "Conv2d", "Conv2d", "Flatten", "CsrLayer"]
    torch.testing.assert_close(changed(images), model(images))


def test_a_sparse_form_counts_only_if_it_beats_the_fastest_runtime() -> None:
    engine = catalog.Runtime("X", "onnx")
    samples = {("PyTorch", "pruned"): [4.0] * 8, ("X", "pruned"): [1.0] * 8, (sparse.TITLE, "pruned"): [2.0] * 8}
    found = work.timing._verdict(1, samples, [engine], (["fc"], nn.Identity()))
    assert found["against"] == "X" and not found["is_faster"] and found["ratio"]["median"] == 0.5
    assert table.sparse_lines([found]) == [
        "sparse, batch 1: leaving the zeros out (PyTorch CSR) is not faster; not used"
    ]
    found = work.timing._verdict(1, samples, [], (["fc"], nn.Identity()))
    assert found["is_faster"] and "2.00x of PyTorch" in table.sparse_lines([found])[0]


def test_bytes_as_gzip_packs_them(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(bytes(100_000))
    found = files.sizes("torch_export", tmp_path)
    assert found["bytes"] == 100_000 and 0 < found["gzip_bytes"] < 500
