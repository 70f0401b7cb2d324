"""The HTML report: what it shows, that nothing in a text can break out of it, and how it is written."""

from __future__ import annotations

import itertools
import json
import os
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from pyqe.report import ReportTable, render_report, write_report

VOID = {"meta", "link", "input"}
NASTY = [
    "</script><script>alert(1)</script>",
    "<b>bold</b> & &amp; &lt; \"double\" 'single'",
    "<!-- <script> --> ]]> <![CDATA[",
    "\n\tleading newline and tab,  two spaces \n\n",
    "carriage\r\nreturn\rhere",
    "שלום, \u202eevil\u202c مرحبا",
    "👩‍🚀 🎉 ñ ñ \u2028 \u2029",
    "{{ 7 * 7 }} {% raw %} {# no #}",
    "' onmouseover='alert(1)' \" onfocus=\"alert(1)",
]


class Page(HTMLParser):
    """Collects texts by class, all attributes and scripts; fails on tags that don't balance."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.by_class: dict[str, list[str]] = {}
        self.by_tag: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"an attribute of <{tag}> appears twice"
        self.tags.append((tag, attributes))
        if tag in VOID:
            return
        classes = attributes.get("class") or ""
        self.open.append((tag, classes))
        for name in classes.split():
            self.by_class.setdefault(name, []).append("")
        self.by_tag.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for tag, classes in self.open:
            self.by_tag[tag][-1] += data
            for name in classes.split():
                self.by_class[name][-1] += data

    def token_spans(self) -> list[dict[str, str | None]]:
        """Attributes of the spans in the heat map, in order."""
        return [a for tag, a in self.tags if tag == "span" and re.match(r"q[0-9n]\b", a.get("class") or "")]

    def data(self) -> dict[str, Any]:
        """The JSON block of the page."""
        number = [a.get("id") for tag, a in self.tags if tag == "script"].index("data")
        data: dict[str, Any] = json.loads(self.by_tag["script"][number])
        return data


def record(text: str, quality: list[float | None] | None = None, **fields: Any) -> dict[str, Any]:
    """A scored text with a token for each character."""
    count = len(text)
    return {
        "text": text,
        "tokens": list(text),
        "token_ids": list(range(count)),
        "offsets": [[i, i + 1] for i in range(count)],
        "token_quality": quality if quality is not None else [0.5] * count,
        "token_prob": [0.25] * count,
        "quality": 0.5,
        "status": "ok",
        **fields,
    }


def grouped(text: str, tokens: list[str], offsets: list[Any] | None, **fields: Any) -> dict[str, Any]:
    """A scored text with the given tokens."""
    return {"text": text, "tokens": tokens, "offsets": offsets, **fields}


@pytest.mark.parametrize("text", NASTY)
def test_text_is_shown_exactly(text: str) -> None:
    page = Page(render_report([record(text, prompt=text, errors=[[1, len(text) - 1]])]))
    assert page.by_class["tokens"] == [text]
    assert page.by_class["prompt"] == [text]
    assert page.data()["texts"][0]["t"] == list(text)


@pytest.mark.parametrize("text", NASTY)
def test_no_field_adds_markup(text: str) -> None:
    def render(value: str) -> str:
        fields = {"id": value, "prompt": value, "status": value, "reason": value, "finish_reason": value}
        table = ReportTable(value, [value, "a"], [[value, 0.5]], note=value)
        whole = {"tokens": ["x" + value], "offsets": [[0, 1]], "token_quality": [0.5]}
        texts = [{"text": "x", **whole, **fields}]
        return render_report(texts, title=value, summary={value: value}, tables=[table])

    expected, page = Page(render("plain")), Page(render(text))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in expected.tags]
    assert [sorted(a) for _, a in page.tags] == [sorted(a) for _, a in expected.tags]
    assert page.by_tag["h1"] == [text]


def test_control_characters_and_lone_surrogates_are_replaced() -> None:
    page = render_report([record("a\x00b\x1bc\x7f\ud800d")])
    assert Page(page).by_class["tokens"] == ["a␀b␛c␡\ufffdd"]
    assert Page(page).data()["texts"][0]["t"][1] == "\x00"
    page.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", page)


def test_tokens_on_the_same_characters_share_a_span() -> None:
    tokens = ["a", "<F0>", "<9F>", "<8E>", "b"]
    offsets = [[0, 1], [1, 2], [1, 2], [1, 2], [2, 3]]
    text = grouped("a🎉b", tokens, offsets, token_quality=[0.95, 0.9, 0.15, 0.8, 0.85])
    page = Page(render_report([text]))
    assert page.by_class["tokens"] == ["a🎉b"]
    spans = page.token_spans()
    assert [span["class"] for span in spans] == ["q9", "q1", "q8"]
    assert spans[1]["title"] == "sigmoid 0.900, 0.150, 0.800"
    assert page.data()["texts"][0]["n"] == [1, 3, 1]


@pytest.mark.parametrize(
    ("offsets", "sizes"),
    [
        ([[0, 2], [1, 3], [3, 4]], [2, 1]),
        ([[0, 4], [1, 2], [2, 3]], [3]),
        ([[2, 4], [0, 2], [0, 1]], [3]),
        ([[0, 0], [0, 2], [4, 4]], [1, 1, 1]),
        ([None, [0, 2], None], [1, 1, 1]),
        ([[1, 2], [2, 2], [3, 4]], [1, 1, 1]),
    ],
)
def test_any_offsets_show_the_text_once(offsets: list[list[int] | None], sizes: list[int]) -> None:
    page = Page(render_report([grouped("abcd", ["x", "y", "z"], offsets, token_quality=[0.1, 0.5, 0.9])]))
    assert page.by_class["tokens"] == ["abcd"]
    assert page.data()["texts"][0].get("n", [1, 1, 1]) == sizes
    assert len(page.token_spans()) == len(sizes)


def test_characters_outside_tokens_have_no_colour() -> None:
    page = render_report([grouped("ab cd!", ["ab", "cd"], [[0, 2], [3, 5]], token_quality=[0.1, 0.1])])
    assert re.search(r">ab</span> <span[^>]*>cd</span>!</div>", page)


def test_tokens_without_offsets() -> None:
    page = Page(render_report([grouped("ab cd", ["ab", " cd"], None, token_quality=[0.1, 0.9])]))
    assert page.by_class["tokens"] == ["ab cd"]
    assert "plain" not in page.by_class
    page = Page(render_report([grouped("ab cd", ["ab", "Ġcd"], None, token_quality=[0.1, 0.9])]))
    assert page.by_class["plain"] == ["ab cd"]
    assert page.by_class["tokens"] == ["abĠcd"]
    assert [span["class"] for span in page.token_spans()] == ["q1", "q9"]


def test_missing_scores_never_look_sure() -> None:
    quality = [None, float("nan"), 0.0, 1.0, float("inf")]
    page = Page(render_report([record("abcde", quality)]))
    assert [span["class"] for span in page.token_spans()] == ["qn", "qn", "q0", "q9", "qn"]
    assert page.data()["texts"][0]["quality"] == [None, None, 0.0, 1.0, None]
    assert "3 tokens without a score" in page.by_class["facts"][0]
    assert len(page.by_class["context"]) == 2


def test_a_group_with_a_missing_score_is_hatched() -> None:
    text = grouped("é", ["<C3>", "<A9>"], [[0, 1], [0, 1]], token_quality=[0.95, None])
    assert [span["class"] for span in Page(render_report([text])).token_spans()] == ["q9 h"]


def test_quality_of_nan_is_no_score() -> None:
    page = render_report([record("a", quality=[0.9]) | {"quality": float("nan")}])
    assert '<b class="chip qn">–</b>' in page


def test_only_signals_that_exist_can_be_chosen() -> None:
    def choices(**fields: Any) -> list[str | None]:
        page = Page(render_report([{"text": "ab", "tokens": ["a", "b"], **fields}]))
        return [a["value"] for tag, a in page.tags if tag == "input" and a.get("type") == "radio"]

    assert choices() == []
    assert choices(token_prob=[0.1, None], token_quality=[None, None]) == ["prob"]
    assert choices(token_entropy=[0.1, 2.0], token_quality=[0.2, 0.3]) == ["quality", "entropy"]
    assert choices(token_boosted_prob=[0.1, 0.2], token_max_prob=[0.5, 0.5]) == ["boosted"]


def test_entropy_is_coloured_the_other_way_round() -> None:
    text = {"text": "abc", "tokens": ["a", "b", "c"], "token_entropy": [0.0, 2.0, 3.96]}
    page = Page(render_report([text]))
    assert [span["class"] for span in page.token_spans()] == ["q9", "q5", "q0"]
    assert page.data()["signals"] == [{"key": "entropy", "label": "Entropy", "low": True, "max": 4.0}]
    assert page.by_class["context"] == ["abc"] * 3
    assert page.by_class["chip"][1:] == ["c", "b", "a"]  # the first is the overall quality


def test_least_sure_places_are_sorted_and_linked() -> None:
    texts = [record("ab", [0.4, 0.1]), record("cd", [0.3, 0.1])]
    page = Page(render_report(texts, worst=3))
    links = [a["href"] for tag, a in page.tags if tag == "a" and (a["href"] or "").startswith("#p")]
    assert links == ["#places", "#p1-2", "#p2-2", "#p2-1"]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link} <= set(ids)
    assert "places" not in [a.get("id") for _, a in Page(render_report(texts, worst=0)).tags]


def test_least_sure_places_use_softmax_without_sigmoid() -> None:
    text = {"text": "ab", "tokens": ["a", "b"], "token_prob": [0.7, 0.2]}
    assert Page(render_report([text], worst=1)).by_class["chip"] == ["–", "b"]


def test_known_errors_are_marked_across_tokens() -> None:
    text = grouped("one two", ["one", " two"], [[0, 3], [3, 7]], token_quality=[0.5, 0.5])
    page = Page(render_report([text | {"errors": [[2, 5], [4, 6]]}]))
    assert page.by_tag["u"][1:] == ["e", " tw"]  # the first is in the legend
    assert page.data()["texts"][0]["w"] == [0, 1]
    assert page.by_class["tokens"] == ["one two"]


def test_histogram_counts() -> None:
    text = record("abcd", [0.0, 0.049, 0.05, 1.0], token_prob=[0.5, None, 0.5, 0.999])
    page = Page(render_report([text]))
    cells = page.by_tag["td"]
    counts = {cells[i]: [int(cell) for cell in cells[i + 1 : i + 3]] for i in range(0, len(cells), 3)}
    assert len(counts) == 20
    assert counts["0.00–0.05"] == [2, 0]
    assert counts["0.05–0.10"] == [1, 0]
    assert counts["0.50–0.55"] == [0, 2]
    assert counts["0.95–1.00"] == [1, 1]
    assert sum(sum(pair) for pair in counts.values()) == 7


def test_tables_and_summary() -> None:
    rows: list[list[object]] = [["sigmoid", 0.81236], ["softmax", "0.72"]]
    table = ReportTable("AUROC", ["signal", "AUROC"], rows, note="n = 3")
    page = Page(render_report([record("a")], summary={"Model": "tiny"}, tables=[table]))
    assert page.by_tag["dt"] == ["Model"]
    assert page.by_tag["dd"] == ["tiny"]
    assert page.by_tag["td"][:4] == ["sigmoid", "0.8124", "softmax", "0.72"]
    with pytest.raises(ValueError, match=r"table 'T': rows\[1\] must have 2 cells.* got 1"):
        ReportTable("T", ["a", "b"], [[1, 2], [3]])


def test_status_and_reason_are_shown_where_not_ok() -> None:
    failed: dict[str, Any] = {"text": "", "tokens": [], "status": "failed", "reason": "out of memory"}
    page = Page(render_report([record("a"), failed]))
    assert page.by_class["status"] == ["failed"]
    assert page.by_class["reason"] == ["out of memory"]
    assert "1 text not fully scored" in page.by_class["facts"][0]


def test_nothing_to_show() -> None:
    page = Page(render_report([], title="Empty"))
    assert page.by_tag["h1"] == ["Empty"]
    assert "nothing to show" in page.by_class["lead"][0]
    assert "script" not in page.by_tag


def test_page_refers_to_nothing_outside() -> None:
    page = render_report([record("abc", errors=[[0, 1]])], summary={"a": "b"})
    page = page.replace('<meta http-equiv="Content-Security-Policy"', "")
    for outside in ("http", "src=", "@import", "url(", "//"):
        script_comments_aside = re.sub(r"^\s*//.*$|(?<=[;{]) // .*$", "", page, flags=re.MULTILINE)
        assert outside not in script_comments_aside


def test_page_structure() -> None:
    page = Page(render_report([record("abc"), record("d")]))
    assert next(a for tag, a in page.tags if tag == "html")["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    labelled = {a["for"] for tag, a in page.tags if tag == "label" and "for" in a}
    assert labelled <= {a.get("id") for _, a in page.tags}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_quality": [0.1]}, r"texts\[1\]: token_quality must have 2 entries.* got 1"),
        ({"token_prob": [0.1] * 3}, r"texts\[1\]: token_prob must have 2 entries.* got 3"),
        ({"token_ids": []}, r"texts\[1\]: token_ids must have 2 entries.* got 0"),
        ({"offsets": [[0, 1]]}, r"texts\[1\]: offsets must have 2 entries.* got 1"),
        ({"offsets": [[0, 1], [1, 3]]}, r"texts\[1\]: offsets\[1\] must be .* <= 2.* got \[1, 3\]"),
        ({"offsets": [[1, 0], [1, 2]]}, r"texts\[1\]: offsets\[0\]"),
        ({"errors": [[0, 9]]}, r"texts\[1\]: errors\[0\]"),
        ({"token_quality": [0.1, 7.5]}, r"texts\[1\]: token_quality\[1\] must be between 0 and 1, got 7.5"),
        ({"token_entropy": [0.1, -1.0]}, r"texts\[1\]: token_entropy\[1\] must be 0 or more"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_report([record("ab"), record("ab") | fields])


def test_bad_types_are_named() -> None:
    with pytest.raises(TypeError, match=r"texts\[0\]: text must be a string, got NoneType"):
        render_report([{"text": None, "tokens": []}])
    with pytest.raises(TypeError, match=r"texts\[0\]: tokens must be a list, got str"):
        render_report([{"text": "ab", "tokens": "ab"}])
    with pytest.raises(TypeError, match=r"texts\[0\]: tokens\[1\] must be a string, got int"):
        render_report([{"text": "ab", "tokens": ["a", 3]}])
    with pytest.raises(TypeError, match=r"texts\[0\]: token_prob\[0\] must be a number or None, got str"):
        render_report([{"text": "a", "tokens": ["a"], "token_prob": ["0.5"]}])
    with pytest.raises(ValueError, match="worst must be 0 or more, got -1"):
        render_report([], worst=-1)


def test_probability_may_exceed_one_by_rounding() -> None:
    assert Page(render_report([record("a", [1.0000001])])).token_spans()[0]["class"] == "q9"


def test_write_report(tmp_path: Any) -> None:
    path = tmp_path / "report.html"
    texts = [record("<é>\r\n")]
    write_report(path, texts, title="T")
    assert path.read_bytes() == render_report(texts, title="T").encode()
    write_report(str(path), [], title="again")
    assert "again" in path.read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == ["report.html"]


def test_failed_write_leaves_the_old_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pyqe.report.html.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, [record("a")])
    with pytest.raises(TypeError):
        write_report(path, [{"text": 3}])
    assert os.listdir(tmp_path) == ["report.html"]
    assert path.read_text() == "old"
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "missing" / "report.html", [])


def test_size_of_a_large_report() -> None:
    words = [f" word{i % 50}" for i in range(200)]
    scores = [(i * 37 % 1000) / 999 for i in range(200)]
    numbers = {f"token_{name}": scores for name in ("quality", "prob", "max_prob", "boosted_prob", "entropy")}
    text = {"text": "".join(words), "tokens": words, "token_ids": list(range(200)), **numbers}
    assert len(render_report([text] * 200).encode()) < 6_000_000
