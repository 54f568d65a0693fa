# SPDX-License-Identifier: Apache-2.0
"""`llms.txt`: every page of the manual as text, with the sentence that it opens with."""

from pathlib import Path

from docutils import nodes
from sphinx.addnodes import toctree

__all__ = ["setup"]


def write(app, exception):
    if exception is not None or app.builder.name != "html":
        return
    root = app.env.get_doctree(app.config.root_doc)
    lines = [f"# {app.config.project}", "", f"> {app.config.html_short_title}", ""]
    for tree in root.findall(toctree):
        lines += [f"## {tree['caption']}", ""]
        for _, page in tree["entries"]:
            doctree = app.env.get_doctree(page)
            first = next(iter(doctree.findall(nodes.paragraph)), None)
            sentence = " ".join(first.astext().split()).partition(". ")[0] if first else ""
            title = app.env.titles[page].astext()
            suffix = Path(app.env.doc2path(page)).suffix
            lines.append(f"- [{title}](_sources/{page}{suffix}.txt): {sentence.rstrip('.:')}.")
        lines.append("")
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines), "utf-8")


def setup(app):
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
