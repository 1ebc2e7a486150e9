"""Runs EleutherAI's lm-evaluation-harness on a float or quantised model.

Needs ``pip install fireq-jax[lm-eval]``::

    import lm_eval
    from fireq_jax.harness import FireqLM

    model, params = convert.load("path/or/hub-id")
    lm = FireqLM(model, fireq_jax.quantize(params), convert.load_tokenizer("path/or/hub-id"))
    print(lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])["results"])
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from fireq_jax.evaluate import end_parameters, final_hidden
from fireq_jax.generate import generate, padded_length
from fireq_jax.llama import Llama
from fireq_jax.sampling import Sampling


class FireqLM(TemplateLM):
    """The harness's view of a model; keys and values of a quantised one pass through the cache its recipe names.

    Args:
      model: the Llama.
      params: float or quantised parameters.
      tokenizer: a transformers tokenizer, as ``convert.load_tokenizer`` returns it.
      batch_size: sequences that are scored or generated together.
      max_length: tokens per sequence; the model's positions if None.
      max_new_tokens: of a generation whose task names no limit.
      seed: of sampled generations.

    Raises:
      ValueError: ``max_length`` is beyond the model's positions, or the tokenizer has no token to begin a text with.
    """

    def __init__(
        self,
        model: Llama,
        params: Mapping[str, Any],
        tokenizer: Any,
        batch_size: int = 8,
        max_length: int | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = model.config.max_positions if max_length is None else max_length
        if not 2 <= self.max_length <= model.config.max_positions:
            raise ValueError(f"{max_length=} must be between 2 and the model's {model.config.max_positions} positions")
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        if eos is None and bos is None:
            raise ValueError("the tokenizer has neither an eos nor a bos token to put before a text without context")
        self._eot = bos if eos is None else eos
        self._prefix = eos if bos is None else bos
        self._model, self._params = model, params
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens
        self._key = jax.random.key(seed)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._eot

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a string, by default with the special tokens that the tokenizer itself adds."""
        special = True if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token):
            special = False
        return self.tokenizer(string, add_special_tokens=special, **kwargs)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one string."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        # The last token is only predicted; a context that does not fit loses its beginning.
        rows = [
            ((context + continuation)[-(self.max_length + 1) :], min(len(continuation), self.max_length))
            for _, context, continuation in requests
        ]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        starts = range(0, len(order), self._batch_size)
        for start in tqdm(starts, disable=disable_tqdm, desc="Scoring"):
            batch = order[start : start + self._batch_size]
            for i, score in zip(batch, self._score([rows[i] for i in batch]), strict=True):
                scores[i] = score
        return scores

    def _score(self, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Likelihood (log) of the last ``count`` tokens of each ``(tokens, count)``, and if all are the likeliest."""
        length = padded_length(len(rows[0][0]) - 1, self.max_length)
        tokens = np.zeros((self._batch_size, length + 1), np.int32)
        weights = np.zeros((self._batch_size, length), np.float32)
        lengths = np.ones(self._batch_size, np.int32)
        for i, (row, count) in enumerate(rows):
            tokens[i, : len(row)] = row
            weights[i, len(row) - 1 - count : len(row) - 1] = 1
            lengths[i] = len(row) - 1
        x = final_hidden(self._model, self._params, tokens[:, :-1], lengths)
        found = _score_targets(self._model, end_parameters(self._params), x, tokens[:, 1:], weights)
        sums, greedy = (np.asarray(part) for part in found)
        return [(float(sums[i]), bool(greedy[i])) for i in range(len(rows))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of ``max_length`` of which each token is predicted once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of a request's stop strings, which is cut off.

        Understands ``until``, ``max_gen_toks``, ``do_sample``, ``temperature``, ``top_p`` and ``top_k``.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Generating") as bar:
            for members in groups.values():
                settings = requests[members[0]].args[1]
                members.sort(key=lambda i: -len(requests[i].args[0]))
                for start in range(0, len(members), self._batch_size):
                    batch = members[start : start + self._batch_size]
                    for i, text in zip(
                        batch, self._generate([requests[i].args[0] for i in batch], settings), strict=True
                    ):
                        texts[i] = text
                    bar.update(len(batch))
        return texts

    def _generate(self, prompts: list[str], settings: Mapping[str, Any]) -> list[str]:
        new_tokens = int(settings.get("max_gen_toks", self._max_new_tokens))
        if not 1 <= new_tokens < self.max_length:
            raise ValueError(f"max_gen_toks={new_tokens} must be between 1 and {self.max_length - 1}")
        sampling = Sampling()
        if settings.get("do_sample", settings.get("temperature", 0) > 0) and settings.get("temperature", 1) > 0:
            sampling = Sampling(settings.get("temperature", 1.0), settings.get("top_k"), settings.get("top_p", 1.0))
        self._key, key = jax.random.split(self._key)
        ids = [self.tok_encode(prompt)[-(self.max_length - new_tokens) :] for prompt in prompts]
        ends = (*self._model.config.eos_token_ids, self._eot)
        result = generate(
            self._model, self._params, ids, max_new_tokens=new_tokens, sampling=sampling, key=key, eos_token_ids=ends
        )
        until = settings.get("until") or []
        texts = []
        for tokens in result.to_lists():
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
        return texts


@partial(jax.jit, static_argnums=0)
def _score_targets(
    model: Llama, ends: Mapping[str, Any], x: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``[batch]`` sums of the weighted targets' log-likelihoods, and whether all of those are the likeliest tokens."""

    def row(x: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits: Any = model.apply({"params": ends}, x[None], method="logits")
        log_p = jax.nn.log_softmax(logits[0])
        found = jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
        likeliest = jnp.argmax(log_p, axis=-1) == targets
        return jnp.sum(found * weights), jnp.all(likeliest | (weights == 0))

    # One sequence's logits at a time: with a large vocabulary they are what needs memory.
    return jax.lax.map(lambda parts: row(*parts), (x, targets, weights))
