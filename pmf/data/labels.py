"""Which image has which class: four layouts of a folder.

1. A subfolder per class: ``folder/<class>/**/<image>``; the classes are numbered by their sorted names.
2. ``folder/labels.csv``: a first row ``file,label``, then one row an image; ``file`` is relative to the
   folder, ``label`` is any word.
3. ``folder/dataset.json``: ``{"labels": [["<file>", <integer>], ...]}``, as the StyleGAN and EDM tools do.
4. An unpacked emoji package, whose ``emoji.json`` names the categories (pmf/data/emoji.py).

Labels that are all integers are numbered in numerical order, others in the order of their sorted names.
Files and folders whose name starts with a dot are ignored; all else in a class folder has to be an image.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from pmf.data.emoji import emoji_by_category, is_emoji_package
from pmf.errors import UserError


@dataclass(frozen=True)
class LabelledFiles:
    """Image files, the class index of each, and the name of every class."""

    paths: list[Path]
    labels: list[int]
    class_names: list[str]


def list_images(root: Path) -> LabelledFiles:
    """Find the images of a folder and their classes; UserError where the layout or the labels are broken."""
    if not root.is_dir():
        raise UserError(f"--data {root} is not a folder: give 'digits' or a folder of images")
    if (root / "labels.csv").is_file():
        source, pairs = root / "labels.csv", _read_csv(root / "labels.csv")
    elif (root / "dataset.json").is_file():
        source, pairs = root / "dataset.json", _read_json(root / "dataset.json")
    elif is_emoji_package(root):
        source, pairs = root / "emoji.json", _read_emoji(root)
    else:
        source, pairs = root, _walk_subfolders(root)
    return _number_classes(source, root, pairs)


def _walk_subfolders(root: Path) -> list[tuple[str, str]]:
    visible = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    folders = [path for path in visible if path.is_dir()]
    if not visible:
        raise UserError(f"the image folder {root} is empty: put one subfolder of images per class into it")
    if not folders:
        raise UserError(
            f"{root} has files but neither a subfolder per class nor a labels.csv: move the images into one "
            "subfolder per class, or write labels.csv with the columns file,label"
        )
    pairs = []
    for folder in folders:
        files = [path.relative_to(root) for path in sorted(folder.rglob("*")) if not path.is_dir()]
        files = [path for path in files if not any(part.startswith(".") for part in path.parts)]
        if not files:
            raise UserError(f"the class folder {folder} is empty: put images into it or remove it")
        pairs += [(str(path), folder.name) for path in files]
    return pairs


def _read_csv(source: Path) -> list[tuple[str, str]]:
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source} cannot be read as a CSV file in UTF-8 ({error})") from error
    if not rows or [cell.strip().lower() for cell in rows[0]] != ["file", "label"]:
        raise UserError(f"the first row of {source} must be file,label")
    pairs = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != 2 or not row[0].strip() or not row[1].strip():
            raise UserError(f"row {number} of {source} must hold a file and a label, got {','.join(row)!r}")
        pairs.append((row[0].strip(), row[1].strip()))
    return pairs


def _read_json(source: Path) -> list[tuple[str, str]]:
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{source} cannot be read as JSON ({error})") from error
    entries = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f'{source} must hold {{"labels": [["file", integer], ...]}}')
    pairs = []
    for number, entry in enumerate(entries):
        pair = entry if isinstance(entry, list) and len(entry) == 2 else [None, None]
        if not isinstance(pair[0], str) or type(pair[1]) is not int:
            shown = json.dumps(entry)[:80]
            raise UserError(f'entry {number} of "labels" in {source} must be ["file", integer], got {shown}')
        pairs.append((entry[0], str(entry[1])))
    return pairs


def _read_emoji(root: Path) -> list[tuple[str, str]]:
    try:
        return emoji_by_category(root)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{root / 'emoji.json'} is damaged ({error}): unpack the emoji package again"
        ) from error


def _number_classes(source: Path, root: Path, pairs: list[tuple[str, str]]) -> LabelledFiles:
    if not pairs:
        raise UserError(f"{source} names no image")
    pairs = [(str(Path(file)), label) for file, label in pairs]  # ./a.png and a.png are one file
    seen: set[str] = set()
    for file, _ in pairs:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(f"{source} names {file!r}, outside {root}: use paths relative to the folder")
        if file in seen:
            raise UserError(f"{source} names {file!r} twice: keep one of the two rows")
        if source.is_file() and not (root / file).is_file():
            raise UserError(f"{source} names {file!r}, which does not exist in {root}")
        seen.add(file)
    found = {label for _, label in pairs}
    numbers = {int(label) for label in found if label.removeprefix("-").isdecimal()}
    names = [str(n) for n in sorted(numbers)] if {str(n) for n in numbers} == found else sorted(found)
    if len(names) == 1:
        raise UserError(f"{root} has one class only ({names[0]!r}): training needs images of two or more")
    index = {name: position for position, name in enumerate(names)}
    return LabelledFiles([root / file for file, _ in pairs], [index[label] for _, label in pairs], names)
