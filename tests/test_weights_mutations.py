"""A thousand seeded mutations of each weights format end in WeightsError or in valid weights."""

import gc
import json
import logging
import pickle
import resource
import struct
import tracemalloc
from pathlib import Path

import jax
import msgpack
import numpy as np
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize
from safetensors.numpy import load_file, save

from lopt_jax.weights import WeightsError, convert_weights, export_weights, save_weights
from lopt_jax.weights.convert import convert_bundle
from lopt_jax.weights.schema import validate
from lopt_jax.weights.sources import Bundle
from lopt_jax.weights.store import load_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
COUNT = 1000
GIB = 2**30


@pytest.fixture(autouse=True)
def bounded_memory():
    """Lets no allocation of the process grow it by more than 1 GiB: one that tries fails."""
    jax.local_devices()  # first, as the stacks of its threads take more where there are many cores
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc").exists() else 0
    if not pages:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + GIB
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def mutate(data, rng):
    """One random damage to a file's bytes."""
    kind = rng.integers(8)
    buffer = bytearray(data)
    start = int(rng.integers(len(buffer)))
    # Headers are short: half of the damages hit the beginning of the file.
    if rng.random() < 0.5:
        start = int(rng.integers(min(len(buffer), 400)))
    length = int(rng.integers(1, 40))
    if kind == 0:
        return bytes(buffer[:start])
    if kind == 1:
        buffer[start] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        for position in rng.integers(len(buffer), size=length):
            buffer[position] = rng.integers(256)
    elif kind == 3:
        buffer[start : start + 8] = b"\xff" * int(rng.integers(1, 9))
    elif kind == 4:
        del buffer[start : start + length]
    elif kind == 5:
        buffer[start:start] = rng.bytes(length)
    elif kind == 6:
        buffer[start : start + length] = bytes(length)
    else:
        buffer[start : start + 4] = struct.pack("<f", (np.nan, np.inf, 1e38, -0.0)[length % 4])
    return bytes(buffer)


def outcome(function):
    """Runs a reader on damaged input: True where it gave weights, which are then valid."""
    try:
        weights = function()
    except WeightsError as error:
        if "MemoryError" in str(error):
            pytest.fail(f"tried to reserve too much memory: {error}")
        return False
    validate(weights)
    return True


def run_mutations(data, read, seed):
    rng = np.random.default_rng(seed)
    tracemalloc.start()
    try:
        valid = sum(outcome(lambda: read(mutate(data, rng))) for _ in range(COUNT))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < GIB // 4
    assert valid < COUNT // 2 or len(data) > 5000  # the damages do damage


def as_pickle(name, protocol):
    theta = msgpack_restore((FIXTURES / name / "theta.state").read_bytes())
    return pickle.dumps(theta, protocol=protocol)


OLDER = (
    "learnable_sgd",
    "learnable_adam",
    "mlp_lopt",
    "nn_adam",
    "rnn_mlp_lopt",
    "adafac_mlp_lopt_separate_weights",
)


def single_files():
    for name in ("small_fc_lopt_h4", "celo2", *OLDER):
        file = f"{name}/theta.state"
        yield file, (FIXTURES / file).read_bytes(), None
    for folder in ("original_checkpoint", "original_checkpoint_no_config"):
        (file,) = (FIXTURES / folder).glob("params*")
        yield file.name, file.read_bytes(), None
    for name, architecture in (("elo", "elo"), ("mulo", "mulo"), ("celo2_adamw", "celo2")):
        yield name, (FIXTURES / name / "model.safetensors").read_bytes(), architecture
    for protocol in (2, 4, 5):
        yield f"pickle {protocol}", as_pickle("small_fc_lopt_h4", protocol), "mulo"


CASES = {name: (data, architecture) for name, data, architecture in single_files()}


