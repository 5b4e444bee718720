"""Models of Hugging Face's `transformers` on FastLM's functions.

Importing this adds one name to the attention that `transformers` knows, so that any model that goes through its
attention interface can have it: `AutoModel.from_pretrained(..., attn_implementation="fastlm")`.

`fastlm.accelerate` gives the layers of GPT-2, BERT and BLOOM the classes here, in place. They keep nothing of their own
and call the forward that they replace wherever they do not apply, above all for a compiler, which sees the plain model.

Shape suffixes: B batch, T queries, S keys, H heads, D head size, C hidden size, N tokens but for padding.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import activations, pytorch_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.models.bert import modeling_bert as bert
from transformers.models.bloom import modeling_bloom as bloom
from transformers.models.gpt2 import modeling_gpt2 as gpt2

from fastlm import functional as F
from fastlm import nn
from fastlm.accelerate import Change, Report
from fastlm.models.bert import Packing
from fastlm.ops.compiled import CPU
from fastlm.ops.cross_entropy.op import CROSS_ENTROPY, CrossEntropyInputs
from fastlm.ops.measured import fastest
from fastlm.ops.registry import preference

NAME = "fastlm"
FAMILIES = (gpt2.GPT2PreTrainedModel, bert.BertPreTrainedModel, bloom.BloomPreTrainedModel)
RECORDER = "transformers.utils.output_capturing"
NO_DROPOUT = torch.nn.Dropout(0.0).eval()


# Attention of any model ---------------------------------------------------------------------------------------------


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as `transformers` calls it, with the meaning that its "sdpa" gives the arguments, and two more.

    Args:
        module: the caller; it is causal unless `is_causal` or an attribute of that name says otherwise.
        query, key, value: (B, H, T, D), (B, H_kv, S, D), (B, H_kv, S, D_v), H a multiple of H_kv.
        attention_mask: (B, 1, T, S), bool (True takes part) or added to the scores; it says all, causality and window
            included. None: causal if the module is and T is not 1, which is the last token then.
        position_bias: (B, H, T, S), added to the scores.
        sliding_window: keys that a query sees, itself included, where there is no mask that says so.
        softcap: bound of the scores.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: of sequences one after the other in a batch of one, as
            `DataCollatorWithFlattening` gives them; the mask is not looked at.

    Returns:
        (B, T, H, D_v), and None: it forms no probabilities.

    Raises:
        ValueError: an argument that would change the result and that FastLM's attention has nothing for.
    """
    if lacking := [name for name in ("s_aux", "sinks", "head_mask", "cache") if kwargs.get(name) is not None]:
        raise ValueError(f'attn_implementation="{NAME}" has no {lacking[0]}: take another for {type(module).__name__}')
    if torch.jit.is_tracing():  # for which sizes are tensors
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal,
            position_bias=position_bias, softcap=softcap,
        )  # fmt: skip
    if kwargs.get("output_attentions"):
        warnings.warn(f'attn_implementation="{NAME}" forms no attention weights: take "eager" for them', stacklevel=2)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window = None if sliding_window is None or not causal else (sliding_window - 1, 0)
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None and max_length_q is not None:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        starts, longest = (cu_seq_lens_q.int(), cu_seq_lens_k.int()), (int(max_length_q), int(max_length_k or 0))
        y = F.varlen_attention(
            q, k, v, *starts, *longest, dropout, causal, scaling, window=window, softcap=softcap or 0.0
        )
        return y.unflatten(0, (len(query), -1)), None
    T = query.shape[2]
    causal = T > 1 and attention_mask is None and causal
    if causal and key.shape[2] > T:  # what is not filled of a static cache
        key, value = key[:, :, :T], value[:, :, :T]
        position_bias = None if position_bias is None else position_bias[..., :T]
    if position_bias is not None and attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = position_bias.masked_fill(~attention_mask, -torch.inf)
    elif position_bias is not None:
        attention_mask = position_bias if attention_mask is None else position_bias + attention_mask
    y = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        causal,
        scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        window=window if causal and window is not None and window[0] + 1 < T else None,
        softcap=softcap or 0.0,
    )
    return y.transpose(1, 2).contiguous(), None


