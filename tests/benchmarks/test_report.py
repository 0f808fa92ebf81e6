"""The HTML page: hostile names stay text, gaps stay gaps, marks lie where their numbers are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from specdec.benchmarks.charts import bar_chart, interval_chart, legend, line_chart, ticks
from specdec.benchmarks.report import STYLE, command_text, equal_text, write_html
from specdec.benchmarks.schema import BenchResult

EXAMPLE = Path(__file__).with_name("example_result.json")
HOSTILE = "</title></style><script>alert(1)</script>\"'><img src=x onerror=y>&amp;"
VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """Tags of a page, checked to be balanced, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.tags if name == tag)


@pytest.fixture
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    return found


@pytest.fixture
def render(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    def to_text(result: dict[str, Any]) -> str:
        write_html(result, tmp_path / "page.html")
        assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
        return (tmp_path / "page.html").read_text(encoding="utf-8")

    return to_text


def test_example_is_what_the_benchmark_writes(result: dict[str, Any]) -> None:
    assert BenchResult.from_json(result).to_json() == result


def test_page_shows_what_ran_and_the_figures(result: dict[str, Any], render: Callable[..., str]) -> None:
    text = Page(render(result)).text
    for shown in (
        "example/made-by-hand", "bfloat16", "Example CPU", "2 threads", "2000-01-02T03:04:05", result["commit"],
        result["questions"]["sha256"], "--drafter 'one two'", "1.50 [1.25, 2.00]", "1.62 [1.38, 1.88]", "3 of 4",
        "2 of 3 compared", "ngram (max_nodes=16)", "135.0 ms",
    ):  # fmt: skip
        assert shown in text, shown
    assert "busy" not in text


def test_busy_machine_is_said(result: dict[str, Any], render: Callable[..., str]) -> None:
    result["machine"]["load_at_start"] = 2.34
    assert "busy: load 2.3" in Page(render(result)).text


def hostile(value: Any) -> Any:
    """Every key of figures and every text made hostile."""
    if isinstance(value, dict):
        return {name: hostile(part) for name, part in value.items()}
    if isinstance(value, list):
        return [hostile(part) for part in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_text_stays_text_wherever_it_comes_from(result: dict[str, Any], render: Callable[..., str]) -> None:
    clean = Page(render(result))
    summary = result["summary"]
    for figures in (summary["overall"], *summary["categories"].values()):
        figures[HOSTILE] = figures.pop("alpha")
    summary["overall"][HOSTILE]["milliseconds_per_pass"][HOSTILE] = 1.0
    summary["categories"][HOSTILE] = summary["categories"].pop("writing")
    result["versions"][HOSTILE] = "1"
    spared = {name: result[name] for name in ("schema", "kind", "summary", "versions")}
    text = render(hostile(result) | spared)
    page = Page(text)
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in clean.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script" not in text
    assert text.count("</style>") == 1
    assert unescape(page.text).count("<script>alert(1)</script>") > 8


def test_page_fetches_nothing_and_has_no_script(result: dict[str, Any], render: Callable[..., str]) -> None:
    text = render(result)
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|@import", text)
    assert set(re.findall(r"url\((.*?)\)", text)) <= {f"#texture-{index}" for index in range(9)}
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))


def test_every_chart_is_named_and_every_table_has_heads(result: dict[str, Any], render: Callable[..., str]) -> None:
    page = Page(render(result))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    charts = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(charts) == 4
    for chart in charts:
        assert set((chart["aria-labelledby"] or "").split()) <= set(ids)
    assert all(head.get("scope") in ("col", "row", "rowgroup") for head in page.all("th"))
    boxes = [box for box in page.all("div") if box.get("class") == "scroll"]
    assert len(boxes) == len(list(page.all("table"))) == 7
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def without_figures(value: Any) -> Any:
    """Everything of the summary null but labels, categories and counts."""
    if not isinstance(value, dict) or "median" in value:
        return None
    kept = ("num_runs", "emitted", "equal_runs", "differing_runs")
    return {name: part if name in kept else without_figures(part) for name, part in value.items()}


def test_missing_figures_leave_dashes_and_no_charts(result: dict[str, Any], render: Callable[..., str]) -> None:
    result["summary"] = without_figures(result["summary"])
    for name in ("commit", "bandwidth_gb_s", "weight_bytes"):
        result[name] = None
    result["machine"] = dict.fromkeys(result["machine"])
    result["settings"]["dtype"] = None
    text = Page(render(result)).text
    assert "None" not in text
    assert "unknown precision on an unknown machine" in text
    assert "Not measured." in text
    assert "Nothing was measured." in text  # the speed-up chart's description
    assert "Acceptance by depth" not in text
    assert "Time per pass" not in text


