# SPDX-License-Identifier: Apache-2.0
"""What reports have in common: tables that hold any text, and figures that show all that they are given."""

from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from jai import JaiConfig
from jai.reports import (
    SERIES,
    BlockCopy,
    ReportTable,
    figure_style,
    layer_plan_svg,
    line_chart_svg,
    router_load_svg,
    series_color,
)

SVG = "{http://www.w3.org/2000/svg}"
LOAD = [[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]]
CELLS = ["plain", "a|b", "<i>x</i>", "<|user|>", "two\nlines", "", "ภาษาไทย"]


# Tables


def cells_of(html: str) -> list[str]:
    """The text of every cell of the only table in a page, as a browser reads it."""
    table = ElementTree.fromstring(html[html.index("<table>") : html.index("</table>") + len("</table>")])
    return ["".join(cell.itertext()) for row in table.iter("tr") for cell in row]


def test_any_text_stays_in_its_cell():
    table = ReportTable(["name", *CELLS], [["x", *CELLS], ["y", *reversed(CELLS)]])
    expected = ["name", *CELLS, "x", *CELLS, "y", *reversed(CELLS)]
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(table.markdown())
    assert cells_of(rendered) == [cell.replace("\n", " ") for cell in expected]
    assert cells_of(table.html()) == expected


def test_numbers_stand_right():
    table = ReportTable(["", "loss"], [["a", "1.5"]], numbers=True)
    assert table.markdown() == "| | loss |\n| --- | ---: |\n| a | 1.5 |"


def test_the_series_begin_again():
    colors = [series_color(number) for number in range(2 * len(SERIES))]
    assert colors == [*SERIES, *SERIES]
    assert len(set(SERIES)) == len(SERIES)


def test_the_style_ends_with_the_block():
    import matplotlib as mpl

    before = mpl.rcParams["axes.prop_cycle"]
    with figure_style():
        assert mpl.rcParams["axes.prop_cycle"].by_key()["color"] == list(SERIES)
    assert mpl.rcParams["axes.prop_cycle"] == before


# Figures


def rows_of(config: JaiConfig) -> list[BlockCopy]:
    return [
        BlockCopy(planned.block, planned.copy, config.block_repeats[planned.block], str(planned.layer),
                  str(planned.origin), 0.1 if planned.copy else None)
        for planned in config.running_plan
        if planned.opens_copy
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "boxes", "arcs"),
    [
        (JaiConfig(), 16, 6),
        (JaiConfig(block_size=1, block_repeats=[1, 20, 1]), 22, 19),
        (JaiConfig(block_size=1, block_repeats=[1] * 40), 40, 0),
    ],
)
def test_the_plan_shows_every_run_and_every_skip(config, boxes, arcs):
    rows = rows_of(config)
    figure = ElementTree.fromstring(layer_plan_svg(rows))
    drawn = figure.findall(f"{SVG}rect")[1:]  # the first is the background
    assert len(drawn) == boxes == len(rows)
    assert len([path for path in figure.findall(f"{SVG}path") if "marker-end" in path.attrib]) == arcs
    texts = [text.text for text in figure.findall(f"{SVG}text")]
    assert [text for text in texts if text.startswith("α")] == ["α 0.1"] * arcs
    assert [text for text in texts if text.startswith("of")] == [f"of {row.origins}" for row in rows]
    blocks = [text.removeprefix("block ") for text in texts if text.removeprefix("block ").isdigit()]
    assert {str(number) for number in range(1, len(config.block_repeats) + 1)} <= set(blocks)
    width, height = map(float, figure.attrib["viewBox"].split()[2:])
    places = []
    for box in drawn:
        x, y, w, h = (float(box.attrib[key]) for key in ("x", "y", "width", "height"))
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
        places.append((y, x))
    assert places == sorted(set(places))  # in reading order, none over another


def test_the_router_load_is_darker_where_it_is_higher():
    figure = ElementTree.fromstring(router_load_svg({"Thai": LOAD, "<English>": LOAD}))
    cells = figure.findall(f"{SVG}rect")[1:]
    assert len(cells) == 2 * 4 * 4
    found = {cell.find(f"{SVG}title").text: float(cell.attrib["fill-opacity"]) for cell in cells[:16]}
    assert found["layer 2, expert 0: 70 %"] > found["layer 0, expert 0: 40 %"] > found["layer 0, expert 3: 10 %"]
    assert "<English>" in [text.text for text in figure.findall(f"{SVG}text")]


def test_a_chart_draws_every_series_and_says_how_many_it_does_not_name():
    series = {f"<{number}>": [(10.0, 1.0 + number), (20.0, 2.0 + number)] for number in range(13)}
    series["<1>"] += [(30.0, float("nan")), (40.0, float("inf"))]
    series["<2>"] = [(15.0, 2.5)]
    figure = ElementTree.fromstring(line_chart_svg("loss", series))
    lines = figure.findall(f"{SVG}polyline")
    assert [line.find(f"{SVG}title").text for line in lines] == [*series]
    assert [len(line.attrib["points"].split()) for line in lines] == [
        2,
        2,
        1,
        *[2] * 10,
    ]  # what is not finite is left out
    assert len(figure.findall(f"{SVG}circle")) == 1  # a line of one point would not be seen
    texts = [text.text for text in figure.findall(f"{SVG}text")]
    assert texts[:5] == [
        "loss",
        "1",
        "14",
        "10",
        "20",
    ]  # the smallest and the largest value, the first and the last step
    assert texts[5:] == ["<0>: 2", "<1>: 3", "<2>: 2.5", *(f"<{n}>: {n + 2}" for n in range(3, 11)), "and 2 more"]
