"""Every metric of the server: the list (catalog.py), the registry that is fed as records and requests pass by, and its
page. It knows records, and neither engines nor HTTP.
"""

from server.metrics.labels import quantization_label
from server.metrics.memory import unaccounted
from server.metrics.model import ModelMetrics, Watched
from server.metrics.registry import Metrics

__all__ = [
    "Metrics",
    "ModelMetrics",
    "Watched",
    "quantization_label",
    "unaccounted",
]
