"""Which decoder layer is a model's last: behind it, nobody looks at a row whose logits are not wanted.

Such rows' keys and values are needed, but not the rest of that layer: of a prompt, the layer's second half for all rows
but the last one (layer_run.py). Nothing is believed by name: with all that the last layer gives of unwanted rows made
NaN, the logits of the others must be what they were, bit for bit. Where they are not, all rows are computed. Not here:
when it is worth leaving something out (fuse_layer.py).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from server.model.batch import Batch
from server.model.fuse_layer import FusedLayer
from server.model.proof import Proof

if TYPE_CHECKING:
    from server.model.runner import PagedRunner


def find_last_layer(runner: PagedRunner, proof: Proof) -> FusedLayer | None:
    """Tells the model's last layer that it is the last, where it is fused and that is proven; the layer."""
    batch = proof.batch
    called: list[FusedLayer] = []
    with ExitStack() as hooks:
        for module in runner.model.modules():
            if isinstance(module, FusedLayer):
                hooks.enter_context(module.register_forward_pre_hook(lambda layer, _: called.append(layer)))
        expected = runner.logits(batch).clone()
    if not called:
        return None
    with called[-1].register_forward_hook(lambda *call: _without_unwanted(call[-1], batch)):
        found = runner.logits(batch)
    if not torch.equal(found, expected):
        return None
    vars(called[-1])["_is_last"] = True
    return called[-1]


def _without_unwanted(given: Any, batch: Batch) -> torch.Tensor:
    """[1, rows, hidden] with NaN in all rows but each chunk's last."""
    ends = torch.tensor([len(chunk.tokens) for chunk in batch.chunks]).cumsum(0)
    poisoned = torch.full_like(given, torch.nan)
    poisoned[:, ends - 1] = given[:, ends - 1]
    return poisoned
