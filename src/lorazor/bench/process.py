"""One cell in a process of its own: stdin says which, stdout gets the outcome, and stderr all that libraries print."""

from __future__ import annotations

import os
import pickle
import sys
import threading


def main() -> None:
    """Run the cell; end with the process that waits for it."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    request = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from lorazor.bench.cell import attempt

    outcome = attempt(*request, say=print)
    with answer:
        pickle.dump(outcome, answer)


def _end_with_parent() -> None:
    """However the parent ends, the system closes its end of the pipe."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
