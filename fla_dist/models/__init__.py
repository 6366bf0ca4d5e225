"""One language model, many mixers."""

from fla_dist.models.language_model import LanguageModel

__all__ = ["LanguageModel"]
