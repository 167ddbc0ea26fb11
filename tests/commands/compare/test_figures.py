"""Figures of a comparison: exact data from hand-made runs, files that open anywhere, a report that a browser draws."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest

from prune_lab.commands.compare import figures, html, plots, styles
from prune_lab.commands.compare.command import main
from prune_lab.commands.compare.groups import aggregate, stat_of
from prune_lab.commands.compare.published import Beside
from prune_lab.commands.compare.runs import read_runs
from prune_lab.commands.compare.table import Findings, legend
from prune_lab.commands.compare.trajectories import densities, trajectory
from prune_lab.foundations.errors import UserError

INJECTION = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1">'


def record(phase, epoch, top1=None, **flat):
    """Make a line of metrics.jsonl; keys of `flat` have __ for /."""
    values = {} if top1 is None else {"eval/top1": top1}
    return {"phase": phase, "epoch": epoch, **values, **{key.replace("__", "/"): value for key, value in flat.items()}}


def layer(name, density):
    return {"name": name, "density": density}


def write_run(root, name, *, group, seed=0, method="rigl", model="resnet20", dataset="digits", config=None,
              records=None, layers=None, **summary):  # fmt: skip
    path = root / name
    path.mkdir(parents=True)
    (path / "status.json").write_text('{"status": "finished"}')
    options = {"method": {"name": method}, "seed": seed} | (config or {})
    (path / "run.json").write_text(json.dumps({"config": options}))
    flat = {"run/id": name, "run/group": group, "run/seed": seed, "config/method": method, "config/model": model,
            "config/dataset": dataset, "config/schedule": "demo"}  # fmt: skip
    flat |= {key.replace("__", "/"): value for key, value in summary.items()}
    (path / "summary.json").write_text(json.dumps(flat))
    if records is not None:
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    if layers is not None:
        (path / "layers.json").write_text(json.dumps(layers))
    return path


def write_three_rows(root):
    """Two seeds of rigl, one of set that is worse and dearer, one of dense: the best and the dearest."""
    for seed, (top1, macs) in enumerate(((80.0, 100), (82.0, 120))):
        records = [record("train", epoch, 70.0 + seed + epoch, macs__train=10 * epoch, mask__grown=epoch + seed)
                   for epoch in (1, 2)]  # fmt: skip
        write_run(root, f"rigl-s{seed}", group="rigl", seed=seed, final__top1=top1, macs__inference=macs,
                  params__nonzero=50, sparsity__requested=0.9, records=records,
                  layers=[layer("conv1", 1.0), layer("fc", 0.25 + 0.5 * seed)])  # fmt: skip
    write_run(root, "set", group="set", method="set", final__top1=79.0, macs__inference=130, params__nonzero=50,
              records=[record("train", 1, 60.0)], layers=[layer("conv1", 0.5), layer("fc", 0.5)])  # fmt: skip
    write_run(root, "dense", group="dense", method="dense", final__top1=90.0, macs__inference=1500, params__nonzero=500,
              records=[record("train", 1, 65.0)], layers=[layer("conv1", 1.0), layer("fc", 1.0)])  # fmt: skip


def build(root):
    rows = aggregate(read_runs([root]))
    return rows, figures.build(rows, Findings())


def find(found, key):
    return next(figure for figure in found.figures if figure.key == key)


def test_a_point_of_accuracy_has_means_and_spreads_in_both_directions(tmp_path):
    write_three_rows(tmp_path)
    accuracy = find(build(tmp_path)[1], "accuracy")
    assert [view.key for view in accuracy.views] == ["macs", "params"]  # no row has training MACs or a latency
    series = {one.label: one for one in accuracy.views[0].series}
    rigl = series["rigl"]
    assert (rigl.x, rigl.y, rigl.n) == ((110.0,), (81.0,), (2,))
    assert rigl.x_std[0] == pytest.approx(200**0.5) and rigl.y_std[0] == pytest.approx(2**0.5)
    assert series["dense"].x_std == series["dense"].y_std == (None,)
    assert rigl.notes[0].splitlines()[:3] == [
        "rigl 0.9", "top-1 accuracy on test images, %: 81.00 +- 1.41, n = 2", "sparsity requested: 0.9",
    ]  # fmt: skip


def test_the_front_joins_unbeaten_rows_by_cost(tmp_path):
    write_three_rows(tmp_path)
    view = find(build(tmp_path)[1], "accuracy").views[0]
    front = view.series[-1]
    assert (front.kind, front.x, front.y) == ("front", (110.0, 1500.0), (81.0, 90.0))
    assert view.log_x  # 110 to 1500


def test_controls_are_hollow_and_not_on_the_front(tmp_path):
    own = write_run(tmp_path, "own", group="own", final__top1=80.0, macs__inference=10, records=[], layers=[])
    beside = {"control__kind": "shuffle", "control__method_run": own.name}
    write_run(tmp_path, "shuffle", group="shuffle", final__top1=85.0, macs__inference=10, **beside)
    write_run(tmp_path, "set", group="set", method="set", final__top1=70.0, macs__inference=5, records=[], layers=[])
    series = find(build(tmp_path)[1], "accuracy").views[0].series
    assert [(one.label, one.style.hollow) for one in series[:-1]] == [
        ("rigl", False), ("rigl, control shuffle", True), ("set", False),
    ]  # fmt: skip
    assert series[0].style.color == series[1].style.color
    assert series[-1].y == (70.0, 80.0)


def test_epochs_and_cost_accumulate_over_phases_and_rewinding():
    first = [
        record("train", 1, 50.0, macs__train=100), record("train", 2, 60.0, macs__train=200),
        record("prune", 0, 30.0, macs__train=200, mask__overlap=1.0, mask__overlap__conv1=0.3),
        record("again", 2, 62.0, macs__train=250), record("final", 0, 62.0),
    ]  # fmt: skip
    second = [record("train", 1, 52.0, macs__train=100), record("train", 2, None, macs__train=200),
              record("prune", 0, 32.0, macs__train=200), record("again", 2, 66.0, macs__train=270)]  # fmt: skip
    points = trajectory([first, second])
    assert [(point.phase, point.epoch, point.epochs, point.macs) for point in points] == [
        ("train", 1, 1, 100), ("train", 2, 2, 200), ("prune", 0, 2, 200), ("again", 2, 3, 260),
    ]  # fmt: skip
    values = [point.values["eval/top1"] for point in points]
    assert [(value.mean, value.n) for value in values] == [(51, 2), (60, 1), (31, 2), (64, 2)]
    assert values[3].std == pytest.approx(8**0.5) and values[1].std is None
    assert points[2].values["mask/overlap"].mean == 1.0 and "mask/overlap/conv1" not in points[2].values


def test_numbers_that_ran_away_are_left_out():
    points = trajectory([[record("train", 1, float("nan")), record("train", 2, 5.0, mask__grown="many")]])
    assert [list(point.values) for point in points] == [[], ["eval/top1"]]


def test_densities_are_means_over_runs_in_order_of_the_layers(tmp_path):
    found = densities([[layer("b", 0.2), layer("a", 1.0)], [layer("b", 0.4), layer("a", 1.0), layer("c", None)]])
    assert [(name, value.mean) for name, value in found.items()] == [("b", pytest.approx(0.3)), ("a", 1.0)]
    write_three_rows(tmp_path)
    write_run(tmp_path, "vgg", group="vgg", model="vgg16", final__top1=1.0, layers=[layer("features.0", 0.1)])
    views = {view.name: view for view in find(build(tmp_path)[1], "density").views}
    assert set(views) == {"resnet20", "vgg16"} and views["resnet20"].categories == ("conv1", "fc")
    lines = {series.label: series.y for series in views["resnet20"].series}
    assert lines["rigl 0.9 resnet20"] == (1.0, 0.5) and lines["set resnet20"] == (0.5, 0.5)


def test_curves_have_a_view_on_training_macs_for_rows_that_recorded_them(tmp_path):
    write_three_rows(tmp_path)
    epochs, macs = find(build(tmp_path)[1], "curves").views
    assert (epochs.key, macs.key) == ("epoch", "macs")
    rigl = next(series for series in epochs.series if series.label == "rigl 0.9")
    assert (rigl.x, rigl.y) == ((1, 2), (71.5, 72.5))
    assert rigl.y_std == (pytest.approx(0.5**0.5),) * 2
    assert [(series.label, series.x) for series in macs.series] == [("rigl 0.9", (10, 20))]


def test_every_figure_on_masks_that_a_row_has_is_shown_once(tmp_path):
    write_three_rows(tmp_path)
    small = [figure for figure in build(tmp_path)[1].figures if figure.small]
    assert [figure.key for figure in small] == ["mask-grown"]
    (series,) = small[0].views[0].series
    assert series.y == (1.5, 2.5)


def test_data_sets_are_not_drawn_into_one_picture(tmp_path):
    write_three_rows(tmp_path)
    write_run(tmp_path, "other", group="other", dataset="cifar10", final__top1=50.0, macs__inference=7)
    found = build(tmp_path)[1]
    assert set(found.datasets) == {"digits", "cifar10"}
    views = {view.dataset: view for view in find(found, "accuracy").views if view.key == "macs"}
    assert [series.y for series in views["cifar10"].series] == [(50.0,)]


def test_files_that_cannot_be_read_give_a_note_each(tmp_path):
    run = write_run(tmp_path, "r", group="r", final__top1=80.0, macs__inference=10)
    (run / "layers.json").write_text('{"no": "list"}')
    broken = write_run(tmp_path, "b", group="b", method="set", final__top1=80.0, macs__inference=10, layers=[])
    (broken / "metrics.jsonl").write_text('{"phase"\n{"phase": "train", "epoch": 1}\n')
    found = build(tmp_path)[1]
    assert sorted(found.notes) == [
        f"not in the figures: {broken / 'metrics.jsonl'} ({broken / 'metrics.jsonl'}, line 1 is not JSON)",
        f"not in the figures: {run / 'layers.json'} (no list of records)",
        f"not in the figures: {run / 'metrics.jsonl'} (No such file or directory)",
    ]
    assert [figure.key for figure in found.figures] == ["accuracy"]


def test_labels_drop_prefixes_of_options_unless_rows_would_look_the_same(tmp_path):
    for name, train, finetune in (("a", 0.1, 1), ("b", 0.2, 1), ("c", 0.2, 2)):
        schedule = {"train": {"lr": train}, "finetune": {"momentum": finetune}}
        write_run(tmp_path, name, group=name, config={"schedule": schedule}, final__top1=1.0)
    assert styles.labels(aggregate(read_runs([tmp_path]))) == {
        "a": "rigl lr=0.1 momentum=1", "b": "rigl lr=0.2 momentum=1", "c": "rigl lr=0.2 momentum=2",
    }  # fmt: skip
    for name, key in (("d", "one"), ("e", "two")):
        write_run(tmp_path, name, group=name, method="set", config={key: {"lr": 3}}, final__top1=1.0)
    found = styles.labels(aggregate(read_runs([tmp_path])))
    assert (found["d"], found["e"]) == ("set one.lr=3", "set two.lr=3")


@pytest.mark.parametrize(("each", "by_method"), [(3, True), (4, True), (5, False)])
def test_every_line_has_a_look_of_its_own(tmp_path, each, by_method):
    for method in ("gmp", "rigl", "set", "snip", "static", "grasp"):
        for index in range(each):
            name = f"{method}{index}"
            write_run(tmp_path, name, group=name, method=method, config={"x": index}, final__top1=1.0)
    rows = aggregate(read_runs([tmp_path]))
    looks, colors_are_methods = styles.of_lines(rows)
    assert colors_are_methods is by_method
    assert len(set(looks.values())) == 6 * each
    colors = {(row.labels[0], looks[row.group].color) for row in rows}
    assert (len(colors) == 6) is by_method


def test_more_than_ten_methods_differ_in_colour_and_marker(tmp_path):
    for index in range(30):
        write_run(tmp_path, f"m{index}", group=f"m{index}", method=f"m{index}", final__top1=1.0)
    looks = styles.of_methods(aggregate(read_runs([tmp_path]))).values()
    assert len({(look.color, look.symbol) for look in looks}) == 30


def linear(color):
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return np.array([part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts])


def cielab(rgb):
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ rgb.clip(0, 1) / (0.9505, 1, 1.089)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


SEEN_WITH = {
    "no deviation": np.eye(3),  # the others: Machado et al. 2009, full severity, on linear RGB
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize(("palette", "background"), [(styles.LIGHT, "#ffffff"), (styles.DARK, "#1b1f23")])
def test_colours_stand_out_from_the_background_and_from_each_other(palette, background):
    for color in palette:
        dark, light = sorted(linear(one) @ (0.2126, 0.7152, 0.0722) for one in (color, background))
        assert (light + 0.05) / (dark + 0.05) >= 3, color
    for eyes, matrix in SEEN_WITH.items():
        seen = [cielab(np.array(matrix) @ linear(color)) for color in palette]
        assert min(np.linalg.norm(one - other) for one, other in combinations(seen, 2)) > 20, eyes


def test_plots_are_written_as_png_and_svg(tmp_path):
    write_three_rows(tmp_path / "runs")
    _, found = build(tmp_path / "runs")
    written = plots.write_plots(found, tmp_path / "plots")
    names = ["accuracy-digits-macs", "accuracy-digits-params", "density-digits-resnet20", "curves-digits-epoch",
             "curves-digits-macs", "mask-grown-digits"]  # fmt: skip
    assert [path.name for path in written] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for path in written[::2]:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000
    texts = " ".join(ElementTree.parse(tmp_path / "plots" / "density-digits-resnet20.svg").getroot().itertext())
    for label in ("rigl 0.9", "set", "conv1", "fc", "density", "n = 1 to 2", "resnet20 on digits"):
        assert label in texts
    again = plots.write_plots(replace(found, figures=(find(found, "mask-grown"),)), tmp_path / "again")
    assert [path.read_bytes() for path in written[-2:]] == [path.read_bytes() for path in again]


@pytest.mark.parametrize("count", [1, 30])
def test_plots_hold_one_row_and_thirty(tmp_path, count):
    for index in range(count):
        write_run(tmp_path, f"m{index}", group=f"m{index}", method=f"m$_{index}^$", final__top1=50.0 + index,
                  macs__inference=10, records=[record("train", epoch, epoch) for epoch in range(1, 60)],
                  layers=[layer(f"layer{place}", 0.5) for place in range(60)])  # fmt: skip
    found = build(tmp_path)[1]
    chosen = [find(found, key) for key in ("accuracy", "density", "curves")]
    one_view_each = replace(found, figures=tuple(replace(figure, views=figure.views[:1]) for figure in chosen))
    for path in plots.write_plots(one_view_each, tmp_path)[1::2]:
        texts = {"".join(text.itertext()) for text in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")}
        assert {f"m$_{index}^$" for index in range(count)} <= texts, path


@pytest.mark.parametrize("flag", ["--html", "--plots"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, flag):
    write_three_rows(tmp_path / "runs")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^{flag} .*file.*: cannot be written \((Not a directory|File exists)\)$"):
        main([str(tmp_path / "runs"), flag, str(tmp_path / "file" / "below")])


@pytest.mark.parametrize(
    ("cell", "value"),
    [("50.67 +- 1.18", 50.67), ("-2.17", -2.17), ("13.1 k (4.8%)", 13100), ("2 of 3", 2), ("2 min 03 s", 123),
     ("4 h 05 min", 14700), ("1.5 s", 1.5), ("resnet20", None), ("-", None), ("0.1:uniform = macs", None),
     ("1e-05", 1e-5), ("270 k (100.0%)", 270000)],
)  # fmt: skip
def test_cells_sort_by_their_number(cell, value):
    assert html.sort_value(cell) == (value if value is None else pytest.approx(value))


def write_hostile_runs(root):
    for seed in (0, 1):
        records = [record("train", 1, 50.0 + seed, mask__grown=1), record("train", 2, 60.0 + seed, mask__grown=2)]
        write_run(root, f"a-s{seed}", group="a", seed=seed, method="rigl", config={"x": INJECTION}, records=records,
                  final__top1=60.0 + seed, macs__inference=10, params__nonzero=5,
                  layers=[layer("<b>conv1</b>", 0.5)])  # fmt: skip
    write_run(root, "b", group="b", method="rigl", config={"x": "&amp;%{x}"}, final__top1=9.0, macs__inference=5,
              params__nonzero=7, records=[record("train", 1, 9.0)], layers=[layer("<b>conv1</b>", 1.0)])  # fmt: skip


def write_page(root, out):
    rows, found = build(root)
    html.write_report(rows, Findings(), found, [*legend(rows, Findings()), f"  left: {INJECTION}"], out)
    return out.read_text(encoding="utf-8")


def test_report_loads_nothing_and_escapes_what_runs_say(tmp_path):
    write_hostile_runs(tmp_path / "runs")
    text = write_page(tmp_path / "runs", tmp_path / "new" / "report.html")
    assert text == write_page(tmp_path / "runs", tmp_path / "again.html")
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 3 and text.count("<script") - text.count('"<script') >= 3
    markup = re.sub(r"<script[^>]*>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(?:src|href|action)\s*=\s*['\"]?(?:https?:)?//", markup) and "<img" not in markup
    assert "@import" not in markup and "url(" not in markup
    assert "&lt;/script&gt;&lt;script&gt;" in markup and "default-src &#39;none&#39;" in markup
    data = json.loads(scripts[0])
    assert INJECTION in data["figures"][1]["views"][0]["series"][0]["label"]
    for heading in ("<h1>", "<h2>Results</h2>", "<h3>Accuracy against cost</h3>", "not confidence intervals"):
        assert heading in markup


class Reader(HTMLParser):
    """Collects the elements of a page, and the texts that it shows."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.texts += [value for _name, value in attributes if value]

    def handle_data(self, data):
        self.texts.append(data)


