"""One clip on several processes, for models whose library has no plan for it: `shard(model, mesh)`."""

from .api import shard, unshard
from .plans import ShardPlan

__all__ = ["ShardPlan", "shard", "unshard"]
