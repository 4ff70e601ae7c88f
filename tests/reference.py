"""The equations of the papers as NumPy loops, float64: what the library is tested against.

One head and one sequence; vectors and matrices stand as in Schlag, Irie & Schmidhuber (2021), W ``[V, K]``, W k, v ⊗ k.
Only what enters and leaves is transposed to the library's ``[K, V]``. Nothing here is shared with the library.

Everything but the comparisons is analytic, so that f(x + i·h·d).imag / h is the exact derivative of f along d
(the complex step: no difference is taken, hence no digits are lost, and h may be 1e-30).
"""

import numpy as np


def attention(
    query,
    key,
    value,
    beta,
    log_decay=None,
    fast_weights=None,
    key_sum=None,
    segment_ids=None,
    *,
    rule,
    normalize=False,
    eps=1e-6,
    norms=None,
):
    """Causal: query, key ``[T, K]``, value ``[T, V]``, beta ``[T]``, log_decay ``[T]`` or ``[T, K]``, ids ``[T]``.

    Returns y ``[T, V]``, the fast weights ``[K, V]`` and key_sum ``[K]`` after the last token. The norms that fwm
    clips are appended to ``norms``, if that is a list.
    """
    length, key_size = key.shape
    W = np.zeros((value.shape[1], key_size)) if fast_weights is None else fast_weights.T
    z = np.zeros(key_size) if key_sum is None else key_sum
    reads = []
    for i in range(length):
        q, k, v, strength = query[i], key[i], value[i], beta[i]
        if segment_ids is not None and i > 0 and segment_ids[i] != segment_ids[i - 1]:
            W, z = 0 * W, (0 * z if normalize else z)
        if log_decay is not None:
            alpha = np.exp(log_decay[i])  # one number, or one per column (key channel) of W
            W, z = W * alpha, (z * alpha if normalize else z)

        if rule == "sum":  # eq. 17
            W = W + strength * np.outer(v, k)
        elif rule == "oja":  # Irie & Schmidhuber 2023
            W = W + strength * np.outer(v, k - W.T @ v)
        elif rule in ("delta", "fwm"):
            recalled = W @ k  # eq. 20
            if normalize == "retrieval":
                # Eq. 27 with the authors' eps: k/(d + eps) retrieves and is written, with the strength βd. For eps = 0
                # that is v̄ = Wk/d and a write of β(v − v̄) ⊗ k. At the first token, and for eps = 0 wherever d = 0,
                # nothing is divided.
                d = z @ k
                if (np.real(d) != 0) if eps == 0 else np.any(np.real(z) != 0):
                    recalled, strength = recalled / (d + eps), strength * d / (d + eps)
            W = W + strength * np.outer(v - recalled, k)  # eq. 24
        else:
            raise ValueError(f"no equation of rule {rule!r}")
        if rule == "fwm":
            norm = np.sqrt(np.sum(W**2))
            W = W / norm if np.real(norm) > 1 else W
            if norms is not None:
                norms.append(norm)

        y = W @ q  # eq. 25
        if normalize:
            z = z + (strength * k if rule == "sum" else k)  # eq. 26
            y = y / (z @ q + eps)  # eq. 28
        reads.append(y)
    return np.stack(reads) if reads else value, W.T, z


def delta_by_replacement(query, key, value, beta):
    """The delta rule as the authors derive it, eq. 20-23: mix a new value, remove the old one, write the new."""
    W = np.zeros((value.shape[1], key.shape[1]))
    reads = []
    for q, k, v, strength in zip(query, key, value, beta, strict=True):
        old = W @ k
        new = strength * v + (1 - strength) * old
        W = W - np.outer(old, k) + np.outer(new, k)
        reads.append(W @ q)
    return np.stack(reads), W.T


def cross_attention(query, key, value, key_mask=None, fast_weights=None, key_sum=None, *, normalize=False, eps=1e-6):
    """Not causal: query ``[T, K]``, key ``[S, K]``, value ``[S, V]``, key_mask ``[S]``; all is written, then read."""
    W = np.zeros((value.shape[1], key.shape[1])) if fast_weights is None else fast_weights.T
    z = np.zeros(key.shape[1]) if key_sum is None else key_sum
    for i in range(len(key)):
        if key_mask is None or key_mask[i]:
            W, z = W + np.outer(value[i], key[i]), z + key[i]
    reads = [W @ q / (z @ q + eps if normalize else 1) for q in query]
    return np.stack(reads), W.T, z


def batched(one_head, arrays, segment_ids=None, lengths=None, **options):
    """``one_head`` over [B, T, H, ·] arrays and [B, H, ·] memories (``fast_weights``, ``key_sum``), by name.

    With lengths ``[B]`` the rows are cut, and their outputs are filled up with zeros.
    """

    def pick(name, x, b, h, stop):
        return x if x is None else x[b, h] if name in ("fast_weights", "key_sum") else x[b, :stop, h]

    batch, length, heads, _ = arrays["key"].shape
    results = []
    for b in range(batch):
        stop = length if lengths is None else lengths[b]
        segments = {} if segment_ids is None else {"segment_ids": segment_ids[b, :stop]}
        for h in range(heads):
            inputs = {name: pick(name, x, b, h, stop) for name, x in arrays.items()}
            reads, *memory = one_head(**inputs, **segments, **options)
            results.append((np.pad(reads, ((0, length - stop), (0, 0))), *memory))
    outputs, *memories = (np.stack(x).reshape(batch, heads, *x[0].shape) for x in zip(*results, strict=True))
    return np.swapaxes(outputs, 1, 2), *memories


def derivative_along(function, arrays, name, direction):
    """d/dh function(arrays with arrays[name] + h·direction) at 0, by the complex step."""
    step = 1e-30
    moved = arrays | {name: arrays[name] + 1j * step * direction}
    return np.imag(function(moved)) / step
