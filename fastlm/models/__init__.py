"""Complete models, one page each."""

from fastlm.models.bert import (
    BERT,
    BERTConfig,
    BERTForMaskedLM,
    BERTForPreTraining,
    BERTForSequenceClassification,
    Packing,
)
from fastlm.models.gpt import GPT, GPTConfig

__all__ = [
    "BERT",
    "GPT",
    "BERTConfig",
    "BERTForMaskedLM",
    "BERTForPreTraining",
    "BERTForSequenceClassification",
    "GPTConfig",
    "Packing",
]
