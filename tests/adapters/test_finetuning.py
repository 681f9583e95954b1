"""Does every optimizer learn low-rank factors of PEFT, and train in TRL's trainers; and if not, does it say why?"""

from __future__ import annotations

import string
import warnings

import pytest
import torch
from thetas import create, slow_unless

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model  # noqa: E402

from pylo_integrations import get_optimizer_info, hf, list_optimizers, param_groups, unwrap_optimizer  # noqa: E402

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("small_thetas"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:'pin_memory' argument"),
]

VOCABULARY, LENGTH, STEPS = 32, 16, 40
HINDERED = {"celo", "velo"}
"""Whose steps are in proportion to the parameter."""


def gpt2():
    """A frozen network that LoRA can steer: its embeddings are large enough to tell tokens apart."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=1, n_head=2,
            bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, loss_type="ForCausalLM",
        )
    )  # fmt: skip
    with torch.no_grad():
        model.transformer.wte.weight.mul_(10)
    return model


def adapted(rank=4, **options):
    settings = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    return get_peft_model(gpt2(), LoraConfig(r=rank, lora_alpha=2 * rank, **settings, **options))


def batches(count):
    """Text of a Markov chain, in which a token has few that follow it."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, VOCABULARY, generator=generator).mul(3).softmax(1)
    for _ in range(count):
        text = torch.randint(VOCABULARY, (16, 1), generator=generator)
        for _ in range(LENGTH - 1):
            text = torch.cat([text, torch.multinomial(table[text[:, -1]], 1, generator=generator)], dim=1)
        yield text


