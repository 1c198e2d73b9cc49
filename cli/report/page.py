"""From a page's values to HTML: one file that asks for nothing else."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from eplb import __version__
from eplb.cli.report.palette import DARK, LIGHT, css_variables
from eplb.cli.report.values import Page

__all__ = ["render"]

_FOLDER = files("eplb.cli.report")


def render(page: Page) -> str:
    """Return the page. The same values give the same bytes.

    All text is escaped; only our own style and scripts are taken as they are.
    """
    pictures = {
        picture.key: {"option": picture.option, "title": picture.title}
        for section in page.sections
        for picture in section.pictures
    }
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            pictures=pictures,
            palettes={"light": _plain(LIGHT), "dark": _plain(DARK)},
            light=Markup(css_variables(LIGHT)),  # noqa: S704  (our own constants)
            dark=Markup(css_variables(DARK)),  # noqa: S704
            style=_static("report.css"),
            library=_static("echarts.min.js"),
            script=_static("report.js"),
            version=__version__,
        )
    )


def _plain(palette: object) -> dict[str, object]:
    return dict(palette)  # type: ignore[call-overload,no-any-return]


@cache
def _environment() -> Environment:
    return Environment(
        loader=FunctionLoader(lambda name: (_FOLDER / "templates" / name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _static(name: str) -> Markup:
    return Markup((_FOLDER / "static" / name).read_text("utf-8"))  # noqa: S704
