"""Does a learned optimizer behave in the Hugging Face Trainer: names, options, loss, horizon, schedule, resume?"""

from __future__ import annotations

import copy
import json
import logging
import pickle
import types
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from packaging.version import Version
from toy_loss_rule import ToyLossOpt, toy_loss_optimizer

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from torch.optim.lr_scheduler import LambdaLR  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler  # noqa: E402
from transformers.trainer_utils import SchedulerType  # noqa: E402
from transformers.training_args import OptimizerNames  # noqa: E402

from pylo_integrations import (  # noqa: E402
    OptimizerSpec,
    ShardingError,
    SmallFCLOpt,
    get_optimizer_info,
    hf,
    param_groups,
    register_optimizer,
    unregister_optimizer,
    unwrap_optimizer,
)
from pylo_integrations.hf import stock  # noqa: E402
from pylo_integrations.hf.optimizer import FromGroups, check_supported  # noqa: E402
from pylo_integrations.hf.run import RunCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")
VOCABULARY = 32


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=12,
        )
    )


def texts(count=23, length=12):
    """Sequences whose last tokens are masked, differently many, so that averaging micro-batches would be wrong."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (count, length), generator=generator)
    labels = tokens.clone()
    for index in range(count):
        labels[index, length - index % (length - 3) :] = -100
    return [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]


def sentences():
    return [{"input_ids": item["input_ids"], "labels": item["input_ids"][0] % 2} for item in texts()]


@pytest.fixture
def make_args(tmp_path):
    def make(**options):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return TrainingArguments(**{**defaults, **options})

    return make


@pytest.fixture
def installed():
    hf.install()
    yield
    hf.uninstall()


@pytest.fixture
def make_trainer(make_args, request):
    """Trainers on either path: ours with ``optimizers=name``, or the stock one with ``optim=name`` after install()."""

    def make(name, stock, model=None, **options):
        if stock:
            request.getfixturevalue("installed")
            args = make_args(optim=name, **options)
            return transformers.Trainer(model or gpt2(), args, train_dataset=texts())
        return hf.Trainer(model or gpt2(), make_args(**options), train_dataset=texts(), optimizers=name)

    return make


both_paths = pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])


def fit(trainer, **options):
    trainer.train(**options)
    return unwrap_optimizer(trainer.optimizer)


def logged(trainer, what="loss"):
    return [entry[what] for entry in trainer.state.log_history if "loss" in entry]


def everything_changed_by_install():
    return {
        "values": dict(OptimizerNames._value2member_map_),
        "members": dict(OptimizerNames._member_map_),
        "names": list(OptimizerNames._member_names_),
        "attributes": dict(vars(OptimizerNames)),
        "trainer": dict(vars(transformers.Trainer)),
        "accelerator": dict(vars(accelerate.Accelerator)),
        "callbacks": dict(vars(CallbackHandler)),
        "handlers": dict(stock._handlers() or {}),
    }


HAS_HANDLERS = Version(transformers.__version__) >= Version("5.2")
"""Whether this transformers lists who makes an optimizer, by its name."""


# -- does a name reach the optimizer, however it is given? -------------------------------------------------------------


@pytest.mark.parametrize("optimizers", ["toy_loss", ("toy_loss", None), ["toy_loss", None]])
@pytest.mark.parametrize("positional", [False, True])
def test_our_trainer_takes_names(make_args, toy_loss, optimizers, positional):
    if positional:
        trainer = hf.Trainer(gpt2(), make_args(), None, texts(), *[None] * 6, optimizers)
    else:
        trainer = hf.Trainer(gpt2(), make_args(), train_dataset=texts(), optimizers=optimizers)
    optimizer = fit(trainer)
    assert isinstance(optimizer, ToyLossOpt)
    assert optimizer.rule.seen_losses == logged(trainer)
    assert (optimizer.iteration, optimizer.num_steps) == (4, 4)


@pytest.mark.parametrize("source", ["args", "yaml", "json", "cli"])
@pytest.mark.parametrize("name", ["toy_loss", "small_fc_lopt"])
def test_stock_trainer_takes_names_after_install(make_args, toy_loss, installed, tmp_path, source, name):
    text = "max_grad_norm=0.5, backend=reference"
    if source == "args":
        args = make_args(optim=name, optim_args=text)
    else:
        fields = {
            "output_dir": str(tmp_path / "out"),
            "optim": name,
            "optim_args": text,
            "max_steps": 4,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
        }
        parser = HfArgumentParser(TrainingArguments)
        path = tmp_path / f"args.{source}"
        path.write_text(json.dumps(fields))  # JSON is YAML too
        if source == "yaml":
            (args,) = parser.parse_yaml_file(str(path))
        elif source == "json":
            (args,) = parser.parse_json_file(str(path))
        else:
            (args,) = parser.parse_args_into_dataclasses([f"--{key}={value}" for key, value in fields.items()])
    trainer = transformers.Trainer(gpt2(), args, train_dataset=texts())
    optimizer = fit(trainer)
    assert type(optimizer) is get_optimizer_info(name).cls
    assert (optimizer.max_grad_norm, optimizer.backend, optimizer.num_steps) == (0.5, "reference", 4)
    if name == "toy_loss":
        assert optimizer.rule.seen_losses == logged(trainer)
    # Arguments are logged, saved and sent between processes.
    assert args.to_dict()["optim"] == json.loads(args.to_json_string())["optim"] == name
    assert copy.deepcopy(args).optim is pickle.loads(pickle.dumps(args)).optim is args.optim


def test_small_fc_trains(make_args):
    args = make_args(max_steps=30, per_device_train_batch_size=8)
    trainer = hf.Trainer(gpt2(), args, train_dataset=texts(8), optimizers="small_fc_lopt")
    fit(trainer)
    assert logged(trainer)[-1] < 0.97 * logged(trainer)[0]


def test_published_weights_without_network_are_the_documented_error(make_args, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    trainer = hf.Trainer(gpt2(), make_args(), train_dataset=texts(), optimizers="velo")
    with pytest.raises(FileNotFoundError, match="hub:amoudgl/velo-4000.*not in the local cache"):
        fit(trainer)


def test_the_mixin_changes_nothing_without_a_name(make_args):
    losses = []
    for trainer_class in (transformers.Trainer, hf.Trainer):
        trainer = trainer_class(gpt2(), make_args(learning_rate=1e-2), train_dataset=texts())
        assert fit(trainer) is None
        losses.append(logged(trainer))
    assert losses[0] == losses[1]


def test_model_init_works_and_makes_a_new_optimizer_each_time(make_args, toy_loss):
    trainer = hf.Trainer(model_init=gpt2, args=make_args(), train_dataset=texts(), optimizers="toy_loss")
    first, second = fit(trainer), fit(trainer)
    assert first is not second
    assert first.rule.seen_losses == second.rule.seen_losses == logged(trainer)
    assert second.num_steps == 4


class CustomTrainer(transformers.Trainer):
    """A trainer of the kind found in libraries: own arguments, own loss, own step, methods of older signatures."""

    def __init__(self, *args, factor=3.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def create_optimizer(self):
        return super().create_optimizer()

    def get_decay_parameter_names(self, model):
        return ["transformer.wpe.weight"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.factor * super().compute_loss(model, inputs, False, num_items_in_batch)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


@both_paths
def test_a_foreign_trainer_class_takes_names(make_args, toy_loss, installed, stock):
    if stock:
        trainer_class, args, options = CustomTrainer, make_args(optim="toy_loss", weight_decay=0.1), {}
    else:
        trainer_class, args = hf.with_learned_optimizer(CustomTrainer), make_args(weight_decay=0.1)
        options = {"optimizers": "toy_loss"}
    trainer = trainer_class(gpt2(), args, train_dataset=texts(), factor=2.0, **options)
    optimizer = fit(trainer)
    assert optimizer.rule.seen_losses == logged(trainer)
    assert trainer.factor == 2.0
    decaying = [name for g in optimizer.param_groups if g["weight_decay"] for name in g["param_names"]]
    assert decaying == ["transformer.wpe.weight"]


def test_a_launcher_that_replaces_the_trainers_first_callbacks_is_followed(make_args, toy_loss, installed, monkeypatch):
    """As ms-swift does: without ours, nobody hears the loss or tells how long the run is."""

    class Flow(transformers.DefaultFlowCallback):
        pass

    monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [Flow])
    trainer = transformers.Trainer(gpt2(), make_args(optim="toy_loss"), train_dataset=texts())
    assert [type(callback) for callback in trainer.callback_handler.callbacks[:2]] == [Flow, RunCallback]
    optimizer = fit(trainer)
    assert optimizer.rule.seen_losses == logged(trainer) and optimizer.num_steps == 4


def test_a_foreign_trainer_class_takes_names_positionally(make_args, toy_loss):
    trainer_class = hf.with_learned_optimizer(CustomTrainer)
    trainer = trainer_class(gpt2(), make_args(), None, texts(), *[None] * 6, ("toy_loss", "cosine"), factor=2.0)
    assert fit(trainer).rule.seen_losses == logged(trainer)


def test_with_learned_optimizer_is_idempotent_and_checks_its_argument():
    wrapped = hf.with_learned_optimizer(CustomTrainer)
    assert hf.with_learned_optimizer(wrapped) is wrapped
    assert hf.with_learned_optimizer(hf.Trainer) is hf.Trainer
    assert issubclass(wrapped, CustomTrainer) and wrapped.__name__.startswith("CustomTrainer")
    with pytest.raises(TypeError, match="subclass of transformers.Trainer"):
        hf.with_learned_optimizer(GPT2LMHeadModel)


# -- is the loss the one that the Trainer logs? ------------------------------------------------------------------------

LOSS_CASES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation over an epoch's end": {"gradient_accumulation_steps": 5, "max_steps": 6},
    "bf16": {"bf16": True},
    "label smoothing": {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("case", LOSS_CASES)
@pytest.mark.parametrize(
    ("path", "model"),
    # Who counts the loss is a matter of the path, what is counted one of the model.
    [*((path, gpt2) for path in ("mixin", "install", "both", "both, by args")), ("mixin", bert), ("install", bert)],
)
def test_loss_is_the_logged_one(make_args, toy_loss, request, path, model, case):
    if path != "mixin":
        request.getfixturevalue("installed")
    args = make_args(**LOSS_CASES[case], **({} if path in ("mixin", "both") else {"optim": "toy_loss"}))
    trainer_class = transformers.Trainer if path == "install" else hf.Trainer
    options = {"optimizers": "toy_loss"} if path in ("mixin", "both") else {}
    data = texts() if model is gpt2 else sentences()
    trainer = trainer_class(model(), args, train_dataset=data, **options)
    optimizer = fit(trainer)
    assert optimizer.rule.seen_losses == logged(trainer)
    assert len(logged(trainer)) == args.max_steps


@both_paths
def test_loss_of_models_that_do_not_count_items(make_args, toy_loss, installed, stock):
    model = gpt2()
    model.accepts_loss_kwargs = False  # the Trainer then divides the loss by the accumulation steps itself
    args = make_args(gradient_accumulation_steps=3, **({"optim": "toy_loss"} if stock else {}))
    trainer_class, options = (transformers.Trainer, {}) if stock else (hf.Trainer, {"optimizers": "toy_loss"})
    trainer = trainer_class(model, args, train_dataset=texts(), **options)
    assert fit(trainer).rule.seen_losses == logged(trainer)


@both_paths
def test_loss_of_a_skipped_step_does_not_leak_into_the_next(make_args, toy_loss, installed, monkeypatch, stock):
    """As a GradScaler does on overflow, leave out the second of four steps."""
    step, calls = accelerate.optimizer.AcceleratedOptimizer.step, []

    def sometimes(self, closure=None):
        calls.append(self)
        if len(calls) != 2:
            step(self, closure)

    monkeypatch.setattr(accelerate.optimizer.AcceleratedOptimizer, "step", sometimes)
    trainer_class, options = (transformers.Trainer, {}) if stock else (hf.Trainer, {"optimizers": "toy_loss"})
    args = make_args(**({"optim": "toy_loss"} if stock else {}))
    trainer = trainer_class(gpt2(), args, train_dataset=texts(), **options)
    optimizer = fit(trainer)
    losses = logged(trainer)
    assert optimizer.rule.seen_losses == [losses[0], *losses[2:]]


@both_paths
@pytest.mark.parametrize("num_steps", [None, 100])
def test_a_ready_made_optimizer_gets_loss_and_horizon(make_args, installed, stock, num_steps):
    model = gpt2()
    optimizer = ToyLossOpt(param_groups(model), num_steps=num_steps)
    trainer_class = transformers.Trainer if stock else hf.Trainer
    trainer = trainer_class(model, make_args(), train_dataset=texts(), optimizers=(optimizer, None))
    assert fit(trainer) is optimizer
    assert optimizer.rule.seen_losses == logged(trainer)
    assert optimizer.num_steps == (num_steps or 4)


def test_install_does_not_touch_optimizers_of_plain_accelerate(toy_loss, installed):
    accelerator = accelerate.Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)
    model, wrapper = accelerator.prepare(model, ToyLossOpt(model.parameters(), num_steps=3))
    loss = model(torch.ones(1, 2)).sum()
    accelerator.backward(loss)
    unwrap_optimizer(wrapper).observe_loss(7.0)
    wrapper.step()
    assert unwrap_optimizer(wrapper).rule.seen_losses == [7.0]


# -- is the horizon the length of the run? -----------------------------------------------------------------------------


@both_paths
def test_training_twice_extends_the_horizon(make_args, toy_loss, installed, stock):
    args = make_args(**({"optim": "toy_loss"} if stock else {}))
    trainer_class, options = (transformers.Trainer, {}) if stock else (hf.Trainer, {"optimizers": "toy_loss"})
    trainer = trainer_class(gpt2(), args, train_dataset=texts(), **options)
    first = fit(trainer)
    losses = logged(trainer)
    assert first.num_steps == 4
    second = fit(trainer)
    assert second is first
    assert (second.iteration, second.num_steps) == (8, 8)
    assert second.rule.seen_losses == losses + logged(trainer)


def test_epochs_give_the_horizon_too(make_args, toy_loss):
    args = make_args(max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=5)
    trainer = hf.Trainer(gpt2(), args, train_dataset=texts(), optimizers="toy_loss")
    optimizer = fit(trainer)
    assert optimizer.num_steps == optimizer.iteration == trainer.state.max_steps == 6


def test_create_optimizer_by_hand_before_training(make_args, toy_loss):
    trainer = hf.Trainer(gpt2(), make_args(), train_dataset=texts(), optimizers="toy_loss")
    created = trainer.create_optimizer()
    assert isinstance(created, ToyLossOpt) and created.num_steps is None
    assert fit(trainer) is created
    assert created.num_steps == 4


@both_paths
def test_a_given_horizon_is_kept(make_args, toy_loss, installed, stock):
    args = make_args(optim_args="num_steps=50", **({"optim": "toy_loss"} if stock else {}))
    trainer_class, options = (transformers.Trainer, {}) if stock else (hf.Trainer, {"optimizers": "toy_loss"})
    trainer = trainer_class(gpt2(), args, train_dataset=texts(), **options)
    assert fit(trainer).num_steps == 50
    assert fit(trainer).num_steps == 50


# -- learning rate, schedule, groups -----------------------------------------------------------------------------------


@both_paths
def test_defaults_of_adamw_are_replaced_and_said_so(make_args, toy_loss, installed, caplog, stock):
    expected = {"small_fc_lopt": ([1.0, 0.75, 0.5, 0.25], "linear"), "toy_loss": ([1.0] * 4, "constant_with_warmup")}
    for name, (rates, schedule) in expected.items():
        caplog.clear()
        args = make_args(**({"optim": name} if stock else {}))
        trainer_class, options = (transformers.Trainer, {}) if stock else (hf.Trainer, {"optimizers": name})
        trainer = trainer_class(gpt2(), args, train_dataset=texts(), **options)
        fit(trainer)
        assert logged(trainer, "learning_rate") == rates
        (record,) = [record for record in caplog.records if record.name == "pylo_integrations.hf"]
        assert record.levelno == logging.WARNING
        message = record.getMessage()
        assert f"{name}: using lr 1 in place of the default 5e-05" in message
        assert f"schedule {schedule}" in message and "learning_rate and lr_scheduler_type" in message
        if not stock:  # the same arguments may serve AdamW next
            assert args.learning_rate == 5e-5 and args.lr_scheduler_type == "linear"


@both_paths
@pytest.mark.parametrize("name", ["small_fc_lopt", "toy_loss"])
def test_a_chosen_rate_and_schedule_are_kept_in_silence(make_args, toy_loss, installed, caplog, stock, name):
    options = {"learning_rate": 0.4, "lr_scheduler_type": "constant"}
    args = make_args(**options, **({"optim": name} if stock else {}))
    trainer_class, options = (transformers.Trainer, {}) if stock else (hf.Trainer, {"optimizers": name})
    trainer = trainer_class(gpt2(), args, train_dataset=texts(), **options)
    fit(trainer)
    assert logged(trainer, "learning_rate") == [0.4] * 4
    assert not [record for record in caplog.records if record.name == "pylo_integrations.hf"]


@dataclass
class LibraryArguments(TrainingArguments):
    """Arguments with another default learning rate, as TRL's; not local to the test, for the Trainer pickles them."""

    learning_rate: float = field(default=2e-5)


