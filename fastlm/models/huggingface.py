"""What Hugging Face calls the configurations and weights of GPT-2, BLOOM and BERT: one table for each.

A table has theirs for every field and every weight of ours. `{n}` is the number of a block, `{p}` weight or bias.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.config import nearest

__all__ = ["BERT", "BLOOM", "GPT2", "OTHER", "Layout", "Theirs"]

ACTIVATIONS = {  # theirs -> ours; the first of several is written
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# Fields that say nothing of the function that a model is: kept, and given back when it is saved.
OTHER = frozenset(
    """
    _attn_implementation _name_or_path architectures attention_softmax_in_fp32 attn_implementation bad_words_ids
    begin_suppress_tokens bias_dropout_fusion bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id directionality diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    eos_token_id eos_token_ids exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label initializer_range is_encoder_decoder keys_to_ignore_at_inference label2id language
    length_penalty masked_softmax_fusion max_length min_length model_type n_ctx no_repeat_ngram_size num_beam_groups
    num_beams num_labels num_return_sequences offset_alibi output_attentions output_hidden_states output_past
    output_scores pad_token_id pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
    pooler_type prefix pretraining_tp problem_type remove_invalid_values reorder_and_upcast_attn repetition_penalty
    return_dict return_dict_in_generate sep_token_id skip_bias_add skip_bias_add_qkv slow_but_exact summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unk_index unk_token_id use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)


class Theirs(NamedTuple):
    """The weights of theirs that one of ours consists of."""

    names: tuple[str, ...]
    load: Callable[[int, list[Tensor]], Tensor]  # the number of heads, theirs -> ours
    save: Callable[[int, Tensor], list[Tensor]]


def same(name: str) -> Theirs:
    return Theirs((name,), lambda _, theirs: theirs[0], lambda _, ours: [ours])


def transposed(name: str) -> Theirs:
    """Of a layer whose weight is (in, out)."""
    return Theirs((name,), lambda _, theirs: theirs[0].t().contiguous(), lambda _, ours: [ours.t()])


def joined(*names: str) -> Theirs:
    return Theirs(names, lambda _, theirs: torch.cat(theirs), lambda _, ours: list(ours.chunk(len(names))))


def by_head(name: str) -> Theirs:
    """Rows of query, key and value for one head after the other; ours are all queries, all keys, all values."""

    def load(heads: int, theirs: list[Tensor]) -> Tensor:
        return theirs[0].unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    def save(heads: int, ours: Tensor) -> list[Tensor]:
        return [ours.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)]

    return Theirs((name,), load, save)


