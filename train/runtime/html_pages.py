"""Renders the HTML pages of all commands from the templates in train/templates/.

A page is one self-contained file: it contains the stylesheet, which all pages share, and needs no script. All values
in a template are escaped. So text of documents, claims and file names appears as text, never as HTML.
"""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parents[1] / "templates"


def rendered(template: str, **values: Any) -> str:
    """Returns the page that a template makes of the values. template: the name of a file in train/templates/."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
