"""The emoji of the npm packages ``emoji-datasource-google`` and ``-twitter``, by category.

``npm pack emoji-datasource-google && tar xf emoji-datasource-google-*.tgz`` leaves a folder ``package`` that
``pmf train --data package`` reads: 64 x 64 PNGs below ``img``, and ``emoji.json`` with the category of each.
"""

import json
from pathlib import Path

_PICTURES = "img/*/64"  # the folder of 64-pixel pictures; each package holds one designer's
_NO_CATEGORY = "Component"  # bare skin tones, which are not pictures by themselves


def is_emoji_package(root: Path) -> bool:
    """Whether the folder is one of these packages."""
    return (root / "emoji.json").is_file() and any(root.glob(_PICTURES))


def emoji_by_category(root: Path) -> list[tuple[str, str]]:
    """Files relative to ``root`` with their category: about 1900 without skin tones, in nine categories.

    Raises ValueError, KeyError or TypeError where emoji.json is not that of such a package.
    """
    pictures = next(root.glob(_PICTURES))
    entries = json.loads((root / "emoji.json").read_text(encoding="utf-8"))
    named = [(pictures / entry["image"], entry["category"]) for entry in entries]
    return [
        (str(file.relative_to(root)), category)
        for file, category in named
        if category != _NO_CATEGORY and file.is_file()  # a designer may lack the newest
    ]
