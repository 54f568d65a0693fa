#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Every link inside of a built manual ends somewhere, and no page asks the network.

    .ci/check_links.py docs/_build/html

Links to other sites are not followed. Scripts, styles and pictures have to be in the folder.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"img": "src", "script": "src", "source": "src", "iframe": "src", "video": "src"}


class Page(HTMLParser):
    """The anchors of a page, and what it refers to: (address, whether it is loaded)."""

    def __init__(self, file):
        super().__init__()
        self.anchors, self.links = {"", "top"}, []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors |= {attributes.get("id"), attributes.get("name") if tag == "a" else None}
        if tag == "a" and attributes.get("href"):
            self.links.append((attributes["href"], False))
        elif tag == "link" and attributes.get("rel") in ("stylesheet", "icon", "preload"):
            self.links.append((attributes["href"], True))
        elif attributes.get(LOADED.get(tag)):
            self.links.append((attributes[LOADED[tag]], True))


def faults(root):
    """What is wrong with the pages below a folder, a line each."""
    pages = {file.resolve(): Page(file) for file in sorted(root.rglob("*.html"))}
    for file, page in pages.items():
        for address, loaded in page.links:
            link = urlsplit(address)
            if link.scheme in ("http", "https", "mailto", "data") or link.netloc:
                if loaded and link.scheme != "data":
                    yield f"{file.relative_to(root)} loads {address}"
                continue
            target = (file.parent / unquote(link.path)).resolve() if link.path else file
            if not target.is_file():
                yield f"{file.relative_to(root)} links to {address}, which is no file"
            elif root / "_modules" in file.parents:
                continue  # back from a source: the page is right, and has its object on top
            elif target in pages and unquote(link.fragment) not in pages[target].anchors:
                yield f"{file.relative_to(root)} links to {address}, which has no such anchor"


if __name__ == "__main__":
    found = list(faults(Path(sys.argv[1]).resolve()))
    print(*found, sep="\n")
    sys.exit(bool(found))
