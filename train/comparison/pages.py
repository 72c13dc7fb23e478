"""Renders sections of text, tables and pictures as Markdown, and as one self-contained HTML page."""

import re
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from train.runtime.html_pages import rendered


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar = "text"
    text: str


@dataclass(frozen=True)
class Bullets:
    """A bulleted list."""

    kind: ClassVar = "bullets"
    items: list[str]


@dataclass(frozen=True)
class Table:
    """A table of text cells. Columns of figures are aligned to the right. caption: what it shows, or "", for none."""

    kind: ClassVar = "table"
    head: list[str]
    rows: list[list[str]]
    caption: str = ""

    def of_figures(self) -> list[bool]:
        """Returns for each column whether all its cells are figures, dashes or empty."""
        return [all(re.match(r"[-+−–<.\d]|$", str(cell)) for cell in column) for column in zip(*self.rows, strict=True)]


@dataclass(frozen=True)
class Picture:
    """A PNG beside the pages. alt: what it shows, in words."""

    kind: ClassVar = "picture"
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


def as_html(title: str, sections: list[Section], directory: Path) -> str:
    """Returns one HTML page without scripts. The pictures, files in `directory`, are embedded, so that it opens
    anywhere."""

    def base64(file: str) -> str:
        return b64encode((directory / file).read_bytes()).decode()

    return rendered("comparison.html", title=title, sections=sections, pieces=_pieces, base64=base64)


def _pieces(text: str) -> list[str]:
    """Divides a cell's text where its lines may break: in masks and paths after a comma, an equals sign or a slash, and
    in what is longer than a hash anywhere."""
    return re.split(r"(?<=[,=/])(?=\S)|(?<=\S{64})(?=\S)", text)
