"""Words that a command prints, whatever the width of the terminal."""


def flat(text: str) -> str:
    """Replaces line breaks, which rich puts in, and other space by single blanks."""
    return " ".join(text.split())
