"""The documents against the tree: links lead somewhere, and no module goes unmentioned."""

from __future__ import annotations

import re
from pathlib import Path

import grimp
import pytest

from tests.helpers.paths import REPOSITORY

PAGES = sorted(
    [
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("benchmarks/*.md"),
        *REPOSITORY.glob("docs/**/*.md"),
    ]
)


def anchors(page: Path) -> set[str]:
    """Return what a heading is called in a link to it."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


def test_every_page_is_on_the_site() -> None:
    """`make docs` takes a page without a place for an error, and runs later than this."""
    docs = REPOSITORY / "docs"
    index = (docs / "index.md").read_text()
    listed = {
        line
        for part in re.findall(r"^```\{toctree\}(.*?)^```", index, re.M | re.S)
        for line in part.split("\n")
    }
    pages = {
        str(page.relative_to(docs).with_suffix(""))
        for page in [*docs.glob("*.md"), *docs.glob("reference/*.md")]
    }
    assert pages - listed == {"index"}, "add the page to a toctree of docs/index.md"


def test_the_index_of_decisions_has_every_page_under_its_title() -> None:
    folder = REPOSITORY / "docs" / "decisions"
    listed = re.findall(r"\[(.*)\]\((.*)\)", (folder / "README.md").read_text())
    titles = {
        page.name: page.read_text().splitlines()[0].removeprefix("# ")
        for page in folder.glob("*.md")
        if page.name != "README.md"
    }
    assert {name: title for title, name in listed} == titles


def walk() -> list[str]:
    """Return the modules that docs/architecture.md goes through, in its order."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\|.*", page, re.MULTILINE)
    paths = [path for row in rows for path in re.findall(r"`([\w/]+)\.py`", row)]
    return [f"peaknet_predict.{path.replace('/', '.')}" for path in paths]


def test_the_walk_through_the_modules_goes_forward() -> None:
    """A module is named once, and behind every module that it imports."""
    graph = grimp.build_graph("peaknet_predict", exclude_type_checking_imports=True, cache_dir=None)
    modules = walk()
    assert len(modules) == len(set(modules))
    packages = {module for module in graph.modules if graph.find_children(module)}
    assert set(modules) == graph.modules - packages
    for number, module in enumerate(modules):
        uses = graph.find_modules_directly_imported_by(module) - packages
        assert not uses - set(modules[:number]), f"{module} comes before what it imports"
