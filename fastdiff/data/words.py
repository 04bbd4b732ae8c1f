"""Names that others chose, as they can be shown."""


def printable(text: str) -> str:
    """File names may hold line breaks, terminal codes or bytes of another encoding."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
