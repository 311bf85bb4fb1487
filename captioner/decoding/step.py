"""(D writes the real one)."""
from typing import NamedTuple
import numpy as np
import numpy.typing as npt
class Likeliest(NamedTuple):
    logprob: npt.NDArray[np.float32]
    word: npt.NDArray[np.int64]
    named: npt.NDArray[np.float32]