def mask(**given: Any) -> Tensor | None:
    """The mask that goes with `attention`: that of "sdpa".

    One that only hides padding from every query is a view of B * S values here, not B * T * S, and the mask (B, S) that
    it is made of is its attribute `tokens`.
    """
    tokens, S = given.get("attention_mask"), given["kv_length"]
    if (
        given.get("mask_function") is not bidirectional_mask_function
        or type(tokens) is not Tensor
        or tokens.shape != (given["batch_size"], S)
        or given.get("kv_offset")
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    ):
        return sdpa_mask(**given)
    if given.get("allow_is_bidirectional_skip") and tokens.all():
        return None
    T = S if given.get("q_length") is None else given["q_length"]
    seen = tokens[:, None, None].expand(-1, 1, T, -1)
    seen.tokens = tokens  # type: ignore[attr-defined]
    return seen


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


# What FastLM knows of transformers ----------------------------------------------------------------------------------

# Of each class whose forward ours replace or rely on: the parameters of that forward, and the names that it uses. Where
# a version of transformers differs in either it may do another thing, and the class is left alone.
STATES = "hidden_states attention_mask encoder_hidden_states encoder_attention_mask"
KNOWN: dict[type, tuple[str, str]] = {
    activations.NewGELUActivation: ("self input", "math pi pow sqrt tanh torch"),
    pytorch_utils.Conv1D: ("self x", "addmm bias nf size torch view weight"),
    bert.BertSelfOutput: ("self hidden_states input_tensor", "LayerNorm dense dropout"),
    bert.BertOutput: ("self hidden_states input_tensor", "LayerNorm dense dropout"),
    bert.BertEncoder: (
        f"self {STATES} past_key_values use_cache kwargs",
        "BaseModelOutputWithPastAndCrossAttentions enumerate layer",
    ),
    bert.BertLayer: (
        f"self {STATES} past_key_values kwargs",
        "ValueError apply_chunking_to_forward attention chunk_size_feed_forward crossattention feed_forward_chunk"
        " hasattr is_decoder seq_len_dim",
    ),
    bert.BertAttention: (f"self {STATES} past_key_values kwargs", "is_cross_attention output self"),
    bert.BertSelfAttention: (
        "self hidden_states attention_mask past_key_values kwargs",
        "ALL_ATTENTION_FUNCTIONS EncoderDecoderCache _attn_implementation attention_head_size config contiguous dropout"
        " eager_attention_forward get_interface isinstance key layer_idx p query reshape scaling self_attention_cache"
        " shape training transpose update value view",
    ),
    bert.BertForMaskedLM: (
        "self input_ids attention_mask token_type_ids position_ids inputs_embeds encoder_hidden_states"
        " encoder_attention_mask labels kwargs",
        "CrossEntropyLoss MaskedLMOutput attentions bert cls config hidden_states view vocab_size",
    ),
    bert.BertForPreTraining: (
        "self input_ids attention_mask token_type_ids position_ids inputs_embeds labels next_sentence_label kwargs",
        "BertForPreTrainingOutput CrossEntropyLoss attentions bert cls config hidden_states view vocab_size",
    ),
    gpt2.GPT2Block: (
        "self hidden_states past_key_values attention_mask encoder_hidden_states encoder_attention_mask use_cache"
        " kwargs",
        "ValueError attn crossattention hasattr ln_1 ln_2 ln_cross_attn mlp",
    ),
    bloom.BloomGelu: ("self x", "GeLUFunction apply"),
    bloom.BloomAttention: (
        "self hidden_states residual alibi attention_mask layer_past use_cache output_attentions kwargs",
        "F _merge_heads _reshape attention_dropout baddbmm beta bmm dense dropout_add dtype float32 head_dim"
        " hidden_dropout hidden_size int inv_norm_factor layer_idx linear num_heads pretraining_tp query_key_value"
        " range reshape shape slow_but_exact softmax to torch training transpose update view weight zeros_like",
    ),
    bloom.BloomBlock: (
        "self hidden_states alibi attention_mask layer_past use_cache output_attentions kwargs",
        "apply_residual_connection_post_layernorm input_layernorm mlp post_attention_layernorm self_attention",
    ),
}
OURS: dict[type, type] = {}


def _known(theirs: type) -> bool:
    code = inspect.unwrap(theirs.forward).__code__  # type: ignore[attr-defined]
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    parameters, names = KNOWN[theirs]
    return code.co_varnames[:count] == tuple(parameters.split()) and set(code.co_names) == set(names.split())


def _ours(*relied: type) -> Callable[[type], type]:
    """Puts a class into OURS under the class that it is made from, and with it the reason not to use it if that class,
    or one `relied` on, is not as FastLM knows it."""

    def put(ours: type) -> type:
        theirs = ours.__mro__[1]
        if strange := [kind.__name__ for kind in (theirs, *relied) if not _known(kind)]:
            reason = f"FastLM does not know {strange[0]} of transformers {transformers.__version__}"
            ours.why_not = staticmethod(lambda module: reason)  # type: ignore[attr-defined]
        OURS[theirs] = ours
        return ours

    return put


