"""Reading a recipe from a file: YAML or JSON, no key twice."""

from pathlib import Path
from shlex import quote

import yaml

from qschema.recipe import Recipe
from qschema.strict import DocumentError, Json, check_characters, load_json


class _NoDuplicates(yaml.SafeLoader):
    """YAML's safe loader, which by itself lets the last of two equal keys win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """Return the mapping; raises a YAML error for a key that appears twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears more than once", node.start_mark
                )
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> Json:
    """Return the document in a YAML file. Raises DocumentError for what is not YAML."""
    try:
        document: Json = yaml.load(path.read_text(encoding="utf-8"), Loader=_NoDuplicates)
    except RecursionError:
        raise DocumentError.of(path, "$", "yaml-syntax", "nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DocumentError.of(path, "$", "yaml-syntax", " ".join(str(error).split())) from None
    check_characters(document, file=str(path))
    return document


def load_recipe(path: Path) -> Recipe:
    """Return the recipe in the file `path`, YAML unless its name ends in .json.

    Raises DocumentError for a file that can't be read, is not what its name says, or holds a key or
    a value that a recipe does not have, each with its JSON path.
    """
    if not path.is_file():
        raise DocumentError.of(path, "", "recipe-missing", "no such file")
    document = load_json(path) if path.suffix == ".json" else load_yaml(path)
    if isinstance(document, dict) and document.get("document") == "qconvert-plan":
        raise DocumentError.of(
            path,
            "$.document",
            "recipe-document",
            f"is a plan, not a recipe; convert by it with: qconvert apply {quote(str(path))} "
            "OUT_DIR",
        )
    return Recipe.parse(document, file=str(path))
