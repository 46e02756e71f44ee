"""What standard attention moves: its passes over arrays that do not stay on chip, itemised by hand.

Bare: Algorithms 0 (forward) and 3 (backward) of Dao et al., arXiv:2205.14135. Unfused adds a causal mask C (one byte an element, as
`masked_fill` reads it) and dropout, whose choices Z are saved as one byte each, one pass for each operation. The scale is a pass
over Q, which is small; it is left out.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Step:
  """One pass: which arrays it reads and which it writes, by name."""

  name: str
  reads: str
  writes: str

  def bytes(self, batch: int, length: int, heads: int, width: int, item: int = 2) -> int:
    """Bytes moved, with `item` bytes an element. Z is a boolean [B, N, T, T], C one [T, T]; dQ is laid out as Q, and so on."""
    square = batch * heads * length**2
    sizes = {"Z": square, "C": length**2} | dict.fromkeys(("Q", "K", "V", "O"), batch * heads * length * width * item)
    return sum(sizes.get(x.removeprefix("d"), square * item) for x in (self.reads + " " + self.writes).split())

  @property
  def squares(self) -> int:
    """How many N x N arrays of the inputs' dtype are read or written."""
    return sum(x.strip("d'") in ("S", "P") for x in (self.reads + " " + self.writes).split())


BARE: Sequence[Step] = (
  Step("S = Q Kᵀ", "Q K", "S"),
  Step("P = softmax(S)", "S", "P"),
  Step("O = P V", "P V", "O"),
  Step("dV = Pᵀ dO", "P dO", "dV"),
  Step("dP = dO Vᵀ", "dO V", "dP"),
  Step("dS = P ∘ (dP - rowsum(P ∘ dP))", "P dP", "dS"),
  Step("dQ = dS K", "dS K", "dQ"),
  Step("dK = dSᵀ Q", "dS Q", "dK"),
)
UNFUSED: Sequence[Step] = (
  Step("S = Q Kᵀ", "Q K", "S"),
  Step("S' = S masked by C", "S C", "S'"),
  Step("P = softmax(S')", "S'", "P"),
  Step("P' = P dropped by Z", "P", "P' Z"),
  Step("O = P' V", "P' V", "O"),
  Step("dV = P'ᵀ dO", "P' dO", "dV"),
  Step("dP' = dO Vᵀ", "dO V", "dP'"),
  Step("dP = dP' dropped by Z", "dP' Z", "dP"),
  Step("dS' = P ∘ (dP - rowsum(P ∘ dP))", "P dP", "dS'"),
  Step("dS = dS' masked by C", "dS' C", "dS"),
  Step("dQ = dS K", "dS K", "dQ"),
  Step("dK = dSᵀ Q", "dS Q", "dK"),
)


def total(steps: Sequence[Step], batch: int, length: int, heads: int, width: int, item: int = 2) -> int:
  """Bytes of all passes."""
  return sum(step.bytes(batch, length, heads, width, item) for step in steps)
