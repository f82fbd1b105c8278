"""Token mixers as plain `torch.nn` modules: a parallel form for training, a recurrent form for decoding, proved equal.

Every mixer keeps to one signature, so that `palimpsest.models.memory_lm` can put any of them into a block:

    forward(hidden, state=None, mask=None) -> output, state      hidden, output: [batch, time, width]
    step(hidden, state) -> output, state                         hidden, output: [batch, width]
    start(batch) -> state                                        the state before the first token

A state is a dictionary of tensors whose first dimension is the batch; its size does not grow with time, except that of
attention without a window. `forward` continues from a state where one is given. `mask` [batch, time] is true where a
token is real; padding stands after the real tokens of its row, and changes no state. What a mixer wants to add to the
training loss, or to show, is in its attributes `penalty` and `trace` after a forward pass.

Beside each fast form stands the naive one, `naive_...`, a loop over tokens that reads like the paper: the oracle of
the tests.
"""

from torch import Tensor

State = dict[str, Tensor]
