"""What a user passes wrongly gets a ValueError that says what came, what was expected and the way out."""

import jax
import jax.numpy as jnp
import pytest

import fwt_jax

B, T, H, K, V = 2, 3, 2, 4, 5
QUERY, KEY = jnp.ones((B, T, H, K)), jnp.ones((B, T, H, K))
VALUE, BETA = jnp.ones((B, T, H, V)), jnp.ones((B, T, H))
INTEGERS = jnp.ones((B, T, H, K), jnp.int32)
MEMORY = fwt_jax.init_memory(B, H, K, V)
MEMORIES = jax.tree.map(lambda x: jnp.stack([x, x], axis=1), MEMORY)  # of two segments

# Name of the case: what is changed in a valid call, and words that the message must hold.
ATTENTION = {
    "query of three axes": ({"query": QUERY[0]}, ["query", "[B, T, H, size]", "[3, 2, 4]", "axes of length 1"]),
    "key of three axes": ({"key": KEY[0]}, ["key", "[B, T, H, size]", "[3, 2, 4]"]),
    "value of three axes": ({"value": VALUE[0]}, ["value", "[B, T, H, size]", "[3, 2, 5]"]),
    "integer query": ({"query": INTEGERS}, ["query", "floating point", "int32", "astype"]),
    "integer key": ({"key": INTEGERS}, ["key", "floating point", "int32", "astype"]),
    "integer value": ({"value": INTEGERS}, ["value", "floating point", "int32", "astype"]),
    "no tokens": (
        {"query": QUERY[:, :0], "key": KEY[:, :0], "value": VALUE[:, :0], "beta": BETA[:, :0]},
        ["query", "empty", "[2, 0, 2, 4]", "at least one token"],
    ),
    "no value channels": ({"value": VALUE[..., :0]}, ["value", "empty", "[2, 3, 2, 0]"]),
    "other batch": ({"query": QUERY[:1]}, ["query", "key", "agree in B, H and K", "[1, 3, 2, 4]", "[2, 3, 2, 4]"]),
    "fewer key heads": ({"key": KEY[:, :, :1]}, ["agree in B, H and K", "[2, 3, 1, 4]", "repeat"]),
    "other key size": ({"key": KEY[..., :3]}, ["agree in B, H and K", "[2, 3, 2, 4]", "[2, 3, 2, 3]"]),
    "other query length": ({"query": QUERY[:, :2]}, ["query", "key", "one shape", "[2, 2, 2, 4]", "[2, 3, 2, 4]"]),
    "other value length": ({"value": VALUE[:, :2]}, ["value", "length 3", "[2, 2, 2, 5]"]),
    "other value heads": ({"value": VALUE[:, :, :1]}, ["value", "key", "B and H", "[2, 3, 1, 5]", "[2, 3, 2, 4]"]),
    "value heads in no groups": (
        {"value": jnp.ones((B, T, 3, V))},
        ["value", "a multiple of key's", "[2, 3, 3, 5]", "[2, 3, 2, 4]", "repeat"],
    ),
    "a beta of key heads": ({"value": jnp.ones((B, T, 4, V))}, ["beta must be [2, 3, 4]", "value", "got [2, 3, 2]"]),
    "a memory of key heads": (
        {"value": jnp.ones((B, T, 4, V)), "beta": jnp.ones((B, T, 4)), "memory": MEMORY},
        ["[2, 4, 4, 5]", "got [2, 2, 4, 5]", "init_memory(2, 4, 4, 5)"],
    ),
    "unknown rule": ({"rule": "hebb"}, ["rule", "'sum'", "'delta'", "'fwm'", "'hebb'"]),
    "unknown form": ({"form": "scan"}, ["form", "'chunkwise'", "'recurrent'", "'parallel'", "'scan'"]),
    "unknown normalisation": ({"normalize": "sum"}, ["normalize", "False", "'read'", "'retrieval'", "'sum'"]),
    "normalize=True": ({"normalize": True}, ["normalize", "'read'", "'retrieval'", "True"]),
    "normalize=0": ({"normalize": 0}, ["normalize", "False", "'read'", "got 0"]),
    "unknown implementation": ({"implementation": "cuda"}, ["implementation", "None", "'xla'", "'cuda'"]),
    "delta without beta": ({"beta": None}, ["delta", "beta", "[B, T, H]", "None", 'rule="sum"']),
    "fwm without beta": ({"beta": None, "rule": "fwm"}, ["fwm", "beta", "[B, T, H]", "None"]),
    "beta with a last axis": ({"beta": BETA[..., None]}, ["beta", "[2, 3, 2]", "[2, 3, 2, 1]"]),
    "integer beta": ({"beta": BETA.astype(jnp.int32)}, ["beta", "floating point", "int32", "astype"]),
    "decay per value channel": ({"log_decay": VALUE}, ["log_decay", "[2, 3, 2] or [2, 3, 2, 4]", "[2, 3, 2, 5]"]),
    "integer decay": ({"log_decay": INTEGERS}, ["log_decay", "floating point", "int32", "astype"]),
    "fwm in parallel form": ({"rule": "fwm", "form": "parallel"}, ["fwm", "parallel", '"recurrent" or "chunkwise"']),
    "fwm chunks with a decay per channel": (
        {"rule": "fwm", "log_decay": -KEY, "form": "chunkwise"},
        ["fwm", "chunkwise", "decay per key channel", 'form="recurrent"'],
    ),
    "fwm normalised": ({"rule": "fwm", "normalize": "read"}, ["fwm", "normalisation", "'read'"]),
    "sum with retrieval": ({"rule": "sum", "normalize": "retrieval"}, ["'retrieval'", '"sum"', "'read'"]),
    "chunk size in recurrent form": ({"form": "recurrent", "chunk_size": 16}, ["chunk_size", "chunkwise", "16"]),
    "chunk size 0": ({"chunk_size": 0}, ["chunk_size", "an integer above 0", "got 0"]),
    "floating chunk size": ({"chunk_size": 16.0}, ["chunk_size", "an integer above 0", "got 16.0"]),
    "a number as beta": ({"beta": 0.5}, ["beta", "[2, 3, 2]", "got 0.5; jnp.full"]),
    "a memory of integers": (
        {"memory": MEMORY._replace(fast_weights=MEMORY.fast_weights.astype(int))},
        ["fast_weights of memory", "floating point", "int32"],
    ),
    "a memory of lists": ({"memory": type(MEMORY)([[1.0]], [1.0])}, ["fast_weights must be an array, got list"]),
    "a tuple as memory": ({"memory": tuple(MEMORY)}, ["a Memory", "init_memory(2, 2, 4, 5)", "got tuple"]),
    "kernel of another form": (
        {"implementation": "pallas", "form": "recurrent"},
        ['"pallas"', 'form="chunkwise"', "'recurrent'", '"xla"'],
    ),
    "kernel of fwm": ({"implementation": "pallas", "rule": "fwm"}, ['"pallas"', '"fwm"', '"xla"']),
    "kernel of float16": (
        {"implementation": "pallas", "value": VALUE.astype(jnp.float16)},
        ['"pallas"', "float32 and bfloat16", "got float16, float32", '"xla"'],
    ),
    "kernel with large keys": (
        {"implementation": "pallas", "query": jnp.ones((B, T, H, 513)), "key": jnp.ones((B, T, H, 513))},
        ['"pallas"', "K and V up to 512", "got K = 513, V = 5", '"xla"'],
    ),
    "kernel with chunks of 48": (
        {"implementation": "pallas", "chunk_size": 48},
        ['"pallas"', "16, 32, 64, 128 or None", "got 48"],
    ),
    "kernel with another precision": (
        {"implementation": "pallas", "precision": ("highest", "default")},
        ['"pallas"', '"default", "high" or "highest"', "('highest', 'default')"],
    ),
    "memory of another value size": (
        {"memory": fwt_jax.init_memory(B, H, K, V + 1)},
        ["memory", "[2, 2, 4, 5]", "[2, 2, 4, 6]", "init_memory(2, 2, 4, 5)"],
    ),
    "memory of another batch": ({"memory": fwt_jax.init_memory(1, H, K, V)}, ["memory", "[2, 2, 4]", "[1, 2, 4]"]),
    "key_sum of another size": (
        {"memory": MEMORY._replace(key_sum=MEMORY.key_sum[..., :3])},
        ["key_sum", "[2, 2, 4]", "[2, 2, 3]"],
    ),
    "two memories without segments": ({"memory": MEMORIES}, ["[B, N, H, K, V]", "segment_ids", "got None", "x[:, i]"]),
    "an id of no memory": (
        {"memory": MEMORIES, "segment_ids": jnp.array([[0, 1, 2], [0, 0, 0]])},
        ["segment_ids must be from 0 to 1, got 0 to 2"],
    ),
    "ids of another shape than the tokens": (
        {"memory": MEMORIES, "segment_ids": jnp.zeros((B, T + 1), int)},
        ["segment_ids must be integers [B, T] = [2, 3], got int32[2, 4]"],
    ),
    "memories of segments and of chunks": (
        {"memory": MEMORIES, "segment_ids": jnp.zeros((B, T), int), "memory_every": 2},
        ["without memory_every, pieces and sequence_axis, got 2, 1 and None", "x[:, i]"],
    ),
    "memories of segments in pieces": (
        {"memory": MEMORIES, "segment_ids": jnp.zeros((B, T), int), "pieces": 3},
        ["without memory_every, pieces and sequence_axis, got None, 3 and None"],
    ),
    "memories of no segments": (
        {"memory": jax.tree.map(lambda x: x[:, :0], MEMORIES), "segment_ids": jnp.zeros((B, T), int)},
        ["fast_weights [2, 1, 2, 4, 5]", "got [2, 0, 2, 4, 5]", "init_memory(2, 2, 4, 5)", "of one segment"],
    ),
    "memories of another size": (
        {"memory": jax.tree.map(lambda x: x[..., :3], MEMORIES), "segment_ids": jnp.zeros((B, T), int)},
        ["fast_weights [2, 2, 2, 4, 5] and key_sum [2, 2, 2, 4]", "got [2, 2, 2, 4, 3] and [2, 2, 2, 3]"],
    ),
    "segment_ids per head": ({"segment_ids": jnp.zeros((B, T, H), int)}, ["segment_ids", "[2, 3]", "[2, 3, 2]"]),
    "segment_ids of one row": ({"segment_ids": jnp.zeros((T,), int)}, ["segment_ids", "integers", "[2, 3]", "[3]"]),
    "floating segment_ids": ({"segment_ids": jnp.zeros((B, T))}, ["segment_ids", "integers", "float32"]),
    "lengths for each head": ({"lengths": jnp.ones((B, H), int)}, ["lengths must be integers", "[2]", "[2, 2]"]),
    "a mask as lengths": ({"lengths": jnp.ones((B, T), bool)}, ["lengths", "jnp.sum(mask, axis=1)", "bool[2, 3]"]),
    "a length above T": ({"lengths": [1, T + 1]}, ["lengths must be from 0 to 3, got 1 to 4"]),
    "a negative length": ({"lengths": jnp.array([-1, 2])}, ["lengths must be from 0 to 3, got -1 to 2"]),
    "memories of no tokens": ({"memory_every": 0}, ["memory_every must be at least 1, got 0"]),
    "memories of half a token": ({"memory_every": 0.5}, ["memory_every must be an integer", "not traced", "0.5"]),
    "a list as query": ({"query": QUERY.tolist()}, ["query must be an array, got list", "jnp.asarray"]),
    "a list as segment_ids": ({"segment_ids": [[0] * T] * B}, ["segment_ids must be an array, got list"]),
    "a negative eps": ({"normalize": "read", "eps": -1e-6}, ["eps", "at least 0", "-1e-06"]),
    "an array as eps": ({"normalize": "read", "eps": jnp.ones(())}, ["eps", "a number", "Array"]),
    "NaN as eps": ({"normalize": "read", "eps": float("nan")}, ["eps", "at least 0", "nan"]),
    "a complex memory": (
        {"memory": MEMORY._replace(fast_weights=MEMORY.fast_weights * 1j)},
        ["fast_weights of memory", "floating point", "complex64"],
    ),
}


