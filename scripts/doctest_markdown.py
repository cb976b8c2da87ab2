"""Run the examples in Markdown files: `python scripts/doctest_markdown.py README.md docs`.

Fenced blocks of Python whose first line begins with `>>>` are run, those of one file in one
namespace and in order. A fence that says `python model` needs the default model and is skipped
where that is not fetched.
"""

import doctest
import re
import sys
from pathlib import Path

from jaxinfer.default_model import DEFAULT_MODEL

# The fence, what it says, and the block.
_BLOCK = re.compile(r"^```(python[^\n]*)\n(>>> .*?)^```$", re.MULTILINE | re.DOTALL)


def run(path: Path) -> tuple[int, int, int]:
    """Examples that failed, that ran, and blocks that were skipped, in one file."""
    text = path.read_text()
    examples: list[doctest.Example] = []
    skipped = 0
    for block in _BLOCK.finditer(text):
        if "model" in block[1].split() and not DEFAULT_MODEL.is_cached:
            skipped += 1
            continue
        first_line = text.count("\n", 0, block.start(2))
        for example in doctest.DocTestParser().get_examples(block[2], str(path)):
            example.lineno += first_line
            examples.append(example)
    test = doctest.DocTest(examples, {"__name__": "__main__"}, path.name, str(path), 0, text)
    runner = doctest.DocTestRunner(
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False
    )
    result = runner.run(test)
    return result.failed, result.attempted, skipped


def main(arguments: list[str]) -> int:
    """Run all files; 1 if an example failed."""
    files: list[Path] = []
    for argument in map(Path, arguments):
        files += sorted(argument.rglob("*.md")) if argument.is_dir() else [argument]
    results = [run(path) for path in files]
    failed, attempted, skipped = (sum(column) for column in zip(*results, strict=True))
    print(f"{attempted} examples in {len(files)} files, {failed} failed", end="")
    print(f", {skipped} blocks skipped (the default model is not fetched)" if skipped else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
