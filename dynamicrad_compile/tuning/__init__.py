"""The tuner: parameters for each regime of motion, searched on proxies of attention with Nevergrad."""

from .api import tune
from .captures import record_attention
from .proxy import PROXIES, published_proxy, video_proxy
from .task import Task

__all__ = ["PROXIES", "Task", "published_proxy", "record_attention", "tune", "video_proxy"]
