"""Train a small tokenizer, and the few questions the pipeline asks of any tokenizer.

`train_tokenizer` gives a byte-level BPE as an ordinary fast tokenizer of transformers: special tokens and chat format
as SDAR's (Qwen's ChatML), so that what works with the small model works with the released checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcd_core.errors import UserError
from rcd_core.io.node_copy import node_copy
from rcd_core.tasks.base import MASK_TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS_TEXT = "<|endoftext|>"  # also the padding, as in SDAR
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (EOS_TEXT, TURN_START, TURN_END, MASK_TEXT)
NUM_BYTES = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_ROLES = ("user", "assistant")  # every chat prompt carries them: worth a token each
# Mask tokens of checkpoints whose tokenizer does not declare one (LLaDA).
_KNOWN_MASKS = (MASK_TEXT, "<|mdm_mask|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` tokens, digits one by one, on any number of texts.

    Every byte has a token, so any text comes back as it went in. Texts with little in common give fewer tokens than
    asked for: take the size from the result. UserError where vocab_size has no room for bytes and special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    least = NUM_BYTES + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise UserError(
            f"tokenizer.vocab_size is {vocab_size}; it must be at least {least}: "
            f"{NUM_BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_roles(texts), trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=EOS_TEXT, pad_token=EOS_TEXT, mask_token=MASK_TEXT
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a directory, a URI or a hub id; no code of the checkpoint is run."""
    loader: Any
    local = Path(node_copy(str(path)))
    try:
        if (local / "tokenizer.json").exists():
            # Complete in itself, and this class does not import torch, which takes a worker seconds.
            from transformers import PreTrainedTokenizerFast as loader
        else:
            from transformers import AutoTokenizer as loader
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(str(local))
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {str(path)!r} cannot be loaded; give a directory or a hub id: {error}") from error
    return tokenizer


def mask_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the mask token; UserError where the tokenizer has none."""
    vocabulary = tokenizer.get_vocab()
    for text in (tokenizer.mask_token, *_KNOWN_MASKS):
        if text in vocabulary:
            return int(vocabulary[text])
    raise UserError(
        f"the tokenizer {tokenizer.name_or_path!r} has no mask token; "
        f"set mask_token in its tokenizer_config.json or add {MASK_TEXT!r}"
    )


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an answer: eos, and the end of a chat turn where there is one."""
    vocabulary = tokenizer.get_vocab()
    texts = dict.fromkeys((tokenizer.eos_token, TURN_END))
    return tuple(int(vocabulary[text]) for text in texts if text in vocabulary)


def chat_texts(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[str, str]:
    """One exchange by the tokenizer's chat template -> (what the model is given, what it learns to write).

    The second part is what the template puts behind the first, end of turn included (SDAR: "...<|im_end|>\\n").
    """
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; set chat_template in it")
    asked = [{"role": "user", "content": prompt}]
    given = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    answered = [*asked, {"role": "assistant", "content": response}]
    whole = str(tokenizer.apply_chat_template(answered, tokenize=False))
    if not whole.startswith(given):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} changes the prompt once an answer follows; "
            "use one whose generation prompt opens the assistant's turn"
        )
    return given, whole[len(given) :]


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what decides token ids and prompts: vocabulary, merges, normalisation, chat template."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    content = {
        "backend": json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab(),
        "chat_template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _with_roles(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield text
        yield from _ROLES