@pytest.mark.parametrize("name", CASES)
def test_single_files(name):
    data, architecture = CASES[name]
    seed = sorted(CASES).index(name)

    def read(damaged):
        return convert_bundle(Bundle("mutation", damaged), architecture)

    assert outcome(lambda: read(data))
    run_mutations(data, read, seed)


def test_config_gin():
    folder = FIXTURES / "original_checkpoint"
    gin = (folder / "config.gin").read_bytes()
    params = (FIXTURES / "velo_bugged_flags" / "theta.state").read_bytes()
    for size, smaller in ((b"64", b"32"), (b"16", b"8")):
        gin = gin.replace(b" = " + size, b" = " + smaller)
    start = gin.index(b"HyperV2.ff")

    def read(damaged):
        return convert_bundle(Bundle("mutation", params, gin=damaged))

    assert outcome(lambda: read(gin))
    run_mutations(gin[start:], lambda damaged: read(gin[:start] + damaged), 1)


@pytest.mark.parametrize("part", ["rnn", "mlp", "json"])
def test_velo_pair(tmp_path, part):
    export_weights(convert_weights(FIXTURES / "velo_bugged_flags"), tmp_path)
    files = {
        "rnn": (tmp_path / "VeLO_RNN" / "model.safetensors").read_bytes(),
        "mlp": (tmp_path / "VeLO_MLP" / "model.safetensors").read_bytes(),
        "json": (tmp_path / "VeLO_RNN" / "config.json").read_bytes(),
    }

    def read(damaged):
        use = {**files, part: damaged}
        return convert_bundle(Bundle("mutation", use["rnn"], json=use["json"], second=use["mlp"]))

    assert outcome(lambda: read(files[part]))
    run_mutations(files[part], read, len(part))


# Orbax reads arrays concurrently and leaves those unread that come after one that failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("digests", [True, False])
def test_orbax_checkpoint(tmp_path, caplog, digests):
    caplog.set_level(logging.CRITICAL)  # Orbax logs what it finds
    folder = tmp_path / "weights"
    save_weights(folder, convert_weights(FIXTURES / "small_fc_lopt_h4"))
    description = folder / "weights.json"
    if not digests:  # as from somebody who fits the digests to the damage
        document = json.loads(description.read_text())
        del document["files"]
        description.write_text(json.dumps(document))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rng = np.random.default_rng(2)
    valid = 0
    for _ in range(COUNT):
        file = files[int(rng.integers(len(files)))]
        original = file.read_bytes()
        damaged = mutate(original, rng)
        file.write_bytes(damaged)
        good = outcome(lambda: load_checkpoint(folder))
        valid += good
        assert not (good and digests and file != description and damaged != original)
        file.write_bytes(original)
    assert valid < COUNT  # Orbax does not read all of its files
    assert outcome(lambda: load_checkpoint(folder))
    gc.collect()  # its warnings are to come here, where they are expected


# Structured damages: valid files of the format whose contents are wrong.


def declared(shape, dtype=b"float32", data=b"\0" * 16, code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data)))


HOSTILE_ARRAYS = {
    "huge shape": declared((2**31, 2**31)),
    "huge sizes": declared((2**63, 2)),
    "negative": declared((-2, -2)),
    "product of zero": declared((2**62, 0), data=b""),
    "many dimensions": declared((1,) * 60, data=b"\0" * 4),
    "object type": declared((4,), b"O"),
    "structured type": declared((4,), b"f4,f4"),
    "python type": declared((4,), b"object"),
    "strings": declared((4,), b"<U1"),
    "no type": declared((4,), 3),
    "no shape": declared(4),
    "text shape": declared(("a",)),
    "no bytes": declared((4,), data=3),
    "integers": declared((4,), b"int32"),
    "two parts": msgpack.ExtType(1, msgpack.packb((1, 2))),
    "nested": msgpack.ExtType(1, msgpack.packb(declared((4,)))),
    "map": msgpack.ExtType(1, msgpack.packb({})),
    "complex": msgpack.ExtType(2, msgpack.packb((1.0, 2.0))),
    "unknown": msgpack.ExtType(77, b"abc"),
    "scalar": declared((), data=b"\0" * 4, code=3),
    "text": "text",
    "number": 3,
    "nothing": None,
    "list": [1, 2],
    "ragged list": [1, [2, 3]],
    "empty": {},
    "not finite": declared((2,), data=struct.pack("<2f", np.nan, np.inf)),
    "overflow": declared((2,), b"float64", struct.pack("<2d", 1e300, 0.0)),
    "wrong rank": declared((1, 1, 2), data=b"\0" * 8),
}


