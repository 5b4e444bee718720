"""Text in, batches of token ids out.

Example:
    ds = data.prepare()  # the running Python's standard library; prepare("folder") for any other text
    ds = data.prepare("pages.jsonl.gz", tokenizer="wordpiece", strip_html=True, normalize="NFKC", deduplicate=True)
    learn = data.CausalLM(ds.train_tokens, seq_len=256)  # or MaskedLM, or Labelled
    model(**learn.batch(0, 8, seed=0)).loss  # examples 0 to 7
    data.baselines(ds)  # what an n-gram model and xz need for the same bytes
"""

from .baseline import baselines
from .collate import collate
from .config import DataConfig, LabelledConfig
from .corpus import Corpus, Document, read_corpus
from .dataset import Dataset, prepare
from .labelled import LabelledTexts, encode_texts, read_labelled, split_labelled
from .objectives import CausalLM, Labelled, MaskedLM, Objective
from .tokenizer import EOS_TOKEN, load_tokenizer
from .tokens import Tokens

__all__ = [
    "EOS_TOKEN",
    "CausalLM",
    "Corpus",
    "DataConfig",
    "Dataset",
    "Document",
    "Labelled",
    "LabelledConfig",
    "LabelledTexts",
    "MaskedLM",
    "Objective",
    "Tokens",
    "baselines",
    "collate",
    "encode_texts",
    "load_tokenizer",
    "prepare",
    "read_corpus",
    "read_labelled",
    "split_labelled",
]
