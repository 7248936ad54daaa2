"""Edits of texts with a grammar of their own: chat templates, targets, RWKV's vocabulary."""

from __future__ import annotations

from random import Random

from .byte_edits import edit_bytes
from .json_edits import FLOATS, INTEGERS, TEXTS

_JINJA = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 'a' * 10**8 }}",
    "{{ [0] * 10**9 }}",
    "{{ 10**10**10 }}",
    "{{ 2 ** 99999999 }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include 'x' %}",
    "{% import '../x' as x %}",
    "{% extends 'x' %}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception() }}",
    "{{ raise_exception(1, 2) }}",
    "{% set x = namespace(a=1) %}{% set x.a = x %}{{ x.a }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ messages | tojson(indent='x') }}",
    "{{ messages.append(messages) }}{{ messages | tojson }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ 'x' | center(10**9) }}",
    "{{ 'x' | indent(10**9) }}",
    "{{ range(10**9) | list }}",
    "{{ range(10**8) | list | length }}",
    "{{ strftime_now('%' * 9999) }}",
    "{{ strftime_now(1) }}",
    "{{ strftime_now('\\ud800') }}",
    "{% generation %}x{% endgeneration %}",
    "{% generation %}",
    "{{ 1 / 0 }}",
    "{{ undefined.x.y }}",
    "{{ messages[99] }}",
    "{{ bos_token * 3 }}",
    "{{ loop }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% break %}",
    "{% continue %}",
    "{% do 1 %}",
    "{{ lipsum(n=9999) }}",
    "{{ self }}",
    "{{ x|attr('__class__') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ dict(a=1).items() | list }}",
    "{{ 'x'.encode() }}",
    "{{ 9 | round(-99999999) }}",
    "{{ ('(' * 3000) }}",
    "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "{{ " + "not " * 5000 + "1 }}",
    "{{ 1" + " + 1" * 5000 + " }}",
    "{% if 1 %}" * 150 + "{% endif %}" * 150,
    "{{",
    "%}",
    "{#",
    "{{ \ud800 }}",
    "\0",
    "",
]


def edit_template(data: bytes, random: Random) -> bytes:
    """A template with something put in, or with its bytes changed."""
    if random.random() < 0.3:
        return edit_bytes(data, random)
    text = data.decode("utf-8", "replace")
    for _ in range(random.choice((1, 1, 2))):
        at, piece = random.randrange(len(text) + 1), random.choice(_JINJA)
        text = random.choice((piece, text[:at] + piece + text[at:], piece + text, text + piece))
    return text.encode("utf-8", "surrogatepass")


def edit_toml(data: bytes, random: Random) -> bytes:
    """A target with a value, a name or a line changed."""
    if random.random() < 0.2:
        return edit_bytes(data, random)
    lines = data.decode("utf-8", "replace").splitlines() or [""]
    for _ in range(random.choice((1, 1, 2, 3))):
        i = random.randrange(len(lines))
        name, equals, _ = lines[i].partition("=")
        match random.randrange(7):
            case 0:
                lines[i : i + 1] = []
            case 1:
                lines.insert(i, lines[random.randrange(len(lines))])
            case 2:
                lines.insert(i, f"x = {_toml(random)}")
            case 3:
                lines.insert(i, random.choice(("[limits]", "[a.b]", "[[runtime]]", "[backends.x]")))
            case 4:
                lines[i] = f"{name.upper()}{equals}{_toml(random)}"
            case _:
                lines[i] = f"{name}= {_toml(random)}" if equals else lines[i]
        if not lines:
            break
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _toml(random: Random) -> str:
    simple = (str(random.choice(INTEGERS)), random.choice(FLOATS), "true", "1979-05-27", "[]", "{}")
    deep = "[" * 3000 + "]" * 3000
    text = random.choice(TEXTS).replace("\\", "\\\\").replace('"', "'")
    return random.choice((*simple, f'"{text}"', f"['{text}']", deep, "{ a = 1 }", "inf", "0x7fff"))


def edit_vocabulary(data: bytes, random: Random) -> bytes:
    """RWKV's vocabulary with a line changed: number, literal or size."""
    if random.random() < 0.2:
        return edit_bytes(data, random)
    lines = data.decode("utf-8", "replace").split("\n")
    i = random.randrange(len(lines))
    number, _, rest = lines[i].partition(" ")
    literal, _, size = rest.rpartition(" ")
    match random.randrange(6):
        case 0:
            lines[i : i + 1] = []
        case 1:
            lines.insert(i, lines[random.randrange(len(lines))])
        case 2:
            number = str(random.choice((*INTEGERS, "x", "1.5", "9" * 5000, "0x1")))
        case 3:
            size = str(random.choice((*INTEGERS, "x", "", "9" * 5000)))
        case _:
            odd = [
                "(" * 3000,
                "'a'*10**10",
                "b'\\xff'",
                "'\\ud800'",
                "1",
                "None",
                "'",
                "''",
                "'a' 'b'",
            ]
            odd += [
                "9" * 5000,
                "[" * 100 + "]" * 100,
                "-" * 20_000 + "1",
                "{}",
                "'a', 'b'",
                "__import__",
            ]
            literal = random.choice(odd)
    if i < len(lines) and random.random() < 0.9:
        lines[i] = f"{number} {literal} {size}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")
