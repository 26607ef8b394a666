"""What torch's `varlen_attn` computes, in plain torch, for a machine whose torch has no such kernel."""

import torch


def plain_varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    """Attends sequence by sequence, with flash's own rules: queries are the last of the keys' tokens, and a
    window reaches so many back.
    """
    assert key.shape[1] == query.shape[1] or enable_gqa
    assert window_size[1] == 0
    attended = []
    starts = zip(cu_seq_q.tolist(), cu_seq_k.tolist(), strict=True)
    begin = next(starts)
    for end in starts:
        q, k, v = query[begin[0] : end[0]], key[begin[1] : end[1]], value[begin[1] : end[1]]
        assert len(q) <= max_q
        assert len(k) <= max_k
        k, v = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        back = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        hidden = (back < 0) | (back > (window_size[0] if window_size[0] >= 0 else max_k))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        attended.append(torch.einsum("hqk,khd->qhd", weights, v))
        begin = end
    assert begin == (len(query), len(key))
    return torch.cat(attended)
