"""Escaping of model and user text for a page: invisible and reordering characters are shown."""

_TABLE: dict[int, int | str] = {
    # Unicode has a picture for each control character.
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    # C1 controls, characters without width, marks of direction, surrogates, noncharacters.
    **{
        code: f"\\u{code:04x}"
        for codes in (
            range(0x80, 0xA0),
            range(0x200B, 0x2010),
            range(0x2028, 0x202F),
            range(0x2060, 0x2070),
            range(0xD800, 0xE000),
            (0xFEFF, 0xFFFE, 0xFFFF),
        )
        for code in codes
    },
}


def clean(text: str) -> str:
    r"""Control characters as their pictures, invisible and reordering ones as their escapes.

    Example:
        >>> clean("a\x00b\u202ec"), clean("two\nlines")
        ('a␀b\\u202ec', 'two\nlines')
    """
    return text.translate(_TABLE)
