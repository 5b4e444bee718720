"""Complete models, one page each."""

from fastlm.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
