"""What a reader sees: one flushed ASCII line per epoch, a bar on a terminal, and never a traceback."""

from __future__ import annotations

import io
import os
import subprocess
import sys

from prune_lab.tracking import RunInfo
from prune_lab.tracking.console import LogFile, PlainConsole, RichConsole, console
from prune_lab.tracking.lines import duration, epoch_line, plan_lines, quantity, summary_rows

PLAN = [
    {"name": "train", "epochs": 8, "length": "8 epochs"},
    {"name": "prune", "epochs": 0, "length": ""},
    {"name": "finetune", "epochs": 1, "length": "1 epoch", "reused": True},
]
RECORD = {
    "phase": "train",
    "epoch": 3,
    "global_step": 66,
    "lr": 0.05,
    "train/loss": 0.51234,
    "train/top1": 85.5,
    "eval/top1": 88.25,
    "eval/loss": 0.4,
    "time/images_per_s": 15000.4,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def info_for(run_dir):
    return RunInfo(run_dir, "id1", "run-a", "g", [], {"schedule": {"batch_size": 64}}, PLAN)


def test_epoch_line():
    assert epoch_line(RECORD, {"train": 8}) == (
        "train 3/8  loss 0.5123  top1 85.50  eval loss 0.4000  eval top1 88.25  lr 5.00e-02  img/s 15000"
    )
    assert epoch_line({"phase": "prune", "epoch": 0, "sparsity": 0.9}, {}) == "prune 0  sparsity 0.9000"
    assert epoch_line({"phase": "final", "epoch": 0, "final/top1": 1.0}, {}) is None


def test_plan_lines(tmp_path):
    assert plan_lines(info_for(tmp_path))[:2] == [
        "run run-a",
        "plan: train (8 epochs) -> prune -> finetune (1 epoch, reused)",
    ]


def test_summary_rows_leave_out_what_is_missing():
    assert summary_rows({"final/top1": 90.0, "dense/top1": None, "delta/top1": None}) == [("top-1", "90.00 %")]
    rows = dict(
        summary_rows(
            {
                "final/top1": 90.0,
                "dense/top1": 91.5,
                "delta/top1": -1.5,
                "sparsity/achieved": 0.9,
                "sparsity/requested": 0.9,
                "macs/inference": 4_089_000_000,
                "macs/dense": 8_178_000_000,
            }
        )
    )
    assert rows["top-1"] == "90.00 % (-1.50 against 91.50 % before pruning, ? epochs)"
    assert rows["sparsity"] == "0.9 (requested 0.9)"
    assert rows["MACs per image"] == "4.09 G (50.00% of 8.18 G dense)" and "not counted" not in rows
    rest = dict(summary_rows({"macs/not_counted": 178_831_872}))["not counted"]
    assert rest == "179 M MACs per image of products without a weight, such as attention"


def test_the_accuracy_before_pruning_is_told_with_its_epochs():
    phases = [{"name": "train", "epochs": 2}, {"name": "prune", "epochs": 0}, {"name": "finetune", "epochs": 1}]
    known = {"final/top1": 90.0, "dense/top1": 91.5, "delta/top1": -1.5, "phases": phases}
    assert dict(summary_rows(known))["top-1"] == "90.00 % (-1.50 against 91.50 % before pruning, 2 epochs)"
    start = known | {"dense/epochs": 0}
    assert dict(summary_rows(start))["top-1"] == "90.00 % (-1.50 against 91.50 % before pruning, start weights)"
    dense = {"final/top1": 90.0, "dense/top1": 90.0, "delta/top1": 0.0, "phases": phases[:1]}
    assert dict(summary_rows(dense))["top-1"] == "90.00 %"


def test_parts_of_the_images_are_told():
    known = {"final/top1": 82.75, "final/top5": 99.0, "final/images": 2000, "data/num_eval": 10000}
    rows = dict(summary_rows(known | {"train/images_per_epoch": 2560, "data/num_train": 50000}))
    assert rows["top-1"] == "82.75 % of 2,000 of 10,000 images"
    assert rows["top-5"] == "99.00 % of 2,000 of 10,000 images"
    assert rows["training images"] == "2,560 of 50,000 in each epoch"
    whole = {"final/top1": 82.75, "final/images": 10000, "data/num_eval": 10000, "train/images_per_epoch": None}
    assert summary_rows(whole | {"data/num_train": 50000}) == [("top-1", "82.75 %")]


def test_training_macs_name_what_they_are_divided_by():
    rows = dict(summary_rows({"macs/train": 15e12, "macs/train_dense": 12e12}))
    assert rows["training MACs"] == "15 T (125.00% of 12 T, dense training over schedule.train once)"


def test_units():
    assert [duration(seconds) for seconds in (1.25, 123, 14700)] == ["1.2 s", "2 min 03 s", "4 h 05 min"]
    assert [quantity(value) for value in (999, 1000, 999_999, 4.09e9)] == ["999", "1 k", "1 M", "4.09 G"]


def test_replayed_records_are_not_shown_again(tmp_path):
    out = io.StringIO()
    sink = PlainConsole(out)
    sink.start(info_for(tmp_path))
    before = out.getvalue()
    sink.log(RECORD, replayed=True)
    assert out.getvalue() == before
    sink.log(RECORD)
    assert out.getvalue().count("train 3/8") == 1


def test_ascii_only_stream(tmp_path):
    raw = io.BytesIO()
    sink = PlainConsole(io.TextIOWrapper(raw, encoding="ascii"))
    sink.message("gr\u00fc\u00dfe \u2713")
    assert raw.getvalue() == b"gr\\xfc\\xdfe \\u2713\n"


def test_rich_terminal_without_unicode(tmp_path):
    class AsciiTerminal(io.TextIOWrapper):
        def isatty(self):
            return True

    raw = io.BytesIO()
    stream = AsciiTerminal(raw, encoding="ascii")
    sink = RichConsole(stream)
    sink.start(info_for(tmp_path))
    for step in range(1, 4):
        sink.progress(step, 3, "tr\u00e4in")
    sink.log(RECORD)
    sink.message("[bold]\u2713 not markup[/bold]")
    sink.summary({"final/top1": 90.0})
    sink.finish("finished", None)
    stream.flush()
    text = raw.getvalue().decode("ascii")
    assert "train 3/8" in text and "[bold]\\u2713 not markup[/bold]" in text and "90.00 %" in text


def test_rich_bar_starts_anew_with_each_phase(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    sink = console(out)
    assert isinstance(sink, RichConsole)
    sink.progress(1, 10, "early")  # before start: nothing to show it in
    sink.start(info_for(tmp_path))
    for phase in ("train", "finetune"):
        for step in (1, 2):
            sink.progress(step, 2, phase)
    sink.finish("interrupted", "stopped by a signal")
    assert "train" in out.getvalue() and "finetune" in out.getvalue()
    assert "interrupted: stopped by a signal" in out.getvalue()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")  # the cursor is back


def test_dumb_terminals_and_files_get_plain_lines(monkeypatch):
    assert isinstance(console(io.StringIO()), PlainConsole)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(console(Terminal()), PlainConsole)


def test_reader_that_goes_away_does_not_stop_the_run():
    code = (
        "import sys, time\n"
        "from prune_lab.tracking.console import console\n"
        "sink = console()\n"
        "for index in range(2000): sink.message('x' * 100)\n"
        "sys.stderr.write('survived')\n"
    )
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    os.close(reader)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "survived")


def test_c_locale():
    code = "from prune_lab.tracking.console import console; console().message('\\u00fc')"
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout == b"\\xfc\n"


def test_log_file_keeps_lines_from_before_the_start_and_after_the_end(tmp_path):
    sink = LogFile()
    sink.message("waiting")
    assert list(tmp_path.iterdir()) == []
    sink.start(info_for(tmp_path))
    sink.log(RECORD)
    sink.finish("failed", "no luck")
    sink.message("late")
    lines = [line.split("  ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines[0] == "waiting" and lines[1] == "run run-a"
    assert lines[-3].startswith("train 3/8") and lines[-2:] == ["failed: no luck", "late"]