def test_defaults_are_those_of_the_arguments_class(tmp_path):
    options = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "use_cpu": True, "logging_steps": 1}
    for lr, expected in ((None, 1.0), (5e-5, 5e-5)):
        args = LibraryArguments(**options, **({} if lr is None else {"learning_rate": lr}))
        trainer = hf.Trainer(gpt2(), args, train_dataset=texts(), optimizers="small_fc_lopt")
        fit(trainer)
        assert logged(trainer, "learning_rate") == [expected]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        (SchedulerType.CONSTANT, [1.0] * 4),
        (partial(LambdaLR, lr_lambda=lambda step: 2.0**-step), [1.0, 0.5, 0.25, 0.125]),
    ],
)
def test_schedule_beside_the_name(make_args, toy_loss, schedule, expected):
    args = make_args()
    trainer = hf.Trainer(gpt2(), args, train_dataset=texts(), optimizers=("toy_loss", schedule))
    fit(trainer)
    assert logged(trainer, "learning_rate") == expected
    assert args.lr_scheduler_type == "linear"
    fit(trainer)  # a second run starts its own schedule
    assert logged(trainer, "learning_rate") == expected


def test_warmup_applies(make_args, toy_loss):
    trainer = hf.Trainer(gpt2(), make_args(warmup_steps=2), train_dataset=texts(), optimizers="toy_loss")
    fit(trainer)
    assert logged(trainer, "learning_rate") == [0.0, 0.5, 1.0, 1.0]