def test_names_with_marks_of_html_are_shown_as_they_are(tmp_path):
    name = '<b>&"\'+-'
    for dataset in (f"d{name}", "other"):
        write_run(tmp_path / "runs", f"{name}-{dataset}", group=dataset, method=f"m{name}", model=f"net{name}",
                  dataset=dataset, config={"tag": f"{name}{dataset}"}, final__top1=5.0, macs__inference=3)  # fmt: skip
    page = Reader(write_page(tmp_path / "runs", tmp_path / "report.html"))
    assert not page.tags & {"b", "img"}
    assert f"d{name}" in page.texts, "to be chosen from"
    for shown in (f"m{name}", f"net{name}", f"tag={name}other"):
        assert any(shown in text for text in page.texts), shown


def test_published_numbers_stand_in_a_table_of_their_own(tmp_path):
    write_three_rows(tmp_path)
    rows, found = build(tmp_path)
    assert "Published numbers" not in html.page(rows, Findings(), found, [])
    paper = {"cite": "A & B 2020", "where": "table 1", "certainty": "read", "remark": "other data"}
    here = stat_of(rows[0], "final/top1")
    entry = Beside(rows[0], "rigl/x", "final/top1", 77.5, 0.5, here, paper, changed="method.x=1")
    text = html.page(rows, Findings(published=(entry,)), found, [])
    section = text[text.index("<h2>Published numbers") : text.index("<h2>Figures")]
    for part in ("77.5 &plusmn; 0.5", "A &amp; B 2020, table 1 [read]", "changed: method.x=1", ": other data</li>"):
        assert part in section


