"""The code in a completion: fenced blocks in any spelling of Markdown, or raw code before a stray fence or sentence."""

from __future__ import annotations

import ast
import re

_OPEN = re.compile(r"^(?P<indent>[ \t]*)(?P<text>[^`~\n]*?)(?P<fence>```+|~~~+)[ \t]*\{?\.?(?P<info>[\w+-]*)[^\n`]*$")
_PYTHON = re.compile(r"(?:python|py)[\d.]*", re.I)
_HELPERS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)


def extract_code(completion: str, head: str, name: str) -> str:
    """The code of a completion of `head` that defines `name`.

    The last Python block that defines the function counts, else the last block; definitions and imports in other
    blocks come before it. Without a block: the completion up to a stray closing fence or a sentence.
    """
    completion = completion.replace("\r\n", "\n").replace("\r", "\n")
    before = _before_stray_fence(completion)
    if before is not None and _parses(head + before):
        return before
    blocks = python_blocks(completion)
    if not blocks:
        return _without_sentences(completion, head)
    chosen = next((block for block in reversed(blocks) if re.search(rf"def\s+{name}\s*\(", block)), blocks[-1])
    helpers = [block for block in blocks if block is not chosen and _only_defines(block, name)]
    return "\n".join([*helpers, chosen])


def python_blocks(text: str) -> list[str]:
    """The contents of fenced blocks named Python or not at all. A block without an end reaches to the end."""
    blocks: list[str] = []
    lines = iter(text.split("\n"))
    for line in lines:
        opening = _OPEN.match(line)
        if opening is None:
            continue
        indent, fence, info = opening["indent"] if not opening["text"] else "", opening["fence"], opening["info"]
        content = []
        for inner in lines:
            end = inner.find(fence[:3])
            if end >= 0:
                if inner[:end].strip():
                    content.append(inner[:end])
                break
            content.append(inner.removeprefix(indent))
        if not info or _PYTHON.fullmatch(info):
            blocks.append("\n".join(content))
    return blocks


def _before_stray_fence(text: str) -> str | None:
    """What comes before the first fence, if that is code and the fence is a closing one: it has no name."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        opening = _OPEN.match(line)
        if opening is not None or "```" in line:
            before = "\n".join([*lines[:i], line[: line.find("```")] if opening is None or opening["text"] else ""])
            return before if before.strip() and not (opening and opening["info"]) else None
    return None


def _without_sentences(code: str, head: str) -> str:
    """The code without unindented last lines that keep it from being Python."""
    lines = code.split("\n")
    for end in range(len(lines), 0, -1):
        if _parses(head + "\n".join(lines[:end])):
            return "\n".join(lines[:end]) if "\n".join(lines[:end]).strip() else code
        if lines[end - 1][:1].isspace():
            break
    return code


def _only_defines(block: str, name: str) -> bool:
    try:
        body = ast.parse(block).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(isinstance(node, _HELPERS) and getattr(node, "name", "") != name for node in body)


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
