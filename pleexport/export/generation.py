"""What of a checkpoint's `generation_config.json` a bundle obeys, and what it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from pleexport.errors import CheckpointError
from pleexport.runtime.generation_config import GenerationConfig

# What transformers takes where a config that samples does not say it.
# Source: transformers 5.23, `GenerationConfig._get_default_generation_params`.
_SAMPLED = {"temperature": 1.0, "top_k": 50}

# What cannot be obeyed, where it has an effect, and why not.
_NOT_OBEYED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": (lambda n: n != 1, "one text is written at a time"),
    "num_beam_groups": (lambda n: n != 1, "one text is written at a time"),
    "num_return_sequences": (lambda n: n != 1, "one text is written at a time"),
    "diversity_penalty": (bool, "one text is written at a time"),
    "constraints": (bool, "one text is written at a time"),
    "force_words_ids": (bool, "one text is written at a time"),
    "penalty_alpha": (bool, "contrastive search needs hidden states"),
    "dola_layers": (bool, "logits of inner layers are not computed"),
    "guidance_scale": (lambda s: s != 1, "a second text would have to be computed beside it"),
    "watermarking_config": (bool, "texts are not marked"),
    "token_healing": (bool, "prompts are read as they are"),
    "remove_invalid_values": (bool, "logits that are not numbers end a text with an error"),
}
# What decides about something else than the text: ids that are kept elsewhere, speed, what is
# returned beside the text; and what only beams have a use for.
_WITHOUT_EFFECT = {
    *("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("transformers_version", "_from_model_config", "_commit_hash", "trust_remote_code"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache"),
    *("compile_config", "disable_compile", "prefill_chunk_size", "low_memory", "use_mtp"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "renormalize_logits", "early_stopping", "length_penalty"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
    *("assistant_ensemble_weight", "target_lookbehind", "speculation_type"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "continuous_batching_config"),
}


def read_generation_config(fields: Mapping[str, Any]) -> tuple[GenerationConfig, list[str]]:
    """What a bundle obeys by default, and a note for each field that it cannot obey.

    Args:
        fields: of a `generation_config.json`; one that is null is as good as absent.
    Raises:
        CheckpointError: a field has a value of the wrong kind, or an impossible one.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    obeyed = {n: v for n, v in given.items() if n in GenerationConfig.__struct_fields__}
    if obeyed.get("do_sample") is True:
        obeyed = _SAMPLED | obeyed
    try:
        config = msgspec.convert(obeyed, GenerationConfig)
        # Half a surrogate pair in a stop string could not be written into a manifest.
        msgspec.json.encode(config)
    except (msgspec.ValidationError, UnicodeEncodeError) as err:
        raise _malformed(str(err).replace("`$.", "`")) from err
    if problem := config.out_of_range():
        raise _malformed(problem)
    notes = []
    for name, value in given.items():
        if name in obeyed or name in _WITHOUT_EFFECT:
            continue
        has_effect, reason = _NOT_OBEYED.get(name, (_always, "no such field is known"))
        if has_effect(value):
            notes.append(f"`{name}` of generation_config.json is not obeyed: {reason}")
    return config, notes


def _always(_value: object) -> bool:
    return True


def _malformed(problem: str) -> CheckpointError:
    return CheckpointError(
        f"`generation_config.json` cannot be obeyed: {problem}",
        hint="correct the file, or move it away to build without defaults for generation",
    )
