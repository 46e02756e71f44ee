"""Kernel regression and density estimation, computed by attention: `kernel_regression`, `log_density`, `select_bandwidth`.

`jflash.sklearn` has the same as scikit-learn estimators.
"""

from ._api import RegressionStats as RegressionStats
from ._api import kernel_regression as kernel_regression
from ._api import log_density as log_density
from ._bandwidth import select_bandwidth as select_bandwidth
from ._points import PrecisionWarning as PrecisionWarning
