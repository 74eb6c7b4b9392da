"""The page of a run of 30 layers x 7 kinds with 200 examples opens in under two seconds.

Makes such a run up, makes its page, and opens it in Chromium several times, each time anew with nothing cached. Prints
the medians of the seconds from the start of the navigation until the first text is there, until the page has loaded
(which is what opening means here), and until its first figure is drawn, for which the browser first compiles plotly;
and the processor's seconds of the page's thread up to then, which a busy machine stretches less. Needs selenium,
Chromium and its driver (apt install chromium chromium-driver).

    python benchmarks/the_page_opens_fast.py [--runs 7]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from _machine import SOURCE, record, say

LIMIT_SECONDS = 2.0
PARTS = ("first_paint_seconds", "loaded_seconds", "first_figure_seconds", "processor_seconds")


def main() -> None:
    arguments = _arguments()
    sys.path.insert(0, str(SOURCE.parent))
    from tests.report.chromium import chromium

    with tempfile.TemporaryDirectory() as folder:
        page = make_page_of(Path(folder), arguments.layers, arguments.examples)
        opened = []
        for index in range(arguments.runs):
            with chromium(Path(folder) / f"profile-{index}") as driver:
                opened.append(open_page(driver, page))
            say(f"opened {index + 1} of {arguments.runs}: {opened[-1]}")
        medians = {f"median_{part}": median(one[part] for one in opened) for part in PARTS}
        result = {"page_bytes": page.stat().st_size, "limit_seconds": LIMIT_SECONDS, **medians}
        is_under = medians["median_loaded_seconds"] < LIMIT_SECONDS
        record({**result, "is_under": is_under, "opened": opened}, arguments.out)


def make_page_of(folder: Path, n_layers: int, n_examples: int) -> Path:
    from lorazor.report.page import make_page, make_sections
    from lorazor.report.reading import read_runs
    from tests.report.synthetic_runs import shrink_run

    run = shrink_run(folder / "run", n_layers, n_examples)
    page = folder / "report.html"
    page.write_text(make_page(make_sections(read_runs([run]), n_examples)), encoding="utf-8")
    return page


def open_page(driver: Any, page: Path) -> dict[str, float]:
    driver.get("about:blank")
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    driver.get(page.as_uri())
    drawn = None
    while drawn is None:
        drawn = driver.execute_script("return document.querySelector('.plot .main-svg') ? performance.now() : null")
        time.sleep(0.01)
    loaded = driver.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    painted = driver.execute_script("return performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0")
    metrics = {one["name"]: one["value"] for one in driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
    seconds = (painted / 1000, loaded / 1000, drawn / 1000, metrics["TaskDuration"])
    return {part: round(value, 3) for part, value in zip(PARTS, seconds, strict=True)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=7, help="times to open the page")
    parser.add_argument("--layers", type=int, default=30, help="layers of the adapter, 7 kinds of sites in each")
    parser.add_argument("--examples", type=int, default=200, help="examples on the page")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
