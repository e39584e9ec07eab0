"""Every command in a document or at the top of a cluster file is accepted by its program's parser."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.files import CLUSTER, commands, fenced
from tests.cluster.parsers import problem
from tests.conftest import ROOT

FOLDERS = [CLUSTER, ROOT / "pipelines", ROOT / "rcd_core", ROOT / "tests"]
DOCUMENTS = [ROOT / "README.md", *(path for folder in FOLDERS for path in sorted(folder.rglob("*.md")))]
COMMENTED = [*sorted(CLUSTER.rglob("*.yaml")), CLUSTER / "Dockerfile"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def header(path: Path) -> str:
    """The commands in a file's opening comment, that is, its indented lines."""
    opening = path.read_text().split("\n\n", 1)[0].splitlines()
    return "\n".join(line[5:].strip() for line in opening if line.startswith("#     "))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_documents(path: Path) -> None:
    found = [words for block in fenced(path.read_text()) for words in commands(block)]
    wrong = {" ".join(words): problem(words) for words in found}
    assert not {line: why for line, why in wrong.items() if why}
    assert found or "```sh" not in path.read_text()


@pytest.mark.parametrize("path", COMMENTED, ids=name)
def test_comments_at_the_top(path: Path) -> None:
    text = header(path)
    wrong = {" ".join(words): problem(words) for words in commands(text)}
    assert not {line: why for line, why in wrong.items() if why}
    for words in commands(text):  # and the files they name exist
        for word in words:
            if word.startswith("cluster/") and "*" not in word:
                assert (ROOT / word).is_file(), word


def test_enough_is_looked_at() -> None:
    assert {"ray", "python", "make", "rcd"} <= {
        words[0] for path in DOCUMENTS for block in fenced(path.read_text()) for words in commands(block)
    }
    assert {"ray", "kubectl", "serve", "docker"} <= {words[0] for path in COMMENTED for words in commands(header(path))}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("ray uup cluster/aws.yaml", "no command"),
        ("ray up --restart cluster/aws.yaml", "No such option"),
        ("ray dashboard", "Missing argument"),
        ("ray job submit --workdir . -- python pipelines/full.py", "No such option"),
        ("ray job submit -- python pipelines/full.py --recip demo --no", "unknown: --no"),
        ("ray job submit -- python pipelines/ful.py", "no file pipelines/ful.py"),
        ("serve deploi x.yaml", "no command"),
        ("rcd trein plan --recipe demo", "trein"),
        ("rcd train plan", "--recipe"),
        ("rcd runs --storage /x --all", "--all"),
        ("rcd up --dashboard_prt 1", "--dashboard_prt"),
        ("python -m pipelines.locals up", "no module"),
        ("make domo", "no target domo"),
    ],
)
def test_mistakes_are_seen(line: str, says: str) -> None:
    (words,) = commands(line)
    assert says in str(problem(words))


def test_shell_text_is_taken_apart() -> None:
    text = 'A=1 ray x --set "a=b; c" > /dev/null && B=2   # why\nexport T="$(q | r)"\nray \\\n  y | less'
    assert list(commands(text)) == [["ray", "x", "--set", "a=b; c"], ["export", "T=$(q | r)"], ["ray", "y"], ["less"]]
