"""Every benchmark runs once, untimed, and the documents show what was measured."""

import json

import hot_swap_tables
import pytest
import search_pictures
import specs  # noqa: F401  (fills the registry)
import tables
from registry import REGISTRY


@pytest.mark.parametrize("label", REGISTRY)
def test_runs(label):
    spec = REGISTRY[label]
    spec.setup(**spec.parameters)()


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_what_the_results_give(page):
    assert tables.render(page.read_text()) == page.read_text()
    assert "<!-- table:" in page.read_text()


def test_pictures_are_what_the_results_give():
    results = json.loads(search_pictures.RESULTS.read_text())["results"]
    for name, text in search_pictures.pictures(results).items():
        assert (search_pictures.PICTURES / name).read_text() == text


def test_the_picture_of_swaps_is_what_the_results_give():
    assert hot_swap_tables.PICTURE.read_text() == hot_swap_tables.drawn()
