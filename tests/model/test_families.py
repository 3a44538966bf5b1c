"""Every family against transformers: log-probs, gradients, decoding, LoRA, reward head, export, reload, bf16."""

import pytest
import torch
from safetensors.torch import load_file

from model.build import export_model, load_policy, load_reward_model
from model.lora import TARGETS, adapters, add_lora, export_adapter
from model.packing import pack
from model.sampling import generate
from model.weights.names import parts_of
from tests.family_checkpoints import CASES, checkpoint
from tests.tiny_models import batch_of, random_ids

transformers = pytest.importorskip("transformers")
PROMPT = random_ids(9, 0)
ROWS = [(PROMPT, random_ids(24, 1)), (PROMPT, random_ids(31, 2)), (random_ids(3, 3), random_ids(11, 4))]
GREEDY = dict(max_new_tokens=20, temperature=0.0, top_k=0, top_p=1.0, slots=2, stop_ids=[], pad_id=0)


class Words:
    """Stands for a tokenizer: the export asks it for ids and lets it write its own files."""

    bos_id, eos_id, pad_id = 1, 2, 0
    generation_config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

    def save(self, directory):
        pass


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """transformers' model, and the directory that it was saved to."""
    return checkpoint(request.param, tmp_path / "theirs"), tmp_path / "theirs"


def their_logprobs(model, rows=ROWS):
    """The log-probs of all completion tokens, row by row, without padding or sharing."""
    picked = []
    for prompt, completion in rows:
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        picked.append(logits.float().log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(picked)


def our_logprobs(policy, rows=ROWS):
    batch = batch_of(rows, "left")
    return policy.logprobs(*batch)[batch.completion_mask]


def test_logprobs_and_every_gradient_are_those_of_transformers(case, tmp_path):
    """With a prompt that two rows share, rows of three lengths, and padding, on our side alone."""
    theirs, directory = case
    policy = load_policy(directory)
    ours, expected = our_logprobs(policy), their_logprobs(theirs)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()

    mix = torch.linspace(-1, 1, len(expected))
    (ours * mix).sum().backward()
    (expected * mix).sum().backward()
    grads = saved_gradients(theirs, tmp_path / "gradients")
    bound = 4e-5 if policy.config.facts.linear else 2e-5  # both sides sum the recurrence in float32, in other orders
    for name, weight in policy.named_parameters():
        grad = torch.cat([grads[part] for part in parts_of(name, policy.config)])
        assert (weight.grad - grad).abs().max() <= bound * grad.abs().max(), name


def saved_gradients(model, directory) -> dict:
    """Gradients by the names that save_pretrained writes weights by: it takes apart what a forward stacks."""
    for weight in model.parameters():
        weight.data = weight.grad
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def test_greedy_decoding_through_the_cache_is_that_of_transformers(case):
    theirs, directory = case
    prompts = [PROMPT, PROMPT, random_ids(5, 5), random_ids(17, 6)]
    rows = generate(load_policy(directory), prompts, seeds=[0] * 4, **GREEDY).rows
    for prompt, ids, mask in zip(prompts, rows.input_ids, rows.completion_mask, strict=True):
        text = list(prompt)
        for _ in range(20):  # without a cache: transformers' own may be another model's
            with torch.no_grad():
                text.append(theirs(torch.tensor([text])).logits[0, -1].argmax().item())
        assert ids[mask].tolist() == text[len(prompt) :]


def test_an_export_is_read_by_transformers_and_reloaded_with_the_same_config(case, tmp_path):
    theirs, directory = case
    policy = load_policy(directory)
    export_model(policy, tmp_path / "ours", Words())
    reloaded = load_policy(tmp_path / "ours")
    assert reloaded.config == policy.config
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(our_logprobs(reloaded), our_logprobs(policy))
        expected = their_logprobs(theirs)
        assert (their_logprobs(back) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_lora_adapter_of_any_family_is_what_peft_and_the_merged_export_compute(case, tmp_path):
    peft = pytest.importorskip("peft")
    theirs, directory = case
    policy = load_policy(directory, frozen=True)
    policy = add_lora(policy, rank=3, alpha=7.0, targets=TARGETS, seed=5)
    with torch.no_grad():
        for number, lora in enumerate(adapters(policy).values()):
            lora.B.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
        ours = our_logprobs(policy)
        assert (ours - their_logprobs(theirs)).abs().max() > 0.02
        export_adapter(policy, tmp_path / "adapter", str(directory))
        export_model(policy, tmp_path / "merged", Words())
        assert (our_logprobs(load_policy(tmp_path / "merged")) - ours).abs().max() < 2e-5 * ours.abs().max()
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        assert (their_logprobs(adapted) - ours).abs().max() < 2e-5 * ours.abs().max()


def test_a_reward_model_of_any_family_scores_as_the_classifier_of_transformers(case, tmp_path):
    _, directory = case
    model = load_reward_model(directory, precision="fp32", seed=3)
    export_model(model, tmp_path / "reward", Words())
    with torch.no_grad():
        ours = model.score(*batch_of(ROWS, "right"))
        assert torch.equal(
            load_reward_model(tmp_path / "reward", precision="fp32").score(*batch_of(ROWS, "right")), ours
        )
        try:
            theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
                tmp_path / "reward", attn_implementation="eager"
            )
        except ValueError:  # it has no classifier of this family
            return
        expected = torch.cat([theirs(torch.tensor([p + c])).logits[0] for p, c in ROWS])
    assert (ours - expected).abs().max() < 2e-5 * expected.abs().max()


def test_bf16_is_no_further_from_float32_than_transformers_is(case):
    theirs, directory = case
    with torch.no_grad():
        rows = [(random_ids(1, i), random_ids(47 - i, i + 1)) for i in range(12)]  # enough to average over
        exact, ours = (our_logprobs(load_policy(directory, precision=p), rows) for p in ("fp32", "bf16"))
        expected = their_logprobs(theirs.to(torch.bfloat16), rows)
    assert (ours - exact).pow(2).mean() <= 1.3 * (expected - exact).pow(2).mean()


def test_rows_of_one_prompt_share_it():
    """The exactness above is not bought by laying prompts out twice."""
    stream = pack(*batch_of(ROWS, "left"))
    assert len(stream.tokens) == 9 + 24 + 31 + 14
