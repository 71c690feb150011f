"""What a grammar may look like before llguidance is given it. Pure; raises nothing, takes milliseconds.

llguidance bounds its own work by fuel, but not all of it: the limits here cover what was measured to escape, with a
vocabulary of 49,152 ids on one core. Below them the worst cases found compile in about a second and 130 MB, and a
mask takes 50 ms; beyond them are minutes, gigabytes, and a recursion that ends in a segmentation fault. Clients bring schemas
and regular expressions; the Lark around them is the server's own, and an ambiguous one is not bounded by anything here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

MAX_TEXT = 131_072
"""Characters. Recursion while compiling is as deep as the text can nest: this is what `grammar.STACK` must be enough for."""
MAX_LITERAL = 16_384
"""Characters of one string or regular expression: a mask costs 1 ms for 1,600 of them."""
MAX_REPEAT = 10_000
"""Times that a regular expression repeats a part: a mask costs as much as it does with a literal of that length."""
MAX_PROPERTIES_SQUARED = 8_000_000
"""Sum over objects of the square of their number of properties: compiling costs about 70 ns for each."""
MAX_ALTERNATIVES = 1_000
"""Uses of anyOf, oneOf and allOf. Nested in one another, 3,000 cost 0.4 s a mask."""
MAX_DIVISOR = 10_000
"""Least common multiple of all multipleOf, in units of their last digit: a number's automaton has so many states."""
MAX_DIVISORS = 20_000
"""Their sum, for the same reason."""

ANNOTATIONS = frozenset({"description", "title", "$comment", "default", "examples"})
"""Keywords of JSON schema that constrain nothing."""

_REPEAT = re.compile(r"\{\s*([0-9]*)\s*,?\s*([0-9]*)\s*\}")
_RUN = re.compile(r'(?:[^"\\\n]|\\.)+', re.DOTALL)
_SCHEMA_OR_LITERAL = re.compile(
    r"""(?P<schema>%json\s*) | "(?:[^"\\]|\\.)*+"? | (?://|\#)[^\n]* | /(?:[^/\\]|\\.)*+/?""", re.DOTALL | re.VERBOSE
)
"""The Lark around a schema, its strings, comments and regular expressions: what looks like a schema in these is none."""


def _number(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        return Decimal("NaN")


_DECODER = json.JSONDecoder(parse_int=_number, parse_float=_number)
"""Reads whatever numbers llguidance's own parser may read."""


def objection(grammar: str) -> str | None:
    """Why this grammar is not even tried; None: it may be. `grammar` is Lark, or the JSON that holds Lark and schemas."""
    if len(grammar) > MAX_TEXT:
        return f"it has {len(grammar)} characters, the limit is {MAX_TEXT}"
    try:
        schemas, lark = _parts(grammar)
    except RecursionError:
        return "it is nested too deeply"
    except ValueError as error:
        return f"it is not JSON: {error}"
    if any(len(run.group()) > MAX_LITERAL for run in _RUN.finditer(lark)):
        return f"a string or regular expression in it has more than {MAX_LITERAL} characters"
    return _repeats(lark) or _schema_objection(schemas)


def _parts(grammar: str) -> tuple[list[object], str]:
    """The JSON values of a grammar, and the Lark around them."""
    if not grammar.lstrip().startswith("{"):
        return _lark_parts(grammar)
    grammars = _DECODER.decode(grammar).get("grammars")
    schemas: list[object] = []
    larks: list[str] = []
    for part in grammars if isinstance(grammars, list) else []:
        if isinstance(part, dict):
            inner, lark = _lark_parts(str(part.get("lark_grammar", "")))
            schemas += [part.get("json_schema"), *inner]
            larks.append(lark)
    return schemas, "\n".join(larks)


def _lark_parts(lark: str) -> tuple[list[object], str]:
    schemas: list[object] = []
    around: list[str] = []
    at = 0
    look = 0
    while (found := _SCHEMA_OR_LITERAL.search(lark, look)) is not None:
        look = found.end()
        if found["schema"] is None:
            continue
        try:
            schema, end = _DECODER.raw_decode(lark, look)
        except ValueError:  # llguidance will say what is wrong with it
            continue
        schemas.append(schema)
        around.append(lark[at : found.start()])
        at = look = end
    return schemas, '"'.join([*around, lark[at:]])


def _dicts(value: object) -> Iterator[dict[str, Any]]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _schema_objection(schemas: list[object]) -> str | None:
    squares = alternatives = divisors = largest = 0
    common = 1
    for part in _dicts(schemas):
        for key, value in part.items():
            if (length := _literal(key, value)) > MAX_LITERAL:
                return f"a string in its schema has {length} characters, the limit is {MAX_LITERAL}"
            if key == "pattern" and isinstance(value, str) and (found := _repeats(value)):
                return found
            if key in ("properties", "patternProperties") and isinstance(value, dict):
                squares += len(value) ** 2
                largest = max(largest, len(value))
                if key == "patternProperties" and (found := _repeats("\n".join(value))):
                    return found
            alternatives += key in ("anyOf", "oneOf", "allOf") and isinstance(value, list)
            if key == "multipleOf" and (divisor := _divisor(value)):
                divisors += divisor
                common = min(math.lcm(common, divisor), MAX_DIVISOR + 1)
    if squares > MAX_PROPERTIES_SQUARED:
        return f"its objects have too many properties: one has {largest}"
    if alternatives > MAX_ALTERNATIVES:
        return f"it has {alternatives} uses of anyOf, oneOf and allOf, the limit is {MAX_ALTERNATIVES}"
    if common > MAX_DIVISOR or divisors > MAX_DIVISORS:
        return "its values of multipleOf are too large together"
    return None


def _literal(key: str, value: object) -> int:
    """The longest string that constrains here."""
    if isinstance(value, str) and key not in ANNOTATIONS:
        return max(len(key), len(value))
    if isinstance(value, list) and key not in ANNOTATIONS:
        return max([len(key), *(len(item) for item in value if isinstance(item, str))])
    return len(key)


def _repeats(text: str) -> str | None:
    for low, high in _REPEAT.findall(text):
        if any(len(bound) > len(str(MAX_REPEAT)) or int(bound or 0) > MAX_REPEAT for bound in (low, high)):
            return f"a regular expression in it repeats something more than {MAX_REPEAT} times"
    return None


def _divisor(value: object) -> int:
    """The digits of a number, without zeros at the end: 0.25 and 2500 are 25."""
    if not isinstance(value, Decimal):
        return 0
    try:
        digits = value.normalize().as_tuple().digits
    except ArithmeticError:  # it is not a number, or beyond the exponents of the decimal module
        return MAX_DIVISOR + 1
    if not value.is_finite() or len(digits) > len(str(MAX_DIVISOR)):
        return MAX_DIVISOR + 1
    return int("".join(map(str, digits)))
