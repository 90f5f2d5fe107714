"""How many visual tokens may stay."""

import warnings
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A number of tokens or a share of them, per picture (crop, frame) that the encoder sees.

    Attributes:
        tokens: Tokens to keep, counted as they enter the language model (after any merging of patches), CLS excluded.
        share: Share of the tokens to keep, in (0, 1].
    """

    tokens: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.share is None):
            raise ValueError(f"a budget is either tokens or share, got tokens={self.tokens}, share={self.share}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {self.share}")

    def of(self, count: int) -> int:
        """Tokens to keep of `count`; at least 1, and all of them, with a warning, when the budget is larger."""
        if self.share is not None:
            return max(1, round(self.share * count))
        assert self.tokens is not None
        if self.tokens > count:
            warnings.warn(
                f"the budget of {self.tokens} tokens is above the {count} that there are; all are kept", stacklevel=2
            )
        return min(self.tokens, count)
