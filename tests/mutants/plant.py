# SPDX-License-Identifier: Apache-2.0
"""Plant the faults of ``mutants.toml``, one at a time, and tell which of them the tests see.

python tests/mutants/plant.py                     all of them, by default marks
python tests/mutants/plant.py samplers mcmc/      those of files whose path holds one of these words
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("mutants.toml")
SECONDS = 900
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


def is_seen(mutant: Mutant, tree: Path) -> bool:
    """Whether one of its tests fails in a copy of the tree.

    :raises RuntimeError: if the tests cannot be run.
    """
    path = tree / "numpyro_ebm" / mutant.file
    source = path.read_text(encoding="utf-8")
    path.write_text(mutant.planted(source), encoding="utf-8")
    process = FORKS.Process(target=run_tests, args=(tree, mutant.tests))
    process.start()
    process.join(SECONDS)
    path.write_text(source, encoding="utf-8")
    if process.is_alive():
        process.kill()
        return True
    report = (tree / "report.txt").read_text(encoding="utf-8")
    failed_to_import = process.exitcode == 2 and "during collection" in report
    if process.exitcode in (0, 1) or failed_to_import:
        return process.exitcode != 0
    raise RuntimeError(f"{mutant} ended with {process.exitcode}:\n{report[-2000:]}")


def main(words: list[str]) -> int:
    """Plant, report, and return 1 if fewer than 95% of the faults are seen."""
    everything = read_mutants()
    for mutant in everything:  # a stale list is found before anything runs
        mutant.planted((ROOT / "numpyro_ebm" / mutant.file).read_text(encoding="utf-8"))
    mutants = [m for m in everything if not words or any(word in m.file for word in words)]
    planted, killed = Counter(), Counter()
    FORKS.set_forkserver_preload(["scipy.stats", "numpyro.contrib.funsor", "arviz", "pytest"])
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("numpyro_ebm", "tests"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        for mutant in mutants:
            start = time.perf_counter()
            seen = is_seen(mutant, tree)
            planted[mutant.file] += 1
            killed[mutant.file] += seen
            verdict, seconds = "killed" if seen else "LIVES ", time.perf_counter() - start
            print(f"{verdict} {seconds:5.0f} s  {mutant.file}: {mutant.old} -> {mutant.new}")
            sys.stdout.flush()
    for file, number in sorted(planted.items()):
        print(f"{killed[file]:4d} of {number:3d}  {file}")
    share = sum(killed.values()) / max(len(mutants), 1)
    print(f"{sum(killed.values())} of {len(mutants)} faults were seen ({share:.1%})")
    return int(share < 0.95)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