@pytest.mark.parametrize(("change", "words"), ATTENTION.values(), ids=ATTENTION)
def test_fast_weight_attention_says_what_is_wrong(change, words):
    call = {"query": QUERY, "key": KEY, "value": VALUE, "beta": BETA} | change
    assert_message(words, fwt_jax.fast_weight_attention, **call)


CROSS = {
    "no keys": ({"key": KEY[:, :0], "value": VALUE[:, :0]}, ["key", "empty", "[2, 0, 2, 4]"]),
    "no queries": ({"query": QUERY[:, :0]}, ["query", "empty", "[2, 0, 2, 4]"]),
    "integer query": ({"query": INTEGERS}, ["query", "floating point", "int32", "astype"]),
    "key and value of two lengths": ({"value": VALUE[:, :2]}, ["length", "[2, 3, 2, 4]", "[2, 2, 2, 5]"]),
    "other key size": ({"key": KEY[..., :3]}, ["agree in B, H and K", "[2, 3, 2, 4]", "[2, 3, 2, 3]"]),
    "mask of the queries": ({"key_mask": jnp.ones((B, T + 1), bool)}, ["key_mask", "bool", "[2, 3]", "[2, 4]"]),
    "mask of zeros and ones": ({"key_mask": jnp.ones((B, T))}, ["key_mask", "bool", "float32"]),
    "retrieval": ({"normalize": "retrieval"}, ["normalize", "False", '"read"', "'retrieval'"]),
    "memories of segments": ({"memory": MEMORIES}, ["fast_weights [2, 2, 4, 5]", "got [2, 2, 2, 4, 5]"]),
    "memory of another size": ({"memory": fwt_jax.init_memory(B, H, K, 6)}, ["memory", "[2, 2, 4, 5]", "init_memory"]),
}


