"""``eval.samples``: text that the model writes during training, which nothing of training depends on."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3next_train.config.schema import Config
from qwen3next_train.data.tokenization import Tokenizer
from qwen3next_train.engine.base import Engine
from qwen3next_train.generate.prompts import Coder, require_room
from qwen3next_train.generate.sampling import Sampling
from qwen3next_train.metrics.samples import Sample
from qwen3next_train.train.sinks import LogSamples


@dataclass(frozen=True)
class EncodedPrompts:
    """The prompts of ``eval.samples`` as tokens.

    Args:
        ids: of each prompt.
        coder: of the run's tokenizer.
    """

    ids: tuple[list[int], ...]
    coder: Coder

    @classmethod
    def of(cls, config: Config) -> EncodedPrompts | None:
        """Encode them; None where there are none.

        A prompt has to fit into a row with what is to come: the model learns nothing of positions behind it, and
        needs no more memory for it than for a micro-batch.

        Raises:
            ConfigError: the tokenizer cannot be used, or a prompt is too long or has a token the model lacks.
        """
        samples = config.eval.samples
        if not samples.prompts:
            return None
        coder = Coder(Tokenizer(config.data.tokenizer, config.data.eos_token), config.model.vocab_size)
        encoded = []
        for number, prompt in enumerate(samples.prompts, start=1):
            label = f"eval.samples.prompts: prompt {number}"
            encoded.append(coder.encode(prompt, label))
            require_room(
                encoded[-1],
                samples.max_new_tokens,
                config.data.sequence_length,
                label=label,
                limit_name="data.sequence_length",
                setting="--eval.samples.max_new_tokens",
            )
        return cls(tuple(encoded), coder)


class TrainingSamples:
    """Takes samples at the steps that are due; to be called on all ranks alike.

    Args:
        config: the resolved configuration.
        prompts: its prompts.
        engine: the model as it is in training.
        log: told of them.
    """

    def __init__(self, config: Config, prompts: EncodedPrompts, engine: Engine, log: LogSamples) -> None:
        self._settings = config.eval.samples
        self._prompts = prompts
        self._engine = engine
        self._log = log
        self._max_batch_tokens = config.run.micro_batch_size * config.data.sequence_length
        self._sampling = Sampling(
            max_new_tokens=self._settings.max_new_tokens,
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            top_k=self._settings.top_k,
            seed=config.run.seed,
        )

    def take(self, step: int, *, is_last: bool) -> None:
        """Let every prompt go on, if samples are due behind ``step``; behind the last one they always are."""
        if step % self._settings.interval and not is_last:
            return
        coder = self._prompts.coder
        continuations = self._engine.continue_prompts(
            self._prompts.ids,
            self._sampling,
            end_token_id=coder.end_token_id,
            max_batch_tokens=self._max_batch_tokens,
        )
        samples = [
            Sample(prompt, coder.decode(ids, found.ids), len(found.ids), found.finish_reason)
            for prompt, ids, found in zip(self._settings.prompts, self._prompts.ids, continuations, strict=True)
        ]
        self._log(step, samples)