PLACES = {
    "small_fc_lopt_h4": ("nn/~/b2", "nn/~/w0", "rms_decays", "nn/~", "nn"),
    "mlp_lopt": ("linear_1", "linear_0/w"),
    "nn_adam": (
        "lstm_init_state/hidden",
        "lstm_init_state",
        "rnn_params",
        "rnn_params/lstm/b",
        "rnn_to_controls_params/rnn_to_controls/w",
    ),
    "rnn_mlp_lopt": (
        "initial_from_mlp",
        "initial_from_lstm",
        "lstm_init_state/cell",
        "ffmod_params",
        "ffmod_params/linear_0",
        "ffmod_params/linear_2/b",
        "rnn_to_in_params/rnn_to_in/b",
        "rnn_to_ff_params",
    ),
    "adafac_mlp_lopt_separate_weights": ("nn/~/w0_0_0",),
}
# a slash is in the names of Haiku's modules, too
MODULES = {"lstm": "rnn/linear"} | {f"linear_{i}": f"mlp/~/linear_{i}" for i in range(3)}


@pytest.mark.parametrize("file", PLACES)
@pytest.mark.parametrize("name", HOSTILE_ARRAYS)
def test_hostile_arrays(name, file):
    data = (FIXTURES / file / "theta.state").read_bytes()
    for place in PLACES[file]:
        is_number = place.endswith("w0_0_0")
        if is_number and name == "scalar":
            continue  # there it belongs
        *path, last = (MODULES.get(key, key) for key in place.split("/"))
        tree = node = msgpack.unpackb(data)  # arrays stay ExtType
        for key in path:
            node = node[key]
        assert last in node
        node[last] = HOSTILE_ARRAYS[name]
        damaged = msgpack.packb(tree)
        assert not outcome(lambda damaged=damaged: convert_bundle(Bundle("hostile", damaged)))


