"""Prepared cases on disk: one record each, many to a shard, and the jobs that write them."""
