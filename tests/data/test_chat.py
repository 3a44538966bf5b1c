"""Chat templates: the ids of the models' own templates, and a mask over what the assistant says and nothing else."""

import pytest
from text_samples import STRANGE, conversations, mistral, mistral_file, said, smollm2, tiny_tokenizer

from data.builtin_templates import TEMPLATES
from data.chat import cut_prompt, encode_chat, encode_completion, encode_completions, encode_prompt
from data.tokenizer import load_tokenizer
from tests.data.test_tokenizer import byte_level_file

LONG = 1 << 20
SYSTEM = {"role": "system", "content": "Be kind.\n"}
# Templates as published with the models (Llama-2-chat shortened to what it does when roles alternate).
PUBLISHED = {
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A tokenizer per template; for Llama-3's, which we may not ship, a byte-level one with its tokens stands in."""
    specials = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    text = " ".join(message["content"] for talk in conversations(most=20) for message in talk)
    llama3 = byte_level_file(
        tmp_path_factory.mktemp("llama3"), specials, text, chat_template=PUBLISHED["llama3"], **names
    )
    sentencepiece = {name: mistral(name) for name in ("llama2", "mistral", "zephyr")}
    return {"chatml": smollm2(), "plain": tiny_tokenizer(), "llama3": load_tokenizer(llama3), **sentencepiece}


@pytest.fixture(scope="module")
def theirs(tokenizers, tmp_path_factory):
    """Our exports as transformers loads them."""
    transformers = pytest.importorskip("transformers")
    loaded = {}
    for name, tokenizer in tokenizers.items():
        directory = tmp_path_factory.mktemp(name)
        tokenizer.save(directory)
        loaded[name] = transformers.AutoTokenizer.from_pretrained(directory)
    return loaded


def render(tokenizer, messages, **settings):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **settings)


@pytest.mark.parametrize("name", TEMPLATES)
def test_exported_template_renders_the_same_ids(name, tokenizers, theirs):
    tokenizer, other = tokenizers[name], theirs[name]
    unusual = [
        [
            *said("a", " b "),
            {"role": "assistant", "content": "c"},
            {"role": "tool", "content": "{}"},
            *said("d", "é🙂"),
        ],
        said("Welcome", "hello", "what can I get you?", first="assistant"),
        [SYSTEM, *said("a", "b")],
    ]
    for talk in [*conversations(), *conversations("sft_coffee_train"), *unusual]:
        full = encode_chat(talk, tokenizer, max_length=LONG)["input_ids"]
        assert full == render(other, talk)
        assert encode_prompt(talk[:-1], tokenizer, max_length=LONG) == render(
            other, talk[:-1], add_generation_prompt=True
        )


@pytest.mark.parametrize("name", [*PUBLISHED, "chatml"])
def test_ids_equal_those_of_the_published_template(name, tokenizers, theirs):
    """ChatML's is inside SmolLM2's file, the default system message included."""
    published = PUBLISHED.get(name) or tokenizers[name].vocabulary.templates["default"]
    for talk in conversations():
        for messages in (talk, [SYSTEM, *talk]):
            ours = encode_chat(messages, tokenizers[name], max_length=LONG)["input_ids"]
            assert ours == render(theirs[name], messages, chat_template=published)
            prompt = encode_prompt(messages[:-1], tokenizers[name], max_length=LONG)
            settings = {"chat_template": published, "add_generation_prompt": True}
            assert prompt == render(theirs[name], messages[:-1], **settings)


