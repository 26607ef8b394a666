"""A reward model: one process that scores the conversations of all actors with a sequence classifier.

    actors/scoring.py --score--> RewardModel (a Ray actor): rendered by ITS chat template and tokenizer
                                    | waiting, from all callers --`batch` at a time--> forward pass
                 <--a number each, or why there is none--

cluster/services.py starts one for each `reward_model:PATH` of a config. Nothing is truncated: a conversation
that is too long for the model has no score, and says so. Conversations are batched only with such whose
lengths the model can tell apart: padded with its own pad token, or of equal length where it has none.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from core.calls import Client, asks
from core.errors import RewardError
from core.tokenizer import has_chat_template
from rewards.hosted import HostedModel

_log = logging.getLogger(__name__)

Conversation: TypeAlias = Sequence[Mapping[str, Any]]
Value: TypeAlias = float | str
"""A score, or why there is none."""
_SUFFIX = "ForSequenceClassification"
_UNBOUNDED = 10**9  # Tokenizers write a very large number for no limit.


class _Waiting(NamedTuple):
    token_ids: tuple[int, ...]
    type_ids: tuple[int, ...]
    answer: asyncio.Future[Value]


class Classifier(NamedTuple):
    """A sequence classifier, checked without its weights.

    label_index  which of its logits is the reward
    max_tokens   longest sequence that it takes
    """

    path: str
    config: Any
    tokenizer: Any
    label_index: int
    max_tokens: int


def check_classifier(name: str, settings: HostedModel, path: str) -> Classifier:
    """Returns what is in the directory or on the hub at `path`, which `name` of the config holds. Raises
    RewardError where that is no sequence classifier, its label is not clear, or its tokenizer cannot render a
    conversation.
    """
    from transformers import AutoConfig, AutoTokenizer

    if path.startswith(("/", ".", "~")) and not os.path.isdir(path):
        raise RewardError(f"reward function {name!r}: there is no directory {path}.")
    trust = settings.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RewardError(f"reward function {name!r}: no model and tokenizer to be had: {reason}") from None
    architectures = list(getattr(config, "architectures", None) or ())
    if not any(architecture.endswith(_SUFFIX) for architecture in architectures):
        raise RewardError(
            f"reward function {name!r}: the model is {', '.join(architectures) or 'of no named kind'}, expected a "
            f"sequence classifier (...{_SUFFIX}); the head of another would be random."
        )
    if settings.chat_template and not has_chat_template(tokenizer):
        raise RewardError(
            f"reward function {name!r}: its tokenizer has no chat template. With chat_template=false behind the ? "
            "the model gets prompt and completion as a pair of texts."
        )
    return Classifier(
        path, config, tokenizer, _label_index(name, settings, config), _longest(settings, config, tokenizer)
    )


def _label_index(name: str, settings: HostedModel, config: Any) -> int:
    labels = {str(label): int(index) for index, label in config.id2label.items()}
    if settings.label:
        if settings.label not in labels:
            raise RewardError(
                f"reward function {name!r}: the model has no label {settings.label!r}; it has {', '.join(labels)}."
            )
        return labels[settings.label]
    if config.num_labels != 1:
        raise RewardError(
            f"reward function {name!r}: the model has {config.num_labels} labels; say which is the reward with "
            f"label=NAME behind the ?, one of {', '.join(labels)}."
        )
    return 0


def _longest(settings: HostedModel, config: Any, tokenizer: Any) -> int:
    known = (getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None))
    limits = [int(limit) for limit in known if isinstance(limit, int | float) and 0 < limit < _UNBOUNDED]
    longest = min(limits, default=_UNBOUNDED)
    if settings.max_tokens:
        return min(settings.max_tokens, longest)
    return longest


class RewardModel:
    """Scores conversations; `cluster/services.py` makes it a Ray actor, whose event loop batches what all
    actors ask.
    """

    def __init__(self, name: str, settings: HostedModel, path: str) -> None:
        """Loads the model. Raises RewardError for what `check_classifier` raises it."""
        from transformers import AutoModelForSequenceClassification

        self._name, self._settings = name, settings
        self._classifier = found = check_classifier(name, settings, path)
        on_gpu = settings.num_gpus > 0 and torch.cuda.is_available()
        self._device = torch.device("cuda" if on_gpu else "cpu")
        model = AutoModelForSequenceClassification.from_pretrained(
            found.path,
            dtype="auto" if on_gpu else torch.float32,
            trust_remote_code=settings.trust_remote_code,
        )
        self._model = model.to(self._device).eval()
        self._pad_id: int | None = getattr(found.config, "pad_token_id", None)
        self._waiting: deque[_Waiting] = deque()
        self._working: asyncio.Task[None] | None = None
        self._counts = {"scored": 0.0, "failed": 0.0, "passes": 0.0}

    async def score(self, conversations: Sequence[Conversation]) -> list[Value]:
        """Returns for each conversation its reward, or why it has none."""
        loop = asyncio.get_running_loop()
        encoded = await loop.run_in_executor(None, lambda: [self._encode(said) for said in conversations])
        answers: list[asyncio.Future[Value]] = []
        for tokens in encoded:
            answer: asyncio.Future[Value] = loop.create_future()
            answers.append(answer)
            if isinstance(tokens, str):
                answer.set_result(tokens)
            else:
                self._waiting.append(_Waiting(*tokens, answer))
        if self._waiting and (self._working is None or self._working.done()):
            self._working = loop.create_task(self._work())
        values = [await answer for answer in answers]
        num_failed = sum(isinstance(value, str) for value in values)
        self._counts["failed"] += num_failed
        self._counts["scored"] += len(values) - num_failed
        return values

    async def counts(self) -> dict[str, float]:
        """Returns conversations scored and failed, and forward passes, since this process began."""
        return dict(self._counts)

    async def _work(self) -> None:
        """Scores what waits, a batch at a time, until nothing does."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._take_batch()
            try:
                values: Sequence[Value] = await loop.run_in_executor(None, self._forward, batch)
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
                _log.exception("%s cannot score a batch of %d", self._name, len(batch))
                reason = (str(error).splitlines() or [""])[0]
                values = [f"its model raised {type(error).__name__}: {reason}"] * len(batch)
            for waiting, value in zip(batch, values, strict=True):
                if not waiting.answer.done():  # Its caller may be gone.
                    waiting.answer.set_result(value)

    def _take_batch(self) -> list[_Waiting]:
        """Takes the one that waits longest, and others that may be in one forward pass with it."""
        batch = [self._waiting.popleft()]
        kept: deque[_Waiting] = deque()
        while self._waiting and len(batch) < self._settings.batch:
            other = self._waiting.popleft()
            fits = self._pad_id is not None or len(other.token_ids) == len(batch[0].token_ids)
            (batch if fits else kept).append(other)
        self._waiting.extendleft(reversed(kept))
        return batch

    def _encode(self, conversation: Conversation) -> tuple[tuple[int, ...], tuple[int, ...]] | str:
        """Returns token and type ids of a conversation, or why it has none."""
        tokenizer, limit = self._classifier.tokenizer, self._classifier.max_tokens
        try:
            if self._settings.chat_template:
                made = tokenizer.apply_chat_template(
                    [dict(message) for message in conversation], tokenize=True, return_dict=True
                )
            else:
                *shown, last = conversation
                prompt = "\n".join(str(message["content"]) for message in shown)
                made = tokenizer(prompt, str(last["content"]), verbose=False)
        except Exception as error:  # noqa: BLE001 -- a template raises what it likes, the tokenizer too
            reason = " ".join(str(error).split())[:200]
            return f"the conversation cannot be rendered for the model: {type(error).__name__}: {reason}"
        token_ids = tuple(made["input_ids"])
        if len(token_ids) > limit:
            return f"the conversation is {len(token_ids)} tokens long, and the model takes {limit}"
        return token_ids, tuple(made.get("token_type_ids") or ())

    def _forward(self, batch: Sequence[_Waiting]) -> list[Value]:
        """Returns the reward of each, from one forward pass."""
        longest = max(len(waiting.token_ids) for waiting in batch)
        pad_id = self._pad_id or 0

        def padded(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
            filled = [[*row, *[filler] * (longest - len(row))] for row in rows]
            return torch.tensor(filled, device=self._device)

        rows = [waiting.token_ids for waiting in batch]
        inputs = {
            "input_ids": padded(rows, pad_id),
            "attention_mask": padded([[1] * len(row) for row in rows], 0),
        }
        if batch[0].type_ids:
            inputs["token_type_ids"] = padded([waiting.type_ids for waiting in batch], 0)
        with torch.inference_mode():
            logits = self._model(**inputs).logits[:, self._classifier.label_index].float().cpu()
        self._counts["passes"] += 1
        return [
            float(value) if torch.isfinite(value) else f"its model gives {float(value)}" for value in logits
        ]


class RewardModelClient(Client):
    """What may be asked of a reward model."""

    score = asks(RewardModel.score)
    counts = asks(RewardModel.counts)
