"""The chunkwise sum and delta rules as four kernels in the Triton language, for NVIDIA GPUs.

Per head and chunk of C tokens, W ``[K, V]`` is the memory at the chunk's start and ρ = recall_scale · β. With g, the
cumulative log decay since the chunk began, the factors of decays.py are

    D_ij = exp(g_i − g_j) for j ≤ i, else 0;    a = D_t0 = exp(g);    e = D_Ti = exp(g_C − g);    c = D_T0 = exp(g_C)

Without decays, D is the lower triangle and the other factors are 1. A reset is a log decay of −200: in float32 its
exponential is 0. Forward, with A = stril(ρ D ∘ KKᵀ):

    P = D ∘ QKᵀ,    T = (I + A)⁻¹                       kernel 1, all chunks in parallel
    N = T (β V − ρ a KW)                                kernel 2, chunk after chunk
    Y = a QW + PN,    W ← c W + (e K)ᵀN

Backward, where x' is the gradient of the loss in x, and G that in the memory at the chunk's end:

    N' = PᵀY' + e KG,    X = TᵀN'                       kernel 3, chunk after chunk, from the last one
    G ← c G + (a Q)ᵀY' − (ρ a K)ᵀX

    P' = D ∘ Y'Nᵀ,    L = −stril(D ∘ XNᵀ),    B = ρ L   kernel 4, all chunks in parallel
    Q' = a Y'Wᵀ + P'K,    V' = β X,    β' = rowsum(X ∘ V)
    K' = P'ᵀQ + e NGᵀ − ρ a XWᵀ + (B + Bᵀ)K
    ρ' = rowsum(L ∘ KKᵀ) − a rowsum(K ∘ XWᵀ)
    g' = rowsum(M) − colsum(M) + a rowsum(Q ∘ Y'Wᵀ) − ρ a rowsum(K ∘ XWᵀ) − e rowsum(K ∘ NGᵀ),
         and for the last token also sum(e K ∘ NGᵀ) + c sum(W ∘ G);    M = stril(P' ∘ QKᵀ + B ∘ KKᵀ)

In the sum rule T = I, and the terms with ρ are absent. N is b of ``memory.delta_writes``. With N, no gradient of T is
needed. Kernels 2 and 3 carry transposed matrices, ``[V, K]`` and ``[V, C]``: a product then leaves its result in
registers, where the next one needs its left operand. Sums are float32. The operands of products have the dtype of
query, key and value.

Letters: B batch, T tokens, H heads, K key features, V value size, C tokens per chunk. A program computes one chunk, or
one head and a block of V columns. Its arguments are pointers: tokens ``[B, T, H, K or V]``, one number per token
``[B, H, T]`` (float32), matrices ``[B, H, n, ...]`` of n chunks, memories ``[B, H, K, V]`` (float32). DECAYS is 0
without a decay; 1 if ``decay_pointer`` has g; 2 if g is the sum of ``decay_pointer`` and ``fine_pointer``, see
``decays.cumulative_log_decay``.

With a decay per channel (CHANNELS), kernels 2 and 3 get a Q and a K as queries and keys, and e K as written keys. Then
``recall_pointer`` has ρ, ``of_start_pointer`` has c ``[B, H, n, K]``, and DECAYS is 0. The kernels of
triton_channels.py are in the place of kernels 1 and 4.
"""

import triton
import triton.language as tl

from fwt_jax.kernels.triton_arrays import dot, load, load_numbers, multiple_of_chunk, rounded, store

# --- decays within a chunk -------------------------------------------------------------------------------------------


@triton.jit
def _load_decay(pointer, token, length, USED: tl.constexpr, EXACT: tl.constexpr):
    """A part of g for each token, past the end that of the last token; 0 if it is not used."""
    if USED and EXACT:
        x = tl.load(pointer + token)
    elif USED:
        x = tl.load(pointer + tl.minimum(token, length - 1))
    else:
        x = tl.zeros(token.shape, tl.float32)
    return x


