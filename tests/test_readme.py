"""The README: what it names exists, and its tables are those of the results."""

import re
import shlex

import pytest

from lib import cli, report
from tests.imports import ROOT

TEXT = (ROOT / "README.md").read_text()
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


def test_tables_are_those_of_the_results():
    assert report.readme_tables(TEXT) == TEXT, "run `python -m lib readme`"


def test_no_placeholder_is_left():
    assert not re.search(r"[A-Z]+_TIME|TODO|TBD", TEXT)
