"""The report on results with known figures, and on files that are not results."""

import json
import re
import shutil
import subprocess
from copy import deepcopy
from html import escape
from html.parser import HTMLParser

import pytest
from matplotlib.colors import to_rgba

from benchmarks import merge
from benchmarks.core import Status
from benchmarks.report import plots as plots_module
from benchmarks.report import readme
from benchmarks.report.__main__ import main
from benchmarks.report.figures import floor_s, quartiles, spread
from benchmarks.report.plots import OURS as OUR_COLOR
from benchmarks.report.plots import families_of, plots, styles_of
from benchmarks.report.runs import BrokenResult, read_result, read_sections
from benchmarks.report.tables import COLUMNS, Kind, groups, number

CPU = {"type": "cpu", "name": "Some CPU", "threads": 2, "load_average": [0.1, 0.2, 0.3]}
GPU = {"type": "cuda", "name": "Some GPU", "capability": "sm_90", "memory_gib": 80.0}
OURS = "vot-kernels torch"


def bench(provider, seconds, *, size=4096, workload=None, direction="forward", instead="", **facts):
    """Return one entry of pytest-benchmark; with the ceilings below, its floor is 40 ms."""
    info = {
        "suite": "linear",
        "workload": workload or f"{size // 1024}k",
        "describe": f"{size:,} tokens in 1 segment, 8 heads of 64",
        "op": "linear_attention",
        "direction": direction,
        "dtype": "float32",
        "size": size,
        "provider": provider,
        "ours": provider.startswith("vot-kernels"),
        "instead": instead,
        "flops": 4_000_000_000,
        "bytes": 100_000_000,
        "peak_bytes": 3 * 2**20,
        "kernel_s": [] if direction == "backward" else [s / 2 for s in seconds],
    }
    return {"extra_info": {**info, **facts}, "stats": {"data": list(seconds)}}


def outcome(entry, status="timed", reason=""):
    measured = ("peak_bytes", "kernel_s")
    facts = {key: value for key, value in entry["extra_info"].items() if key not in measured}
    return {**facts, "status": status, "reason": reason, "notes": {}}