@triton.jit
def _times_decay(x, decay_pointer, fine_pointer, row, column, length,
                 STRICT: tl.constexpr, DECAYS: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """D_ij x_ij for tokens i in the rows and j in the columns; 0 on the diagonal too if STRICT."""
    if STRICT:
        seen = row[:, None] > column[None, :]
    else:
        seen = row[:, None] >= column[None, :]
    if DECAYS > 0:
        exponent = _load_decay(decay_pointer, row, length, DECAYS > 0, EXACT)[:, None]
        exponent = exponent - _load_decay(decay_pointer, column, length, DECAYS > 0, EXACT)[None, :]
        if DECAYS == 2:
            fine = _load_decay(fine_pointer, row, length, True, EXACT)[:, None]
            exponent += fine - _load_decay(fine_pointer, column, length, True, EXACT)[None, :]
        x *= tl.exp(tl.where(seen, exponent, 0.0))
    return tl.where(seen, x, 0.0)


# --- kernel 1: what does not need the memory -------------------------------------------------------------------------


@triton.jit
def scores_kernel(query_pointer, key_pointer, correction_pointer, decay_pointer, fine_pointer,
                  length, scores_pointer, inverse_pointer,
                  heads: tl.constexpr, K: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
                  CORRECTS: tl.constexpr, DECAYS: tl.constexpr, EXACT: tl.constexpr,
                  PRECISION: tl.constexpr, INVERSE_PRECISION: tl.constexpr):  # fmt: skip
    """P of one chunk, or T: every second program computes T, if CORRECTS. In tiles of 16 x 16."""
    length = multiple_of_chunk(length, CHUNK, EXACT)
    num_chunks = tl.cdiv(length, CHUNK)
    NUM_MATRICES: tl.constexpr = 2 if CORRECTS else 1
    chunk = (tl.program_id(0) // NUM_MATRICES).to(tl.int64)
    head, start = chunk // num_chunks, (chunk % num_chunks).to(tl.int32) * CHUNK
    tokens = (head // heads * length + start) * heads + head % heads
    query_pointer += tokens * K
    key_pointer += tokens * K
    correction_pointer += head * length + start
    decay_pointer += head * length + start
    fine_pointer += head * length + start
    scores_pointer += chunk * CHUNK * CHUNK
    inverse_pointer += chunk * CHUNK * CHUNK
    TILE: tl.constexpr = 16  # the smallest side of a product
    TILES: tl.constexpr = CHUNK // TILE
    tile = tl.arange(0, TILE)
    rest = length - start  # the number of tokens from the chunk's first on

    if tl.program_id(0) % NUM_MATRICES == 0:
        tiles = _tiles_of_products(query_pointer, key_pointer, tile, heads, rest, K, KEYS, TILES, EXACT, PRECISION)
        for i in tl.static_range(TILES):
            for j in tl.static_range(TILES):
                x = tl.zeros([TILE, TILE], tl.float32)
                if j <= i:
                    x = _times_decay(tiles[i * (i + 1) // 2 + j], decay_pointer, fine_pointer, i * TILE + tile,
                                     j * TILE + tile, rest, False, DECAYS, EXACT)  # fmt: skip
                store(scores_pointer, x, i * TILE + tile, j * TILE + tile, CHUNK, 1, CHUNK, CHUNK, False, False)
    else:
        tiles = _tiles_of_products(key_pointer, key_pointer, tile, heads, rest, K, KEYS, TILES, EXACT, PRECISION)
        lower = ()
        for i in tl.static_range(TILES):
            correction = load_numbers(correction_pointer, i * TILE + tile, rest, EXACT)
            for j in tl.static_range(i + 1):
                x = _times_decay(tiles[i * (i + 1) // 2 + j], decay_pointer, fine_pointer, i * TILE + tile,
                                 j * TILE + tile, rest, True, DECAYS, EXACT)  # fmt: skip
                lower = lower + (correction[:, None] * x,)
        store_inverse(inverse_pointer, lower, tile, CHUNK, INVERSE_PRECISION)


@triton.jit
def store_inverse(pointer, lower, tile, CHUNK: tl.constexpr, INVERSE_PRECISION: tl.constexpr):
    """T = (I + A)⁻¹ from the tiles of A; tile (i, j), j ≤ i, is at i (i + 1) / 2 + j.

    The inverse of a tile on the diagonal is built from those of its halves, as in triangular.py. The tiles below it
    follow by substitution. No power of A appears, because powers lose all digits if keys are correlated.
    """
    TILES: tl.constexpr = CHUNK // 16
    inverses = ()
    for i in tl.static_range(TILES):
        inverse = _inverse_of_tile(lower[i * (i + 3) // 2], tile, INVERSE_PRECISION)
        for j in tl.static_range(i):
            x = dot(lower[i * (i + 1) // 2 + j], inverses[j * (j + 3) // 2], INVERSE_PRECISION)
            for m in tl.static_range(j + 1, i):
                x += dot(lower[i * (i + 1) // 2 + m], inverses[m * (m + 1) // 2 + j], INVERSE_PRECISION)
            inverses = inverses + (-dot(inverse, x, INVERSE_PRECISION),)
        inverses = inverses + (inverse,)
        for j in tl.static_range(TILES):
            x = tl.zeros([16, 16], tl.float32)
            if j <= i:
                x = inverses[i * (i + 1) // 2 + j]
            store(pointer, x, i * 16 + tile, j * 16 + tile, CHUNK, 1, CHUNK, CHUNK, False, False)


@triton.jit
def _tiles_of_products(row_pointer, column_pointer, tile, heads: tl.constexpr, rest,
                       K: tl.constexpr, KEYS: tl.constexpr,
                       TILES: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The tiles on and below the diagonal of the products of a chunk's tokens; (i, j) is at i (i + 1) / 2 + j.

    KEYS features are added up at a time, so that the tokens' tiles fit into registers.
    """
    TILE: tl.constexpr = 16
    sums = ()
    for _ in tl.static_range(TILES * (TILES + 1) // 2):
        sums = sums + (tl.zeros([TILE, TILE], tl.float32),)
    for block in range((K + KEYS - 1) // KEYS):
        feature = block * KEYS + tl.arange(0, KEYS)
        columns, new = (), ()
        for i in tl.static_range(TILES):
            place = i * TILE + tile
            rows = load(row_pointer, place, feature, heads * K, 1, rest, K, not EXACT, K % KEYS != 0)
            columns = columns + (load(column_pointer, place, feature, heads * K, 1, rest, K, not EXACT, K % KEYS != 0),)
            for j in tl.static_range(i + 1):
                new = new + (sums[i * (i + 1) // 2 + j] + dot(rows, tl.trans(columns[j]), PRECISION),)
        sums = new
    return sums


@triton.jit
def _inverse_of_tile(lower, tile, INVERSE_PRECISION: tl.constexpr):
    """(I + L)⁻¹ of a strictly lower triangular tile of 16 x 16, from blocks of 1, 2, 4 and 8 rows."""
    row, column = tile[:, None], tile[None, :]
    inverse = tl.where(row == column, 1.0, 0.0)
    for power in tl.static_range(4):
        half = 2**power
        in_corner = (row // half % 2 == 1) & (row // half - 1 == column // half)
        corners = tl.where(in_corner, lower, 0.0)
        if power > 0:
            corners = dot(dot(inverse, corners, INVERSE_PRECISION), inverse, INVERSE_PRECISION)
        inverse -= corners
    return inverse


# --- kernel 2: forward, chunk after chunk ----------------------------------------------------------------------------


@triton.jit
def forward_kernel(memory_pointer, query_pointer, key_pointer, written_key_pointer, value_pointer, beta_pointer,
                   recall_pointer, from_start_pointer, to_end_pointer, of_start_pointer,
                   scores_pointer, inverse_pointer, length,
                   reads_pointer, end_pointer, starts_pointer, writes_pointer,
                   heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
                   CHUNK: tl.constexpr,
                   CORRECTS: tl.constexpr, DECAYS: tl.constexpr, CHANNELS: tl.constexpr, KEEP: tl.constexpr,
                   EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Reads and the memory at the end of one head, for VALUES columns. KEEP also stores W and N of every chunk."""
    length = multiple_of_chunk(length, CHUNK, EXACT)
    num_chunks = tl.cdiv(length, CHUNK)
    num_blocks: tl.constexpr = (V + VALUES - 1) // VALUES
    head = (tl.program_id(0) // num_blocks).to(tl.int64)
    first_token = head // heads * length * heads + head % heads
    beta_pointer += head * length
    recall_pointer += head * length
    from_start_pointer += head * length
    to_end_pointer += head * length
    place, feature = tl.arange(0, CHUNK), tl.arange(0, KEYS)
    column = tl.program_id(0) % num_blocks * VALUES + tl.arange(0, VALUES)
    MASK_K: tl.constexpr = K != KEYS
    MASK_V: tl.constexpr = V % VALUES != 0
    dtype = query_pointer.dtype.element_ty

    memory = load(memory_pointer + head * K * V, column, feature, 1, V, V, K, MASK_V, MASK_K)  # [V, K]
    for i in range(num_chunks):
        start = i * CHUNK
        rest = length - start
        tokens, chunk = first_token + start.to(tl.int64) * heads, head * num_chunks + i
        square = chunk * CHUNK * CHUNK
        memory_rounded = rounded(memory, dtype)
        if KEEP:
            store(starts_pointer + chunk * V * K, memory_rounded, column, feature, K, 1, V, K, MASK_V, MASK_K)
        if CORRECTS or not CHANNELS:
            key = load(key_pointer + tokens * K, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K)
        value = load(value_pointer + tokens * V, column, place, 1, heads * V, V, rest, MASK_V, not EXACT)  # [V, C]
        beta = load_numbers(beta_pointer, start + place, length, EXACT)
        if CORRECTS:  # The product comes first. The other order takes more registers.
            recalled = dot(memory_rounded, tl.trans(key), PRECISION)
            recall = load_numbers(recall_pointer, start + place, length, EXACT)  # ρ a
            writes = beta[None, :] * value.to(tl.float32) - recall[None, :] * recalled
            inverse = load(inverse_pointer + square, place, place, CHUNK, 1, CHUNK, CHUNK, False, False)
            writes = dot(rounded(writes, dtype), tl.trans(inverse), PRECISION)
        else:
            writes = beta[None, :] * value.to(tl.float32)
        writes_rounded = rounded(writes, dtype)
        if KEEP:
            store(writes_pointer + chunk * V * CHUNK, writes_rounded, column, place, CHUNK, 1, V, CHUNK, MASK_V, False)

        query = load(query_pointer + tokens * K, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K)
        scores = load(scores_pointer + square, place, place, CHUNK, 1, CHUNK, CHUNK, False, False)
        reads = dot(memory_rounded, tl.trans(query), PRECISION)
        if DECAYS > 0:
            reads *= load_numbers(from_start_pointer, start + place, length, EXACT)[None, :]
        reads += dot(writes_rounded, tl.trans(scores), PRECISION)
        store(reads_pointer + tokens * V, tl.trans(reads), place, column, heads * V, 1, rest, V, not EXACT, MASK_V)
        if DECAYS > 0:
            memory *= tl.load(from_start_pointer + tl.minimum(start + CHUNK, length) - 1)
            writes *= load_numbers(to_end_pointer, start + place, length, EXACT)[None, :]
        if CHANNELS:
            memory *= load_numbers(of_start_pointer + chunk * K, feature, K, not MASK_K)[None, :]
            key = load(written_key_pointer + tokens * K, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K)
        memory += dot(rounded(writes, dtype), key, PRECISION)
    store(end_pointer + head * K * V, memory, column, feature, 1, V, V, K, MASK_V, MASK_K)


# --- kernel 3: backward, chunk after chunk from the last one ---------------------------------------------------------


@triton.jit
def backward_kernel(query_pointer, key_pointer, written_key_pointer, recall_pointer,
                    from_start_pointer, to_end_pointer, of_start_pointer,
                    scores_pointer, inverse_pointer, reads_grad_pointer, end_grad_pointer, length,
                    memory_grad_pointer, ends_grad_pointer, solved_pointer,
                    heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
                    CHUNK: tl.constexpr,
                    CORRECTS: tl.constexpr, DECAYS: tl.constexpr, CHANNELS: tl.constexpr,
                    EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The gradient of the first memory of one head, for VALUES columns; G and X of every chunk are stored."""
    length = multiple_of_chunk(length, CHUNK, EXACT)
    num_chunks = tl.cdiv(length, CHUNK)
    num_blocks: tl.constexpr = (V + VALUES - 1) // VALUES
    head = (tl.program_id(0) // num_blocks).to(tl.int64)
    first_token = head // heads * length * heads + head % heads
    recall_pointer += head * length
    from_start_pointer += head * length
    to_end_pointer += head * length
    place, feature = tl.arange(0, CHUNK), tl.arange(0, KEYS)
    column = tl.program_id(0) % num_blocks * VALUES + tl.arange(0, VALUES)
    MASK_K: tl.constexpr = K != KEYS
    MASK_V: tl.constexpr = V % VALUES != 0
    dtype = query_pointer.dtype.element_ty

    memory_grad = load(end_grad_pointer + head * K * V, column, feature, 1, V, V, K, MASK_V, MASK_K)  # [V, K]
    for step in range(num_chunks):
        i = num_chunks - 1 - step
        start = i * CHUNK
        rest = length - start
        tokens, chunk = first_token + start.to(tl.int64) * heads, head * num_chunks + i
        square = chunk * CHUNK * CHUNK
        reads_grad = load(reads_grad_pointer + tokens * V, place, column, heads * V, 1, rest, V, not EXACT, MASK_V)
        store(ends_grad_pointer + chunk * V * K, memory_grad, column, feature, K, 1, V, K, MASK_V, MASK_K)

        if CORRECTS or not CHANNELS:
            key = load(key_pointer + tokens * K, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K)
        if not CHANNELS:
            written_key = key
        else:
            written_key = load(written_key_pointer + tokens * K, place, feature, heads * K, 1, rest, K, not EXACT,
                               MASK_K)  # fmt: skip
        solved = dot(rounded(memory_grad, dtype), tl.trans(written_key), PRECISION)  # [V, C]
        if DECAYS > 0:
            solved *= load_numbers(to_end_pointer, start + place, length, EXACT)[None, :]
        scores = load(scores_pointer + square, place, place, CHUNK, 1, CHUNK, CHUNK, False, False)
        solved += dot(tl.trans(reads_grad), scores, PRECISION)
        if CORRECTS:
            inverse = load(inverse_pointer + square, place, place, CHUNK, 1, CHUNK, CHUNK, False, False)
            solved = dot(rounded(solved, dtype), inverse, PRECISION)
        store(solved_pointer + chunk * V * CHUNK, solved, column, place, CHUNK, 1, V, CHUNK, MASK_V, False)

        query = load(query_pointer + tokens * K, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K)
        scaled_grad = tl.trans(reads_grad)  # [V, C]
        if DECAYS > 0:
            memory_grad *= tl.load(from_start_pointer + tl.minimum(start + CHUNK, length) - 1)
            scaled_grad *= load_numbers(from_start_pointer, start + place, length, EXACT)[None, :]
        if CHANNELS:
            memory_grad *= load_numbers(of_start_pointer + chunk * K, feature, K, not MASK_K)[None, :]
        memory_grad += dot(rounded(scaled_grad, dtype), query, PRECISION)
        if CORRECTS:
            recall = load_numbers(recall_pointer, start + place, length, EXACT)  # ρ a
            memory_grad += dot(rounded(-recall[None, :] * solved, dtype), key, PRECISION)
    store(memory_grad_pointer + head * K * V, memory_grad, column, feature, 1, V, V, K, MASK_V, MASK_K)


# --- kernel 4: the other gradients, all chunks in parallel -----------------------------------------------------------


@triton.jit
def gradient_kernel(query_pointer, key_pointer, value_pointer, beta_pointer, correction_pointer,
                    from_start_pointer, to_end_pointer, decay_pointer, fine_pointer,
                    starts_pointer, writes_pointer, ends_grad_pointer, solved_pointer, reads_grad_pointer,
                    length,
                    query_grad_pointer, key_grad_pointer, value_grad_pointer, beta_grad_pointer,
                    correction_grad_pointer, log_decay_grad_pointer,
                    heads: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
                    CHUNK: tl.constexpr,
                    CORRECTS: tl.constexpr, DECAYS: tl.constexpr,
                    EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients in the tokens of one chunk, for KEYS features.

    The program of the first features also stores V' and β'. ρ' and g' are sums over features: every program stores its
    part, ``[B, H, K/KEYS, T]``.
    """
    length = multiple_of_chunk(length, CHUNK, EXACT)
    num_chunks = tl.cdiv(length, CHUNK)
    num_parts: tl.constexpr = (K + KEYS - 1) // KEYS
    NUM_BLOCKS: tl.constexpr = (V + VALUES - 1) // VALUES
    part, chunk = tl.program_id(0) % num_parts, (tl.program_id(0) // num_parts).to(tl.int64)
    head, start = chunk // num_chunks, (chunk % num_chunks).to(tl.int32) * CHUNK
    rest = length - start
    tokens = (head // heads * length + start) * heads + head % heads
    numbers, numbers_of_part = head * length + start, (head * num_parts + part) * length + start
    decay_pointer += numbers
    fine_pointer += numbers
    starts_pointer += chunk * V * K
    ends_grad_pointer += chunk * V * K
    writes_pointer += chunk * V * CHUNK
    solved_pointer += chunk * V * CHUNK
    place, feature = tl.arange(0, CHUNK), part * KEYS + tl.arange(0, KEYS)
    MASK_K: tl.constexpr = K % KEYS != 0
    MASK_V: tl.constexpr = V % VALUES != 0
    dtype = query_pointer.dtype.element_ty

    key = load(key_pointer + tokens * K, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K)
    query = load(query_pointer + tokens * K, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K)
    scores_grad = tl.zeros([CHUNK, CHUNK], tl.float32)
    for j in range(NUM_BLOCKS):
        column = j * VALUES + tl.arange(0, VALUES)
        writes = load(writes_pointer, column, place, CHUNK, 1, V, CHUNK, MASK_V, False)  # [V, C]
        reads_grad = load(reads_grad_pointer + tokens * V, place, column, heads * V, 1, rest, V, not EXACT, MASK_V)
        scores_grad += dot(reads_grad, writes, PRECISION)
    scores_grad = _times_decay(scores_grad, decay_pointer, fine_pointer, place, place, rest, False, DECAYS, EXACT)
    if DECAYS > 0:
        below = place[:, None] > place[None, :]
        pairs = tl.where(below, scores_grad, 0.0) * dot(query, tl.trans(key), PRECISION)
        log_decay_grad = tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)
    scores_grad = rounded(scores_grad, dtype)

    if CORRECTS:
        if DECAYS > 0:
            tl.debug_barrier()
        lower_grad = tl.zeros([CHUNK, CHUNK], tl.float32)
        for j in range(NUM_BLOCKS):
            column = j * VALUES + tl.arange(0, VALUES)
            writes = load(writes_pointer, column, place, CHUNK, 1, V, CHUNK, MASK_V, False)
            solved = tl.trans(load(solved_pointer, column, place, CHUNK, 1, V, CHUNK, MASK_V, False))  # [C, V]
            lower_grad -= dot(solved, writes, PRECISION)
        correction = load_numbers(correction_pointer + numbers, place, rest, EXACT)
        lower_grad = _times_decay(lower_grad, decay_pointer, fine_pointer, place, place, rest, True, DECAYS, EXACT)
        pairs = lower_grad * dot(key, tl.trans(key), PRECISION)
        correction_grad = tl.sum(pairs, axis=1)
        if DECAYS > 0:
            log_decay_grad += correction * correction_grad - tl.sum(correction[:, None] * pairs, axis=0)
        lower_grad = rounded(correction[:, None] * lower_grad, dtype)  # B

    if DECAYS > 0:
        tl.debug_barrier()
    query_grad = tl.zeros([CHUNK, KEYS], tl.float32)  # Y'Wᵀ
    written_grad = tl.zeros([CHUNK, KEYS], tl.float32)  # NGᵀ
    recalled_grad = tl.zeros([CHUNK, KEYS], tl.float32)  # XWᵀ
    memory_sum = 0.0  # sum(W ∘ G)
    for j in range(NUM_BLOCKS):
        column = j * VALUES + tl.arange(0, VALUES)
        writes = load(writes_pointer, column, place, CHUNK, 1, V, CHUNK, MASK_V, False)
        reads_grad = load(reads_grad_pointer + tokens * V, place, column, heads * V, 1, rest, V, not EXACT, MASK_V)
        memory = load(starts_pointer, column, feature, K, 1, V, K, MASK_V, MASK_K)  # [V, K]
        end_grad = load(ends_grad_pointer, column, feature, K, 1, V, K, MASK_V, MASK_K)
        query_grad += dot(reads_grad, memory, PRECISION)
        written_grad += dot(tl.trans(writes), end_grad, PRECISION)
        if CORRECTS:
            solved = tl.trans(load(solved_pointer, column, place, CHUNK, 1, V, CHUNK, MASK_V, False))
            recalled_grad += dot(solved, memory, PRECISION)
        if DECAYS > 0:
            memory_sum += tl.sum(memory.to(tl.float32) * end_grad.to(tl.float32))

    if DECAYS > 0:
        tl.debug_barrier()
        key = load(key_pointer + tokens * K, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K)
        query = load(query_pointer + tokens * K, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K)
        from_start = load_numbers(from_start_pointer + numbers, place, rest, EXACT)
        query_grad *= from_start[:, None]
        written_grad *= load_numbers(to_end_pointer + numbers, place, rest, EXACT)[:, None]
        written_sum = tl.sum(key.to(tl.float32) * written_grad, axis=1)
        last = tl.minimum(CHUNK, rest) - 1
        last_grad = tl.sum(written_sum) + tl.load(from_start_pointer + numbers + last) * memory_sum
        log_decay_grad += tl.sum(query.to(tl.float32) * query_grad, axis=1) - written_sum
        log_decay_grad += tl.where(place == last, last_grad, 0.0)
    query_grad += dot(scores_grad, key, PRECISION)
    store(query_grad_pointer + tokens * K, query_grad, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K)
    key_grad = written_grad + dot(tl.trans(scores_grad), query, PRECISION)
    if CORRECTS:
        if DECAYS > 0:
            recalled_grad *= from_start[:, None]
        recalled_sum = tl.sum(key.to(tl.float32) * recalled_grad, axis=1)
        correction_grad -= recalled_sum
        tl.store(correction_grad_pointer + numbers_of_part + place, correction_grad, mask=place < rest)
        if DECAYS > 0:
            log_decay_grad -= correction * recalled_sum
        key_grad -= correction[:, None] * recalled_grad
        key_grad += dot(lower_grad, key, PRECISION)
        key_grad += dot(tl.trans(lower_grad), key, PRECISION)
    store(key_grad_pointer + tokens * K, key_grad, place, feature, heads * K, 1, rest, K, not EXACT, MASK_K)
    if DECAYS > 0:
        tl.store(log_decay_grad_pointer + numbers_of_part + place, log_decay_grad, mask=place < rest)

    if DECAYS > 0:
        tl.debug_barrier()
    if part == 0:
        beta = load_numbers(beta_pointer + numbers, place, rest, EXACT)
        beta_grad = tl.zeros([CHUNK], tl.float32)
        for j in range(NUM_BLOCKS):
            column = j * VALUES + tl.arange(0, VALUES)
            scaled_value_grad = load(solved_pointer, column, place, CHUNK, 1, V, CHUNK, MASK_V, False)  # X
            scaled_value_grad_f = tl.trans(scaled_value_grad).to(tl.float32)
            value = load(value_pointer + tokens * V, place, column, heads * V, 1, rest, V, not EXACT, MASK_V)
            beta_grad += tl.sum(scaled_value_grad_f * value.to(tl.float32), axis=1)
            value_grad = beta[:, None] * scaled_value_grad_f
            store(value_grad_pointer + tokens * V, value_grad, place, column, heads * V, 1, rest, V, not EXACT, MASK_V)
        tl.store(beta_grad_pointer + numbers + place, beta_grad, mask=place < rest)
