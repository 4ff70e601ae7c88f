"""Scores with a decay per key channel, and their gradient, as kernels in the Triton language for NVIDIA GPUs.

The letters are those of triton_kernels.py. Here g is ``[C, K]``, the cumulative log decay of every channel, and so are
a, e and D_ij; c is ``[K]``. With a ∘ Q, a ∘ K and e ∘ K in the place of Q and K, kernels 2 and 3 need no other decays.
They get

    P_ij = Σ_c q_ic k_jc exp(g_ic − g_jc) for j ≤ i,    S_ij = Σ_c k_ic k_jc exp(g_ic − g_jc) for j < i
    T = (I + ρ S)⁻¹

No product gives all of P: exp(−g_jc) overflows if decays are strong. But the pairs j < i can be divided into levels.
At level l, halves of 2ˡ tokens alternate. Its pairs are those of a token i in an odd half with a token j in the even
half before it. With m, the first token of that odd half,

    exp(g_i − g_j) = E_i E_j,    E_i = exp(g_i − g_m) ≤ 1,    E_j = exp(g_m − g_j) ≤ 1

so that the scores of a level are a masked product of E ∘ Q with E ∘ K. The log₂ C levels have every pair once. These
products take 4C log₂ C FLOPs per token and channel, those of S included.

Backward, with Y', X, N, W and G of triton_kernels.py:

    P' = tril(Y'Nᵀ),    A' = −stril(XNᵀ),    S' = ρ A'
    ρ' = rowsum(A' ∘ S) − rowsum(a ∘ K ∘ XWᵀ),    V' = β X,    β' = rowsum(X ∘ V)
    (a ∘ Q)' = Y'Wᵀ,    (a ∘ K)' = −ρ XWᵀ,    (e ∘ K)' = NGᵀ,    c' = rowsum(W ∘ G)

XLA computes these, the gradients through a and c, and that through e: log_decay'_t += Σ_j<t (e ∘ K ∘ NGᵀ)_j. The kernel
for the gradient of P and S adds for each level, with the parts P'_l and S'_l of its pairs:

    Q' += E ∘ P'_l (E ∘ K),    K' += E ∘ (P'_lᵀ (E ∘ Q) + (S'_l + S'_lᵀ)(E ∘ K))

and with Z, the sum of Q ∘ (what it adds to Q') and K ∘ (what it adds to K'),

    log_decay'_t += Σ_i≥t Z_i over t's half, if it is odd;    += Σ_j<t Z_j over t's half, if it is even

since a decay at t counts for the pairs j < t ≤ i. A gradient of a decay is a sum of what passes it. As a difference of
such sums, it would lose its digits where decays are strong.
"""

import triton
import triton.language as tl

from fwt_jax.kernels.triton_arrays import dot, load, load_numbers, multiple_of_chunk, rounded, store
from fwt_jax.kernels.triton_kernels import store_inverse

# --- levels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _decay_in_half(decay_pointer, fine_pointer, place, feature, level, rest, heads: tl.constexpr,
                   K: tl.constexpr, KEYS: tl.constexpr, DECAYS: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """E of a level, ``[C, KEYS]``."""
    half = place >> level
    token, first = place, (half | 1) << level
    if not EXACT:  # Past the end there is the g of the last token.
        token, first = tl.minimum(token, rest - 1), tl.minimum(first, rest - 1)
    exponent = load(decay_pointer, token, feature, heads * K, 1, rest, K, False, K % KEYS != 0)
    exponent -= load(decay_pointer, first, feature, heads * K, 1, rest, K, False, K % KEYS != 0)
    if DECAYS == 2:
        fine = load(fine_pointer, token, feature, heads * K, 1, rest, K, False, K % KEYS != 0)
        exponent += fine - load(fine_pointer, first, feature, heads * K, 1, rest, K, False, K % KEYS != 0)
    return tl.exp(tl.where((half % 2 == 1)[:, None], exponent, -exponent))


