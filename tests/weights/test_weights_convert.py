"""Do other people's files become the theta that they are, and are all others refused by name?"""

from __future__ import annotations

import json
import pickle
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from published_layouts import (
    CELO2MLP,
    GROUPS,
    Celo2MLP,
    DenseCelo2MLP,
    MetaMLP,
    VeLO_MLP,
    VeLO_RNN,
    extension,
    flax_bytes,
    layouts,
    module_files,
    pack,
    published,
    random_arrays,
    tree,
    with_decays,
    write,
)

from pylo_integrations import Theta
from pylo_integrations.weights.convert import ConversionError, convert, find_file, read_foreign
from pylo_integrations.weights.theta import ARCHITECTURES


def same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and torch.equal(found[name], array), name
    return True


def mlp(arrays, prefix, x, depth=3):
    for layer in range(depth):
        x = x @ arrays[f"{prefix}w{layer}"] + arrays[f"{prefix}b{layer}"][..., None, :]
        x = x.relu() if layer < depth - 1 else x
    return x


def with_joined_groups(arrays):
    parts = [arrays[f"ff_mod_stack/~/w0__{i}"] for i in range(len(GROUPS))]
    return {**arrays, "ff_mod_stack/~/w0": torch.cat(parts, -2)}


# -- the authors' files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["celo", "celo_adam"])
def test_the_authors_celo_files_are_the_arrays_that_their_code_ran_with(name):
    golden = safetensors.torch.load_file(published(f"{name}_real.safetensors"))
    expected = {key.removeprefix("theta/"): value for key, value in golden.items() if key.startswith("theta/")}
    foreign = read_foreign(published(f"{name}.theta.state"))
    assert foreign.architecture == name and len(expected) > 10
    assert same(foreign.arrays, expected)
    if name in ARCHITECTURES:
        theta = convert(published(f"{name}.theta.state"))
        assert theta == Theta.from_arrays(name, expected) and theta.name == name


@pytest.mark.parametrize("name", ["celo", "celo_adam"])
def test_the_test_writer_writes_what_flax_wrote(name):
    path = published(f"{name}.theta.state")
    assert flax_bytes(read_foreign(path).arrays) == path.read_bytes()


# -- Flax ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small_fc", "velo", "celo", "celo_adam", "celo2"])
def test_a_flax_checkpoint_is_recognised_by_its_arrays(name, tmp_path):
    arrays = random_arrays(name) if name != "small_fc" else with_decays(random_arrays(name))
    write(tmp_path, {"theta.state": flax_bytes(arrays)})
    for source in (tmp_path, tmp_path / "theta.state", str(tmp_path / "theta.state")):
        foreign = read_foreign(source)
        assert foreign.optimizer == foreign.architecture == name and same(foreign.arrays, arrays)


def test_a_flax_checkpoint_of_mulo_keeps_its_own_decays(tmp_path):
    arrays = with_decays(random_arrays("mulo"))
    folder = write(tmp_path, {"theta.state": flax_bytes(arrays)})
    assert convert(folder, architecture="mulo") == Theta.from_arrays("mulo", arrays, {"step_mult": 0.01})
    assert convert(folder).rule().step_mult == 0.001


def test_google_s_checkpoint_is_the_first_of_a_tuple(tmp_path):
    arrays = random_arrays("velo")
    write(tmp_path, {"params": pack({"0": tree(arrays), "1": None, "2": torch.tensor(3.0)})})
    assert read_foreign(tmp_path).optimizer == "velo" and same(read_foreign(tmp_path).arrays, arrays)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_keep_their_values(dtype, tmp_path):
    arrays = {name: array.to(dtype) for name, array in random_arrays("small_fc").items()}
    theta = convert(write(tmp_path, {"theta.state": flax_bytes(arrays)}))
    assert same(theta.arrays, {name: array.float() for name, array in arrays.items()})