@both_paths
def test_groups_decay_as_the_trainers_and_know_the_axes(make_args, installed, stock):
    args = make_args(weight_decay=0.1, **({"optim": "small_fc_lopt"} if stock else {}))
    trainer_class, options = (transformers.Trainer, {}) if stock else (hf.Trainer, {"optimizers": "small_fc_lopt"})
    trainer = trainer_class(gpt2(), args, train_dataset=texts(), **options)
    optimizer = trainer.create_optimizer()
    found = {
        name: (group["weight_decay"], group["axes"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    # What the Trainer's own AdamW does. The names that it lists say less: tied weights are there under both of theirs.
    theirs = transformers.Trainer(gpt2(), make_args(optim="adamw_torch", weight_decay=0.1))
    names = {param: name for name, param in theirs.model.named_parameters()}
    expected = {
        names[param]: group["weight_decay"]
        for group in theirs.create_optimizer().param_groups
        for param in group["params"]
    }
    assert {name: decay for name, (decay, _) in found.items()} == expected
    assert set(expected.values()) == {0.1, 0.0} and len(found) == len(names)
    # GPT-2's Conv1D and embeddings are stored (in, out); it has no nn.Linear of its own.
    assert {name for name, (_, axes) in found.items() if axes == "in_out"} == {
        name for name, param in trainer.model.named_parameters() if param.dim() == 2
    }


def test_parameters_that_the_model_has_not_are_refused():
    foreign = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"parameters that the model has not, of shapes \[\(3,\)\]"):
        FromGroups([{"params": [foreign]}], name="celo2", owner=gpt2(), lr=1.0, options={}, for_deepspeed=False)


@both_paths
def test_embeddings_go_to_adamw_where_the_optimizer_leaves_them_to_it(make_args, installed, small_thetas, stock):
    args = make_args(weight_decay=0.1, **({"optim": "celo2"} if stock else {}))
    trainer_class, options = (transformers.Trainer, {}) if stock else (hf.Trainer, {"optimizers": "celo2"})
    trainer = trainer_class(gpt2(), args, train_dataset=texts(), **options)
    optimizer = fit(trainer)
    marked = {name for g in optimizer.param_groups for name in g["param_names"] if g["rule"] == "adamw"}
    assert marked == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert {g["weight_decay"] for g in optimizer.param_groups if g["rule"] == "adamw"} == {0.1}  # the Trainer's choice
    assert optimizer.iteration == 4


def test_linear_layers_are_out_in(make_args):
    trainer = hf.Trainer(bert(), make_args(), train_dataset=sentences(), optimizers="small_fc_lopt")
    axes = {name: g["axes"] for g in trainer.create_optimizer().param_groups for name in g["param_names"]}
    assert axes["classifier.weight"] == axes["bert.encoder.layer.0.output.dense.weight"] == "out_in"
    assert axes["bert.embeddings.word_embeddings.weight"] == "in_out"


# -- does a resumed run repeat the uninterrupted one? ------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("name", ["toy_loss", "velo", "celo2"])
def test_resume_is_bit_equal(make_args, toy_loss, small_thetas, installed, stock, name):
    """Dropout is on and the checkpoint lies inside an epoch; test_optimizer_contract.py asks of every entry."""

    def trainer():
        args = make_args(
            max_steps=6,
            save_strategy="steps",
            save_steps=4,
            gradient_accumulation_steps=2,
            weight_decay=0.01,
            **({"optim": name} if stock else {}),
        )
        trainer_class, options = (transformers.Trainer, {}) if stock else (hf.Trainer, {"optimizers": name})
        return trainer_class(gpt2(), args, train_dataset=texts(), **options)

    straight, resumed = trainer(), trainer()
    expected = fit(straight)
    checkpoint = Path(straight.args.output_dir) / "checkpoint-4"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert any(tensor.any() for state in saved["state"].values() for tensor in state.values())
    found = fit(resumed, resume_from_checkpoint=str(checkpoint))

    assert logged(resumed)[-2:] == logged(straight)[-2:]
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    a, b = expected.state_dict(), found.state_dict()
    assert a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        assert state.keys() == b["state"][key].keys()
        assert all(torch.equal(tensor, b["state"][key][part]) for part, tensor in state.items())
    assert a["param_groups"] == b["param_groups"]  # the loss memory and counters are in there, as bytes
    assert found.iteration == found.num_steps == 6


def test_resuming_into_a_longer_run_is_said(make_args, toy_loss, caplog):
    def trainer(max_steps):
        args = make_args(max_steps=max_steps, save_strategy="steps", save_steps=2)
        return hf.Trainer(gpt2(), args, train_dataset=texts(), optimizers="toy_loss")

    short, long = trainer(2), trainer(5)
    fit(short)
    optimizer = fit(long, resume_from_checkpoint=str(Path(short.args.output_dir) / "checkpoint-2"))
    assert optimizer.num_steps == optimizer.iteration == 5
    assert "written in a run of 2 steps, this one has 5" in caplog.text


# -- are mistakes named? -----------------------------------------------------------------------------------------------

OPTIM_ARGS = {
    None: {},
    "  ": {},
    "step_mult=2e-3": {"step_mult": 2e-3},
    "step_mult=None, chunk_bytes=1024": {"step_mult": None, "chunk_bytes": 1024},
    "maximize=true,backend=reference": {"maximize": True, "backend": "reference"},
    "maximize=False,on_nonfinite=zero": {"maximize": False, "on_nonfinite": "zero"},
    "weights=some/file.safetensors": {"weights": "some/file.safetensors"},
    "num_steps=7,max_grad_norm=1": {"num_steps": 7, "max_grad_norm": 1.0},
}


@pytest.mark.parametrize("text", OPTIM_ARGS)
def test_optim_args_are_typed(text):
    found = hf.parse_optim_args(get_optimizer_info("small_fc_lopt"), text)
    assert found == OPTIM_ARGS[text]
    assert {key: type(value) for key, value in found.items()} == {k: type(v) for k, v in OPTIM_ARGS[text].items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step_mul=1", r"small_fc_lopt has no option 'step_mul'; did you mean 'step_mult'"),
        ("betas=1", r"no option 'betas'; it has \['backend', "),
        ("params=1", r"no option 'params'"),
        ("step_mult=fast", r"step_mult='fast' is invalid; expected a number or None"),
        ("chunk_bytes=1.5", r"chunk_bytes='1.5' is invalid; expected an integer"),
        ("maximize=maybe", r"maximize='maybe' is invalid; expected true or false"),
        ("backend=gpu", r"backend='gpu' is invalid; expected 'auto' or 'reference'"),
        ("lr=0.5", r"give 'lr' as TrainingArguments\(learning_rate=0.5\)"),
        ("weight_decay=0.1", r"TrainingArguments\(weight_decay=0.1\)"),
        ("step_mult", r"'step_mult' is not of the form option=value"),
        ("step_mult=1,", r"'' is not of the form"),
        ("step_mult=1=2", r"'step_mult=1=2' is not of the form"),
        ("step_mult=1,step_mult=2", r"sets 'step_mult' twice"),
    ],
)
def test_wrong_optim_args_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        hf.parse_optim_args(get_optimizer_info("small_fc_lopt"), text)


@both_paths
def test_wrong_optim_args_are_named_by_the_trainers(make_args, installed, stock):
    with pytest.raises(ValueError, match="no option 'step_mul'; did you mean 'step_mult'"):
        if stock:
            transformers.Trainer(gpt2(), make_args(optim="small_fc_lopt", optim_args="step_mul=1")).create_optimizer()
        else:
            hf.Trainer(gpt2(), make_args(optim_args="step_mul=1"), optimizers="small_fc_lopt")


def test_an_option_that_is_not_text_is_refused():
    class Odd(SmallFCLOpt):
        def __init__(self, params, lr=1.0, *, table: dict[str, float]):
            super().__init__(params, lr)

    with pytest.raises(ValueError, match="table cannot be given as text"):
        hf.parse_optim_args(OptimizerSpec("odd", Odd, ""), "table=1")


def test_wrong_names_and_schedules_are_named(make_args, toy_loss):
    def trainer(optimizers, **options):
        return hf.Trainer(gpt2(), make_args(), train_dataset=texts(), optimizers=optimizers, **options)

    with pytest.raises(ValueError, match="unknown learned optimizer 'small_fc_opt'; did you mean 'small_fc_lopt'"):
        trainer("small_fc_opt")
    other = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
    with pytest.raises(ValueError, match="LambdaLR.*belongs to another optimizer.*'cosine'.*functools.partial"):
        trainer(("toy_loss", LambdaLR(other, lambda step: 1.0)))
    with pytest.raises(ValueError, match="cosin is not a valid SchedulerType"):
        trainer(("toy_loss", "cosin"))
    with pytest.raises(TypeError, match=r"optimizers=\('toy_loss', 3\): the schedule must be None"):
        trainer(("toy_loss", 3))
    with pytest.raises(ValueError, match=r"must be a name or \(name, schedule\)"):
        trainer(("toy_loss",))
    with pytest.raises(TypeError, match="made None, not a scheduler"):
        trainer(("toy_loss", lambda optimizer: None)).train()
    with pytest.raises(ValueError, match="each name an optimizer; pass one"):
        trainer("toy_loss", optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1.0}))


