"""Whether a listwise bundle, a prompt and windows go together: found out without the weights.

Loads no PyTorch, so that a job can ask before its first stage. Knows nothing of decoding.
"""

import json

from dear_batch.bundle import Bundle
from dear_batch.errors import ConfigurationError
from dear_batch.listwise.encoding import PromptEncoder
from dear_batch.listwise.prompts import Prompt, load_prompt
from dear_batch.specs import ListwiseSpec


def check_listwise(bundle: Bundle, spec: ListwiseSpec) -> PromptEncoder:
    """Find out whether a listwise bundle, a prompt and windows fit together.

    Raises:
        ConfigurationError: a model without what the prompt needs, a tokenizer that cannot
            spell the identifiers, or windows too large for the model.
        UsageError: no such prompt, or reasoning with a prompt that does not know what ends it.
    """
    prompt = load_prompt(spec.prompt)
    if spec.reasoning_tokens and prompt.reasoning is None:
        raise ConfigurationError(
            f"The prompt {prompt.name} does not say what closes the reasoning.",
            valid='a [reasoning] table with close = "</think>", or --reasoning-tokens 0',
        )
    room = context(bundle) - answer_tokens(prompt, spec)
    encoder = PromptEncoder.from_bundle(bundle, prompt, room)
    encoder.check_identifiers(spec.passages)
    _check_room(bundle, encoder, spec)
    return encoder


def _check_room(bundle: Bundle, encoder: PromptEncoder, spec: ListwiseSpec) -> None:
    """Refuse windows that cannot fit even without a query and with a character a passage."""
    least = encoder.least_tokens(spec.passages)
    if least > encoder.max_tokens:
        answer = answer_tokens(encoder.prompt, spec) - spec.reasoning_tokens
        raise ConfigurationError(
            f"A window of {spec.passages} passages does not fit into the model's context.",
            where=f"prompt {encoder.prompt.name}: {least} tokens with one character a passage, "
            f"{spec.reasoning_tokens} of reasoning, {answer} of the answer",
            valid=f"{context(bundle)} tokens in all",
            next_step="lower --window or --reasoning-tokens",
        )


def context(bundle: Bundle) -> int:
    """The tokens that the model can see at once."""
    config = json.loads(bundle.file("config.json").read_text(encoding="utf-8"))
    return int(min(config["max_position_embeddings"], config.get("sliding_window") or float("inf")))


def answer_tokens(prompt: Prompt, spec: ListwiseSpec) -> int:
    """Room for what the model writes, in tokens; an answer has at most one a character."""
    answer = prompt.answer
    text = max(answer.lead, key=len) + answer.text(prompt.identifiers(spec.passages))
    closing = len(prompt.reasoning.close) if prompt.reasoning and spec.reasoning_tokens else 0
    return len(text) + spec.reasoning_tokens + closing
