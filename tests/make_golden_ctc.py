"""Writes tests/fixtures/torch_ctc.npz: PyTorch's CTC loss and gradient of the logits, in float64.

Needs torch (2.13.0 was used) and numpy, and nothing of this project. Rows of several lengths, with
repeated labels, one without labels, one whose paths are few; for the blank 0 and for another.

    pip install torch==2.13.0 && python tests/make_golden_ctc.py
"""

from pathlib import Path

import numpy as np
import torch

B, T, V, N = 6, 14, 7, 5
LOGIT_LENGTHS = np.array([14, 14, 9, 7, 12, 1])
LABEL_LENGTHS = np.array([5, 3, 4, 5, 0, 1])


def main() -> None:
    rng = np.random.RandomState(0)
    arrays = {
        "logits": 2 * rng.standard_normal((B, T, V)),
        "logit_lengths": LOGIT_LENGTHS,
        "label_lengths": LABEL_LENGTHS,
    }
    for blank in (0, 3):
        labels = rng.randint(0, V - 1, (B, N))
        labels += labels >= blank
        labels[2, 1:3] = labels[2, 0]
        logits = torch.tensor(arrays["logits"], requires_grad=True)
        loss = torch.nn.CTCLoss(blank=blank, reduction="none")(
            logits.log_softmax(-1).transpose(0, 1),
            torch.tensor(labels),
            torch.tensor(LOGIT_LENGTHS),
            torch.tensor(LABEL_LENGTHS),
        )
        loss.sum().backward()
        arrays[f"labels_{blank}"] = labels
        arrays[f"loss_{blank}"] = loss.detach().numpy()
        arrays[f"gradient_{blank}"] = logits.grad.numpy()
    np.savez_compressed(Path(__file__).parent / "fixtures" / "torch_ctc.npz", **arrays)


if __name__ == "__main__":
    main()