def test_a_trainer_class_that_ignores_the_choice_is_an_error(make_args):
    class Stubborn(transformers.Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    trainer = hf.with_learned_optimizer(Stubborn)(gpt2(), make_args(), optimizers="small_fc_lopt")
    with pytest.raises(RuntimeError, match="'small_fc_lopt' was not used: Stubborn.*built SGD"):
        trainer.create_optimizer()


def deepspeed(config):
    """The plugin that TrainingArguments(deepspeed=config) makes."""
    return types.SimpleNamespace(hf_ds_config=types.SimpleNamespace(config=config))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"fsdp": True, "fsdp_config": {"xla": True}}, "FSDP of XLA hides whole tensors"),
        ({"deepspeed_plugin": deepspeed({"optimizer": {"type": "AdamW"}})}, "toy_loss would not be used.*AdamW"),
        ({"deepspeed_plugin": deepspeed({"zero_optimization": {"stage": 3}})}, "stage 3.*to 2 or 1"),
    ],
)
def test_unsupported_ways_to_train_are_refused(toy_loss, setting, message):
    args = types.SimpleNamespace(
        **{"fsdp": False, "fsdp_config": None, "deepspeed_plugin": None, "world_size": 1, **setting}
    )
    with pytest.raises((ValueError, ShardingError), match=message):
        check_supported(toy_loss, args)