@pytest.mark.parametrize(("change", "words"), CROSS.values(), ids=CROSS)
def test_cross_attention_says_what_is_wrong(change, words):
    call = {"query": QUERY, "key": KEY, "value": VALUE} | change
    assert_message(words, fwt_jax.fast_weight_cross_attention, **call)


READ = {
    "query of three axes": ({"query": QUERY[0]}, ["query", "[2, T, 2, 4]", "[3, 2, 4]"]),
    "other query size": ({"query": QUERY[..., :3]}, ["query", "[2, T, 2, 4]", "[2, 2, 4, 5]", "[2, 3, 2, 3]"]),
    "other batch": ({"query": QUERY[:1]}, ["query", "[2, T, 2, 4]", "[1, 3, 2, 4]"]),
    "normalize=True": ({"normalize": True}, ["normalize", "False", '"read"', "True"]),
    "integer query": ({"query": INTEGERS}, ["query", "floating point", "int32", "astype"]),
    "key_sum of another size": (
        {"memory": MEMORY._replace(key_sum=MEMORY.key_sum[..., :3])},
        ["key_sum", "[2, 2, 4]", "[2, 2, 3]"],
    ),
    "a memory of integers": (
        {"memory": MEMORY._replace(fast_weights=MEMORY.fast_weights.astype(int))},
        ["fast_weights of memory", "floating point", "int32"],
    ),
    "a memory of lists": ({"memory": type(MEMORY)([[1.0]], [1.0])}, ["fast_weights must be an array, got list"]),
    "a tuple as memory": ({"memory": tuple(MEMORY)}, ["must be a Memory", "tuple", "Memory(fast_weights, key_sum)"]),
    "a list as query": ({"query": QUERY.tolist()}, ["query must be an array, got list"]),
    "a negative eps": ({"normalize": "read", "eps": -1.0}, ["eps", "at least 0", "-1.0"]),
}


