# SPDX-License-Identifier: Apache-2.0
"""Plant the faults of ``mutants.toml``, one at a time, and tell which of them the tests see.

python tests/mutants/plant.py                     all of them, by default marks
python tests/mutants/plant.py samplers mcmc/      those whose file or line holds one of these words
python tests/mutants/plant.py --trees 1           one at a time
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import Queue
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("mutants.toml")
SECONDS = 1_800
"""A run that takes longer has seen the fault: it does not end."""

FORKS = multiprocessing.get_context("forkserver")
"""Each fault has a process of its own, with all but the package loaded already."""


class Mutant(NamedTuple):
    """A fault of one line.

    - **file** - where it is, in the package.
    - **old** - a part of the line, which occurs once in the file.
    - **new** - what is there instead.
    - **tests** - those that should see it.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, source: str) -> str:
        """The source with the fault.

        :raises ValueError: if the part of the line does not occur exactly once.
        """
        if source.count(self.old) != 1 or "\n" in self.old or self.old == self.new:
            found = f"occurs {source.count(self.old)} times in {self.file}"
            raise ValueError(f"{self.old!r} {found}: mend its entry in {LIST.name}")
        return source.replace(self.old, self.new)


def read_mutants() -> list[Mutant]:
    """All faults of the list; the tests of an entry are those of its table where it names none."""
    found = []
    for file, table in tomllib.loads(LIST.read_text(encoding="utf-8")).items():
        for entry in table["mutants"]:
            tests = entry[2:] or table["tests"]
            found.append(Mutant(file, entry[0], entry[1], tuple(f"tests/{t}" for t in tests)))
    return found


def run_tests(tree: Path, tests: tuple[str, ...]) -> None:
    """Run tests in a copy of the tree; ends the process with pytest's status."""
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    with open("report.txt", "w") as report:
        os.dup2(report.fileno(), 1)
        os.dup2(report.fileno(), 2)
        sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))


def status(tree: Path, tests: Iterable[str]) -> int | None:
    """0 where the tests pass, 1 where one fails, ``None`` where they do not end.

    :raises RuntimeError: if they cannot be run.
    """
    process = FORKS.Process(target=run_tests, args=(tree, tuple(tests)))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        return None
    report = (tree / "report.txt").read_text(encoding="utf-8")
    if process.exitcode == 2 and "during collection" in report:  # it cannot even be imported
        return 1
    if process.exitcode in (0, 1):
        return process.exitcode
    if process.exitcode == 5:  # none of the tests is a default one
        return 0
    raise RuntimeError(f"pytest ended with {process.exitcode}:\n{report[-2000:]}")


def is_seen(mutant: Mutant, tree: Path) -> bool:
    """Whether one of its tests fails in a copy of the tree."""
    path = tree / "numpyro_ebm" / mutant.file
    source = path.read_text(encoding="utf-8")
    path.write_text(mutant.planted(source), encoding="utf-8")
    try:
        return status(tree, mutant.tests) != 0
    finally:
        path.write_text(source, encoding="utf-8")


@contextmanager
def borrowed(trees: Queue) -> Iterator[Path]:
    """A copy of the tree for one run at a time."""
    tree = trees.get()
    try:
        yield tree
    finally:
        trees.put(tree)


def judge(trees: Queue, mutant: Mutant) -> tuple[bool, float]:
    """Whether a fault is seen, and after how many seconds."""
    with borrowed(trees) as tree:
        start = time.perf_counter()
        return is_seen(mutant, tree), time.perf_counter() - start


def main(words: list[str], num_trees: int) -> int:
    """Plant, report, and return 1 if fewer than 95% of the faults are seen."""
    everything = read_mutants()
    for mutant in everything:  # a stale list is found before anything runs
        mutant.planted((ROOT / "numpyro_ebm" / mutant.file).read_text(encoding="utf-8"))
    mutants = [m for m in everything if not words or any(w in f"{m.file} {m.old}" for w in words)]
    planted, killed = Counter(), Counter()
    FORKS.set_forkserver_preload(["scipy.stats", "numpyro.contrib.funsor", "arviz", "pytest"])
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(num_trees) as pool:
        trees = Queue()
        for i in range(num_trees):
            ignored = shutil.ignore_patterns(".*", "__pycache__", "venv")
            trees.put(Path(shutil.copytree(ROOT, Path(folder, str(i)), ignore=ignored)))
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        with borrowed(trees) as tree:
            if status(tree, ["-n", str(num_trees), *tests]) != 0:  # who fails anyway sees nothing
                raise RuntimeError((tree / "report.txt").read_text(encoding="utf-8")[-5000:])
        for mutant, (seen, seconds) in zip(
            mutants, pool.map(partial(judge, trees), mutants), strict=True
        ):
            planted[mutant.file] += 1
            killed[mutant.file] += seen
            verdict = "killed" if seen else "LIVES "
            print(f"{verdict} {seconds:5.0f} s  {mutant.file}: {mutant.old} -> {mutant.new}")
            sys.stdout.flush()
    for file, number in sorted(planted.items()):
        print(f"{killed[file]:4d} of {number:3d}  {file}")
    share = sum(killed.values()) / max(len(mutants), 1)
    print(f"{sum(killed.values())} of {len(mutants)} faults were seen ({share:.1%})")
    return int(share < 0.95)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="parts of the files or lines; all by default")
    parser.add_argument("--trees", type=int, default=2, help="faults at a time, each in a copy")
    options = parser.parse_args()
    sys.exit(main(options.words, options.trees))