# -- can installing be undone? -----------------------------------------------------------------------------------------


def test_importing_installs_nothing(make_args):
    assert "small_fc_lopt" not in [member.value for member in OptimizerNames]
    with pytest.raises(ValueError, match="small_fc_lopt is not a valid OptimizerNames"):
        make_args(optim="small_fc_lopt")


def test_uninstall_restores_everything(make_args):
    before = everything_changed_by_install()
    hf.uninstall()  # nothing to do
    hf.install()
    during = everything_changed_by_install()
    unchanged = {"trainer" if HAS_HANDLERS else "handlers"}
    assert {part for part in before if during[part] == before[part]} == unchanged
    hf.install()
    assert everything_changed_by_install() == during
    with toy_loss_optimizer():
        make_args(optim="toy_loss")  # a name that joins after install() must leave too
        assert everything_changed_by_install() != during
    hf.uninstall()
    assert everything_changed_by_install() == before
    with pytest.raises(ValueError, match="small_fc_lopt is not a valid OptimizerNames"):
        make_args(optim="small_fc_lopt")


def test_names_registered_after_install_work(make_args, installed):
    with toy_loss_optimizer():
        trainer = transformers.Trainer(gpt2(), make_args(optim="toy_loss"), train_dataset=texts())
        assert fit(trainer).rule.seen_losses == logged(trainer)


