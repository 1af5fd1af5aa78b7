"""The pages of documentation, and the commands on them."""

import re
import shlex

from processes import REPOSITORY

PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        *sorted(REPOSITORY.glob("docs/*.md")),
        REPOSITORY / "weights/README.md",
    ]
}


def find_all(pattern: str) -> list[tuple]:
    """[(page, match), ...] of a regular expression in all pages."""
    return [
        (page, match)
        for page, text in PAGES.items()
        for match in re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    ]


def code_blocks() -> list[tuple[str, str, str]]:
    """[(page, language, text), ...] of all blocks of code."""
    return [(page, *block) for page, block in find_all(r"^```(\w*)\n(.*?)^```")]


def prose(page: str) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """[(page, command), ...]: lines of blocks without a language, and `commands` in prose."""
    found = []
    for page, language, block in code_blocks():
        if not language:
            found += [(page, line) for line in re.split(r"\n|&&", block.replace("\\\n", " "))]
    for page in PAGES:
        inline = re.findall(r"`((?:python|ruff|\.ci/|benchmarks/\w+\.sh)\b[^`]*)`", prose(page))
        found += [(page, " ".join(command.split())) for command in inline]
    words = [(page, shlex.split(command, comments=True)) for page, command in found]
    return list(dict.fromkeys((page, shlex.join(command)) for page, command in words if command))
