"""Renders sections of text, tables and pictures as Markdown, and as one self-contained HTML page."""

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A bulleted list."""

    items: list[str]


@dataclass(frozen=True)
class Table:
    """A table of text cells. Columns of figures are aligned to the right. caption: what it shows, or "", for none."""

    head: list[str]
    rows: list[list[str]]
    caption: str = ""

    def of_figures(self) -> list[bool]:
        """Returns for each column whether all its cells are figures, dashes or empty."""
        return [all(re.match(r"[-+−–<.\d]|$", str(cell)) for cell in column) for column in zip(*self.rows, strict=True)]


@dataclass(frozen=True)
class Picture:
    """A PNG beside the pages. alt: what it shows, in words."""

    file: str
    alt: str


Block = Text | Bullets | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading with its blocks."""

    title: str
    blocks: list[Block]


def as_markdown(title: str, sections: list[Section]) -> str:
    """Returns the page as Markdown. Pictures are linked by file name."""
    parts = [f"# {_escaped(title)}"]
    for section in sections:
        parts.append(f"## {_escaped(section.title)}")
        parts += [_block_markdown(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _block_markdown(block: Block) -> str:
    if isinstance(block, Text):
        return _escaped(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"- {_escaped(item)}" for item in block.items)
    if isinstance(block, Picture):
        return f"![{_escaped(block.alt)}]({block.file})"
    align = ["---:" if figures else "---" for figures in block.of_figures()]
    lines = [f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in [block.head, align, *block.rows]]
    lines[1] = f"|{'|'.join(align)}|"
    return (f"{_escaped(block.caption)}\n\n" if block.caption else "") + "\n".join(lines)


def _escaped(text: str) -> str:
    """Returns text that Markdown shows literally, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(str(text).split()))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ --ink: #1c2430; --soft: #667085; --page: #f6f7f9; --card: #fff; --line: #e3e6eb; }}
body {{ margin: 0 auto; padding: 2rem 1rem 5rem; max-width: 66rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; margin: 0 0 1rem; }} h2 {{ font-size: 1.1rem; margin: 0 0 .7rem; }}
section {{ background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.3rem;
  margin-bottom: 1rem; overflow-x: auto; }}
p {{ margin: 0 0 .8rem; }} ul {{ margin: 0 0 .8rem; padding-left: 1.2rem; }} li {{ margin-bottom: .35rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; margin: 0 0 1rem; }}
caption {{ text-align: left; color: var(--soft); padding-bottom: .3rem; }}
th {{ font-weight: 600; color: var(--soft); vertical-align: bottom; }}
td, th {{ padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }}
th {{ white-space: normal; }}
td.l, th.l {{ text-align: left; white-space: normal; overflow-wrap: break-word; min-width: 6rem; }}
img {{ max-width: 100%; height: auto; display: block; margin: .2rem 0 1rem; background: #fff; }}
@media print {{ body {{ background: #fff; padding: 0; }} section {{ border: 0; }}
  img, tr {{ break-inside: avoid; }} h2 {{ break-after: avoid; }} }}
</style></head><body>
<h1>{title}</h1>
{sections}
</body></html>
"""


def as_html(title: str, sections: list[Section], directory: Path) -> str:
    """Returns one HTML page without scripts. The pictures, files in `directory`, are embedded, so that it opens
    anywhere."""
    shown = [
        f"<section><h2>{html.escape(section.title)}</h2>\n"
        + "\n".join(_block_html(block, directory) for block in section.blocks)
        + "</section>"
        for section in sections
    ]
    return PAGE.format(title=html.escape(title), sections="\n".join(shown))


def _cell(text: str) -> str:
    """Escapes a cell, and lets lines break in masks and paths after a comma, an equals sign or a slash, and in what is
    longer than a hash anywhere."""
    parts = re.split(r"(?<=[,=/])(?=\S)|(?<=\S{64})(?=\S)", str(text))
    return "<wbr>".join(map(html.escape, parts))


def _block_html(block: Block, directory: Path) -> str:
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Picture):
        data = base64.b64encode((directory / block.file).read_bytes()).decode()
        return f'<img src="data:image/png;base64,{data}" alt="{html.escape(block.alt)}">'
    classes = ["" if figures else ' class="l"' for figures in block.of_figures()]

    def cells(row: list[str], tag: str) -> str:
        return "".join(f"<{tag}{own}>{_cell(cell)}</{tag}>" for own, cell in zip(classes, row, strict=True))

    caption = f"<caption>{html.escape(block.caption)}</caption>" if block.caption else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in block.rows)
    return f"<table>{caption}<thead><tr>{cells(block.head, 'th')}</tr></thead><tbody>{body}</tbody></table>"