def test_transformers_offers_the_seam_that_its_version_should_have(make_args, installed):
    """If this fails, an upstream release has moved what names of optimizers go through: see hf/stock.py."""
    handlers = stock._handlers()
    assert (handlers is not None) == HAS_HANDLERS
    if handlers is not None:
        assert OptimizerNames("small_fc_lopt") in handlers
        cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(make_args(optim="small_fc_lopt"), gpt2())
        assert cls is FromGroups and kwargs


def test_transformers_without_a_table_of_handlers_works_too(make_args, toy_loss, monkeypatch):
    monkeypatch.setattr(stock, "_handlers", lambda: None)
    hf.install()
    try:
        trainer = transformers.Trainer(gpt2(), make_args(optim="toy_loss"), train_dataset=texts())
        assert fit(trainer).rule.seen_losses == logged(trainer)
    finally:
        hf.uninstall()


def test_install_again_lists_new_names_on_the_command_line(tmp_path, installed):
    with toy_loss_optimizer():
        hf.install()
        parser = HfArgumentParser(TrainingArguments)
        (args,) = parser.parse_args_into_dataclasses(["--optim=toy_loss", f"--output_dir={tmp_path}", "--use_cpu"])
        assert args.optim == "toy_loss"


def test_transformers_own_optimizers_still_work_after_install(make_args, installed):
    trainer = transformers.Trainer(gpt2(), make_args(optim="sgd", learning_rate=0.1), train_dataset=texts())
    assert fit(trainer) is None
    assert type(trainer.optimizer.optimizer) is torch.optim.SGD
    with pytest.raises(ValueError, match="velox is not a valid OptimizerNames.*small_fc_lopt"):
        make_args(optim="velox")


