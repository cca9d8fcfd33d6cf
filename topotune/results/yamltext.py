"""YAML that every reader understands alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from topotune.results.text import plain

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]+")


def dump_yaml(data: Mapping[str, Any]) -> str:
    """YAML text that YAML 1.1 and 1.2 readers read alike, every float to the same bits.

    PyYAML reads ``1e-05`` as text (YAML 1.1 wants a dot), a 1.2 reader reads an unquoted ``1e3``
    or ``0o7`` as a number. So floats always have a dot and a signed exponent, text is always
    quoted, and the text is ASCII.

    Args:
        data: mappings, lists, tuples (written as lists), text, numbers, booleans and None.

    Raises:
        ConfigError: a value of another type, with the place where it stands.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True  # an anchor where a list occurs twice would puzzle a human reader

    def float_node(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
        text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
        if "e" in text and "." not in text:
            text = text.replace("e", ".0e")
        return dumper.represent_scalar("tag:yaml.org,2002:float", text)

    def text_node(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"')

    def map_node(dumper: yaml.SafeDumper, value: dict[str, Any]) -> yaml.MappingNode:
        node = dumper.represent_mapping("tag:yaml.org,2002:map", value.items())
        for key, _ in node.value:
            if _PLAIN_KEY.fullmatch(key.value):
                key.style = None  # the emitter still quotes words such as "yes" and "null"
        return node

    Dumper.add_representer(float, float_node)
    Dumper.add_representer(str, text_node)
    Dumper.add_representer(dict, map_node)
    return yaml.dump(
        plain(data, "config", "YAML"),
        Dumper=Dumper,
        sort_keys=False,
        width=2**31,
        allow_unicode=False,
    )