# Layers -------------------------------------------------------------------------------------------------------------


@_ours()
class NewGELUActivation(activations.NewGELUActivation):
    """One pass over memory, where the formula has eight."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)
        return torch.nn.functional.gelu(input, approximate="tanh")


@_ours()
class BloomGelu(bloom.BloomGelu):
    """As `NewGELUActivation`."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x)
        return torch.nn.functional.gelu(x, approximate="tanh")


@_ours()
class Conv1D(pytorch_utils.Conv1D):
    """A linear layer, whose weight lies the other way."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x)
        return F.linear(x, self.weight.t(), self.bias)


@_ours()
class BertSelfOutput(bert.BertSelfOutput):
    """LayerNorm(input_tensor + dropout(dense(hidden_states))), from the addition on in one pass over memory."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(hidden_states, input_tensor)
        return nn._add_norm(self.dense(hidden_states), input_tensor, self.dropout, self.LayerNorm)[0]


@_ours()
class BertOutput(bert.BertOutput):
    """As `BertSelfOutput`."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(hidden_states, input_tensor)
        return nn._add_norm(self.dense(hidden_states), input_tensor, self.dropout, self.LayerNorm)[0]


@_ours()
class GPT2Block(gpt2.GPT2Block):
    """x = x + attn(ln_1(x));  x = x + mlp(ln_2(x)), the first addition and ln_2 in one pass over memory."""

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None or torch.compiler.is_compiling():
            return super().forward(
                hidden_states, past_key_values, attention_mask, encoder_hidden_states, encoder_attention_mask,
                use_cache, **kwargs,
            )  # fmt: skip
        y, _ = self.attn(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        y, x = nn._add_norm(y, hidden_states, NO_DROPOUT, self.ln_2)
        return x + self.mlp(y)


# BERT without padding -----------------------------------------------------------------------------------------------


@_ours(bert.BertLayer, bert.BertAttention, bert.BertSelfAttention)
class BertEncoder(bert.BertEncoder):
    """The layers run on the tokens alone, of all sequences one after the other, where a mask (B, T) has padding; what
    comes out has 0 there. On a GPU finding the tokens waits for the device, as making a mask of padding does.

    Padding stays in where someone would see the difference: if hidden states or attentions are asked for, if a module
    inside is hooked or is another than BERT's, if a sequence starts with padding (its first hidden state is what a
    pooler takes), for answers to questions, decoders, caches and masks that are not (B, T).
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        packing = None
        if not torch.compiler.is_compiling() and (tokens_BT := getattr(attention_mask, "tokens", None)) is not None:
            alone = encoder_hidden_states is None and past_key_values is None and not use_cache
            packing = _packing(tokens_BT) if alone and not _asks_for_padding(self, kwargs) else None
        if packing is None:
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values,
                use_cache, **kwargs,
            )  # fmt: skip
        starts, longest = packing.cu_seqlens, packing.max_seqlen
        places = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
        x_NC = hidden_states.flatten(0, 1).index_select(0, packing.indices_N)
        output = super().forward(x_NC[None], **kwargs | places)
        y_NC = output.last_hidden_state[0]
        y = y_NC.new_zeros(hidden_states.shape).flatten(0, 1).index_copy(0, packing.indices_N, y_NC)
        output.last_hidden_state = y.view(hidden_states.shape)
        return output


def _packing(tokens_BT: Tensor) -> Packing | None:
    """Where the tokens are, if there are any and no sequence of them starts with padding."""
    if not torch.equal(tokens_BT[:, 0], tokens_BT.any(1)):
        return None
    packing = Packing.of(tokens_BT)
    return packing if packing.max_seqlen else None


def _asks_for_padding(encoder: BertEncoder, kwargs: dict[str, Any]) -> bool:
    """Whether something in an encoder may need, or show, what is computed for padding."""
    if kwargs.get("cu_seq_lens_q") is not None or nn.is_hooked():
        return True
    if any(
        kwargs.get(flag, getattr(encoder.config, flag, False)) for flag in ("output_hidden_states", "output_attentions")
    ):
        return True
    return not all(
        type(layer) is bert.BertLayer
        and not layer.is_decoder
        and not layer.chunk_size_feed_forward
        and type(layer.attention) is bert.BertAttention
        and type(layer.attention.self) is bert.BertSelfAttention
        and type(layer.attention.output) in (BertSelfOutput, bert.BertSelfOutput)
        and type(layer.intermediate) is bert.BertIntermediate
        and type(layer.output) in (BertOutput, bert.BertOutput)
        and not any(map(_watched, layer.modules()))
        for layer in encoder.layer
    )


