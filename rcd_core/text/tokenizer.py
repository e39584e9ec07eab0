"""Training and loading tokenizers, special ids and chat templates.

`train_tokenizer` returns a byte-level BPE as a fast tokenizer of transformers, with SDAR's special tokens and chat
format (Qwen's ChatML), so that small models are handled like released checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcd_core.errors import UserError
from rcd_core.io.gguf import is_gguf, unpacked
from rcd_core.io.hub import TOKENIZER_FILES, is_hub_id, snapshot
from rcd_core.io.node_copy import node_copy
from rcd_core.tasks.base import MASK_TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS_TEXT = "<|endoftext|>"  # also the padding token, as in SDAR
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (EOS_TEXT, TURN_START, TURN_END, MASK_TEXT)
NUM_BYTES = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_ROLES = ("user", "assistant")  # in every chat prompt, so each should be one token
MOST_ADDED = 3  # tokens that add_mask_token adds: the mask, and a turn's start and end
# For checkpoints whose tokenizer does not declare its mask token (LLaDA).
_KNOWN_MASKS = (MASK_TEXT, "<|mdm_mask|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` tokens. Each digit is a token.

    Every byte has a token, so encoding is lossless. Small or varied text may give fewer tokens than vocab_size; use the
    size of the result. Raises UserError if vocab_size is too small for bytes and special tokens.
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
    """Load a tokenizer from a directory, a GGUF file, a URI or a hub id. No code of the checkpoint is executed. Raises
    UserError."""
    loader: Any
    local = unpacked(Path(path)) if is_gguf(str(path)) else Path(node_copy(str(path)))
    if not local.exists() and is_hub_id(str(path)):
        local = snapshot(str(path), TOKENIZER_FILES)
    try:
        if (local / "tokenizer.json").exists():
            # This class does not import torch, which takes seconds per worker.
            from transformers import PreTrainedTokenizerFast as loader
        else:
            from transformers import AutoTokenizer as loader
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(str(local))
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {str(path)!r} cannot be loaded; give a directory or a hub id: {error}") from error
    return tokenizer


def add_mask_token(tokenizer: PreTrainedTokenizerBase, text: str | None) -> None:
    """Make an autoregressive model's tokenizer fit for diffusion, in place.

    text: the mask token, an unused one of the vocabulary or a new one; None: the tokenizer's own, else MASK_TEXT. A
    tokenizer without a chat template gets ours (ChatML), and one without a padding token its eos.
    Raises UserError for a token that text contains or that has another purpose.
    """
    text = text or tokenizer.mask_token or MASK_TEXT
    if text in tokenizer.get_vocab() and text != tokenizer.mask_token:
        _check_unused(tokenizer, text)
    added: dict[str, Any] = {"mask_token": text}
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
        added["additional_special_tokens"] = [TURN_START, TURN_END]
    tokenizer.add_special_tokens(added)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or TURN_END


def _check_unused(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    index = tokenizer.convert_tokens_to_ids(text)
    names = [name for name, token in tokenizer.special_tokens_map.items() if token == text]
    used = f"it is the tokenizer's {names[0]}" if names else ""
    if text in str(tokenizer.chat_template or ""):
        used = "the chat template writes it"
    ordinary = index not in tokenizer.added_tokens_decoder
    if ordinary and tokenizer(text, add_special_tokens=False)["input_ids"] == [index]:
        used = "ordinary text contains it"
    if used:
        raise UserError(f"mask_token {text!r} is in use: {used}; name an unused token, or a new one like {MASK_TEXT!r}")


def mask_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the mask token. Raises UserError if there is none."""
    vocabulary = tokenizer.get_vocab()
    for text in (tokenizer.mask_token, *_KNOWN_MASKS):
        if text in vocabulary:
            return int(vocabulary[text])
    raise UserError(
        f"the tokenizer {tokenizer.name_or_path!r} has no mask token; "
        f"set mask_token in its tokenizer_config.json or add {MASK_TEXT!r}"
    )


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an answer: eos and, if the vocabulary has it, the end of a chat turn."""
    vocabulary = tokenizer.get_vocab()
    texts = dict.fromkeys((tokenizer.eos_token, TURN_END))
    return tuple(int(vocabulary[text]) for text in texts if text in vocabulary)


def chat_texts(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[str, str]:
    """Apply the chat template to one exchange -> (model input, training target).

    The target is everything that the template appends to the input, end of turn included (SDAR: "...<|im_end|>\\n").
    Raises UserError if there is no usable template, or if an answer changes the text before it.
    """
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; set chat_template in it")
    messages = [{"role": "user", "content": prompt}]
    model_input = render_chat(tokenizer, messages, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": response})
    exchange = render_chat(tokenizer, messages)
    if not exchange.startswith(model_input):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} changes the prompt when an answer follows; "
            "use one whose generation prompt opens the assistant's turn"
        )
    return model_input, exchange[len(model_input) :]


def split_answers(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], all_answers: bool
) -> list[tuple[str, bool]]:
    """A conversation in the chat template -> its text in parts, each with whether it is an answer to train.

    An answer is everything that the template appends to the generation prompt, end of turn included. Raises UserError
    if there is no usable template, or if it changes earlier turns when others follow.
    """
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; set chat_template in it")
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    whole, done, parts = render_chat(tokenizer, messages), "", []
    for i in places if all_answers else places[-1:]:
        before = render_chat(tokenizer, messages[:i], add_generation_prompt=True)
        after = render_chat(tokenizer, messages[: i + 1])
        if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path!r} changes earlier turns when others follow; some leave "
                "out the reasoning of earlier answers: set data.turns to last, or data.reasoning to drop"
            )
        parts += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return parts


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
    """A conversation in the tokenizer's chat template. options: of apply_chat_template.

    Raises UserError if the template has a fault, refuses the messages, or is several without a default one.
    """
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, ValueError, TypeError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} cannot be used for these messages ({why}); correct "
            "chat_template in its tokenizer_config.json, or its chat_template.jinja"
        ) from error


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what determines token ids and prompts: vocabulary, merges, normalisation, chat template."""
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