@triton.jit
def _counts(place, level):
    """1 where a decay at token t, a row, counts for the pairs of token i, a column of t's half; else 0."""
    t, i = place[:, None], place[None, :]
    is_odd = (t >> level) % 2 == 1
    return tl.where(((t ^ i) >> level == 0) & ((i >= t) == is_odd), 1.0, 0.0)


# --- P, S and T ------------------------------------------------------------------------------------------------------


@triton.jit
def channel_scores_kernel(query_pointer, key_pointer, decay_pointer, fine_pointer, length,
                          scores_pointer, similarities_pointer,
                          heads: tl.constexpr, K: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
                          LEVELS: tl.constexpr, CORRECTS: tl.constexpr, DECAYS: tl.constexpr, EXACT: tl.constexpr,
                          PRECISION: tl.constexpr):  # fmt: skip
    """P of one chunk, and S if CORRECTS."""
    length = multiple_of_chunk(length, CHUNK, EXACT)
    num_chunks = tl.cdiv(length, CHUNK)
    chunk = tl.program_id(0).to(tl.int64)
    head, start = chunk // num_chunks, (chunk % num_chunks).to(tl.int32) * CHUNK
    rest = length - start
    tokens = (head // heads * length + start) * heads + head % heads
    query_pointer += tokens * K
    key_pointer += tokens * K
    decay_pointer += tokens * K
    fine_pointer += tokens * K
    place = tl.arange(0, CHUNK)
    differs = place[:, None] ^ place[None, :]  # The highest bit in which i and j differ is the level of their pair.
    dtype = query_pointer.dtype.element_ty

    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    similarities = tl.zeros([CHUNK, CHUNK], tl.float32)
    for block in range((K + KEYS - 1) // KEYS):
        feature = block * KEYS + tl.arange(0, KEYS)
        query = load(query_pointer, place, feature, heads * K, 1, rest, K, not EXACT, K % KEYS != 0).to(tl.float32)
        key = load(key_pointer, place, feature, heads * K, 1, rest, K, not EXACT, K % KEYS != 0).to(tl.float32)
        scores += tl.where(differs == 0, tl.sum(query * key, axis=1)[:, None], 0.0)
        for level in range(LEVELS):
            tl.debug_barrier()  # Without it, the compiler loads what several levels need at once, and spills.
            decay = _decay_in_half(decay_pointer, fine_pointer, place, feature, level, rest, heads, K, KEYS, DECAYS,
                                   EXACT)  # fmt: skip
            scaled_key = rounded(key * decay, dtype)
            products = dot(rounded(query * decay, dtype), tl.trans(scaled_key), PRECISION)
            scores += tl.where(differs >> level == 1, products, 0.0)
            if CORRECTS:
                products = dot(scaled_key, tl.trans(scaled_key), PRECISION)
                similarities += tl.where(differs >> level == 1, products, 0.0)
    square = chunk * CHUNK * CHUNK
    scores = tl.where(place[:, None] >= place[None, :], scores, 0.0)
    store(scores_pointer + square, scores, place, place, CHUNK, 1, CHUNK, CHUNK, False, False)
    if CORRECTS:
        similarities = tl.where(place[:, None] > place[None, :], similarities, 0.0)
        store(similarities_pointer + square, similarities, place, place, CHUNK, 1, CHUNK, CHUNK, False, False)


@triton.jit
def inverse_kernel(similarities_pointer, correction_pointer, length, inverse_pointer,
                   CHUNK: tl.constexpr, EXACT: tl.constexpr, INVERSE_PRECISION: tl.constexpr):  # fmt: skip
    """T of one chunk from S, in tiles of 16 x 16."""
    length = multiple_of_chunk(length, CHUNK, EXACT)
    num_chunks = tl.cdiv(length, CHUNK)
    chunk = tl.program_id(0).to(tl.int64)
    head, start = chunk // num_chunks, (chunk % num_chunks).to(tl.int32) * CHUNK
    square = chunk * CHUNK * CHUNK
    correction_pointer += head * length + start
    tile = tl.arange(0, 16)
    lower = ()
    for i in tl.static_range(CHUNK // 16):
        correction = load_numbers(correction_pointer, i * 16 + tile, length - start, EXACT)
        for j in tl.static_range(i + 1):
            x = load(similarities_pointer + square, i * 16 + tile, j * 16 + tile, CHUNK, 1, CHUNK, CHUNK, False, False)
            lower = lower + (correction[:, None] * x.to(tl.float32),)
    store_inverse(inverse_pointer + square, lower, tile, CHUNK, INVERSE_PRECISION)


# --- the gradient of P and S -----------------------------------------------------------------------------------------


@triton.jit
def channel_gradient_kernel(query_pointer, key_pointer, decay_pointer, fine_pointer,
                            scores_grad_pointer, similarities_grad_pointer, length,
                            query_grad_pointer, key_grad_pointer, log_decay_grad_pointer,
                            heads: tl.constexpr, K: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
                            LEVELS: tl.constexpr, CORRECTS: tl.constexpr, DECAYS: tl.constexpr, EXACT: tl.constexpr,
                            PRECISION: tl.constexpr, INVERSE_PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of P and S in KEYS features of one chunk's tokens, from P' and the symmetric S' + S'ᵀ."""
    length = multiple_of_chunk(length, CHUNK, EXACT)
    num_chunks = tl.cdiv(length, CHUNK)
    num_parts: tl.constexpr = (K + KEYS - 1) // KEYS
    part, chunk = tl.program_id(0) % num_parts, (tl.program_id(0) // num_parts).to(tl.int64)
    head, start = chunk // num_chunks, (chunk % num_chunks).to(tl.int32) * CHUNK
    rest = length - start
    tokens = (head // heads * length + start) * heads + head % heads
    decay_pointer += tokens * K
    fine_pointer += tokens * K
    square = chunk * CHUNK * CHUNK
    place, feature = tl.arange(0, CHUNK), part * KEYS + tl.arange(0, KEYS)
    differs = place[:, None] ^ place[None, :]
    MASK_K: tl.constexpr = K % KEYS != 0
    dtype = query_pointer.dtype.element_ty

    query = load(query_pointer + tokens * K, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K).to(tl.float32)
    key = load(key_pointer + tokens * K, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K).to(tl.float32)
    scores_grad = load(scores_grad_pointer + square, place, place, CHUNK, 1, CHUNK, CHUNK, False, False)
    own_grad = tl.sum(tl.where(differs == 0, scores_grad.to(tl.float32), 0.0), axis=1)[:, None]
    query_grad, key_grad = own_grad * key, own_grad * query
    log_decay_grad = tl.zeros([CHUNK, KEYS], tl.float32)
    for level in range(LEVELS):
        tl.debug_barrier()  # Without it, the compiler loads what several levels need at once, and spills.
        decay = _decay_in_half(decay_pointer, fine_pointer, place, feature, level, rest, heads, K, KEYS, DECAYS, EXACT)
        scaled_key = rounded(key * decay, dtype)
        of_level = rounded(tl.where(differs >> level == 1, scores_grad.to(tl.float32), 0.0), dtype)
        more_query_grad = decay * dot(of_level, scaled_key, PRECISION)
        more_key_grad = dot(tl.trans(of_level), rounded(query * decay, dtype), PRECISION)
        if CORRECTS:
            both = load(similarities_grad_pointer + square, place, place, CHUNK, 1, CHUNK, CHUNK, False, False)
            of_level = rounded(tl.where(differs >> level == 1, both.to(tl.float32), 0.0), dtype)
            more_key_grad += dot(of_level, scaled_key, PRECISION)
        more_key_grad *= decay
        query_grad += more_query_grad
        key_grad += more_key_grad
        counts = _counts(place, level)
        log_decay_grad += dot(counts, query * more_query_grad + key * more_key_grad, INVERSE_PRECISION)
    store(query_grad_pointer + tokens * K, query_grad, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K)
    store(key_grad_pointer + tokens * K, key_grad, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K)
    store(log_decay_grad_pointer + tokens * K, log_decay_grad, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K)