@dataclass(frozen=True)
class Layout:
    """How Hugging Face writes one kind of model.

    Args:
        model_type: in its config.json.
        prefix: of the names of the body's weights, which are found without it too.
        fields: theirs -> ours, and what it is where it is left out.
        needs: fields of theirs that must have one of these values; the first is written.
        weights: ours -> theirs, the prefix left out.
        heads: the same for what comes after the body.
        ignored: of their names, what is no weight or tied to one.
        ours: fields of ours that all such models have.
        aliases: other names of their fields -> these.
    """

    model_type: str
    prefix: str
    fields: dict[str, tuple[str, Any]]
    needs: dict[str, tuple[Any, ...]]
    weights: dict[str, Theirs]
    heads: dict[str, Theirs]
    ignored: str
    ours: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def read_config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Our fields. Raises ValueError for fields that are unknown or have values that our models are not for."""
        values = {self.aliases.get(name, name): value for name, value in values.items()}
        known = {*self.fields, *self.needs, *OTHER}
        unknown = [name for name, value in values.items() if name not in known and value is not None]
        faults = [f"{name} is not known{nearest(name, [*self.fields, *self.needs])}" for name in unknown]
        faults += [
            f"{name} must be {' or '.join(map(repr, allowed))}, got {values[name]!r}"
            for name, allowed in self.needs.items()
            if name in values and values[name] not in allowed
        ]
        ours, given_by = dict(self.ours), dict.fromkeys(self.ours, self.model_type)
        for name, (our, default) in self.fields.items():
            value = values.get(name, default)
            if our == "activation":
                if value not in ACTIVATIONS:
                    faults.append(f"{name} must be one of {', '.join(ACTIVATIONS)}, got {value!r}")
                value = ACTIVATIONS.get(value, "gelu")
            if our in given_by and ours[our] != value:
                faults.append(f"{given_by[our]} and {name} must be the same, got {ours[our]!r} and {value!r}")
            ours[our], given_by[our] = value, name
        if faults:
            raise ValueError(f"{self.model_type}: {'; '.join(faults)}")
        return ours

    def write_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        named = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        fields = {name: config[our] for name, (our, _) in self.fields.items()}
        for name, (our, default) in self.fields.items():
            if our == "activation":
                fields[name] = named[config[our]]
            if our == "ffn_size" and default is not None:
                fields[name] = config[our] or 4 * config["hidden_size"]
        return {"model_type": self.model_type, **fields, **{name: values[0] for name, values in self.needs.items()}}

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration of ours can be written as one of theirs."""
        usual = config["ffn_size"] in (None, 4 * config["hidden_size"])
        return all(config[name] == value or (name == "ffn_size" and usual) for name, value in self.ours.items())

    def table(self, layers: int, body: str) -> dict[str, Theirs]:
        """Every weight of ours, those of the body under a name that begins with `body`."""
        table = {}
        for rows, before, theirs_before in ((self.weights, body, self.prefix), (self.heads, "", "")):
            for ours, theirs in rows.items():
                for n in range(layers) if "{n}" in ours else (0,):
                    for p in ("weight", "bias") if "{p}" in ours else ("",):
                        names = tuple(theirs_before + name.format(n=n, p=p) for name in theirs.names)
                        table[before + ours.format(n=n, p=p)] = theirs._replace(names=names)
        return table

    def read_weights(self, table: Mapping[str, Theirs], weights: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
        """Ours, as far as theirs are there, and what is left of these under its own name."""
        left = {name: weight for name, weight in weights.items() if not re.search(self.ignored, name)}
        for old, new in (("gamma", "weight"), ("beta", "bias")):
            left = {re.sub(rf"LayerNorm\.{old}$", f"LayerNorm.{new}", name): weight for name, weight in left.items()}
        bare = {name.removeprefix(self.prefix): name for name in left}
        ours = {}
        for name, theirs in table.items():
            names = [bare.get(each.removeprefix(self.prefix), "") for each in theirs.names]
            if all(names):
                ours[name] = theirs.load(heads, [left.pop(each) for each in names])
        return ours | left

    def write_weights(
        self, table: Mapping[str, Theirs], weights: Mapping[str, Tensor], heads: int
    ) -> dict[str, Tensor]:
        theirs: dict[str, Tensor] = {}
        for name, weight in weights.items():
            theirs |= dict(zip(table[name].names, table[name].save(heads, weight), strict=True))
        return theirs


GPT2 = Layout(
    model_type="gpt2",
    prefix="transformer.",
    fields={
        "vocab_size": ("vocab_size", 50257),
        "n_positions": ("max_seq_len", 1024),
        "n_embd": ("hidden_size", 768),
        "n_layer": ("num_layers", 12),
        "n_head": ("num_heads", 12),
        "n_inner": ("ffn_size", None),
        "activation_function": ("activation", "gelu_new"),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "resid_pdrop": ("dropout", 0.1),
        "embd_pdrop": ("dropout", 0.1),
        "attn_pdrop": ("dropout", 0.1),
        "tie_word_embeddings": ("tie_embeddings", True),
    },
    needs={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    weights={
        "token_embedding.weight": same("wte.weight"),
        "position_embedding.weight": same("wpe.weight"),
        "blocks.{n}.attention_norm.{p}": same("h.{n}.ln_1.{p}"),
        "blocks.{n}.attention.qkv.{p}": transposed("h.{n}.attn.c_attn.{p}"),
        "blocks.{n}.attention.projection.{p}": transposed("h.{n}.attn.c_proj.{p}"),
        "blocks.{n}.ffn_norm.{p}": same("h.{n}.ln_2.{p}"),
        "blocks.{n}.ffn_up.{p}": transposed("h.{n}.mlp.c_fc.{p}"),
        "blocks.{n}.ffn_down.{p}": transposed("h.{n}.mlp.c_proj.{p}"),
        "final_norm.{p}": same("ln_f.{p}"),
    },
    heads={"head.weight": same("lm_head.weight")},
    ignored=r"(^|\.)h\.\d+\.attn\.(masked_)?bias$",
    ours={"position": "learned", "embedding_norm": False},
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
)

BLOOM = Layout(
    model_type="bloom",
    prefix="transformer.",
    fields={
        "vocab_size": ("vocab_size", 250880),
        "seq_length": ("max_seq_len", 2048),
        "hidden_size": ("hidden_size", 64),
        "n_layer": ("num_layers", 2),
        "n_head": ("num_heads", 8),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "hidden_dropout": ("dropout", 0.0),
        "attention_dropout": ("dropout", 0.0),
        "tie_word_embeddings": ("tie_embeddings", True),
    },
    needs={"apply_residual_connection_post_layernorm": (False,)},
    weights={
        "token_embedding.weight": same("word_embeddings.weight"),
        "embedding_norm.{p}": same("word_embeddings_layernorm.{p}"),
        "blocks.{n}.attention_norm.{p}": same("h.{n}.input_layernorm.{p}"),
        "blocks.{n}.attention.qkv.{p}": by_head("h.{n}.self_attention.query_key_value.{p}"),
        "blocks.{n}.attention.projection.{p}": same("h.{n}.self_attention.dense.{p}"),
        "blocks.{n}.ffn_norm.{p}": same("h.{n}.post_attention_layernorm.{p}"),
        "blocks.{n}.ffn_up.{p}": same("h.{n}.mlp.dense_h_to_4h.{p}"),
        "blocks.{n}.ffn_down.{p}": same("h.{n}.mlp.dense_4h_to_h.{p}"),
        "final_norm.{p}": same("ln_f.{p}"),
    },
    heads={"head.weight": same("lm_head.weight")},
    ignored="^$",
    ours={"position": "alibi", "embedding_norm": True, "activation": "gelu_tanh", "ffn_size": None},
    aliases={"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
)

BERT = Layout(
    model_type="bert",
    prefix="bert.",
    fields={
        "vocab_size": ("vocab_size", 30522),
        "max_position_embeddings": ("max_seq_len", 512),
        "hidden_size": ("hidden_size", 768),
        "num_hidden_layers": ("num_layers", 12),
        "num_attention_heads": ("num_heads", 12),
        "intermediate_size": ("ffn_size", 3072),
        "hidden_act": ("activation", "gelu"),
        "layer_norm_eps": ("norm_eps", 1e-12),
        "hidden_dropout_prob": ("dropout", 0.1),
        "attention_probs_dropout_prob": ("dropout", 0.1),
        "type_vocab_size": ("type_vocab_size", 2),
    },
    needs={
        "tie_word_embeddings": (True,),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "position_embedding_type": ("absolute",),
        "pruned_heads": ({},),
        "classifier_dropout": (None,),
    },
    weights={
        "token_embedding.weight": same("embeddings.word_embeddings.weight"),
        "position_embedding.weight": same("embeddings.position_embeddings.weight"),
        "type_embedding.weight": same("embeddings.token_type_embeddings.weight"),
        "embedding_norm.{p}": same("embeddings.LayerNorm.{p}"),
        "blocks.{n}.attention.qkv.{p}": joined(
            "encoder.layer.{n}.attention.self.query.{p}",
            "encoder.layer.{n}.attention.self.key.{p}",
            "encoder.layer.{n}.attention.self.value.{p}",
        ),
        "blocks.{n}.attention.projection.{p}": same("encoder.layer.{n}.attention.output.dense.{p}"),
        "blocks.{n}.attention_norm.{p}": same("encoder.layer.{n}.attention.output.LayerNorm.{p}"),
        "blocks.{n}.ffn_up.{p}": same("encoder.layer.{n}.intermediate.dense.{p}"),
        "blocks.{n}.ffn_down.{p}": same("encoder.layer.{n}.output.dense.{p}"),
        "blocks.{n}.ffn_norm.{p}": same("encoder.layer.{n}.output.LayerNorm.{p}"),
        "pooler.{p}": same("pooler.dense.{p}"),
    },
    heads={
        "mlm.dense.{p}": same("cls.predictions.transform.dense.{p}"),
        "mlm.norm.{p}": same("cls.predictions.transform.LayerNorm.{p}"),
        "mlm.bias": same("cls.predictions.bias"),
        "next_sentence.{p}": same("cls.seq_relationship.{p}"),
        "classifier.{p}": same("classifier.{p}"),
    },
    ignored=r"embeddings\.(position_ids|token_type_ids)$|^cls\.predictions\.decoder\.",
    ours={"position": "learned", "embedding_norm": False, "tie_embeddings": True},
)
