# SPDX-License-Identifier: Apache-2.0
"""What `import numpyro_ebm` takes beside `import numpyro, blackjax`.

    taskset -c 0 python benchmarks/imports.py

A fresh process for each, in turn; medians of processor time and of its ratio. All have compiled
files, also where `PYTHONDONTWRITEBYTECODE` is set. The last one imports what the package leaves
until it is first asked for, too.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

WAYS = {
    "numpyro, blackjax": "import numpyro, blackjax",
    "numpyro_ebm": "import numpyro_ebm",
    "with diagnostics and posteriors": "import numpyro_ebm.diagnostics, numpyro_ebm.posteriors",
}


def seconds(statement: str, environment: dict[str, str]) -> float:
    """Processor time of a process that runs one statement."""
    before = os.times()
    subprocess.run([sys.executable, "-c", statement], env=environment, check=True)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def main(num_rounds: int) -> None:
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        environment["PYTHONPYCACHEPREFIX"] = folder
        for statement in WAYS.values():
            seconds(statement, environment)  # compiles the files
        rounds = [
            [seconds(statement, environment) for statement in WAYS.values()]
            for _ in range(num_rounds)
        ]
    for name, taken in zip(WAYS, zip(*rounds, strict=True), strict=True):
        ratios = [one / first for one, (first, *_) in zip(taken, rounds, strict=True)]
        print(
            f"{name:<32} {statistics.median(taken):5.2f} s {statistics.median(ratios):5.2f} times"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    main(parser.parse_args().rounds)