def result(*benchmarks, failed=(), device=CPU, complete=True, command="pytest benchmarks/ --quick"):
    """Return a whole file; `failed` are (provider, status, reason) on the first benchmark's workload."""
    benchmarks = deepcopy(benchmarks)
    first = outcome(benchmarks[0])
    failures = [
        {**first, "provider": p, "ours": p.startswith("vot-kernels"), "status": s, "reason": r}
        for p, s, r in failed
    ]
    return {
        "benchmarks": list(benchmarks),
        "commit_info": {"id": "0123456789abcdef"},
        "vot_kernels": {
            "schema": 1,
            "device": device,
            "versions": {"python": "3.11.7", "torch": "2.13.0", "cuda": None, "utc": "2026-01-02T03:04:05Z"},
            "command": command,
            "ceilings": {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": {"float32": 1e11}},
            "complete": complete,
            "outcomes": [*map(outcome, benchmarks), *failures],
        },
    }


RACE = (
    bench(OURS, [0.08, 0.1, 0.12]),
    bench("slow peer", [0.32, 0.4, 0.6]),
    bench("other function", [0.04, 0.05, 0.06], instead="exact softmax"),
)
FAILED = (
    ("vot-kernels triton", "unsupported", "no kernel"),
    ("naive", "out of memory", "tried to allocate 9 GiB"),
    ("absent", "missing", "absent is not installed"),
    ("wrong", "mismatch", "output is off | by <b>0.5</b>\nsecond line"),
)


@pytest.fixture
def save(tmp_path):
    def save(data, name="run.json"):
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return save


def lines(save, *results):
    sections = read_sections([save(data, f"{i}.json") for i, data in enumerate(results)])
    return [
        line
        for section in sections
        for suite in section.suites
        for g in groups(section, suite)
        for line in g.lines
    ]


def cells(line):
    return dict(zip(COLUMNS, line.cells, strict=True))


# --- figures ---------------------------------------------------------------------------------------------


def test_every_figure_of_a_timed_line(save):
    ours, peer = (cells(line) for line in lines(save, result(*RACE[:2])))
    assert ours == {
        "provider": OURS,
        "whole op": "100 ms ± 10 %",
        "kernel alone": "50.0 ms ± 10 %",
        "time ÷ ours": "1 ×",
        "TFLOP/s": "0.0400",
        "GB/s": "1.00",
        "of the floor": "40 %",
        "peak memory": "3.00 MiB",
    }
    assert peer["time ÷ ours"] == "4.0 × (4.0–4.5)", "rounds have the ratios 4, 4 and 5"
    assert (peer["whole op"], peer["of the floor"]) == ("400 ms ± 18 %", "10 %")


def test_ratio_pairs_the_rounds(save):
    """A slow minute that affects both does not change the ratio, though the samples are far apart."""
    _, peer = lines(save, result(bench(OURS, [0.1, 0.9, 0.2]), bench("peer", [0.3, 2.7, 0.6])))
    assert cells(peer)["time ÷ ours"] == "3.0 × (3.0–3.0)"


def test_ratio_is_to_the_fastest_of_ours(save):
    triton = bench("vot-kernels triton", [0.01, 0.01, 0.01])
    found = {line.cells[0]: cells(line)["time ÷ ours"] for line in lines(save, result(*RACE[:2], triton))}
    assert found["vot-kernels triton"] == "1 ×"
    assert found[OURS].startswith("10 × (9.0–11)")
    assert found["slow peer"].startswith("40 ×")


def test_ours_on_another_function_is_not_what_peers_are_compared_with(save):
    other = bench("vot-kernels, plain MoE", [0.01, 0.01, 0.01], instead="a plain MoE")
    found = [cells(line) for line in lines(save, result(*RACE[:2], other))]
    assert [line["time ÷ ours"][:5] for line in found] == ["0.10 ", "1 ×", "4.0 ×"]


def test_no_ratio_without_ours(save):
    (peer,) = lines(save, result(RACE[1]))
    assert cells(peer)["time ÷ ours"] == "–"


def test_floor_is_the_later_of_moving_and_computing(save):
    data = result(
        bench("computes", [1.0]),
        bench("moves", [1.0], bytes=10**10),
        bench("moves only", [1.0], flops=0, dtype="uint8"),
        bench("unknown ceiling", [1.0], dtype="float8"),
    )
    floors = {row.provider: floor_s(row) for row in read_result(save(data))[1]}
    assert floors == pytest.approx(
        {"computes": 0.04, "moves": 1.0, "moves only": 0.01, "unknown ceiling": None}
    )


def test_quartiles_and_spread():
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx(1 / 3)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0) and spread([7.0]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.012345, "0.0123"), (1.0, "1.00"), (12.345, "12.3"), (99.96, "100"), (1234.5, "1,234"), (0.0, "0.00")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


# --- lines without figures -------------------------------------------------------------------------------


def test_ours_come_first_then_the_fastest_then_the_untimed(save):
    names = [line.cells[0] for line in lines(save, result(*RACE, failed=FAILED))]
    assert names == [
        OURS,
        "other function (computes exact softmax instead)",
        "slow peer",
        "naive",
        "wrong",
        "1 unsupported",
    ]


def test_untimed_providers_show_why_and_no_figure(save):
    found = {line.cells[0]: line for line in lines(save, result(*RACE, failed=FAILED))}
    assert found["naive"].cells == ("naive", "out of memory: tried to allocate 9 GiB")
    assert found["wrong"].cells[1].startswith("❌ mismatch: output is off")
    assert found["wrong"].kind is Kind.MISMATCH
    assert "absent" not in found, "who is not installed has no line"


