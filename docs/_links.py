"""MkDocs hook: links from a page to files of the repository reach copies of them in the site.

On a code host `../benchmarks/results/toy.png` shows the file. MkDocs serves nothing from outside docs/, so
each such file joins the site below `repository/`; a link to a folder becomes its text.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page in list(files.documentation_pages()):
        for match in _LINK.finditer(page.content_string):
            path = ROOT / match[3]
            target = f"repository/{match[3]}" + (".txt" if path.suffix in (".md", ".py") else "")
            if path.is_file() and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def rewritten(match: re.Match[str]) -> str:
        path = ROOT / match[3]
        if not path.exists():
            return match[0]  # a broken link, which --strict reports
        if path.is_dir():
            return match[2]
        name = match[3] + (".txt" if path.suffix in (".md", ".py") else "")
        return f"{match[1]}[{match[2]}](repository/{name})"

    return _LINK.sub(rewritten, markdown)
