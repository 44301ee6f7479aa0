"""Print one of the README's two commands, so that CI and tests run what the reader is told to."""

import argparse
import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def command(name: str) -> str:
    """The shell block that follows the marker ``<!-- command: NAME -->``.

    Raises:
        ValueError: if the README has no such block.
    """
    pattern = rf"<!-- command: {re.escape(name)} -->\s*```bash\n(.*?)```"
    found = re.search(pattern, README.read_text(encoding="utf-8"), re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has no command {name!r}")
    return found.group(1).strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["demo", "tests"])
    print(command(parser.parse_args().name))
