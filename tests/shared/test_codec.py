"""The wire codec: round trips, and every lie a header can tell."""

import contextlib
import json
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vessa.codec import TensorSpec, array_digest, decode, encode, image_digest
from vessa.errors import MalformedBody, TooLarge

ANY = {
    "a": TensorSpec(("U8", "F32", "F16", "I8"), ((None,), (None, None), (None, None, 3))),
    "b": TensorSpec(("F32",), ((None, 4),)),
}


def body(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int8, np.float16, np.float32]),
        st.tuples(st.integers(0, 5), st.integers(1, 6)),
    )
)
def test_what_is_encoded_is_decoded(array):
    tensors, metadata = decode(encode({"a": array}, {"k": "v"}), ANY, max_bytes=1 << 20)
    assert tensors["a"].dtype == array.dtype
    assert np.array_equal(tensors["a"], array, equal_nan=array.dtype.kind == "f")
    assert metadata == {"k": "v"}


def test_arrays_are_views_of_the_body():
    raw = encode({"a": np.arange(4, dtype=np.uint8)}, {})
    tensors, _ = decode(raw, ANY, max_bytes=1000)
    assert not tensors["a"].flags.owndata
    assert not tensors["a"].flags.writeable


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"123", "begins with 8 bytes"),
        (struct.pack("<Q", 1 << 60) + b"{}", "header claims"),
        (body(b"{nonsense"), "not JSON"),
        (body(b"[" * 100_000), "not JSON"),
        (body('{"a": 1}'.encode("utf-16")), "not JSON"),
        (body(b'{"a": %s}' % (b"9" * 5000)), "not JSON"),
        (body(b'{"a": {"dtype": "U8", "dtype": "F32"}}'), "has a duplicate name"),
        (body(b'{"__metadata__": {}, "__metadata__": {}}'), "has a duplicate name"),
        (body(b"[1]"), "JSON object"),
        (body({"__metadata__": {"k": 1}}), "map strings to strings"),
        (body({"__metadata__": []}), "map strings to strings"),
        (body({"z": entry()}, b"1234"), "Unknown tensor 'z'"),
        (body({"a": {"dtype": "U8"}}, b"1234"), "needs dtype, shape and data_offsets"),
        (body({"a": 3}, b"1234"), "needs dtype, shape and data_offsets"),
        (body({"a": entry(offsets=(0, 4, 8))}, b"1234"), "needs dtype, shape and data_offsets"),
        (body({"a": entry(shape=(1 << 40,))}, b"1234"), "declares sizes or offsets"),
        (body({"a": entry(shape=(-4,))}, b"1234"), "declares sizes or offsets"),
        (body({"a": entry(shape=(True,))}, b"1234"), "declares sizes or offsets"),
        (body({"a": entry(shape=(1,) * 7)}, b"1234"), "declares sizes or offsets"),
        (body({"a": entry(offsets=(0, 400))}, b"1234"), "declares sizes or offsets"),
        (body({"a": entry(dtype="F64", shape=(1,))}, b"1234"), "has dtype F64"),
        (body({"b": entry(dtype="U8", shape=(1, 4))}, b"1234"), "has dtype U8. Expected F32"),
        (body({"b": entry(dtype="F32", shape=(1, 1))}, b"1234"), "has shape"),
        (body({"a": entry(shape=(3,))}, b"1234"), "does not fit"),
        (body({"a": entry(offsets=(4, 0))}, b"1234"), "does not fit"),
        (body({"a": entry(), "b": entry("F32", (0, 4), (2, 2))}, b"1234"), "overlap, or there is a gap"),
        (body({"a": entry(offsets=(2, 6))}, b"123456"), "overlap, or there is a gap"),
        (body({"a": entry()}, b"123456"), "declares 4 bytes of tensors, but the body has 6"),
    ],
)
def test_a_lying_header_is_refused(raw, message):
    with pytest.raises(MalformedBody, match=message):
        decode(raw, ANY, max_bytes=1 << 20)


def test_a_body_over_the_limit_is_refused():
    with pytest.raises(TooLarge, match="the limit is 10"):
        decode(bytes(11), ANY, max_bytes=10)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 120))
def test_no_damage_escapes_as_another_error(noise, position):
    raw = bytearray(encode({"a": np.arange(12, dtype=np.uint8).reshape(3, 4)}, {"k": "v"}))
    raw[position : position + len(noise)] = noise
    with contextlib.suppress(MalformedBody):  # anything else fails the test
        tensors, _ = decode(bytes(raw), ANY, max_bytes=1 << 20)
        assert sum(t.nbytes for t in tensors.values()) <= len(raw)


def test_the_digest_depends_on_shape_and_pixels():
    image = np.zeros((2, 6), np.uint8)
    ids = {image_digest(i) for i in (image, image.reshape(6, 2), image + 1, np.zeros((2, 2, 3), np.uint8))}
    assert len(ids) == 4
    assert all(i.startswith("sha256:") and len(i) == 71 for i in ids)


def test_only_pixels_have_an_image_id():
    for wrong in (np.zeros((2, 2), np.float32), np.zeros(4, np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            image_digest(wrong)


def test_the_digest_is_of_the_pixels_not_their_layout():
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert image_digest(np.asfortranarray(image)) == image_digest(image)


def test_the_digest_of_an_array_depends_on_type_shape_and_values():
    array = np.arange(6, dtype=np.float32)
    others = (array.astype(np.float16), array.reshape(2, 3), array + 1)
    assert len({array_digest(a) for a in (array, *others)}) == 4
    assert array_digest(array.reshape(2, 3).T.copy().T) == array_digest(array.reshape(2, 3))


def test_the_header_has_its_own_limit():
    raw = encode({"a": np.zeros(4, np.uint8)}, {"k": "v" * 500})
    with pytest.raises(MalformedBody, match="the limit is 100"):
        decode(raw, ANY, max_bytes=1 << 20, max_header_bytes=100)


def test_a_lie_of_size_costs_no_memory():
    raw = body({"a": entry("F32", (1 << 20, 1 << 20, 3), (0, 3 << 42))}, bytes(1000))
    tracemalloc.start()
    try:
        with pytest.raises(MalformedBody):
            decode(raw, ANY, max_bytes=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_other_safetensors_writers_are_understood():
    array = np.arange(8, dtype=np.float32).reshape(2, 4)
    ours = encode({"b": array}, {"k": "v"})
    assert np.array_equal(safetensors.numpy.load(ours)["b"], array)
    tensors, _ = decode(safetensors.numpy.save({"b": array}), ANY, max_bytes=1 << 20)
    assert np.array_equal(tensors["b"], array)
