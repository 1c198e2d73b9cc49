"""The docs: what they say to do works, and where they point to exists."""

import re
from itertools import zip_longest
from pathlib import Path

import pytest
from walkthrough import COMMAND, follow

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def masked(page):
    """Leave out what differs between machines: digits, strips, and the widths of columns."""
    page = re.sub(r"[0-9a-f]{6,}|[\d.,]+|[\u2581-\u2588]+|\u2500+", "#", page)
    return [re.sub(r"\s+", " ", line).strip() for line in page.splitlines()]


def test_the_tutorial_can_be_followed(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    page = (ROOT / "docs" / "tutorial.md").read_text()
    assert len(COMMAND.findall(page)) >= 8
    followed = follow(page, tmp_path)
    for written, real in zip_longest(masked(page), masked(followed)):
        # Which layers and experts stand out depends on the last bits of a random model.
        assert re.sub(r"#[:%\w]*( #[:%\w]*)+", "#", real) == re.sub(
            r"#[:%\w]*( #[:%\w]*)+", "#", written
        )
    for name in ("monday.html", "experts.pt", "tuesday.yaml", "tuesday.html"):
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        where = (page.parent / name).resolve() if name else page
        assert where.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", where.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, target
