"""Two common bugs, for a look at a report: `infllmv2 check docs/examples/two_bugs.py`."""

from dataclasses import replace

import torch

from infllmv2_impls.eager import IMPLEMENTATION as EAGER

capabilities = {"gradients": False, "validates": [], "group_sizes": [2, 4]}


def select(*, config, **given):
    """Select one local block too few: w / B of them, and not w / B + 1."""
    fewer = max(1, config.local_blocks - 1)
    return EAGER.select(config=replace(config, local_override=fewer), **given)


def attend(*, q, k, **given):
    """Let query head h read key/value head h % HK, and not h // G."""
    order = sorted(range(q.shape[1]), key=lambda head: head % k.shape[1])
    out, lse = EAGER.attend(q=q[:, order], k=k, **given)
    back = torch.tensor(order, device=q.device).argsort()
    return out[:, back], lse[:, back]