def test_plain_decoding_alone_has_no_speed_up_chart(result: dict[str, Any], render: Callable[..., str]) -> None:
    summary = result["summary"]
    for figures in (summary["overall"], *summary["categories"].values()):
        for label in set(figures) - {"none"}:
            del figures[label]
    text = render(result)
    assert "Speed-up by category" not in text
    assert "Time per pass" in text


@pytest.mark.parametrize(("field", "value"), [("kind", "peers"), ("schema", 2)])
def test_another_kind_or_schema_is_refused(result: dict[str, Any], field: str, value: Any, tmp_path: Path) -> None:
    result[field] = value
    with pytest.raises(ValueError, match=f"got .*{value}"):
        write_html(result, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_texts_that_were_not_compared_are_no_failures() -> None:
    figures = {"num_runs": 4, "equal_runs": 0, "differing_runs": 0}
    assert equal_text("x", figures) == "not compared"
    assert equal_text("none", figures) == ""


def test_command_is_quoted_for_a_shell() -> None:
    assert command_text(["a", "b c", "d\ne", "--x=1"]) == "a 'b c' 'd e' --x=1"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.93, 1.07, [0.9, 0.95, 1.0, 1.05, 1.1]),
        (0, 7000, [0, 2000, 4000, 6000, 8000]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_intervals_lie_at_their_ratios() -> None:
    # 0.5 to 2.0 with room is 0.44 to 2.06: ticks every 0.25 from 0.25 to 2.25
    chart = interval_chart(
        "c", "t", [("math", {"x": {"median": 1.25, "low": 0.5, "high": 2.0}, "y": None})], ["x", "y"]
    )
    assert '<line x1="12.50%" x2="87.50%"' in chart
    assert '<svg x="50.00%"' in chart
    assert '<line class="reference" x1="37.50%" x2="37.50%"' in chart
    assert "math: x 1.25 [0.50, 2.00]." in chart
    assert chart.count('class="s') == 1


def test_one_point_that_equals_the_reference_is_drawn() -> None:
    assert '<svg x="50.00%"' in interval_chart(
        "c", "t", [("a", {"x": {"median": 1.0, "low": 1.0, "high": 1.0}})], ["x"]
    )


def test_bars_end_where_the_next_part_begins() -> None:
    chart = bar_chart("c", "t", {"x": {"a": 25.0, "b": 75.0}, "y": {"b": 50.0}}, ["a", "b"])
    places = re.findall(r'<rect class="s(\d)" x="(.*?)%" .*?width="(.*?)%"', chart)
    assert places == [("0", "0.00", "25.00"), ("1", "25.00", "75.00"), ("0", "0.00", "0.00"), ("1", "0.00", "50.00")]


def test_lines_rise_with_their_values() -> None:
    chart = line_chart("c", "t", {"x": [(0.0, 0.0), (1.0, 1.0)]}, x_labels=[], y_most=1.0, height=100)
    assert 'x1="0.00%" y1="108.0" x2="100.00%" y2="8.0"' in chart


def test_sixteen_series_are_told_apart_without_colour() -> None:
    marks = re.findall(r'<path d="(.*?)" fill="(.*?)"', legend([str(number) for number in range(16)]))
    assert len(set(marks)) == 16


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_meets_wcag_aa(scheme: int) -> None:
    block = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w{6});", block))
    for behind in ("page", "box"):
        for text in ("text", "quiet"):
            assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
    for number in range(8):
        assert contrast(colours[f"s{number}"], colours["page"]) >= 3.0, number


def test_categories_slower_than_allowed_are_said(result: dict[str, Any], render: Callable[..., str]) -> None:
    slow = {"median": 0.9, "low": 0.8, "high": 0.95}
    result["summary"]["floor"] = {"required": 0.97, "below": [["ngram", "a <b>", slow]]}
    assert "slower than 0.97 times plain decoding: ngram in a &lt;b&gt; 0.90 [0.80, 0.95]." in render(result)
    result["summary"]["floor"]["below"] = []
    assert "every category of every drafter is at least 0.97 times as fast" in render(result)
    del result["summary"]["floor"]
    assert "at least 0.97" not in render(result)