@pytest.mark.parametrize(("change", "words"), READ.values(), ids=READ)
def test_read_says_what_is_wrong(change, words):
    assert_message(words, fwt_jax.read, **({"query": QUERY, "memory": MEMORY} | change))


def assert_message(words, function, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


def test_read_weights_of_another_rule():
    with pytest.raises(ValueError, match=r'"sum" or "delta".*got .fwm'):
        fwt_jax.read_weights(QUERY[0, 0, 0], KEY[0, :, 0], BETA[0, :, 0], rule="fwm")


READ_WEIGHTS = {
    "queries of all tokens": ({"query": QUERY[0, :, 0]}, ["query", "[4]", "[3, 4]"]),
    "keys of all heads": ({"key": KEY[0]}, ["key", "[T, K]", "[3, 2, 4]", "vmap"]),
    "no beta": ({"beta": None}, ["beta must be an array", "NoneType"]),
    "a list as beta": ({"beta": [0.5] * T}, ["beta must be an array", "list"]),
    "a decay of another length": ({"log_decay": jnp.zeros(T + 1)}, ["log_decay", "[3] or [3, 4]", "[4]"]),
    "a reset for each feature": ({"reset": jnp.zeros((T, K), bool)}, ["reset", "[3]", "[3, 4]"]),
}


@pytest.mark.parametrize(("change", "words"), READ_WEIGHTS.values(), ids=READ_WEIGHTS)
def test_read_weights_says_what_is_wrong(change, words):
    call = {"query": QUERY[0, 0, 0], "key": KEY[0, :, 0], "beta": BETA[0, :, 0], "rule": "delta"} | change
    assert_message(words, fwt_jax.read_weights, **call)
