"""Text in, batches of token ids out.

Example:
    ds = data.prepare()  # the running Python's standard library; prepare("folder") for any other text
    x, y = data.batch(ds.train_tokens, step=0, batch_size=8, seq_len=256, seed=0)
    for x, y in data.eval_batches(ds.val_tokens, batch_size=8, seq_len=256): ...
    data.baselines(ds)  # what an n-gram model and xz need for the same bytes
"""

from .baseline import baselines
from .collate import collate
from .corpus import Corpus, Document, read_corpus
from .tokens import EOS_TOKEN, Dataset, batch, eval_batches, load_tokenizer, prepare

__all__ = [
    "EOS_TOKEN",
    "Corpus",
    "Dataset",
    "Document",
    "baselines",
    "batch",
    "collate",
    "eval_batches",
    "load_tokenizer",
    "prepare",
    "read_corpus",
]