def _watched(module: torch.nn.Module) -> bool:
    """Whether a module has hooks, other than the recorders of transformers, which are idle, or a forward of its own."""
    return bool(
        "forward" in vars(module)
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(getattr(hook, "__module__", "") != RECORDER for hook in module._forward_hooks.values())
    )


# BLOOM --------------------------------------------------------------------------------------------------------------


@_ours()
class BloomAttention(bloom.BloomAttention):
    """dense(softmax(q k^T / sqrt(D) + alibi + mask) v) + residual, the scores never in memory.

    Nor are alibi and mask ever added up to (B, H, T, S) where the mask is causal and hides padding keys: the kernel has
    the causal part, and the rest is (B, H, 1, S).
    """

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if (
            output_attentions
            or torch.compiler.is_compiling()
            or (self.pretraining_tp > 1 and self.slow_but_exact)
            or type(self.attention_dropout) is not torch.nn.Dropout
            or self.beta != 1.0
            or nn.is_hooked(self, self.attention_dropout)
            or (attention_mask is not None and not attention_mask.is_floating_point())
        ):
            return super().forward(
                hidden_states, residual, alibi, attention_mask, layer_past, use_cache, output_attentions, **kwargs
            )
        q, k, v = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        bias, causal = _bias(alibi.view(len(q), self.num_heads, 1, -1), attention_mask)
        dropout = self.attention_dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, bias, dropout, causal, self.inv_norm_factor)
        y = self.dense(y.transpose(1, 2).flatten(2))
        return bloom.dropout_add(y, residual, self.hidden_dropout, self.training), None


