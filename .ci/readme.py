# SPDX-License-Identifier: Apache-2.0
"""The README as the registry shows it: links into the repository are absolute there.

Hatchling runs this when it builds (`tool.hatch.metadata.hooks.custom`). The address is that of
`project.urls`, and stands nowhere else.
"""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def absolute(text, repository):
    """Markdown with the relative links of a repository made absolute, pictures as raw files."""

    def address(match):
        folder = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({repository}/{folder}/main/{match[3]})"

    return LINK.sub(address, text)


class ReadmeHook(MetadataHookInterface):
    """Give the built package the README with absolute links."""

    def update(self, metadata):
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = absolute(text, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
