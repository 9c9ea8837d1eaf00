"""The subset of YAML that recipes use: text, numbers, booleans, lists and mappings, with limits on size and depth.

Text stays text if a key takes text: `run.name: 007` is "007", `data.eval: no` is "no". Numbers are decimal (YAML 1.1 would read 010 as
8 and 1:30 as 90), dates are text, tags are refused. Aliases and merge keys work; each use counts towards the limits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml

from megafork.recipe import Recipe
from megafork.recipe.kinds import Section

_MOST_VALUES = 10_000
_DEEPEST = 16
_TAG = "tag:yaml.org,2002:"
Declared = tuple[yaml.Node, Any]
"""A value and its declared type in the recipe."""


def parse(text: str) -> Any:
    """Parse a recipe document. Raises yaml.YAMLError."""
    return _construct(text, _declared)


def parse_value(text: str, section: str, key: str) -> Any:
    """Parse the value of one key from an override. Raises yaml.YAMLError.

    Unquoted text is the text as given: what YAML reads as a comment belongs to it, and so do its line breaks.
    """
    kind = kind_of(section, key)
    takes_text = str in _options(kind)

    def declared(root: yaml.Node) -> list[Declared]:
        if takes_text and isinstance(root, yaml.ScalarNode) and root.style is None and root.tag != _TAG + "null":
            root.value = text
        return [(root, kind)]

    value = _construct(text, declared)
    is_text = not isinstance(value, str | list | None) or (value is None and text.lstrip().startswith("#"))
    return text if takes_text and is_text else value


def kind_of(section: str, key: str) -> Any:
    """The declared type of a recipe key; None if the key is unknown."""
    declared = Recipe.model_fields.get(section)
    field = declared and declared.annotation.model_fields.get(key)  # type: ignore[union-attr]
    return field and field.annotation


def is_mapping(kind: Any) -> bool:
    """Whether a key of this type holds keys itself."""
    return is_section(kind) or any(get_origin(option) is dict for option in _options(kind))


def is_section(kind: Any) -> bool:
    """Whether the keys that it holds are declared, each with its own default."""
    return any(isinstance(option, type) and issubclass(option, Section) for option in _options(kind))


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which YAML would silently keep the last."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - a class attribute of PyYAML; filled below

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice!r} is given twice, {str(node.start_mark).strip()}")
        return super().construct_mapping(node, deep)

    def whole_number(self, node: yaml.ScalarNode) -> int:
        return int(node.value.replace("_", ""))


_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"^(?:yes|no|true|false|on|off)$", re.IGNORECASE), list("yYnNtTfFoO"))
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(_TAG + "merge", re.compile(r"^<<$"), ["<"])
_Loader.add_constructor(_TAG + "int", _Loader.whole_number)


def _construct(text: str, declared: Callable[[yaml.Node], list[Declared]]) -> Any:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check(loader, root)
        for node, kind in declared(root):
            _keep_text(node, kind)
        return loader.construct_document(root)
    except RecursionError:
        raise yaml.YAMLError("its values are nested too deeply") from None
    except ValueError:  # Python refuses numbers of more than 4,300 digits
        raise yaml.YAMLError("it has a number with too many digits") from None


def _check(loader: _Loader, root: yaml.Node) -> None:
    """Enforce the limits: aliases can make a small file large, or endless."""
    waiting, values = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        values += 1
        if values > _MOST_VALUES or depth > _DEEPEST:
            what = f"more than {_MOST_VALUES:,} values" if values > _MOST_VALUES else f"values nested over {_DEEPEST} deep"
            raise yaml.YAMLError(f"it has {what}, aliases included")
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        if node.tag != loader.resolve(type(node), node.value, (plain, not plain)):
            raise yaml.YAMLError(f"it has a tag, {node.tag.replace(_TAG, '!!')}: leave it out, {str(node.start_mark).strip()}")
        if isinstance(node, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in node.value]


def _declared(root: yaml.Node) -> list[Declared]:
    """The value of every key in a document of sections."""
    sections = root.value if isinstance(root, yaml.MappingNode) else []
    return [
        (value, kind_of(str(section.value), str(key.value)))
        for section, inner in sections
        if isinstance(inner, yaml.MappingNode)
        for key, value in inner.value
    ]


def _keep_text(node: yaml.Node, kind: Any) -> None:
    """Keep plain scalars that look like numbers, booleans or dates as text if `kind` takes text; null stays null."""
    for option in _options(kind):
        if option is str and isinstance(node, yaml.ScalarNode) and node.tag != _TAG + "null":
            node.tag = _TAG + "str"
        elif get_origin(option) is list and isinstance(node, yaml.SequenceNode):
            for part in node.value:
                _keep_text(part, get_args(option)[0])
        elif get_origin(option) is dict and isinstance(node, yaml.MappingNode):
            for _, part in node.value:
                _keep_text(part, get_args(option)[1])


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)
