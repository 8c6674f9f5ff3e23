"""A hook of mkdocs: links from a page of docs/ to files elsewhere in the repository, which the site does not have.

With ``REPOSITORY`` in the environment, the address of the repository's page, they lead there; without, they are plain
text. On GitHub all of them work as they are.
"""

from __future__ import annotations

import os
import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The text of a page, with its links out of docs/ replaced."""
    repository = os.environ.get("REPOSITORY", "").rstrip("/")
    replacement = rf"[\1]({repository}/blob/HEAD/\2)" if repository else r"\1"
    return re.sub(r"(?<!!)\[([^\[\]]+)\]\(\.\./([^)\s]+)\)", replacement, markdown)
