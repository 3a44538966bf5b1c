import pytest
import torch

from model.config import ModelConfig
from model.heads import Policy
from model.packing import pack
from model.sampling import generate

SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8,
    max_length=128, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True,
)  # fmt: skip
SETTINGS = dict(max_new_tokens=41, temperature=1.0, top_k=0, top_p=1.0, pad_id=0)


def random_policy(compute_dtype=None, **changes) -> Policy:
    torch.manual_seed(0)
    policy = Policy(ModelConfig(**(SIZES | changes)), compute_dtype)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # logits wide apart, so that texts differ
    return policy


def random_prompts() -> list[list[int]]:
    torch.manual_seed(1)
    prompts = [torch.randint(0, 97, (n,)).tolist() for n in (3, 9, 1, 20, 5, 40, 2)]
    return [*prompts[:2], prompts[1], prompts[1], *prompts[2:]]  # one prompt three times


FAMILIES = [{}, {"family": "mistral", "sliding_window": 7}, {"family": "qwen2", "qkv_bias": True}]


@pytest.mark.parametrize("changes", FAMILIES, ids=["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("slots", [1, 4, 64])
def test_a_rows_text_does_not_depend_on_its_neighbours(changes, slots):
    policy, prompts = random_policy(**changes), random_prompts()
    together = generate(policy, prompts, slots=slots, seeds=list(range(9)), stop_ids=[5, 6], **SETTINGS)
    for i, prompt in enumerate(prompts):
        alone = generate(policy, [prompt], slots=1, seeds=[i], stop_ids=[5, 6], **SETTINGS)
        row = together.rows.select(i)
        assert torch.equal(row.input_ids[row.attention_mask], alone.rows.input_ids[0])
        assert together.finish_reasons[i] == alone.finish_reasons[0]
    assert {"stop", "length"} == set(together.finish_reasons)  # the case above covers both ends


@pytest.mark.parametrize("changes", FAMILIES, ids=["llama", "mistral", "qwen2"])
def test_decoding_with_the_cache_is_the_full_forward(changes):
    """Greedy decoding takes, at every position, the token that a forward over the whole text ranks first."""
    policy, greedy = random_policy(**changes), SETTINGS | {"temperature": 0.0}
    rows, _, _ = generate(policy, random_prompts(), slots=3, seeds=[0] * 9, stop_ids=[5], **greedy)
    stream = pack(*rows)
    with torch.no_grad():
        logits = policy(stream.tokens, stream.positions, stream.blocks, stream.predicts)
    taken = logits.gather(1, stream.targets[:, None])[:, 0]
    assert len(taken) > 100 and (taken >= logits.amax(1) - 1e-4).all()


def test_what_comes_back_is_prompt_completion_padding():
    policy, prompts = random_policy(), random_prompts()
    seen = []
    rows, reasons, _ = generate(
        policy,
        prompts,
        slots=2,
        seeds=list(range(9)),
        stop_ids=[5, 6],
        on_token=lambda *event: seen.append(event),
        **SETTINGS,
    )
    for i, prompt in enumerate(prompts):
        completion = rows.input_ids[i][rows.completion_mask[i]].tolist()
        assert rows.input_ids[i, : len(prompt)].tolist() == prompt
        assert rows.attention_mask[i].sum() == len(prompt) + len(completion)
        assert completion == [token for row, token, _ in seen if row == i]
        assert [last for row, _, last in seen if row == i] == [False] * (len(completion) - 1) + [True]
        stopped = completion[-1] in (5, 6)
        assert reasons[i] == ("stop" if stopped else "length")
        assert not {5, 6} & set(completion[:-1]) and (stopped or len(completion) == 41)


def test_each_row_may_have_a_limit_of_its_own():
    policy, prompts, limits = random_policy(), random_prompts(), [1, 9, 2, 30, 4, 17, 3, 41, 8]
    rows, _, _ = generate(
        policy, prompts, slots=3, seeds=list(range(9)), stop_ids=[], **(SETTINGS | {"max_new_tokens": limits})
    )
    assert rows.completion_mask.sum(1).tolist() == limits


def test_bf16_rollout_takes_what_the_bf16_forward_finds_likely():
    """Teacher-forced, the bf16 decoder's greedy tokens lose at most bf16 rounding against the forward's best."""
    policy = random_policy(torch.bfloat16)
    rows, _, _ = generate(
        policy, random_prompts(), slots=4, seeds=[0] * 9, stop_ids=[], **(SETTINGS | {"temperature": 0})
    )
    exact = random_policy().logprobs(*rows)[rows.completion_mask]
    assert (policy.logprobs(*rows)[rows.completion_mask] - exact).abs().mean() < 0.1
    assert policy.lm_head.prepared is None and policy.training


@pytest.mark.gpu
@pytest.mark.parametrize("changes", FAMILIES, ids=["llama", "mistral", "qwen2"])
def test_captured_graphs_draw_what_a_cpu_draws(changes, monkeypatch):
    """Texts pass the length that one graph reads; rows leave and enter; without graphs the same once more."""
    settings = SETTINGS | {"max_new_tokens": [300, 9, 280, 1, 290, 270, 20, 2, 300], "stop_ids": [], "slots": 4}
    policy, prompts = random_policy(max_length=512, **changes), random_prompts()
    texts = [generate(policy, prompts, seeds=list(range(9)), **settings).rows]
    policy.cuda()
    texts.append(generate(policy, prompts, seeds=list(range(9)), **settings).rows)
    monkeypatch.setattr("model.sampling.can_capture", lambda policy: False)
    texts.append(generate(policy, prompts, seeds=list(range(9)), **settings).rows)
    assert texts[0].attention_mask.sum(1).max() > 280
    assert all(torch.equal(texts[0].input_ids, rows.input_ids.cpu()) for rows in texts[1:])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[1], []]}, "empty"),
        ({"prompts": [[1] * 100]}, "window of 128"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"slots": 0}, "slots"),
        ({"seeds": [1, 2, 3]}, "3 seeds for 2 prompts"),
        ({"max_new_tokens": [4, 4, 4]}, "one per prompt; got 3 for 2 prompts"),
    ],
)
def test_bad_settings_are_refused(change, message):
    settings = SETTINGS | {"prompts": [[1], [2]], "slots": 2, "stop_ids": []} | change
    settings.setdefault("seeds", list(range(len(settings["prompts"]))))
    with pytest.raises(ValueError, match=message):
        generate(random_policy(), settings.pop("prompts"), **settings)


@pytest.mark.parametrize("choice", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_a_model_with_a_nan_weight_says_nothing(choice):
    policy = random_policy(tie_embeddings=False)
    with torch.no_grad():
        policy.lm_head.weight[3, 0] = torch.nan
    settings = SETTINGS | {"slots": 2, "stop_ids": [], "seeds": [0, 1]} | choice
    with pytest.raises(ValueError, match="logits after token 1 of prompt [01] are not finite"):
        generate(policy, [[1], [2]], **settings)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_log_probs_that_come_with_the_tokens_are_those_of_the_training_forward(temperature):
    policy, settings = random_policy(), SETTINGS | {"temperature": temperature}
    made = generate(policy, random_prompts(), slots=4, seeds=list(range(9)), stop_ids=[5, 6], **settings)
    with torch.no_grad():
        read = policy.logprobs(*made.rows, temperature=temperature)
    for row, mask, logprobs in zip(read, made.rows.completion_mask, made.logprobs, strict=True):
        assert row[mask].tolist() == pytest.approx(logprobs, abs=1e-4)
