"""Malicious pickles raise WeightsError, execute nothing, and leave no trace."""

import io
import os
import pickle
import pickletools
import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from flax.serialization import msgpack_restore

from lopt_jax.weights import WeightsError, convert_weights
from lopt_jax.weights.haiku_pickle import read_pickle

FIXTURES = Path(__file__).parent / "fixtures"


class Calls:
    """Pickles as the call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module")
def theta():
    return msgpack_restore((FIXTURES / "small_fc_lopt_h4" / "theta.state").read_bytes())


def refused(tmp_path, data):
    """Converts a pickle that has to be refused; returns the message."""
    folder = tmp_path / "input"
    folder.mkdir(exist_ok=True)
    (folder / "theta.pickle").write_bytes(data)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(WeightsError) as caught:
        convert_weights(folder / "theta.pickle")
    assert set(tmp_path.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reduce_that_writes_a_file(tmp_path, theta, protocol):
    trace = tmp_path / "trace"
    for function, arguments in (
        (os.system, (f"touch {trace}",)),
        (open, (str(trace), "w")),
        (eval, (f"open({str(trace)!r}, 'w')",)),
        (exec, (f"open({str(trace)!r}, 'w')",)),
        (os.mkdir, (str(trace),)),
        (np.save, (str(trace), np.zeros(3))),
    ):
        evil = pickle.dumps({**theta, "nn": Calls(function, *arguments)}, protocol=protocol)
        assert "the name" in refused(tmp_path, evil)
        assert not trace.exists()


def test_names_are_never_looked_up(tmp_path):
    text = refused(tmp_path, b"\x80\x02cno_such_module\nno_such_name\n.")
    assert "no_such_module.no_such_name" in text
    assert "executed" in text
    for name in (b"numpy\nload", b"numpy.core.multiarray\nfromfile", b"builtins\ngetattr"):
        assert "the name" in refused(tmp_path, b"\x80\x02c" + name + b"\n.")


def test_known_names_do_not_help(tmp_path):
    # FlatMapping(x), OrderedDict(x), encode(x): carried out here on plain data alone.
    def call(name, argument):
        return b"\x80\x02c" + name + b"\n" + argument + b"R."

    for data in (
        call(b"collections\nOrderedDict", b"K\x05\x85"),
        call(b"collections\nOrderedDict", b"]K\x05a\x85"),
        call(b"numpy\ndtype", b"X\x01\x00\x00\x00O\x85"),
        call(b"numpy\ndtype", b"X\x02\x00\x00\x00V8\x85"),
        call(b"numpy\nndarray", b"K\x05\x85"),
        call(b"_codecs\nencode", b"X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86"),
    ):
        refused(tmp_path, data)


def test_object_arrays_and_structured_types(tmp_path):
    refused(tmp_path, pickle.dumps({"nn": np.array([1, "a", None], object)}))
    refused(tmp_path, pickle.dumps({"nn": np.zeros(3, [("a", "f4")])}))
    refused(tmp_path, pickle.dumps({"nn": np.zeros(3, ">f4")}))
    refused(tmp_path, pickle.dumps({"nn": np.datetime64("2020-01-01")}))


@pytest.mark.parametrize(
    "opcodes",
    [
        b"Pid\n.",  # PERSID
        b"K\x01Q.",  # BINPERSID
        b"(ios\nsystem\n.",  # INST
        b"(cos\nsystem\no.",  # OBJ
        b"\x82\x01.",  # EXT1
        b"\x97.",  # NEXT_BUFFER
        b"K\x01}\x92.",  # NEWOBJ_EX
    ],
)
def test_other_opcodes(tmp_path, opcodes):
    refused(tmp_path, b"\x80\x05" + opcodes)


def peak(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BOMBS = {
    # Lists in lists, far deeper than Python's stack.
    "nested": b"\x80\x02" + b"]" * 90_000 + b"a" * 89_999 + b".",
    "nested too deep": b"\x80\x02" + b"(" * 1_000_000 + b"t" * 1_000_000 + b".",
    "nested dicts": b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 5000 + b"}" + b"s" * 5000 + b".",
    # Each tuple holds the one before twice: 2**1000 leaves in a few bytes.
    "shared": b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 1000 + b".",
    "shared as key": b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 1000 + b"h\x00Ns.",
    "shared dicts": b"\x80\x02}q\x00"
    + b"}X\x01\x00\x00\x00ah\x00sX\x01\x00\x00\x00bh\x00sq\x00" * 1000
    + b".",
    "shared as type": b"\x80\x02)q\x00"
    + b"h\x00h\x00\x86q\x00" * 1000
    + b"cnumpy\ndtype\nh\x00\x85R.",
    "shared as shape": b"\x80\x02)q\x00"
    + b"h\x00h\x00\x86q\x00" * 1000
    + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    + b"(K\x01h\x00cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R\x89C\x04\x00\x00\x00\x00tb.",
    # Python's unpickler reserves a memo of 2 * 0x7fffffff pointers for this index.
    "memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    "memo filled": b"\x80\x04]" + b"\x94" * 200_000 + b".",
    # Sizes that are declared and not there.
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "long": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "digits": b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
    "many items": b"\x80\x02](" + b"N" * 60_000 + b"e.",
    "no end": b"\x80\x02]",
    "empty": b"\x80\x02.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_early(tmp_path, name):
    assert peak(lambda: refused(tmp_path, BOMBS[name])) < 2**28


def test_cycles(tmp_path):
    cycle: dict = {}
    cycle["nn"] = cycle
    refused(tmp_path, pickle.dumps(cycle))
    items: list = []
    items.append(items)
    refused(tmp_path, pickle.dumps({"nn": items}))


def test_declared_shape_larger_than_the_bytes(tmp_path):
    good = pickle.dumps({"nn": np.zeros((3, 5), np.float32)}, protocol=2)
    evil = good.replace(b"K\x03K\x05\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86")
    assert evil != good
    assert "bytes for an array" in refused(tmp_path, evil) or "a shape" in refused(tmp_path, evil)


def test_haiku_mapping_is_a_dict():
    # What FlatMapping.__reduce__ writes: the class called with a plain dict.
    stream = io.BytesIO()
    stream.write(
        b"\x80\x02chaiku._src.data_structures\nFlatMapping\n}X\x01\x00\x00\x00aK\x07s\x85R."
    )
    assert read_pickle(stream.getvalue(), "test") == {"a": 7}
    ordered = pickle.dumps(OrderedDict(a=1), protocol=2)
    assert read_pickle(ordered, "test") == {"a": 1}


def test_scalars_and_containers():
    value = {"a": [1, 2.5, None, True, "text", (b"bytes", -(2**70))], "b": {3: ()}}
    for protocol in (2, 3, 4, 5):
        data = pickle.dumps(value, protocol=protocol)
        if protocol > 2:  # protocol 2 writes bytes as a call of _codecs.encode
            assert "REDUCE" not in {op.name for op, _, _ in pickletools.genops(data)}
        assert read_pickle(data, "test") == value
    scalar = read_pickle(pickle.dumps(np.float32(2.5)), "test")
    assert (scalar.shape, float(scalar)) == ((), 2.5)
