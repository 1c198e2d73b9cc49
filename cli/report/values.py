"""What a page is made of: sections of pictures and tables, as values.

Text is plain: the template escapes all of it, because names and paths come from files of others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Fact", "Legend", "Page", "Picture", "Section", "Table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A headline figure.

    Parameters
    ----------
    name : str
    value : str
    note : str
        What it is compared with, or means.
    was : str
        The figure before; empty where there is none.
    """

    name: str
    value: str
    note: str = ""
    was: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text under a head; the first column names the row.

    Parameters
    ----------
    title : str
    head : tuple of str
    rows : tuple of tuple of str
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Legend:
    """The scale of a heat map: a palette's gradient and the values at its marks, evenly spaced."""

    palette: str
    marks: tuple[str, ...]
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One chart with what stands around it.

    Parameters
    ----------
    key : str
        Its id in the page.
    title, caption : str
    label : str
        What the picture shows, in words, for who does not see it.
    option : mapping
        ECharts' option as :mod:`eplb.cli.report.options` makes it.
    height_px : int
    table : Table, optional
        The figures behind it. A heat map's own values are a table too, which the page makes from
        the option when it is opened.
    legend : Legend, optional
    """

    key: str
    title: str
    caption: str
    label: str
    option: Mapping[str, Any]
    height_px: int = 300
    table: Table | None = None
    legend: Legend | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page, reached from its list of contents.

    Parameters
    ----------
    key, title : str
    lead : str
        What the section says, in one or two sentences.
    pictures : tuple of Picture
    side_by_side : bool
        Two pictures in a row where the screen has room.
    tables : tuple of Table
        Shown open, as text of the section.
    notes : tuple of str
        What is assumed or left out.
    """

    key: str
    title: str
    lead: str = ""
    pictures: tuple[Picture, ...] = ()
    side_by_side: bool = False
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A report.

    Parameters
    ----------
    title, subtitle : str
    facts : tuple of Fact
    sections : tuple of Section
    origin : mapping of str to str
        What made it, for the foot.
    """

    title: str
    subtitle: str
    facts: tuple[Fact, ...] = ()
    sections: tuple[Section, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)