def train(model, optimizer, steps=STEPS):
    """How far the loss of new text fell, and what was warned of."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    unseen, *texts = batches(steps + 1)

    def loss_of(text):
        return model(input_ids=text, labels=text).loss

    with torch.no_grad():
        before = loss_of(unseen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in texts:
            loss = loss_of(text)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss.detach())
            if not optimizer.needs_loss:
                schedule.step()
    told = [str(one.message) for one in caught if "matrices are zero" in str(one.message)]
    with torch.no_grad():
        return float(before - loss_of(unseen)), told


def optimizer_of(model, name):
    """At a rate for a short run: where ``lr`` is the size of a step, factors take a larger one, as with AdamW."""
    spec = get_optimizer_info(name)
    factor = 10 if spec.wants_schedule else 1 if spec.needs_loss or spec.anneals else 3
    return create(model, name, spec.lr * factor, num_steps=STEPS)


# -- PEFT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [slow_unless(name in {"celo", "celo2"}, name) for name in list_optimizers()])
def test_lora_learns_or_it_is_told_why_not(name):
    model = adapted()
    frozen = {key: value.clone() for key, value in model.named_parameters() if not value.requires_grad}
    fall, told = train(model, optimizer_of(model, name))
    now = dict(model.named_parameters())
    assert all(torch.equal(now[key], value) for key, value in frozen.items())
    if name in HINDERED:
        (text,) = told
        assert fall < 0.05 and "4 of 8 matrices are zero" in text and "lora_B.default.weight" in text
    else:
        assert told == [] and fall > 0.5, fall


@pytest.mark.parametrize("name", sorted(HINDERED))
def test_the_remedy_that_is_told_is_one(name):
    model = adapted(init_lora_weights="pissa")
    fall, told = train(model, optimizer_of(model, name))
    assert told == [] and fall > 0.2, fall


VARIANTS = {
    "rank 1": {"rank": 1},
    "rank 16": {"rank": 16},
    "rank 64, more than the width": {"rank": 64},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "a bias beside it": {"bias": "lora_only"},
    "the embeddings whole": {"modules_to_save": ["wte"]},
}


@pytest.mark.parametrize("variant", [slow_unless(label in ("rank 1", "DoRA"), label) for label in VARIANTS])
@pytest.mark.parametrize("name", ["celo2", "small_fc_lopt"])
def test_variants_of_lora(name, variant):
    model = adapted(**VARIANTS[variant])
    fall, _ = train(model, optimizer_of(model, name))
    assert fall > 0.5, fall


@pytest.mark.parametrize("name", ["celo2", "small_fc_lopt", "celo_adam"])
def test_lora_plus_is_a_learning_rate_of_its_own_for_b(name):
    lr = get_optimizer_info(name).lr
    falls = []
    for ratio in (1, 8):
        model = adapted()
        groups = []
        for group in param_groups(model):
            for is_b in (False, True):
                chosen = [(key, param) for key, param in group["params"] if ("lora_B" in key) == is_b]
                groups.append({**group, "params": chosen, "lr": lr * (ratio if is_b else 1)})
        optimizer = optimizer_of(groups, name)
        falls.append(train(model, optimizer)[0])
        rates = {
            "lora_B" in key: group["initial_lr"] for group in optimizer.param_groups for key in group["param_names"]
        }
        assert rates == {True: lr * ratio, False: lr}
    assert falls[1] > falls[0] + 0.1, falls


def test_only_the_factors_have_state_and_are_saved_with_it():
    model = adapted()
    optimizer = optimizer_of(model, "celo2")
    train(model, optimizer, 4)
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert len(names) == len(optimizer.state) == 8 and all("lora_" in name for name in names)
    weights, state = peft.get_peft_model_state_dict(model), optimizer.state_dict()
    resumed = adapted()
    peft.set_peft_model_state_dict(resumed, weights)
    other = optimizer_of(resumed, "celo2")
    other.load_state_dict(state)
    for one, run in ((model, optimizer), (resumed, other)):
        train(one, run, 3)
    pairs = zip(model.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs) and other.iteration == 7


# -- TRL -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("datasets")
    return pytest.importorskip("trl")


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {char: i for i, char in enumerate(["<pad>", "<eos>", "<unk>", *string.printable])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def llama(tokenizer):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def settings(folder, **others):
    common = {"report_to": "none", "use_cpu": True, "bf16": False, "max_steps": 12, "logging_steps": 1}
    common |= {"save_strategy": "no", "per_device_train_batch_size": 8, "disable_tqdm": True}
    return {"output_dir": str(folder), **common, **others}


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sentences(count=64):
    from datasets import Dataset

    text = "the quick brown fox jumps over the lazy dog, "
    return Dataset.from_dict({"text": [(text * 3)[i % 45 : i % 45 + 60] for i in range(count)]})


@pytest.mark.parametrize("name", ["celo2", slow_unless(False, "celo_adam")])
def test_sft_by_name(trl, tokenizer, tmp_path, name):
    trainer_class = hf.with_learned_optimizer(trl.SFTTrainer)
    lr = 10 * get_optimizer_info(name).lr
    arguments = trl.SFTConfig(
        max_length=64, learning_rate=lr, **settings(tmp_path, save_strategy="steps", save_steps=6)
    )
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-6")):
        trainer = trainer_class(
            llama(tokenizer), args=arguments, train_dataset=sentences(), processing_class=tokenizer,
            optimizers=name, peft_config=lora(),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        optimizer = unwrap_optimizer(trainer.optimizer)
        assert (optimizer.iteration, optimizer.num_steps) == (12, 12)
        runs.append([param.detach().clone() for param in trainer.model.parameters() if param.requires_grad])
    assert losses_of(trainer)[-1] < 4.59 < losses_of(trainer)[0]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.fixture
def installed():
    hf.install()
    yield
    hf.uninstall()


def test_the_names_on_the_command_line_of_trls_scripts(trl, tmp_path, installed):
    parser = trl.TrlParser((trl.SFTConfig,))
    line = ["--output_dir", str(tmp_path), "--optim", "celo2", "--optim_args", "on_nonfinite=zero", "--bf16", "false"]
    (arguments,) = parser.parse_args_and_config([*line, "--use_cpu", "true"])
    assert arguments.optim == "celo2" and arguments.optim_args == "on_nonfinite=zero"


def test_sft_of_all_parameters_in_the_stock_trainer(trl, tokenizer, tmp_path, installed):
    arguments = trl.SFTConfig(optim="celo", max_length=64, **settings(tmp_path))
    trainer = trl.SFTTrainer(llama(tokenizer), args=arguments, train_dataset=sentences(), processing_class=tokenizer)
    trainer.train()
    assert unwrap_optimizer(trainer.optimizer).iteration == 12
    assert losses_of(trainer)[-1] < losses_of(trainer)[0] - 0.05


def test_sft_tells_of_zeros(trl, tokenizer, tmp_path, installed):
    arguments = trl.SFTConfig(optim="celo", max_length=64, **settings(tmp_path, max_steps=2))
    trainer = trl.SFTTrainer(
        llama(tokenizer), args=arguments, train_dataset=sentences(), processing_class=tokenizer, peft_config=lora()
    )
    with pytest.warns(RuntimeWarning, match=r"7 of 14 matrices are zero .*lora_B"):
        trainer.train()


def test_dpo(trl, tokenizer, tmp_path, installed):
    from datasets import Dataset

    pairs = Dataset.from_dict({"prompt": ["ab"] * 16, "chosen": ["cd"] * 16, "rejected": ["ef"] * 16})
    trainer = trl.DPOTrainer(
        llama(tokenizer), args=trl.DPOConfig(optim="celo2", **settings(tmp_path)), train_dataset=pairs,
        processing_class=tokenizer, peft_config=lora(),
    )  # fmt: skip
    trainer.train()
    assert unwrap_optimizer(trainer.optimizer).iteration == 12
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    assert trainer.state.log_history[-2]["rewards/margins"] > 0


def test_grpo(trl, tokenizer, tmp_path, installed):
    from datasets import Dataset

    def length(completions, **_):
        return [float(len(completion) + i) for i, completion in enumerate(completions)]  # never all alike

    arguments = trl.GRPOConfig(
        optim="celo2", num_generations=8, max_completion_length=4, **settings(tmp_path, max_steps=3)
    )
    trainer = trl.GRPOTrainer(
        llama(tokenizer), reward_funcs=length, args=arguments, peft_config=lora(),
        train_dataset=Dataset.from_dict({"prompt": ["ab"] * 8}), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert unwrap_optimizer(trainer.optimizer).iteration == 3
    moved = [param for key, param in trainer.model.named_parameters() if "lora_B" in key]
    assert all(param.abs().max() > 0 for param in moved)