def test_the_unsupported_share_one_line_with_each_reason_once(save):
    failed = [
        ("peer b", "unsupported", "needs a GPU"),
        ("vot-kernels triton", "unsupported", "no kernel"),
        ("peer a", "unsupported", "needs a GPU"),
        ("naive", "error", "no luck"),
    ]
    found = [line.cells for line in lines(save, result(RACE[0], failed=failed))]
    assert found[1:] == [
        ("naive", "error: no luck"),
        ("3 unsupported", "vot-kernels triton (no kernel); peer a, peer b (needs a GPU)"),
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        ([0.08, 0.1, 0.12], "100 ms ± 10 %"),
        ([0.062, 0.1, 0.138], "100 ms ± 19 %"),
        ([0.05, 0.1, 0.14], "100 ms ± 22 % ⚠"),
        ([0.01, 0.1, 0.9], "100 ms ± 222 % ⚠"),
        ([0.1], "100 ms"),
    ],
)
def test_a_spread_over_20_per_cent_is_marked(save, tmp_path, seconds, shown):
    data = result(bench("peer", seconds))
    (line,) = lines(save, data)
    assert cells(line)["whole op"] == shown
    assert ("⚠" in cells(line)["kernel alone"]) == ("⚠" in shown)
    assert main([str(save(data)), "--out", str(tmp_path / "out")]) == 0
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count('class="figure noisy"') == 2 * ("⚠" in shown)
    assert "⚠: the samples spread by more than ± 20 %" in Page(html).text, (
        "the legend says what the mark means"
    )


def test_a_mismatch_shows_no_figure_even_if_the_file_has_one(save):
    data = result(*RACE[:2])
    data["vot_kernels"]["outcomes"][1] |= {"status": "mismatch", "reason": "off"}
    wrong = lines(save, data)[1]
    assert wrong.cells == ("slow peer", "❌ mismatch: off")


def test_a_peer_that_computes_something_else_is_marked_and_has_no_rates(save):
    other = cells(lines(save, result(*RACE))[1])
    assert other["provider"] == "other function (computes exact softmax instead)"
    assert (other["TFLOP/s"], other["GB/s"], other["of the floor"]) == ("–", "–", "–")
    assert other["time ÷ ours"] == "0.50 × (0.50–0.50)"


def test_backward_has_no_kernel_alone_and_memory_may_be_unknown(save):
    (row,) = lines(save, result(bench(OURS, [0.1], direction="backward", peak_bytes=None)))
    assert (cells(row)["kernel alone"], cells(row)["peak memory"]) == ("–", "–")
    assert cells(row)["whole op"] == "100 ms", "one sample has no spread"


@pytest.mark.parametrize("status", sorted(set(Status) - {Status.TIMED, Status.MISSING}))
def test_a_workload_on_which_nothing_was_timed_has_its_lines(save, status, tmp_path):
    data = result(RACE[0])
    data["benchmarks"] = []
    data["vot_kernels"]["outcomes"][0] |= {"status": str(status), "reason": "because"}
    (line,) = lines(save, data)
    assert f"{status}" in " ".join(line.cells) and "because" in line.cells[1]
    assert main([str(save(data)), "--out", str(tmp_path / "out")]) == 0


def test_who_is_not_installed_is_named_once_below_the_table(save, tmp_path):
    again = bench(OURS, [0.1], workload="8k")
    data = result(*RACE, again, failed=FAILED)
    data["vot_kernels"]["outcomes"].append(
        {**outcome(again, "missing", "absent is not installed"), "provider": "absent"}
    )
    assert main([str(save(data)), "--out", str(tmp_path / "out")]) == 0
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert text.count("Missing on this machine: absent (absent is not installed).") == 1


# --- merging ---------------------------------------------------------------------------------------------


