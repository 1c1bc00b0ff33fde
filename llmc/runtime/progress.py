"""How long work reports where it stands."""

from collections.abc import Callable

Progress = Callable[[str, float], None]  # phase ("compile", "weights"), share done from 0 to 1


def silent(phase: str, share: float) -> None:
    """Report to nobody."""
