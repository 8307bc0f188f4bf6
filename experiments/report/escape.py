"""Any text as a page can show it: nothing in it is markup, and nothing of it is invisible."""

from markupsafe import Markup, escape

_NAMED = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
}
# C1 controls and lone surrogates have no picture and no place in a page; what turns the direction
# of text, or has no width, would change what its neighbours seem to say.
_ESCAPED = {
    *range(0x80, 0xA0),
    *range(0x200B, 0x2010),
    *range(0x2028, 0x202F),
    *range(0x2060, 0x2070),
    0xFEFF,
    *range(0xD800, 0xE000),
    0xFFFE,
    0xFFFF,
}


def clean(text: str) -> str:
    r"""Control characters as their pictures, what is invisible or reorders text as its escape.

    Example:
        >>> clean("a\x00b\u202ec"), clean("two\nlines")
        ('a␀b\\u202ec', 'two\nlines')
    """
    return "".join(_one(character) for character in text)


def _one(character: str) -> str:
    code = ord(character)
    if code in _ESCAPED:
        return f"\\u{code:04x}"
    return _NAMED.get(code, character)


def safe(value: object) -> Markup:
    """`clean`, then escaped; markup of our own stays as it is.

    Example:
        >>> safe("<b>")
        Markup('&lt;b&gt;')
    """
    return value if isinstance(value, Markup) else escape(clean(str(value)))