@_ours()
class BloomBlock(bloom.BloomBlock):
    """Its attention gives the probabilities to who watches the block."""

    def forward(self, *args: Any, output_attentions: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(*args, output_attentions=output_attentions or nn.is_hooked(self), **kwargs)


def _bias(alibi_BH1S: Tensor, mask: Tensor | None) -> tuple[Tensor, bool]:
    """What is added to the scores, and whether the causal mask is besides."""
    if mask is None:
        return alibi_BH1S, False
    keys_B11S = _causal(mask)
    return (alibi_BH1S + mask, False) if keys_B11S is None else (alibi_BH1S + keys_B11S, True)


def _causal(mask: Tensor) -> Tensor | None:
    """(B, 1, 1, S), what a mask (B, 1, S, S) hides besides what is causal, if that is the same keys for all queries.

    All layers are given one mask: what was found is its attribute `causal`. Of a GPU it would have to be waited for.
    """
    T, S = mask.shape[2:]
    if T != S or T == 1 or not mask.is_cpu:
        return None
    if not hasattr(mask, "causal"):
        keys_B11S = mask[:, :, -1:]
        later = torch.ones(T, S, dtype=torch.bool, device=mask.device).triu(1)
        expected = keys_B11S.masked_fill(later, torch.finfo(mask.dtype).min)
        mask.causal = keys_B11S if torch.equal(mask, expected) else None  # type: ignore[attr-defined]
    return mask.causal  # type: ignore[attr-defined]


# Losses -------------------------------------------------------------------------------------------------------------

# Logits on a CPU from which on a compiler, too, is given FastLM's loss, as one operator: in one graph with the last
# layer, where transformers' own never is, the loss would be slower than apart from it.
OPAQUE = 2**20 if fastest("cross_entropy", torch.empty(()).expand(2**30)) == "cpu" and not CPU.missing() else math.inf


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' `ForCausalLMLoss`: the cross-entropy of each token with the logits before it, in fp32.

    Args:
        logits: (B, T, V).
        labels: (B, T), not looked at with `shift_labels`, which are (B, T) and at their logits already.
        vocab_size: V.
        num_items_in_batch: the sum is divided by it, instead of by the number of labels.
        ignore_index: a label that is none.
    """
    compiling = torch.compiler.is_compiling()
    opaque = compiling and logits.is_cpu and logits.numel() >= OPAQUE and preference() == ("auto",)
    opaque = opaque and logits.dtype == torch.float32  # of 16 bits they would be copied for it
    if logits.dtype == torch.float64 or (compiling and not opaque):
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target, reduction = shift_labels.reshape(-1).to(logits.device), "mean" if num_items_in_batch is None else "sum"
    logits_NV = logits.view(-1, vocab_size)
    if opaque:
        inputs = CrossEntropyInputs(logits_NV.float(), target, None, ignore_index, reduction, 0.0, 0.0, 0.0, False)
        loss = CROSS_ENTROPY.result(CROSS_ENTROPY.fwd(*inputs, "cpu"), inputs)
    else:
        loss = _fp32_cross_entropy(logits_NV, target, ignore_index, reduction)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def _fp32_cross_entropy(logits_NV: Tensor, target_N: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The loss in fp32 of logits in any dtype; those of 16 bits are not copied for it."""
    if logits_NV.dtype == torch.float32 or logits_NV.device.type not in ("cpu", "cuda"):
        return F.cross_entropy(logits_NV.float(), target_N, ignore_index=ignore_index, reduction=reduction)
    with torch.autocast(logits_NV.device.type, logits_NV.dtype):  # where the op's result is in fp32
        inputs = CrossEntropyInputs(logits_NV, target_N, None, ignore_index, reduction, 0.0, 0.0, 0.0, False)
        return CROSS_ENTROPY.choose(inputs)(*inputs)


@_ours()
class BertForMaskedLM(bert.BertForMaskedLM):
    """With labels its loss is FastLM's cross-entropy."""

    @functools.wraps(bert.BertForMaskedLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _with_losses(self, super().forward, args, kwargs, "labels")


@_ours()
class BertForPreTraining(bert.BertForPreTraining):
    """As `BertForMaskedLM`, both losses."""

    @functools.wraps(bert.BertForPreTraining.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _with_losses(self, super().forward, args, kwargs, "labels", "next_sentence_label")


def _with_losses(model: Any, forward: Callable[..., Any], args: Any, kwargs: Any, *names: str) -> Any:
    """What a forward without its labels gives, and the sum of the losses: the n-th labels' with the n-th logits."""
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    given = inspect.signature(forward).bind(*args, **kwargs)
    labels = [given.arguments.pop(name, None) for name in names]
    if any(label is None for label in labels):
        return forward(*args, **kwargs)
    chosen = kwargs.get("return_dict")
    output = forward(*given.args, **given.kwargs | {"return_dict": True})
    losses = [
        F.cross_entropy(logits.view(-1, logits.shape[-1]), label.view(-1))
        for logits, label in zip(output.values(), labels, strict=False)
    ]
    output = type(output)(loss=functools.reduce(torch.add, losses), **output)
    return output if (model.config.return_dict if chosen is None else chosen) else output.to_tuple()


# Whole models -------------------------------------------------------------------------------------------------------


def configure(report: Report, unpad: bool) -> dict[str, str]:
    """Gives the GPT-2, BERT and BLOOM models in a model FastLM's attention and loss, by their own setters.

    Attention is changed from "sdpa" only: another was chosen by someone, "eager" for the weights that it gives. BLOOM's
    knows but one.

    Returns:
        Modules of which the class is to stay -> why. `unpad` is whether BERT may compute tokens alone.
    """
    kept = {}
    for name, module in report.model.named_modules():
        if isinstance(module, FAMILIES):
            _set_attention(report, name, module)
            _set_loss(report, name, module)
        if isinstance(module, bert.BertEncoder) and not unpad:
            kept[name] = "padding is to be computed too"
        if isinstance(module, bert.BertForQuestionAnswering):
            kept[f"{name}.bert.encoder".lstrip(".")] = "an answer is sought at all positions, padding among them"
    return kept


def _set_attention(report: Report, name: str, model: Any) -> None:
    if isinstance(model, bloom.BloomPreTrainedModel):
        return
    parts = [part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)]
    if set(parts) == {NAME}:
        return
    if set(parts) == {"sdpa"}:
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        others = ", ".join(sorted({repr(part) for part in parts} - {"'sdpa'"})) or "that of its class"
        report.left[name] = f"its attention is {others}: set_attn_implementation('sdpa') lets FastLM's take its place"
        return

    def undo() -> None:
        if model.config._attn_implementation == NAME:
            model.set_attn_implementation("sdpa")

    report.swapped.append(Change(name, "attention 'sdpa'", f"attention '{NAME}'", undo))


def _set_loss(report: Report, name: str, model: Any) -> None:
    if not isinstance(model, (gpt2.GPT2LMHeadModel, bert.BertLMHeadModel, bloom.BloomForCausalLM)):
        return
    if model.loss_function is not ForCausalLMLoss or "_loss_function" in vars(model):
        return

    def undo() -> None:
        if vars(model).get("_loss_function") is causal_lm_loss:
            del model._loss_function

    model.loss_function = causal_lm_loss
    report.swapped.append(Change(name, "loss ForCausalLMLoss", "loss causal_lm_loss", undo))
