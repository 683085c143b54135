"""Fetch data sets from a terminal: `python -m vdiff.data [mnist] [fashion_mnist] [--directory D]`."""

import argparse
import sys
from collections.abc import Sequence

from vdiff.data.fetch import SOURCES, cache_directory, fetch


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the named data sets, both by default, and print a line for each source and file.

    Args:
        arguments: the command line after the program's name; `sys.argv[1:]` by default.

    Returns:
        The exit status: 0 when every set is there, 2 when one could not be had.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vdiff.data", description="Fetch data sets into the cache."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{' or '.join(SOURCES)}; all when left out")
    parser.add_argument("--directory", default=None, help=f"the cache, by default {cache_directory()}")
    options = parser.parse_args(arguments)

    status = 0
    for name in options.names or SOURCES:
        try:
            paths = fetch(name, options.directory, report=lambda line: print(line, flush=True))
        except ValueError as error:
            print(error, file=sys.stderr, flush=True)
            status = 2
            continue
        for path in paths.values():
            print(f"{name}: {path}: {path.stat().st_size} bytes, sha256 as expected", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
