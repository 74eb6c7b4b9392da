"""Print what an installed package needs, less some packages: `requirements.py PACKAGE LEFT_OUT ...`."""

from __future__ import annotations

import re
import sys
from importlib.metadata import requires

from pip._vendor.packaging.markers import default_environment
from pip._vendor.packaging.requirements import Requirement


def main(package: str, *left_out: str) -> None:
    """Print one requirement a line, of those that hold on this machine and belong to no extra."""
    for text in requires(package) or ():
        one = Requirement(text)
        holds = one.marker is None or one.marker.evaluate({**default_environment(), "extra": ""})
        if holds and re.sub(r"[_.]+", "-", one.name.lower()) not in left_out:
            print(f"{one.name}{'[' + ','.join(one.extras) + ']' if one.extras else ''}{one.specifier}")


if __name__ == "__main__":
    main(*sys.argv[1:])