def test_a_name_of_transformers_is_refused():
    before = everything_changed_by_install()
    register_optimizer(OptimizerSpec("sgd", SmallFCLOpt, "collides"))
    try:
        with pytest.raises(ValueError, match="'sgd' is a learned optimizer and one of transformers"):
            hf.install()
    finally:
        unregister_optimizer("sgd")
    assert everything_changed_by_install() == before


def test_a_failing_install_changes_nothing(monkeypatch):
    before = everything_changed_by_install()

    def gone(undo):
        raise AttributeError("no such seam")

    monkeypatch.setattr(stock, "_tap_backward", gone)
    with pytest.raises(RuntimeError, match=r"does not work with transformers \d.*no such seam.*hf.Trainer"):
        hf.install()
    assert everything_changed_by_install() == before


def test_the_self_check_notices_enumerations_of_another_make(monkeypatch):
    before = everything_changed_by_install()
    monkeypatch.setattr(OptimizerNames, "__deepcopy__", lambda self, memo: OptimizerNames.SGD, raising=False)
    with pytest.raises(RuntimeError, match="is another member"):
        hf.install()
    monkeypatch.undo()
    assert everything_changed_by_install() == before


def test_a_later_wrapper_of_backward_survives(make_args, toy_loss):
    """Another library wraps the method after us: it stays, and installing again does not count a loss twice."""
    original = accelerate.Accelerator.backward
    hf.install()
    ours = accelerate.Accelerator.backward
    try:
        accelerate.Accelerator.backward = theirs = lambda self, loss, **kwargs: ours(self, loss, **kwargs)
        hf.uninstall()
        assert accelerate.Accelerator.backward is theirs
        hf.install()
        trainer = transformers.Trainer(gpt2(), make_args(optim="toy_loss"), train_dataset=texts())
        assert fit(trainer).rule.seen_losses == logged(trainer)
        hf.uninstall()
        assert accelerate.Accelerator.backward is theirs
    finally:
        accelerate.Accelerator.backward = original


