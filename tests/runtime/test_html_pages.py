"""HTML pages: whatever is put into them is text, one stylesheet stands in each, and no code writes HTML itself."""

import ast
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from train.comparison.pages import Bullets, Picture, Section, Table, Text, as_html
from train.runtime.html_pages import TEMPLATES, rendered

REPOSITORY = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("train", "launch") for path in (REPOSITORY / package).rglob("*.py"))
HOSTILE = "</style></title><script>alert(1)</script>\" onload='x' {{ 7 * 7 }} &amp;"
ESCAPED = (
    "&lt;/style&gt;&lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt;&#34; onload=&#39;x&#39; {{ 7 * 7 }} &amp;amp;"
)
TAG = re.compile(r"</?(html|head|body|style|div|span|table|thead|tbody|t[rdh]|section|details|img|svg|[ou]l|li|h\d)\b")


def test_hostile_text_is_text_wherever_a_report_shows_it(tmp_path):
    (tmp_path / "p.png").write_bytes(b"png")
    blocks = [Text(HOSTILE), Bullets([HOSTILE]), Table([HOSTILE], [[HOSTILE]], HOSTILE), Picture("p.png", HOSTILE)]
    page = as_html(HOSTILE, [Section(HOSTILE, blocks)], tmp_path)
    assert page.replace("<wbr>", "").count(ESCAPED) == 10  # the title and its heading, the section's twice, 6 in blocks
    assert "<script" not in page and page.count("</style>") == page.count("</title>") == 1
    assert '<img src="data:image/png;base64,cG5n" alt="&lt;' in page


def test_hostile_text_is_text_wherever_a_page_of_tokens_shows_it():
    role = {"name": HOSTILE, "css": "r0", "color": "#2f7ed8"}
    tokens = [{"text": HOSTILE, "css": "r0", "hint": HOSTILE}]
    page = rendered(
        "tokens.html", title=HOSTILE, mask=HOSTILE, roles=[role], treatments=[], columns=["trained"],
        counts=[{"name": HOSTILE, "css": "", "numbers": [1234]}], straddling=HOSTILE,
        documents=[{"where": HOSTILE, "about": HOSTILE, "tokens": tokens}],
    )  # fmt: skip
    assert page.count(ESCAPED) == 9 and "<script" not in page and page.count("</style>") == 1
    assert "<td>1,234</td>" in page and ".r0 { background: #2f7ed838; }" in page


def test_a_page_holds_the_stylesheet_and_asks_for_nothing_from_elsewhere():
    page, style = rendered("page.html", title="A page"), (TEMPLATES / "style.css").read_text()
    assert page.startswith("<!doctype html>\n") and style in page and page.endswith("</html>\n")
    assert not re.search(r"url\(|@import|https?:|<script|<link", page)
    assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_a_value_that_a_template_wants_and_is_not_given_is_an_error():
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        rendered("page.html")


def test_no_code_writes_html_itself_or_calls_a_text_safe():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not (found := TAG.search(node.value)), f"{path}:{node.lineno} {found and found[0]}"
            assert not (isinstance(node, ast.Name) and node.id == "Markup"), f"{path}:{node.lineno}"
    for path in TEMPLATES.iterdir():
        assert not re.search(r"\|\s*safe\b|autoescape", path.read_text()), path.name


def test_the_templates_are_among_what_a_wheel_ships():
    data = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    names = [f"templates/{path.name}" for path in TEMPLATES.iterdir()]
    assert len(names) >= 4 and all(any(fnmatch(name, each) for each in data["train"]) for name in names)
