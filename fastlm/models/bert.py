"""BERT: an encoder-only transformer with a norm after every addition, and its heads.

    x = norm(token + position + type embedding)
    x = norm(x + attention(x));  x = norm(x + ffn(x))          in every block

Padding is removed once, after the ids: all that follows runs on the tokens of all sequences one after the other
(packed, `varlen_attention`), and what comes out is put back in its place.

Shape suffixes: B batch, T tokens, C hidden size, H heads, D = C / H head size, V vocabulary, N tokens but for padding.

Source: Devlin et al. 2019 (arXiv 1810.04805).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

import fastlm.functional as F
from fastlm.models import huggingface
from fastlm.models.gpt import ACTIVATIONS, AddNorm, GPTConfig, probabilities
from fastlm.models.pretrained import Pretrained
from fastlm.nn import Linear

__all__ = [
    "BERT",
    "BERTConfig",
    "BERTForMaskedLM",
    "BERTForPreTraining",
    "BERTForSequenceClassification",
    "Packing",
]

IGNORED = -100  # a label that is none


@dataclass(frozen=True)
class BERTConfig(GPTConfig):
    """The shape of a BERT: that of a GPT, with fields as `GPTConfig` has them, and this.

    Args:
        type_vocab_size: kinds of segments
        num_labels: classes of a classifier; 1 is a regression
        problem_type: of a classifier; None goes by num_labels and the dtype of the labels
    """

    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu"
    norm_eps: float = 1e-12
    type_vocab_size: int = 2
    num_labels: int = 2
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need(self.type_vocab_size >= 1, "type_vocab_size", "at least 1")
        self._need(self.num_labels >= 1, "num_labels", "at least 1")
        self._need(self.position == "learned", "position", "'learned'")
        self._need(self.tie_embeddings, "tie_embeddings", "true")


class Packing(NamedTuple):
    """Where the tokens that are no padding are in a batch (B, T).

    Args:
        indices_N: (N,) int64, their places in B * T.
        cu_seqlens: (B + 1,) int32, where each sequence starts among them.
        max_seqlen: of the longest sequence.
    """

    indices_N: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, attention_mask: Tensor) -> Packing:
        """Of a mask (B, T), 0 for padding. On a GPU this waits for it: a collator knows all three without."""
        lengths_B = attention_mask.bool().sum(1, dtype=torch.int32)
        cu_seqlens = nn.functional.pad(lengths_B.cumsum(0, dtype=torch.int32), (1, 0))
        longest = int(lengths_B.max()) if lengths_B.numel() else 0
        return cls(attention_mask.flatten().nonzero().flatten(), cu_seqlens, longest)


class BERTOutput(NamedTuple):
    last_hidden_state: Tensor  # (B, T, C), 0 at padding that was removed
    pooler_output: Tensor  # (B, C)
    attentions: tuple[Tensor, ...] | None = None  # of each block (B, H, T, T)


class BERTHeadOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor | None
    attentions: tuple[Tensor, ...] | None = None


class BERTForPreTrainingOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor | None  # (B, T, V)
    next_sentence_logits: Tensor  # (B, 2)
    attentions: tuple[Tensor, ...] | None = None


class Encoded(NamedTuple):
    x: Tensor  # (N, C) if packed, else (B, T, C)
    packing: Packing | None
    attentions: tuple[Tensor, ...] | None

    def padded(self, B: int, T: int) -> Tensor:
        """(B, T, C), 0 at padding that was removed."""
        if self.packing is None:
            return self.x
        C = self.x.shape[-1]
        return self.x.new_zeros(B * T, C).index_copy(0, self.packing.indices_N, self.x).view(B, T, C)

    def first(self) -> Tensor:
        """(B, C) of the first token of every sequence; 0 of one that has none."""
        if self.packing is None:
            return self.x[:, 0]
        starts_B, stops_B = self.packing.cu_seqlens[:-1].long(), self.packing.cu_seqlens[1:]
        with_zeros = torch.cat((self.x, self.x.new_zeros(1, self.x.shape[-1])))
        return with_zeros[starts_B.where(stops_B > starts_B, len(self.x))]


class Attention(nn.Module):
    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.projection = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: Tensor, packing: Packing | None, mask_B11T: Tensor | None, attentions: list[Tensor] | None
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)  # (N, H, D) or (B, T, H, D)
        dropout = self.dropout if self.training else 0.0
        if packing is not None:
            starts, longest = packing.cu_seqlens, packing.max_seqlen
            y = F.varlen_attention(q, k, v, starts, starts, longest, longest, dropout)
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            if attentions is None:
                y = F.scaled_dot_product_attention(q, k, v, mask_B11T, dropout)
            else:
                attentions.append(probabilities(q, k, mask_B11T))
                y = nn.functional.dropout(attentions[-1], dropout) @ v
            y = y.transpose(1, 2)
        return self.projection(y.flatten(-2))


class Block(nn.Module):
    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        ffn_size = config.ffn_size or 4 * config.hidden_size
        self.attention = Attention(config)
        self.attention_norm = AddNorm(config)
        self.ffn_up = Linear(config.hidden_size, ffn_size)
        self.activation = ACTIVATIONS[config.activation]
        self.ffn_down = Linear(ffn_size, config.hidden_size)
        self.ffn_norm = AddNorm(config)

    def forward(self, x: Tensor, *places: Any) -> Tensor:
        x, _ = self.attention_norm(self.attention(x, *places), x)
        x, _ = self.ffn_norm(self.ffn_down(self.activation(self.ffn_up(x))), x)
        return x


class BERTModel(Pretrained):
    """What BERT and its heads have in common."""

    config: BERTConfig
    config_type = BERTConfig
    layouts = (huggingface.BERT,)

    def init_parameter(self, name: str, parameter: Tensor) -> None:
        """N(0, 0.02) for all weights but those of norms."""
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)

    def flops_per_token(self, seq_len: int) -> float:
        """As the base has it, and the last layer of the 15% of the tokens that are masked."""
        masked = 0.15 * self.config.vocab_size * self.config.hidden_size if hasattr(self, "mlm") else 0.0
        return super().flops_per_token(seq_len) + 6 * masked

    @classmethod
    def read_more(cls, values: dict[str, Any]) -> dict[str, Any]:
        labels = values.get("num_labels", len(values.get("id2label") or {}) or 2)
        return {"num_labels": labels, "problem_type": values.get("problem_type")}

    def write_more(self) -> dict[str, Any]:
        names = self.other_config.get("id2label") or {}
        if len(names) != self.config.num_labels:
            names = {str(n): f"LABEL_{n}" for n in range(self.config.num_labels)}
        numbers = {name: int(n) for n, name in names.items()}
        return {"id2label": names, "label2id": numbers, "problem_type": self.config.problem_type}


class BERT(BERTModel):
    """The encoder: embeddings, blocks, and a pooler, tanh of a linear layer of each sequence's first token.

    Args:
        config: the shape.
        pooler: False for none.

    Source: Devlin et al. 2019 (arXiv 1810.04805).
    """

    architectures: ClassVar = {"bert": "BertModel"}

    def __init__(self, config: BERTConfig, pooler: bool = True) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.type_embedding = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embedding_norm = AddNorm(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        if pooler:
            self.pooler = Linear(config.hidden_size, config.hidden_size)
        self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        packing: Packing | None = None,
        unpad: bool = True,
        output_attentions: bool = False,
    ) -> BERTOutput:
        """Hidden states and those of the first token, pooled.

        Args:
            input_ids: (B, T) int64 or int32, T at most `max_seq_len`.
            attention_mask: (B, T), 0 where `input_ids` is padding.
            token_type_ids: (B, T), the segment of each token; None is 0.
            packing: where the tokens are, which `Packing.of(attention_mask)` would find out and on a GPU wait for.
            unpad: False: padding is computed too, and hidden by a mask. Tokens get the same either way.
            output_attentions: also the probabilities of every block, in plain torch and with padding.

        Raises:
            ValueError: wrong shapes, or a sequence longer than `max_seq_len`. TypeError: ids that are not integers.
            IndexError: an id out of range, on a CPU; elsewhere looking would cost a sync.
        """
        encoded = self.encode(input_ids, attention_mask, token_type_ids, packing, unpad, output_attentions)
        return BERTOutput(encoded.padded(*input_ids.shape), self.pool(encoded), encoded.attentions)

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        packing: Packing | None = None,
        unpad: bool = True,
        output_attentions: bool = False,
    ) -> Encoded:
        """Hidden states as the blocks left them, packed if they were computed so; arguments as in `forward`."""
        self._check(input_ids, attention_mask, token_type_ids)
        T = input_ids.shape[1]
        unpad = unpad and not output_attentions
        if packing is None and attention_mask is not None and unpad:
            packing = Packing.of(attention_mask)
            if len(packing.indices_N) == input_ids.numel():
                packing, attention_mask = None, None
        positions = torch.arange(T, device=input_ids.device).expand_as(input_ids)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        mask_B11T = None if attention_mask is None else attention_mask.bool()[:, None, None]
        if not unpad:
            packing = None
        if packing is not None:
            ids, positions, types = (each.flatten()[packing.indices_N] for each in (input_ids, positions, types))
        else:
            ids = input_ids
        x = self.token_embedding(ids) + self.position_embedding(positions) + self.type_embedding(types)
        x, _ = self.embedding_norm(None, x)
        x = nn.functional.dropout(x, self.config.dropout, self.training)
        attentions: list[Tensor] | None = [] if output_attentions else None
        for block in self.blocks:
            x = self.through(block, x, packing, mask_B11T, attentions)
        return Encoded(x, packing, None if attentions is None else tuple(attentions))

    def pool(self, encoded: Encoded) -> Tensor:
        """(B, C) of the first token of every sequence."""
        return self.pooler(encoded.first()).tanh()

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> None:
        shape, longest = tuple(input_ids.shape), self.config.max_seq_len
        if len(shape) != 2 or shape[1] == 0:
            raise ValueError(f"BERT: input_ids must have shape (B, T) with T at least 1, got {shape}")
        if shape[1] > longest:
            raise ValueError(f"BERT: input_ids must have at most max_seq_len = {longest} tokens, got {shape[1]}")
        for name, ids in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if ids is not None and tuple(ids.shape) != shape:
                raise ValueError(f"BERT: {name} must have the shape of input_ids, {shape}, got {tuple(ids.shape)}")
        sizes = {"input_ids": self.config.vocab_size, "token_type_ids": self.config.type_vocab_size}
        for (name, size), ids in zip(sizes.items(), (input_ids, token_type_ids), strict=True):
            if ids is None:
                continue
            if ids.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"BERT: {name} must be int64 or int32, got {ids.dtype}")
            plain = type(ids) is Tensor and not torch.compiler.is_compiling()  # its values can be looked at
            if plain and ids.device.type == "cpu" and ids.numel():
                for bound in ids.aminmax():
                    if not 0 <= bound < size:
                        raise IndexError(f"BERT: {name} must be from 0 to {size - 1}, got {bound}")


class MaskedLMHead(nn.Module):
    """What a token was, from its hidden state; the weight of its last layer is the token embedding's."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = AddNorm(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transform(self, x: Tensor) -> Tensor:
        return self.norm(None, self.activation(self.dense(x)))[0]

    def forward(
        self,
        encoded: Encoded,
        weight_VC: Tensor,
        shape: torch.Size,
        labels: Tensor | None,
        labelled: Tensor | None,
        return_logits: bool | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss, with labels, and the logits (B, T, V), which are formed without labels or if they are asked for."""
        if labels is not None and labels.shape != shape:
            need, got = tuple(shape), tuple(labels.shape)
            raise ValueError(f"BERT: labels must have the shape of input_ids, {need}, got {got}")
        loss = logits = None
        if labels is not None:
            loss = self.loss(encoded, labels, labelled, weight_VC)
        if labels is None if return_logits is None else return_logits:
            logits = F.linear(self.transform(encoded.padded(*shape)), weight_VC, self.bias)
        return loss, logits

    def loss(self, encoded: Encoded, labels_BT: Tensor, labelled: Tensor | None, weight_VC: Tensor) -> Tensor:
        """Mean over the tokens that have a label; the others are left out before anything is computed."""
        if labelled is None:
            labelled = (labels_BT.flatten() != IGNORED).nonzero().flatten()
        targets, places = labels_BT.flatten()[labelled], labelled
        if encoded.packing is not None:  # a label at padding has no token
            indices_N = encoded.packing.indices_N
            places = torch.searchsorted(indices_N, labelled).clamp(max=len(indices_N) - 1)
            targets = targets.where(indices_N[places] == labelled, IGNORED)
        x = self.transform(encoded.x.flatten(0, -2)[places])
        return F.linear_cross_entropy(x, weight_VC, targets, linear_bias=self.bias)


class BERTForMaskedLM(BERTModel):
    """BERT and a head that says what each token was, whose last weight is the token embedding's.

    Args:
        config: the shape.
    """

    architectures: ClassVar = {"bert": "BertForMaskedLM"}
    body = "bert."

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.bert = BERT(config, pooler=False)
        self.mlm = MaskedLMHead(config)
        self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool | None = None,
        *,
        labelled: Tensor | None = None,
        **options: Any,
    ) -> BERTHeadOutput:
        """Logits (B, T, V); with `labels` (B, T), -100 where there is none, the loss, and logits only if asked for.

        `labelled` is where labels are among the B * T, int64 and rising, which on a GPU finding out waits for.
        `options` are BERT's.
        """
        encoded = self.bert.encode(input_ids, attention_mask, token_type_ids, **options)
        weight_VC = self.bert.token_embedding.weight
        loss, logits = self.mlm(encoded, weight_VC, input_ids.shape, labels, labelled, return_logits)
        return BERTHeadOutput(loss, logits, encoded.attentions)


class BERTForPreTraining(BERTModel):
    """BERT with the head of `BERTForMaskedLM`, and one that says whether the second segment follows the first.

    Args:
        config: the shape.
    """

    architectures: ClassVar = {"bert": "BertForPreTraining"}
    body = "bert."

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.bert = BERT(config)
        self.mlm = MaskedLMHead(config)
        self.next_sentence = Linear(config.hidden_size, 2)
        self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        return_logits: bool | None = None,
        *,
        labelled: Tensor | None = None,
        **options: Any,
    ) -> BERTForPreTrainingOutput:
        """As `BERTForMaskedLM`; `next_sentence_label` (B,) is 0 where the second segment follows the first, and its
        loss is added to that of `labels`. `options` are BERT's."""
        encoded = self.bert.encode(input_ids, attention_mask, token_type_ids, **options)
        weight_VC = self.bert.token_embedding.weight
        loss, logits = self.mlm(encoded, weight_VC, input_ids.shape, labels, labelled, return_logits)
        logits_B2 = self.next_sentence(self.bert.pool(encoded))
        if next_sentence_label is not None:
            next_sentence_loss = F.cross_entropy(logits_B2, next_sentence_label.flatten())
            loss = next_sentence_loss if loss is None else loss + next_sentence_loss
        return BERTForPreTrainingOutput(loss, logits, logits_B2, encoded.attentions)


class BERTForSequenceClassification(BERTModel):
    """BERT and a linear layer of what it pools, `num_labels` wide.

    Args:
        config: the shape, the classes and `problem_type`.
    """

    architectures: ClassVar = {"bert": "BertForSequenceClassification"}
    body = "bert."

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.bert = BERT(config)
        self.classifier = Linear(config.hidden_size, config.num_labels)
        self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> BERTHeadOutput:
        """Logits (B, num_labels) and, with `labels`, the loss.

        `labels` (B,) of integers are classes, of floating-point numbers with num_labels = 1 what is to be predicted
        (squared error), else (B, num_labels) of them, which of the labels hold (binary cross-entropy of each).
        `options` are BERT's.
        """
        encoded = self.bert.encode(input_ids, attention_mask, token_type_ids, **options)
        pooled = nn.functional.dropout(self.bert.pool(encoded), self.config.dropout, self.training)
        logits = self.classifier(pooled)
        return BERTHeadOutput(None if labels is None else self.loss(logits, labels), logits, encoded.attentions)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of logits (B, num_labels), by `problem_type`: cross-entropy, squared error, or binary cross-entropy."""
        kind = self.config.problem_type
        if kind is None:
            integers = not labels.is_floating_point()
            kind = "single_label_classification" if integers else "multi_label_classification"
            kind = "regression" if self.config.num_labels == 1 else kind
        if kind == "single_label_classification":
            return F.cross_entropy(logits, labels.flatten())
        if labels.numel() != logits.numel():
            need, got = tuple(logits.shape), tuple(labels.shape)
            raise ValueError(f"{type(self).__name__}: labels must have shape {need} for {kind}, got {got}")
        labels = labels.view_as(logits).to(logits.dtype)
        loss = nn.functional.mse_loss if kind == "regression" else nn.functional.binary_cross_entropy_with_logits
        return loss(logits, labels)
