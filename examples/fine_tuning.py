"""A trained ResNet goes on with images of one digit alone, four at a time: its batch norms are better frozen.

python examples/fine_tuning.py
"""

from __future__ import annotations

import copy

import torch
from digits import Data, ResNet, accuracy, arguments, load, train

import triton_bn

if __name__ == "__main__":
    args = arguments(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, test = load(args.limit, device)
    torch.manual_seed(0)
    pretrained = triton_bn.convert(ResNet().to(device))
    losses = train(pretrained, data, args.epochs)
    print(
        f"{'trained':10} loss {losses[0]:.4f} → {losses[-1]:.4f}, "
        f"{accuracy(pretrained, test):.1%} of the test images are read"
    )

    zeros = Data(*(tensor[data.labels == 0] for tensor in data))
    for name, freeze in (("not frozen", False), ("frozen", True)):
        model = copy.deepcopy(pretrained)
        if freeze:
            # They normalize by what they have learned of all digits, whatever train() says.
            triton_bn.freeze(model, parameters=True)
        before = [b.clone() for b in model.buffers()]
        losses = train(model, zeros, epochs=1, batch=4, lr=1e-4)
        advanced = sum(map(lambda a, b: not torch.equal(a, b), model.buffers(), before))
        print(
            f"{name:10} loss {losses[0]:.4f} → {losses[-1]:.4f}, {accuracy(model, test):.1%} of the test "
            f"images are read; {advanced} of {len(before)} statistics have advanced"
        )
        triton_bn.unfreeze(model)  # and its batch norms learn again