def test_lengths_may_be_written_longer_than_needed(tmp_path):
    arrays = random_arrays("small_fc")
    entries = b"".join(pack(name) + pack(array) for name, array in arrays.items())
    for start in (b"\x86", b"\xde\x00\x06", b"\xdf\x00\x00\x00\x06"):
        assert same(read_foreign(write(tmp_path, {"theta.state": start + entries})).arrays, arrays)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is cut off"),
        (b"\xc1", "0xc1 starts no value"),
        (b"\x93\x01\x02", "is cut off"),
        (b"\x80\x80", "1 bytes follow the end"),
        (b"\xdf\xff\xff\xff\xff", "4294967295|8589934590"),
        (b"\xdd\xff\xff\xff\xff\x01", "values announced"),
        (b"\xc6\xff\xff\xff\xff\x01", "4294967295 bytes announced"),
        (b"\x91" * 100_000 + b"\x01", "nested deeper"),
        (b"\x81\xa1a" * 1000 + b"\x01", "nested deeper"),
        (pack({"a": [0] * 100_001}), "too many values"),
        (b"\x81\x01\x02", "has the key 1"),
        (b"\x82\xa1a\x01\xa1a\x02", "has the key 'a'.*double"),
        (pack({"k" * 257: 1}), "too long"),
        (b"\x81\xa1\xff\x01", "not UTF-8"),
        (pack([1, 2]), "holds msgpack list where a map"),
        (pack({"a": {"b": 3}}), "'a/b' is msgpack int"),
        (pack({"a": {"b": [torch.zeros(1)]}}), "'a/b' is msgpack list"),
        (b"\x81\xa1a" + extension(2, b"12345678"), "'a' is msgpack extension 2"),
        (b"\x81\xa1a" + extension(1, pack([[1], "float32"])), "not .shape, dtype, bytes."),
        (b"\x81\xa1a" + extension(1, pack([[1], "object", b"1234"])), "dtype 'object'; known"),
        (b"\x81\xa1a" + extension(1, pack([[1], ["x"], b"1234"])), "dtype"),
        (b"\x81\xa1a" + extension(1, pack([[2], "float32", b"1234"])), "4 bytes do not make float32 of shape .2"),
        (b"\x81\xa1a" + extension(1, pack([[-1], "float32", b"1234"])), "do not make"),
        (b"\x81\xa1a" + extension(1, pack([[1 << 62, 1 << 62], "float32", b""])), "do not make"),
        (b"\x81\xa1a" + extension(1, pack([[1] * 9, "float32", b"1234"])), "too many values"),
        (b"\x81\xa1a" + extension(1, pack([[1] * 100_000, "float32", b"1234"])), "too many values"),
        (b"\x81\xa1a" + extension(1, pack([[True], "float32", b"1234"])), "do not make"),
        (b"\x81\xa1a" + extension(1, pack([1, "float32", b"1234"])), "do not make"),
        (b"\x81\xa1a" + extension(1, pack([[1], "float32", "1234"])), "do not make"),
        (pack({"a": {"b": torch.zeros(1)}, "a/b": torch.zeros(1)}), "'a/b' is there twice"),
        (pack({"w": torch.zeros(2, 2)}), "1 arrays 'w': weights of no optimizer"),
        (pack({f"{i}" * 50: torch.zeros(0) for i in range(100, 200)}), "100 arrays .*, ...: weights of no"),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else "",
)
def test_hostile_and_damaged_flax_files_are_refused_by_name(data, message, tmp_path):
    path = write(tmp_path, {"theta.state": data}) / "theta.state"
    with pytest.raises(ConversionError, match=message) as caught:
        read_foreign(path)
    assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < len(str(path)) + 1000


def test_an_optimizer_without_a_rule_is_refused(tmp_path):
    """rnn_mlp_lopt has an RNN over other features than any rule here."""
    arrays = {"rnn_params/linear/w": torch.zeros(19, 8), "ff_mod_stack/~/w0__0": torch.zeros(1, 8)}
    with pytest.raises(ConversionError, match="no optimizer that this package has a rule for"):
        read_foreign(write(tmp_path, {"theta.state": flax_bytes(arrays)}))


# -- PyTorch modules -----------------------------------------------------------------------------------------------


def test_metamlp_computes_what_its_arrays_compute(tmp_path):
    module = MetaMLP(random_arrays("elo"))
    theta = convert(write(tmp_path, module_files(module)), architecture="elo")
    x = torch.randn(5, 39)
    torch.testing.assert_close(mlp(theta.arrays, "nn/~/", x), module(x))
    assert theta == Theta.from_arrays("elo", random_arrays("elo"))
    assert theta.rule().step_mult == 1.0 and theta.name == "elo"