HOSTILE_FILES = {
    "empty": b"",
    "one byte": b"\x80",
    "array of 2**32": b"\xdd\xff\xff\xff\xff",
    "map of 2**32": b"\xdf\xff\xff\xff\xff",
    "text of 2**32": b"\xdb\xff\xff\xff\xff",
    "bytes of 2**32": b"\xc6\xff\xff\xff\xff",
    "extension of 2**32": b"\xc9\xff\xff\xff\xff\x01",
    "deep": b"\x91" * 100_000,
    "deep maps": b"\x81\xa1a" * 100_000,
    # Small items in nested arrays: each would cost eight bytes of list for one byte of file.
    "wide": b"\x91" + (b"\xdc\x0f\xff" + b"\xdc\x0f\xff" + b"\x00" * 4095) * 4095,
    "many keys": b"\xde\x0f\xff" + b"".join(b"\xcd" + struct.pack(">H", i) for i in range(8190)),
    "duplicate keys": b"\x82\xa1a\x01\xa1a\x02",
    "trailing bytes": msgpack.packb({"nn": 1}) + b"more",
    "not a tree": msgpack.packb([1, 2, 3]),
    "tuple of nothing": msgpack.packb({"0": 1, "1": "", "2": 0}),
    "params of nothing": msgpack.packb({"params": {}, "gen_id": "", "step": 10**18}),
    "chunked": msgpack_serialize({"nn": {"__msgpack_chunked_array__": True, "shape": {"0": 9}}}),
    "safetensors header too long": struct.pack("<Q", 2**40) + b"{" + b" " * 100,
    "safetensors header": struct.pack("<Q", 50) + b"{" + b" " * 100,
    "safetensors deep": struct.pack("<Q", 10**5) + b'{"a":' * 20_000,
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_hostile_files(name):
    tracemalloc.start()
    try:
        assert not outcome(lambda: convert_bundle(Bundle("hostile", HOSTILE_FILES[name]), "elo"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**26


@pytest.mark.parametrize("write", [msgpack_serialize, pickle.dumps])
def test_numbers_of_many_digits(write):
    theta = msgpack_restore((FIXTURES / "small_fc_lopt_h4" / "theta.state").read_bytes())
    layers = theta["nn"]["~"]
    long_name = "w0__" + "1" * 5000
    damaged = write({**theta, "nn": {"~": {**layers, long_name: layers["w0"]}}})
    assert not outcome(lambda: convert_bundle(Bundle("hostile", damaged), "small_fc_lopt"))
    if write is pickle.dumps:  # msgpack has no larger numbers than 64 bits
        damaged = write({"params": theta, "gen_id": 10**5000, "step": 3})
        weights = convert_bundle(Bundle("hostile", damaged), "small_fc_lopt")
        assert (weights.metadata["gen_id"], weights.metadata["step"]) == ("a int", "3")


def test_other_formats_are_told_which_are_read(tmp_path):
    theta = msgpack_restore((FIXTURES / "small_fc_lopt_h4" / "theta.state").read_bytes())
    np.save(tmp_path / "array.npy", np.zeros(3, np.float32))
    others = [(tmp_path / "array.npy").read_bytes(), pickle.dumps(theta, 0), pickle.dumps(theta, 1)]
    for data in others:
        with pytest.raises(WeightsError, match="msgpack file, safetensors, or a pickle of proto"):
            convert_bundle(Bundle("other", data))
    cut = (FIXTURES / "elo" / "model.safetensors").read_bytes()[:100]
    with pytest.raises(WeightsError, match=r"a safetensors file.*damaged"):
        convert_bundle(Bundle("cut", cut), "elo")


def test_safetensors_of_wrong_contents():
    tensors = load_file(FIXTURES / "elo" / "model.safetensors")
    name = "network.input.weight"
    for value in (
        np.zeros((3, 3), np.float32),
        np.zeros(3, np.float32),
        np.zeros((), np.float32),
        np.zeros((32, 39), np.int32),
        np.full((32, 39), np.nan, np.float32),
        np.zeros((1, 32, 39), np.float32),
    ):
        damaged = save({**tensors, name: value})
        assert not outcome(lambda d=damaged: convert_bundle(Bundle("hostile", d), "elo"))
    for change in ({"extra": np.zeros(3, np.float32)}, {}):
        kept = {key: value for key, value in tensors.items() if change or key != name}
        damaged = save({**kept, **change})
        assert not outcome(lambda d=damaged: convert_bundle(Bundle("hostile", d), "elo"))


def test_safetensors_that_declare_more_than_there_is():
    data = (FIXTURES / "elo" / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["network.input.weight"]["shape"] = [2**40, 2**40]
    text = json.dumps(header).encode()
    damaged = struct.pack("<Q", len(text)) + text + data[8 + size :]
    assert not outcome(lambda: convert_bundle(Bundle("hostile", damaged), "elo"))


def test_large_files_are_refused_before_they_are_read(tmp_path):
    for name in ("theta.state", "model.safetensors", "theta.pickle"):
        file = tmp_path / name
        with file.open("wb") as handle:
            handle.truncate(2 * GIB)  # sparse: takes no disk
        with pytest.raises(WeightsError, match="at most"):
            convert_weights(file)
        file.unlink()