def test_compare_writes_both_and_loads_plotting_only_then(tmp_path, capsys):
    write_three_rows(tmp_path / "runs")
    report, folder = tmp_path / "r.html", tmp_path / "plots"
    assert main([str(tmp_path / "runs"), "--html", str(report), "--plots", str(folder)]) == 0
    assert f"written: {report}" in capsys.readouterr().err
    assert "<td" in report.read_text() and len(list(folder.iterdir())) == 12
    code = (
        "import sys; from prune_lab.commands.compare.command import main; main([sys.argv[1]]);"
        "assert not {'plotly', 'matplotlib', 'prune_lab.commands.compare.figures'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "runs")], check=True, stdout=subprocess.DEVNULL)


PROBE = """
const pick = (select, value) => { select.value = value; select.dispatchEvent(new Event("change")); };
const plot = document.querySelector('[data-figure="accuracy"]');
const said = { title: document.title, dark: darkTheme.matches, images: document.images.length };
said.drawn = document.querySelectorAll(".plot").length;
said.svgs = [...document.querySelectorAll(".plot")].filter((one) => one.querySelector(".main-svg")).length;
said.background = plot._fullLayout.paper_bgcolor;
said.axis = plot._fullLayout.xaxis.title.text;
pick(document.querySelector('[data-for="accuracy"]'), "1");
said.other = plot._fullLayout.xaxis.title.text;
said.ticks = document.querySelector('[data-figure="density"] .xtick').textContent;
Plotly.Fx.hover(plot, [{ curveNumber: 0, pointNumber: 0 }]);
said.hover = plot.querySelector(".hoverlayer").textContent;
const curves = document.querySelector('[data-figure="curves"]');
const entry = curves.parentNode.querySelector(".legend button");
said.before = curves.data.length;
entry.click();
said.after = curves.data.length;
said.pressed = curves.parentNode.querySelector(".legend button").getAttribute("aria-pressed");
const header = [...document.querySelectorAll("th")].find((one) => one.textContent === "top-1 %");
const column = () => [...document.querySelectorAll("tbody tr")].map((row) => row.cells[header.cellIndex].textContent);
header.firstChild.click();
said.up = column();
header.firstChild.click();
said.down = column();
document.body.append(Object.assign(document.createElement("pre"), { id: "probe", textContent: JSON.stringify(said) }));
"""


def browse(chromium, profile, page, *, dark):
    """Return the DOM after scripts ran, and the console's lines."""
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
               "--enable-logging=stderr", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
               "--virtual-time-budget=5000", "--window-size=1280,2000", "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on the PATH")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_draws_the_report(tmp_path, dark):
    write_hostile_runs(tmp_path / "runs")
    text = write_page(tmp_path / "runs", tmp_path / "report.html")
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    dom, console = browse(shutil.which("chromium"), tmp_path / "profile", probed, dark=dark)
    assert console == []
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    said = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert (said["title"], said["images"], said["dark"]) == ("prune-lab: comparison of runs", 0, dark)
    assert said["drawn"] == said["svgs"] == 4
    assert said["background"] == ("#1b1f23" if dark else "#ffffff")
    assert (said["axis"], said["other"]) == ("inference MACs per image", "parameters left")
    assert said["ticks"] == "<b>conv1</b>" and "</script><script>" in said["hover"]
    assert (said["before"], said["after"], said["pressed"]) == (3, 1, "false")  # a line with its band, and a line
    assert (said["up"], said["down"]) == (["9.00", "60.50 \u00b1 0.71"], ["60.50 \u00b1 0.71", "9.00"])