def test_runs_of_one_device_are_merged_and_the_later_counts(save):
    first = result(*RACE[:2])
    second = result(bench("slow peer", [0.2, 0.2, 0.2]), bench(OURS, [0.3, 0.3], size=8192))
    second["vot_kernels"]["device"] = {**CPU, "load_average": [9.0, 9.0, 9.0]}
    found = {(cells(x)["provider"], cells(x)["whole op"]): cells(x) for x in lines(save, first, second)}
    assert set(found) == {
        (OURS, "100 ms ± 10 %"),
        ("slow peer", "200 ms ± 0.0 %"),
        (OURS, "300 ms ± 0.0 %"),
    }
    unpaired = found["slow peer", "200 ms ± 0.0 %"]
    assert unpaired["time ÷ ours"] == "≈ 2.0 ×", "two runs did not take turns"


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ("no time left", "400 ms ± 18 %"),
        ("missing", "400 ms ± 18 %"),
        ("unsupported", "400 ms ± 18 %"),
        ("mismatch", "❌ mismatch: why"),
        ("gated", "gated: why"),
        ("out of memory", "out of memory: why"),
    ],
)
def test_what_a_later_run_did_not_try_keeps_its_figures(save, status, shown):
    later = result(RACE[0], failed=[("slow peer", status, "why")])
    assert lines(save, result(*RACE[:2]), later)[1].cells[1] == shown


