"""README and FINDINGS: what they name exists, and their tables are those of the results."""

import re
import shlex

import pytest

from lib import cli, report
from tests.imports import ROOT

PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "FINDINGS.md")}
TEXT = "\n".join(PAGES.values())
COMMANDS = [line.strip() for line in re.findall(r"^    (.+)$", TEXT, re.M)]


def without_comment(line: str) -> str:
    return line.split("  #")[0].split("\t#")[0].strip()


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(line):
    makefile = (ROOT / "Makefile").read_text()
    for target in without_comment(line).split()[1:]:
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("line", re.findall(r"python -m lib [^\n`#]+", TEXT))
def test_commands_parse(line):
    words = shlex.split(line.strip())[3:]
    cli.parser().parse_args(words)


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_links_exist(target):
    if not target.startswith("http"):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("name", re.findall(r"`dvc repro (?:--\S+ )*(\w+)(?:@\w+)?", TEXT))
def test_stages_exist(name):
    assert re.search(rf"^  {name}:", (ROOT / "dvc.yaml").read_text(), re.M)


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_results(page):
    assert report.readme_tables(PAGES[page]) == PAGES[page], "run `python -m lib readme`"


def anchors(page: str) -> set[str]:
    """Of a page's headings, as they are made where the pages are read: words joined by dashes."""
    heads = re.findall(r"^#+ (.+)$", PAGES[page], re.M)
    return {re.sub(r"[^a-z0-9 _-]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_links_to_headings_exist(page):
    for target, anchor in re.findall(r"\]\(([\w.]*)#([^)]+)\)", PAGES[page]):
        assert anchor in anchors(target or page), anchor


def test_no_placeholder_is_left():
    assert not re.search(r"[A-Z]+_TIME|TODO|TBD", TEXT)