def test_mulo_gets_the_decays_that_its_file_lacks(tmp_path):
    folder = write(tmp_path, module_files(MetaMLP(random_arrays("mulo"))))
    theta = convert(folder, architecture="mulo")
    rule = theta.rule()
    assert (rule.step_mult, rule.exp_mult) == (0.01, 0.001)
    # As the package that published them resolves these decays.
    assert rule.decays.momentum.tolist() == pytest.approx((0.542027, 0.958441, 0.998024), abs=1e-6)
    assert rule.decays.rms.tolist() == pytest.approx((0.998886,), abs=1e-6)
    assert rule.decays.factored.tolist() == pytest.approx((0.356218, 0.996626, 0.999461), abs=1e-6)
    with pytest.warns(UserWarning, match="MuLO's and ELO's files look the same.*architecture='mulo' or 'elo'"):
        assert convert(folder) == theta


def test_velo_is_made_of_two_modules(tmp_path):
    arrays = random_arrays("velo")
    rnn, bank = VeLO_RNN(arrays), VeLO_MLP(arrays)
    folders = [write(tmp_path / "rnn", module_files(rnn)), write(tmp_path / "mlp", module_files(bank))]
    for sources in (folders, folders[::-1]):
        foreign = read_foreign(*sources)
        assert foreign.optimizer == "velo" and same(foreign.arrays, arrays)
        assert foreign.provenance.count("model.safetensors (sha256 ") == 2
    x = torch.randn(5, 30)
    got = with_joined_groups(foreign.arrays)
    torch.testing.assert_close(mlp(got, "ff_mod_stack/~/", x.expand(6, 5, 30)), bank(x))
    hidden, cell = (got[f"lstm_init_state/{name}"].expand(5, 8) for name in ("hidden", "cell"))
    linear = {name: (got[f"rnn_params/{name}/w"], got[f"rnn_params/{name}/b"]) for name in ("linear_1", "linear_2")}
    u, z = (x @ w + b for w, b in linear.values())
    gates = torch.cat([z + u.relu().amax(0), hidden], 1) @ got["rnn_params/rnn/linear/w"]
    i, g, f, o = (gates + got["rnn_params/rnn/linear/b"]).chunk(4, 1)
    cell = (f + 1).sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    for name, expected in zip(("rnn_to_controls", "step_size"), rnn(x), strict=True):
        torch.testing.assert_close(hidden @ got[f"rnn_params/{name}/w"] + got[f"rnn_params/{name}/b"], expected)


@pytest.mark.parametrize("layout", [CELO2MLP, Celo2MLP, DenseCelo2MLP])
def test_celo2_computes_what_its_arrays_compute(layout, tmp_path):
    module = layout(random_arrays("celo2"))
    folder = write(tmp_path, module_files(module))
    foreign = read_foreign(folder)
    assert foreign.optimizer == "celo2" and same(foreign.arrays, random_arrays("celo2"))
    for name in ("elo_celo2", "celo2_base"):
        assert read_foreign(folder, architecture=name).optimizer == name
    x = torch.randn(5, 30)
    torch.testing.assert_close(mlp(with_joined_groups(foreign.arrays), "ff_mod_stack/~/", x), module(x))


