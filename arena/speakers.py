"""The models that visitors talk to: checkpoints and OpenAI-compatible endpoints, as streams of growing text."""

import queue
import threading
from collections.abc import Iterator

from omegaconf import DictConfig

from data.chat_template import TextMarkerSaid

Messages = list[dict[str, str]]


class SpeakerError(Exception):
    """The model cannot answer. The message is for the log, not for the page, as it may name the model."""


class TextRefused(ValueError):
    """A model's template cannot carry the visitor's text. The message is for the visitor and names no model."""


class LocalSpeaker:
    """A checkpoint. It gives one answer at a time; other requests wait."""

    def __init__(self, path: str, *, precision: str, sampling: DictConfig):
        from data.tokenizer import load_tokenizer
        from model.reading import read_policy

        self.tokenizer = load_tokenizer(path)
        self.policy = read_policy(path, precision=precision)
        self.sampling, self.busy = sampling, threading.Lock()

    def stream(self, messages: Messages, seed: int) -> Iterator[str]:
        """Yield the growing answer. A conversation that is longer than the window loses its first messages.

        Raises:
            SpeakerError: the model failed. TextRefused: a text holds a marker of the template.
        """
        pieces: queue.SimpleQueue = queue.SimpleQueue()
        worker = threading.Thread(target=self._answer, args=(messages, seed, pieces), daemon=True)
        worker.start()
        while isinstance(piece := pieces.get(), str):
            yield piece
        if isinstance(piece, TextMarkerSaid):
            raise TextRefused(
                "One of the models cannot read this conversation: a text in it is a marker of the model's template, "
                "such as [/INST]. Write your message without it, or vote on the answers so far."
            ) from piece
        if piece is not None:
            raise SpeakerError(repr(piece)) from piece

    def _answer(self, messages: Messages, seed: int, pieces: queue.SimpleQueue) -> None:
        from data.chat import encode_prompt
        from model.sampling import generate

        ids: list[int] = []

        def grow(row: int, token: int, last: bool) -> None:
            ids.append(token)
            text = self.tokenizer.decode(i for i in ids if i not in self.tokenizer.stop_ids)
            if last or not text.endswith("\ufffd"):  # wait for the remaining bytes of a character
                pieces.put(text)

        try:
            room = self.policy.config.max_length - self.sampling.max_new_tokens
            prompt = encode_prompt(messages, self.tokenizer, max_length=room)
            with self.busy:
                generate(
                    self.policy,
                    [prompt],
                    seeds=[seed],
                    stop_ids=self.tokenizer.stop_ids,
                    pad_id=self.tokenizer.pad_id,
                    on_token=grow,
                    **self.sampling,
                )
            pieces.put(None)
        except Exception as error:  # every error must end the visitor's stream
            pieces.put(error)


class EndpointSpeaker:
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, *, base_url: str, model: str, api_key_env: str, sampling: DictConfig):
        import openai

        from generation.endpoint_access import check_url, read_key

        self.model, self.sampling, self._key = model, sampling, read_key(check_url(base_url), api_key_env)
        self.api = openai.OpenAI(base_url=base_url, api_key=self._key, timeout=120)

    def stream(self, messages: Messages, seed: int) -> Iterator[str]:
        """Yield the growing answer."""
        from generation.endpoint_access import redact

        text = ""
        try:
            chunks = self.api.chat.completions.create(
                model=self.model,
                messages=messages,
                seed=seed,
                stream=True,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                max_tokens=self.sampling.max_new_tokens,
            )
            for chunk in chunks:
                if chunk.choices and chunk.choices[0].delta.content:
                    text += chunk.choices[0].delta.content
                    yield text
        except Exception as error:  # a cut stream raises httpx's errors, garbage json's; the visitor sees one sentence
            raise SpeakerError(redact(self._key, repr(error))) from None
        if not text:
            raise SpeakerError(f"{self.model} sent an empty answer")


def load_speakers(
    models: DictConfig, *, precision: str, sampling: DictConfig
) -> dict[str, LocalSpeaker | EndpointSpeaker]:
    """{name: speaker} from `models: {NAME: PATH}` or `{NAME: {base_url:, model:, api_key_env:}}`.

    Raises:
        ValueError: a model has another form or further keys. A secret key would be written to config.yaml.
    """
    speakers: dict[str, LocalSpeaker | EndpointSpeaker] = {}
    for name, place in models.items():
        if isinstance(place, str):
            speakers[name] = LocalSpeaker(place, precision=precision, sampling=sampling)
        elif isinstance(place, DictConfig) and {"base_url", "model"} <= set(place):
            if unknown := set(place) - {"base_url", "model", "api_key_env"}:
                raise ValueError(
                    f"models.{name} has {', '.join(sorted(map(str, unknown)))}; it takes base_url, model and "
                    "api_key_env (the name of the environment variable with the key, not the key, which would be "
                    "written to config.yaml)"
                )
            key = place.get("api_key_env", "OPENAI_API_KEY")
            speakers[name] = EndpointSpeaker(
                base_url=place.base_url, model=place.model, api_key_env=key, sampling=sampling
            )
        else:
            raise ValueError(f"models.{name} is neither a checkpoint's path nor {{base_url:, model:}}")
    return speakers