def test_devices_stay_apart(save):
    one, other, gpu = (result(RACE[0], device=device) for device in (CPU, {**CPU, "threads": 1}, GPU))
    paths = [save(data, f"{i}.json") for i, data in enumerate((one, other, gpu))]
    assert len(read_sections(paths)) == 3
    assert main([*map(str, paths), "--out", str(paths[0].parent / "out")]) == 0
    text = (paths[0].parent / "out" / "report.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["Some CPU, 2 threads", "Some CPU, 1 thread", r"Some GPU, sm\_90, 80.0 GiB"]
    assert len({p.name for p in (paths[0].parent / "out").glob("*.png")}) == 3


# --- files -----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page loads, whether its tags are balanced, and its text."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, text):
        super().__init__()
        self.loads, self.open, self.tags, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_is_written_beside_the_first_file(save):
    data = result(
        *RACE, bench(OURS, [0.2, 0.2, 0.2], size=8192), failed=FAILED, command="pytest https://x.y <b>"
    )
    path = save(data, "my run.json")
    assert main([str(path)]) == 0
    folder = path.parent / "my run"
    assert sorted(p.name for p in folder.iterdir()) == ["cpu-linear-forward.png", "report.html", "report.md"]

    text = (folder / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(COLUMNS) + 2}, (
        "no text breaks the table"
    )
    assert "| **❌ mismatch: output is off" in text and r"by \<b\>0.5\</b\> second line" in text
    assert "Complete run: pytest https://x.y" in text and "2026-01-02T03:04:05Z" in text
    assert "torch 2.13.0" in text and "cuda" not in text, "what is not installed is not listed"
    assert "copy 10.0 GB/s, float32 matrix product 0.100 TFLOP/s" in text
    assert "](cpu-linear-forward.png)" in text

    html = (folder / "report.html").read_text()
    page = Page(html)
    assert (
        page.open == []
        and "script" not in page.tags
        and "link" not in page.tags
        and "iframe" not in page.tags
    )
    assert len(page.loads) == 1 and page.loads[0].startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import", html)
    assert "by <b>0.5</b>" in page.text, "text of the results is shown, not interpreted"
    assert 'class="mismatch"' in html and "prefers-color-scheme: dark" in html


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
MEASURE = """<!doctype html><body><script>
onload = () => document.body.dataset.found = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument.documentElement, width = frame.clientWidth;
  const cells = [...page.querySelectorAll("td, td span, th, img")].map(cell => cell.getBoundingClientRect().right);
  return [width, page.scrollWidth, Math.max(...cells)];
}));
</script>%s</body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome, which lays out the page")
def test_everything_lies_on_the_page_at_any_width(save, tmp_path):
    why = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB. " * 2
    noisy = bench(
        "transformers grouped_mm with a long name", [1.2345, 12.5, 0.1], instead="something else", size=8192
    )
    data = result(*RACE, noisy, failed=[*FAILED, ("memory", "out of memory", why)])
    assert main([str(save(data)), "--out", str(tmp_path / "out")]) == 0
    html = escape((tmp_path / "out" / "report.html").read_text(), quote=True)
    widths = (1600, 1280, 1000, 961, 900, 600, 360)
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{html}"></iframe>' for width in widths)
    page = tmp_path / "page.html"
    page.write_text(MEASURE % frames)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [BROWSER, *options, profile, "--virtual-time-budget=5000", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(re.search(r'data-found="(.*?)"', dom)[1])
    assert [width for width, _, _ in found] == list(widths)
    for width, scroll, right in found:
        assert scroll <= width and right <= width, (
            f"at {width} px the page is {max(scroll, right):.0f} px wide"
        )


def test_a_partial_run_works_and_is_labelled(save):
    data = result(*RACE, complete=False)
    del data["benchmarks"][1]
    path = save(data)
    assert main([str(path)]) == 0
    text = (path.parent / "run" / "report.md").read_text()
    assert "## Some CPU, 2 threads (partial run)" in text and "Partial run: pytest benchmarks/" in text
    assert "the run ended before its figures were stored" in text
    assert "partial run</span>" in (path.parent / "run" / "report.html").read_text()


def test_plots_show_every_size_and_stay_small(save):
    from PIL import Image

    sizes = [
        bench(name, [scale * size] * 3, size=size)
        for size in (4096, 8192, 16384)
        for name, scale in ((OURS, 1e-5), ("peer", 1e-4), ("peer 2", 2e-4))
    ]
    alone = bench(OURS, [0.1] * 3, workload="long", describe="5,000 tokens, width 7", size=5000)
    sections = read_sections([save(result(*sizes, alone, bench(OURS, [0.2] * 3, direction="both")))])
    forward, both = plots(sections[0], "cpu", styles_of(sections))
    assert (forward.file, both.file) == ("cpu-linear-forward.png", "cpu-linear-both.png")
    path = save("", "plot.png")
    heights = []
    for plot, least in ((forward, 8), (both, 4)):
        path.write_bytes(plot.png)
        with Image.open(path) as image:
            assert image.width >= 800 and image.height >= 100
            heights.append(image.height)
            colors = {color for _, color in image.convert("RGB").getcolors()}
            assert any(max(abs(a - b) for a, b in zip(c, (0, 114, 178), strict=True)) < 12 for c in colors), (
                "ours"
            )
            assert len(image.convert("RGB").getcolors()) >= least, "lines, markers and text have colours"
        assert 3_000 < len(plot.png) < 150_000
    assert heights[0] > 2 * heights[1], "three sizes are a line; a single workload is a few bars"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, in order."""
    figures, png = [], plots_module._png
    monkeypatch.setattr(plots_module, "_png", lambda figure: figures.append(figure) or png(figure))
    return figures


def test_a_single_workload_is_bars_with_names_and_figures(save, drawn):
    sections = read_sections([save(result(*RACE))])
    (plot,) = plots(sections[0], "cpu", styles_of(sections))
    time_axes, memory_axes = drawn[0].axes
    assert not time_axes.lines and not memory_axes.lines
    names = [label.get_text() for label in time_axes.get_yticklabels()]
    assert names == [OURS, "other function", "slow peer", "floor (measured ceilings)"]
    assert [bar.get_width() for bar in time_axes.patches] == pytest.approx([100, 50, 400, 40])
    assert [text.get_text() for text in time_axes.texts] == [
        "100 ms ± 10 %",
        "50.0 ms ± 10 %",
        "400 ms ± 18 %",
        "40.0 ms",
    ]
    assert [bar.get_width() for bar in memory_axes.patches] == [3, 3, 3]
    assert (
        time_axes.patches[0].get_facecolor() == memory_axes.patches[0].get_facecolor() == to_rgba(OUR_COLOR)
    )
    assert not drawn[0].legends


def test_a_noisy_point_is_hollow_and_the_legend_says_so(save, drawn):
    spread = {4096: [0.1, 0.1, 0.1], 8192: [0.1, 0.2, 0.9]}
    sections = read_sections([save(result(*(bench(OURS, s, size=n) for n, s in spread.items())))])
    list(plots(sections[0], "cpu", styles_of(sections)))
    hollow = [line for line in drawn[0].axes[0].lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[8192]]
    assert "hollow: ± more than 20 %" in [text.get_text() for text in drawn[0].legends[0].texts]


def test_ours_have_one_colour_everywhere_and_no_peer_has_it(save):
    """Other providers may take part, in any suite and on any device."""
    peers = [f"peer {i}" for i in range(12)]
    cpu = [bench("vot-kernels A first in the alphabet", [0.1], suite="aoe"), bench(OURS, [0.1], suite="aoe")]
    cpu += [bench(name, [0.1], suite=suite) for suite in ("aoe", "linear") for name in [OURS, *peers[:7]]]
    gpu = [bench("vot-kernels triton", [0.1], suite="moe")] + [
        bench(p, [0.1], suite="moe") for p in peers[5:]
    ]
    sections = read_sections([save(result(*cpu), "a.json"), save(result(*gpu, device=GPU), "b.json")])
    styles = styles_of(sections)
    assert {style["color"] == OUR_COLOR for name, style in styles.items() if name.startswith("vot-")} == {
        True
    }
    assert OUR_COLOR not in {styles[name]["color"] for name in peers}
    assert len({styles[name]["color"] for name in peers[:7]}) == 7, "peers that meet have different colours"
    looks = {(s["color"], s["marker"], s["linestyle"]) for s in (styles[name] for name in peers[5:])}
    assert len(looks) == 7
    ours = [style for name, style in styles.items() if name.startswith("vot-")]
    assert len({(s["marker"], s["linestyle"]) for s in ours[:2]}) == 2, "backends of ours are told apart"
    assert styles[OURS]["linestyle"] == "-", "the one that is in most suites"


@pytest.mark.parametrize(
    ("sizes", "families"),
    [
        (
            (
                (4096, "ragged-4k", "4,096 tokens in 3 segments"),
                (8192, "ragged-8k", "8,192 tokens in 7 segments"),
            ),
            1,
        ),
        (
            ((64, "64-n8", "64 tokens of 256, 8 experts"), (2048, "2k-n8", "2,048 tokens of 256, 8 experts")),
            1,
        ),
        (
            (
                (2048, "2k-n8", "2,048 tokens of 256, 8 experts"),
                (4096, "4k-n16", "4,096 tokens of 256, 16 experts"),
            ),
            0,
        ),
        (((4096, "ragged-4k", "4,096 tokens"), (8192, "one-8k", "8,192 tokens")), 0),
        (((4096, "a-4k", "4,096 tokens"), (4096, "b-4k", "4,096 tokens")), 0),
    ],
)
def test_a_line_joins_only_what_differs_in_size_alone(save, sizes, families):
    entries = [bench(OURS, [0.1] * 3, size=n, workload=name, describe=text) for n, name, text in sizes]
    (section,) = read_sections([save(result(*entries))])
    found = families_of(section, "linear", "forward")
    assert sum(family.is_line for family in found) == families
    assert sum(len(family.races) for family in found) == len(sizes), "everything is drawn"
    assert all(family.xs == sorted(family.xs) for family in found)


def test_plots_without_matplotlib_say_what_to_install(save, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main([str(save(result(*RACE)))]) == 1
    assert "pip install 'vot-kernels[bench]'" in capsys.readouterr().err


# --- what is refused -------------------------------------------------------------------------------------


def _with(**changes):
    data = result(*RACE)
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = data
        for parent in parents:
            place = place[int(parent) if parent.isdigit() else parent]
        if value is None:
            del place[key]
        else:
            place[key] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "is not JSON"),
        ('{"benchmarks": [', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "no object 'vot_kernels'"),
        ({"benchmarks": []}, "no object 'vot_kernels'"),
        ({"vot_kernels": 3}, "no object 'vot_kernels'"),
        (_with(vot_kernels__schema=2), "schema 2; this version reads schema 1"),
        (_with(vot_kernels__schema=None), "schema None"),
        (_with(vot_kernels__device=None), "the key 'device' is missing"),
        (_with(vot_kernels__outcomes=None), "the key 'outcomes' is missing"),
        (_with(benchmarks=None), "the key 'benchmarks' is missing"),
        (_with(vot_kernels__outcomes__0__status="fine"), "'fine' is not a valid Status"),
        (_with(benchmarks__0__stats__data=[0.1, 0.0]), "not a positive number"),
        (_with(benchmarks__0__stats__data=[0.1, float("nan")]), "not a positive number"),
        (_with(benchmarks__0__stats__data="fast"), "not a positive number"),
        (_with(vot_kernels__outcomes__0__size="4k"), "'4k' is not a count"),
        (_with(benchmarks__0__extra_info__suite=7), "not all text"),
        (_with(benchmarks__0__extra_info__provider="stray"), "linear 4k forward stray without an outcome"),
        (_with(vot_kernels__device=[1]), "a part of it has the wrong type"),
        (_with(benchmarks={"a": 1}), "a part of it has the wrong type"),
        (_with(vot_kernels__ceilings__copy_bytes_per_s=-1), "not a positive number"),
    ],
)
def test_a_broken_file_is_refused_by_name(save, capsys, data, message):
    path = save(data, "broken.json")
    with pytest.raises(BrokenResult, match="broken.json"):
        read_result(path)
    assert main([str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error and str(path) in error and error.count("\n") == 1
    assert not (path.parent / "broken").exists(), "nothing is written"


def test_missing_files_and_folders_are_refused(tmp_path, capsys):
    assert main([str(tmp_path / "none.json")]) == 1
    assert "none.json cannot be read: No such file" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    assert "cannot be read: Is a directory" in capsys.readouterr().err
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    assert main([str(tmp_path / "bytes.json")]) == 1
    assert "bytes.json is not JSON" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder_is_not_overwritten(save, capsys):
    taken = save("mine", "taken")
    assert main([str(save(result(*RACE))), "--out", str(taken)]) == 1
    assert "is not a folder" in capsys.readouterr().err and taken.read_text() == "mine"


@pytest.mark.parametrize("arguments", [["--check", "run.json"], ["--out", "x"], ["--format", "pdf"]])
def test_wrong_arguments_show_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and "usage: python -m benchmarks.report" in capsys.readouterr().err


# --- tables of the README --------------------------------------------------------------------------------


@pytest.fixture
def committed(save, tmp_path, monkeypatch):
    """A README and a folder of results of its own."""
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "PAGES", [tmp_path / "README.md"])
    save(result(*RACE, failed=FAILED), "cpu-some.json")
    marked = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("cpu", "gpu"))
    readme.PAGES[0].write_text(f"before\n{marked}after\n")
    assert main([]) == 0
    return readme.PAGES[0]


