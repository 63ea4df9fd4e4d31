"""mkdocs hooks: glob patterns in the navigation, and links to files outside docs/, which are not part of the site."""

import re
from pathlib import Path

LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:)([^)#\s]+)(?:#[^)\s]*)?\)")


def on_config(config):
    """Expands `folder/*.md` in the navigation to the pages of that folder, its index first."""

    def expanded(items):
        for item in items:
            if isinstance(item, dict):
                yield {title: list(expanded(part)) if isinstance(part, list) else part for title, part in item.items()}
            elif "*" in item:
                docs = Path(config.docs_dir)
                pages = sorted(docs.glob(item), key=lambda page: (page.stem != "index", page.stem))
                yield from (page.relative_to(docs).as_posix() for page in pages)
            else:
                yield item

    config.nav = list(expanded(config.nav))
    return config


def on_page_markdown(markdown, *, page, config, files):
    """Replaces links to files outside docs/ with the file's path."""
    docs = Path(config.docs_dir).resolve()

    def plain(link: re.Match[str]) -> str:
        target = (docs / page.file.src_uri).parent.joinpath(link[2]).resolve()
        if target.is_relative_to(docs) or not target.exists():
            return link[0]  # a page, or a dead link, which mkdocs reports
        path = target.relative_to(docs.parent).as_posix()
        return f"`{path}`" if link[1].strip("`") in (path, target.name) else f"{link[1]} (`{path}`)"

    return LINK.sub(plain, markdown)
