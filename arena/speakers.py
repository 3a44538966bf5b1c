"""The models that visitors talk to: our checkpoints and OpenAI-compatible endpoints, as streams of growing text."""

import queue
import threading
from collections.abc import Iterator

from omegaconf import DictConfig

Messages = list[dict[str, str]]


class SpeakerError(Exception):
    """The model cannot answer. Its text is for the log, not for the page: it may name the model."""


class LocalSpeaker:
    """A checkpoint of ours; one answer at a time, the others wait."""

    def __init__(self, path: str, *, precision: str, sampling: DictConfig):
        from data.tokenizer import load_tokenizer
        from model.reading import read_policy

        self.tokenizer = load_tokenizer(path)
        self.policy = read_policy(path, precision=precision)
        self.sampling, self.busy = sampling, threading.Lock()

    def stream(self, messages: Messages, seed: int) -> Iterator[str]:
        """The answer as it grows. A conversation over the window loses its beginning."""
        pieces: queue.SimpleQueue = queue.SimpleQueue()
        worker = threading.Thread(target=self._answer, args=(messages, seed, pieces), daemon=True)
        worker.start()
        while isinstance(piece := pieces.get(), str):
            yield piece
        if piece is not None:
            raise SpeakerError(repr(piece)) from piece

    def _answer(self, messages: Messages, seed: int, pieces: queue.SimpleQueue) -> None:
        from data.chat import encode_prompt
        from model.sampling import generate

        ids: list[int] = []

        def grow(row: int, token: int, last: bool) -> None:
            ids.append(token)
            text = self.tokenizer.decode(i for i in ids if i not in self.tokenizer.stop_ids)
            if last or not text.endswith("\ufffd"):  # a character whose bytes are not all there yet waits
                pieces.put(text)

        try:
            room = self.policy.config.max_length - self.sampling.max_new_tokens
            prompt = encode_prompt(messages, self.tokenizer, max_length=room)
            with self.busy:
                generate(
                    self.policy, [prompt], seeds=[seed], stop_ids=self.tokenizer.stop_ids, pad_id=self.tokenizer.pad_id,
                    on_token=grow, **self.sampling,
                )  # fmt: skip
            pieces.put(None)
        except Exception as error:  # whatever it is, the visitor's stream must end
            pieces.put(error)


class EndpointSpeaker:
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, *, base_url: str, model: str, api_key_env: str, sampling: DictConfig):
        import openai

        from generation.endpoint import check_url, read_key

        self.model, self.sampling, self._key = model, sampling, read_key(check_url(base_url), api_key_env)
        self.api = openai.OpenAI(base_url=base_url, api_key=self._key, timeout=120)

    def stream(self, messages: Messages, seed: int) -> Iterator[str]:
        """The answer as it grows."""
        from generation.endpoint import redact

        text = ""
        try:
            chunks = self.api.chat.completions.create(
                model=self.model, messages=messages, seed=seed, stream=True, temperature=self.sampling.temperature,
                top_p=self.sampling.top_p, max_tokens=self.sampling.max_new_tokens,
            )  # fmt: skip
            for chunk in chunks:
                if chunk.choices and chunk.choices[0].delta.content:
                    text += chunk.choices[0].delta.content
                    yield text
        except Exception as error:  # a cut stream is httpx's, garbage json's: the visitor is told the same of all
            raise SpeakerError(redact(self._key, repr(error))) from None
        if not text:
            raise SpeakerError(f"{self.model} sent an empty answer")


def load_speakers(
    models: DictConfig, *, precision: str, sampling: DictConfig
) -> dict[str, LocalSpeaker | EndpointSpeaker]:
    """name -> speaker, from `models: {NAME: PATH}` or `{NAME: {base_url:, model:, api_key_env:}}`.

    Raises:
        ValueError: a model that is neither, or with further keys: a key of an endpoint would be written to config.yaml.
    """
    speakers = {}
    for name, place in models.items():
        if isinstance(place, str):
            speakers[name] = LocalSpeaker(place, precision=precision, sampling=sampling)
        elif isinstance(place, DictConfig) and {"base_url", "model"} <= set(place):
            if unknown := set(place) - {"base_url", "model", "api_key_env"}:
                raise ValueError(
                    f"models.{name} has {', '.join(sorted(map(str, unknown)))}; it takes base_url, model and "
                    "api_key_env, which names the environment variable with the key: the key itself would be written"
                )
            key = place.get("api_key_env", "OPENAI_API_KEY")
            speakers[name] = EndpointSpeaker(
                base_url=place.base_url, model=place.model, api_key_env=key, sampling=sampling
            )
        else:
            raise ValueError(f"models.{name} is neither a checkpoint's path nor {{base_url:, model:}}")
    return speakers