def test_readme_names_every_timed_peer(committed):
    text = committed.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    (line,) = [line for line in text.splitlines() if "tokens" in line]
    what = "| `linear_attention` forward: 4,096 tokens in 1 segment, 8 heads of 64, float32 | 100 ms, torch | 40 % | "
    assert line == what + "**4.0 ×** slow peer | 0.50 × other function |"
    assert "Some CPU, 2 threads, torch 2.13.0. Ours is the fastest backend of vot-kernels." in text
    assert "which a kernel may exceed: copy 10.0 GB/s, float32 matrix product 0.100 TFLOP/s;" in text
    assert "for context alone: exact softmax (other function)." in text


def test_readme_shows_what_our_other_backends_take_and_which_instructions_ran(save, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    plain = "equal-parameter MoE (vot-kernels)"
    race = (
        bench("vot-kernels cpp", [0.04, 0.05, 0.06]),
        *RACE,
        bench(plain, [0.008, 0.01, 0.012], instead="a plain MoE", ours=True),
    )
    save(result(*race, device={**CPU, "cpp_isa": "avx512"}), "cpu-some.json")
    text = readme.cpu_table()
    others = "**2.0 ×** vot-kernels torch<br>**8.0 ×** slow peer"
    assert f"| 50.0 ms, cpp | 80 % | {others} | 0.20 × {plain}<br>1.00 × other function |" in text
    assert "Some CPU, 2 threads, C++ kernels for avx512, torch" in text
    assert f"exact softmax (other function); a plain MoE ({plain})" in text


def test_readme_shows_the_largest_of_each_op_and_direction_and_half_of_it(save, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    cases = [(1024, "forward"), (8192, "forward"), (2048, "forward"), (4096, "forward"), (2048, "both")]
    save(result(*(bench(OURS, [0.1], size=n, direction=d) for n, d in cases)), "cpu-some.json")
    shown = [line for line in readme.cpu_table().splitlines() if "tokens" in line]
    assert [re.search(r"[\d,]+(?= tokens)", line)[0] for line in shown] == ["4,096", "8,192", "2,048"]


def test_gpu_figures_appear_when_there_are_any(committed, save):
    assert "No figures have been measured on a GPU yet." in committed.read_text()
    save(result(*RACE, device=GPU, complete=False), "gpu-some.json")
    assert main(["--check"]) == 1 and main([]) == 0 and main(["--check"]) == 0
    text = committed.read_text()
    assert "No figures" not in text and r"Partial run. Some GPU, sm\_90" in text


@pytest.mark.parametrize(
    ("old", "new"), [("**4.0 ×**", "**4.1 ×**"), ("| 100 ms, torch |", "| 90 ms, torch |")]
)
def test_check_fails_for_an_edited_figure(committed, capsys, old, new):
    assert main(["--check"]) == 0
    text = committed.read_text()
    assert old in text
    committed.write_text(text.replace(old, new))
    assert main(["--check"]) == 1
    assert "README.md differs from the results in: cpu" in capsys.readouterr().err
    assert new in committed.read_text(), "--check writes nothing"


def test_check_refuses_a_broken_result_by_name(committed, save, capsys):
    save("{", "cpu-other.json")
    assert main(["--check"]) == 1
    assert "cpu-other.json is not JSON" in capsys.readouterr().err


def test_who_was_timed_alone_is_not_paired(save):
    data = result(*RACE)
    data["vot_kernels"]["outcomes"][1]["notes"] = {"alone": True}
    found = {cells(line)["provider"]: cells(line)["time ÷ ours"] for line in lines(save, data)}
    assert found["slow peer"] == "≈ 4.0 ×"


# --- parts of one run --------------------------------------------------------------------------------------


def test_parts_become_one_result(save, tmp_path):
    first = result(*RACE, failed=FAILED)
    second = result(bench(OURS, [0.2, 0.3], suite="hybrid"))
    second["vot_kernels"]["ceilings"]["matmul_flops_per_s"] = {"bfloat16": 5e11, "float32": 9e11}
    out = tmp_path / "whole.json"
    assert (
        merge.main([str(out), str(save(first, "a.json")), str(save(second, "b.json")), "--command", "c"]) == 0
    )
    run, rows = read_result(out)
    assert run.complete and run.command == "c"
    assert run.matmul_flops_per_s == {"bfloat16": 5e11, "float32": 1e11}
    assert [(row.suite, row.provider) for row in rows][-1] == ("hybrid", OURS)
    assert len(rows) == len(RACE) + len(FAILED) + 1


def test_a_missing_or_partial_part_makes_the_whole_partial(save, tmp_path, capsys):
    out, good = tmp_path / "whole.json", save(result(*RACE), "a.json")
    assert merge.main([str(out), str(good), str(save("{", "b.json"))]) == 1
    assert "b.json is not JSON" in capsys.readouterr().err
    assert not read_result(out)[0].complete
    partial = save(result(*RACE, complete=False), "c.json")
    assert merge.main([str(out), str(partial)]) == 1 and not read_result(out)[0].complete
    assert merge.main([str(tmp_path / "none.json"), str(tmp_path / "absent.json")]) == 2
    assert not (tmp_path / "none.json").exists()
