# SPDX-License-Identifier: Apache-2.0
"""Run the examples of the gallery: their pictures, and what they print.

A page shows both as they are in the tree, so that the manual is built without running anything.
`executed.json` holds a digest of the source that made them; only those whose source is another now
are run again, at the full settings (the defaults of each script).

Two engines were tried in its place, on the pages of `directional` and `log_z_bridges`. Sphinx-
Gallery (0.22) took 108 s of processor time to run them and 2.8 s once it had their md5; its pages
show the whole script in one block, and of each it keeps 44 kB of text beside the picture, where
these have 2. To show a statement and a picture as here, the scripts would be cut into cells, and
no longer be the function `main(settings)` that the tests run short. MyST-NB (1.4) took 115 s and
2.2 s, with a cache of 49 kB that is a database, and Jupyter's kernels for a reader to install. A
reader gains notebooks of either, and loses excerpts, so that pages of their own and these seventy
lines stay.

    python docs/gallery/make.py             # what is stale
    python docs/gallery/make.py toys        # these, whatever their digests
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXECUTED = HERE / "executed.json"
FORMATS = {"chains": "gif"}
"""Of examples whose picture moves."""


def names():
    """Examples that have a page in the gallery."""
    return sorted(x.stem for x in HERE.glob("*.md") if x.stem != "index")


def picture(name):
    return HERE / f"{name}.{FORMATS.get(name, 'png')}"


def digest(name):
    """Of the source of an example, but for white space."""
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    return hashlib.sha256("".join(source.split()).encode()).hexdigest()[:16]


def executed():
    """Digests of the sources that made the pictures."""
    return json.loads(EXECUTED.read_text()) if EXECUTED.exists() else {}


def run(name):
    """Run one example; its picture, its text and its digest are written when it has ended well."""
    out = picture(name)
    command = [sys.executable, "-W", "ignore", f"examples/{name}.py", "--out", str(out)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    printed = done.stdout.strip("\n").replace(f"{ROOT}/", "")
    shown = f"$ python examples/{name}.py --out {out.relative_to(ROOT)}\n{printed}\n"
    out.with_suffix(".txt").write_text(shown, encoding="utf-8")
    found = dict(sorted({**executed(), name: digest(name)}.items()))
    EXECUTED.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="examples; those that are stale if none is named")
    done = executed()
    for name in parser.parse_args().names or [x for x in names() if done.get(x) != digest(x)]:
        print(name, flush=True)
        run(name)