def test_the_config_may_be_absent_but_must_not_contradict(tmp_path):
    files = module_files(MetaMLP(random_arrays("elo")))
    config = json.loads(files["config.json"])
    path = write(tmp_path, files) / "model.safetensors"
    want = convert(path, architecture="elo")
    write(tmp_path, {"config.json": json.dumps({**config, "hidden_size": 7}).encode()})
    with pytest.raises(ConversionError, match="has hidden_size 8, the config beside it says 7"):
        convert(path, architecture="elo")
    for config in (b"{", b"[]", b'{"hidden_size": 8}', b"[" * 100_000, b"1" * 10_000):
        write(tmp_path, {"config.json": config})
        with pytest.raises(ConversionError, match=r"config\.json: is not"):
            convert(path, architecture="elo")
    (tmp_path / "config.json").unlink()
    assert convert(path, architecture="elo") == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network.output.bias": None}, r"MetaMLP lacks 'network\.output\.bias'"),
        ({"network.input.weight": torch.zeros(8)}, r"'network\.input\.weight' of shape \(8,\)"),
        ({"network.input.bias": torch.zeros(8, dtype=torch.int32)}, r"torch\.int32; expected floating point"),
        ({"network.input.bias": torch.zeros(0)}, "of shape .0,."),
        ({"network.linear_2.weight": torch.zeros(8, 8)}, r"unknown 1 arrays 'network\.linear_2\.weight'"),
        ({"network.output.weight": torch.zeros(3, 8)}, "small_fc theta: nn/~/w2 is .8, 3."),
        ({"network.input.weight": torch.full((8, 39), torch.inf)}, "not finite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_modules_that_do_not_fit_are_refused_by_name(change, message, tmp_path):
    tensors = safetensors.torch.load(module_files(MetaMLP(random_arrays("elo")))["model.safetensors"]) | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    path = write(tmp_path, {"model.safetensors": safetensors.torch.save(tensors)}) / "model.safetensors"
    with pytest.raises(ConversionError, match=message) as caught:
        convert(path, architecture="elo")
    assert str(caught.value).startswith(str(path))


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    folders = {
        name: [write(tmp_path / f"{name}{number}", files) for number, files in enumerate(parts)]
        for name, parts in layouts().items()
    }
    rnn, bank = folders["VeLO"]
    celo2, flax = folders["CELO2MLP"][0], folders["flax_velo"][0]
    for sources, kinds in [
        ([rnn], "VeLO_RNN"),
        ([bank], "VeLO_MLP"),
        ([rnn, rnn], "VeLO_RNN and VeLO_RNN"),
        ([rnn, celo2], "CELO2MLP and VeLO_RNN"),
        ([flax, flax], "velo and velo"),
        ([rnn, bank, bank], "VeLO_MLP and VeLO_MLP and VeLO_RNN"),
        ([], "no file"),
    ]:
        with pytest.raises(ConversionError, match=f"{kinds} does not make one theta"):
            read_foreign(*sources)
    with pytest.raises(ConversionError, match="holds weights of velo, not of architecture='celo2'"):
        read_foreign(flax, architecture="celo2")
    with pytest.raises(ConversionError, match="architecture='adam' has no rule here; known: small_fc, mulo"):
        read_foreign(flax, architecture="adam")


# -- what is no theta ----------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was executed')",))


def test_pickles_are_refused_and_not_opened(tmp_path):
    torch.save({"x": Bomb()}, tmp_path / "zip")
    torch.save({"x": Bomb()}, tmp_path / "old", _use_new_zipfile_serialization=False)
    files = {f"protocol{number}": pickle.dumps(Bomb(), number) for number in range(2, pickle.HIGHEST_PROTOCOL + 1)}
    files["text.pkl"] = pickle.dumps(Bomb(), 0)
    write(tmp_path, files)
    np.savez(tmp_path / "arrays.npz", x=np.zeros(1))
    for path in list(tmp_path.iterdir()):
        for name in {path.name, *([] if path.suffix else [f"{path.name}.safetensors", f"{path.name}.state"])}:
            (tmp_path / name).write_bytes(path.read_bytes())
            with pytest.raises(ConversionError, match=f"{name}: is a pickle, or an archive.*Theta.from_arrays"):
                convert(tmp_path / name)


def test_files_that_are_not_there_or_too_large_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file '.*nothing'"):
        convert(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="has no theta.state, model.safetensors or params"):
        convert(tmp_path)
    with (tmp_path / "theta.state").open("wb") as file:
        file.truncate((256 << 20) + 1)  # sparse
    with pytest.raises(ConversionError, match="is larger than"):
        convert(tmp_path)


def test_a_theta_of_ours_is_no_foreign_file(tmp_path):
    path = Theta.from_arrays("small_fc", random_arrays("small_fc")).save(tmp_path / "theta.safetensors")
    with pytest.raises(ConversionError, match="holds none of the published modules"):
        convert(path)
    with pytest.raises(ValueError, match="pylo weights convert"):
        Theta.load(write(tmp_path, layouts()["MetaMLP"][0]) / "model.safetensors")


@pytest.mark.parametrize("layout", sorted(layouts()))
def test_every_layout_becomes_a_file_of_ours(layout, tmp_path):
    folders = [write(tmp_path / str(number), files) for number, files in enumerate(layouts()[layout])]
    foreign = [find_file(folder) for folder in folders]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theta = convert(*foreign, licence="MIT")
    again = Theta.load(theta.save(tmp_path / "theta.safetensors"))
    assert again == theta and again.licence == "MIT" and again.provenance.startswith("converted from ")
    assert str(tmp_path) not in again.provenance
