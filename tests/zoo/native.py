"""Machine code by ctypes."""

import ctypes

ctypes.CDLL(None).abs(-3)
ctypes.CDLL("libm.so.6").abs(-3)