# -- is telemetry logged? ----------------------------------------------------------------------------------------------


class Heard(transformers.TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@both_paths
@pytest.mark.parametrize("name", ["toy_loss", "small_fc_lopt"])
def test_telemetry_is_in_every_log_of_training(make_args, toy_loss, installed, stock, name):
    heard = Heard()
    options = {"optim_args": "telemetry=true", "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    args = make_args(**options, **({"optim": name} if stock else {}))
    trainer_class, given = (transformers.Trainer, {}) if stock else (hf.Trainer, {"optimizers": name})
    trainer = trainer_class(gpt2(), args, train_dataset=texts(), eval_dataset=texts(4), callbacks=[heard], **given)
    optimizer = fit(trainer)
    for entries in (heard.logs, trainer.state.log_history):
        told = [{k: v for k, v in entry.items() if k.startswith("optim/")} for entry in entries]
        assert [bool(numbers) for numbers in told] == ["loss" in entry for entry in entries]
        of_training = [numbers for numbers in told if numbers]
        label = f"optim/{type(optimizer).__name__}"
        assert [numbers[f"{label}/horizon_fraction"] for numbers in of_training] == [0.5, 1.0]
        assert of_training[-1] == optimizer.telemetry()
        assert of_training[-1][f"{label}/group0/update_rms"] > 0


@both_paths
def test_telemetry_reaches_tensorboard(make_args, installed, tmp_path, stock):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = make_args(
        optim_args="telemetry=per_parameter",
        report_to="tensorboard",
        **({"optim": "small_fc_lopt"} if stock else {}),
    )
    trainer_class, given = (transformers.Trainer, {}) if stock else (hf.Trainer, {"optimizers": "small_fc_lopt"})
    trainer = trainer_class(gpt2(), args, train_dataset=texts(), **given)
    numbers = fit(trainer).telemetry()
    [folder] = {path.parent for path in Path(args.output_dir).rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    name = "optim/SmallFCLOpt/param/transformer.h.0.attn.c_attn.weight/update_ratio"
    assert [event.step for event in events.Scalars(f"train/{name}")] == [1, 2, 3, 4]
    assert events.Scalars(f"train/{name}")[-1].value == pytest.approx(numbers[name])


@both_paths
def test_telemetry_goes_on_after_a_resume(make_args, installed, tmp_path, stock):
    name = "optim/SmallFCLOpt/group0/cosine"
    options = {"optim_args": "telemetry=true", "save_strategy": "steps", "save_steps": 2}

    def train(output, **resume):
        args = make_args(**options, output_dir=str(output), **({"optim": "small_fc_lopt"} if stock else {}))
        trainer_class, given = (transformers.Trainer, {}) if stock else (hf.Trainer, {"optimizers": "small_fc_lopt"})
        trainer = trainer_class(gpt2(), args, train_dataset=texts(), **given)
        fit(trainer, **resume)
        return logged(trainer, name)

    whole = train(tmp_path / "whole")
    assert len(set(whole)) == 4
    assert train(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")) == whole


def test_without_telemetry_logs_are_as_before(make_args):
    trainer = hf.Trainer(gpt2(), make_args(), train_dataset=texts(), optimizers="small_fc_lopt")
    fit(trainer)
    assert not [key for entry in trainer.state.log_history for key in entry if key.startswith("optim/")]


def test_optim_args_refuse_unknown_telemetry():
    with pytest.raises(ValueError, match=r"telemetry='all' is invalid; expected true or false or 'per_parameter'"):
        hf.parse_optim_args(get_optimizer_info("small_fc_lopt"), "telemetry=all")
