"""mkdocs hook: a link from a page to a file outside docs/ becomes the file's path, which the site doesn't hold."""

import re
from pathlib import Path

LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:)([^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown, *, page, config, files):
    docs = Path(config.docs_dir).resolve()

    def plain(link: re.Match[str]) -> str:
        target = (docs / page.file.src_uri).parent.joinpath(link[2]).resolve()
        if target.is_relative_to(docs) or not target.exists():
            return link[0]  # a page, or a dead link, which mkdocs reports
        path = target.relative_to(docs.parent).as_posix()
        return f"`{path}`" if link[1].strip("`") in (path, target.name) else f"{link[1]} (`{path}`)"

    return LINK.sub(plain, markdown)