def test_mistral_ids_are_those_of_its_makers(tokenizers):
    """mistral-common's first tokenizer encodes `[INST] text [/INST]` and answers alone; </s> ends an answer."""
    import sentencepiece

    alone = sentencepiece.SentencePieceProcessor(model_file=str(mistral_file()))
    for talk in conversations():
        expected = [alone.bos_id()]
        for message in talk:
            user = message["role"] == "user"
            expected += alone.encode(f"[INST] {message['content']} [/INST]" if user else message["content"])
            expected += [] if user else [alone.eos_id()]
        assert encode_chat(talk, tokenizers["mistral"], max_length=LONG)["input_ids"] == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_targets_are_the_assistants_words_and_stop_tokens_and_nothing_else(name, tokenizers):
    tokenizer = tokenizers[name]
    talk = [SYSTEM, *said("one", "Yes, two.", "three", "Four!")]
    row = encode_chat(talk, tokenizer, max_length=LONG)
    spans, span = [], []
    for token, target in zip(row["input_ids"], row["completion_mask"], strict=True):
        span += [token] if target else []
        if span and not target or target and token == tokenizer.stop_id:
            spans.append(span)
            span = []
    spans = [span for span in spans if span]
    assert [span[-1] for span in spans] == [tokenizer.stop_id] * 2
    assert [span.count(tokenizer.stop_id) for span in spans] == [1, 1]
    assert [tokenizer.decode(span).strip() for span in spans] == ["Yes, two.", "Four!"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_rows_begin_as_generation_prompts_do(name, tokenizers):
    """What the sampler is shown is what the row held before its first target, whatever the answer begins with."""
    for answer in ["Hello", " Hello", "\n\nHello", "12", *filter(str.strip, STRANGE)]:
        prompt = encode_prompt(said("Hi\n"), tokenizers[name], max_length=LONG)
        row = encode_chat([*said("Hi\n"), {"role": "assistant", "content": answer}], tokenizers[name], max_length=LONG)
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["completion_mask"][: len(prompt) + 1] == [False] * len(prompt) + [True]
        assert (
            encode_completion(said("Hi\n"), answer, tokenizers[name], max_length=LONG, max_prompt_length=LONG)[
                "input_ids"
            ]
            == row["input_ids"][: len(prompt) + sum(row["completion_mask"])]
        )


@pytest.mark.parametrize("name", TEMPLATES)
def test_nobody_forges_a_turn(name, tokenizers):
    """Special tokens written as text leave the number of special ids unchanged, and the text readable."""
    tokenizer = tokenizers[name]
    added = tokenizer.backend.get_added_tokens_decoder()
    specials = {i: token.content for i, token in added.items() if token.special}
    honest = encode_chat(said("Hi", "Hello"), tokenizer, max_length=LONG)["input_ids"]
    attack = " ".join(specials.values())
    row = encode_chat(said(f"Hi {attack}", "Hello"), tokenizer, max_length=LONG)
    assert sum(i in specials for i in row["input_ids"]) == sum(i in specials for i in honest)
    assert attack in tokenizer.decode(row["input_ids"])


def test_a_conversation_is_cut_on_the_right_and_says_so(tokenizers):
    tokenizer = tokenizers["plain"]
    talk = said("one latte please", "sure, what size would you like?")
    whole = encode_chat(talk, tokenizer, max_length=LONG)
    n = len(whole["input_ids"])
    cut = encode_chat(talk, tokenizer, max_length=n - 2)
    assert cut["input_ids"] == whole["input_ids"][:-2] and cut["num_cut"] == 2
    assert len(cut["completion_mask"]) == n - 2 and whole["num_cut"] == 0
    first = whole["completion_mask"].index(True)
    assert sum(encode_chat(talk, tokenizer, max_length=first + 1)["completion_mask"]) == 1
    with pytest.raises(ValueError, match=f"max_length={first}: the first one comes after {first} tokens"):
        encode_chat(talk, tokenizer, max_length=first)


def test_a_long_prompt_loses_its_beginning_but_not_its_first_token(tokenizers):
    for name in ("plain", "llama2", "chatml"):
        prompt = encode_prompt(said("one latte please"), tokenizers[name], max_length=LONG)
        cut = encode_prompt(said("one latte please"), tokenizers[name], max_length=len(prompt) - 2)
        assert len(cut) == len(prompt) - 2 and cut[2:] == prompt[4:]
        assert (cut[0] == prompt[0]) == (prompt[0] == tokenizers[name].bos_id)
        assert cut_prompt(prompt, tokenizers[name], max_length=1) == prompt[-1:]


def test_completions_share_the_prompt_and_are_cut_at_their_end(tokenizers):
    tokenizer = tokenizers["plain"]
    prompt, answers = said("a b c d e f g h i j"), ["short", "a much longer answer that goes on and on and on"]
    whole = encode_completions(prompt, answers, tokenizer, max_length=LONG, max_prompt_length=LONG)
    header = whole[0]["completion_mask"].index(True)
    longest = len(whole[1]["input_ids"])
    for row, answer in zip(whole, answers, strict=True):
        assert row["input_ids"].count(tokenizer.stop_id) == 2  # the user's turn ends with <|end|> too
        assert row["input_ids"][-1] == tokenizer.stop_id and row["num_cut"] == 0
        assert tokenizer.decode(row["input_ids"][header:]) == answer
    # four tokens too many: the prompt gives them, as far as max_prompt_length lets it
    rows = encode_completions(prompt, answers, tokenizer, max_length=longest - 4, max_prompt_length=header - 4)
    assert [row["completion_mask"].index(True) for row in rows] == [header - 4] * 2
    assert [row["input_ids"][header - 4 :] for row in rows] == [row["input_ids"][header:] for row in whole]
    assert [row["num_cut"] for row in rows] == [4, 4]
    least = encode_completions(prompt, answers, tokenizer, max_length=longest - 4, max_prompt_length=1)
    assert least == rows  # no more of the prompt goes than must
    rows = encode_completions(prompt, answers, tokenizer, max_length=longest - 4, max_prompt_length=header - 1)
    assert rows[0]["input_ids"][-1] == tokenizer.stop_id  # the short answer is whole
    assert rows[1]["input_ids"][header - 1 :] == whole[1]["input_ids"][header:-3]  # the long one is cut: no stop token
    assert [row["num_cut"] for row in rows] == [1, 4]
    with pytest.raises(ValueError, match="max_prompt_length=20"):
        encode_completions(prompt, answers, tokenizer, max_length=header // 2, max_prompt_length=20)


@pytest.mark.parametrize("name", TEMPLATES)
def test_bad_conversations_are_refused(name, tokenizers):
    if name not in ("chatml", "llama3"):  # the models' own, which write any role
        with pytest.raises(ValueError, match="robot"):
            encode_chat([{"role": "robot", "content": "x"}, *said("a", "b")], tokenizers[name], max_length=LONG)
    with pytest.raises(ValueError, match=r"without an assistant turn.*\(its roles: user\)"):
        encode_chat(said("a"), tokenizers[name], max_length=LONG)
    with pytest.raises(ValueError, match="without an assistant turn.*none"):
        encode_chat([], tokenizers[name], max_length=LONG)


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_a_system_message_that_has_no_place_is_refused(name, tokenizers):
    with pytest.raises(ValueError, match="one system message, at the beginning"):
        encode_chat([*said("a", "b"), SYSTEM], tokenizers[name], max_length=LONG)
    with pytest.raises(ValueError, match="user turn that must follow"):
        encode_chat([SYSTEM, *said("a", "b", first="assistant")], tokenizers[name], max_length=LONG)


def test_an_export_keeps_the_checkpoints_own_files(tokenizers, tmp_path):
    tokenizers["llama3"].save(tmp_path)
    for name, content in tokenizers["llama3"].vocabulary.files.items():
        assert (tmp_path / name).read_bytes() == content


def test_an_export_with_another_template_names_its_stop_token_as_the_end(theirs, tokenizers):
    for name in ("zephyr", "plain", "llama2", "mistral"):
        assert theirs[name].eos_token_id == tokenizers[name].stop_id
        assert theirs[name].backend_tokenizer.truncation is None
