"""Attention written a second time, in NumPy float64 and one row at a time.

It shares nothing with the package: not its masks, not its paging.
"""

import numpy as np


def attention(
    query, key, value, *, scale=None, is_causal=False, q_offset=None, query_seq_lengths=None,
    key_value_seq_lengths=None, local_window_size=None, logits_softcap=None,
):  # fmt: skip
    """`[B, T, N, H]` output and `[B, T, N]` log-sum-exp; arguments as in the op."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    for b in range(B):
        queries = T if query_seq_lengths is None else int(query_seq_lengths[b])
        offset = 0 if q_offset is None else int(np.broadcast_to(q_offset, (B,))[b])
        held = S if key_value_seq_lengths is None else int(key_value_seq_lengths[b])
        for t in range(queries):
            first, end = _span(offset + t, held, is_causal, local_window_size)
            if first >= end:
                continue
            keys, values = (x[b, first:end].swapaxes(0, 1) for x in (key, value))  # [K, S, H]
            rows = query[b, t].reshape(K, N // K, H) @ keys.swapaxes(1, 2)
            rows = rows * (H**-0.5 if scale is None else scale)
            if logits_softcap is not None:
                rows = logits_softcap * np.tanh(rows / logits_softcap)
            most = rows.max(axis=-1, keepdims=True)
            weights = np.exp(rows - most)
            total = weights.sum(axis=-1, keepdims=True)
            lse[b, t] = (most + np.log(total)).reshape(N)
            out[b, t] = (weights @ values / total).reshape(N, H)
    return out, lse


def _span(position, held, is_causal, window):
    """First key seen and one past the last."""
    first, end = 0, held
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        first, end = max(first, position - left), min(end, position + right + 1)
    if is_causal:
        end = min(end, position + 1)
    return first, end


def unpage(pages, page_table, length):
    """The first `length` tokens of one row: `[length, K, H]`."""
    pages = np.asarray(pages, np.float64)
    K, page_size, H = pages.shape[1:]
    tokens = np.zeros((length, K, H))
    for position in range(length):
        page = int(page_table[position // page_size])
        tokens[position] = pages[page, :, position % page_size]
    return tokens


def decode_attention(
    query, k_pages, v_pages, page_table, lengths, *, local_window_size=None, **options
):
    """As the op: query t of a row sits at `length - T + t`, and sees its past."""
    query, page_table = np.asarray(query), np.asarray(page_table)
    left = local_window_size[0] if isinstance(local_window_size, tuple) else local_window_size
    window = None if left is None else (left, 0)
    rows = []
    for b, length in enumerate(np.asarray(lengths)):
        keys, values = (unpage(x, page_table[b], length)[None] for x in (k_pages, v_pages))
        row = attention(
            query[b : b + 1], keys, values, is_causal=True, q_offset=length - query.shape[1],
            local_window_size=window, **options,
        )  # fmt: skip
        rows.append(row)
    return tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))


def rope_kv_write(q, k, v, cos, sin, k_pages, v_pages, page_table, start, num_tokens):
    """As the op, as complex numbers: `(x₁ + i·x₂) · (cos + i·sin)`."""
    q, k, v, k_pages, v_pages = (np.array(x, np.float64) for x in (q, k, v, k_pages, v_pages))
    turn = (np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64))[:, :, None]

    def rotate(x):
        half = x.shape[-1] // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    q, k = rotate(q), rotate(k)
    page_size = k_pages.shape[2]
    for b in range(len(q)):
        for t in range(int(num_tokens[b])):
            page, slot = divmod(int(start[b]) + t, page_size)
            k_pages[int(page_table[b, page]), :, slot] = k[b, t]
            v_pages[int(page_table[b, page]), :, slot] = v[b, t]
    return q, k, k_pages, v_pages


def add_rms_norm(x, residual, weight, *, eps):
    """As the op, without rounding the sum."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    total = x if residual is None else x + np.asarray(residual, np.float64)
    return total / np.sqrt((total**2).mean(axis=-1, keepdims=True) + eps) * weight, total


def matmul(x, weight, bias, residual=None, *, transposed=False, gate=None):
    """As the op, one column at a time."""
    if residual is not None:
        out = matmul(x, weight, bias, transposed=transposed, gate=gate)
        return out + np.asarray(residual, np.float64)
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    weight = weight if transposed else weight.T
    out = np.stack([(x * column).sum(axis=-1) for column in weight], axis=-1)
    if bias is not None:
        out = out + np.asarray(bias, np.float64)
    if gate is None:
        return out
    half = out.shape[-1] // 2
    first, second = out[..., :half], out[..., half:]
    if gate == "silu":
        return first * (1 / (1 + np.exp(-first))) * second
    inner = np.sqrt(2 / np.pi) * (first + 0.044715 * first**3)
    return first * (0.5 + 0.5 * np.tanh(inner)) * second
