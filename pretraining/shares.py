# SPDX-License-Identifier: Apache-2.0
"""How much of each source is used, and of which of its documents."""

from dataclasses import dataclass, field

from jai.pretraining.config import CorpusConfig, WhenDry


@dataclass(frozen=True)
class DocumentChoice:
    """Which documents of a packed source are used.

    Attributes:
        keep_best: share of them, the best by score.
        min_tokens, max_tokens: others are left out.
    """

    keep_best: float = 1.0
    min_tokens: int = 1
    max_tokens: int | None = None

    @property
    def is_all(self) -> bool:
        """Whether none is left out."""
        return self == DocumentChoice()


@dataclass(frozen=True)
class SourceShare:
    """How much of a source is used.

    Attributes:
        weight: its share of the tokens, against the others'; None where sizes decide.
        epochs: how often its tokens are used at most.
        choice: of its documents.
        packed: the packed source that it is a choice of; None is the one of its name.
    """

    weight: float | None = None
    epochs: float = 1.0
    choice: DocumentChoice = field(default_factory=DocumentChoice)
    packed: str | None = None


@dataclass(frozen=True)
class Shares:
    """How much of each source is used: what `jai pack` recorded, or another configuration says.

    Attributes:
        sources: by name; sources of the corpus that are not named are not used.
        alpha, beta: of equation 2, in place of weights.
        when_dry: what happens when a source is used up.
    """

    sources: dict[str, SourceShare]
    alpha: float | None = None
    beta: dict[str, float] | None = None
    when_dry: WhenDry = "error"

    @classmethod
    def configured(cls, config: CorpusConfig) -> "Shares":
        """What a configuration says; what its text is does not matter here."""
        sources = {
            each.name: SourceShare(
                each.weight,
                each.epochs,
                DocumentChoice(each.keep_best, each.min_tokens, each.max_tokens),
                each.packed,
            )
            for each in config.sources
        }
        return cls(sources, config.alpha, config.beta, config.when_dry)
