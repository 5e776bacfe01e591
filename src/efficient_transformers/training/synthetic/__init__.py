"""Generated data: ListOps, Pathfinder and recall."""
