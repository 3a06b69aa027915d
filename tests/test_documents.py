"""The README files tell the truth: links lead somewhere, trees show what is there, commands exist."""

import re
import subprocess
from pathlib import Path

import pytest
import typer.main

from dskd.cli import app

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```.*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def documents() -> list[Path]:
    """Every *.md that git knows, or would."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    found = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"README.md", "dskd/README.md"} <= set(found)
    return [ROOT / file for file in found]


def blocks(document: Path) -> list[str]:
    """The code blocks."""
    return BLOCK.findall(document.read_text())


def prose(document: Path) -> str:
    """All but the code blocks."""
    return BLOCK.sub("", document.read_text())


def anchors(document: Path) -> set[str]:
    """Those that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_somewhere(document: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = document.parent / path if path else document
    return target.exists() and (not anchor or anchor in anchors(target))


def tree(document: Path) -> list[str]:
    """What its file trees name: code blocks that begin with a name alone, or with a name and two spaces.

    Each level is indented by two. A line holds one name or several, and after two spaces what they are.
    """
    found: list[str] = []
    for block in blocks(document):
        if not re.match(r"[\w.]+/?(  |\n)", block):
            continue
        folders = [""]
        for line in block.splitlines():
            level = (len(line) - len(line.lstrip())) // 2
            names = [folders[level] + name for name in re.split(r"\s{2,}", line.strip())[0].split()]
            found += names
            folders[level + 1 :] = [names[-1]] if names[-1].endswith("/") else []
    return found


def test_links_lead_somewhere(documents):
    links = [(document, link) for document in documents for link in re.findall(r"\]\(([^)\s]+)\)", prose(document))]
    relative = [(document, link) for document, link in links if not re.match(r"\w+:", link)]
    assert len(relative) > 10
    assert [(str(document), link) for document, link in relative if not leads_somewhere(document, link)] == []


def test_what_a_tree_shows_is_there(documents):
    assert [path for document in documents for path in tree(document) if not any(ROOT.glob(path))] == []


def test_the_tree_of_the_package_names_every_module():
    modules = {str(file.relative_to(ROOT)) for file in ROOT.glob("dskd/**/*.py") if file.name != "__init__.py"}
    assert modules - set(tree(ROOT / "dskd" / "README.md")) == set()


def test_the_first_readme_is_short():
    assert (ROOT / "README.md").stat().st_size < 10_000


def test_commands_exist(documents):
    verbs = set(typer.main.get_command(app).commands)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in documents:
        code = "\n".join([*blocks(document), *re.findall(r"`([^`\n]+)`", prose(document))])
        assert set(re.findall(r"(?<![\w./-])dskd ([a-z]\w*)", code)) <= verbs, document
        assert set(re.findall(r"(?<![\w./-])make ([a-z][\w-]*)", code)) <= targets, document
