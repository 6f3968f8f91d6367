"""The emoji of the npm packages ``emoji-datasource-google`` and ``-twitter``, by category.

``npm pack emoji-datasource-google && tar xf emoji-datasource-google-*.tgz`` creates a folder ``package`` that
``pmf train --data package`` reads: 64 x 64 PNGs under ``img``, and ``emoji.json`` with the category of each.
"""

import json
from pathlib import Path

_PICTURES = "img/*/64"  # the 64-pixel images; each package contains one designer's
_NO_CATEGORY = "Component"  # bare skin tones, which are not standalone images


def is_emoji_package(root: Path) -> bool:
    """Whether the folder is such a package."""
    return (root / "emoji.json").is_file() and any(root.glob(_PICTURES))


def emoji_by_category(root: Path) -> list[tuple[str, str]]:
    """Files relative to ``root`` with their category: about 1900 (no skin-tone variants) in nine categories.

    Raises ValueError, KeyError or TypeError if emoji.json does not have the expected structure.
    """
    pictures = next(root.glob(_PICTURES))
    entries = json.loads((root / "emoji.json").read_text(encoding="utf-8"))
    named = [(pictures / entry["image"], entry["category"]) for entry in entries]
    return [
        (str(file.relative_to(root)), category)
        for file, category in named
        if category != _NO_CATEGORY and file.is_file()  # a designer may lack recent emoji
    ]
